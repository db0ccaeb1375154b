"""What stands behind an edge can be sent to by its own address, past NAT: `diff` tells who may since somebody edited the rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cli.harness import BACKENDS, Host, valid

from fwcompiler.addresses import parse_address
from fwcompiler.pipeline import compile_policy
from fwcompiler.proof.access import compare
from fwcompiler.report import access_lines
from fwcompiler.ruleset import Chain, Final, InRanges, Rule, Ruleset

POLICY = """version: 1
groups:
  carriers: [198.51.100.16/28]
  admins: [192.0.2.10]
hosts:
  gw:      {role: edge, wan: eth0, lan: eth1, addresses: [203.0.113.1, 10.20.0.1]}
  dialer1: {role: dialer, addresses: [10.20.0.11]}
  dialer2: {role: dialer, addresses: [10.20.0.12, '2001:db8:20::12']}
edge: {host: gw, inbound_sip: dialer1, rtp: {first: 10000, chunk: 5000}, dialers: [dialer1, dialer2]}
services:
  sip: {from: [carriers]}
  rtp: {from: anywhere}
  ssh: {from: [admins]}
"""
STRANGER = parse_address("6.6.6.6")[1]


def with_rule(ruleset: Ruleset, rule: Rule, name: str = "inbound") -> Ruleset:
    """The ruleset with a rule in front of a chain."""
    chains = tuple(Chain(c.name, (rule, *c.rules), c.hook) if c.name == name else c for c in ruleset.chains)
    assert chains != ruleset.chains
    return replace(ruleset, chains=chains)


def lines(tmp_path: Path, *rules: Rule) -> list[str]:
    """What `diff` says is gained by rules in front of those for what comes in."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    compiled = compile_policy(str(path), host="gw")
    changed = compiled.ruleset
    for rule in rules:
        changed = with_rule(changed, rule)
    change = compare(compiled.ruleset, changed)
    assert not change.lost
    return list(access_lines(change.gained, compiled.resolved, "+", "may reach"))


def test_a_rule_for_one_source(tmp_path: Path) -> None:
    """Whoever is let through to everything reaches every dialer by its own address, and all else behind; not media, which he had."""
    stranger = InRanges("source", 4, ((STRANGER, STRANGER),))
    assert lines(tmp_path, Rule((stranger,), Final.ACCEPT)) == [
        "+ 6.6.6.6 may reach other-protocols, tcp/0-65535, udp/0-9999, udp/15000-65535 of dialer1, sent there directly",
        "+ 6.6.6.6 may reach other-protocols, tcp/0-65535, udp/0-14999, udp/20000-65535 of dialer2 (10.20.0.12), sent there directly",
        "+ 6.6.6.6 may reach other-protocols, tcp/0-65535, udp/0-65535 of other IPv4 addresses behind, sent there directly",
    ]


def test_a_rule_for_a_range_of_destinations(tmp_path: Path) -> None:
    """A range that a rule lets everybody through to is told as that."""
    low, high = (parse_address(text)[1] for text in ("10.20.0.64", "10.20.0.127"))
    rule = Rule((InRanges("source", 4, ((STRANGER, STRANGER),)), InRanges("destination", 4, ((low, high),))), Final.ACCEPT)
    assert [text.partition(" of ")[2] for text in lines(tmp_path, rule)] == ["10.20.0.64/26, sent there directly"]


def test_what_is_gained_through_the_edge_is_told_once(tmp_path: Path) -> None:
    """A carrier more reaches the owner of 5060 through NAT; that its own address is open to him now says nothing new."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    before = compile_policy(str(path), host="gw")
    path.write_text(POLICY.replace("198.51.100.16/28", "198.51.100.16/28, 198.51.100.64/28"), encoding="utf-8")
    after = compile_policy(str(path), host="gw")

    change = compare(before.ruleset, after.ruleset)

    told = list(access_lines(change.gained, after.resolved, "+", "may reach"))
    assert "carriers: + 198.51.100.64/28 may reach sip udp/5060 of dialer1" in told
    assert not [text for text in told if "directly" in text and "dialer1" in text]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_diff_tells_what_an_edit_lets_through(tmp_path: Path, netns: str, backend: str) -> None:
    """A rule by hand on the way through an edge: `diff` says what the next apply takes away again, in text and in JSON."""
    host = Host(tmp_path, netns, backend)
    policy = host.write(POLICY)
    assert host.fwc("apply", policy, "--host", "gw", "--yes").code == 0

    if backend == "nftables":
        host.run("nft", "insert rule inet fwc inbound ip saddr 6.6.6.6 tcp dport 22 accept")
    else:
        host.iptables("-I", "FWC-inbound", "-s", "6.6.6.6", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
    ran = host.fwc("diff", policy, "--host", "gw")
    found = valid("diff", host.fwc("diff", policy, "--host", "gw", "--json").json)

    assert ran.code == 1
    assert "- 6.6.6.6 may no longer reach tcp/22 of dialer1, sent there directly" in ran.out
    assert "- 6.6.6.6 may no longer reach tcp/22 of other IPv4 addresses behind, sent there directly" in ran.out
    assert {(each["at"], each["to"], each["direct"]) for each in found["lost"]} == {
        (at, "tcp/22", True) for at in ("10.20.0.11", "10.20.0.12", "other IPv4 addresses behind")
    }
