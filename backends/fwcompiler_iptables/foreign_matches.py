"""iptables' match modules -> neutral matches (iptables-extensions(8)).

What the packet space shows is read exactly. A test of anything else that is known is an `Opaque` with a canonical text:
shared where it is a function of packet, host or clock (`PURE`), one a rule where it counts or remembers (`STATEFUL`).
A module nobody here knows is `Unknown`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Literal, cast

from fwcompiler.addresses import MULTICAST, merged
from fwcompiler.foreign import FRAGMENT, TCP_FLAGS, WITH_PORTS, mark, masked_address, tcp_flags
from fwcompiler.ruleset import (
    STATES,
    AnyOf,
    InRanges,
    InSet,
    Interface,
    InterfaceIn,
    Limit,
    Match,
    Opaque,
    PortsIn,
    ProtocolIs,
    Side,
    State,
    StateIn,
    TypeIn,
    Unknown,
)
from fwcompiler_iptables.foreign_options import Group, Spec
from fwcompiler_iptables.foreign_values import NotModelled, icmp_type, port_spans, protocol_number, span_of

PURE = frozenset(
    (
        *("mac", "mark", "connmark", "owner", "dscp", "tos", "ttl", "hl", "length", "time", "string", "u32", "policy", "physdev"),
        *("pkttype", "helper", "esp", "ah", "frag", "rt", "hbh", "dst", "mh", "ipv6header", "realm", "bpf", "cgroup", "connlabel"),
        *("cpu", "devgroup", "ecn", "eui64", "osf", "rpfilter", "tcpmss", "layer7", "ipp2p", "geoip", "condition", "icmp6", "icmp"),
        *("ipvs", "vlan", "sctp", "dccp", "webstr", "ipv4options", "pknock", "country", "asn", "srh", "set", "state", "conntrack"),
    )
)
STATEFUL = frozenset(
    (
        *("limit", "hashlimit", "recent", "quota", "quota2", "connlimit", "statistic", "socket", "connbytes", "rateest", "random"),
        *("nth", "psd", "iplimit", "fuzzy", "cluster", "dstlimit", "lscan", "connrate", "bytelimit", "unclean", "gradm"),
    )
)
ALWAYS = frozenset(("comment", "nfacct", "account", "standard"))
_SIDES: Mapping[str, Side] = {"-s": "source", "-d": "destination"}
_PERIODS: Mapping[str, Literal["second", "minute", "hour", "day"]] = {
    **{"s": "second", "sec": "second", "second": "second", "m": "minute", "min": "minute", "minute": "minute"},
    **{"h": "hour", "hour": "hour", "d": "day", "day": "day"},
}
_PORT_OPTIONS: Mapping[str, Side | Literal["either"]] = {
    **{"--sport": "source", "--source-port": "source", "--sports": "source", "--source-ports": "source"},
    **{"--dport": "destination", "--destination-port": "destination", "--dports": "destination", "--destination-ports": "destination"},
    **{"--port": "either", "--ports": "either"},
}
_FIELDS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("mac", "--mac-source"): ("ether saddr", "=="),
    ("length", "--length"): ("meta length", "=="),
    ("helper", "--helper"): ("ct helper", "=="),
    **{
        (module, f"--{module}{end}"): (name, sign)
        for module, name in (("ttl", "ttl"), ("hl", "hoplimit"))
        for end, sign in (("", "=="), ("-eq", "=="), ("-gt", ">"), ("-lt", "<"))
    },
}
"""Tests of one field, by option: nft's name of the field, and how it is compared, so that both languages name one test alike."""
_HEADERS: Mapping[str, tuple[int, str]] = {"ah": (51, "ah spi"), "esp": (50, "esp spi"), "ipcomp": (108, "comp cpi")}
_LAST_NUMBER = {"length": 65535, "ah": (1 << 32) - 1, "esp": (1 << 32) - 1, "ipcomp": 65535}
_ECT = ("not-ect", "ect1", "ect0", "ce")
"""The two bits of RFC 3168, as nft calls their values."""
_PACKET_TYPES = {"unicast": "host", "host": "host", "broadcast": "broadcast", "bcast": "broadcast", "multicast": "multicast"}


def read_matches(spec: Spec, version: int) -> list[Match]:
    """Everything a rule asks of a packet; an option that cannot be read is `Unknown` by itself."""
    found: list[Match] = []
    for negated, name, values in spec.plain:
        text = f"{'! ' if negated else ''}{name} {' '.join(values)}"
        found += _read(_plain(negated, name, values[0] if values else "", version), text)
    modules = _Modules(version, _protocols(spec))
    for group in spec.modules:
        found += _read(modules.module(group), f"-m {group.text()}")
    return list(dict.fromkeys(found))


def _read(matches: Iterator[Match], text: str) -> list[Match]:
    try:
        return list(matches)
    except (ValueError, KeyError, IndexError):
        return [Unknown(text)]


def _protocols(spec: Spec) -> tuple[int, ...]:
    """The protocol that a rule fixes, for modules that read its header; all that have ports where it fixes none."""
    try:
        return (protocol_number(spec.protocol),) if spec.protocol not in ("", "all", "0") else WITH_PORTS
    except (KeyError, ValueError):
        return WITH_PORTS


def _plain(negated: bool, name: str, value: str, version: int) -> Iterator[Match]:
    match name:
        case "-s" | "-d":
            tests = tuple((_network(_SIDES[name], each, version),) for each in value.split(","))
            yield tests[0][0] if len(tests) == 1 and not negated else AnyOf(tests, negated)
        case "-p":
            if value not in ("all", "0", "ip") or negated:
                yield ProtocolIs(protocol_number(value), negated)
        case "-i" | "-o":
            yield from _interface("in" if name == "-i" else "out", value, negated)
        case "-f":
            yield Opaque(FRAGMENT, negated)
        case _:
            raise ValueError(f"`{name}` is no option")


@lru_cache(4096)
def _network(side: Side, value: str, version: int) -> Match:
    """``a``, ``a/length`` or ``a/mask``."""
    text, _, mask = value.partition("/")
    address = ip_address(text)
    if address.version != version:
        raise ValueError(f"`{value}` is of the other family")
    if "." not in mask and ":" not in mask:
        network = ip_network(f"{address}/{mask}" if mask else text, strict=False)
        return InRanges(side, version, ((int(network[0]), int(network[-1])),))
    return masked_address(side, version, int(ip_address(mask)), int(address) & int(ip_address(mask)))


def _interface(way: Literal["in", "out"], name: str, negated: bool) -> Iterator[Match]:
    if name == "+":
        if negated:
            yield InterfaceIn(way, ("*",), True)
    elif name.endswith("+"):
        yield InterfaceIn(way, (f"{name[:-1]}*",), negated)
    elif name.endswith("*"):
        # No wildcard here: it is the name itself, and has an own one in nft, where a star at the end would be a wildcard.
        star = json.dumps(f"{name[:-1]}\\*")
        yield Opaque(f"meta {'iifname' if way == 'in' else 'oifname'} == {star}", negated)
    else:
        yield Interface(way, name, negated)


def field_value(module: str, text: str) -> str:
    """The value of a test of one field as nft lists it: a number, a range, or a word in quotes."""
    if module in ("mac", "helper"):
        return json.dumps(text.lower() if module == "mac" else text)
    low, colon, high = text.partition(":")
    if not colon:
        return str(int(low, 0))
    return json.dumps({"range": [int(low or "0", 0), int(high, 0) if high else _LAST_NUMBER[module]]})


def named(group: Group) -> Match:
    """A module's test by name: one atom for all of its options."""
    if group.name in PURE:
        return Opaque(group.text())
    if group.name in STATEFUL:
        return Opaque(group.text(), stateful=True)
    return Unknown(f"-m {group.text()}")


def _flags(text: str) -> int:
    words = text.lower().split(",")
    if words == ["all"]:
        return 0x3F
    return 0 if words == ["none"] else sum({TCP_FLAGS[word] for word in words})


def _states(text: str, negated: bool) -> Iterator[Match]:
    """States, and the two virtual ones that tell of NAT."""
    words = text.lower().split(",")
    plain = frozenset(words) & frozenset(STATES)
    virtual = sorted(set(words) - plain)
    if set(virtual) - {"snat", "dnat"}:
        raise NotModelled
    tests: list[Match] = [StateIn(cast(frozenset[State], plain))] if plain else []
    tests += [Opaque(f"ct status {word}") for word in virtual]
    if len(tests) == 1:
        yield replace(cast(StateIn | Opaque, tests[0]), negated=negated)
    else:
        yield AnyOf(tuple((t,) for t in tests), negated)


def address_type(side: Side, version: int, kind: str) -> Match:
    """LOCAL and the like are the host's business; multicast shows in the address."""
    if kind == "multicast":
        return InRanges(side, version, (MULTICAST[version],))
    return Opaque(f"{side} type {kind}")


@dataclass(frozen=True, slots=True)
class _Modules:
    """Readers of match modules, for a rule of one family and the protocol that it fixes."""

    version: int
    protocols: tuple[int, ...]

    def module(self, group: Group) -> Iterator[Match]:
        if group.name in ALWAYS:
            return
        reader = _READERS.get(group.name)
        try:
            if reader:
                yield from reader(self, group)
                return
        except NotModelled:
            pass
        yield named(group)

    def _port(self, group: Group) -> Iterator[Match]:
        """tcp, udp, sctp, dccp, udplite: ports, TCP flags, and the rest by name."""
        number = protocol_number(group.name)
        for negated, option, values in group.options:
            if option in _PORT_OPTIONS and len(values) == 1 and "," not in values[0]:
                yield PortsIn(cast(Side, _PORT_OPTIONS[option]), (number,), port_spans(values[0]), negated)
            elif option == "--syn":
                yield from (ProtocolIs(6), replace(tcp_flags(0x17, 0x02), negated=negated))
            elif option == "--tcp-flags" and len(values) == 2:
                test = tcp_flags(*(_flags(v) for v in values))
                yield from (ProtocolIs(6), replace(test, negated=negated != test.negated))
            else:
                yield Opaque(f"{group.name} {option} {' '.join(values)}", negated)
        if not group.options and self.protocols == WITH_PORTS:
            yield ProtocolIs(number)

    def _multiport(self, group: Group) -> Iterator[Match]:
        for negated, option, values in group.options:
            side = _PORT_OPTIONS[option]
            spans = merged(span for value in values for each in value.split(",") for span in port_spans(each))
            if side != "either":
                yield PortsIn(side, self.protocols, spans, negated)
            elif negated:
                yield from (PortsIn("source", self.protocols, spans, True), PortsIn("destination", self.protocols, spans, True))
            else:
                # Alternatives that exclude each other.
                other = (PortsIn("source", self.protocols, spans, True), PortsIn("destination", self.protocols, spans))
                yield AnyOf(((PortsIn("source", self.protocols, spans),), other))

    def _icmp(self, group: Group) -> Iterator[Match]:
        family = 4 if group.name == "icmp" else 6
        number = 1 if family == 4 else 58
        yield ProtocolIs(number)
        for negated, _, (text,) in group.options:
            found = icmp_type(family, text)
            if found is None:
                if negated:
                    yield AnyOf(())
                continue
            kind, codes = found
            same: tuple[Match, ...] = (TypeIn(family, (kind,)), *((Opaque(f"icmp code {codes[0]}-{codes[1]}"),) if codes else ()))
            others = tuple(t for t in range(256) if t != kind)
            if not negated:
                yield from same
            elif codes:
                yield AnyOf(((TypeIn(family, others),), (same[0], replace(cast(Opaque, same[1]), negated=True))))
            else:
                yield TypeIn(family, others)

    def _state(self, group: Group) -> Iterator[Match]:
        for negated, option, values in group.options:
            text = ",".join(values)
            if option in ("--state", "--ctstate"):
                yield from _states(text, negated)
            elif option == "--ctproto":
                # An ICMP error belongs to a connection of another protocol.
                yield Opaque(f"ct protocol {protocol_number(text)}", negated)
            elif option == "--ctstatus":
                yield Opaque(f"ct status {'|'.join(sorted(text.lower().split(',')))}", negated)
            else:
                yield Opaque(f"ct {option[2:]} {text}", negated)

    def _iprange(self, group: Group) -> Iterator[Match]:
        for negated, option, values in group.options:
            side: Side = "source" if option == "--src-range" else "destination"
            yield InRanges(side, self.version, (span_of(values[0], self.version),), negated)

    def _set(self, group: Group) -> Iterator[Match]:
        """A set of addresses by its name; look-ups in more than one dimension are known by name."""
        for negated, option, values in group.options:
            if option not in ("--match-set", "--set") or len(values) != 2:
                raise NotModelled
            if values[1] in ("src", "dst"):
                yield InSet("source" if values[1] == "src" else "destination", values[0], self.version, negated)
            else:
                yield Opaque(f"set {values[0]} has {values[1]}", negated)

    def _addrtype(self, group: Group) -> Iterator[Match]:
        limited = [option for _, option, _ in group.options if option.startswith("--limit-iface")]
        for negated, option, values in group.options:
            if option not in ("--src-type", "--dst-type"):
                continue
            side: Side = "source" if option == "--src-type" else "destination"
            kinds = ",".join(values).lower().split(",")
            if limited:
                yield Opaque(f"{side} type {','.join(sorted(kinds))} {limited[0]}", negated)
                continue
            tests = tuple((address_type(side, self.version, kind),) for kind in kinds)
            yield AnyOf(tests, negated) if len(tests) > 1 or negated else tests[0][0]

    def _limit(self, group: Group) -> Iterator[Match]:
        options = {option: values[0] for _, option, values in group.options}
        if options.keys() - {"--limit", "--limit-burst"} or any(no for no, _, _ in group.options):
            raise NotModelled
        rate, _, per = options.get("--limit", "3/hour").partition("/")
        yield Limit(int(rate), _PERIODS[per or "sec"], int(options.get("--limit-burst", "5")))

    def _mark(self, group: Group) -> Iterator[Match]:
        for negated, option, values in group.options:
            if option != "--mark":
                raise NotModelled
            value, _, mask = values[0].partition("/")
            kind: Literal["mark", "connmark"] = "mark" if group.name == "mark" else "connmark"
            yield replace(mark(kind, int(value, 0), int(mask, 0) if mask else 0xFFFFFFFF), negated=negated)

    def _field(self, group: Group) -> Iterator[Match]:
        """A module whose options each compare one field."""
        if not group.options:
            raise NotModelled
        for negated, option, values in group.options:
            if (group.name, option) not in _FIELDS:
                raise NotModelled
            name, sign = _FIELDS[group.name, option]
            yield Opaque(f"{name} {sign} {field_value(group.name, values[0])}", negated)

    def _index(self, group: Group) -> Iterator[Match]:
        """The security parameter index of IPsec's headers; all of them say no more than that the header is there."""
        number, name = _HEADERS[group.name]
        yield ProtocolIs(number)
        for negated, option, values in group.options:
            if option != f"--{group.name}spi":
                raise NotModelled
            value = field_value(group.name, values[0])
            if value != json.dumps({"range": [0, _LAST_NUMBER[group.name]]}):
                yield Opaque(f"{name} == {value}", negated)
            elif negated:
                yield AnyOf(())

    def _ecn(self, group: Group) -> Iterator[Match]:
        """Two TCP flags, and two bits of the IP header."""
        for negated, option, values in group.options:
            if option == "--ecn-ip-ect":
                yield Opaque(f'{"ip" if self.version == 4 else "ip6"} ecn == "{_ECT[int(values[0])]}"', negated)
            else:
                flag = {"--ecn-tcp-cwr": 0x80, "--ecn-tcp-ece": 0x40}[option]
                test = tcp_flags(flag, flag)
                yield from (ProtocolIs(6), replace(test, negated=negated != test.negated))

    def _each(self, group: Group) -> Iterator[Match]:
        """A module whose options all have to hold, each negated on its own."""
        if not group.options:
            raise NotModelled
        for negated, option, values in group.options:
            text = ",".join(sorted(_PACKET_TYPES.get(v, v) for v in values)) if group.name == "pkttype" else " ".join(values).lower()
            yield Opaque(f"packet type {text}" if group.name == "pkttype" else f"{group.name} {option} {text}".rstrip(), negated)


_READERS: Mapping[str, Callable[[_Modules, Group], Iterator[Match]]] = {
    **dict.fromkeys(("tcp", "udp", "sctp", "dccp", "udplite"), _Modules._port),
    **dict.fromkeys(("multiport", "mport", "mp"), _Modules._multiport),
    **dict.fromkeys(("icmp", "icmp6", "icmpv6", "ipv6-icmp"), _Modules._icmp),
    **dict.fromkeys(("state", "conntrack"), _Modules._state),
    **dict.fromkeys(("mark", "connmark"), _Modules._mark),
    **dict.fromkeys(("owner", "pkttype", "dscp", "tos", "realm", "devgroup", "cpu"), _Modules._each),
    **dict.fromkeys(("mac", "length", "helper", "ttl", "hl"), _Modules._field),
    **dict.fromkeys(("ah", "esp", "ipcomp"), _Modules._index),
    "ecn": _Modules._ecn,
    **{"iprange": _Modules._iprange, "set": _Modules._set, "addrtype": _Modules._addrtype, "limit": _Modules._limit},
}
