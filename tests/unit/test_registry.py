"""Backends are found like anybody's plug-ins, and one that is broken breaks only itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fwcompiler import registry
from fwcompiler.backend import Backend
from fwcompiler.diagnostics import UsageError

Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with one backend: its name, the entry's name, the module's text."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(distribution: str, entry: str, text: str) -> None:
        module = distribution.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entry} = {module}:backend\n", encoding="utf-8")

    return make


def test_built_in_backends_are_plug_ins() -> None:
    """Ours come in through the same door as anybody else's, and have the shape they promise."""
    assert set(registry.installed()) >= {"nftables", "iptables-nft", "iptables-legacy"}
    for name in ("nftables", "iptables-nft", "iptables-legacy"):
        backend = registry.load(name)
        assert isinstance(backend, Backend)
        assert backend.name == name


def test_listing_imports_nothing() -> None:
    """Asking which backends there are imports none of them."""
    script = (
        "import sys; from fwcompiler.registry import installed; installed(); print([m for m in sys.modules if m.startswith('fwcompiler_')])"
    )

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_core_imports_no_backend() -> None:
    """Importing every command imports no backend either."""
    imports = "import sys, fwcompiler.commands, fwcompiler.pipeline; fwcompiler.commands.registered()"
    script = f"{imports}; print([m for m in sys.modules if m.startswith('fwcompiler_')])"

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_two_of_one_name(install: Install) -> None:
    """Two distributions that offer the same name are an error that names both, with their versions."""
    install("other-firewall", "nftables", "backend = None\n")

    with pytest.raises(UsageError) as caught:
        registry.installed()

    assert "two backends are called `nftables`" in caught.value.message
    assert "fwcompiler_nftables:backend (fwcompiler" in caught.value.message
    assert "other_firewall:backend (other-firewall 1.2)" in caught.value.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('no module named luck')\n", "no module named luck"),
        ("import no_such_module_anywhere\n", "No module named"),
        ("nothing = 1\n", "backend"),
        ("def broken(:\n", "invalid syntax"),
        ("backend = 'a text'\n", "does not have the shape"),
    ],
)
def test_a_broken_one_breaks_only_itself(install: Install, text: str, reason: str) -> None:
    """A backend that cannot be imported, or is none, is told with its origin; the others work, and listing shows all."""
    install("broken-firewall", "broken", text)

    with pytest.raises(UsageError) as caught:
        registry.load("broken")

    assert "broken_firewall:backend (broken-firewall 1.2)" in caught.value.message
    assert reason in caught.value.message
    assert registry.load("nftables").name == "nftables"
    assert "broken" in registry.installed()


def test_unknown_name() -> None:
    """A name that nobody offers gets the closest one as a hint, or all of them."""
    with pytest.raises(UsageError) as near:
        registry.load("nftable")
    with pytest.raises(UsageError) as far:
        registry.load("zzz")

    assert near.value.hint == "did you mean `nftables`?"
    assert "iptables-legacy, iptables-nft, nftables" in far.value.hint
