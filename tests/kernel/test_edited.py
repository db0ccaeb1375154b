"""Rules of fwc that somebody edits with other tools: `verify`, `diff` and `status` tell the truth about what the kernel does then."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.harness import POLICY, Host, valid


@pytest.fixture
def host(tmp_path: Path, netns: str) -> Host:
    """A host whose rules were loaded with iptables-nft."""
    host = Host(tmp_path, netns, "iptables-nft")
    host.apply()
    return host


@pytest.mark.parametrize("rule", ["ip saddr >= 1.2.3.4 drop", "tcp dport vmap { 22 : accept }", "ip saddr { 6.6.6.6, 7.7.7.7 } accept"])
def test_rules_that_iptables_misprints(host: Host, rule: str) -> None:
    """iptables-nft-save prints these rules as harmless ones: they are not called proven, and the next apply takes them away."""
    host.run("nft", f"insert rule ip filter FWC-s.ssh {rule}")

    verified, difference = host.fwc("verify", host.write()), host.fwc("diff", host.write())

    assert (verified.code, difference.code, host.in_sync()) == (1, 1, False)
    assert "not modelled" in verified.out
    host.apply()
    assert host.in_sync(POLICY)
    assert host.fwc("verify", host.write()).code == 0


def test_a_table_that_iptables_does_not_print(host: Host) -> None:
    """A rule beside ours that iptables-nft-save stumbles over hides ours as well: that is said, and nothing is changed or called lost."""
    host.run("nft", "insert rule ip filter INPUT ct state established accept")
    before = host.run("nft", "list", "table", "ip", "filter")

    for arguments in (("verify", host.write()), ("diff", host.write()), ("apply", host.write(), "--yes"), ("status",)):
        ran = host.fwc(*arguments)
        assert ran.code == 4, ran
        assert "cannot print the table `ip filter`" in ran.err
    assert host.run("nft", "list", "table", "ip", "filter") == before


def test_a_table_of_others_that_iptables_does_not_print(tmp_path: Path, netns: str) -> None:
    """Where the built-in table is somebody's own of nft, iptables-nft is refused before anything is loaded; nftables works beside it."""
    host = Host(tmp_path, netns, "iptables-nft")
    host.run("nft", "add table ip filter { chain INPUT { type filter hook input priority 0; ct state established accept; }; }")

    refused = host.apply(code=4)

    assert "cannot print the table `ip filter`" in refused.err
    assert "fwc-" not in host.run("ipset", "list", "-n")
    Host(tmp_path, netns).apply()


def test_who_accepts_before_us_is_named(host: Host) -> None:
    """A rule of iptables before the call of ours lets in what ours drop: `verify` and `explain --live` show the rule itself."""
    host.iptables("-I", "INPUT", "1", "-s", "6.6.6.6", "-j", "ACCEPT")
    host.iptables("-I", "INPUT", "1", "-m", "string", "--string", "foo", "--algo", "bm", "-j", "ACCEPT")

    verified = valid("verify", host.fwc("verify", host.write(), "--json").json)
    explained = host.fwc("explain", host.write(), "--live", "--from", "7.7.7.7", "--to", "tcp/22").out

    rules = {each["rule"] for each in verified["foreign"]}
    assert any(rule.endswith("-A INPUT -s 6.6.6.6/32 -j ACCEPT") for rule in rules)
    assert 'live: may: iptables, table filter: -A INPUT -m string --string "foo" --algo bm -j ACCEPT' in explained
    assert "a rule that is not fwc's" in explained


def test_a_named_limit_in_our_table(tmp_path: Path, netns: str) -> None:
    """A limit by name is nothing that fwc makes: told, perhaps access, and taken away by the next apply."""
    host = Host(tmp_path, netns)
    host.apply()
    host.run("nft", 'add limit inet fwc some { rate 5/second; }; insert rule inet fwc input limit name "some" accept')

    verified, difference = host.fwc("verify", host.write()), host.fwc("diff", host.write(), "--json")

    assert (verified.code, difference.code) == (1, 1)
    assert "fwc never makes this: limit some" in verified.out
    assert {each["change"] for each in valid("diff", difference.json)["uncertain"]} == {"lost"}
    assert "fwc never makes this: limit some" in difference.json["notes"]
    host.apply()
    assert host.in_sync(POLICY)


def test_dynamic_members_do_not_part_from_the_policy(tmp_path: Path, netns: str) -> None:
    """`explain --live` knows who is a member on this host: such a packet is accepted by the policy as by the rules, others by neither."""
    host = Host(tmp_path, netns)
    host.apply()
    assert host.fwc("allow", "agents", "6.6.6.6").code == 0
    asked = ("explain", host.write(), "--live", "--to", "udp/5060", "--json", "--from")

    member, stranger = (valid("explain-live", host.fwc(*asked, source).json) for source in ("6.6.6.6", "6.6.6.7"))

    assert (member["verdict"], member["policy"]["verdict"], member["agrees"]) == ("accept", "accept", True)
    assert (stranger["verdict"], stranger["policy"]["verdict"], stranger["agrees"]) == ("drop", "drop", True)
    assert "6.6.6.6 is a dynamic member of agents on this host" in host.fwc(*asked[:-2], "--from", "6.6.6.6").out


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_rules_of_others_about_what_is_sent(tmp_path: Path, netns: str, backend: str) -> None:
    """Where `egress` restricts what is sent, others' rules at output are composed with ours: what they take away, or let out before us."""
    host = Host(tmp_path, netns, backend)
    policy = f"{POLICY}egress:\n  - sip: carriers\n  - https: anywhere\n"
    host.apply(policy)
    assert host.fwc("verify", host.write(policy)).code == 0

    if backend == "nftables":
        host.run("nft", "add table ip x { chain c { type filter hook output priority -10; tcp dport 443 drop; }; }")
    else:
        host.iptables("-I", "OUTPUT", "-p", "tcp", "--dport", "25", "-j", "ACCEPT")
    verified = host.fwc("verify", host.write(policy))
    taken = "from this host to tcp/443 at any IPv4 address", "drops them: table ip x, chain c: tcp dport 443 drop"
    let_out = "from this host to tcp/25 at any IPv4 address", "table filter: -A OUTPUT -p tcp -m tcp --dport 25 -j ACCEPT"
    packets, rule = taken if backend == "nftables" else let_out

    assert verified.code == 1
    assert packets in verified.out
    assert rule in verified.out
    assert any(note.startswith(packets) for note in host.fwc("status", "--json").json["notes"])
    assert not host.fwc("verify", host.write(policy), "--json").json["not_looked_at"]
