"""nft's statements other than matches -> neutral verdicts and matches.

Counters, logs, marks and the like go on. Limits, quotas and counts are tests; so is adding to a set, which fails when it
is full. A look-up of verdicts or translations in a map becomes one end an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fwcompiler.addresses import LAST, Range, Ranges, merged
from fwcompiler.ruleset import (
    AnyOf,
    Family,
    Final,
    Goto,
    Jump,
    Limit,
    Match,
    Opaque,
    ProtocolIs,
    Side,
    Translate,
    Undecided,
    Untrack,
    Verdict,
)
from fwcompiler_nftables.foreign_tests import PORT_NAMES, Tests, changed_by
from fwcompiler_nftables.foreign_values import NotModelled, Table, items_of, number_span, plain, span_of, text_of

Json = Any
End = tuple[tuple[Match, ...], Verdict]
"""What an element asks beside the rule, and where it leads."""

GO_ON = ("counter", "log", "ct helper", "ct timeout", "ct expectation", "secmark", "flow", "dup", "meter set", "continue")
_SIDES: dict[str, Side] = {"dnat": "destination", "redirect": "destination", "snat": "source", "masquerade": "source"}


def _implied_by_answer(value: Json) -> list[Match]:
    """What a rule asks by its answer: nft leaves the test of the family out of its listing where ICMP of one family tells it."""
    match value:
        case {"type": "tcp reset"}:
            return [ProtocolIs(6)]
        case {"type": "icmp" | "icmpv6" as kind}:
            return [Family(4 if kind == "icmp" else 6)]
    return []


class Statements:
    """Reads statements of rules of one table, and notes what they change that rules test."""

    def __init__(self, table: Table, tests: Tests, changed: set[str]) -> None:
        self._table, self._tests, self._changed = table, tests, changed

    def read(self, kind: str, value: Json) -> tuple[list[Match], Verdict | list[End]]:
        """What a statement asks, and where it leads (None: on).

        Raises:
            NotModelled: nobody here knows the statement.
        """
        match kind:
            case "accept" | "drop" | "return":
                return [], Final(kind)
            case "reject":
                return _implied_by_answer(value), Final.REJECT
            case "jump" | "goto":
                name = self._table.unique(value["target"])
                return [], Jump(name) if kind == "jump" else Goto(name)
            case "notrack":
                return [], Untrack()
            case "queue" | "tproxy" | "synproxy" | "fwd":
                return self._aside(kind, value)
            case "dnat" | "snat" | "redirect" | "masquerade":
                return [], self._translation(kind, value or {})
            case "mangle":
                self._changed |= changed_by(value["key"])
                return [], None
            case _:
                return self._counting(kind, value), None

    def _aside(self, kind: str, value: Json) -> tuple[list[Match], Verdict]:
        return ([ProtocolIs(6)] if kind == "synproxy" else []), Undecided(f"{kind} {text_of(value)}")

    def _counting(self, kind: str, value: Json) -> list[Match]:
        """Tests that count; statements on the side ask nothing."""
        match kind:
            case "limit":
                return [_limit(value)]
            case "quota" | "ct count" | "last" | "meter" | "connlimit":
                return [] if kind == "last" else [Opaque(f"{kind} {text_of(value)}", stateful=True)]
            case "set" | "map":
                self._changed.add(f"set {self._table.unique(str(value.get(kind, '')).removeprefix('@'))}")
                return [Opaque(f"{value.get('op', 'add')} to {value.get(kind)}: {text_of(value)}", stateful=True)]
            case "xt":
                raise NotModelled
            case _ if kind in GO_ON:
                return []
        raise NotModelled

    def vmap(self, value: Json) -> list[End]:
        """One end an element; elements exclude each other."""
        implied = tuple(self._tests.implied(value["key"]))
        ends: list[End] = []
        for keys, verdicts in self._pairs(value["data"]):
            _, verdict = self.read(*next(iter(verdicts.items())))
            if isinstance(verdict, list):
                raise NotModelled
            ends.append(((*implied, self._looked_up(value["key"], keys)), verdict))
        return ends or [((AnyOf(()),), None)]

    def _pairs(self, data: Json) -> list[tuple[list[Json], Json]]:
        """Keys by what they map to, in order; a wildcard would have to exclude all other keys."""
        pairs = self._table.named(data).elements if isinstance(data, str) else [[plain(k), v] for k, v in data["set"]]
        grouped: dict[str, tuple[list[Json], Json]] = {}
        for key, result in pairs:
            if key == "*":
                raise NotModelled
            grouped.setdefault(text_of(result), ([], result))[0].append(key)
        return list(grouped.values())

    def _looked_up(self, key: Json, keys: list[Json]) -> Match:
        """The key is one of these; of a key that no field shows, a test by name."""
        try:
            return self._tests.values(key, keys, "==")
        except (NotModelled, KeyError, ValueError, TypeError):
            return Opaque(f"{text_of(key)} is one of {text_of(keys)}", stateful=True)

    def _translation(self, kind: str, value: Json) -> Verdict | list[End]:
        """NAT; an address out of a map is one end an element, and a packet without an element goes on."""
        address, port = value.get("addr"), value.get("port")
        if isinstance(address, dict) and "map" in address:
            looked_up = address["map"]
            implied = tuple(self._tests.implied(looked_up["key"]))
            return [
                ((*implied, self._looked_up(looked_up["key"], keys)), self._translate(kind, value, result, port))
                for keys, result in self._pairs(looked_up["data"])
            ]
        return self._translate(kind, value, address, port)

    def _translate(self, kind: str, value: Json, address: Json, port: Json) -> Translate:
        if isinstance(address, dict) and "concat" in address:
            address, port = (*address["concat"], port)[:2]
        family = value.get("family", self._table.family)
        version = {"ip": 4, "ip6": 6}.get(family)
        self._changed.add("ct status")
        text = f"{kind} {text_of(value)}"
        try:
            ranges = _addresses(address, version)
            ports = _ports(port)
        except (NotModelled, ValueError, KeyError):
            ranges, ports = ((0, LAST[version or 6]),), (0, 65535)
        if ports is None and _SIDES[kind] == "source" and "random" in str(value.get("flags", "")):
            ports = (0, 65535)
        if kind == "dnat" and address is not None and not ranges:
            raise NotModelled
        return Translate(_SIDES[kind], text, version, ranges, kind == "redirect", ports)


def _addresses(address: Json, version: int | None) -> Ranges:
    if address is None:
        return ()
    if version is None:
        version = 6 if ":" in str(address) else 4
    return merged(span_of(version, item) for item in items_of(address))


def _ports(port: Json) -> Range | None:
    if port is None:
        return None
    spans: Sequence[Range] = [number_span(item, PORT_NAMES, 65535) for item in items_of(port)]
    return min(low for low, _ in spans), max(high for _, high in spans)


def _limit(value: Json) -> Match:
    known = {"rate", "per", "burst", "rate_unit", "burst_unit", "inv"}
    packets = isinstance(value, dict) and value.get("rate_unit", "packets") == "packets" and not set(value) - known
    if packets and not value.get("inv") and value["per"] in ("second", "minute", "hour", "day"):
        return Limit(value["rate"], value["per"], value.get("burst", 5))
    return Opaque(f"limit {text_of(value)}", stateful=True)
