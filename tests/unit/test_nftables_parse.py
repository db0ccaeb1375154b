"""What of nft's listing stands for more, or for less, than it says; whole listings are read in tests/property and tests/kernel."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fwcompiler_nftables.parse import parse_listing

from fwcompiler.ruleset import Family, Final, Match, ProtocolIs, Rewritten, Rule, Unknown


def rule(*expressions: dict[str, Any]) -> Rule:
    """A rule of our own table."""
    where = {"family": "inet", "table": "fwc", "chain": "input"}
    chain = {"family": "inet", "table": "fwc", "name": "input", "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}
    return parse_listing(json.dumps({"nftables": [{"chain": chain}, {"rule": {**where, "expr": list(expressions)}}]})).chains[0].rules[0]


def match(left: dict[str, Any], right: Any, operator: str = "==") -> dict[str, Any]:
    """A match statement."""
    return {"match": {"op": operator, "left": left, "right": right}}


@pytest.mark.parametrize(("kind", "implied"), [("icmp", (Family(4),)), ("icmpv6", (Family(6),)), ("icmpx", ())])
def test_reject_tells_its_family(kind: str, implied: tuple[Match, ...]) -> None:
    """nft leaves the test of the family out where the answer is ICMP of one family; the rule is for that family all the same."""
    assert rule({"reject": {"type": kind, "expr": "admin-prohibited"}}) == Rule(implied, Final.REJECT)


@pytest.mark.parametrize("answer", [{"type": "tcp reset"}, {"type": "icmpx", "expr": "port-unreachable"}])
def test_other_answers_are_not_ours(answer: dict[str, str]) -> None:
    """Whoever answers otherwise than fwc would is named, not taken for the same."""
    found = rule({"reject": answer})

    assert found.verdict is None
    assert isinstance(found.matches[0], Unknown)


@pytest.mark.parametrize(("operator", "negated"), [("in", False), ("!", True)])
def test_bits_of_the_status(operator: str, negated: bool) -> None:
    """`ct status & dnat == 0` is listed as `ct status ! dnat`."""
    found = rule(match({"ct": {"key": "status"}}, "dnat", operator), {"accept": None})

    assert found.matches == (Rewritten("destination", negated),)


@pytest.mark.parametrize(("name", "number"), [("gre", 47), ("ipv6-icmp", 58), ("vrrp", 112), (99, 99)])
def test_protocols_by_name(name: str | int, number: int) -> None:
    """nft lists a protocol by the name that it has for it."""
    assert rule(match({"meta": {"key": "l4proto"}}, name), {"accept": None}).matches == (ProtocolIs(number),)


def test_a_named_limit_is_not_ours() -> None:
    """nft names a limit of the table by a text where ours have figures; nobody knows what it lets through."""
    (only,) = rule({"limit": "some"}, {"accept": None}).matches

    assert isinstance(only, Unknown)
