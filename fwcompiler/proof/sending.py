"""What a host may send, and how two rulesets differ in it.

A ruleset's output chains are turned round: destinations are looked up where `access` looks up sources, so that what it says of
who may come in is said here of where this host may send. Asked about are new connections, from a port that no rule names, and
from every port that rules name by itself. A ruleset without output chains lets everything out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from fwcompiler.addresses import Addresses
from fwcompiler.ports import PROTOCOLS, port_text
from fwcompiler.proof.access import (
    LOOPBACK_ADDRESSES,
    Access,
    Part,
    described,
    of_family,
    parts,
    points,
    where_they_differ,
)
from fwcompiler.proof.atoms import cut
from fwcompiler.proof.memberaccess import MemberAccess, members_apart
from fwcompiler.proof.program import Point, Program, sets_of
from fwcompiler.ruleset import Chain, Final, Goto, Hook, InRanges, InSet, Interface, Jump, Match, PortIn, Rule, Ruleset, Side

if TYPE_CHECKING:
    from fwcompiler.shapes import SendingShape

LABEL = "egress."
CLOSED = Ruleset((Chain("output", (), Hook("input")),))
"""Lets nothing out."""
IGMP = "protocol-2"
"""Every policy lets a host join multicast groups: that is not worth a line."""
_RAW = re.compile(r"(tcp|udp)-([0-9])")
_TURNED: dict[Side, Side] = {"source": "destination", "destination": "source"}
_Where = tuple[str, int, int, str]
"""Protocol, first and last port there, ports here as text."""


@dataclass(frozen=True, slots=True)
class Sending:
    """Where this host may send to, and through which entry: to one range of ports, or from a range of its own ports (`from_port`)."""

    addresses: Addresses
    to: str
    service: str | None
    from_port: str = ""

    def as_access(self) -> Access:
        """The same with the roles of the ends exchanged, for whoever describes addresses."""
        return Access(self.addresses, self.to, self.service)

    def as_json(self) -> SendingShape:
        """The shape in `diff --json` and others."""
        shape: SendingShape = {"at": self.as_access().sources(), "to": self.to, "service": self.service}
        if self.from_port:
            shape["from_port"] = self.from_port
        return shape


@dataclass(frozen=True, slots=True)
class SendingChange:
    """What a host may send now and could not before, and the other way round.

    `left`: what it may still send where everything was open before; `opened`: nothing is restricted any more.
    """

    gained: tuple[Sending, ...] = ()
    lost: tuple[Sending, ...] = ()
    left: tuple[Sending, ...] | None = None
    opened: bool = False
    members_gained: tuple[MemberAccess, ...] = ()
    members_lost: tuple[MemberAccess, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.gained or self.lost or self.members_gained or self.members_lost)


NO_CHANGE = SendingChange()


def compare_sending(before: Ruleset, after: Ruleset) -> SendingChange:
    """What a host may send after a change, and what it may not any more."""
    old, new = turned(before), turned(after)
    if old == new or (_is_open(old) and _is_open(new)):
        return NO_CHANGE
    gained, lost = _between(old, new)
    left = tuple(each for each in _between(CLOSED, new)[0] if each.to != IGMP) if _is_open(old) else None
    if _is_open(old) or _is_open(new):
        return SendingChange(gained, lost, left, _is_open(new))

    def between(first: Ruleset, second: Ruleset) -> tuple[list[Access], list[Access]]:
        more, fewer = _between(first, second)
        return list(map(_plain, more)), list(map(_plain, fewer))

    more, fewer = members_apart(old, new, between)
    return SendingChange(gained, lost, None, members_gained=more, members_lost=fewer)


def _plain(sending: Sending) -> Access:
    """For telling what members gain: ports of this host's are named with the protocol."""
    port = f" from port {sending.from_port}" if sending.from_port else ""
    return Access(sending.addresses, f"{sending.to}{port}", sending.service)


def turned(ruleset: Ruleset) -> Ruleset:
    """The output chains alone, as if they were an input's for packets that come from where ours go."""
    known = {c.name: c for c in ruleset.chains}
    reached = [c for c in ruleset.chains if c.hook and c.hook.name == "output"]
    for chain in reached:
        called = (known.get(r.verdict.chain) for r in chain.rules if isinstance(r.verdict, Goto | Jump))
        reached += dict.fromkeys(c for c in called if c is not None and c not in reached)
    chains = tuple(map(_turned, reached))
    named = {m.set for c in chains for r in c.rules for m in r.matches if isinstance(m, InSet)}
    return Ruleset(chains, tuple(s for s in ruleset.sets if s.name in named))


def _turned(chain: Chain) -> Chain:
    hook = replace(chain.hook, name="input") if chain.hook else None
    return Chain(chain.name, tuple(replace(r, matches=tuple(map(_turned_match, r.matches))) for r in chain.rules), hook)


def _turned_match(match: Match) -> Match:
    match match:
        case InSet() | InRanges():
            return replace(match, side=_TURNED[match.side])
        case Interface("out"):
            return replace(match, way="in")
        case _:
            return match


def _is_open(mirrored: Ruleset) -> bool:
    """True where no chain refuses anything."""
    refused = any(r.verdict in (Final.DROP, Final.REJECT) for c in mirrored.chains for r in c.rules)
    return not refused and not any(c.hook and c.hook.policy == "drop" for c in mirrored.chains)


def _between(old: Ruleset, new: Ruleset) -> tuple[tuple[Sending, ...], tuple[Sending, ...]]:
    old, new = where_they_differ(old, new)
    atoms = cut([*sets_of(old), *sets_of(new), (4, LOOPBACK_ADDRESSES.v4), (6, LOOPBACK_ADDRESSES.v6)])
    first, second = Program(old, atoms), Program(new, atoms)
    gained: list[Part] = []
    lost: list[Part] = []
    for where, point in _wheres(old, new):
        was, now = first.run(point), second.run(point)
        gained += parts(where, now, was)
        lost += parts(where, was, now)
    both = (tuple(map(_sending, described(list(of_family(each, atoms)), atoms))) for each in (gained, lost))
    more, fewer = both
    return more, fewer


def _sending(access: Access) -> Sending:
    """Loopback addresses go without saying: nothing leaves to them."""
    protocol = access.to.partition("/")[0] if access.at else access.to
    service = _RAW.sub(r"\1/\2", access.service.removeprefix(LABEL)) if access.service else None
    return Sending(access.addresses - LOOPBACK_ADDRESSES, protocol, None if service in ("egress", "trust") else service, access.at)


def _wheres(*rulesets: Ruleset) -> Iterator[tuple[_Where, Point]]:
    rules = [r for ruleset in rulesets for c in ruleset.chains for r in c.rules]
    own = sorted({(m.protocol, m.span) for r in rules for m in _own_ports(r)})
    free = _free([span for _, span in own])
    for protocol, low, high, point in points(*rulesets):
        yield (protocol, low, high, ""), replace(point, source_port=free)
    there = _free([m.span for r in rules for m in r.matches if isinstance(m, PortIn) and m.side == "destination"])
    for protocol in dict.fromkeys(name for name, _ in own):
        borders = sorted({edge for name, (low, high) in own for edge in (low, high + 1) if name == protocol})
        for low, above in pairwise(borders):
            if any(name == protocol and a <= low <= b for name, (a, b) in own):
                yield (protocol, 0, 0, port_text((low, above - 1))), Point(PROTOCOLS[protocol], there, source_port=low)


def _own_ports(rule: Rule) -> Iterator[PortIn]:
    """Ports of this host's that alone say which packets a rule is about."""
    ports = [m for m in rule.matches if isinstance(m, PortIn)]
    if all(m.side == "source" for m in ports):
        yield from ports


def _free(spans: Iterable[tuple[int, int]]) -> int:
    taken = list(spans)
    return next((p for p in range(40000, 65536) if not any(low <= p <= high for low, high in taken)), 65535)
