"""``nft -j list ruleset`` of anybody -> neutral ruleset: all tables of the families ip, ip6 and inet.

Chains are called ``family/table/chain``, sets ``family/table/set``. Tables of other families are not on the host's IP way and
are named in `others`. What a match means is told in `foreign_tests`, values and sets are read in `foreign_values`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from fwcompiler.addresses import merged
from fwcompiler.diagnostics import Position
from fwcompiler.foreign import settle
from fwcompiler.ruleset import AddressSet, Chain, Hook, Match, Rule, Ruleset, Unknown, Verdict
from fwcompiler_nftables.foreign_statements import Statements
from fwcompiler_nftables.foreign_tests import Tests
from fwcompiler_nftables.foreign_values import NotModelled, Table, read_set, span_of, text_of

Json = Any
_VERSIONS = {"ip": 4, "ip6": 6, "inet": None}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")


def read_nft(text: str, file: str = "") -> Ruleset:
    """The ruleset behind nft's JSON listing. `file` is what rules' origins name; their line is the rule's number in the listing.

    Raises:
        ValueError: the text is no listing of nft's.
    """
    try:
        objects = [(kind, value) for item in json.loads(text)["nftables"] for kind, value in item.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no listing of nft's: {error!r}") from error
    objects = [(kind, value) for kind, value in objects if isinstance(value, dict)]
    tables = _tables(objects)
    rules: dict[str, list[Rule]] = {}
    changed: set[str] = set()
    number = 0
    for kind, value in objects:
        if kind == "chain" and _key(value) in tables:
            rules.setdefault(_chain_name(value, value["name"]), [])
        elif kind == "rule" and _key(value) in tables:
            number += 1
            reader = _Rule(tables[_key(value)], changed)
            rules.setdefault(_chain_name(value, value["chain"]), []).extend(reader.rules(value, Position(file, number)))
    asleep = {_key(v) for k, v in objects if k == "table" and "dormant" in str(v.get("flags", ""))}
    bases = [v for k, v in objects if k == "chain" and _key(v) in tables and _key(v) not in asleep]
    hooks = {_chain_name(v, v["name"]): _hook(v) for v in bases}
    chains = tuple(Chain(name, tuple(found), hooks.get(name)) for name, found in rules.items())
    known = tuple(s for table in tables.values() for s in _address_sets(table))
    return settle(Ruleset(chains, known, tuple(_others(objects))), frozenset(changed))


def _key(value: Json) -> tuple[str, str]:
    return str(value.get("family")), str(value.get("table", value.get("name")))


def _chain_name(value: Json, name: str) -> str:
    return f"{value['family']}/{value['table']}/{name}"


def _tables(objects: list[tuple[str, Json]]) -> dict[tuple[str, str], Table]:
    tables: dict[tuple[str, str], Table] = {}
    for kind, value in objects:
        if kind not in ("metainfo", "ruleset") and value.get("family") in _VERSIONS:
            family, name = _key(value)
            table = tables.setdefault((family, name), Table(family, name, _VERSIONS[family]))
            if kind in ("set", "map", "meter"):
                table.sets[value["name"]] = read_set(value)
    return tables


def _others(objects: list[tuple[str, Json]]) -> Iterator[str]:
    """What has no place in the neutral ruleset, and is not on the host's IP way."""
    for kind, value in objects:
        if kind == "table" and value.get("family") not in _VERSIONS:
            yield f"table {value.get('family')} {value.get('name')}: not on the host's IP way"
        elif kind == "table" and "dormant" in str(value.get("flags", "")):
            yield f"table {value.get('family')} {value.get('name')}: dormant"
        elif kind == "chain" and value.get("family") in _VERSIONS and value.get("hook", "input") not in _HOOKS:
            yield f"chain {_chain_name(value, value['name'])}: at {value['hook']}, before the host's IP way"
        elif kind == "flowtable":
            yield f"flowtable {value.get('name')}: established flows may go around the forward chains"


def _hook(chain: Json) -> Hook | None:
    """A chain of the host's IP way; one at another hook (ingress, egress) is none."""
    if chain.get("hook") not in _HOOKS:
        return None
    kind: Literal["filter", "nat", "route"] = chain["type"] if chain.get("type") in ("nat", "route") else "filter"
    priority = chain.get("prio", 0)
    policy: Literal["accept", "drop"] = "drop" if chain.get("policy") == "drop" else "accept"
    return Hook(chain["hook"], priority if isinstance(priority, int) else 0, policy, kind, _VERSIONS[chain["family"]])


def _address_sets(table: Table) -> Iterator[AddressSet]:
    """Sets of plain addresses, whose members rules look up by the set's name. Timed ones come and go."""
    for name, each in table.sets.items():
        version = each.version
        if version is not None and not each.mapping:
            try:
                ranges = merged(span_of(version, item) for item in each.elements)
            except (NotModelled, ValueError):
                continue
            yield AddressSet(table.unique(name), version, ranges, timeout=0 if each.dynamic else None)


class _Rule:
    """Reads one rule: what it asks and does, statement by statement."""

    def __init__(self, table: Table, changed: set[str]) -> None:
        self._tests = Tests(table)
        self._statements = Statements(table, self._tests, changed)

    def rules(self, rule: Json, origin: Position) -> Iterator[Rule]:
        """One rule, or one an element where it looks up verdicts or translations in a map; without one the rule is over."""
        matches: list[Match] = []
        for expression in rule.get("expr", []):
            kind, value = next(iter(expression.items())) if isinstance(expression, dict) and expression else ("", expression)
            try:
                ends = self._statement(kind, value, matches)
            except (NotModelled, KeyError, TypeError, ValueError, IndexError, AttributeError):
                matches.append(Unknown(text_of(expression)))
                ends = None
            if ends:
                for more, verdict in ends:
                    yield Rule((*matches, *more), verdict, origin=origin)
                return
        yield Rule(tuple(matches), None, origin=origin)

    def _statement(self, kind: str, value: Json, matches: list[Match]) -> list[tuple[tuple[Match, ...], Verdict]] | None:
        """Adds what a statement asks; returns the ends that it leads to, one a map element."""
        if kind == "match":
            matches += self._tests.match(value)
            return None
        if kind == "vmap":
            return self._statements.vmap(value)
        more, verdict = self._statements.read(kind, value)
        matches += more
        if isinstance(verdict, list):
            return verdict
        return [((), verdict)] if verdict is not None else None
