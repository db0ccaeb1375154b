"""`verify --backend all`: what every backend loads means what the policy says, sets included."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.harness import BACKENDS, fwc

from fwcompiler.addresses import Ranges, address_text
from fwcompiler.kernel import ipset

COUNT = 600
"""More than are written into the rules' own files, so that they are filled as elements of their own."""
POLICY = """version: 1
groups:
  carriers: [{file: carriers.txt}]
services:
  sip: {from: [carriers]}
"""

pytestmark = pytest.mark.usefixtures("netns")


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """A policy whose carriers are a long list."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    carriers = "\n".join(address_text(4, 0x0B000000 + 2 * n) for n in range(COUNT))
    (tmp_path / "carriers.txt").write_text(carriers, encoding="utf-8")
    return str(path)


def test_all_backends_are_equal(policy: str) -> None:
    """A long list reaches all kernels whole; nothing is sampled."""
    ran = fwc("--backend", "all", "verify", policy, "--json")
    assert (ran.code, set(ran.json["compared"]), ran.json["sampled"]) == (0, set(BACKENDS), []), ran


def test_a_set_that_was_not_filled_whole(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that one backend's sets miss is found: what the kernel holds is read, not what it was sent."""
    change = ipset.change

    def lossy(name: str, version: int, add: Ranges, remove: Ranges) -> None:
        change(name, version, add[:-1], remove)

    monkeypatch.setattr(ipset, "change", lossy)
    ran = fwc("--backend", "all", "verify", policy)
    assert ran.code == 1, ran
    assert "from 11.0.4.174 to udp/5060" in ran.out, ran
