"""The host that command tests act on."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.harness import Host


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the caller's environment decides about a test."""
    for name in ("FWC_STATE_DIR", "NO_COLOR", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def host(tmp_path: Path, netns: str) -> Host:
    """A host with nftables; a test may give it another backend."""
    return Host(tmp_path, netns)
