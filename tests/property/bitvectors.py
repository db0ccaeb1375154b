"""Rulesets as formulas over bit-vectors: what z3 is asked, written from what kernels do and apart from `fwcompiler.proof`.

A packet is one bit-vector a field. What no field shows (a limit, a dynamic set, a test by name) is a free boolean, by its name; of
tests that count, the first of a text on one side is the first of that text on the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import z3

from fwcompiler.addresses import BITS, Ranges
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.prove import Box
from fwcompiler.proof.space import DESTINATION, FIRST_ATOM, INTERFACE, PORT, PROTOCOL, SOURCE, SOURCE_PORT, STATE, TYPE, Space
from fwcompiler.ruleset import (
    STATES,
    AnyOf,
    Chain,
    Family,
    Final,
    Goto,
    Hook,
    InRanges,
    InSet,
    Interface,
    InterfaceIn,
    Jump,
    Limit,
    Match,
    Opaque,
    PortIn,
    PortsIn,
    ProtocolIn,
    ProtocolIs,
    Rule,
    Ruleset,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Untrack,
)

NAMES = ("lo", "eth0", "eth1", "eth7", "ppp0", "wg0")
"""All interfaces there are. The last ones of every kind are named by no rule."""
OUTS = ("eth0", "eth1")
VERDICTS = ("accept", "drop", "reject")
_NAT = -100
_UNTRACKED = STATES.index("untracked")
Bool = Any
"""z3's types are not typed."""


@dataclass(frozen=True)
class Fields:
    """One packet: a term a field."""

    version: int
    source: Any
    destination: Any
    protocol: Any
    port: Any
    source_port: Any
    type: Any
    interface: Any
    state: Any

    @classmethod
    def any(cls, version: int) -> Fields:
        """A packet of which nothing is known."""
        bits = BITS[version]
        sizes = {"source": bits, "destination": bits, "protocol": 8, "port": 16, "source_port": 16, "type": 8, "interface": 4, "state": 4}
        return cls(version, **{name: z3.BitVec(name, size) for name, size in sizes.items()})

    def possible(self) -> Bool:
        """The interface and the state are ones that there are."""
        return z3.And(z3.ULT(self.interface, len(NAMES)), z3.ULT(self.state, len(STATES)))


def within(term: Any, ranges: Ranges) -> Bool:
    """The term lies in one of the ranges."""
    return z3.Or([z3.And(z3.UGE(term, low), z3.ULE(term, high)) for low, high in ranges])


def one_of(term: Any, values: Sequence[int]) -> Bool:
    """The term is one of the numbers."""
    return z3.Or([term == value for value in values])


def not_if(negated: bool, formula: Bool) -> Bool:
    """The formula, or its negation."""
    return z3.Not(formula) if negated else formula


@dataclass
class Reading:
    """Gives tests that remember names of their own, in the order in which they are met."""

    version: int
    seen: dict[str, int] = field(default_factory=dict)

    def own(self, text: str) -> str:
        """The name of the next test of this text."""
        self.seen[text] = self.seen.get(text, 0) + 1
        return text if self.seen[text] == 1 else f"{text} ({self.seen[text]})"

    def rule(self, rule: Rule, hook: Hook) -> Rule:
        """The rule with names in place of what counts."""
        if rule.verdict is None:
            return rule
        matches = self._all(rule.matches, hook)
        verdict = rule.verdict
        if isinstance(verdict, Undecided):
            verdict = Undecided(self.own(f"accepted by {verdict.text}"))
        return replace(rule, matches=matches, verdict=verdict)

    def _all(self, matches: Sequence[Match], hook: Hook) -> tuple[Match, ...]:
        """What has to hold together. Where a family's test fails nothing counts; a limit before other tests counts more packets."""
        if any(isinstance(m, InSet | InRanges | Family | TypeIn) and m.version != self.version for m in matches):
            return (NEVER,)
        return tuple(self._named(m, hook, last=i == len(matches) - 1) for i, m in enumerate(matches))

    def _named(self, match: Match, hook: Hook, *, last: bool) -> Match:
        match match:
            case Limit(rate, per, burst):
                return Opaque(self.own(f"limit {rate}/{per} burst {burst}{'' if last else ', before other tests'}"))
            case Opaque(text, negated, True):
                return Opaque(self.own(text), negated)
            case AnyOf(alternatives, negated):
                return AnyOf(tuple(self._all(each, hook) for each in alternatives), negated)
            case StateIn(states, negated) if not _tracked(hook):
                if ("invalid" in states) == ("untracked" in states):
                    return ALWAYS if ("invalid" in states) != negated else NEVER
                return Opaque(self.own(f"state {'/'.join(sorted(states))} before connection tracking, at {hook.name}"), negated)
            case _:
                return match


NEVER, ALWAYS = AnyOf(()), AnyOf(((),))


def _tracked(hook: Hook) -> bool:
    """False where a chain sees packets before connection tracking does."""
    return hook.kind == "nat" or hook.name not in ("prerouting", "output") or hook.priority > -200


def holds(match: Match, p: Fields, sets: Mapping[str, Ranges | None], hook: str) -> Bool:
    """Whether a match holds for a packet at a hook."""
    match match:
        case InSet(_, _, version) | InRanges(_, version) | Family(version) | TypeIn(version) if version != p.version:
            return z3.BoolVal(False)
        case InSet(side, name, _, negated):
            ranges = sets.get(name)
            known = z3.Bool(f"{side} is a member of {name}") if ranges is None else within(_address(p, side), ranges)
            return not_if(negated, known)
        case InRanges(side, _, ranges, negated):
            return not_if(negated, within(_address(p, side), ranges))
        case Family():
            return z3.BoolVal(True)
        case Interface(way, name, negated):
            return _interface(way, (name,), negated, p, hook)
        case InterfaceIn(way, names, negated):
            return _interface(way, names, negated, p, hook)
        case ProtocolIs(number, negated):
            return not_if(negated, p.protocol == number)
        case ProtocolIn(spans, negated):
            return not_if(negated, within(p.protocol, spans))
        case PortIn(side, protocol, span, negated):
            return z3.And(p.protocol == PROTOCOLS[protocol], not_if(negated, within(_port(p, side), (span,))))
        case PortsIn(side, protocols, spans, negated):
            return z3.And(one_of(p.protocol, protocols), not_if(negated, within(_port(p, side), spans)))
        case StateIn(states, negated):
            return not_if(negated, one_of(p.state, [STATES.index(s) for s in states]))
        case TypeIn(version, types):
            return z3.And(p.protocol == (1 if version == 4 else 58), one_of(p.type, types))
        case Opaque(text, negated):
            return not_if(negated, z3.Bool(text))
        case AnyOf(alternatives, negated):
            each = [z3.And([holds(m, p, sets, hook) for m in matches]) for matches in alternatives]
            return not_if(negated, z3.Or(each))
    raise AssertionError(match)


def _address(p: Fields, side: str) -> Any:
    return p.source if side == "source" else p.destination


def _port(p: Fields, side: str) -> Any:
    return p.source_port if side == "source" else p.port


def _fits(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _interface(way: str, names: Sequence[str], negated: bool, p: Fields, hook: str) -> Bool:
    """Behind routing a forwarded packet has an output interface: the first of `OUTS` whose boolean holds, or another one."""
    if way == "in":
        found = one_of(p.interface, [i for i, name in enumerate(NAMES) if any(_fits(n, name) for n in names)])
    elif hook != "forward":
        found = z3.BoolVal(False)
    else:
        leaving = [z3.Bool(f"out interface is {name}") for name in OUTS]
        first = [z3.And([here, *(z3.Not(b) for b in leaving[:i])]) for i, here in enumerate(leaving)]
        found = z3.Or([is_it for is_it, name in zip(first, OUTS, strict=True) if any(_fits(n, name) for n in names)])
    return not_if(negated, found)


@dataclass
class Ends:
    """Under which conditions a packet ends how."""

    by: dict[object, list[Bool]] = field(default_factory=dict)

    def add(self, end: object, condition: Bool) -> None:
        """One more way to an end."""
        self.by.setdefault(end, []).append(condition)

    def under(self, end: object) -> Bool:
        """All ways to an end."""
        return z3.Or(self.by.get(end, []))


@dataclass(frozen=True)
class Walk:
    """Walks packets through the chains that a base chain leads to."""

    chains: Mapping[str, Sequence[Rule]]
    sets: Mapping[str, Ranges | None]
    p: Fields
    hook: str

    def chain(self, name: str, alive: Bool, ends: Ends) -> Bool:
        """Where packets come out of a chain again; everything else is added to the ends."""
        returned: list[Bool] = []
        for rule in self.chains[name]:
            if rule.verdict is None:
                continue
            taken = z3.And(alive, *(holds(m, self.p, self.sets, self.hook) for m in rule.matches))
            match rule.verdict:
                case Untrack():
                    ends.add("untracked", taken)
                    continue
                case Jump(called):
                    alive = z3.Or(z3.And(alive, z3.Not(taken)), self.chain(called, taken, ends))
                    continue
                case Goto(called):
                    returned.append(self.chain(called, taken, ends))
                case Final.RETURN:
                    returned.append(taken)
                case Undecided(text):
                    chosen = z3.Bool(text)
                    ends.add("accept", z3.And(taken, chosen))
                    ends.add("drop", z3.And(taken, z3.Not(chosen)))
                case Translate():
                    ends.add(rule.verdict, taken)
                case Final():
                    ends.add(rule.verdict.value, taken)
            alive = z3.And(alive, z3.Not(taken))
        return z3.Or(alive, *returned)


@dataclass(frozen=True)
class Base:
    """A base chain, and the rules of all chains it leads to, with names in place of what counts."""

    name: str
    hook: Hook
    chains: Mapping[str, Sequence[Rule]]


def bases(ruleset: Ruleset, version: int, hook: str, reading: Reading) -> Iterator[Base]:
    """The base chains on the way to a hook, in the order in which the kernel runs them."""
    chains = {c.name: c for c in ruleset.chains}
    way = ("prerouting", hook)
    found = [(c, c.hook) for c in ruleset.chains if c.hook and c.hook.name in way and c.hook.version in (None, version)]
    found.sort(key=lambda pair: (way.index(pair[1].name), _NAT if pair[1].kind == "nat" else pair[1].priority, pair[1].priority))
    for chain, where in found:
        reached = _reached(chain, chains)
        yield Base(chain.name, where, {c.name: [reading.rule(r, where) for r in c.rules] for c in reached})


def _reached(base: Chain, chains: Mapping[str, Chain]) -> list[Chain]:
    found = [base]
    for chain in found:
        for rule in chain.rules:
            if isinstance(rule.verdict, Goto | Jump) and chains[rule.verdict.chain] not in found:
                found.append(chains[rule.verdict.chain])
    return found


def fate(ruleset: Ruleset, p: Fields, hook: str) -> dict[str, Bool]:
    """Under which condition a host accepts, drops or rejects a packet on its way to a hook."""
    sets = {s.name: None if s.dynamic else s.ranges for s in ruleset.sets}
    return _through(list(bases(ruleset, p.version, hook, Reading(p.version))), 0, sets, p)


def _through(found: Sequence[Base], at: int, sets: Mapping[str, Ranges | None], p: Fields) -> dict[str, Bool]:
    """What becomes of a packet from one base chain on."""
    if at == len(found):
        return {"accept": z3.BoolVal(True), "drop": z3.BoolVal(False), "reject": z3.BoolVal(False)}
    base = found[at]
    ends = Ends()
    entering = _enters_nat(base, p) if base.hook.kind == "nat" else z3.BoolVal(True)
    left = Walk(base.chains, sets, p, base.hook.name).chain(base.name, entering, ends)
    ends.add(base.hook.policy, left)
    if base.hook.kind == "nat":
        ends.add("accept", z3.Not(entering))
    state = z3.If(ends.under("untracked"), z3.BitVecVal(_UNTRACKED, p.state.size()), p.state)
    after = _through(found, at + 1, sets, replace(p, state=state))
    behind_nat = at + 1
    while behind_nat < len(found) and (found[behind_nat].hook.name, found[behind_nat].hook.kind) == (base.hook.name, "nat"):
        behind_nat += 1
    result = {word: [z3.And(ends.under("accept"), after[word])] for word in VERDICTS}
    for word in ("drop", "reject"):
        result[word].append(ends.under(word))
    for end in ends.by:
        if isinstance(end, Translate):
            rest = _through(found, behind_nat, sets, _rewritten(p, end))
            for word in VERDICTS:
                result[word].append(z3.And(ends.under(end), rest[word]))
    return {word: z3.Or(ways) for word, ways in result.items()}


def _enters_nat(base: Base, p: Fields) -> Bool:
    """The first packet of a connection; of later ones nobody knows whether the first was rewritten."""
    later = one_of(p.state, [STATES.index("established"), STATES.index("related")])
    rewritten = z3.Bool(f"the connection was rewritten at {base.hook.name}")
    return z3.Or(p.state == STATES.index("new"), z3.And(later, rewritten))


def _rewritten(p: Fields, translation: Translate) -> Fields:
    (low, high), port = translation.ranges[0], translation.ports
    assert low == high
    changed = replace(p, destination=z3.BitVecVal(low, BITS[p.version]))
    return replace(changed, port=z3.BitVecVal(port[0], 16)) if port else changed


def inside(space: Space, box: Box, p: Fields) -> Bool:
    """The packet lies in a box of a difference."""
    terms = {
        SOURCE: p.source,
        DESTINATION: p.destination,
        PROTOCOL: p.protocol,
        PORT: p.port,
        SOURCE_PORT: p.source_port,
        TYPE: p.type,
    }
    texts = {FIRST_ATOM + i: name for name, i in space.atoms.items()}
    parts: list[Bool] = []
    for number, mask in box.masks.items():
        if number == INTERFACE:
            parts.append(one_of(p.interface, [i for i, name in enumerate(NAMES) if mask >> _interface_class(space, name) & 1]))
        elif number == STATE:
            parts.append(one_of(p.state, [i for i in range(len(STATES)) if mask >> i & 1]))
        elif number in terms:
            parts.append(within(terms[number], space.ranges(number, mask)))
        else:
            parts.append(not_if(mask == 1, z3.Bool(texts[number])))
    return z3.And(parts)


def _interface_class(space: Space, name: str) -> int:
    """The class of an interface: its own, that of the longest pattern that it fits, or all others."""
    if name in space.interfaces:
        return space.interfaces.index(name)
    fitting = [known for known in space.interfaces if known.endswith("*") and _fits(known, name)]
    return space.interfaces.index(max(fitting, key=len)) if fitting else len(space.interfaces)
