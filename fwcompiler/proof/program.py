"""Runs a neutral ruleset for whole classes of sources at once: every other field of the packet is one point.

Limits are taken as not exhausted, destinations as this host's. A rule with an unknown match decides nothing for
sure; what it might accept or drop is kept apart as `uncertain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fwcompiler.addresses import Ranges, covers
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.atoms import Atoms
from fwcompiler.proof.compose import base_chains
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
    Foreign,
    ForHost,
    Goto,
    InRanges,
    InSet,
    Interface,
    Jump,
    Limit,
    Match,
    OverLimit,
    PortIn,
    ProtocolIs,
    Rewritten,
    Rule,
    Ruleset,
    SetDscp,
    State,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Unknown,
    Untrack,
    redirected,
)


@dataclass(frozen=True, slots=True)
class Point:
    """Everything about a packet but its source. `destination` None: an address of this host, not loopback.

    `rewritten`: a rule of ours gave it another port on its way.
    """

    protocol: int
    port: int = 0
    icmp_type: int = 0
    state: State = "new"
    interface: str = "eth0"
    destination: tuple[int, int] | None = None
    source_port: int = 40000
    rewritten: bool = False


@dataclass
class Outcome:
    """Which classes of sources a ruleset accepts, by the service that accepts them, and which it drops.

    Those in `untracked` are left alone by connection tracking, those in `redirected` go on to another port of this host.
    """

    accepted: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    uncertain: int = 0
    untracked: int = 0
    redirected: dict[int, int] = field(default_factory=dict)

    def accepts(self) -> int:
        """The mask of all classes that are accepted."""
        total = 0
        for mask in self.accepted.values():
            total |= mask
        return total


class Program:
    """A ruleset made ready to run over the classes of `atoms`."""

    def __init__(self, ruleset: Ruleset, atoms: Atoms) -> None:
        self._chains: Mapping[str, Chain] = {c.name: c for c in ruleset.chains}
        self._sets: Mapping[str, AddressSet] = {s.name: s for s in ruleset.sets}
        self._atoms = atoms
        self._ruleset = ruleset
        self._families = {version: atoms.family(version) for version in (4, 6)}

    def run(self, point: Point, hook: str = "input") -> Outcome:
        """Send all sources through the base chains of a hook; a drop in one is final, an accept goes on to the next."""
        outcome = Outcome()
        services = {"": self._atoms.everyone}
        parts = {point: self._atoms.everyone}
        for chain, where in base_chains(self._ruleset, hook):
            each = Outcome()
            for now, mask in parts.items():
                left = self._chain(chain, now, mask, each, 0)
                ending = each.accepted if where.policy == "accept" else each.dropped
                ending[""] = ending.get("", 0) | left
            for service, mask in each.dropped.items():
                outcome.dropped[service] = outcome.dropped.get(service, 0) | mask
            outcome.uncertain |= each.uncertain
            services = each.accepted
            parts = self._behind(parts, each)
        alive = sum(parts.values())
        outcome.accepted = {s: m & alive for s, m in services.items() if m & alive}
        return outcome

    def _behind(self, parts: Mapping[Point, int], each: Outcome) -> dict[Point, int]:
        """Behind a chain: what it let through, by whether connection tracking looks at it, and by the port it goes on to."""
        found: dict[Point, int] = {}
        for point, mask in parts.items():
            left = mask & each.accepts()
            for port, moved in each.redirected.items():
                if left & moved:
                    there = replace(point, port=port, rewritten=True)
                    found[there] = found.get(there, 0) | left & moved
                    left &= ~moved
            for now, part in ((replace(point, state="untracked"), left & each.untracked), (point, left & ~each.untracked)):
                if part:
                    found[now] = found.get(now, 0) | part
        return found

    def _chain(self, chain: Chain, point: Point, mask: int, outcome: Outcome, depth: int) -> int:
        """Classes that come out at the end of the chain (or by `return`)."""
        returned = 0
        for rule in chain.rules:
            if not mask:
                break
            taken, unsure = self._taken(rule, point, mask)
            outcome.uncertain |= unsure
            if not taken or rule.verdict is None:
                continue
            match rule.verdict:
                case Final.ACCEPT:
                    outcome.accepted[rule.service] = outcome.accepted.get(rule.service, 0) | taken
                case Final.DROP | Final.REJECT:
                    outcome.dropped[rule.service] = outcome.dropped.get(rule.service, 0) | taken
                case Final.RETURN:
                    returned |= taken
                case Goto(name):
                    returned |= self._call(name, point, taken, outcome, depth)
                case Untrack():
                    outcome.untracked |= taken
                    continue
                case SetDscp():
                    continue
                case Translate(ports=(port, _)) if rule.verdict == redirected(port):
                    outcome.redirected[port] = outcome.redirected.get(port, 0) | taken
                    outcome.accepted[""] = outcome.accepted.get("", 0) | taken
                case Translate() | Undecided():
                    # Only `proof.host` follows these.
                    outcome.uncertain |= taken
                    continue
                case Jump(name):
                    mask = mask & ~taken | self._call(name, point, taken, outcome, depth)
                    continue
            mask &= ~taken
        return mask | returned

    def _call(self, name: str, point: Point, mask: int, outcome: Outcome, depth: int) -> int:
        chain = self._chains.get(name)
        if chain is None or depth > 16:
            outcome.uncertain |= mask
            return mask
        return self._chain(chain, point, mask, outcome, depth + 1)

    def _taken(self, rule: Rule, point: Point, mask: int) -> tuple[int, int]:
        """Classes for which all matches hold, and classes for which an unknown match decides."""
        unsure = False
        for match in rule.matches:
            if isinstance(match, Unknown | Foreign):
                unsure = True
            else:
                mask &= self._match(match, point)
            if not mask:
                return 0, 0
        return (0, mask) if unsure else (mask, 0)

    def _match(self, match: Match, point: Point) -> int:
        everyone = self._atoms.everyone
        match match:
            case InSet(side, name, version, negated):
                known = self._sets.get(name)
                return self._addresses(side, version, known.ranges if known else (), negated, point)
            case InRanges(side, version, ranges, negated):
                return self._addresses(side, version, ranges, negated, point)
            case Family(version):
                return self._families[version]
            case Interface(way, name, negated):
                return everyone if way == "in" and (point.interface == name) != negated else 0
            case ProtocolIs(protocol, negated):
                return everyone if (point.protocol == protocol) != negated else 0
            case PortIn(side, transport, (low, high), negated):
                port = point.port if side == "destination" else point.source_port
                return everyone if point.protocol == PROTOCOLS[transport] and (low <= port <= high) != negated else 0
            case StateIn(states, negated):
                return everyone if (point.state in states) != negated else 0
            case TypeIn(version, types):
                icmp = PROTOCOLS["icmp" if version == 4 else "icmpv6"]
                return self._families[version] if point.protocol == icmp and point.icmp_type in types else 0
            case Rewritten(_, negated):
                return everyone if point.rewritten != negated else 0
            case Limit() | ForHost():
                return everyone
            case OverLimit():
                return 0
            case Unknown() | Foreign():
                return everyone

    def _addresses(self, side: str, version: int, ranges: Ranges, negated: bool, point: Point) -> int:
        family = self._families[version]
        if side == "source":
            mask = self._atoms.masks[version, ranges]
            return family & ~mask if negated else mask
        if point.destination is None:
            return family if negated else 0
        inside = point.destination[0] == version and covers(ranges, point.destination[1])
        return family if inside != negated else 0


def sets_of(ruleset: Ruleset) -> list[tuple[int, Ranges]]:
    """Every set of source addresses that a ruleset speaks of, for `atoms.cut`."""
    found = [(s.version, s.ranges) for s in ruleset.sets]
    inline = (m for c in ruleset.chains for r in c.rules for m in r.matches if isinstance(m, InRanges))
    return [*found, *((m.version, m.ranges) for m in inline), (4, ()), (6, ())]
