"""Decision diagrams: what a list of rules does with every packet, as a graph in which equal meanings are one node.

A diagram is built field by field. What is left of the rules after some fields are decided is a state; equal states
are built once. States are kept small: a rule behind a certain one is gone, a chain that does one thing for certain
is replaced by it, rules at the end that change nothing are dropped. Nodes are hash-consed, so two rulesets mean the
same exactly when their roots are the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fwcompiler.proof.space import SOURCE

ACCEPT, DROP, REJECT, RETURN = -1, -2, -3, -4
VERDICTS = {ACCEPT: "accept", DROP: "drop", REJECT: "reject"}
NO_CHAIN = -1


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


Entry = tuple[int, int, int, bool]
"""item number, verdict, chain, goto: an item with what it has become"""
State = tuple[tuple[int, tuple[Entry, ...]], ...]


class StepsExceeded(Exception):
    """A ruleset needs more states than allowed."""


@dataclass
class Diagrams:
    """A store of nodes; all diagrams that are compared live in one."""

    widths: Mapping[int, int]
    """By field in order of decision: the mask of all its classes."""
    nodes: list[tuple[int, tuple[tuple[int, int], ...]]] = field(default_factory=list)
    _known: dict[tuple[int, tuple[tuple[int, int], ...]], int] = field(default_factory=dict)

    def node(self, number: int, edges: dict[int, int]) -> int:
        """The node that decides a field; ``edges``: child -> mask. One child only is that child."""
        if len(edges) == 1:
            return next(iter(edges))
        key = (number, tuple(sorted((mask, child) for child, mask in edges.items())))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self.nodes)
            self.nodes.append(key)
        return found

    def both(self, first: int, second: int) -> int:
        """A packet goes through two hooks' chains one after the other: a drop in either is final."""
        return self._combine(first, second, {})

    def _combine(self, first: int, second: int, memo: dict[tuple[int, int], int]) -> int:
        if first < 0:
            return second if first == ACCEPT else first
        if second == ACCEPT:
            return first
        key = (first, second)
        if key not in memo:
            edges: dict[int, int] = {}
            number = min(self.nodes[n][0] for n in (first, second) if n >= 0)
            for _, mask, a, b in self.pairs(first, second):
                child = self._combine(a, b, memo)
                edges[child] = edges.get(child, 0) | mask
            memo[key] = self.node(number, edges)
        return memo[key]

    def pairs(self, first: int, second: int) -> list[tuple[int, int, int, int]]:
        """Field, mask and both children where the topmost field of two nodes is decided."""
        fields = [self.nodes[n][0] for n in (first, second) if n >= 0]
        number = min(fields)
        left = self._edges(first, number)
        right = self._edges(second, number)
        return [(number, m & n, a, b) for m, a in left for n, b in right if m & n]

    def _edges(self, node: int, number: int) -> tuple[tuple[int, int], ...]:
        if node >= 0 and self.nodes[node][0] == number:
            return self.nodes[node][1]
        return ((self.widths[number], node),)


class Builder:
    """Builds the diagram of one list of rules."""

    def __init__(self, diagrams: Diagrams, rules: Rules, *, limit: int = 2_000_000) -> None:
        self._diagrams, self._policy, self._left = diagrams, rules.policy, limit
        self._items: list[Item] = []
        self._memo: dict[tuple[int, State], int] = {}
        state: list[tuple[int, tuple[Entry, ...]]] = []
        for chain, items in enumerate(rules.chains):
            first = len(self._items)
            self._items += items
            state.append((chain, tuple((first + i, item.verdict, item.chain, item.goto) for i, item in enumerate(items))))
        self._start: State = tuple(state)
        self._last = [max(item.conditions, default=-1) for item in self._items]

    def build(self) -> int:
        """The root.

        Raises:
            StepsExceeded: more states than allowed.
        """
        return self._build(-1, self._tidy(-1, self._start))

    def _build(self, decided: int, state: State) -> int:
        """The node for a tidy state in which all fields up to `decided` are known."""
        root = state[0][1]
        if not root:
            return self._policy
        item, verdict, called, _ = root[0]
        if called == NO_CHAIN and self._last[item] <= decided:
            return self._policy if verdict == RETURN else verdict
        number = self._next_field(decided, state)
        key = (number, state)
        if key not in self._memo:
            self._left -= 1
            if self._left < 0:
                raise StepsExceeded
            self._memo[key] = self._decide(number, state)
        return self._memo[key]

    def _next_field(self, decided: int, state: State) -> int:
        """The first field not decided that a rule of the state asks about."""
        numbers = (n for _, entries in state for e in entries for n in self._items[e[0]].conditions if n > decided)
        return min(numbers)

    def _decide(self, number: int, state: State) -> int:
        if number == SOURCE and len(state) == 1 and self._is_flat(number, state[0][1]):
            return self._last_field(number, state[0][1])
        edges: dict[int, int] = {}
        for part in self._partition(number, state):
            bit = part & -part
            left = tuple((chain, tuple(e for e in entries if self._holds(e[0], number, bit))) for chain, entries in state)
            child = self._build(number, self._tidy(number, left))
            edges[child] = edges.get(child, 0) | part
        return self._diagrams.node(number, edges)

    def _holds(self, item: int, number: int, bit: int) -> bool:
        mask = self._items[item].conditions.get(number)
        return mask is None or bool(mask & bit)

    def _is_flat(self, number: int, entries: tuple[Entry, ...]) -> bool:
        return all(e[2] == NO_CHAIN and self._last[e[0]] <= number for e in entries)

    def _last_field(self, number: int, entries: tuple[Entry, ...]) -> int:
        """Only this field is left and no chain: first match wins, one pass."""
        edges: dict[int, int] = {}
        left = self._diagrams.widths[number]
        for item, verdict, _, _ in entries:
            taken = left & self._items[item].conditions.get(number, left)
            if taken:
                child = self._policy if verdict == RETURN else verdict
                edges[child] = edges.get(child, 0) | taken
                left &= ~taken
        if left:
            edges[self._policy] = edges.get(self._policy, 0) | left
        return self._diagrams.node(number, edges)

    def _partition(self, number: int, state: State) -> list[int]:
        """Classes of the field that the rules of a state treat alike."""
        masks = {m for _, entries in state for e in entries if (m := self._items[e[0]].conditions.get(number)) is not None}
        parts = [self._diagrams.widths[number]]
        for mask in masks:
            cut = []
            for part in parts:
                inside = part & mask
                if inside and inside != part:
                    cut += [inside, part ^ inside]
                else:
                    cut.append(part)
            parts = cut
        return parts

    def _tidy(self, decided: int, state: State) -> State:
        """The same meaning with less: see the module's head."""
        chains = dict(state)
        while True:
            changed = {chain: self._tidy_chain(decided, chain, entries, chains) for chain, entries in chains.items()}
            if changed == chains:
                break
            chains = changed
        reached, queue = {0}, [0]
        while queue:
            for _, _, called, _ in chains[queue.pop()]:
                if called != NO_CHAIN and called not in reached:
                    reached.add(called)
                    queue.append(called)
        return tuple((chain, chains[chain]) for chain in sorted(reached))

    def _tidy_chain(
        self, decided: int, chain: int, entries: tuple[Entry, ...], chains: Mapping[int, tuple[Entry, ...]]
    ) -> tuple[Entry, ...]:
        kept: list[Entry] = []
        for each in entries:
            entry, (item, _, called, goto) = each, each
            certain = self._last[item] <= decided
            if called != NO_CHAIN:
                outcome = self._constant(decided, chains[called])
                if outcome == RETURN and not goto:
                    continue
                if outcome is not None:
                    entry = (item, outcome, NO_CHAIN, False)
                elif certain and not kept and goto:
                    return chains[called]
            kept.append(entry)
            if certain and (entry[2] == NO_CHAIN or goto):
                break
        ending = self._policy if chain == 0 else RETURN
        while kept and kept[-1][2] == NO_CHAIN and kept[-1][1] in (ending, RETURN):
            kept.pop()
        return tuple(kept)

    def _constant(self, decided: int, entries: tuple[Entry, ...]) -> int | None:
        """What a chain does for certain, or None."""
        if not entries:
            return RETURN
        item, verdict, called, _ = entries[0]
        return verdict if self._last[item] <= decided and called == NO_CHAIN else None
