"""What members of a group at run time gain and lose: whoever is let in later, not only addresses that are written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fwcompiler.addresses import LAST, Ranges, covers
from fwcompiler.proof.access import Access, compare
from fwcompiler.ruleset import AddressSet, InRanges, Ruleset

SUFFIX = ".dynamic.v"
"""Stands between a group's name and its family in the name of a set of members."""


@dataclass(frozen=True, slots=True)
class MemberAccess:
    """What every dynamic member of a group may open. `at`: the address behind an edge; empty for the host itself."""

    group: str
    to: str
    service: str | None
    at: str = ""


def compare_members(before: Ruleset, after: Ruleset) -> tuple[tuple[MemberAccess, ...], tuple[MemberAccess, ...]]:
    """What members at run time gain, and what they lose, that strangers do not: by group, whoever the members are.

    A member is an address in no other set; what a stranger gains or loses is everybody's and told elsewhere.
    """

    def between(first: Ruleset, second: Ruleset) -> tuple[Sequence[Access], Sequence[Access]]:
        change = compare(first, second)
        return change.gained, change.lost

    return members_apart(before, after, between)


def members_apart(
    before: Ruleset, after: Ruleset, between: Callable[[Ruleset, Ruleset], tuple[Sequence[Access], Sequence[Access]]]
) -> tuple[tuple[MemberAccess, ...], tuple[MemberAccess, ...]]:
    """The same by any comparison that says what is gained, and what is lost."""
    gained: list[MemberAccess] = []
    lost: list[MemberAccess] = []
    sets = [s for ruleset in (before, after) for s in ruleset.sets if s.dynamic and SUFFIX in s.name]
    for group in sorted({s.name.partition(SUFFIX)[0] for s in sets}):
        version = min(s.version for s in sets if s.name.startswith(group + SUFFIX))
        member, stranger = _strangers(version, before, after)
        more, less = between(*(_with_member(ruleset, f"{group}{SUFFIX}{version}", member) for ruleset in (before, after)))
        for parts, found in ((more, gained), (less, lost)):
            mine = (p for p in parts if (version, member) in p.addresses and (version, stranger) not in p.addresses)
            found += [MemberAccess(group, p.to, p.service, p.at) for p in mine]
    return tuple(gained), tuple(lost)


def _with_member(ruleset: Ruleset, name: str, member: int) -> Ruleset:
    """The ruleset with one address in a set of members and none in all other sets."""
    return replace(ruleset, sets=tuple(_filled(s, ((member, member),) if s.name == name else ()) for s in ruleset.sets))


def _filled(each: AddressSet, ranges: Ranges) -> AddressSet:
    return replace(each, ranges=ranges, timeout=None, size=None, members=())


def _strangers(version: int, *rulesets: Ruleset) -> tuple[int, int]:
    """Two addresses that no rule names."""
    named = [m.ranges for m in _inline(rulesets) if m.version == version]
    free = (a for a in _candidates(version) if not any(covers(ranges, a) for ranges in named))
    return next(free), next(free)


def _inline(rulesets: tuple[Ruleset, ...]) -> Iterator[InRanges]:
    return (m for r in rulesets for c in r.chains for rule in c.rules for m in rule.matches if isinstance(m, InRanges))


def _candidates(version: int) -> Iterator[int]:
    """Addresses spread over the whole family."""
    return (LAST[version] // 65537 * number for number in range(1, 65537))
