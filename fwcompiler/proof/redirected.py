"""Proves a host whose plain HTTP goes to a responder on another port: who is redirected, and who reaches what in the end.

A policy's clauses speak of packets as they arrive, so a redirect changes nothing in them: what is open at port 80 is open, and
the responder's own port is not. Two comparisons show that a listing does the same, for all packets:

1. From arrival to verdict, with the port that a redirect gives: equal to the clauses.
2. From arrival to the redirect: new connections to the service's ports go to the responder, unless their source is in a group
   that stays in the clear; no others go anywhere.

Later packets of a connection go where its first one went. Whether that was redirected, perhaps by older rules, is left open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fwcompiler.addresses import EVERYONE, LOOPBACK, Addresses
from fwcompiler.foreign import LOCAL
from fwcompiler.proof.compose import from_clauses, rewritten_side
from fwcompiler.proof.conditions import outs
from fwcompiler.proof.describe import CounterExample, counter_examples
from fwcompiler.proof.diagram import ACCEPT, DROP, Diagrams
from fwcompiler.proof.host import WAYS, HostProgram, Line, Stage, seen_text, stages
from fwcompiler.proof.meaning import Clause, clauses
from fwcompiler.proof.passing import Ends, divided
from fwcompiler.proof.prove import FAMILIES, differ
from fwcompiler.proof.rewrite import assign, relabel
from fwcompiler.proof.space import FIRST_ATOM, SOURCE, Condition, Space
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import Ruleset, Translate

_OUTSIDE = EVERYONE - Addresses((LOOPBACK[4],), (LOOPBACK[6],))


def redirects(policy: Resolved) -> Iterator[tuple[Clause, int]]:
    """New connections for which the clause holds go to a port of this host."""
    for service in policy.services:
        plain = service.options.plain
        if service.options.responder is None:
            continue
        yield (
            Clause(
                "accept",
                f"{service.name} is answered by the responder",
                service.name,
                service.at,
                destination=_OUTSIDE,
                ports=service.ports,
                states=frozenset(("new",)),
                spared=tuple(name for name in plain if policy.groups[name].dynamic),
                spared_source=policy.addresses(plain),
            ),
            service.options.responder,
        )


@dataclass(frozen=True, slots=True)
class Redirecting(HostProgram):
    """The way to the input hook. Later packets are those of connections that the rules at hand redirect, or leave alone.

    With `ends`, an accepted packet ends in what was rewritten of it, and later packets are taken as never redirected.
    """

    ends: Ends | None = None

    def conditions(self) -> Iterator[Condition]:
        """Every condition, for making the space."""
        yield from HostProgram.conditions(self)
        yield Condition(SOURCE, atom=rewritten_side("destination"))

    def _unwritten(self, diagrams: Diagrams, space: Space, root: int) -> int:
        atoms = [rewritten_side("destination"), *([seen_text("prerouting")] if self.ends else [])]
        for number in (space.atoms[atom] for atom in atoms if atom in space.atoms):
            root = assign(diagrams, root, FIRST_ATOM + number, 1)
        return root

    def _translated(self, number: int, translation: Translate, rests: Sequence[int], diagrams: Diagrams, space: Space) -> int:
        after = HostProgram._translated(self, number, translation, rests, diagrams, space)
        return relabel(diagrams, after, {ACCEPT: self.ends.number((translation.ranges, translation.ports), None)}) if self.ends else after


def _meant(policy: Resolved, version: int, ends: Ends) -> Redirecting:
    """The second comparison's reference: accepted where the clauses say so, and redirected on the way where `redirects` says so."""
    lines: list[Line] = []
    moved = [
        (rule.conditions, ends.number(((), (port, port)), None))
        for clause, port in redirects(policy)
        for rule in from_clauses([clause], version).chains["meaning"]
    ]
    here = Condition(SOURCE, atom=LOCAL)
    for rule in from_clauses(clauses(policy), version).chains["meaning"]:
        if rule.verdict == ACCEPT:
            lines += [Line((*rule.conditions, *conditions, here), end) for conditions, end in moved]
        lines.append(Line(rule.conditions, rule.verdict))
    return Redirecting({}, (), version, (Stage("meant", DROP, "input", False, {"meant": lines}),), ends)


def redirect_examples(policy: Resolved, ruleset: Ruleset) -> Iterator[CounterExample]:
    """Packets that a listing treats otherwise than the policy says; none: proven equal for all packets.

    Raises:
        StepsExceeded: the ruleset is beyond what can be decided.
    """
    names = outs(ruleset)
    ways = {version: stages(ruleset, version, WAYS["input"], names) for version in FAMILIES}
    decided = (differ(from_clauses(clauses(policy), v), Redirecting({}, (), v, way), v) for v, way in ways.items())
    differing = tuple(d for d in decided if d is not None)
    yield from counter_examples(differing, policy, ruleset)
    for version, way in () if differing else ways.items():
        ends = Ends()
        difference = differ(_meant(policy, version, ends), Redirecting({}, (), version, way, ends), version)
        if difference is not None:
            yield from divided(difference, ends, policy, "on arrival")
