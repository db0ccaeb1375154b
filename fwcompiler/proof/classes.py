"""Numbers cut into classes that every one of several sets treats alike: the one step whose cost grows with the sets."""

from __future__ import annotations

from collections.abc import Sequence

from fwcompiler.addresses import SEARCH, Merged, Range, Ranges, intersect, is_merged, merged, subtract


def by_signature(last: int, sets: Sequence[Ranges]) -> dict[int, Ranges]:
    """The numbers 0 to ``last`` by signature: bit `i` is set where ``sets[i]`` holds them.

    Mostly one set is far larger than all the others together. Then their few classes are each cut in two by it, which copies
    stretches of it; otherwise one sweep goes over the borders of all of them.
    """
    spans = [ranges if is_merged(ranges) else merged(ranges) for ranges in sets]
    largest = max(range(len(spans)), key=lambda i: len(spans[i]), default=0)
    others = [() if i == largest else ranges for i, ranges in enumerate(spans)]
    if not spans or len(spans[largest]) < SEARCH * SEARCH * (1 + sum(map(len, others))):
        return _swept(last, spans)
    found: dict[int, Ranges] = {}
    for signature, ranges in _swept(last, others).items():
        found[signature] = subtract(ranges, spans[largest])
        found[signature | 1 << largest] = intersect(ranges, spans[largest])
    return {signature: ranges for signature, ranges in found.items() if ranges}


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
