"""What becomes of packets that are sent to this host: received, refused, or sent on to where a rule says (NAT).

Like `host`, but a new destination in prerouting leads to where it really is: an address of the host, or elsewhere, through
the forward hook. Where nobody says which addresses the host has (a saved listing), that is an atom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fwcompiler.addresses import LAST, LOOPBACK, MULTICAST, Ranges, intersect, merged, subtract
from fwcompiler.proof.conditions import fits, outs
from fwcompiler.proof.diagram import ACCEPT, DROP, ELSEWHERE, REJECT, Diagrams
from fwcompiler.proof.host import WAYS, HostProgram, Masks, Stage, known_rewritten, place_in, rewrite, stages
from fwcompiler.proof.rewrite import choice, relabel
from fwcompiler.proof.space import DESTINATION, INTERFACE, SOURCE, Condition, Space
from fwcompiler.proof.usual import usual
from fwcompiler.ruleset import Ruleset, Translate, is_ours

OUT = "out interface is "
REWRITTEN = "the connection was rewritten at "


@dataclass(frozen=True)
class World:
    """What a host's rules do not say: its own addresses by family, and through which interface it sends to an address.

    A family without `own` addresses is one of which nobody knows them. `out` returns the empty string where it does not know.
    """

    own: Mapping[int, Ranges] = field(default_factory=dict)
    out: Callable[[int, int], str] = field(default=lambda _version, _address: "")

    def own_of(self, version: int) -> Ranges:
        """The host's addresses, those of the loopback interface included; empty where nobody knows."""
        own = self.own.get(version, ())
        return own if subtract(own, (LOOPBACK[version],)) else ()

    def destinations(self, version: int) -> Ranges:
        """Addresses at which the host may be reached by a packet that is meant for it alone."""
        own = self.own_of(version)
        if own:
            return subtract(own, (LOOPBACK[version],))
        broadcast = ((0, 0), (LAST[4], LAST[4])) if version == 4 else ((0, 0),)
        return subtract(((0, LAST[version]),), merged((LOOPBACK[version], MULTICAST[version], *broadcast)))

    def usual(self, version: int) -> tuple[Condition, ...]:
        """What holds for packets that somebody else sends to the host alone."""
        loopback = (LOOPBACK[version],)
        return (
            Condition(INTERFACE, frozenset(("lo",)), negated=True),
            Condition(DESTINATION, self.destinations(version)),
            Condition(SOURCE, loopback, negated=True),
        )

    def out_to(self, version: int, ranges: Ranges) -> str:
        """The interface towards the one address there is; empty for several."""
        return self.out(version, ranges[0][0]) if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else ""


def told(atom: str) -> Condition | bool | None:
    """What is known of tests that no field shows: the usual packet; a connection's later packets go where its first one went."""
    return True if atom.startswith(REWRITTEN) else usual(atom)


@dataclass(frozen=True, slots=True)
class Arrivals(HostProgram):
    """The way of packets that are sent to the host. `through`: the stages of those that are sent on."""

    through: tuple[Stage, ...] = ()
    world: World = World()

    def conditions(self) -> Iterator[Condition]:
        """Every condition, for making the space."""
        for stage in (*self.stages, *self.through):
            yield from stage.conditions()
        yield from self.world.usual(self.version)
        for stage in self.stages:
            for each in stage.translations.values():
                yield Condition(SOURCE, atom=_own_text(each))

    def diagram(self, diagrams: Diagrams, space: Space) -> int:
        """What becomes of every packet; whether one that is not let in hears of it makes no difference here."""
        return relabel(diagrams, HostProgram.diagram(self, diagrams, space), {REJECT: DROP})

    def _masks(self, space: Space) -> Masks:
        return place_in(space, told)

    def _translated(self, number: int, translation: Translate, rests: Sequence[int], diagrams: Diagrams, space: Space) -> int:
        stage = self.stages[number]
        rest = known_rewritten(diagrams, space, translation, rests[self._behind_nat(number) - number - 1])
        inside = rewrite(diagrams, space, translation, rest, stage.hook)
        if stage.hook != "prerouting" or translation.side == "source":
            return inside
        if translation.ports and not is_ours(translation):
            inside = relabel(diagrams, inside, {ACCEPT: ELSEWHERE})
        own = self.world.own_of(self.version)
        if translation.here or not translation.ranges or (own and not subtract(translation.ranges, own)):
            return inside
        through = self._through(number, translation, diagrams, space)
        if own and not intersect(translation.ranges, own):
            return through
        local = space.place(Condition(SOURCE, atom=_own_text(translation)))[0]
        return choice(diagrams, local, 2, inside, through)

    def _through(self, number: int, translation: Translate, diagrams: Diagrams, space: Space) -> int:
        """What happens to a packet that got a destination elsewhere: the rest of prerouting, then the forward hook."""
        last = self._behind_nat(number)
        behind = tuple(s for s in self.through if s.hook != "prerouting" or s.base in {each.base for each in self.stages[last:]})
        program = _Through({}, (), self.version, behind, self.world.out_to(self.version, translation.ranges))
        after = rewrite(diagrams, space, translation, program.diagram(diagrams, space), "prerouting")
        return relabel(diagrams, after, {ACCEPT: ELSEWHERE})


@dataclass(frozen=True, slots=True)
class _Through(HostProgram):
    """The way of packets that are sent on through an interface; the empty string: nobody knows which."""

    out: str = ""

    def _masks(self, space: Space) -> Masks:
        return place_in(space, self._told)

    def _told(self, atom: str) -> Condition | bool | None:
        if atom.startswith(OUT):
            return fits(atom.removeprefix(OUT), self.out) if self.out else None
        return None if atom.startswith("destination type ") else told(atom)


def _own_text(translation: Translate) -> str:
    return f"the new destination is the host's own, after {translation.text}"


def arrivals(ruleset: Ruleset, version: int, world: World, names: Sequence[str] | None = None) -> Arrivals:
    """The way of packets of one family that are sent to the host.

    Two programs that are compared need the same `names` of output interfaces: `conditions.ordered` of both rulesets'.
    """
    known = outs(ruleset) if names is None else names
    ways = (stages(ruleset, version, WAYS[hook], known) for hook in ("input", "forward"))
    inside, through = ways
    return Arrivals({}, (), version, inside, through, world)
