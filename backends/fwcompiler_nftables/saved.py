"""What admins save of a host that filters with nftables: ``nft -j list ruleset``, or the listing of one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fwcompiler.addresses import merged, parse_address
from fwcompiler.backend import Saved
from fwcompiler.foreign import together
from fwcompiler.ruleset import AddressSet, Ruleset
from fwcompiler_nftables.foreign import read_nft
from fwcompiler_nftables.foreign_values import plain, span_of
from fwcompiler_nftables.parse import FAMILY, NAME, parse_listing

Json = Any
OURS = f"{FAMILY}/{NAME}/"
"""Begins the names of chains and sets of our table in a listing of all tables."""


def read_foreign(saved: Sequence[Saved], ours: Ruleset | None) -> Ruleset:
    """See `fwcompiler.backend.Backend.foreign`."""
    found = Ruleset()
    for number, each in enumerate(saved, 1):
        found = together(found, read_nft(each.text, each.file), f"{number}:")
    if ours is None:
        return found
    chains = tuple(c for c in found.chains if not c.name.startswith(OURS))
    sets = tuple(s for s in found.sets if not s.name.startswith(OURS))
    return together(ours, Ruleset(chains, sets, found.others))


def read_own(saved: Sequence[Saved]) -> Ruleset:
    """See `fwcompiler.backend.Backend.own`."""
    for each in saved:
        found = _parsed(each.text)
        if found:
            return found
    return Ruleset()


def _parsed(text: str) -> Ruleset:
    try:
        objects = json.loads(text)["nftables"]
        found = parse_listing(text)
        contents = {v["name"]: list(v.get("elem", ())) for v in _sets(objects)}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no listing of nft's: {error!r}") from error
    static = [s for s in found.sets if not s.dynamic]
    if static and not any(contents[s.kernel_name] for s in static):
        raise ValueError("the content of the sets is not in it; save it without nft's option -t")
    return replace(found, sets=tuple(_filled(s, contents[s.kernel_name]) for s in found.sets))


def _sets(objects: Sequence[Json]) -> Iterator[Json]:
    for item in objects:
        value = item.get("set", {})
        if (value.get("family"), value.get("table")) == (FAMILY, NAME):
            yield value


def _filled(each: AddressSet, elements: Sequence[Json]) -> AddressSet:
    if not each.dynamic:
        return replace(each, ranges=merged(span_of(each.version, plain(e)) for e in elements))
    return replace(each, members=tuple(sorted(_member(e) for e in elements)))


def _member(element: Json) -> tuple[int, int | None]:
    """A member and the milliseconds it had left; nft prints whole seconds."""
    seconds = element["elem"].get("expires") if isinstance(element, dict) and "elem" in element else None
    return parse_address(plain(element))[1], None if seconds is None else seconds * 1000
