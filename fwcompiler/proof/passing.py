"""Proves that the rules of an edge mean what its policy says, for all packets: who reaches whom, at which address, from which port.

Both sides, the policy's three steps (`proof.edge`) and the base chains that a kernel lists, are followed from a packet's arrival
to its departure: prerouting NAT, then the forward hook about the rewritten packet, then postrouting NAT. A diagram ends in
accept, drop, or an accept with what was rewritten on the way. NAT sees the first packet of a connection; later ones are
asked about as the forward hook sees them, with the destination they really go to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fwcompiler.addresses import Ranges, intersect, range_text
from fwcompiler.ports import PROTOCOLS, port_text
from fwcompiler.proof.compose import from_clauses, rewritten_side
from fwcompiler.proof.conditions import Conditions, Place, ordered, outs
from fwcompiler.proof.describe import CounterExample, assumed, box_text, example
from fwcompiler.proof.diagram import ACCEPT, DROP, RETURN, VERDICTS, Diagrams
from fwcompiler.proof.edge import Departure, deliveries, departures, passage
from fwcompiler.proof.host import FIRST_TRANSLATION, THROUGH, WAYS, HostProgram, Line, Masks, Stage, place_in, seen_text, stages
from fwcompiler.proof.meaning import clauses
from fwcompiler.proof.prove import FAMILIES, Difference, differ, same
from fwcompiler.proof.rewrite import assign, reachable, relabel
from fwcompiler.proof.space import DESTINATION, FIRST_ATOM, INTERFACE, PORT, PROTOCOL, SOURCE, SOURCE_PORT, STATE, Condition, Space
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import Interface, Match, Rewritten, Ruleset, Translate, masqueraded, sent_on

FIRST_END = -10_000
_UNSEEN = frozenset(seen_text(hook) for hook in ("prerouting", "postrouting", "input"))

Change = tuple[Ranges, tuple[int, int] | None] | None
"""New addresses and ports; None: as they were."""


@dataclass
class Ends:
    """Numbers for an accept by what was rewritten before it: the destination, the source. Shared by what is compared."""

    numbers: dict[tuple[Change, Change], int] = field(default_factory=dict)

    def number(self, destination: Change, source: Change) -> int:
        """The terminal of such an accept."""
        if destination is None and source is None:
            return ACCEPT
        return self.numbers.setdefault((destination, source), FIRST_END - len(self.numbers))

    def changes(self, terminal: int) -> tuple[Change, Change] | None:
        """What a terminal says was rewritten; None for one that is no accept."""
        if terminal == ACCEPT:
            return None, None
        return next((key for key, number in self.numbers.items() if number == terminal), None)

    def text(self, terminal: int) -> str:
        """`reaches 10.20.0.11, under the edge's address and its own port`, `dropped`."""
        changes = self.changes(terminal)
        if changes is None:
            return {"drop": "dropped", "reject": "rejected"}.get(VERDICTS.get(terminal, ""), "one or the other")
        destination, source = changes
        words = ["sent on to " + _change_text(destination) if destination else "passes as it is addressed"]
        if source:
            words.append(f"under the edge's address and {_port_words(source)}")
        return ", ".join(words)


def _change_text(change: Change) -> str:
    assert change is not None
    ranges, ports = change
    to = " or ".join(range_text(4, r) for r in ranges) or "this host"
    return f"{to} port {port_text(ports)}" if ports else to


def _port_words(change: Change) -> str:
    assert change is not None
    return f"a port of {port_text(change[1])}" if change[1] else "its own port"


@dataclass(frozen=True, slots=True)
class Passing(HostProgram):
    """A way through or into an edge. `inside`: to the edge itself, where a new destination ends the way."""

    ends: Ends = field(default_factory=Ends)
    inside: bool = False

    def conditions(self) -> Iterator[Condition]:
        """Every condition, for making the space."""
        for stage in self.stages:
            yield from stage.conditions()
        yield Condition(SOURCE, atom=rewritten_side("destination"))

    def _masks(self, space: Space) -> Masks:
        """NAT sees first packets here, so no connection was rewritten before."""
        return place_in(space, lambda atom: False if atom in _UNSEEN else None)

    def _unwritten(self, diagrams: Diagrams, space: Space, root: int) -> int:
        """What was not rewritten on the way is no rewritten one."""
        for side in ("destination", "source"):
            number = space.atoms.get(rewritten_side(side))
            root = root if number is None else assign(diagrams, root, FIRST_ATOM + number, 1)
        return root

    def _translated(self, number: int, translation: Translate, rests: Sequence[int], diagrams: Diagrams, space: Space) -> int:
        change = (translation.ranges, translation.ports)
        if translation.side == "destination" and self.inside:
            return self.ends.number(change, None)
        rest = rests[self._behind_nat(number) - number - 1]
        if translation.side == "destination":
            if translation.ports:
                rest = assign(diagrams, rest, PORT, _covering(space, PORT, (translation.ports,)))
            rest = assign(diagrams, rest, DESTINATION, _covering(space, DESTINATION, translation.ranges))
            rest = assign(diagrams, rest, FIRST_ATOM + space.atoms[rewritten_side("destination")], 2)
        terminals, _ = reachable(diagrams, rest)
        moved: dict[int, int] = {}
        for terminal in terminals:
            before = self.ends.changes(terminal)
            if before is not None:
                moved[terminal] = (
                    self.ends.number(change, before[1]) if translation.side == "destination" else self.ends.number(before[0], change)
                )
        return relabel(diagrams, rest, moved)


def _covering(space: Space, number: int, ranges: Ranges) -> int:
    return sum(1 << i for i, own in enumerate(space.classes[number]) if intersect(tuple(sorted(own)), ranges))


class _Alone(Passing):
    """One base chain by itself: of what comes to it, anything may have been rewritten before."""

    def _unwritten(self, diagrams: Diagrams, space: Space, root: int) -> int:  # noqa: ARG002 - as in the whole way
        return root


def same_steps(wanted: Passing, found: Passing) -> bool:
    """True where two ways have the same base chains, one by one. Then they are the same as a whole; the contrary does not follow.

    What is done to a packet depends on where it is sent and on who sent it, so a whole way through an edge grows with the square of
    the hosts behind it. Its steps grow with their number.

    Raises:
        StepsExceeded: a ruleset is beyond what can be decided.
    """
    kinds = [[(s.hook, s.nat, s.untracks) for s in way.stages] for way in (wanted, found)]
    if kinds[0] != kinds[1] or any(untracks for _, _, untracks in kinds[0]):
        return False
    steps = ([_Alone({}, (), way.version, (s,), way.ends, way.inside) for s in way.stages] for way in (wanted, found))
    return all(same(first, second, wanted.version) for first, second in zip(*steps, strict=True))


def listed(ruleset: Ruleset, version: int, names: Sequence[str], ends: Ends, *, inside: bool) -> Passing:
    """What a kernel's listing does."""
    way = WAYS["input"] if inside else THROUGH
    return Passing({}, (), version, stages(ruleset, version, way, names), ends, inside)


def meant(policy: Resolved, version: int, names: Sequence[str], ends: Ends, *, inside: bool) -> Passing:
    """What the policy says."""
    writer = _Meaning(policy, version, names)
    way = (writer.arriving(), writer.own()) if inside else (writer.arriving(), writer.passing(), writer.leaving())
    return Passing({}, (), version, way, ends, inside)


class _Meaning:
    """Writes the policy's steps as stages, for packets of one family."""

    def __init__(self, policy: Resolved, version: int, names: Sequence[str]) -> None:
        assert policy.edge is not None
        self.policy, self.edge, self.version = policy, policy.edge, version
        self._conditions = Conditions({}, version, names)

    def arriving(self) -> Stage:
        lines: list[Line] = []
        translations: dict[int, Translate] = {}
        for delivery in deliveries(self.policy, self.edge) if self.version == 4 else ():
            terminal = FIRST_TRANSLATION - len(translations)
            translations[terminal] = sent_on(delivery.address)
            came = Condition(INTERFACE, frozenset((self.edge.wan, self.edge.lan)))
            rules = from_clauses([delivery.clause], 4).chains["meaning"]
            lines += [Line((came, *rule.conditions), terminal) for rule in rules]
        return Stage("arriving", ACCEPT, "prerouting", True, {"arriving": lines}, translations)

    def own(self) -> Stage:
        rules = from_clauses(clauses(self.policy), self.version).chains["meaning"]
        return Stage("own", DROP, "input", False, {"own": [Line(r.conditions, r.verdict) for r in rules]})

    def passing(self) -> Stage:
        chains: dict[str, list[Line]] = {"passing": []}
        for came in (self.edge.wan, self.edge.lan):
            for leaves in (self.edge.wan, self.edge.lan):
                rules = from_clauses(passage(self.policy, self.edge, came, leaves), self.version).chains["meaning"]
                name = f"{came} to {leaves}"
                chains[name] = [Line(r.conditions, r.verdict) for r in rules]
                for conditions in self._matching(Interface("in", came), Interface("out", leaves)):
                    chains["passing"].append(Line(conditions, RETURN, name, True))
        return Stage("passing", ACCEPT, "forward", False, chains)

    def leaving(self) -> Stage:
        lines: list[Line] = []
        translations: dict[int, Translate] = {}
        for departure in departures(self.edge) if self.version == 4 else ():
            terminal = FIRST_TRANSLATION - len(translations)
            translations[terminal] = masqueraded(departure.ports)
            lines += [Line(c, terminal) for c in self._departing(departure)]
        return Stage("leaving", ACCEPT, "postrouting", True, {"leaving": [*_first_packets(), *lines]}, translations)

    def _departing(self, departure: Departure) -> Iterator[tuple[Condition, ...]]:
        asked = [Condition(SOURCE, departure.source.v4)]
        if departure.source_ports:
            udp = PROTOCOLS["udp"]
            asked += [Condition(PROTOCOL, ((udp, udp),)), Condition(SOURCE_PORT, (departure.source_ports,))]
        matches: list[Match] = [Interface("out", departure.out), *([Rewritten("destination")] if departure.returned else [])]
        for conditions in self._matching(*matches):
            yield (*conditions, *asked)

    def _matching(self, *matches: Match) -> Iterator[tuple[Condition, ...]]:
        """Interfaces as alternatives of conditions, the same way as in listings."""
        return (tuple(each) for each in self._conditions.rule(matches, Place("forward", forwarded=True)))


def _first_packets() -> Iterator[Line]:
    """Only the first packet of a connection is looked at; the others are treated as it was."""
    yield Line((Condition(STATE, frozenset(("established", "related", "invalid", "untracked"))),), ACCEPT)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a listing and the policy part on one way."""

    inside: bool
    difference: Difference
    ends: Ends


def prove_edge(policy: Resolved, ruleset: Ruleset) -> tuple[Divergence, ...]:
    """Where an edge's listing and its policy part, by family and way; none: they mean the same for all packets.

    Raises:
        StepsExceeded: the ruleset is beyond what can be decided.
    """
    return tuple(_divergences(policy, ruleset))


def _divergences(policy: Resolved, ruleset: Ruleset) -> Iterator[Divergence]:
    assert policy.edge is not None
    names = ordered((*outs(ruleset), policy.edge.wan, policy.edge.lan))
    for version in FAMILIES:
        for inside in (True, False):
            ends = Ends()
            wanted, found = (
                meant(policy, version, names, ends, inside=inside),
                listed(ruleset, version, names, ends, inside=inside),
            )
            difference = None if same_steps(wanted, found) else differ(wanted, found, version)
            if difference is not None:
                yield Divergence(inside, difference, ends)


def edge_examples(divergences: Iterable[Divergence], policy: Resolved) -> Iterator[CounterExample]:
    """One for every box: the packets, and what becomes of them on either side."""
    for each in divergences:
        way = "for the edge itself" if each.inside else "on their way"
        yield from divided(each.difference, each.ends, policy, way)


def divided(difference: Difference, ends: Ends, policy: Resolved, way: str) -> Iterator[CounterExample]:
    """One for every box of a difference between programs that share `ends`; `way` says which packets all of them are about."""
    space = difference.space
    names = {name: group.addresses.family(space.version) for name, group in policy.groups.items()}
    for box in difference.boxes:
        packets = f"{way}: {box_text(space, box, names)}"
        yield CounterExample(packets, example(space, box), ends.text(box.first), ends.text(box.second), assumed(space, box))
