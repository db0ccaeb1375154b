"""Who may open what: the access that a ruleset grants to new connections, and how two rulesets differ in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from fwcompiler.addresses import EVERYONE, LOOPBACK, Addresses
from fwcompiler.ports import PROTOCOLS, WITH_PORTS, port_text
from fwcompiler.proof.atoms import Atoms, cut
from fwcompiler.proof.fields import ECHO_REQUEST
from fwcompiler.proof.program import Outcome, Point, Program, sets_of
from fwcompiler.ruleset import BUILT_IN, PortIn, ProtocolIs, Ruleset

LOOPBACK_ADDRESSES = Addresses((LOOPBACK[4],), (LOOPBACK[6],))
OTHER_PROTOCOL = 253
"""Stands for every protocol that no rule names (RFC 3692 keeps the number for experiments)."""


@dataclass(frozen=True, slots=True)
class Access:
    """Sources that may open one range of ports of one protocol, through one service.

    `depends`: what else rules ask that decides whether they may; where there is nothing, it is certain.
    """

    addresses: Addresses
    to: str
    service: str | None
    depends: tuple[str, ...] = ()

    def sources(self) -> list[str]:
        """Prefixes and ranges, or `anywhere` where it is truly every address that a packet can come from."""
        return ["anywhere"] if self.addresses | LOOPBACK_ADDRESSES == EVERYONE else list(self.addresses.texts())


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
    atoms = cut([*sets_of(before), *sets_of(after)])
    old, new = Program(before, atoms), Program(after, atoms)
    gained: list[tuple[str, int, int, str, int]] = []
    lost: list[tuple[str, int, int, str, int]] = []
    for protocol, low, high, point in _points(before, after):
        was, now = _run(old, before, point), _run(new, after, point)
        gained += _parts(protocol, low, high, now, was)
        lost += _parts(protocol, low, high, was, now)
    return AccessChange(tuple(_describe(gained, atoms)), tuple(_describe(lost, atoms)))


def _run(program: Program, ruleset: Ruleset, point: Point) -> Outcome:
    return program.run(point) if any(c.hook for c in ruleset.chains) else Outcome()


def _parts(protocol: str, low: int, high: int, has: Outcome, other: Outcome) -> Iterator[tuple[str, int, int, str, int]]:
    other_mask = other.accepts()
    for service, mask in sorted(has.accepted.items()):
        if mask & ~other_mask:
            yield protocol, low, high, service, mask & ~other_mask


def _points(*rulesets: Ruleset) -> Iterator[tuple[str, int, int, Point]]:
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


def _describe(parts: list[tuple[str, int, int, str, int]], atoms: Atoms) -> Iterator[Access]:
    """Neighbouring stretches with the same sources and service are one range."""
    joined: list[tuple[str, int, int, str, int]] = []
    for part in sorted(parts, key=lambda p: (p[3], p[0], p[4], p[1])):
        last = joined[-1] if joined else None
        if last and (last[0], last[3], last[4]) == (part[0], part[3], part[4]) and last[2] + 1 == part[1]:
            joined[-1] = (last[0], last[1], part[2], last[3], last[4])
        else:
            joined.append(part)
    cache: dict[int, Addresses] = {}
    for protocol, low, high, service, mask in sorted(joined, key=lambda p: (p[3], p[0], p[1], p[4])):
        if mask not in cache:
            cache[mask] = atoms.addresses(mask)
        to = f"{protocol}/{port_text((low, high))}" if protocol in WITH_PORTS else protocol
        yield Access(cache[mask], to, None if service in BUILT_IN else service or None)
