"""Who may open what on hosts behind an edge: the access that its NAT and its forward hook grant together.

A place is an address behind the edge. IPv4 places are where the edge's own address is sent on to; others are what the forward
rules name. Packets come in at the wan and leave at the lan, which the rules themselves say.

Whoever has a route can also send to what stands behind by its own address, past the edge's NAT. What is let in so and not by the
edge's address is told apart, for addresses that rules name and for one that stands for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from fwcompiler.addresses import LAST, address_text, covers, merged, range_text
from fwcompiler.proof.atoms import Atoms
from fwcompiler.proof.program import Outcome, Point, Program
from fwcompiler.ruleset import Chain, Final, Goto, Hook, InRanges, InSet, Interface, Rule, Ruleset, Translate

INBOUND = "inbound"
"""The chain for what comes from wan to lan."""
OTHERS = {4: "other IPv4 addresses behind", 6: "other IPv6 addresses behind"}
_FIRST_OTHER = {4: 0xC6120000, 6: 0x2001_0002 << 96}
"""Where an address is looked for that no rule names (RFC 2544 and RFC 5180: kept for benchmarks)."""
Place = tuple[int, int]
"""Family and address."""
Direct = tuple[int, int, str]
"""Family, an address, and what it stands for in words: itself, a range that a rule names, or all addresses that none does."""


class Beyond:
    """A ruleset's way through, made ready to run over the classes of `atoms`; without an edge there are no places."""

    def __init__(self, ruleset: Ruleset, atoms: Atoms) -> None:
        self._atoms = atoms
        ways = _way(ruleset)
        self._wan, lan = ways or ("", "")
        self._sent = {address: i for i, address in enumerate(_targets(ruleset))} if ways else {}
        self._nat = Program(_hooked(ruleset, "prerouting", _named), atoms)
        self._forward = Program(_hooked(ruleset, "forward", lambda rule: _leaving(rule, lan)), atoms)
        self._own = _own_address(ruleset)
        direct = _destinations(ruleset)
        others = (place for place in direct if place[0] == 6 or place[1] not in self._sent)
        self.places: tuple[Place, ...] = tuple(dict.fromkeys((*((4, a) for a in self._sent), *others))) if ways else ()

    def sent(self, point: Point) -> dict[int, int]:
        """By target, the classes of sources whose packets to the edge's own address are sent on there."""
        if self._own is None or not self._sent:
            return {}
        accepted = self._nat.run(replace(point, interface=self._wan, destination=(4, self._own))).accepted
        return {a: mask for a in self._sent if (mask := accepted.get(_label(a), 0))}

    def directly(self, point: Point, place: Direct) -> Outcome:
        """What becomes of packets that are sent to an address behind, not to the edge's own."""
        if not self._wan:
            return Outcome()
        passed = self._forward.run(replace(point, interface=self._wan, destination=place[:2]))
        family = self._atoms.family(place[0])
        return Outcome({service: mask & family for service, mask in passed.accepted.items() if mask & family})

    def outcome(self, point: Point, place: Place) -> Outcome:
        """What becomes of packets that go to a place."""
        if place not in self.places:
            return Outcome()
        version, address = place
        passed = self._forward.run(replace(point, interface=self._wan, destination=place))
        come = self.sent(point).get(address, 0) if version == 4 and address in self._sent else self._atoms.family(version)
        return Outcome({service: mask & come for service, mask in passed.accepted.items() if mask & come})


def _destinations(ruleset: Ruleset) -> Iterator[Place]:
    """Single addresses that the rules for what comes in name as destinations."""
    for m in _named_destinations(ruleset):
        if len(m.ranges) == 1 and m.ranges[0][0] == m.ranges[0][1]:
            yield m.version, m.ranges[0][0]


def _named_destinations(ruleset: Ruleset) -> Iterator[InRanges]:
    for chain in ruleset.chains:
        for rule in chain.rules if chain.name == INBOUND or (chain.hook and chain.hook.name == "forward") else ():
            yield from (m for m in rule.matches if isinstance(m, InRanges) and m.side == "destination")


def direct_places(*edges: tuple[Ruleset, Beyond]) -> tuple[Direct, ...]:
    """Where packets may be sent past NAT that `Beyond.places` does not say already; none where nothing is an edge."""
    if not any(beyond.places for _, beyond in edges):
        return ()
    matches = dict.fromkeys(m for ruleset, _ in edges for m in _named_destinations(ruleset))
    named = {version: merged(r for m in matches if m.version == version for r in m.ranges) for version in (4, 6)}
    found: dict[str, Direct] = {}
    for _, beyond in edges:
        found |= {address_text(*place): (*place, address_text(*place)) for place in beyond.places if place[0] == 4}
    for m in matches:
        for low, high in m.ranges if not m.negated else ():
            if low != high:
                found[range_text(m.version, (low, high))] = (m.version, high, range_text(m.version, (low, high)))
    for version in (4, 6):
        nobody = next(a for a in range(_FIRST_OTHER[version], LAST[version]) if not covers(named[version], a))
        found[OTHERS[version]] = (version, nobody, OTHERS[version])
    return tuple(found.values())


def _way(ruleset: Ruleset) -> tuple[str, str] | None:
    """Interfaces of the rule that leads to what comes in: the wan, the lan."""
    for chain in ruleset.chains:
        for rule in chain.rules:
            names = {m.way: m.name for m in rule.matches if isinstance(m, Interface)}
            if rule.verdict == Goto(INBOUND) and len(names) == 2:
                return names["in"], names["out"]
    return None


def _targets(ruleset: Ruleset) -> Iterator[int]:
    verdicts = (r.verdict for c in ruleset.chains for r in c.rules)
    yield from dict.fromkeys(v.ranges[0][0] for v in verdicts if isinstance(v, Translate) and v.side == "destination" and v.ranges)


def _own_address(ruleset: Ruleset) -> int | None:
    """An address that is sent on from: the first of the set that the NAT rules ask about."""
    sets = {s.name: s for s in ruleset.sets}
    for chain in ruleset.chains:
        for rule in chain.rules:
            for m in rule.matches:
                if isinstance(m, InSet) and m.side == "destination" and m.version == 4 and m.set in sets and sets[m.set].ranges:
                    return sets[m.set].ranges[0][0]
    return None


def _hooked(ruleset: Ruleset, hook: str, change: Callable[[Rule], Rule | None]) -> Ruleset:
    """The chains of one hook alone, at the hook that a program runs."""
    chains: list[Chain] = []
    for chain in ruleset.chains:
        rules = tuple(changed for rule in chain.rules if (changed := change(rule)) is not None)
        here = chain.hook is not None and chain.hook.name == hook and (hook == "forward" or chain.hook.kind == "nat")
        policy = "drop" if hook == "prerouting" else chain.hook.policy if chain.hook else "drop"
        chains.append(Chain(chain.name, rules, Hook("input", 0, policy) if here else None))
    return replace(ruleset, chains=tuple(chains))


def _label(address: int) -> str:
    return f"to {address}"


def _named(rule: Rule) -> Rule | None:
    """A translation as an accept that tells where to."""
    if isinstance(rule.verdict, Translate) and rule.verdict.ranges:
        return replace(rule, verdict=Final.ACCEPT, service=_label(rule.verdict.ranges[0][0]))
    return rule


def _leaving(rule: Rule, lan: str) -> Rule | None:
    """A rule as packets meet it that leave at the lan."""
    if any(isinstance(m, Interface) and m.way == "out" and (m.name == lan) == m.negated for m in rule.matches):
        return None
    return replace(rule, matches=tuple(m for m in rule.matches if not (isinstance(m, Interface) and m.way == "out")))
