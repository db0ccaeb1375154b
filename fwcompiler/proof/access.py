"""Who may open what: the access that a ruleset grants to new connections, and how two rulesets differ in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from fwcompiler.addresses import EVERYONE, LOOPBACK, Addresses, Range, address_text, intersect, merged
from fwcompiler.contents import difference
from fwcompiler.ports import PROTOCOLS, WITH_PORTS, port_text
from fwcompiler.proof.atoms import Atoms, cut
from fwcompiler.proof.beyond import Beyond, direct_places
from fwcompiler.proof.fields import ECHO_REQUEST
from fwcompiler.proof.program import Outcome, Point, Program, sets_of
from fwcompiler.ruleset import BUILT_IN, InSet, PortIn, ProtocolIs, Ruleset

LOOPBACK_ADDRESSES = Addresses((LOOPBACK[4],), (LOOPBACK[6],))
SENDERS = EVERYONE - LOOPBACK_ADDRESSES
"""Every address that a packet can come from."""
OTHER_PROTOCOL = 253
"""Stands for every protocol that no rule names (RFC 3692 keeps the number for experiments)."""


@dataclass(frozen=True, slots=True)
class Access:
    """Sources that may open one range of ports of one protocol, through one service.

    `depends`: what else rules ask that decides whether they may; where there is nothing, it is certain. `at`: the address behind
    an edge that they reach; empty for the host itself. `direct`: by sending to that address, not to the edge's own.
    """

    addresses: Addresses
    to: str
    service: str | None
    depends: tuple[str, ...] = ()
    at: str = ""
    direct: bool = False

    @property
    def is_anywhere(self) -> bool:
        """True where the sources are truly every address that a packet can come from."""
        return self.addresses.includes(SENDERS)

    def sources(self) -> list[str]:
        """Prefixes and ranges, or `anywhere`."""
        return ["anywhere"] if self.is_anywhere else list(self.addresses.texts())


@dataclass(frozen=True, slots=True)
class AccessChange:
    """Access gained and lost on the way from one ruleset to another, and what may be gained or lost beside."""

    gained: tuple[Access, ...] = ()
    lost: tuple[Access, ...] = ()
    perhaps_gained: tuple[Access, ...] = ()
    perhaps_lost: tuple[Access, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.gained or self.lost or self.perhaps_gained or self.perhaps_lost)


def compare(before: Ruleset, after: Ruleset) -> AccessChange:
    """What new connections gain and lose. An empty ruleset grants nothing."""
    before, after = where_they_differ(before, after)
    atoms = cut([*sets_of(before), *sets_of(after)])
    old, new = Program(before, atoms), Program(after, atoms)
    behind, behind_now = Beyond(before, atoms), Beyond(after, atoms)
    past_nat = direct_places((before, behind), (after, behind_now))
    gained: list[Part] = []
    lost: list[Part] = []
    for protocol, low, high, point in points(before, after):
        was, now = _run(old, before, point, behind), _run(new, after, point, behind_now)
        gained += parts((protocol, low, high, ""), now, was)
        lost += parts((protocol, low, high, ""), was, now)
        for place in dict.fromkeys((*behind.places, *behind_now.places)):
            was, now = behind.outcome(point, place), behind_now.outcome(point, place)
            gained += parts((protocol, low, high, address_text(*place)), now, was)
            lost += parts((protocol, low, high, address_text(*place)), was, now)
        for direct in past_nat:
            where = (protocol, low, high, f"{direct[2]}{DIRECT}")
            was, now = behind.directly(point, direct), behind_now.directly(point, direct)
            had, has = (each.outcome(point, direct[:2]).accepts() for each in (behind, behind_now))
            gained += parts(where, _less(now, has & ~had), was)
            lost += parts(where, _less(was, had & ~has), now)
    found = (tuple(described(list(of_family(each, atoms)), atoms)) for each in (gained, lost))
    return AccessChange(*found)


def where_they_differ(before: Ruleset, after: Ruleset) -> tuple[Ruleset, Ruleset]:
    """Both with the sets cut down to addresses that some set treats otherwise than before.

    Only where the rules are the same: then whatever all sets treat as before fares as before. Sets of destinations, an edge's own
    addresses for one, stay as they are: sources are what is cut down.
    """
    if before.chains != after.chains:
        return before, after
    old, new = ({(s.name, s.version): s.ranges for s in ruleset.sets} for ruleset in (before, after))
    changed = {4: set[Range](), 6: set[Range]()}
    for key in {**old, **new}:
        was, now = old.get(key, ()), new.get(key, ())
        if was != now:
            for only in difference(was, now):
                changed[key[1]].update(only)
    within = {version: merged(ranges) for version, ranges in changed.items()}
    arriving = (r for c in before.chains if c.hook is None or c.hook.name != "output" for r in c.rules)
    kept = {m.set for r in arriving for m in r.matches if isinstance(m, InSet) and m.side == "destination"}

    def cut_down(ruleset: Ruleset) -> Ruleset:
        sets = (s if s.name in kept else replace(s, ranges=intersect(s.ranges, within[s.version])) for s in ruleset.sets)
        return replace(ruleset, sets=tuple(sets))

    return cut_down(before), cut_down(after)


Part = tuple[str, int, int, str, str, int]
"""Protocol, first and last port, address behind an edge, service, classes of sources."""
DIRECT = " directly"
"""Ends the address of a part that is about packets past NAT."""


def _less(outcome: Outcome, mask: int) -> Outcome:
    """An outcome without what is told already: gained or lost by the edge's address as well."""
    return Outcome({service: own & ~mask for service, own in outcome.accepted.items()})


def of_family(found: Iterable[Part], atoms: Atoms) -> Iterator[Part]:
    """ICMP is a protocol of IPv4, ICMPv6 one of IPv6: nobody opens one over the other."""
    for protocol, low, high, at, service, mask in found:
        version = {"icmp": 4, "icmpv6": 6}.get(protocol.partition("/")[0])
        mine = mask & atoms.family(version) if version else mask
        if mine:
            yield protocol, low, high, at, service, mine


def _run(program: Program, ruleset: Ruleset, point: Point, beyond: Beyond) -> Outcome:
    """What the host itself lets in; what an edge sends on does not come to it."""
    if not any(c.hook for c in ruleset.chains):
        return Outcome()
    outcome = program.run(point)
    away = 0
    for mask in beyond.sent(point).values():
        away |= mask
    return Outcome({service: mask & ~away for service, mask in outcome.accepted.items()}, outcome.dropped, outcome.uncertain)


def parts(where: tuple[str, int, int, str], has: Outcome, other: Outcome) -> Iterator[Part]:
    """What one outcome lets in and another does not, by service."""
    other_mask = other.accepts()
    for service, mask in sorted(has.accepted.items()):
        if mask & ~other_mask:
            yield *where, service, mask & ~other_mask


def points(*rulesets: Ruleset) -> Iterator[tuple[str, int, int, Point]]:
    """One point for every stretch of ports between the borders of all rules, and one for each other protocol."""
    numbers = {m.number for rs in rulesets for c in rs.chains for r in c.rules for m in r.matches if isinstance(m, ProtocolIs)}
    for protocol in WITH_PORTS:
        for low, high in _stretches(rulesets, protocol):
            yield protocol, low, high, Point(PROTOCOLS[protocol], low)
    for name in ("icmp", "icmpv6"):
        number = PROTOCOLS[name]
        yield f"{name}/echo-request", 0, 0, Point(number, icmp_type=ECHO_REQUEST[number])
    names = {number: name for name, number in PROTOCOLS.items()}
    for number in sorted(numbers - {PROTOCOLS[p] for p in ("tcp", "udp", "icmp", "icmpv6")}):
        yield names.get(number, f"protocol-{number}"), 0, 0, Point(number)
    if OTHER_PROTOCOL not in numbers:
        yield "other-protocols", 0, 0, Point(OTHER_PROTOCOL)


def _stretches(rulesets: Iterable[Ruleset], protocol: str) -> Iterator[tuple[int, int]]:
    borders = {0, 65536}
    for ruleset in rulesets:
        for chain in ruleset.chains:
            for rule in chain.rules:
                for m in rule.matches:
                    if isinstance(m, PortIn) and m.protocol == protocol and m.side == "destination":
                        borders |= {m.span[0], m.span[1] + 1}
    ordered = sorted(borders)
    yield from ((a, b - 1) for a, b in pairwise(ordered))


def described(found: list[Part], atoms: Atoms) -> Iterator[Access]:
    """Neighbouring stretches with the same sources, service and place are one range."""
    joined: list[Part] = []
    for part in sorted(found, key=lambda p: (p[4], p[0], p[3], p[5], p[1])):
        protocol, low, high, *rest = part
        last = joined[-1] if joined else None
        if last and (last[0], *last[3:]) == (protocol, *rest) and last[2] + 1 == low:
            joined[-1] = (last[0], last[1], high, last[3], last[4], last[5])
        else:
            joined.append(part)
    cache: dict[int, Addresses] = {}
    for protocol, low, high, at, service, mask in sorted(joined, key=lambda p: (p[4], p[0], p[1], p[3], p[5])):
        if mask not in cache:
            cache[mask] = atoms.addresses(mask)
        to = f"{protocol}/{port_text((low, high))}" if protocol in WITH_PORTS else protocol
        name = None if service in BUILT_IN else service or None
        yield Access(cache[mask], to, name, at=at.removesuffix(DIRECT), direct=at.endswith(DIRECT))
