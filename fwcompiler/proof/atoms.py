"""Address sets cut into atoms, so that everything after speaks in bits instead of addresses.

One sweep over the borders of all sets gives classes: addresses that every set treats alike. A set is then a bit
mask over classes, and 100,000 networks in one set are two classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fwcompiler.addresses import LAST, Addresses, Ranges, merged, subtract
from fwcompiler.proof.classes import classes_of


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
        return Addresses(self._ranges(4, mask), self._ranges(6, mask))

    def _ranges(self, version: int, mask: int) -> Ranges:
        """Put together, or everything less the others, whichever is less work."""
        chosen: list[Ranges] = []
        others: list[Ranges] = []
        for i, (v, ranges) in enumerate(self.classes):
            if v == version:
                (chosen if mask >> i & 1 else others).append(ranges)
        if sum(map(len, others)) < sum(map(len, chosen)):
            return subtract(((0, LAST[version]),), _join(others))
        return _join(chosen)


def _join(parts: list[Ranges]) -> Ranges:
    return parts[0] if len(parts) == 1 else merged(span for part in parts for span in part)


def cut(sets: Iterable[tuple[int, Ranges]]) -> Atoms:
    """The atoms of all given sets, each a family and its merged ranges."""
    classes: list[tuple[int, Ranges]] = []
    masks: dict[tuple[int, Ranges], int] = {}
    wanted = list(dict.fromkeys(sets))
    for version in (4, 6):
        own = [ranges for v, ranges in wanted if v == version]
        found = classes_of(LAST[version], own)
        for signature, ranges in sorted(zip(found.signatures, found, strict=True)):
            bit = 1 << len(classes)
            classes.append((version, ranges))
            for i, each in enumerate(own):
                if signature >> i & 1:
                    masks[version, each] = masks.get((version, each), 0) | bit
    for key in wanted:
        masks.setdefault(key, 0)
    return Atoms(tuple(classes), masks)
