"""The systemd unit that restores the firewall at boot: before any interface comes up, and after those who flush everything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fwcompiler.backend import Command
from fwcompiler.diagnostics import HostRefused, UsageError
from fwcompiler.kernel import detached, runner

UNIT = "fwc.service"
FOLDER = "etc/systemd/system"
WANTED_BY = "sysinit.target"
_OTHERS = ("nftables", "iptables", "ip6tables", "netfilter-persistent", "ipset")
"""Services of distributions that load rules at the same time; some of them throw away what is loaded already."""


def unit_text(argv: Sequence[str], state: Path) -> str:
    """The unit (systemd.unit(5), systemd.special(7) on network-pre.target)."""
    others = " ".join(f"{name}.service" for name in _OTHERS)
    return f"""[Unit]
Description=Firewall rules of the last confirmed generation (fwc)
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target shutdown.target
Conflicts=shutdown.target
After=local-fs.target systemd-modules-load.service {others}
RequiresMountsFor={_quoted(str(state))}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={" ".join(_quoted(word) for word in argv)}
StandardError=journal+console

[Install]
WantedBy={WANTED_BY}
"""


def _quoted(word: str) -> str:
    """A word as systemd reads it back (systemd.syntax(7)): `%` and `$` mean something there."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if any(c.isspace() or c in "\"'\\;" for c in word) else escaped


def program() -> str:
    """The full path of `fwc`.

    Raises:
        UsageError: it is nowhere to be found.
    """
    beside = Path(sys.executable).with_name("fwc")
    found = str(beside) if beside.is_file() else runner.find("fwc")
    if found is None:
        raise UsageError("the program `fwc` is not installed: a unit has to name it", hint="install it, see the README")
    return found


def install(root: Path, state: Path) -> tuple[Path, ...]:
    """Write the unit and enable it; returns what was written.

    Raises:
        HostRefused: it cannot be written, there is no systemd, or it does not read it.
    """
    unit, link = _places(root)
    argv = (program(), "--state-dir", str(state), "restore")
    if root == Path("/") and runner.find("systemctl") is None:
        raise HostRefused(
            "systemd is not installed here: nothing would run the unit; nothing was written",
            hint=f"let what starts this host run `{' '.join(argv)}` before the network comes up",
        )
    text = unit_text(argv, state)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        fresh = unit.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.rename(unit)
        link.unlink(missing_ok=True)
        link.symlink_to(f"/{FOLDER}/{UNIT}")
    except OSError as error:
        raise HostRefused(f"cannot write {unit}: {error.strerror}; nothing is restored at boot", hint="this needs root") from error
    _reload(root)
    return unit, link


def uninstall(root: Path) -> tuple[Path, ...]:
    """Take the unit away; returns what was there.

    Raises:
        HostRefused: it cannot be taken away.
    """
    there = tuple(path for path in _places(root) if path.is_symlink() or path.exists())
    try:
        for path in there:
            path.unlink()
    except OSError as error:
        raise HostRefused(f"cannot remove {there[0]}: {error.strerror}", hint="this needs root") from error
    if there:
        _reload(root)
    return there


def _places(root: Path) -> tuple[Path, Path]:
    folder = root / FOLDER
    return folder / UNIT, folder / f"{WANTED_BY}.wants" / UNIT


def _reload(root: Path) -> None:
    """Let a running systemd know."""
    if root == Path("/") and detached.systemd_runs():
        detached.run(Command(("systemctl", "daemon-reload")))
