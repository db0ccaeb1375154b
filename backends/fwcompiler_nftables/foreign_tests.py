"""nft's match expressions -> neutral matches.

What the packet space shows is read exactly, including what nft leaves out of its listing because another test implies it.
A test of anything else becomes an `Opaque` whose text is the same as iptables' reader writes for it, or the expression.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from fwcompiler.addresses import MULTICAST, merged
from fwcompiler.foreign import FRAGMENT, TCP_FLAGS, mark, masked_address, tcp_flags
from fwcompiler.ruleset import (
    STATES,
    AnyOf,
    Family,
    InRanges,
    InSet,
    InterfaceIn,
    Match,
    Opaque,
    PortsIn,
    ProtocolIn,
    ProtocolIs,
    Side,
    State,
    StateIn,
    TypeIn,
)
from fwcompiler_nftables.foreign_values import PROTOCOL_NAMES, NotModelled, Table, items_of, number_span, span_of, text_of
from fwcompiler_nftables.parse import ICMP_TYPES

Json = Any
_TRANSPORT = {
    **{"tcp": 6, "udp": 17, "udplite": 136, "sctp": 132, "dccp": 33, "icmp": 1, "icmpv6": 58},
    **{"igmp": 2, "ah": 51, "esp": 50, "comp": 108},
}
_STATEFUL = ("numgen", "osf", "socket", "ct count", "last", "quota", "connlimit")
_ETHERTYPES = {"ip": 4, "ip6": 6}
PORT_NAMES = {"ssh": 22, "http": 80, "https": 443, "domain": 53, "sip": 5060}


class Tests:
    """Reads the tests of rules of one table."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def match(self, value: Json) -> list[Match]:
        """One match statement: what it implies, then what it says."""
        operator, left, right = value["op"], value["left"], value["right"]
        return [*self.implied(left), self._test(operator, left, right)]

    def implied(self, left: Json) -> list[Match]:
        """What reading a field asks of the packet by itself: nft does not list it."""
        match left:
            case {"concat": list(parts)}:
                return list(dict.fromkeys(m for part in parts for m in self.implied(part)))
            case {"payload": {"protocol": "ip" | "ip6" as family}}:
                return [Family(4 if family == "ip" else 6)] if self._table.family == "inet" else []
            case {"payload": {"protocol": "icmp" | "icmpv6" as name}}:
                return [Family(4 if name == "icmp" else 6), ProtocolIs(_TRANSPORT[name])]
            case {"payload": {"protocol": str(name)}} if name in _TRANSPORT:
                return [ProtocolIs(_TRANSPORT[name])]
            case {"tcp option": _}:
                return [ProtocolIs(6)]
            case {"&": [inner, *_]} | {"|": [inner, *_]} | {"^": [inner, *_]} | {">>": [inner, *_]} | {"<<": [inner, *_]}:
                return self.implied(inner)
        return []

    def _test(self, operator: str, left: Json, right: Json) -> Match:
        if isinstance(right, str) and right.startswith("@"):
            return self._in_set(left, right, operator == "!=")
        if isinstance(right, list) and len(right) > 1 and operator in ("==", "!="):
            right = {"|": right}
        if operator in ("<", ">", "<=", ">="):
            return self._compared(operator, left, right)
        try:
            return self.values(left, items_of(right), operator)
        except (NotModelled, KeyError, ValueError):
            return opaque(operator, left, right)

    def _compared(self, operator: str, left: Json, right: Json) -> Match:
        """An order is a range, where the field is a number that the space shows."""
        match left:
            case {"payload": {"field": "sport" | "dport"}} if isinstance(right, int):
                ends = {"<": [0, right - 1], "<=": [0, right], ">": [right + 1, 65535], ">=": [right, 65535]}[operator]
                if ends[0] > ends[1]:
                    return AnyOf(())
                return self.values(left, [{"range": ends}], "==")
        return opaque(operator, left, right)

    def _in_set(self, left: Json, reference: str, negated: bool) -> Match:
        """A look-up in a named set: addresses by the set's name, anything else by its members."""
        name = reference.removeprefix("@")
        found = self._table.sets.get(name)
        side = _address_side(left)
        if side and found is not None and found.version == side[1] and not found.mapping:
            return InSet(side[0], self._table.unique(name), side[1], negated)
        try:
            elements = self._table.named(reference)
            keys = [each[0] for each in elements.elements] if elements.mapping else elements.elements
            return self.values(left, items_of({"set": keys}), "!=" if negated else "==")
        except (NotModelled, KeyError, ValueError, TypeError):
            return Opaque(f"set {self._table.unique(name)} has {text_of(left)}", negated)

    def values(self, left: Json, items: Sequence[Json], operator: str) -> Match:
        """The field has one of the values.

        Raises:
            NotModelled: the field is not in the packet space, or a value is none of it.
        """
        if operator not in ("==", "!=", "in", "!"):
            raise NotModelled
        negated = operator in ("!=", "!")
        match left:
            case {"concat": list(parts)}:
                return self._concatenation(parts, items, negated)
            case {"payload": {"protocol": str(protocol), "field": str(name)}}:
                return self._payload(protocol, name, items, operator)
            case {"meta": {"key": str(key)}}:
                return self._meta(key, items, negated)
            case {"ct": {"key": "state"}}:
                return _states(items, operator)
            case {"ct": {"key": "mark"}} if len(items) == 1 and isinstance(items[0], int):
                return replace(mark("connmark", items[0]), negated=negated)
            case {"ct": {"key": "status"}} if operator in ("in", "!"):
                return _any(tuple((Opaque(f"ct status {w}"),) for w in _words(items)), negated)
            case {"fib": {"result": "type", "flags": [flag]}} if flag in ("saddr", "daddr"):
                return self._fib_type("source" if flag == "saddr" else "destination", items, negated)
            case {"&": [inner, mask]}:
                return self._masked(inner, mask, items, operator)
        raise NotModelled

    def _concatenation(self, parts: Sequence[Json], items: Sequence[Json], negated: bool) -> Match:
        """Elements that differ in the first part only are one alternative with all of the first values."""
        grouped: dict[str, tuple[list[Json], list[Json]]] = {}
        for item in items:
            values = item["concat"] if isinstance(item, dict) and "concat" in item else [item]
            if len(values) != len(parts):
                raise NotModelled
            grouped.setdefault(text_of(values[1:]), (values[1:], []))[1].append(values[0])
        alternatives = tuple(
            (self.values(parts[0], firsts, "=="), *(self.values(part, [value], "==") for part, value in zip(parts[1:], rest, strict=True)))
            for rest, firsts in grouped.values()
        )
        return AnyOf(alternatives, negated)

    def _payload(self, protocol: str, name: str, items: Sequence[Json], operator: str) -> Match:
        negated = operator in ("!=", "!")
        match protocol, name:
            case "ip" | "ip6", "saddr" | "daddr":
                version = 4 if protocol == "ip" else 6
                spans = merged(span_of(version, i) for i in items)
                return InRanges("source" if name == "saddr" else "destination", version, spans, negated)
            case ("ip", "protocol") | ("ip6", "nexthdr"):
                # A packet of the space has no extension headers, so its next header is its protocol.
                return _protocols(items, negated)
            case "tcp" | "udp" | "udplite" | "sctp" | "dccp" | "th", "sport" | "dport":
                numbers = () if protocol == "th" else (_TRANSPORT[protocol],)
                spans = merged(number_span(i, PORT_NAMES, 65535) for i in items)
                return PortsIn("source" if name == "sport" else "destination", numbers, spans, negated)
            case "icmp" | "icmpv6", "type":
                version = 4 if protocol == "icmp" else 6
                found = {t for i in items for low, high in [number_span(i, ICMP_TYPES[version], 255)] for t in range(low, high + 1)}
                return TypeIn(version, tuple(t for t in range(256) if (t in found) != negated))
            case "icmp" | "icmpv6", "code":
                return _any(tuple((Opaque(f"icmp code {a}-{b}"),) for i in items for a, b in [number_span(i, {}, 255)]), negated)
            case "tcp", "flags":
                return _flags(0xFF, items, operator)
        raise NotModelled

    def _meta(self, key: str, items: Sequence[Json], negated: bool) -> Match:
        match key:
            case "iif" | "iifname" | "oif" | "oifname":
                # No interface has a slash in its name; iptables-nft writes one so where nothing may match.
                if all(isinstance(i, str) and "\\" not in i for i in items):
                    real = tuple(sorted(i for i in items if "/" not in i))
                    return InterfaceIn("in" if key.startswith("i") else "out", real, negated) if real else AnyOf((), negated)
            case "nfproto" | "protocol":
                names = {"ipv4": 4, "ipv6": 6} if key == "nfproto" else _ETHERTYPES
                tests = tuple((Family(names[str(i)]),) for i in items if str(i) in names)
                if key == "protocol" or len(tests) == len(items):
                    return _any(tests, negated)
            case "l4proto":
                return _protocols(items, negated)
            case "mark" if len(items) == 1 and isinstance(items[0], int):
                return replace(mark("mark", items[0]), negated=negated)
            case "pkttype":
                return _any(tuple((Opaque(f"packet type {_packet_type(i)}"),) for i in items), negated)
        raise NotModelled

    def _fib_type(self, side: Side, items: Sequence[Json], negated: bool) -> Match:
        tests: list[tuple[Match, ...]] = []
        for item in items:
            if item == "multicast":
                tests += [(InRanges(side, v, (MULTICAST[v],)),) for v in (4, 6) if self._table.version in (None, v)]
            elif isinstance(item, str):
                tests.append((Opaque(f"{side} type {item}"),))
            else:
                raise NotModelled
        return _any(tuple(tests), negated)

    def _masked(self, inner: Json, mask: Json, items: Sequence[Json], operator: str) -> Match:
        side = _address_side(inner)
        if side and len(items) == 1 and isinstance(mask, str) and isinstance(items[0], str) and operator in ("==", "!="):
            under, value = span_of(side[1], mask)[0], span_of(side[1], items[0])[0]
            return masked_address(side[0], side[1], under, value, negated=operator == "!=")
        match inner:
            case {"meta": {"key": "mark"}} | {"ct": {"key": "mark"}} if len(items) == 1 and isinstance(mask, int):
                if isinstance(items[0], int) and operator in ("==", "!="):
                    return replace(mark("mark" if "meta" in inner else "connmark", items[0], mask), negated=operator == "!=")
            case {"payload": {"protocol": "ip", "field": "frag-off"}} if operator in ("==", "!=") and (mask, *items) == (0x1FFF, 0):
                return Opaque(FRAGMENT, operator == "==")
            case {"payload": {"protocol": "tcp", "field": "flags"}} if operator in ("==", "!="):
                return _flags(_bits(mask), items, operator)
        raise NotModelled


def opaque(operator: str, left: Json, right: Json) -> Opaque:
    """A test by name; of what changes from packet to packet, one a rule."""
    stateful = any(f'"{word}"' in text_of(left) for word in _STATEFUL)
    negated = operator == "!="
    subject = _subject(left)
    return Opaque(f"{subject} {'==' if negated else operator} {text_of(right)}", negated, stateful)


def _subject(left: Json) -> str:
    """The field in words where it is a simple one: what rules change is known by these."""
    match left:
        case {"payload": {"protocol": str(protocol), "field": str(name)}}:
            return name if protocol in ("ip", "ip6") and name in ("dscp", "ttl", "hoplimit") else f"{protocol} {name}"
        case {"meta": {"key": str(key)}}:
            return {"mark": "mark", "pkttype": "packet type"}.get(key, f"meta {key}")
        case {"ct": {"key": str(key)}}:
            return "connmark" if key == "mark" else f"ct {key}"
        case {"&": [inner, mask]}:
            return f"{_subject(inner)} & {text_of(mask)}"
    return text_of(left)


def changed_by(key: Json) -> set[str]:
    """The subjects of tests that change with a field; bytes of the packet may be any of them."""
    match key:
        case {"payload": {"field": "saddr"}}:
            return {"source"}
        case {"payload": {"field": "daddr"}}:
            return {"destination"}
        case {"payload": {"field": "sport"}}:
            return {"source port"}
        case {"payload": {"field": "dport"}}:
            return {"destination port"}
        case {"payload": {"field": str()}} | {"meta": _} | {"ct": _}:
            return {_subject(key)}
    return {"source", "destination", "source port", "destination port", "tcp flags", "dscp", "ttl", "hoplimit"}


def _address_side(left: Json) -> tuple[Side, int] | None:
    match left:
        case {"payload": {"protocol": "ip" | "ip6" as family, "field": "saddr" | "daddr" as name}}:
            return ("source" if name == "saddr" else "destination"), 4 if family == "ip" else 6
    return None


def _protocols(items: Sequence[Json], negated: bool) -> Match:
    spans = merged(number_span(i, PROTOCOL_NAMES, 255) for i in items)
    if len(spans) == 1 and spans[0][0] == spans[0][1]:
        return ProtocolIs(spans[0][0], negated)
    return ProtocolIn(spans, negated)


def _any(tests: tuple[tuple[Match, ...], ...], negated: bool) -> Match:
    if len(tests) == 1 and len(tests[0]) == 1 and (not negated or isinstance(tests[0][0], Opaque)):
        only = tests[0][0]
        return replace(only, negated=not only.negated) if negated and isinstance(only, Opaque) else only
    return AnyOf(tests, negated)


def _packet_type(item: Json) -> str:
    if not isinstance(item, str):
        raise NotModelled
    return "host" if item == "unicast" else item


def _words(items: Iterable[Json]) -> list[str]:
    """Names of bits: a list, or joined by ``|``."""
    found: list[str] = []
    for item in items:
        match item:
            case str():
                found.append(item)
            case list():
                found += _words(item)
            case {"|": list(parts)}:
                found += _words(parts)
            case 0:
                pass
            case _:
                raise NotModelled
    return found


def _states(items: Sequence[Json], operator: str) -> Match:
    """A packet has one state. Compared with several at once (``!= a,b``) it is always another one."""
    joined = any(not isinstance(i, str) for i in items)
    words = _words(items)
    if not words or not all(w in STATES for w in words):
        raise NotModelled
    states = cast(frozenset[State], frozenset(words))
    if joined and operator in ("==", "!=") and len(states) > 1 and any(isinstance(i, dict) for i in items):
        return AnyOf((), operator == "!=")
    return StateIn(states, operator in ("!=", "!"))


def _bits(words: Json) -> int:
    if isinstance(words, int):
        return words
    return sum({TCP_FLAGS[w] for w in _words([words])})


def _flags(mask: int, items: Sequence[Json], operator: str) -> Match:
    """``in`` asks for any of the flags, ``!`` for none of them, ``==`` for exactly one of the values under the mask."""
    if operator in ("in", "!"):
        none_of = tcp_flags(_bits(list(items)), 0)
        return replace(none_of, negated=none_of.negated != (operator == "in"))
    tests = tuple((tcp_flags(mask, _bits(item)),) for item in items)
    if len(tests) == 1:
        return replace(tests[0][0], negated=tests[0][0].negated != (operator == "!="))
    return AnyOf(tests, operator == "!=")
