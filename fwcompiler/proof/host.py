"""What a host does with packets, whoever wrote its rules: every base chain on the way, and what rewrites packets there.

A packet on its way in meets prerouting, then input or forward; one on its way out meets output. The base chains run by
priority; a drop in one is final, an accept goes on to the next. Chains of kind nat run where NAT is (destinations at
-100, sources at 100), see the first packet of a connection only, and the first translation ends them. Behind a
translation the rest is asked about the rewritten packet; behind `Untrack` about an untracked one.

For later packets of a connection nobody knows whether the first was rewritten; that is an atom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fwcompiler.addresses import LAST, LOOPBACK, Ranges, intersect, subtract
from fwcompiler.foreign import LOCAL
from fwcompiler.proof.compose import Composed, Program, rewritten_side
from fwcompiler.proof.conditions import Conditions, Place, fits, outs
from fwcompiler.proof.diagram import ACCEPT, DROP, NO_CHAIN, REJECT, RETURN, Diagrams, Item, Rules
from fwcompiler.proof.rewrite import MAY, EndsBuilder, assign, choice, graft, graft_all, relabel
from fwcompiler.proof.space import DESTINATION, FIRST_ATOM, INTERFACE, PORT, SOURCE, SOURCE_PORT, STATE, Condition, Space
from fwcompiler.ruleset import (
    STATES,
    Chain,
    Final,
    Goto,
    Hook,
    HookName,
    Jump,
    Rule,
    Ruleset,
    SetDscp,
    Translate,
    Undecided,
    Unknown,
    Untrack,
)

WAYS: Mapping[str, tuple[HookName, ...]] = {
    "input": ("prerouting", "input"),
    "forward": ("prerouting", "forward"),
    "output": ("output",),
}
THROUGH: tuple[HookName, ...] = ("prerouting", "forward", "postrouting")
"""The whole way of a packet that is forwarded."""
UNTRACKED, FIRST_TRANSLATION = -10, -20
_GO_ON = -11
_NAT = {"prerouting": -100, "output": -100, "input": 100, "postrouting": 100}
_FINAL = {Final.ACCEPT: ACCEPT, Final.DROP: DROP, Final.REJECT: REJECT, Final.RETURN: RETURN}

Told = Callable[[str], Condition | bool | None]
"""What is known of an atom: that it holds or does not, or under which condition; None: nothing."""
Masks = Callable[[Sequence[Condition]], Mapping[int, int] | None]
"""Conditions as masks by field; None where they can not hold."""


@dataclass(frozen=True, slots=True)
class Line(Composed):
    """A rule's conditions, and which rule it is: chain and number from 0 (-1: none)."""

    number: int = -1


@dataclass(frozen=True, slots=True)
class Stage:
    """One base chain as packets of one family meet it, with all chains that it leads to."""

    base: str
    policy: int
    hook: HookName
    nat: bool
    chains: Mapping[str, Sequence[Line]]
    translations: Mapping[int, Translate] = field(default_factory=dict)

    def conditions(self) -> Iterator[Condition]:
        """Every condition, for making the space."""
        for lines in self.chains.values():
            for line in lines:
                yield from line.conditions
        for each in self.translations.values():
            yield Condition(SOURCE, atom=rewritten_text(each))

    @property
    def untracks(self) -> bool:
        """True where a rule takes packets out of connection tracking."""
        return any(line.verdict == UNTRACKED for lines in self.chains.values() for line in lines)

    def root(self, diagrams: Diagrams, masks: Masks) -> int:
        """The diagram of this chain alone; its terminals are verdicts and translations. `Untrack` does nothing here."""
        return EndsBuilder(diagrams, self._rules(masks, untracked=False)).build()

    def untracked(self, diagrams: Diagrams, masks: Masks) -> int:
        """A diagram that ends in `UNTRACKED` for packets that meet an `Untrack` before anything else ends their way."""
        return EndsBuilder(diagrams, self._rules(masks, untracked=True)).build()

    def _rules(self, masks: Masks, *, untracked: bool) -> Rules:
        numbers = {name: i for i, name in enumerate(self.chains)}
        chains: list[list[Item]] = [[] for _ in numbers]
        for name, lines in self.chains.items():
            for line in lines:
                if line.verdict == UNTRACKED and not untracked:
                    continue
                placed = masks(line.conditions)
                if placed is not None:
                    chain = numbers[line.chain] if line.chain else NO_CHAIN
                    chains[numbers[name]].append(Item(placed, line.verdict, chain, line.goto))
        return Rules(chains, self.policy)


def rewritten_text(translation: Translate) -> str:
    """The atom that stands for what becomes of a packet whose new address or port is not known."""
    return f"accepted after {translation.text}"


@dataclass(frozen=True, slots=True)
class HostProgram(Program):
    """The way to one hook and through it, for packets of one family."""

    version: int = 4
    stages: tuple[Stage, ...] = ()

    def conditions(self) -> Iterator[Condition]:
        """Every condition, for making the space."""
        for stage in self.stages:
            yield from stage.conditions()

    def diagram(self, diagrams: Diagrams, space: Space) -> int:
        """What the host does with every packet that takes this way, before and after being rewritten."""
        rests = [ACCEPT]
        for i in reversed(range(len(self.stages))):
            rests.insert(0, self._stage(i, rests, diagrams, space))
        return self._unwritten(diagrams, space, rests[0])

    def _unwritten(self, diagrams: Diagrams, space: Space, root: int) -> int:
        """A packet that nothing translated on its way is of no rewritten connection; of a later one, older rules may have been."""
        for side in ("destination", "source"):
            number = space.atoms.get(rewritten_side(side))
            if number is not None:
                later = sum(1 << STATES.index(state) for state in ("established", "related"))
                root = choice(diagrams, STATE, later, root, assign(diagrams, root, FIRST_ATOM + number, 1))
        return root

    def _stage(self, number: int, rests: Sequence[int], diagrams: Diagrams, space: Space) -> int:
        """The diagram from one stage on. `rests`: those from the next stage on."""
        stage, rest = self.stages[number], rests[0]
        masks = self._masks(space)
        if stage.untracks:
            bit = 1 << STATES.index("untracked")
            behind = assign(diagrams, rest, STATE, bit)
            where = relabel(diagrams, stage.untracked(diagrams, masks), {ACCEPT: _GO_ON, DROP: _GO_ON, REJECT: _GO_ON})
            rest = graft(diagrams, graft(diagrams, where, _GO_ON, rest), UNTRACKED, behind)
        after = {terminal: self._translated(number, each, rests, diagrams, space) for terminal, each in stage.translations.items()}
        return graft_all(diagrams, stage.root(diagrams, masks), {ACCEPT: rest, **after})

    def _masks(self, space: Space) -> Masks:
        """How conditions are placed; a subclass may know more."""
        return place_in(space)

    def _translated(self, number: int, translation: Translate, rests: Sequence[int], diagrams: Diagrams, space: Space) -> int:
        """What becomes of a packet that a stage translates. `rests`: the diagrams from the next stage on."""
        rest = known_rewritten(diagrams, space, translation, rests[self._behind_nat(number) - number - 1])
        return rewrite(diagrams, space, translation, rest, self.stages[number].hook)

    def _behind_nat(self, number: int) -> int:
        """The first stage behind the nat chains of this hook."""
        stage, after = self.stages[number], number + 1
        while stage.nat and after < len(self.stages) and self.stages[after].nat and self.stages[after].hook == stage.hook:
            after += 1
        return after


def place_in(space: Space, told: Told | None = None) -> Masks:
    """Places conditions in a space; patterns of interfaces stand for all names in it that fit. ``told``: what is known of atoms."""

    def masks(conditions: Sequence[Condition]) -> Mapping[int, int] | None:
        found: dict[int, int] = {}
        for each in conditions:
            truth = told(each.atom) if told and each.atom else None
            if isinstance(truth, bool):
                if truth == each.negated:
                    return None
                continue
            condition = each if truth is None else replace(truth, negated=truth.negated != each.negated)
            if condition.field == INTERFACE and isinstance(condition.values, frozenset) and not condition.atom:
                names = frozenset(n for n in space.interfaces if any(fits(p, n) for p in condition.values))
                number, mask = space.place(Condition(INTERFACE, names, condition.negated))
            else:
                number, mask = space.place(condition)
            found[number] = found.get(number, space.everything(number)) & mask
        if not all(found.values()):
            return None
        return {number: mask for number, mask in found.items() if mask != space.everything(number)}

    return masks


def known_rewritten(diagrams: Diagrams, space: Space, translation: Translate, rest: int) -> int:
    """What happens to a packet after a translation, which rules behind it know of."""
    number = space.atoms.get(rewritten_side(translation.side))
    return rest if number is None else assign(diagrams, rest, FIRST_ATOM + number, 2)


def rewrite(diagrams: Diagrams, space: Space, translation: Translate, rest: int, hook: HookName) -> int:
    """What happens to a packet of any kind after a translation."""
    side = (SOURCE, SOURCE_PORT) if translation.side == "source" else (DESTINATION, PORT)
    if translation.ports:
        rest = assign(diagrams, rest, side[1], _covering(space, side[1], (translation.ports,)))
    if translation.ranges:
        rest = assign(diagrams, rest, side[0], _covering(space, side[0], translation.ranges))
    elif translation.here and translation.side == "source":
        elsewhere = subtract(((0, LAST[space.version]),), (LOOPBACK[space.version],))
        rest = assign(diagrams, rest, SOURCE, _covering(space, SOURCE, elsewhere))
    elif translation.here:
        rest = _here(diagrams, space, rest, hook)
    unsure = choice(diagrams, _atom_number(space, rewritten_text(translation)), 2, ACCEPT, DROP)
    return graft(diagrams, rest, MAY, unsure)


def _here(diagrams: Diagrams, space: Space, rest: int, hook: HookName) -> int:
    """The destination becomes an address of the interface that the packet came in on; a loopback address for our own."""
    loopback = _covering(space, DESTINATION, (LOOPBACK[space.version],))
    if hook == "output":
        return assign(diagrams, rest, DESTINATION, loopback)
    lo = 1 << space.interfaces.index("lo")
    inside = assign(diagrams, assign(diagrams, rest, INTERFACE, lo), DESTINATION, loopback)
    usual = subtract(((0, LAST[space.version]),), (LOOPBACK[space.version],))
    outside = assign(diagrams, rest, DESTINATION, _covering(space, DESTINATION, usual))
    return choice(diagrams, INTERFACE, lo, inside, outside)


def _covering(space: Space, number: int, ranges: Ranges) -> int:
    """The classes that have something in common with the ranges."""
    return sum(1 << i for i, own in enumerate(space.classes[number]) if intersect(tuple(sorted(own)), ranges))


def _atom_number(space: Space, text: str) -> int:
    return space.place(Condition(SOURCE, atom=text))[0]


def of_host(ruleset: Ruleset, version: int, hook: str = "input", names: Sequence[str] | None = None) -> HostProgram:
    """The way of packets of one family to a hook and through it.

    Two programs that are compared need the same `names` of output interfaces: `conditions.ordered` of both rulesets'.
    A destination that is rewritten is taken to lead to the same hook; `ask` follows one packet wherever it goes.
    """
    return HostProgram({}, (), version, stages(ruleset, version, WAYS[hook], outs(ruleset) if names is None else names))


def stages(ruleset: Ruleset, version: int, way: Sequence[HookName], names: Sequence[str]) -> tuple[Stage, ...]:
    """Base chains on a way, in the order in which the kernel runs them."""
    reader = _Reader(ruleset, version, names, forwarded="forward" in way)
    bases = [(c, c.hook) for c in ruleset.chains if c.hook and c.hook.name in way and c.hook.version in (None, version)]
    bases.sort(key=lambda pair: (way.index(pair[1].name), *_order(pair[1])))
    return tuple(reader.stage(chain, hook) for chain, hook in bases)


def for_another_host(stage: Stage) -> Stage:
    """A base chain as packets meet it that are for no address of this host."""
    chains = {
        name: tuple(
            replace(line, conditions=tuple(c for c in line.conditions if c.atom != LOCAL))
            for line in lines
            if not any(c.atom == LOCAL and not c.negated for c in line.conditions)
        )
        for name, lines in stage.chains.items()
    }
    return replace(stage, chains=chains)


def _order(hook: Hook) -> tuple[int, int]:
    return (_NAT[hook.name] if hook.kind == "nat" else hook.priority, hook.priority)


class _Reader:
    def __init__(self, ruleset: Ruleset, version: int, names: Sequence[str], *, forwarded: bool = False) -> None:
        self._forwarded = forwarded
        self._chains = {c.name: c for c in ruleset.chains}
        self._version = version
        self._conditions = Conditions({s.name: s for s in ruleset.sets}, version, names)
        self._translations: dict[int, Translate] = {}

    def stage(self, base: Chain, hook: Hook) -> Stage:
        place, self._translations = Place.of(hook, forwarded=self._forwarded), {}
        chains: dict[str, tuple[Line, ...]] = {}
        for name in self._reached(base.name):
            found = tuple(line for i, rule in enumerate(self._chains[name].rules) for line in self._rule(i, rule, place))
            chains[name] = (*_first_packet(hook), *found) if name == base.name and hook.kind == "nat" else found
        return Stage(
            base.name, ACCEPT if hook.policy == "accept" else DROP, hook.name, hook.kind == "nat", chains, dict(self._translations)
        )

    def _reached(self, base: str) -> list[str]:
        """The base chain and all chains that it leads to, in the order of the first call."""
        found = [base]
        for name in found:
            for rule in self._chains[name].rules:
                called = rule.verdict.chain if isinstance(rule.verdict, Goto | Jump) else ""
                if called in self._chains and called not in found:
                    found.append(called)
        return found

    def _rule(self, number: int, rule: Rule, place: Place) -> Iterator[Line]:
        unknown = next((m.text for m in rule.matches if isinstance(m, Unknown)), "")
        if isinstance(rule.verdict, SetDscp | None) and not unknown:
            return
        if isinstance(rule.verdict, Translate) and rule.verdict.version not in (None, self._version):
            return
        if isinstance(rule.verdict, Jump) and rule.verdict.chain not in self._chains:
            return
        either = self._conditions.rule(rule.matches, place)
        if isinstance(rule.verdict, Undecided | SetDscp | None):
            text = f"accepted by {rule.verdict.text}" if isinstance(rule.verdict, Undecided) else f"drops: {unknown}"
            chosen = self._conditions.atom(text)
            first, second = (ACCEPT, DROP) if isinstance(rule.verdict, Undecided) else (DROP, ACCEPT)
            for conditions in either:
                yield Line((*conditions, chosen), first, number=number)
                yield Line(tuple(conditions), second, number=number)
            return
        verdict, chain, goto = self._verdict(rule)
        for conditions in either:
            yield Line(tuple(conditions), verdict, chain, goto, number)

    def _verdict(self, rule: Rule) -> tuple[int, str, bool]:
        match rule.verdict:
            case Goto(name) | Jump(name):
                goto = isinstance(rule.verdict, Goto)
                return RETURN, name if name in self._chains else "", goto
            case Untrack():
                return UNTRACKED, "", False
            case Translate():
                terminal = FIRST_TRANSLATION - len(self._translations)
                self._translations[terminal] = rule.verdict
                return terminal, "", False
            case Final():
                return _FINAL[rule.verdict], "", False
            case None | Undecided() | SetDscp():
                raise AssertionError("read before")


def seen_text(hook: str) -> str:
    """The atom of a connection whose first packet was rewritten at a hook."""
    return f"the connection was rewritten at {hook}"


def _first_packet(hook: Hook) -> Iterator[Line]:
    """A nat chain sees the first packet of a connection; later ones are treated as that one was, and who knows how."""
    yield Line((Condition(STATE, frozenset(("invalid", "untracked"))),), ACCEPT)
    seen = Condition(SOURCE, negated=True, atom=seen_text(hook.name))
    yield Line((Condition(STATE, frozenset(("established", "related"))), seen), ACCEPT)
