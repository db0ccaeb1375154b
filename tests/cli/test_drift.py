"""Edits by hand and neighbours: `status` and `diff` tell what differs and who else decides; `apply` repairs what is ours."""

from __future__ import annotations

import pytest
from cli.harness import BACKENDS, Host, valid

IPTABLES = BACKENDS[1:]


def edit(host: Host) -> None:
    """Somebody lets two addresses in by hand, one by a rule and one by an element, and takes a rule out."""
    if host.backend == "nftables":
        handles = host.run("nft", "-a", "list", "chain", "inet", "fwc", "input").splitlines()
        invalid = next(line for line in handles if "ct state invalid" in line).rpartition(" ")[2]
        host.run("nft", "insert", "rule", "inet", "fwc", "service.ssh", "ip", "saddr", "8.8.8.8", "accept")
        host.run("nft", "add", "element", "inet", "fwc", "admins.v4", "{ 7.7.7.7 }")
        host.run("nft", "delete", "rule", "inet", "fwc", "input", "handle", invalid)
    else:
        host.iptables("-I", "FWC-s.ssh", "-s", "8.8.8.8", "-j", "ACCEPT")
        host.run("ipset", "add", "fwc-admins4", "7.7.7.7")
        host.iptables("-D", "FWC-input", "-m", "conntrack", "--ctstate", "INVALID", "-m", "comment", "--comment", "invalid", "-j", "DROP")


@pytest.mark.parametrize("backend", BACKENDS)
def test_edited_by_hand(host: Host, backend: str) -> None:
    """Each rule and element that somebody changed is named by `status` and `diff`, and an apply takes it back."""
    host.backend = backend
    host.apply()
    before = host.ours()
    assert valid("status", host.fwc("status", "--json").json)["edited"] == []
    edit(host)

    status, diff = host.fwc("status", "--json").json, host.fwc("diff", host.write(), "--json")

    family = "" if backend == "nftables" else "IPv4, "
    assert valid("status", status)["edited"] == valid("diff", diff.json)["edited"]
    assert sorted(line for line in status["edited"] if not line.startswith("counter ")) == [
        f"chain input: gone: {family}invalid: drop (invalid)",
        "chain service.ssh, rule 1: added: source in 8.8.8.8: accept",
        "set admins.v4: added: 7.7.7.7",
    ]
    assert (diff.code, sorted(address for a in diff.json["lost"] for address in a["from"])) == (1, ["7.7.7.7", "8.8.8.8"])
    assert "  chain service.ssh, rule 1: added: source in 8.8.8.8: accept" in host.fwc("status").out
    assert "changed by hand since it was applied" in host.fwc("diff", host.write()).out
    host.apply()
    assert (host.ours(), host.in_sync()) == (before, True) if backend == "nftables" else host.in_sync()


def test_chains_sets_and_policies(host: Host) -> None:
    """Chains and sets that somebody added, and a base chain's policy that somebody changed, are named; an apply takes them out."""
    host.apply()
    before = host.ours()
    host.run("nft", "add", "chain", "inet", "fwc", "mine")
    host.run("nft", "add", "set", "inet", "fwc", "extra", "{ type ipv4_addr; }")
    host.run("nft", "chain", "inet", "fwc", "input", "{ policy accept; }")

    assert host.fwc("status", "--json").json["edited"] == [
        "chain input: at hook input, priority 0, policy accept; applied was at hook input, priority 0, policy drop",
        "chain mine: added, with 0 rules",
        "set extra: not of fwc's making",
    ]
    host.apply()
    assert (host.ours(), host.in_sync()) == (before, True)


def test_many_edits_are_cut(host: Host) -> None:
    """A flushed table does not fill the screen, and JSON holds all of it."""
    host.apply()
    for name in ("input", "service.ssh", "service.sip"):
        host.run("nft", "flush", "chain", "inet", "fwc", name)

    ran, whole = host.fwc("status"), host.fwc("status", "--json").json["edited"]

    assert len(whole) > 20
    assert sum(line.startswith("  chain ") for line in ran.out.splitlines()) <= 40


def built_in(host: Host, version: int = 4) -> list[str]:
    """The rules of the built-in chain INPUT."""
    return [line for line in host.iptables("-S", "INPUT", version=version).splitlines() if line.startswith("-A")]


@pytest.mark.parametrize("backend", IPTABLES)
def test_our_call_is_first_again(host: Host, backend: str) -> None:
    """Rules that somebody put before our call and that let packets pass it are told with their text, and an apply puts the call first.

    A call that is there twice, or gone, becomes one call at the top as well; nobody else's rule is moved or lost.
    """
    host.backend = backend
    host.apply()
    ours, theirs = "-A INPUT -j FWC-input", ["-A INPUT -s 192.0.2.66/32 -j ACCEPT", "-A INPUT -p tcp -m tcp --dport 25 -j DROP"]
    for rule in reversed(theirs):
        host.iptables("-I", *rule.split()[1:])
    assert built_in(host) == [*theirs, ours]

    status, diff = host.fwc("status", "--json").json, host.fwc("diff", host.write(), "--json")

    assert status["in_sync"] is False
    assert status["edited"] == [f"rules of others were put before ours: IPv4, filter INPUT: {theirs[0]}"]
    assert any("the host accepts them" in note and theirs[0] in note for note in status["notes"]), status["notes"]
    assert (diff.code, diff.json["gained"], diff.json["lost"]) == (1, [], [])
    host.apply()
    assert (built_in(host), host.in_sync()) == ([ours, *theirs], True)

    host.iptables("-I", "INPUT", "-s", "192.0.2.67", "-j", "RETURN")
    host.iptables("-I", "INPUT", "-j", "FWC-input")
    host.apply()
    assert built_in(host) == [ours, "-A INPUT -s 192.0.2.67/32 -j RETURN", *theirs]

    host.iptables("-D", "INPUT", "-j", "FWC-input", version=6)
    host.iptables("-D", "INPUT", "-j", "FWC-input")
    assert host.fwc("status", "--json").json["in_sync"] is False
    host.apply()
    assert built_in(host) == [ours, "-A INPUT -s 192.0.2.67/32 -j RETURN", *theirs]
    assert built_in(host, version=6) == [ours]


BEFORE = {
    "a ban": (["-N f2b", "-A f2b -s 192.0.2.66 -j REJECT", "-A f2b -j RETURN", "-I INPUT -p tcp -m tcp --dport 22 -j f2b"], True),
    "a log": (["-I INPUT -j LOG --log-prefix in"], True),
    "a drop": (["-I INPUT -s 192.0.2.66 -j DROP"], True),
    "accept": (["-I INPUT -i virbr0 -j ACCEPT"], False),
    "accept in a chain": (["-N own", "-A own -s 192.0.2.66 -j ACCEPT", "-I INPUT -j own"], False),
    "return": (["-I INPUT -s 192.0.2.66 -j RETURN"], False),
    "goto": (["-N own", "-I INPUT -s 192.0.2.66 -g own"], False),
    "a chain in a chain": (["-N own", "-N sub", "-A sub -j ACCEPT", "-A own -j LOG", "-A own -g sub", "-I INPUT -j own"], False),
}


@pytest.mark.parametrize("case", BEFORE)
def test_what_may_stand_before_us(host: Host, case: str) -> None:
    """What only drops or logs, as a ban does, stays before our call and is no drift; what lets packets pass it is."""
    host.backend = "iptables-legacy"
    host.apply()
    commands, stays = BEFORE[case]
    for command in commands:
        host.iptables(*command.split())
    before = built_in(host)

    synced = host.in_sync()
    host.apply()

    assert synced is stays
    assert (built_in(host) == before) is stays
    assert sorted(built_in(host)) == sorted(before)


def test_other_firewalls_by_name(host: Host) -> None:
    """firewalld and ufw are recognised by name, and so are rules of iptables-legacy beside nftables; `diff` says it as `status` does."""
    host.apply()
    host.run("nft", "add", "table", "inet", "firewalld")
    host.run("nft", "add chain inet firewalld filter_INPUT { type filter hook input priority 10; }")
    host.run("nft", "add", "rule", "inet", "firewalld", "filter_INPUT", "udp", "dport", "5060", "reject")
    host.run("iptables-legacy", "-N", "ufw-before-input")
    host.run("iptables-legacy", "-A", "INPUT", "-j", "ufw-before-input")

    notes = host.fwc("status", "--json").json["notes"]
    diff = host.fwc("diff", host.write())

    said = ["firewalld is active here (table inet firewalld)", "ufw is active here (chain ufw-before-input of iptables-legacy)"]
    said += ["iptables-legacy is in use beside nftables, with 1 rule of others", "table inet firewalld, chain filter_INPUT: udp dport 5060"]
    assert not any(note.endswith(": a rule of others") for note in notes), notes
    for text in said:
        assert any(text in note for note in notes), (text, notes)
        assert text in diff.out
    assert (diff.code, "in sync" in diff.out) == (0, True)


def test_both_variants_of_iptables(host: Host) -> None:
    """A host on which both variants of iptables hold rules is told so, whichever of them fwc uses."""
    host.backend = "iptables-nft"
    host.apply()
    host.run("iptables-legacy", "-A", "INPUT", "-s", "192.0.2.66", "-j", "DROP")
    host.run("iptables-nft", "-A", "INPUT", "-s", "192.0.2.67", "-j", "DROP")

    notes = host.fwc("status", "--json").json["notes"]

    assert any("iptables-legacy is in use beside iptables-nft" in note for note in notes), notes
    assert any("both variants of iptables hold rules here" in note for note in notes), notes


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_published_ports_of_containers(host: Host, backend: str) -> None:
    """A container's DNAT that goes past the policy is told by `diff` as well, and an apply leaves it alone."""
    host.backend = backend
    host.apply()
    host.run("iptables-nft", "-t", "nat", "-N", "DOCKER")
    for rule in (
        "PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "DOCKER -p tcp --dport 3306 -j DNAT --to-destination 172.17.0.2:3306",
    ):
        host.run("iptables-nft", "-t", "nat", "-A", *rule.split())
    nat = host.run("iptables-nft", "-t", "nat", "-S")

    diff = host.fwc("diff", host.write(), "--json")

    found = [note for note in diff.json["notes"] if "--dport 3306" in note]
    assert found, diff.json["notes"]
    assert "redirects them" in found[0]
    host.apply()
    assert host.run("iptables-nft", "-t", "nat", "-S") == nat
