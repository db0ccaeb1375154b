"""Reads the contents of the sets that a listing names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fwcompiler.addresses import LAST, Ranges, covers
from fwcompiler.backend import SetKind
from fwcompiler.kernel import ipset, nftset, runner
from fwcompiler.ruleset import AddressSet

READ_WHOLE = 20_000
"""Entries up to which a set is read back whole. The dump of an nftables set takes time by the square of its size, and what either
kind gives back has to be put in order."""
SAMPLES = 64


def fill_in(kind: SetKind, each: AddressSet, remembered: Mapping[str, Ranges]) -> AddressSet:
    """A listed set with its content: ranges of a static set, members of a dynamic one.

    What is remembered of a large set counts as read where the set has as many entries and says the same about the samples.
    """
    if each.dynamic:
        return replace(each, members=runner.read_members(kind, each.kernel_name, each.version))
    known = remembered.get(each.name, ())
    if len(known) > READ_WHOLE and _agrees(kind, each, known):
        return replace(each, ranges=known)
    return replace(each, ranges=runner.read_set(kind, each.kernel_name, each.version))


def _agrees(kind: SetKind, each: AddressSet, known: Ranges) -> bool:
    """As many entries; and single look-ups at borders spread over the whole set: inside is in, just outside is out."""
    as_many, lookups = (nftset.holds_as_many, nftset.lookups) if kind == "nft" else (ipset.holds_as_many, ipset.lookups)
    if not as_many(each.kernel_name, each.version, known):
        return False
    step = max(1, len(known) // SAMPLES)
    borders = [a for low, high in known[::step] for a in (low, high, low - 1, high + 1) if 0 <= a <= LAST[each.version]]
    return lookups(each.kernel_name, each.version, borders) == [covers(known, address) for address in borders]
