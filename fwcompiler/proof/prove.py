"""Proves that what a kernel holds means what a policy says, for all packets, or finds one that is treated otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fwcompiler.proof.compose import Program, from_clauses, from_ruleset
from fwcompiler.proof.diagram import VERDICTS, Diagrams
from fwcompiler.proof.meaning import Clause
from fwcompiler.proof.space import DESTINATION, FIRST_ATOM, SOURCE, Space, make_space
from fwcompiler.ruleset import Ruleset

FAMILIES = (4, 6)
MAX_BOXES = 20
WIDENING = (SOURCE, DESTINATION)


@dataclass(frozen=True, slots=True)
class Box:
    """Packets that two programs treat differently, all in the same way: masks by field, every other field is free."""

    masks: Mapping[int, int]
    first: int
    second: int

    @property
    def verdicts(self) -> tuple[str, str]:
        """What the first and the second program do with these packets."""
        return VERDICTS[self.first], VERDICTS[self.second]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two programs differ for one family; `boxes` are the largest found, `more` says that there are others."""

    space: Space
    boxes: tuple[Box, ...]
    more: bool


def prove(clauses: Sequence[Clause], ruleset: Ruleset) -> tuple[Difference, ...]:
    """Differences between a policy's meaning and a ruleset, by family; none: equal for all packets.

    Raises:
        StepsExceeded: the ruleset is beyond what can be decided.
    """
    found = (differ(from_clauses(clauses, version), from_ruleset(ruleset, version), version) for version in FAMILIES)
    return tuple(d for d in found if d is not None)


def differ(first: Program, second: Program, version: int) -> Difference | None:
    """Where two programs of one family differ, or None where they are equal for all packets and all atoms."""
    space = make_space(version, [*first.conditions(), *second.conditions()])
    widths = {number: space.everything(number) for number in range(FIRST_ATOM + len(space.atoms))}
    diagrams = Diagrams(widths)
    roots = first.diagram(diagrams, space), second.diagram(diagrams, space)
    if roots[0] == roots[1]:
        return None
    search = _Search(diagrams, *roots)
    boxes: list[Box] = []
    for box in search.boxes():
        if not any(_inside(box.masks, known.masks, widths) for known in boxes):
            boxes.append(search.widened(box))
        if len(boxes) >= MAX_BOXES:
            return Difference(space, tuple(boxes), True)
    return Difference(space, tuple(boxes), False)


def _inside(inner: Mapping[int, int], outer: Mapping[int, int], widths: Mapping[int, int]) -> bool:
    return all(not inner.get(number, widths[number]) & ~mask for number, mask in outer.items())


class _Search:
    """Walks two diagrams side by side."""

    def __init__(self, diagrams: Diagrams, first: int, second: int) -> None:
        self._diagrams, self._first, self._second = diagrams, first, second

    def boxes(self) -> Iterator[Box]:
        """Every path on which the two end differently."""
        return self._walk(self._first, self._second, {})

    def _walk(self, first: int, second: int, masks: dict[int, int]) -> Iterator[Box]:
        if first == second:
            return
        if first < 0 and second < 0:
            yield Box(dict(masks), first, second)
            return
        for number, mask, a, b in self._diagrams.pairs(first, second):
            yield from self._walk(a, b, {**masks, number: mask})

    def widened(self, box: Box) -> Box:
        """The box with every field let out as far as all of it still differs in the same way; addresses first."""
        masks = dict(box.masks)
        for number in sorted(masks, key=lambda n: (n not in WIDENING, -n)):
            others = {n: m for n, m in masks.items() if n != number}
            agreeing = self._agreeing(number, others, (box.first, box.second))
            masks[number] |= agreeing
            if masks[number] == self._diagrams.widths[number]:
                del masks[number]
        return Box(masks, box.first, box.second)

    def _agreeing(self, number: int, others: Mapping[int, int], verdicts: tuple[int, int]) -> int:
        """Classes of a field for which everything inside the other masks ends in these verdicts."""
        memo: dict[tuple[int, int], int] = {}

        def visit(first: int, second: int) -> int:
            if first < 0 and second < 0:
                return self._diagrams.widths[number] if (first, second) == verdicts else 0
            key = (first, second)
            if key not in memo:
                result = self._diagrams.widths[number]
                parts = 0
                for field, mask, a, b in self._diagrams.pairs(first, second):
                    if field == number:
                        parts |= mask & visit(a, b)
                        result = parts
                    elif mask & others.get(field, self._diagrams.widths[field]):
                        result &= visit(a, b)
                memo[key] = result
            return memo[key]

        return visit(self._first, self._second)
