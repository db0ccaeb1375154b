"""What readers of other people's rulesets share: names of tests that no packet field shows, and the last look over a ruleset.

A listing is detected by its content. Readers of both backends use the same canonical texts for the same test, so that one
firewall written twice compares as equal. What a rule changes and a later one tests (marks, sets that rules fill, rewritten
addresses) makes these tests stateful: each has a value of its own in every rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fwcompiler.addresses import LAST, address_text, merged
from fwcompiler.ruleset import (
    AddressSet,
    AnyOf,
    Chain,
    Goto,
    Hook,
    InRanges,
    InSet,
    Jump,
    Limit,
    Match,
    Opaque,
    PortIn,
    PortsIn,
    Rule,
    Ruleset,
    Side,
    Translate,
    Undecided,
    Unknown,
)

Form = Literal["iptables-save", "nft-json", "nft-text", "policy"]
Grade = Literal["exact", "named", "unknown"]
GRADES: tuple[Grade, ...] = ("exact", "named", "unknown")
WITH_PORTS = (6, 17, 33, 132, 136)
"""Protocols whose header begins with two ports: tcp, udp, dccp, sctp, udplite (IANA)."""
TCP_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32, "ecn": 64, "cwr": 128}
MOST_GAPS = 10
LOCAL, BROADCAST = "destination type local", "destination type broadcast"
FRAGMENT = "a fragment behind the first"


_SAVED = re.compile(r"(?m)^\s*(\*[a-z]+\s*$|(-A|-P|-N|-I) \S|(\S*/)?ip6?tables\S*\s+-|(create|add) \S+ [a-z0-9.]+[:.]\S*)")
_NFT_TEXT = re.compile(r"(?m)^\s*(add )?table\s+((ip|ip6|inet|arp|bridge|netdev)\s+)?\S+\s*\{")


def detect(text: str) -> Form:
    """The form of a listing, or that the text is a policy.

    nft's JSON begins with a brace and is about `nftables`; iptables-save has lines with a star and a table's name.
    """
    if text.lstrip().startswith(("{", "[")) and '"nftables"' in text[:10_000]:
        return "nft-json"
    if _SAVED.search(text):
        return "iptables-save"
    return "nft-text" if _NFT_TEXT.search(text) else "policy"


def tcp_flags(mask: int, value: int) -> Opaque:
    """Of the TCP flags in `mask`, those in `value` are set and no others; SYN is 2 (RFC 9293)."""
    if not value and mask.bit_count() == 1:
        return Opaque(f"tcp flags & {mask:#04x} == {mask:#04x}", negated=True)
    return Opaque(f"tcp flags & {mask:#04x} == {value:#04x}")


def mark(kind: Literal["mark", "connmark"], value: int, mask: int = 0xFFFFFFFF) -> Opaque:
    """The packet's (or connection's) mark, under a mask."""
    return Opaque(f"{kind} == {value:#x}" if mask == 0xFFFFFFFF else f"{kind} & {mask:#x} == {value:#x}")


def masked_address(side: Side, version: int, mask: int, value: int, *, negated: bool = False) -> Match:
    """An address under a mask: ranges, or a test by name where the mask's gaps make too many of them."""
    free = LAST[version] & ~mask
    low = (~free & (free + 1)).bit_length() - 1
    gaps = [1 << i for i in range(low, LAST[version].bit_length()) if free >> i & 1]
    if value & free:
        return AnyOf((), negated)
    if len(gaps) > MOST_GAPS:
        return Opaque(f"{side} & {address_text(version, mask)} == {address_text(version, value)}", negated)
    starts = [value]
    for gap in gaps:
        starts += [start | gap for start in starts]
    return InRanges(side, version, merged((start, start | (1 << low) - 1) for start in starts), negated)


def grade(rule: Rule) -> Grade:
    """How well a rule is modelled: exactly; with tests or ends known by name only; or with something not understood."""
    matches = list(_flat(rule.matches))
    if any(isinstance(m, Unknown) for m in matches):
        return "unknown"
    vague = isinstance(rule.verdict, Undecided) or (isinstance(rule.verdict, Translate) and not _fixed(rule.verdict))
    return "named" if vague or any(isinstance(m, Opaque | Limit) for m in matches) else "exact"


def _fixed(verdict: Translate) -> bool:
    if verdict.side == "source":
        return True
    whole = len(verdict.ranges) == 1 and verdict.ranges[0][0] == verdict.ranges[0][1]
    return (verdict.here or whole) and (verdict.ports is None or verdict.ports[0] == verdict.ports[1])


def _flat(matches: Iterable[Match]) -> Iterator[Match]:
    for match in matches:
        yield match
        if isinstance(match, AnyOf):
            for each in match.alternatives:
                yield from _flat(each)


def settle(ruleset: Ruleset, changed: frozenset[str]) -> Ruleset:
    """The last look over a ruleset that was read: calls that lead nowhere or in a circle are unknown; tests of what rules
    themselves change are stateful. `changed` holds such subjects: ``mark``, ``set NAME``, ``destination``, ``port`` …
    """
    known = {c.name: c for c in ruleset.chains}
    circles = _circles(known)
    chains = []
    for chain in ruleset.chains:
        rules = tuple(_settled(chain.name, i, rule, known, circles, changed) for i, rule in enumerate(chain.rules))
        chains.append(replace(chain, rules=rules))
    return replace(ruleset, chains=tuple(chains))


def _settled(
    chain: str, number: int, rule: Rule, known: Mapping[str, Chain], circles: frozenset[tuple[str, int]], changed: frozenset[str]
) -> Rule:
    if changed:
        rule = replace(rule, matches=tuple(_stateful(m, changed) for m in rule.matches))
    if isinstance(rule.verdict, Goto | Jump):
        if rule.verdict.chain not in known:
            return replace(rule, matches=(*rule.matches, Unknown(f"there is no chain {rule.verdict.chain}")), verdict=None)
        if (chain, number) in circles:
            return replace(rule, matches=(*rule.matches, Unknown(f"calls itself through {rule.verdict.chain}")), verdict=None)
    return rule


def _circles(known: Mapping[str, Chain]) -> frozenset[tuple[str, int]]:
    """Rules whose call would come back to a chain that is still being run."""
    found: set[tuple[str, int]] = set()
    done: set[str] = set()

    def visit(name: str, running: tuple[str, ...]) -> None:
        for i, rule in enumerate(known[name].rules):
            if isinstance(rule.verdict, Goto | Jump) and rule.verdict.chain in known:
                called = rule.verdict.chain
                if called in running or len(running) > 200:
                    found.add((name, i))
                elif called not in done:
                    visit(called, (*running, called))
        done.add(name)

    for name in known:
        if name not in done:
            visit(name, (name,))
    return frozenset(found)


def _stateful(match: Match, changed: frozenset[str]) -> Match:
    """The match as an atom of its own where its subject is changed by rules."""
    match match:
        case AnyOf(alternatives, negated):
            return AnyOf(tuple(tuple(_stateful(m, changed) for m in each) for each in alternatives), negated)
        case Opaque(text) if any(text == subject or text.startswith(f"{subject} ") for subject in changed):
            return replace(match, stateful=True)
        case InSet(side, name, _, negated) if f"set {name}" in changed or side in changed:
            return Opaque(f"{side} is a member of {name}, which rules change", negated, True)
        case InRanges(side) | PortIn(side) | PortsIn(side) if (side if isinstance(match, InRanges) else f"{side} port") in changed:
            return Opaque(f"{match}, which rules change", stateful=True)
        case _:
            return match


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of chains and sets with a label in front, where they would clash with somebody else's."""

    label: str
    sets: frozenset[str]

    def chain(self, chain: Chain) -> Chain:
        return Chain(self.label + chain.name, tuple(self._rule(r) for r in chain.rules), chain.hook)

    def set(self, each: AddressSet) -> AddressSet:
        return replace(each, name=self.label + each.name) if each.name in self.sets else each

    def _rule(self, rule: Rule) -> Rule:
        verdict = rule.verdict
        if isinstance(verdict, Goto | Jump):
            verdict = replace(verdict, chain=self.label + verdict.chain)
        matches = tuple(self._match(m) for m in rule.matches) if self.sets else rule.matches
        return replace(rule, matches=matches, verdict=verdict)

    def _match(self, match: Match) -> Match:
        match match:
            case InSet(_, name) if name in self.sets:
                return replace(match, set=self.label + name)
            case AnyOf(alternatives, negated):
                return AnyOf(tuple(tuple(self._match(m) for m in each) for each in alternatives), negated)
            case _:
                return match


def together(first: Ruleset, second: Ruleset, label: str = "2:") -> Ruleset:
    """Two listings of one host (both families of iptables, or iptables beside nftables) as one ruleset.

    Where names clash, the second's get the label in front; address sets that are the same stay one.
    """
    known = {s.name: s for s in first.sets}
    names = {c.name for c in first.chains}
    differing = frozenset(s.name for s in second.sets if s.name in known and s != known[s.name])
    if differing or any(c.name in names for c in second.chains):
        renamed = _Names(label, differing)
        second = replace(second, chains=tuple(map(renamed.chain, second.chains)), sets=tuple(map(renamed.set, second.sets)))
    known |= {s.name: s for s in second.sets}
    return Ruleset((*first.chains, *second.chains), tuple(known.values()), (*first.others, *second.others))


@dataclass(frozen=True, slots=True)
class Stead:
    """Puts our chains, as one ruleset has them, in the place of those that a listing of somebody's iptables has.

    ``is_ours`` tells a chain of ours by its name in the listing, ``name`` says what it is called in ``ours``.
    """

    ours: Ruleset
    is_ours: Callable[[str], bool]
    name: Callable[[str], str]

    def into(self, found: Ruleset) -> Ruleset:
        """Our chains are called from where the listing calls them; where it does not, first of all, as an apply would do it."""
        others = tuple(self._chain(c) for c in found.chains if not self.is_ours(c.name))
        kept = (self._left(c, found) if c.hook else c for c in self.ours.chains)
        ours = tuple(c for c in kept if c is not None)
        return Ruleset((*ours, *others), (*self.ours.sets, *found.sets), (*self.ours.others, *found.others))

    def _chain(self, chain: Chain) -> Chain:
        rules = tuple(r for r in map(self._rule, chain.rules) if r is not None)
        base = next((c for c in self.ours.chains if _same_place(c.hook, chain.hook)), None)
        if base is not None and not any(self._calls(r) for r in chain.rules):
            rules = (*base.rules, *rules)
        return replace(chain, rules=rules)

    def _rule(self, rule: Rule) -> Rule | None:
        if not isinstance(rule.verdict, Goto | Jump) or not self.is_ours(rule.verdict.chain):
            return rule
        called = self.name(rule.verdict.chain)
        known = any(c.name == called for c in self.ours.chains)
        return replace(rule, verdict=replace(rule.verdict, chain=called)) if known else None

    def _calls(self, rule: Rule) -> bool:
        return isinstance(rule.verdict, Goto | Jump) and self.is_ours(rule.verdict.chain)

    def _left(self, base: Chain, found: Ruleset) -> Chain | None:
        """A base chain of ours for the families of which the listing has no such chain."""
        assert base.hook is not None
        there = {c.hook.version for c in found.chains if c.hook and _same_place(c.hook, base.hook)}
        missing = [] if None in there else [v for v in (4, 6) if v not in there]
        if not missing:
            return None
        return base if len(missing) == 2 else replace(base, hook=replace(base.hook, version=missing[0]))


def _same_place(first: Hook | None, second: Hook | None) -> bool:
    """True for base chains that iptables keeps as one: both of a hook, of one table."""
    return (
        first is not None and second is not None and (first.name, first.priority, first.kind) == (second.name, second.priority, second.kind)
    )


def at_present(ruleset: Ruleset, *, but: frozenset[str] = frozenset()) -> Ruleset:
    """The ruleset at the moment it was read: who comes and goes in its sets is who was there. ``but``: names of sets left alone."""
    return replace(ruleset, sets=tuple(s if s.name in but else _at_present(s) for s in ruleset.sets))


def _at_present(each: AddressSet) -> AddressSet:
    members = ((address, address) for address, _ in each.members)
    return replace(each, ranges=merged((*each.ranges, *members)), timeout=None, size=None, members=()) if each.dynamic else each
