"""The meaning of a policy, clause by clause as the design gives it, and the words it is explained in."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from fwcompiler.addresses import parse_address
from fwcompiler.diagnostics import Position, Report
from fwcompiler.policy import validate
from fwcompiler.ports import parse_ports
from fwcompiler.proof.fields import packet_to
from fwcompiler.proof.meaning import Explanation, clauses, explain
from fwcompiler.resolve import resolve
from fwcompiler.resolved import Resolved
from fwcompiler.source import parse_document

POLICY = """version: 1
groups:
  carriers: [198.51.100.16/28]
  agents: {members: [203.0.113.0/24], dynamic: {timeout: 1h}}
  cluster: [10.20.0.0/24, 2001:db8:20::/64]
  bad: [198.51.100.0/24, 203.0.113.9, 10.20.0.66]
block: {from: [bad]}
trust: [cluster]
services:
  sip: {from: [carriers, agents]}
  rtp: {from: anywhere}
  ntp: {from: [carriers]}
  wss: {from: anywhere, expose: a fair}
"""


def policy(text: str = POLICY) -> Resolved:
    """A resolved policy from its text."""
    report = Report()
    document = parse_document("p.yaml", text, report)
    assert document is not None
    model = validate(document, report)
    assert model is not None, report.findings
    return resolve(model, document, report, today=date(2026, 1, 1))


def ask(source: str, to: str, text: str = POLICY, **fields: Any) -> Explanation:
    """What the meaning says about one packet."""
    version, value = parse_address(source)
    return explain(policy(text), packet_to(version, value, parse_ports(to), **fields))


@pytest.mark.parametrize(
    ("source", "to", "fields", "verdict"),
    [
        # 1. loopback
        ("127.0.0.1", "tcp/9999", {"interface": "lo"}, "accept"),
        ("127.0.0.1", "udp/10000", {}, "drop"),
        ("::1", "udp/10000", {}, "drop"),
        ("8.8.8.8", "udp/10000", {"destination": 0x7F000001}, "drop"),
        ("8.8.8.8", "udp/10000", {"destination": 0x08080808}, "accept"),
        # 2. block: before everything, but for groups that a service names
        ("198.51.100.1", "udp/10000", {}, "drop"),
        ("198.51.100.1", "udp/10000", {"state": "established"}, "drop"),
        ("198.51.100.17", "udp/5060", {}, "accept"),
        ("203.0.113.9", "udp/5060", {}, "accept"),
        ("10.20.0.66", "tcp/9999", {}, "drop"),
        # trust: after the block list, before everything else
        ("10.20.0.1", "tcp/9999", {}, "accept"),
        ("10.20.0.1", "vrrp", {"state": "invalid"}, "accept"),
        ("2001:db8:20::1", "udp/5060", {}, "accept"),
        # 3. invalid
        ("198.51.100.17", "udp/5060", {"state": "invalid"}, "drop"),
        # 4. restricted services: every packet
        ("8.8.8.8", "udp/5060", {}, "drop"),
        ("8.8.8.8", "udp/5060", {"state": "established"}, "drop"),
        ("198.51.100.17", "udp/5060", {"state": "untracked"}, "accept"),
        ("2001:db8::1", "udp/5060", {}, "drop"),
        # 5. established, related; ntp is decided after them
        ("8.8.8.8", "tcp/9999", {"state": "established"}, "accept"),
        ("8.8.8.8", "tcp/9999", {"state": "related"}, "accept"),
        ("8.8.8.8", "udp/123", {"state": "established"}, "accept"),
        ("8.8.8.8", "udp/123", {}, "drop"),
        ("198.51.100.17", "udp/123", {}, "accept"),
        # 6. public services
        ("8.8.8.8", "udp/20000", {}, "accept"),
        ("8.8.8.8", "udp/20001", {}, "drop"),
        ("8.8.8.8", "tcp/10000", {}, "drop"),
        ("8.8.8.8", "tcp/8089", {}, "accept"),
        ("2001:db8::1", "udp/10000", {"state": "untracked"}, "accept"),
        # 7. ICMP
        ("8.8.8.8", "icmp", {}, "accept"),
        ("2001:db8::1", "icmp", {}, "accept"),
        # 8. everything else
        ("8.8.8.8", "tcp/22", {}, "drop"),
        ("8.8.8.8", "vrrp", {}, "drop"),
        ("8.8.8.8", "tcp/22", {"state": "untracked"}, "drop"),
    ],
)
def test_the_meaning(source: str, to: str, fields: dict[str, Any], verdict: str) -> None:
    """Each packet is decided by the first clause that holds, in the design's order."""
    assert ask(source, to, **fields).verdict == verdict


@pytest.mark.parametrize(
    ("source", "to", "service", "line", "words"),
    [
        ("198.51.100.17", "udp/5060", "sip", 10, "sip names the source: 198.51.100.17 is in carriers (198.51.100.16/28, p.yaml:3:14)"),
        ("8.8.8.8", "udp/5060", "sip", 10, "sip does not name the source: it is in none of carriers, agents"),
        ("198.51.100.1", "udp/10000", None, 7, "the block list has the source: 198.51.100.1 is in bad (198.51.100.0/24, p.yaml:6:9)"),
        ("10.20.0.1", "tcp/1", None, 8, "the source is trusted: 10.20.0.1 is in cluster"),
        ("8.8.8.8", "tcp/8089", "wss", 13, "wss is open to anywhere (a fair)"),
        ("8.8.8.8", "tcp/1", None, None, "no service covers it"),
    ],
)
def test_the_reason(source: str, to: str, service: str | None, line: int | None, words: str) -> None:
    """The explanation names the clause, the policy line that made it, and the entry that holds the source."""
    found = ask(source, to)

    assert (found.service, found.at.line if found.at else None) == (service, line)
    assert words in found.reason


def test_a_limit_is_mentioned() -> None:
    """Who may send so much and no more is told how much; carriers are not limited, and nothing is said of it."""
    text = POLICY.replace("[carriers, agents]}", "[carriers, agents], limit: {agents: 50/s burst 200}}")
    text = text.replace("rtp: {from: anywhere}", "rtp: {from: anywhere, limit: {anywhere: 100/s}}")

    assert "sip names the source, up to 50 a second, 200 at once: 203.0.113.7 is in agents" in ask("203.0.113.7", "udp/5060", text).reason
    assert "sip names the source: 198.51.100.17 is in carriers" in ask("198.51.100.17", "udp/5060", text).reason
    assert ask("8.8.8.8", "udp/10000", text).reason == "rtp is open to anywhere, up to 100 a second, 100 at once from each source"


def test_dynamic_members_are_mentioned() -> None:
    """A stranger may be a dynamic member for all the policy knows, and is told so."""
    assert any("dynamic members of agents" in step for step in ask("8.8.8.8", "udp/5060").steps)
    assert not any("dynamic members" in step for step in ask("8.8.8.8", "tcp/22").steps)


def test_spared_sources_are_mentioned() -> None:
    """A carrier that the block list has keeps working, and the explanation says why."""
    (step,) = [s for s in ask("198.51.100.17", "udp/5060").steps if "block list" in s]

    assert "carriers is never blocked" in step


def test_exceptions_that_are_named() -> None:
    """`except` replaces the default: an empty one spares nobody."""
    text = POLICY.replace("block: {from: [bad]}", "block: {from: [bad], except: []}")

    assert ask("198.51.100.17", "udp/5060", text).verdict == "drop"


def test_the_last_clause_holds_for_all() -> None:
    """Whatever arrives is decided."""
    assert clauses(policy())[-1].holds(packet_to(6, 1, parse_ports("vrrp")))


def test_trust_has_a_place() -> None:
    """The clause of a trusted group points at the key `trust`."""
    assert next(c.at for c in clauses(policy()) if c.groups == ("cluster",)) == Position("p.yaml", 8, 1)
