"""What readers of other people's rulesets share: names of tests that no packet field shows, and the last look over a ruleset.

A listing is detected by its content. Readers of both backends use the same canonical texts for the same test, so that one
firewall written twice compares as equal. What a rule changes and a later one tests (marks, sets that rules fill, rewritten
addresses) makes these tests stateful: each has a value of its own in every rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fwcompiler.addresses import LAST, address_text, merged
from fwcompiler.ruleset import (
    AddressSet,
    AnyOf,
    Chain,
    Goto,
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

Form = Literal["iptables-save", "nft-json", "nft-text"]
Grade = Literal["exact", "named", "unknown"]
GRADES: tuple[Grade, ...] = ("exact", "named", "unknown")
WITH_PORTS = (6, 17, 33, 132, 136)
"""Protocols whose header begins with two ports: tcp, udp, dccp, sctp, udplite (IANA)."""
TCP_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32, "ecn": 64, "cwr": 128}
MOST_GAPS = 10
LOCAL, BROADCAST = "destination type local", "destination type broadcast"
FRAGMENT = "a fragment behind the first"


def detect(text: str) -> Form:
    """The form of a listing: nft's JSON begins with a brace, iptables-save has lines with a star and a table's name."""
    if text.lstrip().startswith(("{", "[")):
        return "nft-json"
    lines = [line.strip() for line in text.splitlines()]
    saved = any(line.startswith("*") and line[1:].strip().isidentifier() for line in lines)
    return "iptables-save" if saved or any(line.startswith(("-A ", "-P ", "-N ")) for line in lines) else "nft-text"


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
    prefix: str

    def chain(self, chain: Chain) -> Chain:
        return Chain(self.prefix + chain.name, tuple(self._rule(r) for r in chain.rules), chain.hook)

    def _rule(self, rule: Rule) -> Rule:
        verdict = rule.verdict
        if isinstance(verdict, Goto | Jump):
            verdict = replace(verdict, chain=self.prefix + verdict.chain)
        return replace(rule, verdict=verdict)


def together(first: Ruleset, second: Ruleset) -> Ruleset:
    """Two listings of one host (both families of iptables, or iptables beside nftables) as one ruleset.

    Chains of the second get names of their own where they would clash; address sets of one name are one set.
    """
    names = {c.name for c in first.chains}
    clash = any(c.name in names for c in second.chains)
    chains: Sequence[Chain] = [_Names("2:").chain(c) for c in second.chains] if clash else second.chains
    sets: dict[str, AddressSet] = {s.name: s for s in (*first.sets, *second.sets)}
    return Ruleset((*first.chains, *chains), tuple(sets.values()), (*first.others, *second.others))
