"""Proves that what a kernel holds means what a policy says, for all packets, or finds one that is treated otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fwcompiler.proof.compose import Program, from_clauses
from fwcompiler.proof.diagram import STEPS, VERDICTS, Diagrams, StepsExceeded
from fwcompiler.proof.host import of_host
from fwcompiler.proof.meaning import Clause
from fwcompiler.proof.space import (
    DESTINATION,
    FIRST_ATOM,
    INTERFACE,
    PORT,
    PROTOCOL,
    SOURCE,
    SOURCE_PORT,
    STATE,
    TYPE,
    Condition,
    Space,
    make_space,
)
from fwcompiler.ruleset import Ruleset

FAMILIES = (4, 6)
MAX_BOXES = 20
WIDENING = (SOURCE, DESTINATION)
TRIES = (250_000, 2_000_000)
"""Steps that each order of fields is given before the next one is tried, in the first round and in the second. 5,000 heavily
overlapping rules take 180,000 in the best order and 1,250,000 in the first, so the first round has to reach as far as that."""
ORDERS = (
    (INTERFACE, STATE, PROTOCOL, SOURCE, DESTINATION, PORT, SOURCE_PORT, TYPE),
    (INTERFACE, STATE, PROTOCOL, PORT, SOURCE_PORT, TYPE, DESTINATION, SOURCE),
    (SOURCE, DESTINATION, INTERFACE, STATE, PROTOCOL, PORT, SOURCE_PORT, TYPE),
)
"""Orders in which a diagram may decide its fields; they differ up to 40 times in what a ruleset costs."""
_FRAMES = 4
"""Stack frames that deciding one field takes at most."""


@dataclass(frozen=True, slots=True)
class Box:
    """Packets that two programs treat differently, all in the same way: masks by field, every other field is free."""

    masks: Mapping[int, int]
    first: int
    second: int

    @property
    def verdicts(self) -> tuple[str, str]:
        """What the first and the second program do with these packets."""
        return VERDICTS.get(self.first, "other"), VERDICTS.get(self.second, "other")


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two programs differ for one family; `boxes` are the largest found, the plainest first; `more` says that there are others."""

    space: Space
    boxes: tuple[Box, ...]
    more: bool


def prove(clauses: Sequence[Clause], ruleset: Ruleset, hook: str = "input") -> tuple[Difference, ...]:
    """Differences between a policy's meaning and what a ruleset does on the way through a hook, by family; none: equal for all packets.

    Raises:
        StepsExceeded: the ruleset is beyond what can be decided.
    """
    found = (differ(from_clauses(clauses, version), of_host(ruleset, version, hook), version) for version in FAMILIES)
    return tuple(d for d in found if d is not None)


def same(first: Program, second: Program, version: int) -> bool:
    """True where two programs of one family are equal for all packets and all atoms.

    Raises:
        StepsExceeded: beyond what can be decided.
    """
    space = make_space(version, [*first.conditions(), *second.conditions()])
    with deep_enough(space):
        _, *roots = _build(first, second, space)
    return roots[0] == roots[1]


def differ(first: Program, second: Program, version: int, within: Sequence[Condition] = ()) -> Difference | None:
    """Where two programs of one family differ, or None where they are equal for all packets and all atoms.

    ``within``: what holds for the packets that are asked about, in values that the programs' conditions name.

    Raises:
        StepsExceeded: beyond what can be decided.
    """
    space = make_space(version, [*first.conditions(), *second.conditions()])
    with deep_enough(space):
        diagrams, *roots = _build(first, second, space)
        if roots[0] == roots[1]:
            return None
        differing = _Differing(diagrams)
        boxes: list[Box] = []
        left = differing.between(roots[0], roots[1])
        for number, inside in map(space.place, within):
            outside = space.everything(number) & ~inside
            left = differing.without(left, Box({number: outside}, 0, 0)) if outside else left
        if left == AGREE:
            return None
        whole = left
        while left != AGREE and len(boxes) < MAX_BOXES:
            box = differing.widened(whole, *differing.path(left))
            boxes.append(box)
            left = differing.without(left, box)
        return Difference(space, tuple(sorted(boxes, key=_asks)), left != AGREE)


@contextmanager
def deep_enough(space: Space) -> Iterator[None]:
    """Diagrams are walked by recursion, one field at a time; every rule with a limit is a field of its own."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + _FRAMES * (FIRST_ATOM + len(space.atoms)))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _build(first: Program, second: Program, space: Space) -> tuple[Diagrams, int, int]:
    """Both programs' diagrams, in the first order of fields that is cheap enough."""
    atoms = range(FIRST_ATOM, FIRST_ATOM + len(space.atoms))
    for order, steps in (*((order, steps) for steps in TRIES for order in ORDERS), (ORDERS[0], STEPS)):
        diagrams = Diagrams({number: space.everything(number) for number in (*order, *atoms)}, steps)
        try:
            return diagrams, first.diagram(diagrams, space), second.diagram(diagrams, space)
        except StepsExceeded:
            continue
    raise StepsExceeded


def _asks(box: Box) -> tuple[int, int]:
    """What a box is about, for telling the plainest first: what no packet shows, then fields."""
    return sum(number >= FIRST_ATOM for number in box.masks), len(box.masks)


AGREE = -5
_ENDS = 1 << 20
"""More than there are verdicts: a pair of them is one number."""


class _Differing:
    """Where two diagrams end differently, as a diagram itself: it ends in AGREE or in a pair of verdicts."""

    def __init__(self, diagrams: Diagrams) -> None:
        self._diagrams = diagrams
        self._known: dict[tuple[int, int], int] = {}

    def between(self, first: int, second: int) -> int:
        """The diagram of where two diagrams differ."""
        if first == second:
            return AGREE
        if first < 0 and second < 0:
            return _pair(first, second)
        key = (first, second)
        if key not in self._known:
            edges: dict[int, int] = {}
            for mask, a, b in self._diagrams.pairs(first, second):
                child = self.between(a, b)
                edges[child] = edges.get(child, 0) | mask
            level = min(self._diagrams.level(n) for n in key)
            self._known[key] = self._diagrams.node(level, edges)
        return self._known[key]

    def path(self, node: int) -> tuple[dict[int, int], int]:
        """One way to a pair of verdicts: masks by level, and the pair."""
        masks: dict[int, int] = {}
        while node >= 0:
            level, edges = self._diagrams.nodes[node]
            masks[level], node = next(edge for edge in edges if edge[1] != AGREE)
        return masks, node

    def widened(self, whole: int, masks: dict[int, int], pair: int) -> Box:
        """The way with every field let out as far as all of it still ends in the same pair; addresses first."""
        fields = self._diagrams.fields
        for level in sorted(masks, key=lambda n: (fields[n] not in WIDENING, -fields[n])):
            others = {n: mask for n, mask in masks.items() if n != level}
            masks[level] |= self._agreeing(whole, level, others, pair)
            if masks[level] == self._diagrams.full[level]:
                del masks[level]
        return Box({fields[level]: mask for level, mask in sorted(masks.items())}, *_verdicts(pair))

    def _agreeing(self, whole: int, level: int, others: Mapping[int, int], pair: int) -> int:
        """Classes of a level for which everything inside the other masks ends in the pair."""
        every = self._diagrams.full[level]
        memo: dict[int, int] = {}

        def visit(node: int) -> int:
            if node < 0:
                return every if node == pair else 0
            if node not in memo:
                here, edges = self._diagrams.nodes[node]
                if here == level:
                    memo[node] = sum(mask for mask, child in edges if visit(child))
                else:
                    memo[node] = every
                    within = others.get(here, self._diagrams.full[here])
                    for mask, child in edges:
                        if mask & within:
                            memo[node] &= visit(child)
            return memo[node]

        return visit(whole)

    def without(self, whole: int, box: Box) -> int:
        """A diagram of differences less those in a box."""
        masks = sorted((self._diagrams.levels[number], mask) for number, mask in box.masks.items())
        memo: dict[tuple[int, int], int] = {}

        def visit(node: int, asked: int) -> int:
            """`asked`: how many of the box's fields are decided, and the packet inside."""
            if node == AGREE or asked == len(masks):
                return AGREE
            key = (node, asked)
            if key not in memo:
                level, inside = masks[asked]
                here = min(self._diagrams.level(node), level)
                edges: dict[int, int] = {}
                for mask, child in self._diagrams.edges(node, here):
                    within = mask if here < level else mask & inside
                    for part, result in ((within, visit(child, asked + (here == level))), (mask & ~within, child)):
                        if part:
                            edges[result] = edges.get(result, 0) | part
                memo[key] = self._diagrams.node(here, edges)
            return memo[key]

        return visit(whole, 0)


def _pair(first: int, second: int) -> int:
    return AGREE - 1 - (-first * _ENDS - second)


def _verdicts(pair: int) -> tuple[int, int]:
    first, second = divmod(AGREE - 1 - pair, _ENDS)
    return -first, -second
