"""Hundreds of applies in a row, as a fleet does in a year of nightly lists: nothing is left behind, nothing grows."""

from __future__ import annotations

import gc
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
from cli.harness import BACKENDS, POLICY, Host

from fwcompiler.state import KEEP

APPLIES = {"nftables": 200, "iptables-nft": 40, "iptables-legacy": 40}
OTHER = POLICY.replace("198.51.100.16/28", "198.51.100.16/28, 203.0.113.128/26").replace("rtp: {from: anywhere}", "wss: {from: [agents]}")
OWN = re.compile(r"^(?:\s*(?:chain|set|counter) \S+ \{|:FWC-\S+|create fwc-\S+)", re.M)


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the listing itself is one of them


def namespaces() -> list[str]:
    """Every network namespace that this process holds open by a descriptor."""
    found: list[str] = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return sorted(target for target in found if target.startswith("net:"))


def resident() -> int:
    """Memory of this process in KiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def names(host: Host) -> list[str]:
    """Every chain and set that the kernel holds of fwc."""
    return sorted(each[0].strip() for each in OWN.finditer(host.ours()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_behind(backend: str, tmp_path: Path, netns: str) -> None:
    """Two policies take turns while members come and go: chains, sets, namespaces, descriptors, memory and state stay as they were."""
    host = Host(tmp_path, netns, backend)
    for text in (POLICY, OTHER, POLICY):
        host.apply(text)
    ours, files, memory, inside = names(host), 0, 0, [""]
    assert ours
    for n in range(APPLIES[backend]):
        host.apply((OTHER, POLICY)[n % 2])
        if n % 10 == 0:
            assert host.fwc("allow", "agents", f"198.51.100.{n}", "--for", "1h").code == 0
        if n % 10 == 5:
            assert host.fwc("revoke", "agents", f"198.51.100.{n - 5}").code == 0
        if n == APPLIES[backend] // 4:
            gc.collect()
            files, memory, inside = open_files(), resident(), namespaces()
    gc.collect()

    assert names(host) == ours
    assert open_files() == files
    assert namespaces() == inside
    assert resident() - memory < 20_000
    assert len(list((host.state / "generations").iterdir())) <= KEEP + 1
    assert host.fwc("members", "agents", "--json").json["members"] == {"agents": []}
    assert host.in_sync(POLICY)
