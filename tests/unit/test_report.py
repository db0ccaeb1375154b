"""What commands print about access: exact in JSON, in the policy's words for people."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from fwcompiler.addresses import EVERYONE, LAST, Addresses
from fwcompiler.backend import Command, Step
from fwcompiler.diagnostics import Finding, Position, Report
from fwcompiler.plan import Plan
from fwcompiler.policy import validate
from fwcompiler.proof.access import LOOPBACK_ADDRESSES, Access, AccessChange
from fwcompiler.proof.meaning import Explanation
from fwcompiler.report import access_lines, counters_json, diff_json, diff_text, explain_json, finding_json
from fwcompiler.resolve import resolve
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import AddressSet, Chain, Final, InSet, Rule, Ruleset
from fwcompiler.source import parse_document

CARRIERS = Addresses.of([(0xC6336410, 0xC633641F)], [(0x20010DB8 << 96, (0x20010DB8 << 96) + 7)])
ADMINS = Addresses.of([(0xC000020A, 0xC000020A)])
SOME = Ruleset((Chain("input", ()),))


def policy() -> Resolved:
    """A policy with the groups `carriers` and `admins`."""
    report = Report()
    document = parse_document(
        "p.yaml",
        "version: 1\n"
        "groups: {carriers: [198.51.100.16/28, '2001:db8::/125'], admins: [192.0.2.10]}\n"
        "services: {sip: {from: [carriers, admins]}}\n",
        report,
    )
    assert document is not None
    model = validate(document, report)
    assert model is not None
    return resolve(model, document, report, today=date(2026, 1, 1))


def line(addresses: Addresses, to: str = "udp/5060", service: str | None = "sip", known: bool = True) -> str:
    """One line of access gained, as people read it."""
    (text,) = access_lines([Access(addresses, to, service)], policy() if known else None, "+", "may reach")
    return text


@pytest.mark.parametrize(
    ("addresses", "text"),
    [
        (CARRIERS, "+ carriers may reach sip udp/5060"),
        (CARRIERS | ADMINS, "+ carriers, admins may reach sip udp/5060"),
        (EVERYONE, "+ anywhere may reach sip udp/5060"),
        (EVERYONE - LOOPBACK_ADDRESSES, "+ anywhere may reach sip udp/5060"),
        (EVERYONE - ADMINS, "+ anywhere but 192.0.2.10 may reach sip udp/5060"),
        (EVERYONE.only(6), "+ anywhere over IPv6 may reach sip udp/5060"),
        (EVERYONE.only(4) - ADMINS, "+ anywhere over IPv4 but 192.0.2.10 may reach sip udp/5060"),
        (Addresses.of([(1, 1)]), "+ 0.0.0.1 may reach sip udp/5060"),
        (Addresses.of([(0xC6336411, 0xC6336411)]), "carriers: + 198.51.100.17 may reach sip udp/5060"),
    ],
)
def test_sources_in_the_policys_words(addresses: Addresses, text: str) -> None:
    """Whole groups by name, parts of one with its name in front, most of the world by what is missing."""
    assert line(addresses) == text


def test_many_sources_are_counted() -> None:
    """Text summarises: the first few, and how many more."""
    assert line(Addresses.of((n * 10, n * 10) for n in range(1, 20))).startswith("+ 0.0.0.10, 0.0.0.20")
    assert "and 13 more" in line(Addresses.of((n * 10, n * 10) for n in range(1, 20)))


def test_ports_of_one_service_share_a_line() -> None:
    """The same sources at several ports of a service are one line."""
    parts = [Access(CARRIERS, "udp/5060", "sip"), Access(CARRIERS, "tcp/5060-5061", "sip"), Access(CARRIERS, "vrrp", None)]

    lines = list(access_lines(parts, policy(), "+", "may reach"))

    assert lines == ["+ carriers may reach sip udp/5060, tcp/5060-5061", "+ carriers may reach vrrp"]


def test_without_a_policy() -> None:
    """Where no policy is known, addresses speak for themselves."""
    assert line(ADMINS, known=False) == "+ 192.0.2.10 may reach sip udp/5060"


def test_json_is_exact() -> None:
    """JSON holds every range, and `anywhere` only where it is truly everybody."""
    plan = Plan(
        SOME,
        SOME,
        (Step(Command(("nft",), "x\n")),),
        AccessChange((Access(EVERYONE - ADMINS, "udp/1-9", "x"),), (Access(EVERYONE, "vrrp", None),)),
    )

    found = diff_json(plan)

    assert found["in_sync"] is False
    assert found["changes"] == ["x"]
    assert found["gained"] == [{"from": list((EVERYONE - ADMINS).texts()), "to": "udp/1-9", "service": "x"}]
    assert found["lost"] == [{"from": ["anywhere"], "to": "vrrp", "service": None}]
    assert Addresses.of([(0, LAST[4])]).texts() == ("0.0.0.0/0",)


def test_text_of_a_plan() -> None:
    """Access first, then kernel changes; colors only where asked for; in sync is one sentence."""
    step = Step(Command(("nft",), "\n".join(f"line {n}" for n in range(99))))
    plan = Plan(SOME, SOME, (step,), AccessChange((Access(CARRIERS, "udp/5060", "sip"),), (Access(ADMINS, "udp/5060", "sip"),)))

    plain, colored, whole = (diff_text(plan, policy(), color=c, whole=w) for c, w in ((False, False), (True, False), (False, True)))

    assert plain.index("access gained") < plain.index("access lost") < plain.index("kernel changes") < plain.index("more lines")
    assert ("\x1b[" in plain, "\x1b[32m+\x1b[0m" in colored, "\x1b[31m-\x1b[0m" in colored) == (False, True, True)
    assert ("line 98" in plain, "line 98" in whole, "more lines" in whole) == (False, True, False)
    assert diff_text(Plan(SOME, SOME, (), AccessChange((), ())), None, color=True) == "in sync: the kernel holds exactly this policy"


def test_text_without_change_of_access() -> None:
    """A change that concerns nobody says so."""
    text = diff_text(Plan(SOME, SOME, (Step(Command(("nft",), "x\n")),), AccessChange((), ())), None, color=False)

    assert "no new connection gains or loses access" in text


def test_small_shapes() -> None:
    """Findings, explanations and counters as JSON."""
    at = Position("p.yaml", 3, 7)

    assert finding_json(Finding("port", "m", at, "h")) == {
        "severity": "error",
        "code": "port",
        "message": "m",
        "at": "p.yaml:3:7",
        "hint": "h",
    }
    assert finding_json(Finding("host-bits", "m", severity="warning"))["at"] is None
    assert explain_json(Explanation("drop", None, "r", None, ())) == {"verdict": "drop", "service": None, "reason": "r", "at": None}
    assert counters_json({"sip.accept": (1, 2), "sip.drop": (3, 4), "other.drop": (5, 6)}) == {
        "other": {"drop": {"packets": 5, "bytes": 6}},
        "sip": {"accept": {"packets": 1, "bytes": 2}, "drop": {"packets": 3, "bytes": 4}},
    }


BLOCKED = CARRIERS | ADMINS
LIVE = Ruleset(
    (Chain("service.sip", (Rule((InSet("source", "carriers.v4", 4),), Final.ACCEPT, "sip"),)),),
    (AddressSet("carriers.v4", 4, CARRIERS.v4), AddressSet("block.v4", 4, BLOCKED.v4)),
)
PEOPLE = (Chain("service.sip", (Rule((InSet("source", "people.v4", 4),), Final.ACCEPT, "sip"),)),)


def lost(addresses: Addresses, live: Ruleset) -> str:
    """The one line about access lost under a policy that has `bad` before `people`, and no group of carriers."""
    report = Report()
    document = parse_document(
        "p.yaml",
        "version: 1\n"
        "groups: {bad: [198.51.100.16/28, 192.0.2.10], people: [192.0.2.0/24]}\n"
        "block: {from: [bad]}\n"
        "services: {wss: {from: [people]}}\n",
        report,
    )
    assert document is not None
    model = validate(document, report)
    assert model is not None
    resolved = resolve(model, document, report, today=date(2026, 1, 1))
    (text,) = access_lines([Access(addresses, "udp/5060", "sip")], resolved, "-", "may no longer reach", live)
    return text


def test_who_loses_access_is_told_as_he_was_known() -> None:
    """Not by the block list that he is on now, but by the group in force, or by one that a service names; else by the block list."""
    one = Addresses.of([(0xC6336411, 0xC6336411)])
    assert lost(one, LIVE) == "carriers: - 198.51.100.17 may no longer reach sip udp/5060"
    assert lost(CARRIERS.only(4), LIVE) == "- carriers may no longer reach sip udp/5060"
    assert lost(ADMINS, LIVE) == "people: - 192.0.2.10 may no longer reach sip udp/5060"
    assert lost(ADMINS, replace(LIVE, sets=(AddressSet("people.v4", 4, ADMINS.v4),), chains=PEOPLE)) == (
        "people: - 192.0.2.10 may no longer reach sip udp/5060"
    ), "the name goes on with other addresses"
    assert lost(one, Ruleset()) == "bad: - 198.51.100.17 may no longer reach sip udp/5060"
