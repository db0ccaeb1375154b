"""Applies on trial, on real processes: whatever happens to the one who applied, the old rules come back, or stay confirmed.

After each: rules, static sets and dynamic members are those from before, rules of others are untouched, history says what
happened, and no process is left.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from cli.harness import BACKENDS, FWC, Host, killed_at, valid, wrapper

from fwcompiler.kernel import detached
from fwcompiler.trial import timer

OLD = """version: 1
groups:
  carriers: [198.51.100.16/28, 2001:db8:51::/48]
  agents: {members: [203.0.113.0/24], dynamic: {timeout: 12h, max: 64}}
  admins: [192.0.2.10]
services:
  sip: {from: [carriers, agents]}
  ssh: {from: [admins]}
"""
NEW = OLD.replace("198.51.100.16/28", "198.51.100.32/28").replace("sip: {from: [carriers, agents]}", "sip: {from: [carriers]}")
"""Another carrier, and agents are gone with their dynamic sets: what comes back has to be made anew."""
MINE = {"SSH_CONNECTION": "192.0.2.10 50022 198.51.100.5 22"}
OTHER = {"SSH_CONNECTION": "192.0.2.10 50024 198.51.100.5 22"}
PAIR = ("nftables", "iptables-nft")
LEGACY = "iptables-legacy"
CLEAN = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FWC_STATE_DIR", "SSH_CONNECTION")}


@dataclass
class World:
    """A host with the old policy, a recorded dynamic member and one that somebody put in by hand, and rules of others."""

    host: Host
    before: str
    foreign: str
    began: float

    def check_old(self) -> None:
        """Everything is as it was."""
        assert rules(self.host) == self.before
        self._check_rest()
        self.check_members()

    def check_members(self) -> None:
        """Both members are there, with less time than they had been given."""
        members = self.host.fwc("status", "--json").json["members"]["agents"]
        gone = time.monotonic() - self.began
        assert [(m["address"], m["seconds_left"] <= 3600, m["seconds_left"] >= 3600 - gone - 2) for m in members] == [
            ("192.0.2.66", True, True),
            ("192.0.2.77", True, True),
        ]

    def _check_rest(self) -> None:
        assert self.host.twins() == []
        assert foreign_rules(self.host) == self.foreign
        assert not (self.host.state / "generations" / "pending").exists()

    def check_new(self) -> None:
        """The new policy is in force, and rules of others are as they were."""
        assert self.host.in_sync(NEW)
        self._check_rest()

    def returned(self, within: float = 20) -> None:
        """Wait for the end of the trial, and check that all is as it was."""
        until(lambda: not (self.host.state / "trial.json").exists(), within)
        until(lambda: not watchers(self.host), within)
        self.check_old()
        found = valid("history", self.host.fwc("history", "--json").json)["generations"]
        assert [(g["number"], g["state"]) for g in found] == [(2, "rolled back"), (1, "in force")]


def rules(host: Host) -> str:
    """What the kernel holds of fwc, in an order that does not depend on what was made first; members are looked at elsewhere."""
    blocks = re.split(r"\n(?=\t(?:set|chain|counter) )", host.ours())
    return "\n".join(sorted(re.sub(r"elements = \{.*?\}", "", b, flags=re.S) if ".dynamic." in b[:40] else b for b in blocks))


def foreign_rules(host: Host) -> str:
    """What others have loaded."""
    return host.run("nft", "list", "table", "inet", "others")


def watchers(host: Host) -> list[int]:
    """Processes that wait for the end of this host's trial."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"fwcompiler.trial" in words and str(host.state).encode() in words:
                found.append(int(folder.name))
    return found


def until(true: Callable[[], bool], within: float = 20) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.05)


def world_of(host: Host, backend: str) -> World:
    """The world at the beginning of each test."""
    host.backend = backend
    host.run("nft", "-f", "-", stdin="table inet others { chain c { type filter hook input priority 10; tcp dport 9 counter drop; }; }")
    host.apply(OLD)
    began = time.monotonic()
    assert host.fwc("allow", "agents", "192.0.2.66", "--for", "1h").code == 0
    if backend == "nftables":
        host.run("nft", "add", "element", "inet", "fwc", "agents.dynamic.v4", "{ 192.0.2.77 timeout 1h }")
    else:
        host.run("ipset", "add", "fwc-agents~4", "192.0.2.77", "timeout", "3600")
    return World(host, rules(host), foreign_rules(host), began)


@pytest.fixture(params=PAIR)
def world(request: pytest.FixtureRequest, host: Host) -> World:
    """The world, with nftables and with iptables; a test may name the backends itself."""
    return world_of(host, request.param)


ALL = pytest.mark.parametrize("world", BACKENDS, indirect=True)
ONE = pytest.mark.parametrize("world", ["nftables"], indirect=True)
"""What has nothing to do with the backend."""


def on_trial(world: World, seconds: int, *more: str) -> None:
    """Apply the new policy on trial, without waiting."""
    ran = world.host.program("apply", world.host.write(NEW), "--yes", "-q", "--confirm", f"{seconds}s", "--no-wait", *more, env=MINE)
    assert ran.code == 0, ran


class Terminal:
    """fwc at a terminal of its own, waiting for the end of a trial."""

    def __init__(self, world: World, seconds: int) -> None:
        self.master, slave = pty.openpty()
        argv = [FWC, *world.host.common, "apply", world.host.write(NEW), "--yes", "--confirm", f"{seconds}s"]
        self.child = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**CLEAN, **MINE},
            preexec_fn=_own_terminal,  # noqa: PLW1509 - only this makes a terminal the controlling one
        )
        os.close(slave)
        self.screen = b""
        self.read(b"s left")

    def read(self, word: bytes = b"") -> str:
        """The screen, once a word is on it; without a word, once the program has ended."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (word and word in self.screen) and select.select([self.master], [], [], 30)[0]:
            try:
                self.screen += os.read(self.master, 4096)
            except OSError:
                break
        return self.screen.decode().replace("\r\n", "\n")

    def close(self) -> int:
        """Hang up, and the exit code."""
        os.close(self.master)
        return self.child.wait(20)


def _own_terminal() -> None:
    os.setsid()
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@ALL
def test_no_answer(world: World) -> None:
    """Nobody confirms: the old rules come back."""
    on_trial(world, 1)

    world.returned()
    why = world.host.fwc("history", "--json").json["generations"][0]["ending"]
    assert "not confirmed in time" in why


@ONE
def test_no_answer_while_it_waits(world: World) -> None:
    """Who waits at a terminal sees the time run, is told that the rules went back, and the exit code is 5."""
    terminal = Terminal(world, 1)
    screen = terminal.read()

    assert terminal.close() == 5
    assert "generation 2 was rolled back: not confirmed in time" in screen
    world.returned()


@pytest.mark.parametrize(
    ("world", "event"),
    [*product(PAIR, ("Ctrl-C", "SIGTERM", "hang-up", "kill -9")), (LEGACY, "hang-up"), (LEGACY, "kill -9")],
    indirect=["world"],
)
def test_whatever_happens_to_who_waits(world: World, event: str) -> None:
    """Ctrl-C, SIGTERM, a hang-up and `kill -9` end the waiting; the trial goes on and ends as it should."""
    terminal = Terminal(world, 2)
    if event == "Ctrl-C":
        os.write(terminal.master, b"\x03")
        assert "the trial goes on" in terminal.read()
        assert terminal.close() == 130
    elif event == "hang-up":
        assert terminal.close() == -signal.SIGHUP
    else:
        terminal.child.send_signal(signal.SIGTERM if event == "SIGTERM" else signal.SIGKILL)
        terminal.read()
        assert terminal.close() < 0

    world.returned()


@ONE
def test_watcher_ignores_signals(world: World) -> None:
    """What brings the old rules back does not care for Ctrl-C, hang-ups and the polite kill."""
    on_trial(world, 2)
    (watcher,) = watchers(world.host)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(watcher, number)

    world.returned()


FAULTS = {
    f"{when} {place.rpartition(':')[2].rpartition('.')[2]}": (place, when)
    for place, when in [
        ("fwcompiler.state:StateDir.begin_trial", "before"),
        ("fwcompiler.state:StateDir._number", "after"),
        ("fwcompiler.state:StateDir.begin_trial", "after"),
        ("fwcompiler.kernel.detached:start", "before"),
        ("fwcompiler.kernel.detached:start", "after"),
        ("fwcompiler.apply:_execute", "before"),
        ("fwcompiler.apply:_execute", "after"),
        ("fwcompiler.apply:_verify", "after"),
        ("fwcompiler.apply:reconcile", "after"),
    ]
}


@pytest.mark.parametrize(
    ("world", "fault"),
    [*product(PAIR, FAULTS), *product((LEGACY,), ("after begin_trial", "after _execute", "after _verify"))],
    indirect=["world"],
)
def test_killed_between_two_steps(world: World, fault: str) -> None:
    """`kill -9` at any step from arming to the record: the timer, or where none was armed yet the next command, puts it right."""
    place, when = FAULTS[fault]
    argv = ("apply", world.host.write(NEW), "--yes", "-q", "--confirm", "1s", "--no-wait")
    assert killed_at(world.host, place, when, *argv, env=MINE) == -signal.SIGKILL

    if watchers(world.host):
        world.returned()
    else:
        assert rules(world.host) == world.before
        time.sleep(1)
    world.host.apply(OLD)
    world.check_old()
    assert not (world.host.state / "trial.json").exists()


STOPPER = """
test "$*" = "-f -" || exec "$REAL" "$@"
text=$(cat); printf "%s\\n" "$text" | "$REAL" "$@"; code=$?
case "$text" in *"flush chain inet fwc"*) test -e "$HERE/stopped" || { touch "$HERE/stopped"; kill -STOP $PPID; } ;; esac
exit $code
"""


def test_stopped_while_it_commits(host: Host) -> None:
    """Whoever was stopped with the lock in hand has had his time: he is ended, and the old rules come back."""
    world = world_of(host, "nftables")
    folder = wrapper(host.folder / "bin", "nft", STOPPER)
    argv = [FWC, *host.common, "apply", host.write(NEW), "--yes", "-q", "--confirm", "1s", "--no-wait"]
    child = subprocess.Popen(argv, env={**CLEAN, **MINE, "PATH": f"{folder}:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL)

    assert child.wait(20) == -signal.SIGKILL
    world.returned()


@pytest.mark.parametrize("confirmed", [False, True])
def test_full_disk(host: Host, confirmed: bool) -> None:
    """A disk that fills up during a trial keeps neither the old rules from coming back nor a confirmation from being kept."""
    world = world_of(host, "nftables")
    fwc = f"{FWC} {' '.join(host.common)}"
    ending = f"env 'SSH_CONNECTION={OTHER['SSH_CONNECTION']}' {fwc} confirm -q; echo $?" if confirmed else "sleep 1; echo 0"
    script = f"""mount -t tmpfs -o size=400k none "{host.state}"
        {fwc} apply "{host.write(OLD, "old.yaml")}" --yes -q; {fwc} allow agents 192.0.2.66 --for 1h -q
        {fwc} apply "{host.write(NEW)}" --yes -q --confirm {30 if confirmed else 1}s --no-wait 2>/dev/null; echo $?
        head -c 1000000 /dev/zero > "{host.state}/fill" 2>/dev/null
        {ending}
        for i in $(seq 100); do test -e "{host.state}/trial.json" || break; sleep 0.1; done
        {fwc} diff "{host.folder}/{"policy" if confirmed else "old"}.yaml" -q; echo $?
        rm "{host.state}/fill"; {fwc} history | head -1"""
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, env={**CLEAN, **MINE}, stdin=subprocess.DEVNULL, check=False
    )

    assert ran.stdout.splitlines()[:3] == ["0", "0", "0"], ran
    assert ran.stdout.splitlines()[3].startswith(f"generation 2: {'in force' if confirmed else 'rolled back'}"), ran
    if not confirmed:
        assert rules(host) == world.before


def test_other_commands_during_a_trial(world: World) -> None:
    """A second apply and a removal are refused and say what to do; looking is possible; `status` shows the seconds left."""
    on_trial(world, 60)
    host = world.host

    second, removal = host.apply(code=4), host.fwc("remove", "--yes")
    status = valid("status", host.fwc("status", "--json").json)

    assert (removal.code, "generation 2 is on trial for" in removal.err, "`fwc rollback`" in second.err) == (4, True, True)
    assert (status["in_sync"], status["trial"]["previous"], 0 < status["trial"]["seconds_left"] <= 60) == (True, 1, True)
    assert host.fwc("diff", host.write(NEW)).code == 0
    ended = host.fwc("rollback", "--json")
    assert valid("rollback-trial", ended.json) == {"ended_trial": 2, "generation": 1}
    world.returned()


@ALL
def test_confirmation_needs_a_new_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection that applied cannot confirm; another one can, and then nothing goes back any more."""
    on_trial(world, 60)
    host = world.host

    same = host.program("confirm", env=MINE)
    other = host.program("confirm", env=OTHER)
    again = host.program("confirm", env=OTHER)

    assert (same.code, "this is the connection" in same.err) == (4, True)
    assert (other.code, other.out) == (0, "confirmed: generation 2\n")
    assert (again.code, "no generation is on trial" in again.err) == (4, True)
    until(lambda: not watchers(host))
    world.check_new()
    monkeypatch.setenv("SSH_CONNECTION", MINE["SSH_CONNECTION"])
    assert [g["state"] for g in host.fwc("history", "--json").json["generations"]] == ["in force", "confirmed"]


@ONE
def test_same_session_overrides(world: World) -> None:
    """`--same-session` confirms over the connection that applied."""
    on_trial(world, 60)

    assert world.host.program("confirm", "--same-session", env=MINE).code == 0
    world.check_new()


def test_without_ssh_a_session_is_a_connection(host: Host) -> None:
    """On a console, another session at another terminal confirms; the one that applied does not."""
    world = world_of(host, "nftables")
    ran = host.program("apply", host.write(NEW), "--yes", "-q", "--confirm", "60s", "--no-wait")
    assert ran.code == 0, ran

    assert host.program("confirm").code == 4
    assert host.program("confirm", prefix=("setsid", "-w")).code == 0
    world.check_new()


@ONE
def test_confirmed_while_it_waits(world: World) -> None:
    """Who waits is told of the confirmation and ends with 0."""
    terminal = Terminal(world, 60)
    assert world.host.program("confirm", env=OTHER).code == 0

    assert "confirmed: generation 2" in terminal.read()
    assert terminal.close() == 0


@ALL
def test_boot_during_a_trial(world: World) -> None:
    """A machine that is started again during a trial boots the last confirmed generation; nothing comes back later."""
    on_trial(world, 60)
    host = world.host
    if host.backend == "nftables":
        host.run("nft", "delete", "table", "inet", "fwc")
    else:
        for version in (4, 6):
            host.iptables("-F", version=version)

    assert host.fwc("restore").code == 0

    until(lambda: not watchers(host))
    assert host.in_sync(OLD)
    assert [g["state"] for g in host.fwc("history", "--json").json["generations"]] == ["rolled back", "in force"]
    members = [m["address"] for m in host.fwc("status", "--json").json["members"]["agents"]]
    assert members == ["192.0.2.66"], "recorded members survive a boot; who was put in by hand does not"


def test_first_apply_on_trial(host: Host) -> None:
    """Without a generation to return to, the host is as it was: without rules of fwc."""
    ran = host.program("apply", host.write(OLD), "--yes", "-q", "--confirm", "1s", "--no-wait", env=MINE)
    assert ran.code == 0, ran

    until(lambda: not watchers(host))
    assert host.ours() == ""
    assert [g["state"] for g in host.fwc("history", "--json").json["generations"]] == ["rolled back"]


def test_backend_on_trial(host: Host) -> None:
    """A trial that changes to another backend goes back to the old backend's rules."""
    world = world_of(host, "nftables")
    host.backend = "iptables-nft"
    on_trial(world, 1)

    until(lambda: not watchers(host))
    assert host.ours() == ""
    host.backend = "nftables"
    world.returned()


def test_revoked_during_a_trial(host: Host) -> None:
    """A member that is revoked during a trial does not come back with the old rules."""
    world = world_of(host, "nftables")
    on_trial(world, 60)
    assert host.fwc("revoke", "agents", "192.0.2.66").code == 0

    assert host.fwc("rollback").code == 0

    assert [m["address"] for m in host.fwc("status", "--json").json["members"]["agents"]] == ["192.0.2.77"]
    assert world.foreign == foreign_rules(host)


def test_times(host: Host) -> None:
    """A trial takes from one second to one day; anything else is a mistake in the command."""
    for text in ("0s", "2 m", "soon", "25h"):
        ran = host.fwc("apply", host.write(OLD), "--yes", "--confirm", text)
        assert (ran.code, "no time for a trial" in ran.err) == (2, True)


def test_timer_as_data() -> None:
    """What systemd is asked for: one run, by both clocks, of exactly our command."""
    command = timer(("/opt/fwc/bin/python", "-m", "x"), "fwc-trial-7", 120, 1_000_000_000)

    assert command.argv[0] == "systemd-run"
    assert {"--unit=fwc-trial-7", "--on-active=120.0s", "--on-calendar=2001-09-09 01:46:41 UTC", "--collect"} <= set(command.argv)
    assert command.argv[-4:] == ("--", "/opt/fwc/bin/python", "-m", "x")


def test_armed_with_systemd(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where systemd runs it keeps the timer, which brings the old rules back when it fires; a confirmation takes it away."""
    world = world_of(host, "nftables")
    folder = host.folder / "bin"
    folder.mkdir()
    for name in ("systemd-run", "systemctl"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/{name}.argv\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(detached, "SYSTEMD", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    apply = ("apply", host.write(NEW), "--yes", "-q", "--confirm", "1s", "--no-wait")

    assert host.fwc(*apply).code == 0
    assert watchers(host) == []
    argv = (folder / "systemd-run.argv").read_text(encoding="utf-8").splitlines()
    unit = f"fwc-trial-2-{host.netns}"
    assert f"--unit={unit}" in argv
    fired = subprocess.run(argv[argv.index("--") + 1 :], check=False, timeout=20, stdout=subprocess.DEVNULL)
    assert fired.returncode == 0
    world.returned()

    assert host.fwc(*apply[:-2], "60s", "--no-wait").code == 0
    assert host.fwc("confirm", "--same-session").code == 0
    assert (folder / "systemctl.argv").read_text(encoding="utf-8").split() == ["stop", f"fwc-trial-3-{host.netns}.timer"]
