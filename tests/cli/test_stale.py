"""Somebody else at our rules while an apply is at work: never overwritten unseen; at his own rules: nobody's business here.

The other writer strikes at a chosen moment: what fwc calls there is wrapped by the test, in this process only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kernelspace
import pytest
from cli.harness import BACKENDS, POLICY, Host

from fwcompiler import apply
from fwcompiler.kernel import runner

MORE = POLICY.replace("198.51.100.16/28", "198.51.100.16/28, 198.51.100.64/28")
NEW_RULES = POLICY.replace("ssh: {from: [admins]}", "ssh: {from: [admins, carriers]}")


@pytest.fixture(params=BACKENDS)
def host(request: pytest.FixtureRequest, tmp_path: Path, netns: str) -> Host:
    """A host with the example policy in force, on each backend."""
    made = Host(tmp_path, netns, request.param)
    made.apply()
    return made


def damage(host: Host) -> None:
    """Open telnet in our own chain, as an admin in a hurry might."""
    if host.backend == "nftables":
        host.run("nft", "insert", "rule", "inet", "fwc", "input", "tcp", "dport", "23", "accept")
    else:
        host.iptables("-I", "FWC-input", "-p", "tcp", "--dport", "23", "-j", "ACCEPT")


def before(monkeypatch: pytest.MonkeyPatch, module: object, name: str, what: Callable[[], None], times: int = 1) -> None:
    """Do something right before the first calls of a function."""
    real, left = getattr(module, name), [times]

    def wrapped(*words: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            what()
        return real(*words, **named)

    monkeypatch.setattr(module, name, wrapped)


def after_the_last_look(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> None:
    """Do something between an apply's last look at the rules and its commit."""
    real = apply._refuse_stale

    def wrapped(*words: Any) -> None:
        real(*words)
        what()

    monkeypatch.setattr(apply, "_refuse_stale", wrapped)


def test_planned_anew(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of our rules between plan and commit is seen: the apply plans again, shows what that undoes, and ends in sync."""
    before(monkeypatch, runner, "undisturbed", lambda: damage(host))

    ran = host.fwc("apply", host.write(MORE), "--yes")

    assert (ran.code, "somebody changed the rules of fwc since this was planned; planning anew" in ran.err) == (0, True), ran
    assert "may no longer reach tcp/23" in ran.out
    assert host.in_sync(MORE)


def test_refused_in_the_end(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where our rules do not hold still, the apply gives up with exit code 4 and has changed nothing."""
    before(monkeypatch, runner, "undisturbed", lambda: damage(host), times=9)

    ran = host.fwc("apply", host.write(MORE), "--yes")

    assert (ran.code, "nothing was changed" in ran.err, ran.err.count("planning anew")) == (4, True, 2), ran
    assert "198.51.100.64" not in host.ours()
    assert host.fwc("history", "--json").json["generations"][0]["number"] == 1


def test_content_by_hand(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that somebody puts into one of our sets meanwhile is a change of our rules, too."""

    def put() -> None:
        if host.backend == "nftables":
            host.run("nft", "add", "element", "inet", "fwc", "admins.v4", "{ 192.0.2.99 }")
        else:
            host.run("ipset", "add", "fwc-admins4", "192.0.2.99")

    before(monkeypatch, runner, "undisturbed", put)

    ran = host.fwc("apply", host.write(MORE), "--yes")

    assert (ran.code, "planning anew" in ran.err, "192.0.2.99 may no longer reach ssh" in ran.out) == (0, True, True), ran


def test_rollback_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A return to an older generation is refused as well when our rules changed since it was planned."""
    host.apply(MORE)
    before(monkeypatch, runner, "undisturbed", lambda: damage(host))

    ran = host.fwc("rollback", "--yes")

    assert (ran.code, "somebody changed the rules of fwc" in ran.err) == (4, True), ran
    assert "198.51.100.64" in host.ours()


@pytest.mark.parametrize("policy", [MORE, NEW_RULES], ids=["content", "rules"])
def test_too_late_to_see(tmp_path: Path, netns: str, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """A change that comes after the last look is heard: what is in force is the policy, and the warning names who it was."""
    host = Host(tmp_path, netns)
    host.apply()

    def meddle() -> None:
        host.run("nft", "add", "element", "inet", "fwc", "agents.dynamic.v4", "{ 198.18.0.99 timeout 1h }")

    after_the_last_look(monkeypatch, meddle)

    ran = host.fwc("apply", host.write(policy), "--yes")

    assert (ran.code, "somebody else changed table inet fwc during this apply (" in ran.err, "nft, process" in ran.err) == (
        0,
        True,
        True,
    ), ran
    assert host.in_sync(policy)


def test_damage_too_late_to_see(tmp_path: Path, netns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage after the last look that the commit does not overwrite is found when reading back: it never stays behind a success."""
    host = Host(tmp_path, netns)
    host.apply()
    after_the_last_look(monkeypatch, lambda: damage(host))

    ran = host.fwc("apply", host.write(MORE), "--yes")

    assert ran.code == 5 or "somebody else changed" in ran.err, ran
    assert "dport 23" not in host.ours()


LARGE = POLICY.replace("198.51.100.16/28", ", ".join(f"10.{n >> 7}.{(n & 127) * 2}.0/24" for n in range(runner.LARGE + 1)))


@pytest.mark.parametrize("meddles", [True, False])
def test_while_a_large_set_is_filled(tmp_path: Path, netns: str, monkeypatch: pytest.MonkeyPatch, meddles: bool) -> None:
    """Nobody listens while a large set is sent, which would make the kernel tell every element; that somebody came in between is seen."""
    host = Host(tmp_path, netns)
    host.apply()
    listening: list[bool] = []

    def meanwhile() -> None:
        listening.append(heard())
        if meddles:
            host.run("nft", "add", "element", "inet", "fwc", "agents.dynamic.v4", "{ 198.18.0.99 timeout 1h }")

    def heard() -> bool:
        """Whether a socket of this namespace is in the group that hears of nftables (netlink(7): a mask of groups)."""
        rows = kernelspace.run(("cat", "/proc/net/netlink")).splitlines()[1:]
        return any(int(row.split()[3], 16) & 1 << 6 for row in rows if row.split()[1] == "12")

    before(monkeypatch, runner, "_fill_nft", meanwhile)

    ran = host.fwc("apply", host.write(LARGE), "--yes")

    assert (ran.code, "somebody else changed rules during this apply" in ran.err, listening) == (0, meddles, [False]), ran
    assert host.in_sync(LARGE)


@contextmanager
def busy_neighbour(host: Host) -> Iterator[list[int]]:
    """Another program's table that changes all the time, as fail2ban's does."""
    stop, count = threading.Event(), [0]
    host.run("nft", "-f", "-", stdin="add table inet f2b\nadd set inet f2b banned { type ipv4_addr; }\n")

    def ban() -> None:
        with kernelspace_of(host):
            while not stop.is_set():
                kernelspace.run(
                    (
                        "nft",
                        "add",
                        "element",
                        "inet",
                        "f2b",
                        "banned",
                        f"{{ 10.{count[0] >> 16 & 255}.{count[0] >> 8 & 255}.{count[0] & 255} }}",
                    )
                )
                count[0] += 1

    other = threading.Thread(target=ban)
    other.start()
    try:
        yield count
    finally:
        stop.set()
        other.join()


@contextmanager
def kernelspace_of(host: Host) -> Iterator[None]:
    """Be in a host's namespace, in this thread."""
    from fwcompiler.kernel import netns

    namespace = netns.named(host.netns)
    try:
        with namespace.entered():
            yield
    finally:
        namespace.close()


def test_neighbours_are_no_reason(host: Host) -> None:
    """Changes to other people's tables neither stop an apply, nor have it plan again, nor are reported."""
    with busy_neighbour(host) as bans:
        for policy in (MORE, NEW_RULES, POLICY):
            started = bans[0]
            ran = host.fwc("apply", host.write(policy), "--yes")
            assert (ran.code, ran.err) == (0, ""), ran
            assert bans[0] > started
    assert host.in_sync(POLICY)


def test_unchanged_chains_keep_their_handles(tmp_path: Path, netns: str) -> None:
    """A change of one service leaves the rules of the others as they are in the kernel, handles and all."""
    host = Host(tmp_path, netns)
    host.apply()

    def handles(chain: str) -> list[str]:
        listed = host.run("nft", "-a", "list", "chain", "inet", "fwc", chain)
        return [line.rpartition("# handle ")[2] for line in listed.splitlines() if "# handle" in line]

    kept, changed = handles("service.sip"), handles("service.ssh")
    host.apply(NEW_RULES)

    assert handles("service.sip") == kept
    assert handles("service.ssh") != changed


def test_policy_that_changed_meanwhile(tmp_path: Path, netns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is applied is what the files say once the lock is had, not what they said before somebody else had it."""
    host = Host(tmp_path, netns)
    host.apply()
    from fwcompiler import trial

    before(monkeypatch, trial, "settle", lambda: host.write(NEW_RULES) and None)

    ran = host.fwc("apply", host.write(MORE), "--yes")

    assert ran.code == 0
    assert host.in_sync(NEW_RULES)


def test_iptables_lock(tmp_path: Path, netns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """iptables-legacy's lock is held from the last look to the end of the commit, so whoever respects it waits."""
    host = Host(tmp_path, netns, "iptables-legacy")
    host.apply()
    lock = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    said: list[str] = []

    def knock() -> None:
        try:
            host.run("iptables-legacy", "-w", "1", "-A", "INPUT", "-p", "tcp", "--dport", "23", "-j", "ACCEPT")
        except kernelspace.KernelSaysNo as refused:
            said.append(str(refused))

    after_the_last_look(monkeypatch, knock)

    assert host.fwc("apply", host.write(MORE), "--yes").code == 0
    assert len(said) == 1
    assert "xtables lock" in said[0]
