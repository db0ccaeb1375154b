"""Values, sets and maps of nft's JSON (libnftables-json(5)) as numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fwcompiler.addresses import LAST, Range, parse_address
from fwcompiler.ports import PROTOCOLS

Json = Any
MOST_ELEMENTS = 4096
"""Elements of a set that are read into a rule; one with more is a test by name (plain address sets know no bound)."""

# IANA protocol numbers under the names that nft prints (nft describe inet_proto, /etc/protocols).
PROTOCOL_NAMES: dict[str, int] = {
    **PROTOCOLS,
    **{"igmp": 2, "ipencap": 4, "ipip": 4, "egp": 8, "igp": 9, "dccp": 33, "ipv6": 41, "ipv6-route": 43, "ipv6-frag": 44, "gre": 47},
    **{"esp": 50, "ah": 51, "ipv6-icmp": 58, "ipv6-nonxt": 59, "ipv6-opts": 60, "eigrp": 88, "ospf": 89, "pim": 103},
    **{"comp": 108, "ipcomp": 108, "l2tp": 115, "isis": 124, "sctp": 132, "udplite": 136, "hopopt": 0, "ip": 0, "rsvp": 46, "mptcp": 262},
}
_SECONDS = re.compile(r"\d+")


class NotModelled(Exception):
    """An expression outside the neutral types; caught where it becomes a test by name or `Unknown`."""


@dataclass(frozen=True, slots=True)
class SetOf:
    """A set or map of a listing. `mapping`: it maps to something. `dynamic`: its members come and go."""

    name: str
    type: Json
    elements: Sequence[Json]
    mapping: bool = False
    dynamic: bool = False

    @property
    def version(self) -> int | None:
        """The family of a set of plain addresses."""
        return {"ipv4_addr": 4, "ipv6_addr": 6}.get(self.type) if isinstance(self.type, str) else None


@dataclass(slots=True)
class Table:
    """A table, with its sets and maps."""

    family: str
    name: str
    version: int | None
    sets: dict[str, SetOf] = field(default_factory=dict)

    def unique(self, name: str) -> str:
        """The name of a chain or set of this table among those of all tables."""
        return f"{self.family}/{self.name}/{name}"

    def named(self, reference: str) -> SetOf:
        """The set behind ``@name``.

        Raises:
            NotModelled: it is not listed, or its members come and go.
        """
        found = self.sets.get(reference.removeprefix("@"))
        if found is None or found.dynamic:
            raise NotModelled
        return found


def read_set(value: Json) -> SetOf:
    """A set or map; what a member says beside its value (counters, comments, time left) is left out."""
    flags = value.get("flags", [])
    dynamic = bool({"dynamic", "timeout"} & set([flags] if isinstance(flags, str) else flags)) or "timeout" in value
    dynamic = dynamic or ("size" in value and not value.get("elem"))
    mapping = "map" in value
    elements = [[plain(each[0]), each[1]] if mapping and isinstance(each, list) else plain(each) for each in value.get("elem", [])]
    return SetOf(value["name"], value.get("type"), elements, mapping, dynamic)


def plain(item: Json) -> Json:
    """An element without what is told about it."""
    return plain(item["elem"]["val"]) if isinstance(item, dict) and isinstance(item.get("elem"), dict) else item


def text_of(value: Json) -> str:
    """Canonical text of an expression."""
    return json.dumps(value, sort_keys=True)


def items_of(right: Json) -> Sequence[Json]:
    """The values that a right side stands for."""
    items = right["set"] if isinstance(right, dict) and "set" in right else [right]
    items = items if isinstance(items, list) else [items]
    if len(items) > MOST_ELEMENTS:
        raise NotModelled
    return [plain(item) for item in items]


def span_of(version: int, item: Json) -> Range:
    """An address, prefix or range."""
    match item:
        case "*":
            return 0, LAST[version]
        case str():
            found, value = parse_address(item)
            if found == version:
                return value, value
        case {"prefix": {"addr": str(text), "len": int(length)}}:
            found, value = parse_address(text)
            if found == version:
                mask = LAST[version] >> length
                return value & ~mask, value | mask
        case {"range": [str(low), str(high)]}:
            (a, first), (b, last) = parse_address(low), parse_address(high)
            if a == b == version:
                return first, last
    raise NotModelled


def number_span(item: Json, names: dict[str, int], last: int) -> Range:
    """A number, a name of one, a range of both, or a prefix over its bits."""

    def number(value: Json) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise NotModelled
        if isinstance(value, str):
            if value not in names:
                raise NotModelled
            value = names[value]
        if not 0 <= value <= last:
            raise NotModelled
        return int(value)

    match item:
        case "*":
            return 0, last
        case {"range": [low, high]}:
            return number(low), number(high)
        case {"prefix": {"addr": addr, "len": int(length)}}:
            free = last >> length
            return number(addr) & ~free, number(addr) | free
    return number(item), number(item)
