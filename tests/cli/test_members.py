"""`allow`, `revoke`, `members`: one element of one set, recorded, given back wherever it gets lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from cli.harness import BACKENDS, FWC, POLICY, Host, Ran, valid

BLOCKING = POLICY.replace("services:", "  bad: [192.0.2.128/25]\nblock: {from: [bad], except: [carriers]}\nservices:")
SMALL = POLICY.replace("max: 4096", "max: 2")
DIES = """
    import os, sys
    from fwcompiler import cli
    from fwcompiler.kernel import runner
    verb, when, *arguments = sys.argv[1:]
    real = getattr(runner, verb)
    def dying(*words):
        if when == "after":
            real(*words)
        os.kill(os.getpid(), 9)
    setattr(runner, verb, dying)
    sys.exit(cli.run(arguments))
"""


@pytest.fixture(params=BACKENDS)
def host(request: pytest.FixtureRequest, tmp_path: Path, netns: str) -> Host:
    """A host with the example policy in force, on each backend."""
    host = Host(tmp_path, netns, request.param)
    host.apply()
    return host


def members(host: Host, group: str = "agents") -> dict[str, dict[str, Any]]:
    """What `members --json` says, by address."""
    found = valid("members", host.fwc("members", group, "--json").json)["members"][group]
    assert isinstance(found, list)
    return {m["address"]: m for m in found}


def in_kernel(host: Host, version: int = 4) -> str:
    """The dynamic set as the kernel's own program lists it."""
    if host.backend == "nftables":
        return host.run("nft", "list", "set", "inet", "fwc", f"agents.dynamic.v{version}")
    return host.run("ipset", "list", f"fwc-agents~{version}")


def add_by_hand(host: Host, address: str) -> None:
    """What an admin would type."""
    if host.backend == "nftables":
        host.run("nft", "add", "element", "inet", "fwc", "agents.dynamic.v4", f"{{ {address} timeout 1h }}")
    else:
        host.run("ipset", "add", "fwc-agents~4", address, "timeout", "3600")


def lose(host: Host, address: str) -> None:
    """Take a member out of the kernel's set, not of the record."""
    if host.backend == "nftables":
        host.run("nft", "delete", "element", "inet", "fwc", "agents.dynamic.v4", f"{{ {address} }}")
    else:
        host.run("ipset", "del", "fwc-agents~4", address)


def flush(host: Host) -> None:
    """What a reboot leaves of our rules: nothing."""
    if host.backend == "nftables":
        host.run("nft", "delete", "table", "inet", "fwc")
        return
    for version, table in product((4, 6), ("filter", "raw")):
        host.iptables("-t", table, "-F", version=version)
        host.iptables("-t", table, "-X", version=version)
    host.run("ipset", "destroy")


def died(host: Host, verb: str, when: str, *arguments: str) -> None:
    """Run a command that is killed before or after it asks the kernel to change a member."""
    script = textwrap.dedent(DIES)
    done = subprocess.run([sys.executable, "-c", script, verb, when, *host.common, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done


def test_allow_and_revoke(host: Host) -> None:
    """A member is in the kernel's set at once, with its time; the command says what it gains; `revoke` takes all of it back."""
    allowed = host.fwc("allow", "agents", "198.18.0.9", "--for", "2h", "--reason", "home office", "--json")
    shown, text = members(host)["198.18.0.9"], in_kernel(host)
    revoked = host.fwc("revoke", "agents", "198.18.0.9", "--json")

    gained = [("udp/5060", ["198.18.0.9"])]
    assert [(a["to"], a["from"]) for a in valid("member-change", allowed.json)["gained"]] == gained
    assert 7190 <= shown["seconds_left"] <= 7200
    assert (shown["reason"], shown["recorded"], shown["loaded"]) == ("home office", True, True)
    assert "198.18.0.9" in text
    assert [(a["to"], a["from"]) for a in valid("member-change", revoked.json)["lost"]] == gained
    assert ("198.18.0.9" in in_kernel(host), members(host)) == (False, {})
    assert host.in_sync(POLICY)


def test_ipv6(host: Host) -> None:
    """IPv6 members go into the set of their family, however they are spelled."""
    assert host.fwc("allow", "agents", "2001:DB8:0::9/128").code == 0
    assert "2001:db8::9" in in_kernel(host, 6)
    assert host.fwc("revoke", "agents", "2001:db8::9").code == 0
    assert "2001:db8::9" not in in_kernel(host, 6)


def test_login_again(host: Host) -> None:
    """Whoever is let in again has the new time, longer or shorter, also when the set is full."""
    host.apply(SMALL)
    for address, length in (("198.18.0.1", "100s"), ("198.18.0.2", "5h"), ("198.18.0.1", "3h"), ("198.18.0.2", "60s")):
        assert host.fwc("allow", "agents", address, "--for", length).code == 0

    left = {address: m["seconds_left"] for address, m in members(host).items()}
    assert (10_700 < left["198.18.0.1"] <= 10_800, left["198.18.0.2"] <= 60) == (True, True)


def test_full(host: Host) -> None:
    """A full set refuses one more, says so, and neither kernel nor record has it."""
    host.apply(SMALL)
    for n in (1, 2):
        host.fwc("allow", "agents", f"198.18.0.{n}")

    ran = host.fwc("allow", "agents", "198.18.0.3")

    assert (ran.code, "agents is full: it holds 2 dynamic members over IPv4" in ran.err, "max" in ran.err) == (4, True, True)
    assert members(host).keys() == {"198.18.0.1", "198.18.0.2"}
    assert "198.18.0.3" not in host.fwc("members", "--history").out


def test_blocked(host: Host) -> None:
    """Letting in a blocked address would not help, and is refused, unless the group is excepted from the block."""
    host.apply(BLOCKING)
    refused = host.fwc("allow", "agents", "192.0.2.200")
    host.apply(BLOCKING.replace("except: [carriers]", "except: [carriers, agents]"))
    allowed = host.fwc("allow", "agents", "192.0.2.200")

    assert (refused.code, "192.0.2.200 is blocked" in refused.err, "except" in refused.err) == (4, True, True)
    assert (allowed.code, "sip udp/5060" in allowed.out) == (0, True)


def test_in_the_policy_already(host: Host) -> None:
    """An address that the policy has in the group is let in as well, with a note; taking it out names the policy."""
    allowed = host.fwc("allow", "agents", "203.0.113.7")
    revoked = host.fwc("revoke", "agents", "203.0.113.7")
    again = host.fwc("revoke", "agents", "203.0.113.7")

    assert (allowed.code, "the policy has 203.0.113.7 in agents already" in allowed.out, "may now" in allowed.out) == (0, True, False)
    assert (revoked.code, "may no longer" in revoked.out) == (0, False)
    assert (again.code, "take it out there" in again.err) == (4, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("agnets", "198.18.0.9"), "did you mean `agents`?"),
        (("nobody", "198.18.0.9"), "groups with dynamic members: agents"),
        (("carriers", "198.18.0.9"), "takes no dynamic members"),
        (("agents", "0.0.0.0/0"), "every address there is"),
        (("agents", "::/0"), "every address there is"),
        (("agents", "198.18.0.0/24"), "dynamic members are single ones"),
        (("agents", "198.18.0.1-198.18.0.9"), "dynamic members are single ones"),
        (("agents", "127.0.0.1"), "loopback"),
        (("agents", "::1"), "loopback"),
        (("agents", "224.0.0.251"), "multicast"),
        (("agents", "0.0.0.0"), "nobody's address"),
        (("agents", "::ffff:198.18.0.9"), "IPv4"),
        (("agents", "home.example"), "not an address"),
        (("agents", "198.18.0.9", "--for", "soon"), "is not a duration"),
        (("agents", "198.18.0.9", "--for", "0s"), "at least one second"),
        (("agents", "198.18.0.9", "--for", "9999d"), "at most"),
        (("agents", "198.18.0.9", "--reason", "two\nlines"), "a reason is one line"),
    ],
)
def test_mistakes(tmp_path: Path, netns: str, arguments: tuple[str, ...], words: str) -> None:
    """A command that cannot be meant is refused with exit code 2 and says what can; nothing is recorded."""
    host = Host(tmp_path, netns)
    host.apply()

    ran = host.fwc("allow", *arguments)

    assert (ran.code, words in ran.err) == (2, True), ran
    assert not (host.state / "members.log").exists()


def test_no_policy_in_force(tmp_path: Path, netns: str) -> None:
    """Without rules there is no group; with a generation whose rules are gone it says that."""
    host = Host(tmp_path, netns)
    never = host.fwc("allow", "agents", "198.18.0.9")
    host.apply()
    flush(host)
    gone = host.fwc("allow", "agents", "198.18.0.9")

    assert (never.code, "no policy is in force" in never.err) == (4, True)
    assert (gone.code, "generation 1 is recorded, but its rules are not loaded" in gone.err) == (4, True)


def test_members_outlive_their_sets(host: Host) -> None:
    """Members are given back with the time they have left: to a set made anew, after the rules were lost, after `remove`."""
    host.fwc("allow", "agents", "198.18.0.9", "--for", "1h", "--reason", "x")
    host.apply(POLICY.replace("timeout: 12h", "timeout: 6h"))
    anew = members(host)
    flush(host)
    host.apply()
    lost = members(host)
    assert host.fwc("remove", "--yes").code == 0
    host.apply()

    for found in (anew, lost, members(host)):
        assert 3500 < found["198.18.0.9"]["seconds_left"] <= 3600
        assert (found["198.18.0.9"]["loaded"], found["198.18.0.9"]["reason"]) == (True, "x")


def test_members_change_the_backend(tmp_path: Path, netns: str) -> None:
    """Members move along when another backend takes over."""
    host = Host(tmp_path, netns)
    host.apply()
    host.fwc("allow", "agents", "198.18.0.9")
    host.backend = "iptables-nft"
    host.apply()

    assert members(host)["198.18.0.9"]["loaded"] is True


def test_expired_is_not_given_back(host: Host) -> None:
    """A member whose time ran out is gone, is not given back, and the history says when it ended."""
    host.fwc("allow", "agents", "198.18.0.9", "--for", "1s")
    time.sleep(1.5)
    flush(host)
    host.apply()

    told = valid("members-history", host.fwc("members", "--history", "--json").json)["history"]
    assert members(host) == {}
    assert [e["do"] for e in told] == ["allow", "expire"]
    assert told[1]["at"] == told[0]["until"]


def test_by_hand(host: Host) -> None:
    """A member that somebody put into the set by hand is shown as not recorded, stays over an apply, and can be revoked."""
    add_by_hand(host, "198.18.0.77")

    shown = members(host)["198.18.0.77"]
    host.apply(POLICY.replace("timeout: 12h", "timeout: 6h"))
    kept = members(host)["198.18.0.77"]["loaded"]
    text = host.fwc("members").out
    revoked = host.fwc("revoke", "agents", "198.18.0.77")

    assert (shown["recorded"], shown["by"], kept, "added by hand" in text) == (False, None, True, True)
    assert (revoked.code, members(host)) == (0, {})


def test_lost_by_hand(host: Host) -> None:
    """A recorded member that the kernel misses is shown so, and the next apply puts it in though nothing else changes."""
    host.fwc("allow", "agents", "198.18.0.9")
    lose(host, "198.18.0.9")

    shown, text = members(host)["198.18.0.9"], host.fwc("status").out
    host.apply()

    assert (shown["loaded"], "not loaded" in text) == (False, True)
    assert members(host)["198.18.0.9"]["loaded"] is True


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("heals", ["allow", "apply"])
def test_killed_while_allowing(host: Host, when: str, heals: str) -> None:
    """`kill -9` between record and kernel: the next command that writes leaves both agreeing that the member is in."""
    died(host, "put_members", when, "allow", "agents", "198.18.0.9", "--for", "1h")

    if heals == "apply":
        host.apply()
    else:
        assert host.fwc("allow", "agents", "198.18.0.10").code == 0

    assert (members(host)["198.18.0.9"]["loaded"], members(host)["198.18.0.9"]["recorded"]) == (True, True)
    assert 3500 < members(host)["198.18.0.9"]["seconds_left"] <= 3600


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_revoking(host: Host, when: str) -> None:
    """`kill -9` between record and kernel: a revoked member does not come back, and the next command takes it out."""
    host.fwc("allow", "agents", "198.18.0.9")
    died(host, "take_member", when, "revoke", "agents", "198.18.0.9")

    assert host.fwc("allow", "agents", "198.18.0.10").code == 0

    assert members(host).keys() == {"198.18.0.10"}
    assert "198.18.0.9" not in in_kernel(host)


def test_many_at_once(host: Host) -> None:
    """Members let in at the same time do not lose one another, in kernel or record."""
    asked = [f"198.18.1.{n}" for n in range(1, 9)]
    running = [subprocess.Popen([FWC, *host.common, "allow", "agents", a, "-q"], stdin=subprocess.DEVNULL) for a in asked]

    assert [child.wait(60) for child in running] == [0] * len(asked)
    found = members(host)
    assert found.keys() == set(asked)
    assert all(m["recorded"] and m["loaded"] for m in found.values())


def test_record_first(host: Host) -> None:
    """Where nothing can be recorded nobody is let in."""
    (host.state / "members.log").mkdir()

    ran = host.fwc("allow", "agents", "198.18.0.9")

    assert (ran.code, "nothing was changed" in ran.err or "cannot read" in ran.err) == (4, True)
    assert "198.18.0.9" not in in_kernel(host)


def test_who_asked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record says who let a member in, from where, and why; `status` shows it."""
    monkeypatch.setenv("SUDO_USER", "operator")
    monkeypatch.setenv("SSH_CONNECTION", "198.18.7.7 50000 198.18.0.1 22")
    host.fwc("allow", "agents", "198.18.0.9", "--reason", "call 4711")

    text: Ran = host.fwc("status")

    assert "198.18.0.9" in text.out
    assert "by operator from 198.18.7.7: call 4711" in text.out


def test_group_that_blocks(host: Host) -> None:
    """A dynamic group may be a block list: who is put into it loses access, and the command says so."""
    policy = POLICY.replace("services:", "  pests: {members: [], dynamic: {timeout: 1h}}\nblock: {from: [pests]}\nservices:")
    host.apply(policy)

    ran = host.fwc("allow", "pests", "198.18.0.9")

    assert (ran.code, "may no longer reach" in ran.out) == (0, True), ran


def test_quick(tmp_path: Path, netns: str) -> None:
    """`allow` and `revoke` as people write them go without typer and pydantic, and say what they say with them."""
    host = Host(tmp_path, netns)
    host.apply()
    script = """
import sys
from fwcompiler import cli
code = cli.run(sys.argv[1:])
sys.exit(code or 10 * ("typer" in sys.modules or "pydantic" in sys.modules))
"""

    def ran(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", script, *host.common, *arguments], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    quick = ran("allow", "agents", "198.18.0.9", "--for", "2h", "--reason=home office")
    assert quick == (0, "198.18.0.9 is in agents for 2h: it may now reach sip udp/5060\n")
    assert ran("revoke", "agents", "198.18.0.9", "-q") == (0, "")
    assert ran("allow", "--reason", "home office", "--for", "2h", "--", "agents", "198.18.0.9") == (10, quick[1])


@pytest.mark.parametrize(
    "words", [("allow", "agents"), ("allow", "agents", "198.18.0.9", "198.18.0.10"), ("revoke", "a", "b", "--for", "1h")]
)
def test_usage(tmp_path: Path, netns: str, words: tuple[str, ...]) -> None:
    """A command line that is not as expected gets the usual words and exit code 2."""
    ran = Host(tmp_path, netns).fwc(*words)

    assert (ran.code, "error: " in ran.err) == (2, True)
