"""What the product says about one packet, three times over: the policy's meaning, the listing followed rule by rule, and the
diagram in which the prover compares listings."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from fwcompiler.addresses import LAST, MULTICAST, Range, covers
from fwcompiler.foreign import LOCAL
from fwcompiler.proof.conditions import out_text
from fwcompiler.proof.diagram import VERDICTS, Diagrams
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.host import HostProgram, of_host
from fwcompiler.proof.meaning import Clause
from fwcompiler.proof.prove import ORDERS
from fwcompiler.proof.space import (
    DESTINATION,
    FIRST_ATOM,
    INTERFACE,
    OTHER_INTERFACE,
    PORT,
    PROTOCOL,
    SOURCE,
    SOURCE_PORT,
    STATE,
    TYPE,
    Space,
    make_space,
)
from fwcompiler.ruleset import STATES, Ruleset

NUMBERS: Mapping[int, Callable[[Packet], int]] = {
    PROTOCOL: lambda p: p.protocol,
    PORT: lambda p: p.port,
    SOURCE_PORT: lambda p: p.source_port,
    TYPE: lambda p: p.icmp_type,
    SOURCE: lambda p: p.source,
    DESTINATION: lambda p: p.destination or 0,
}


def meant(clauses: Sequence[Clause], packet: Packet) -> Clause:
    """The first clause of the meaning that holds."""
    return next(c for c in clauses if c.holds(packet))


def is_for_several(packet: Packet) -> bool:
    """A multicast or broadcast packet: the host takes it, but no address of its own is meant (`fib daddr type`)."""
    destination = packet.destination or 0
    return covers((MULTICAST[packet.version],), destination) or (packet.version == 4 and destination == LAST[4])


class Diagram:
    """The prover's diagram of a ruleset for one family, walked down for single packets."""

    def __init__(self, ruleset: Ruleset, version: int, program: HostProgram | None = None) -> None:
        program = program or of_host(ruleset, version)
        self._out = ""
        self._space = make_space(version, program.conditions())
        fields = (*ORDERS[0], *range(FIRST_ATOM, FIRST_ATOM + len(self._space.atoms)))
        self._diagrams = Diagrams({number: self._space.everything(number) for number in fields})
        self._root = program.diagram(self._diagrams, self._space)
        self._borders = {number: _borders(self._space, number) for number in NUMBERS}
        self._atoms = {FIRST_ATOM + i: text for text, i in self._space.atoms.items()}
        self._members = {
            f"{side} is a member of {s.name}": {a for a, _ in s.members}
            for s in ruleset.sets
            if s.dynamic
            for side in ("source", "destination")
        }

    def verdict(self, packet: Packet) -> str:
        """Where the packet ends; limits count as not exhausted, members are those that were read."""
        return VERDICTS[self.terminal(packet)]

    def terminal(self, packet: Packet, out: str = "") -> int:
        """The diagram's number of that end, for a packet that leaves by an interface."""
        self._out, node = out, self._root
        while node >= 0:
            level, edges = self._diagrams.nodes[node]
            bit = 1 << self._class(self._diagrams.fields[level], packet)
            node = next(child for mask, child in edges if mask & bit)
        return node

    def _class(self, number: int, packet: Packet) -> int:
        if number >= FIRST_ATOM:
            return int(self._atom(self._atoms[number], packet))
        if number == STATE:
            return STATES.index(packet.state)
        if number == INTERFACE:
            known = (*self._space.interfaces, OTHER_INTERFACE)
            return known.index(packet.interface if packet.interface in known else OTHER_INTERFACE)
        starts, classes = self._borders[number]
        return classes[bisect_right(starts, NUMBERS[number](packet)) - 1]

    def _atom(self, text: str, packet: Packet) -> bool:
        text = text.split(" (", maxsplit=1)[0]
        if text == LOCAL:
            return not is_for_several(packet)
        if text.startswith("out interface is "):
            return text == out_text(self._out)
        if text.startswith("limit "):
            return True
        if text.startswith("the source exceeds "):
            return False
        return (packet.destination if text.startswith("destination") else packet.source) in self._members[text]


def _borders(space: Space, number: int) -> tuple[list[int], list[int]]:
    """Where a field's values change their class, and to which."""
    spans: list[tuple[Range, int]] = sorted((span, i) for i, ranges in enumerate(space.classes[number]) for span in ranges)
    return [low for (low, _), _ in spans], [i for _, i in spans]
