"""Address sets cut into atoms, so that everything after speaks in bits instead of addresses.

One sweep over the borders of all sets gives classes: addresses that every set treats alike. A set is then a bit
mask over classes, and 100,000 networks in one set are two classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fwcompiler.addresses import LAST, Addresses, Ranges


@dataclass(frozen=True, slots=True)
class Atoms:
    """The classes of both families; bit `i` of a mask stands for `classes[i]`."""

    classes: tuple[tuple[int, Ranges], ...]
    masks: Mapping[tuple[int, Ranges], int]

    @property
    def everyone(self) -> int:
        """The mask of all addresses."""
        return (1 << len(self.classes)) - 1

    def family(self, version: int) -> int:
        """The mask of all addresses of one family."""
        return sum(1 << i for i, (v, _) in enumerate(self.classes) if v == version)

    def addresses(self, mask: int) -> Addresses:
        """The addresses that a mask stands for."""
        chosen = [c for i, c in enumerate(self.classes) if mask >> i & 1]
        v4 = [ranges for v, ranges in chosen if v == 4]
        v6 = [ranges for v, ranges in chosen if v == 6]
        return Addresses(_join(v4), _join(v6))


def _join(parts: list[Ranges]) -> Ranges:
    if len(parts) <= 1:
        return parts[0] if parts else ()
    return Addresses.of(span for part in parts for span in part).v4


def cut(sets: Iterable[tuple[int, Ranges]]) -> Atoms:
    """The atoms of all given sets, each a family and its merged ranges."""
    classes: list[tuple[int, Ranges]] = []
    masks: dict[tuple[int, Ranges], int] = {}
    wanted = list(dict.fromkeys(sets))
    for version in (4, 6):
        own = [ranges for v, ranges in wanted if v == version]
        for signature, ranges in _sweep(version, own).items():
            bit = 1 << len(classes)
            classes.append((version, ranges))
            for i, each in enumerate(own):
                if signature >> i & 1:
                    masks[version, each] = masks.get((version, each), 0) | bit
    for key in wanted:
        masks.setdefault(key, 0)
    return Atoms(tuple(classes), masks)


def _sweep(version: int, sets: list[Ranges]) -> dict[int, Ranges]:
    """Ranges by signature: which of the sets cover them."""
    borders: list[tuple[int, int]] = []
    for i, ranges in enumerate(sets):
        bit = 1 << i
        for low, high in ranges:
            borders.append((low, bit))
            borders.append((high + 1, bit))
    borders.sort()
    found: dict[int, list[tuple[int, int]]] = {}
    signature, start = 0, 0
    for at, bit in borders:
        if at > start:
            found.setdefault(signature, []).append((start, at - 1))
            start = at
        signature ^= bit
    if start <= LAST[version]:
        found.setdefault(signature, []).append((start, LAST[version]))
    return {s: tuple(ranges) for s, ranges in sorted(found.items())}
