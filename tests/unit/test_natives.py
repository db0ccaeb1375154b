"""What iptables-nft-save leaves out of rules that were made with nft, and how they are told apart from iptables' own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fwcompiler_iptables.parse import parse_listing

from fwcompiler.natives import marked, unprinted
from fwcompiler.ruleset import Final, Unknown

SAVE = """*raw
:FWC-x - [0:0]
-A FWC-x -j DROP
COMMIT
*filter
:FWC-x - [0:0]
[1:60] -A FWC-x -i lo -j ACCEPT
[2:90] -A FWC-x -j DROP
COMMIT
"""
SOURCE = {"payload": {"protocol": "ip", "field": "saddr"}}
PORT = {"payload": {"protocol": "tcp", "field": "dport"}}


def match(left: Any, right: Any, operator: str = "==") -> dict[str, Any]:
    """A match as nft prints it."""
    return {"match": {"op": operator, "left": left, "right": right}}


def listing(*expressions: Any) -> str:
    """What nft prints of the second rule of FWC-x in the table filter, the first being iptables' own."""
    where = {"family": "ip", "table": "filter", "chain": "FWC-x"}
    first = [match({"meta": {"key": "iifname"}}, "lo"), {"counter": {"packets": 1, "bytes": 60}}, {"accept": None}]
    rules = [{"rule": {**where, "expr": each}} for each in (first, list(expressions))]
    return json.dumps({"nftables": [{"metainfo": {}}, {"chain": {"family": "ip", "table": "filter", "name": "FWC-x"}}, *rules]})


@pytest.mark.parametrize(
    "test",
    [
        match(SOURCE, {"set": ["192.0.2.1", "192.0.2.9"]}),
        match(SOURCE, "@some"),
        match(SOURCE, {"range": ["192.0.2.1", "192.0.2.9"]}),
        match(SOURCE, "192.0.2.1", ">="),
        match({"payload": {"protocol": "udp", "field": "length"}}, 20),
        match({"ct": {"key": "state"}}, ["established"]),
        {"vmap": {"key": PORT, "data": {"set": [[22, {"accept": None}]]}}},
        {"mangle": {"key": {"meta": {"key": "mark"}}, "value": 3}},
        {"limit": "named"},
    ],
)
def test_what_is_left_out_is_unknown(test: dict[str, Any]) -> None:
    """A rule that iptables-nft-save may print as another one is unknown, with nft's text; the others keep their meaning."""
    (chain,) = (c for c in parse_listing((marked(SAVE, listing(test, {"drop": None})), ""), "").chains if c.name == "x")

    assert chain.rules[0].verdict is Final.ACCEPT
    assert any(isinstance(m, Unknown) and next(iter(test)) in m.text for m in chain.rules[1].matches)
    assert chain.rules[1].verdict is None
    assert chain.rules[1].count == (2, 90)


@pytest.mark.parametrize(
    "tests",
    [
        [match(SOURCE, "192.0.2.1"), {"xt": {"type": "match", "name": "comment"}}],
        [match(SOURCE, {"prefix": {"addr": "192.0.2.0", "len": 24}}, "!=")],
        [match({"&": [SOURCE, "255.255.0.255"]}, "192.0.0.1")],
        [match({"meta": {"key": "l4proto"}}, "tcp"), match(PORT, {"range": [10, 20]})],
        [{"limit": {"rate": 5, "per": "second", "burst": 10}}],
    ],
)
def test_what_iptables_makes_is_believed(tests: list[dict[str, Any]]) -> None:
    """Rules of the forms that iptables-nft writes are read as its save program prints them; so is everything where nft cannot be asked."""
    assert marked(SAVE, listing(*tests, {"counter": {"packets": 2, "bytes": 90}}, {"drop": None})) == SAVE
    assert marked(SAVE, "") == SAVE


def test_a_table_that_is_not_printed() -> None:
    """The save program says which table it cannot print; nothing else counts as that."""
    assert unprinted("*raw\nCOMMIT\n# Table `filter' is incompatible, use 'nft' tool.\n") == "filter"
    assert unprinted(SAVE) == ""
