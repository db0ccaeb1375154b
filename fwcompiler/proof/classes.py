"""Numbers cut into classes that every one of several sets treats alike: the one step whose cost grows with the sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import overload

from fwcompiler.addresses import SEARCH, Merged, Range, Ranges, includes, intersect, is_merged, merged, overlap, subtract


class Classes(Sequence[Ranges]):
    """The numbers of each class. A proof that finds no difference never asks for them, so large ones are worked out when somebody does.

    `signatures`: for each class, which sets hold it; bit `i` stands for the set with that number.
    """

    def __init__(self, found: dict[int, Callable[[], Ranges]]) -> None:
        self.signatures = tuple(found)
        self._makers = [cache(make) for make in found.values()]

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, index: int) -> Ranges: ...
    @overload
    def __getitem__(self, index: slice) -> list[Ranges]: ...
    def __getitem__(self, index: int | slice) -> Ranges | list[Ranges]:
        return [make() for make in self._makers[index]] if isinstance(index, slice) else self._makers[index]()


def classes_of(last: int, sets: Sequence[Ranges]) -> Classes:
    """Classes of the numbers 0 to ``last``.

    Mostly one set is far larger than all the others together. Then their few classes are each cut in two by it, which copies
    stretches of it; otherwise one sweep goes over the borders of all of them.
    """
    spans = [ranges if is_merged(ranges) else merged(ranges) for ranges in sets]
    largest = max(range(len(spans)), key=lambda i: len(spans[i]), default=0)
    others = [() if i == largest else ranges for i, ranges in enumerate(spans)]
    found: dict[int, Callable[[], Ranges]] = {}
    if not spans or len(spans[largest]) < SEARCH * SEARCH * (1 + sum(map(len, others))):
        for signature, ranges in _swept(last, spans).items():
            found[signature] = partial(merged, ranges)
        return Classes(found)
    large = spans[largest]
    for signature, ranges in _swept(last, others).items():
        if not includes(large, ranges):
            found[signature] = partial(subtract, ranges, large)
        if overlap(ranges, large):
            found[signature | 1 << largest] = partial(intersect, ranges, large)
    return Classes(found)


def _swept(last: int, sets: Sequence[Ranges]) -> dict[int, Ranges]:
    borders: list[Range] = []
    for i, ranges in enumerate(sets):
        bit = 1 << i
        for low, high in ranges:
            borders.append((low, bit))
            borders.append((high + 1, bit))
    borders.sort()
    found: dict[int, list[Range]] = {}
    signature, start = 0, 0
    for at, bit in borders:
        if at > start:
            found.setdefault(signature, []).append((start, at - 1))
            start = at
        signature ^= bit
    if start <= last:
        found.setdefault(signature, []).append((start, last))
    return {signature: Merged(ranges) for signature, ranges in found.items()}
