"""Decision diagrams: what a list of rules does with every packet, as a graph in which equal meanings are one node.

A diagram is built field by field, in an order of the caller's choice; a field's place in it is its level. What is left
of the rules after some levels are decided is a state; equal states are built once. States are kept small: a rule
behind a certain one is gone, a chain that does one thing for certain is replaced by it, rules at the end that change
nothing are dropped. Sets of rules and of classes are bit masks. Nodes are hash-consed, so two rulesets mean the same
exactly when their roots are the same number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import or_, xor

ACCEPT, DROP, REJECT, RETURN = -1, -2, -3, -4
ELSEWHERE = -5
"""Accepted, but not where it was sent to: a rule gave the packet another destination or port."""
VERDICTS = {ACCEPT: "accept", DROP: "drop", REJECT: "reject", ELSEWHERE: "redirect"}
NO_CHAIN = -1
STEPS = 20_000_000
MANY = 12
"""From so many bits on, looking for them in text is faster than in a number."""
NEAR = 9
"""So many levels are looked at one by one; behind the fields come atoms, and there may be thousands."""
ALIKE = 1_000
"""Up to so many rules a state is compared with others rule by rule; beyond, by the rules' numbers only."""

Conditions = tuple[tuple[int, int], ...]
"""level and mask, levels ascending"""
Edges = tuple[tuple[int, int], ...]
"""mask and child, masks ascending"""


@dataclass(frozen=True, slots=True)
class Item:
    """A rule: masks by field, and a verdict or a chain to go through (``goto``: without coming back)."""

    conditions: Mapping[int, int]
    verdict: int = RETURN
    chain: int = NO_CHAIN
    goto: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """Chains of items by number; packets start in chain 0, whose end is `policy`."""

    chains: Sequence[Sequence[Item]]
    policy: int


class StepsExceeded(Exception):
    """A ruleset needs more states than allowed, or its chains lead into each other."""


@dataclass
class Diagrams:
    """A store of nodes; all diagrams that are compared live in one. A node decides a level."""

    widths: Mapping[int, int]
    """By field, in order of decision: the mask of all its classes."""
    steps: int = STEPS
    """How many more edges may be looked at; a million takes one to three seconds."""
    nodes: list[tuple[int, Edges]] = field(default_factory=list)
    built: dict[tuple[int, object], int] = field(default_factory=dict)
    """Nodes of states without chains, by their next level and what their rules have left; shared by all lists of rules."""
    _known: dict[tuple[int, Edges], int] = field(default_factory=dict)
    _rests: dict[tuple[Conditions, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fields = tuple(self.widths)
        self.full = tuple(self.widths.values())
        self.levels = {number: level for level, number in enumerate(self.fields)}

    def rest(self, conditions: Conditions, verdict: int) -> int:
        """The number of what is left of a rule, the same for all lists of rules."""
        return self._rests.setdefault((conditions, verdict), len(self._rests))

    def step(self, count: int) -> None:
        """Take steps.

        Raises:
            StepsExceeded: that was too many.
        """
        self.steps -= count
        if self.steps < 0:
            raise StepsExceeded

    def node(self, level: int, edges: Mapping[int, int]) -> int:
        """The node that decides a level; ``edges``: child -> mask. One child only is that child."""
        if len(edges) == 1:
            return next(iter(edges))
        key = (level, tuple(sorted((mask, child) for child, mask in edges.items())))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self.nodes)
            self.nodes.append(key)
        return found

    def level(self, node: int) -> int:
        """The level that a node decides; verdicts come after all levels."""
        return self.nodes[node][0] if node >= 0 else len(self.full)

    def edges(self, node: int, level: int) -> Edges:
        """Where a node leads to by the classes of a level; one that does not ask about it leads to itself."""
        return self.nodes[node][1] if self.level(node) == level else ((self.full[level], node),)

    def both(self, first: int, second: int) -> int:
        """A packet goes through two hooks' chains one after the other: a drop in either is final."""
        return self._both(first, second, {})

    def _both(self, first: int, second: int, memo: dict[tuple[int, int], int]) -> int:
        if first < 0:
            return second if first == ACCEPT else first
        if second == ACCEPT:
            return first
        key = (first, second)
        if key not in memo:
            edges: dict[int, int] = {}
            for mask, a, b in self.pairs(first, second):
                self.step(1)
                child = self._both(a, b, memo)
                edges[child] = edges.get(child, 0) | mask
            memo[key] = self.node(min(self.level(first), self.level(second)), edges)
        return memo[key]

    def pairs(self, first: int, second: int) -> Iterator[tuple[int, int, int]]:
        """Mask and both children where the topmost level of two nodes is decided."""
        level = min(self.level(first), self.level(second))
        left, right = self.edges(first, level), self.edges(second, level)
        common = set(left).intersection(right)
        for mask, child in common:
            yield mask, child, child
        others = [edge for edge in right if edge not in common]
        for m, a in left:
            if (m, a) not in common:
                for n, b in others:
                    if m & n:
                        yield m & n, a, b


@dataclass(frozen=True, slots=True)
class _State:
    """Rules that still matter, the chain to start in and the verdict at its end; `key` is equal for states that mean the same."""

    alive: int
    start: int
    policy: int
    key: object


class Builder:
    """Builds the diagram of one list of rules."""

    def __init__(self, diagrams: Diagrams, rules: Rules) -> None:
        self._diagrams, self._policy = diagrams, rules.policy
        self.items = [item for items in rules.chains for item in items]
        firsts = list(accumulate((len(items) for items in rules.chains), initial=0))
        self.spans = [(1 << high) - (1 << low) for low, high in pairwise(firsts)]
        self.calls = sum(1 << i for i, item in enumerate(self.items) if item.chain != NO_CHAIN)
        self.ending = {
            verdict: sum(1 << i for i, item in enumerate(self.items) if item.chain == NO_CHAIN and item.verdict == verdict)
            for verdict in (*VERDICTS, RETURN)
        }
        self._verdicts = [item.verdict for item in self.items]
        self._mine = object()
        self._left: dict[int, list[int]] = {}
        self._memo: dict[tuple[int, object], int] = {}
        self._flat: dict[tuple[int, int, int, int], int] = {}
        self._holding: dict[int, list[int]] = {}
        self._read_conditions()
        self._refuse_circles()

    def _read_conditions(self) -> None:
        """Who asks about a level, who is certain after it, and by what an item is known once some levels are decided."""
        levels = self._diagrams.levels
        self._masks = [dict(sorted((levels[number], mask) for number, mask in item.conditions.items())) for item in self.items]
        self._asked = [tuple(masks) for masks in self._masks]
        known = self._diagrams.rest
        self._rests: list[list[int]] = []
        self._asking, certain = [0] * len(levels), [0] * (len(levels) + 1)
        for i, masks in enumerate(self._masks):
            conditions = tuple(masks.items())
            self._rests.append([known(conditions[n:], self._verdicts[i]) for n in range(len(conditions) + 1)])
            for level in masks:
                self._asking[level] |= 1 << i
            certain[max(masks, default=-1) + 1] |= 1 << i
        self._certain = list(accumulate(certain, or_))

    def _refuse_circles(self) -> None:
        """Kernels refuse chains that lead into each other; whoever made such a list up gets no answer."""
        called = {chain: {self.items[i].chain for i in bits(span & self.calls)} for chain, span in enumerate(self.spans)}
        while called:
            left = {chain: callees & called.keys() for chain, callees in called.items() if callees & called.keys()}
            if left == called:
                raise StepsExceeded
            called = left

    def build(self) -> int:
        """The root.

        Raises:
            StepsExceeded: more states than allowed.
        """
        return self._build(-1, (1 << len(self.items)) - 1, 0, self._policy)

    def _build(self, decided: int, alive: int, start: int, policy: int) -> int:
        """The node for these rules when all levels up to `decided` are known."""
        if not alive & self.spans[start] & self.calls:
            return self._build_flat(decided, alive & self.spans[start], policy, policy)
        state = self._tidy(decided, alive, start, policy)
        if isinstance(state, int):
            return state
        if not state.alive & self.calls:
            return self._build_flat(decided, state.alive, state.policy, state.policy)
        level = self._next_level(decided, state.alive)
        key = (level, state.key)
        if key not in self._memo:
            edges: dict[int, int] = {}
            for left, mask in self._partition(level, state.alive).items():
                child = self._build(level, left, state.start, state.policy)
                edges[child] = edges.get(child, 0) | mask
            self._memo[key] = self._diagrams.node(level, edges)
        return self._memo[key]

    def _build_flat(self, decided: int, alive: int, end: int, back: int) -> int:
        """The node for rules of one chain; `end` is the verdict behind the last of them, `back` what `return` means."""
        certain = alive & self._certain[decided + 1]
        if certain:
            first = certain & -certain
            alive &= first - 1
            verdict = self._verdicts[first.bit_length() - 1]
            end = back if verdict == RETURN else verdict
        other = alive & ~self.ending[end]
        if end == back:
            other &= ~self.ending[RETURN]
        if not other:
            return end
        alive &= (1 << other.bit_length()) - 1
        key = (decided, alive, end, back)
        found = self._flat.get(key)
        if found is None:
            level = self._next_level(decided, alive)
            shared = (level, self._known_flat(decided, alive, end, back))
            built = self._diagrams.built
            if shared not in built:
                built[shared] = self._decide_flat(level, alive, end, back)
            found = self._flat[key] = built[shared]
        return found

    def _decide_flat(self, level: int, alive: int, end: int, back: int) -> int:
        if not alive & ~self._certain[level + 1]:
            return self._last_level(level, alive, end, back)
        edges: dict[int, int] = {}
        for left, mask in self._partition(level, alive).items():
            child = self._build_flat(level, left, end, back)
            edges[child] = edges.get(child, 0) | mask
        return self._diagrams.node(level, edges)

    def _last_level(self, level: int, alive: int, end: int, back: int) -> int:
        """Only this level is left and no chain: first match wins, one pass."""
        edges: dict[int, int] = {}
        left = self._diagrams.full[level]
        for i in bits(alive):
            taken = left & self._masks[i][level]
            if taken:
                verdict = self._verdicts[i]
                child = back if verdict == RETURN else verdict
                edges[child] = edges.get(child, 0) | taken
                left ^= taken
        if left:
            edges[end] = edges.get(end, 0) | left
        return self._diagrams.node(level, edges)

    def _known_flat(self, decided: int, alive: int, end: int, back: int) -> object:
        """What tells rules without chains from others when some levels are decided: what each has left, in order."""
        if not alive & self.ending[RETURN]:
            back = end
        if alive.bit_count() > ALIKE:
            return self._mine, alive, end, back
        if decided >= NEAR:
            return (end, back, *(self._rest(i, decided) for i in bits(alive)))
        if decided not in self._left:
            self._left[decided] = [self._rest(i, decided) for i in range(len(self.items))]
        return (end, back, *map(self._left[decided].__getitem__, bits(alive)))

    def _rest(self, item: int, decided: int) -> int:
        return self._rests[item][bisect_right(self._asked[item], decided)]

    def _next_level(self, decided: int, alive: int) -> int:
        """The first level not decided that a living rule asks about."""
        for level in range(decided + 1, min(decided + NEAR, len(self._asking))):
            if alive & self._asking[level]:
                return level
        asked = (self._asked[i] for i in bits(alive))
        return min(levels[n] for levels in asked if (n := bisect_right(levels, decided)) < len(levels))

    def _partition(self, level: int, alive: int) -> dict[int, int]:
        """Which rules are left where on a level: rules -> classes. Runs of classes that all rules treat alike are looked at once."""
        if level not in self._holding:
            self._holding[level] = self._holding_by_class(level)
        holding = self._holding[level]
        borders = 1 | self._diagrams.full[level] + 1
        for mask in {self._masks[i][level] for i in bits(alive & self._asking[level])}:
            borders |= mask ^ mask << 1
        runs: dict[int, list[tuple[int, int]]] = {}
        for low, high in pairwise(bits(borders)):
            runs.setdefault(alive & holding[low], []).append((low, high))
        self._diagrams.step(len(runs))
        return {left: sum((1 << high) - (1 << low) for low, high in places) for left, places in runs.items()}

    def _holding_by_class(self, level: int) -> list[int]:
        """For each class of a level the rules that hold; one sweep over the borders of all rules' masks."""
        changes = [0] * (self._diagrams.full[level].bit_length() + 1)
        changes[0] = ~self._asking[level] & (1 << len(self.items)) - 1
        for i in bits(self._asking[level]):
            mask = self._masks[i][level]
            for border in bits(mask ^ mask << 1):
                changes[border] ^= 1 << i
        return list(accumulate(changes[:-1], xor))

    def _tidy(self, decided: int, alive: int, start: int, policy: int) -> _State | int:
        """The same meaning with less, or the verdict where it is certain: see the module's head."""
        while True:
            tidy = _Tidy(self, self._certain[decided + 1], alive, start, policy)
            kept, end = tidy.chain(start)
            if end < 0 and not kept:
                return end
            if not kept:
                start = end
            elif end < 0 and not kept & (kept - 1) and kept & self.calls & self._certain[decided + 1]:
                # One certain jump is left: what it leads to decides, and coming back is the end.
                start, policy = self.items[kept.bit_length() - 1].chain, end
            else:
                break
        alive, order = tidy.reached()
        return _State(alive, start, policy, (policy, *((chain, self._known_as(decided, chain, tidy)) for chain in order)))

    def _known_as(self, decided: int, chain: int, tidy: _Tidy) -> object:
        """What tells a chain from others when some levels are decided."""
        kept, end = tidy.done[chain]
        return (*((self._rest(i, decided), tidy.does(chain, i)) for i in bits(kept)), end)


class _Tidy:
    """Tidies the chains of one state, called ones first."""

    def __init__(self, builder: Builder, certain: int, alive: int, start: int, policy: int) -> None:
        self._builder, self._certain, self._alive, self._start, self._policy = builder, certain, alive, start, policy
        self.done: dict[int, tuple[int, int]] = {}
        """By chain: its rules that matter before its end, and its end: a verdict or, where certain, a chain to go on in."""
        self._enders: dict[int, int] = {}
        self._verdicts: dict[int, int] = {}

    def chain(self, number: int) -> tuple[int, int]:
        """A chain without the rules that change nothing, and its end."""
        if number not in self.done:
            self.done[number] = self._chain(number)
        return self.done[number]

    def _chain(self, number: int) -> tuple[int, int]:
        builder = self._builder
        plain = self._alive & builder.spans[number] & self._certain & ~builder.calls
        own = self._alive & builder.spans[number] & ((plain & -plain) * 2 - 1)
        own, resolved = self._call(own)
        jumps = sum(1 << i for i in bits(own & builder.calls & ~sum(resolved.values())) if not builder.items[i].goto)
        enders = own & self._certain & ~jumps
        ender = self._enders[number] = enders & -enders
        default = self._policy if number == self._start else RETURN
        end = default
        if ender:
            item = ender.bit_length() - 1
            own &= ender - 1
            does = self.does(number, item)
            end = does if isinstance(does, int) else does[0]
        if end < 0:
            same = builder.ending[end] | resolved.get(end, 0)
            if end == default:
                same |= builder.ending[RETURN] | resolved.get(RETURN, 0)
            own &= (1 << (own & ~same).bit_length()) - 1
        return own, end

    def _call(self, own: int) -> tuple[int, dict[int, int]]:
        """A chain's rules without calls of chains that only come back, and calls by the verdict they come to for certain."""
        resolved: dict[int, int] = {}
        for i in bits(own & self._builder.calls):
            item = self._builder.items[i]
            kept, end = self.chain(item.chain)
            if kept or end >= 0:
                continue
            if end == RETURN and not item.goto:
                own ^= 1 << i
            else:
                self._verdicts[i] = end
                resolved[end] = resolved.get(end, 0) | 1 << i
        return own, resolved

    def does(self, chain: int, number: int) -> int | tuple[int, bool]:
        """What a rule comes to: a verdict, or a chain and whether it is for good."""
        item = self._builder.items[number]
        if item.chain == NO_CHAIN:
            verdict = item.verdict
        elif number in self._verdicts:
            verdict = self._verdicts[number]
        else:
            return item.chain, item.goto
        return self._policy if verdict == RETURN and chain == self._start else verdict

    def reached(self) -> tuple[int, list[int]]:
        """All rules that matter, and the chains that packets may still go through, the first one first."""
        alive, order = 0, [self._start]
        settled: list[int] = []
        for chains in (order, settled):
            for chain in chains:
                own = self.done[chain][0] | self._enders[chain]
                alive |= own
                for i in bits(own & self._builder.calls):
                    callee = self._builder.items[i].chain
                    # What a settled call leads to stays alive, so that it comes to the same on the next level.
                    known = settled if chains is settled or i in self._verdicts else order
                    if callee not in known:
                        known.append(callee)
        return alive, order


def bits(mask: int) -> Iterator[int]:
    """Numbers of the bits that are set, ascending."""
    if mask.bit_count() > MANY:
        text = bin(mask)[:1:-1]
        at = text.find("1")
        while at >= 0:
            yield at
            at = text.find("1", at + 1)
        return
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
