"""Who may open what on a host, whoever wrote its rules, and how two hosts differ in it: yes, no, or may.

Both hosts' rules become decision diagrams. For every stretch of ports the sources are read off them; whatever else a rule asks
(the interface, a source port, a test that nobody models) is tried both ways. Where every way gives the same, the answer is
certain. What is taken for granted of the packet is said in `usual`; members at run time are those of neither host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from fwcompiler.addresses import Addresses, Ranges, intersect, merged
from fwcompiler.ports import PROTOCOLS, WITH_PORTS, Ports, port_text
from fwcompiler.proof.access import LOOPBACK_ADDRESSES, OTHER_PROTOCOL, Access, AccessChange
from fwcompiler.proof.arrive import World, arrivals
from fwcompiler.proof.conditions import ordered, outs
from fwcompiler.proof.diagram import ACCEPT, ELSEWHERE, Diagrams
from fwcompiler.proof.fields import ECHO_REQUEST
from fwcompiler.proof.prove import ORDERS, deep_enough
from fwcompiler.proof.space import (
    DESTINATION,
    FIRST_ATOM,
    INTERFACE,
    NAMES,
    PORT,
    PROTOCOL,
    SOURCE,
    STATE,
    TYPE,
    Space,
    make_space,
)
from fwcompiler.ruleset import STATES, Ruleset

Change = Literal["gained", "lost"]
_OPEN = (ACCEPT, ELSEWHERE)
_NONE, _GAIN, _LOSS, _BOTH = range(4)
Sources = tuple[int, int, int, int]
"""Masks of sources: those for which some packet is open on neither host, on the second only, on the first only, on both."""


@dataclass(frozen=True, slots=True)
class Part:
    """Sources of one family that gain or lose one stretch of a protocol; certain, or depending on what rules ask beside."""

    change: Change
    protocol: str
    span: tuple[int, int]
    version: int
    sources: Ranges
    depends: tuple[str, ...] = ()


def compare_hosts(before: Ruleset, after: Ruleset, services: Sequence[tuple[str, Ports]], versions: Iterable[int] = (4, 6)) -> AccessChange:
    """What new connections gain and lose between two hosts' rules, for the families in ``versions``.

    ``services`` gives names to ports.

    Raises:
        StepsExceeded: the rules are beyond what can be decided.
    """
    names = ordered((*outs(before), *outs(after)))
    parts = [part for version in versions for part in _Compared(before, after, version, names).parts()]

    def lines(change: Change, *, sure: bool) -> tuple[Access, ...]:
        found = _accesses([p for p in parts if p.change == change and (not p.depends) == sure], services)
        return tuple(sorted(found, key=lambda a: a.service or ""))

    return AccessChange(lines("gained", sure=True), lines("lost", sure=True), lines("gained", sure=False), lines("lost", sure=False))


@dataclass
class _Compared:
    """Two hosts' diagrams for one family, in one space."""

    before: Ruleset
    after: Ruleset
    version: int
    names: Sequence[str]
    _memo: dict[tuple[int, int], Sources] = field(default_factory=dict)

    def __post_init__(self) -> None:
        world = World()
        programs = [arrivals(r, self.version, world, self.names) for r in (self.before, self.after)]
        self.space: Space = make_space(self.version, [c for p in programs for c in p.conditions()])
        atoms = range(FIRST_ATOM, FIRST_ATOM + len(self.space.atoms))
        self.diagrams = Diagrams({n: self.space.everything(n) for n in (*ORDERS[1], *atoms)})
        with deep_enough(self.space):
            self.roots = (programs[0].diagram(self.diagrams, self.space), programs[1].diagram(self.diagrams, self.space))
        lo = 1 << self.space.interfaces.index("lo")
        self.fixed = {
            INTERFACE: self.space.everything(INTERFACE) & ~lo,
            STATE: 1 << STATES.index("new"),
            DESTINATION: self._covering(DESTINATION, world.destinations(self.version)),
            **{FIRST_ATOM + i: 1 for name, i in self.space.atoms.items() if " is a member of " in name and ".dynamic.v" in name},
        }

    def _covering(self, number: int, ranges: Ranges) -> int:
        return sum(1 << i for i, own in enumerate(self.space.classes[number]) if intersect(merged(own), ranges))

    def parts(self) -> Iterator[Part]:
        """Everything that differs."""
        if self.roots[0] == self.roots[1]:
            return
        everyone = self.space.everything(SOURCE)
        with deep_enough(self.space):
            for protocol, spans, point in self._points():
                self._memo = {}
                masks = {self.diagrams.levels[n]: m for n, m in {**self.fixed, **point}.items()}
                neither, gain, loss, both = self._visit(*self.roots, masks)
                changes: tuple[tuple[Change, int, int], ...] = (("gained", gain, loss), ("lost", loss, gain))
                for change, mask, other in changes:
                    sure = mask & ~(neither | other | both) & everyone
                    yield from self._of(change, protocol, spans, sure, ())
                    unsure = mask & ~sure
                    if unsure:
                        yield from self._of(change, protocol, spans, unsure, self._depends(masks, unsure))

    def _of(self, change: Change, protocol: str, spans: Ranges, mask: int, depends: tuple[str, ...]) -> Iterator[Part]:
        if mask:
            sources = self.space.ranges(SOURCE, mask)
            yield from (Part(change, protocol, span, self.version, sources, depends) for span in spans)

    def _points(self) -> Iterator[tuple[str, Ranges, Mapping[int, int]]]:
        """What can be opened: classes of ports, echo requests, and every other protocol that a rule names."""
        for protocol in WITH_PORTS:
            number = self._class(PROTOCOL, PROTOCOLS[protocol])
            for i, ranges in enumerate(self.space.classes[PORT]):
                yield protocol, merged(ranges), {PROTOCOL: number, PORT: 1 << i}
        icmp = 1 if self.version == 4 else 58
        name = "icmp" if icmp == 1 else "icmpv6"
        yield f"{name}/echo-request", ((0, 0),), {PROTOCOL: self._class(PROTOCOL, icmp), TYPE: self._class(TYPE, ECHO_REQUEST[icmp])}
        known = {number: text for text, number in PROTOCOLS.items()}
        usual = {PROTOCOLS[p] for p in (*WITH_PORTS, "icmp", "icmpv6")}
        for i, ranges in enumerate(self.space.classes[PROTOCOL]):
            numbers = {n for low, high in ranges for n in range(low, high + 1)} - usual
            if OTHER_PROTOCOL in numbers:
                yield "other-protocols", ((0, 0),), {PROTOCOL: 1 << i}
            else:
                for each in sorted(numbers):
                    yield known.get(each, f"protocol-{each}"), ((0, 0),), {PROTOCOL: 1 << i}

    def _class(self, number: int, value: int) -> int:
        return self._covering(number, ((value, value),))

    def _visit(self, first: int, second: int, masks: Mapping[int, int]) -> Sources:
        """What is possible for every source."""
        if first < 0 and second < 0:
            every = self.space.everything(SOURCE)
            which = 2 * (first in _OPEN) + (second in _OPEN)
            return tuple(every if i == which else 0 for i in range(4))  # type: ignore[return-value]
        key = (first, second)
        if key not in self._memo:
            level = min(self.diagrams.level(n) for n in key)
            allowed = masks.get(level, self.diagrams.full[level])
            result = [0, 0, 0, 0]
            for mask, a, b in self.diagrams.pairs(first, second):
                if mask & allowed:
                    below = self._visit(a, b, masks)
                    within = mask if self.diagrams.fields[level] == SOURCE else -1
                    result = [had | (new & within) for had, new in zip(result, below, strict=True)]
            self._memo[key] = (result[0], result[1], result[2], result[3])
        return self._memo[key]

    def _depends(self, masks: Mapping[int, int], sources: int) -> tuple[str, ...]:
        """What decides for these sources: fields of which one value leads elsewhere than another."""
        found: set[int] = set()
        seen: set[tuple[int, int]] = set()
        queue = [(self.roots[0], self.roots[1])]
        while queue:
            key = queue.pop()
            if key in seen or max(key) < 0:
                continue
            seen.add(key)
            level = min(self.diagrams.level(n) for n in key)
            allowed = masks.get(level, self.diagrams.full[level])
            if self.diagrams.fields[level] == SOURCE:
                allowed &= sources
            below = [(a, b) for mask, a, b in self.diagrams.pairs(*key) if mask & allowed]
            ways = {tuple(mask & sources for mask in self._visit(a, b, masks)) for a, b in below}
            if len(ways) > 1 and self.diagrams.fields[level] != SOURCE:
                found.add(self.diagrams.fields[level])
            queue += below
        names = {FIRST_ATOM + i: name for name, i in self.space.atoms.items()}
        return tuple(names.get(number) or f"the {NAMES[number]}" for number in sorted(found)) or ("more than can be told",)


def _accesses(parts: Sequence[Part], services: Sequence[tuple[str, Ports]]) -> Iterator[Access]:
    """Parts of both families as lines of access: the longest stretches of ports with the same sources."""
    for protocol in dict.fromkeys(p.protocol for p in parts):
        own = [p for p in parts if p.protocol == protocol]
        named = [(name, ports) for name, ports in services if ports.protocol == protocol]
        borders = {end for p in own for end in (p.span[0], p.span[1] + 1)}
        borders |= {end for _, ports in named for low, high in ports.ranges for end in (low, high + 1)}
        joined: list[tuple[int, int, str | None, Addresses, tuple[str, ...]]] = []
        for low, after in pairwise(sorted(borders)):
            for depends in dict.fromkeys(p.depends for p in own):
                here = [p for p in own if p.depends == depends and p.span[0] <= low <= p.span[1]]
                who = Addresses.of(*([r for p in here if p.version == v for r in p.sources] for v in (4, 6))) - LOOPBACK_ADDRESSES
                if not who:
                    continue
                service = next((n for n, ports in named if not ports.ranges or any(a <= low <= b for a, b in ports.ranges)), None)
                last = next((i for i, j in enumerate(joined) if (j[1] + 1, *j[2:]) == (low, service, who, depends)), None)
                if last is None:
                    joined.append((low, after - 1, service, who, depends))
                else:
                    joined[last] = (joined[last][0], after - 1, service, who, depends)
        for low, high, service, who, depends in joined:
            yield Access(who, f"{protocol}/{port_text((low, high))}" if protocol in WITH_PORTS else protocol, service, depends)
