"""Reads the contents of the sets that a listing names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fwcompiler.addresses import LAST, Ranges, covers
from fwcompiler.backend import SetKind
from fwcompiler.kernel import nftset, runner
from fwcompiler.ruleset import AddressSet

READ_WHOLE = 20_000
"""Entries up to which an nftables set is read back whole; its dump takes time by the square of its size."""
SAMPLES = 64


def fill_in(kind: SetKind, each: AddressSet, remembered: Mapping[str, Ranges]) -> AddressSet:
    """A listed set with its content: ranges of a static set, members of a dynamic one."""
    if each.dynamic:
        return replace(each, members=runner.read_members(kind, each.kernel_name, each.version))
    known = remembered.get(each.name, ())
    if kind == "nft" and len(known) > READ_WHOLE and _agrees(each, known):
        return replace(each, ranges=known)
    return replace(each, ranges=runner.read_set(kind, each.kernel_name, each.version))


def _agrees(each: AddressSet, known: Ranges) -> bool:
    """Single look-ups at borders spread over the whole set: inside is in, just outside is out."""
    step = max(1, len(known) // SAMPLES)
    borders = [a for low, high in known[::step] for a in (low, high, low - 1, high + 1) if 0 <= a <= LAST[each.version]]
    return nftset.lookups(each.kernel_name, each.version, borders) == [covers(known, address) for address in borders]
