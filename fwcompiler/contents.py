"""Contents of sets, compared with one another and written down: what takes time with 100,000 ranges is done on their packed form."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache

from fwcompiler.addresses import MANY, Merged, Range, Ranges, merged


@lru_cache(maxsize=4)
def difference(before: Ranges, after: Ranges) -> tuple[Ranges, Ranges]:
    """The ranges that only `before` has, and those that only `after` has, as they stand; nothing is cut or joined.

    Beginning and end are passed over while they are the same, in large sets mostly all there is. The plan asks, and then
    who words what it means.
    """
    start = end = 0
    if isinstance(before, Merged) and isinstance(after, Merged) and max(len(before), len(after)) > MANY:
        with suppress(OverflowError):  # IPv6
            start = _common(before.words, after.words) // 8
            end = min(_common(before.words[::-1], after.words[::-1]) // 8, min(len(before), len(after)) - start)
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    was, now = frozenset(old), frozenset(new)
    return tuple(r for r in old if r not in now), tuple(r for r in new if r not in was)


def _common(a: bytes, b: bytes) -> int:
    """How many bytes two texts have in common from their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def packed(ranges: Ranges) -> str | list[Range]:
    """Ranges for a file: those of IPv4 as hexadecimal words in network order, since 100,000 pairs of numbers take JSON 80 ms."""
    try:
        return (ranges if isinstance(ranges, Merged) else Merged(ranges)).words.hex()
    except OverflowError:
        return list(ranges)


def unpacked(written: str | list[list[int]]) -> Ranges:
    """What :func:`packed` wrote.

    Raises:
        ValueError, TypeError: it is nothing of that kind.
    """
    if isinstance(written, str):
        return Merged.of_words(bytes.fromhex(written))
    return merged((low, high) for low, high in written)
