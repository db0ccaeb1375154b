"""What becomes of packets that this host sends, whoever wrote the rules on their way: output, then postrouting.

Like `arrive` for the other way. The packet is a usual one: it leaves for another host, through no loopback interface, from an
address of this one. A new destination that somebody gives it is the end `redirect`: it does not go where it was sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fwcompiler.addresses import LOOPBACK, merged
from fwcompiler.proof import arrive
from fwcompiler.proof.arrive import World
from fwcompiler.proof.diagram import ACCEPT, DROP, ELSEWHERE, REJECT, Diagrams
from fwcompiler.proof.host import HostProgram, Masks, Stage, for_another_host, place_in, stages
from fwcompiler.proof.rewrite import relabel
from fwcompiler.proof.space import DESTINATION, INTERFACE, SOURCE, Condition, Space
from fwcompiler.ruleset import HookName, Ruleset, Translate

WAY: Final[tuple[HookName, ...]] = ("output", "postrouting")
_KNOWN: Mapping[str, bool | None] = {"source type local": True, "destination type unicast": None}


def told(atom: str) -> Condition | bool | None:
    """What is known of tests that no field shows, for a usual packet that this host sends."""
    return _KNOWN[atom] if atom in _KNOWN else arrive.told(atom)


def usual_leaving(world: World, version: int) -> tuple[Condition, ...]:
    """What holds for packets that the host sends to somebody else."""
    return (
        Condition(INTERFACE, frozenset(("lo",)), negated=True),
        Condition(DESTINATION, merged((LOOPBACK[version], *world.own_of(version))), negated=True),
        Condition(SOURCE, world.destinations(version)),
    )


@dataclass(frozen=True, slots=True)
class Departures(HostProgram):
    """The way of packets that the host sends."""

    world: World = field(default_factory=World)

    def conditions(self) -> Iterator[Condition]:
        """Every condition, for making the space."""
        yield from HostProgram.conditions(self)
        yield from usual_leaving(self.world, self.version)

    def diagram(self, diagrams: Diagrams, space: Space) -> int:
        """What becomes of every packet; whether a program hears of one that may not leave makes no difference here."""
        return relabel(diagrams, HostProgram.diagram(self, diagrams, space), {REJECT: DROP})

    def _masks(self, space: Space) -> Masks:
        return place_in(space, told)

    def _translated(self, number: int, translation: Translate, rests: Sequence[int], diagrams: Diagrams, space: Space) -> int:
        after = HostProgram._translated(self, number, translation, rests, diagrams, space)
        return after if translation.side == "source" else relabel(diagrams, after, {ACCEPT: ELSEWHERE})


def departures(ruleset: Ruleset, version: int, world: World) -> Departures:
    """The way of packets of one family that the host sends. Behind a new destination nobody knows whether that is the host's own."""
    found: list[Stage] = []
    moved = False
    for stage in stages(ruleset, version, WAY, ()):
        found.append(stage if moved else for_another_host(stage))
        moved = moved or any(each.side == "destination" for each in stage.translations.values())
    return Departures({}, (), version, tuple(found), world)
