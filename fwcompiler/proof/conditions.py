"""Matches of any ruleset, foreign ones included, as alternatives of conditions: at least one of them holds in full.

Where a packet is met matters: an output interface exists only behind routing, and before connection tracking every state
is `invalid`. A test that no field shows becomes an atom; the output interface of a forwarded packet is told by atoms as
well, the first that holds in the order of `outs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from fwcompiler.addresses import merged
from fwcompiler.foreign import LOCAL, WITH_PORTS
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.compose import limit_text, over_text, rewritten_side
from fwcompiler.proof.space import DESTINATION, INTERFACE, PORT, PROTOCOL, SOURCE, SOURCE_PORT, STATE, TYPE, Condition
from fwcompiler.ruleset import (
    AddressSet,
    AnyOf,
    Family,
    Foreign,
    ForHost,
    Hook,
    HookName,
    InRanges,
    InSet,
    Interface,
    InterfaceIn,
    Limit,
    Match,
    Opaque,
    OverLimit,
    PortIn,
    PortsIn,
    ProtocolIn,
    ProtocolIs,
    Rewritten,
    Ruleset,
    StateIn,
    TypeIn,
    Unknown,
)

SIDE = {"source": SOURCE, "destination": DESTINATION}
PORT_SIDE = {"source": SOURCE_PORT, "destination": PORT}
MOST = 4096
"""Alternatives that one rule may become; one with more is an atom."""
MOST_OUTS = 40
CONNTRACK = -200
"""The priority of connection tracking at prerouting and output (NF_IP_PRI_CONNTRACK)."""

Alternatives = list[list[Condition]]
"""Any of these, each all of its conditions; empty: never, one empty list: always."""
NEVER: Alternatives = []
ALWAYS: Alternatives = [[]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where on its way a packet is met."""

    hook: HookName
    tracked: bool = True
    forwarded: bool = False

    @staticmethod
    def of(hook: Hook, *, forwarded: bool = False) -> Place:
        """Where a base chain is. ``forwarded``: on the way of packets that pass through."""
        tracked = hook.kind == "nat" or hook.name not in ("prerouting", "output") or hook.priority > CONNTRACK
        return Place(hook.name, tracked, forwarded)


def outs(ruleset: Ruleset) -> tuple[str, ...]:
    """Output interfaces that a ruleset speaks of: exact names first, then patterns, the longest first."""
    names: set[str] = set()

    def collect(matches: Iterable[Match]) -> None:
        for match in matches:
            match match:
                case Interface("out", name):
                    names.add(name)
                case InterfaceIn("out", several):
                    names.update(several)
                case AnyOf(alternatives):
                    for each in alternatives:
                        collect(each)
                case _:
                    pass

    for chain in ruleset.chains:
        for rule in chain.rules:
            collect(rule.matches)
    return ordered(names)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Interface names in the order in which they are told apart."""
    return tuple(sorted(set(names), key=lambda n: (n.endswith("*"), -len(n) if n.endswith("*") else 0, n)))


def fits(pattern: str, name: str) -> bool:
    """True when an interface of that name (or all of a pattern) is meant by a name or pattern."""
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def out_text(name: str) -> str:
    """The atom of an output interface."""
    return f"out interface is {name}"


@dataclass
class Conditions:
    """Turns matches into alternatives, numbering stateful atoms of equal text in the order in which they are met."""

    sets: Mapping[str, AddressSet]
    version: int
    outs: Sequence[str]
    _seen: dict[str, int] = field(default_factory=dict)

    def rule(self, matches: Sequence[Match], place: Place) -> Alternatives:
        """All of the matches hold."""
        if any(self._other_family(m) for m in matches):
            return NEVER
        found = [self.match(m, place, last=i == len(matches) - 1) for i, m in enumerate(matches)]
        size = 1
        for each in found:
            size *= len(each)
        if size > MOST:
            return [[self.atom(f"too many alternatives: {' '.join(map(str, matches))[:200]}")]]
        return [[c for part in parts for c in part] for parts in product(*found)]

    def match(self, match: Match, place: Place, *, last: bool = True) -> Alternatives:
        """What one match asks. A limit that stands before other tests counts packets that the rule is not about."""
        early = "" if last else ", before other tests"
        if self._other_family(match):
            return NEVER
        match match:
            case OverLimit():
                return [[Condition(SOURCE, atom=over_text(match) + early)]]
            case ForHost():
                return [[Condition(SOURCE, atom=LOCAL)]]
            case InSet() | InRanges() | Family():
                return [self._addresses(match)]
            case Interface(way, name, negated):
                return self._interface(way, (name,), negated, place)
            case ProtocolIs(number, negated):
                return [[Condition(PROTOCOL, ((number, number),), negated)]]
            case PortIn(side, protocol, span, negated):
                return [[_protocols((PROTOCOLS[protocol],)), Condition(PORT_SIDE[side], (span,), negated)]]
            case StateIn(states, negated):
                return self._state(match, place) if not place.tracked else [[Condition(STATE, frozenset(states), negated)]]
            case TypeIn(version, types):
                return [[_protocols((1 if version == 4 else 58,)), Condition(TYPE, merged((t, t) for t in types))]]
            case Limit():
                return [[self.atom(limit_text(match) + early)]]
            case Rewritten(side, negated):
                return [[Condition(SOURCE, negated=negated, atom=rewritten_side(side))]]
            case Unknown(text):
                return [[self.atom(f"unknown: {text}")]]
            case Foreign():
                return self._foreign(match, place)

    def _other_family(self, match: Match) -> bool:
        """A rule of the other family counts nothing, so its atoms must not be numbered."""
        return isinstance(match, InSet | InRanges | Family | TypeIn | OverLimit) and match.version != self.version

    def _addresses(self, match: InSet | InRanges | Family) -> list[Condition]:
        match match:
            case InSet(side, name, _, negated):
                known = self.sets.get(name)
                if known is None or known.dynamic:
                    return [Condition(SIDE[side], negated=negated, atom=f"{side} is a member of {name}")]
                return [Condition(SIDE[side], known.ranges, negated)]
            case InRanges(side, _, ranges, negated):
                return [Condition(SIDE[side], ranges, negated)]
            case Family():
                return []

    def _foreign(self, match: Foreign, place: Place) -> Alternatives:
        match match:
            case ProtocolIn(spans, negated):
                return [[Condition(PROTOCOL, spans, negated)]]
            case PortsIn(side, (), spans, negated):
                # Read whatever the protocol is: only some have ports there.
                other = replace(_protocols(WITH_PORTS), negated=True)
                bytes_there = Condition(SOURCE, negated=negated, atom=f"where others have the {side} port: {_numbers(spans)}")
                return [[_protocols(WITH_PORTS), Condition(PORT_SIDE[side], spans, negated)], [other, bytes_there]]
            case PortsIn(side, protocols, spans, negated):
                return [[_protocols(protocols), Condition(PORT_SIDE[side], spans, negated)]]
            case InterfaceIn(way, names, negated):
                return self._interface(way, names, negated, place)
            case AnyOf(alternatives, negated):
                either = [c for each in alternatives for c in self.rule(each, place)]
                return self._negated(either, match) if negated else either
            case Opaque(text, negated, stateful):
                return [[self.atom(text, negated)]] if stateful else [[Condition(SOURCE, negated=negated, atom=text)]]
            case _:
                return [[self.atom(f"unknown: {match}")]]

    def _state(self, match: StateIn, place: Place) -> Alternatives:
        """Before connection tracking a packet's state is invalid, or untracked behind a rule that says so."""
        if ("invalid" in match.states) == ("untracked" in match.states):
            return ALWAYS if ("invalid" in match.states) != match.negated else NEVER
        return [[self.atom(f"state {'/'.join(sorted(match.states))} before connection tracking, at {place.hook}", match.negated)]]

    def _interface(self, way: str, names: tuple[str, ...], negated: bool, place: Place) -> Alternatives:
        """At a hook where there is no such interface its name is empty, so only a negation holds."""
        hook = "forward" if place.forwarded and place.hook == "postrouting" else place.hook
        here = "in" if hook in ("prerouting", "input", "forward") else "out"
        if "*" in names and (way == here or hook == "forward"):
            return NEVER if negated else ALWAYS
        if way == here:
            return [[Condition(INTERFACE, frozenset(names), negated)]]
        if hook != "forward":
            return ALWAYS if negated else NEVER
        if len(self.outs) > MOST_OUTS or not all(name in self.outs for name in names):
            return [[Condition(SOURCE, negated=negated, atom=f"out interface is one of {' '.join(names)}")]]
        return self._out([any(fits(name, each) for name in names) != negated for each in self.outs], negated)

    def _out(self, wanted: Sequence[bool], otherwise: bool) -> Alternatives:
        """The first name of `outs` that holds is a wanted one; `otherwise`: also where none holds."""
        found: Alternatives = []
        before: list[Condition] = []
        for name, good in zip(self.outs, wanted, strict=True):
            here = Condition(SOURCE, atom=out_text(name))
            if good:
                found.append([*before, here])
            before.append(replace(here, negated=True))
        return [*found, before] if otherwise else found

    def _negated(self, either: Alternatives, match: AnyOf) -> Alternatives:
        """None of the alternatives holds, as alternatives that exclude each other."""
        size = 1
        for each in either:
            size *= len(each)
        if size > MOST:
            return [[Condition(SOURCE, negated=True, atom=str(match)[:300])]]
        parts = [[[*each[:i], replace(c, negated=not c.negated)] for i, c in enumerate(each)] for each in either]
        return [[c for part in chosen for c in part] for chosen in product(*parts)]

    def atom(self, text: str, negated: bool = False) -> Condition:
        """An atom of its own: every place where the text stands has one."""
        self._seen[text] = self._seen.get(text, 0) + 1
        number = self._seen[text]
        return Condition(SOURCE, negated=negated, atom=text if number == 1 else f"{text} ({number})")


def _protocols(numbers: Iterable[int]) -> Condition:
    return Condition(PROTOCOL, merged((n, n) for n in numbers))


def _numbers(spans: Iterable[tuple[int, int]]) -> str:
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def atoms_of(conditions: Iterable[Condition]) -> Iterator[str]:
    """The names of atoms among conditions."""
    return (c.atom for c in conditions if c.atom)
