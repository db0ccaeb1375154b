"""What goes wrong around trials, generations, members and the boot: damaged files, no room, no right, missing programs, kills, two at once.

Each command ends with a message and the right exit code, and nothing is half done.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from cli.harness import FWC, POLICY, Host, fwc, killed_at

from fwcompiler import boot

OTHER = POLICY.replace("192.0.2.10,", "192.0.2.11,")
CHANGING = (("allow", "agents", "198.51.100.7"), ("revoke", "agents", "198.51.100.99"), ("rollback", "--yes"), ("confirm",))


def used(host: Host) -> None:
    """Two generations, a member, and a third generation on trial, whose watcher is gone."""
    host.apply()
    host.apply(OTHER)
    assert host.fwc("allow", "agents", "198.51.100.99").code == 0


def wrong_types(text: str) -> str:
    """The same JSON with every value in a list."""
    return "".join(f"{json.dumps(_in_lists(json.loads(line)))}\n" for line in (text.splitlines() if "\n{" in text else [text]))


def _in_lists(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: [v] for k, v in data.items()}
    return [[v] for v in (data if isinstance(data, list) else [data])]


DAMAGE: dict[str, Callable[[str], str]] = {
    "nested": lambda _: "[" * 100_000,
    "a huge number": lambda _: "9" * 10_000,
    "null": lambda _: "null",
    "wrong types": wrong_types,
}
FILES = ("meta.json", "listing.json", "sets.json", "lists.json", "changes.json", "sums.json", "ssh.json")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(host: Host, damage: str) -> None:
    """Whatever a file of the state holds, no command falls over it, and a boot ends with rules that let admins in."""
    used(host)
    for name in (*(f"generations/2/{name}" for name in FILES), "members.log", "current"):
        path = host.state / name
        whole = path.read_text(encoding="utf-8")
        path.write_text(DAMAGE[damage](whole), encoding="utf-8")

        for command in (("status",), ("history",), ("members",), ("members", "--history"), ("diff", host.write(OTHER))):
            assert host.fwc(*command).code in (0, 1, 4), (name, command)
        host.run("nft", "delete", "table", "inet", "fwc")
        restored = host.fwc("restore")
        assert restored.code in (0, 4), (name, restored)
        assert "udp dport 5060" in host.ours() or "ONLY THE MINIMAL RULES" in restored.err, (name, restored)

        path.write_text(whole, encoding="utf-8")
        (host.state / "current").write_text("2", encoding="ascii")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_trial(host: Host, damage: str) -> None:
    """A trial whose files are damaged does not keep a boot from loading the last confirmed generation."""
    host.apply()
    ran = host.program("apply", host.write(OTHER), "--yes", "-q", "--confirm", "10m", "--no-wait")
    assert ran.code == 0, ran
    for name in ("trial.json", "before.json"):
        path = host.state / name
        path.write_text(DAMAGE[damage](path.read_text(encoding="utf-8")), encoding="utf-8")

    assert {host.fwc(command).code for command in ("status", "history", "members")} == {0}
    assert (host.fwc("restore").code, host.in_sync(POLICY)) == (0, True)


@pytest.mark.parametrize("command", CHANGING, ids=[c[0] for c in CHANGING])
def test_read_only_state(host: Host, command: tuple[str, ...]) -> None:
    """With a state directory that cannot be written to, nothing that has to be recorded is done."""
    used(host)
    before = host.ours()
    script = f'mount --bind "{host.state}" "{host.state}"; mount -o remount,ro,bind "{host.state}"; exec "$@"'

    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", FWC, *host.common, *command], capture_output=True, text=True, check=False
    )

    assert (ran.returncode, "Read-only file system; nothing was changed" in ran.stderr) == (4, True), ran
    assert host.ours() == before


KILLS = [
    ("fwcompiler.dynamic:_grant", "before", ("allow", "agents", "198.51.100.7"), {"198.51.100.7", "198.51.100.99"}),
    ("fwcompiler.kernel.runner:put_members", "after", ("allow", "agents", "198.51.100.7"), {"198.51.100.7", "198.51.100.99"}),
    ("fwcompiler.dynamic:_withdraw", "before", ("revoke", "agents", "198.51.100.99"), set()),
    ("fwcompiler.kernel.runner:take_member", "after", ("revoke", "agents", "198.51.100.99"), set()),
]


@pytest.mark.parametrize("backend", ["nftables", "iptables-legacy"])
@pytest.mark.parametrize(("place", "when", "command", "members"), KILLS, ids=[f"{k[1]} {k[0].rpartition(':')[2]}" for k in KILLS])
def test_members_killed(host: Host, backend: str, place: str, when: str, command: tuple[str, ...], members: set[str]) -> None:
    """`kill -9` of `allow` and `revoke` behind their record: the next command that writes carries the wish out."""
    host.backend = backend
    used(host)

    assert killed_at(host, place, when, *command) == -signal.SIGKILL
    host.apply(OTHER)

    found = host.fwc("members", "agents", "--json").json["members"]["agents"]
    assert {m["address"] for m in found} == members
    assert all(m["loaded"] and m["recorded"] for m in found)


ROLLBACKS = {
    "before commit": ("fwcompiler.apply:_execute", "before", OTHER),
    "after commit": ("fwcompiler.apply:_execute", "after", POLICY),
    "after record": ("fwcompiler.state:StateDir._make_current", "after", POLICY),
}


@pytest.mark.parametrize("moment", ROLLBACKS)
def test_rollback_killed(host: Host, moment: str) -> None:
    """`kill -9` of a return to an earlier generation leaves one of both in force, and the next command that writes settles it."""
    used(host)
    place, when, in_force = ROLLBACKS[moment]

    assert killed_at(host, place, when, "rollback", "--yes") == -signal.SIGKILL

    assert host.fwc("diff", host.write(in_force)).code == 0
    host.apply(in_force)
    assert host.in_sync(in_force)
    assert not (host.state / "generations" / "pending").exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_confirmation_killed(host: Host, when: str) -> None:
    """`kill -9` of a confirmation leaves it given or not given: what is in force is what would boot."""
    host.apply()
    ran = host.program("apply", host.write(OTHER), "--yes", "-q", "--confirm", "10m", "--no-wait")
    assert ran.code == 0, ran

    assert killed_at(host, "fwcompiler.state:StateDir._make_current", when, "confirm", "--same-session") == -signal.SIGKILL

    status = host.fwc("status", "--json").json
    assert (status["in_sync"], status["generation"]["number"], status["trial"] is None) == (True, 2, when == "after")
    if when == "before":
        assert host.fwc("rollback").code == 0
    assert host.in_sync(OTHER if when == "after" else POLICY)


@pytest.mark.parametrize("when", ["before", "after"])
def test_restore_killed(host: Host, when: str) -> None:
    """`kill -9` of a restore leaves nothing or all of it, and it can be run again."""
    used(host)
    host.run("nft", "delete", "table", "inet", "fwc")

    assert killed_at(host, "fwcompiler.kernel.runner:execute", when, "restore") == -signal.SIGKILL

    assert bool(host.ours()) is (when == "after")
    assert host.fwc("restore").code == 0
    assert host.in_sync(OTHER)


def test_members_at_the_same_time(host: Host) -> None:
    """Several at once let in and take out one after the other; all of them are in the kernel and in the record."""
    used(host)
    argv = (FWC, *host.common, "allow", "agents")

    running = [subprocess.Popen([*argv, f"198.51.100.{n}"], stdout=subprocess.DEVNULL) for n in range(100, 106)]
    running.append(subprocess.Popen([FWC, *host.common, "revoke", "agents", "198.51.100.99"], stdout=subprocess.DEVNULL))

    assert [child.wait(60) for child in running] == [0] * 7
    found = host.fwc("members", "agents", "--json").json["members"]["agents"]
    assert [(m["address"], m["loaded"], m["recorded"]) for m in found] == [(f"198.51.100.{n}", True, True) for n in range(100, 106)]


def test_install_boot_without_systemd(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where systemd is not installed the unit would never run: said with what to do instead, and nothing is written."""
    monkeypatch.setattr(boot, "FOLDER", str(host.folder / "etc").lstrip("/"))
    monkeypatch.setenv("PATH", str(host.folder / "empty"))

    ran = fwc("--state-dir", str(host.state), "install-boot")

    assert (ran.code, "systemd is not installed here" in ran.err) == (4, True), ran
    assert re.search(rf"hint: .* `/\S+/fwc --state-dir {host.state} restore`", ran.err), ran
    assert not (host.folder / "etc").exists()


def entries(value: Any) -> set[str]:
    """The names in a folder."""
    return set(os.listdir(value))  # noqa: PTH208 - names only


def test_nothing_is_left_in_the_state(host: Host) -> None:
    """After trials, returns and removals the state holds its files and no temporary one."""
    used(host)
    host.program("apply", host.write(POLICY), "--yes", "-q", "--confirm", "10m", "--no-wait")
    assert host.fwc("rollback").code == 0
    assert host.fwc("rollback", "--yes", "1").code == 0

    assert entries(host.state) == {"current", "generations", "lock", "members.log"}
