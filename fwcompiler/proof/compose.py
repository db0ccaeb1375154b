"""Policies' clauses and kernels' rules in one form: conditions on fields, and what follows.

A ruleset is composed as the kernel runs it: the base chains of a hook one after the other, by priority; a drop in
one is final, an accept goes on to the next. What no packet shows becomes an atom: `limit …` and unknown matches, one
a rule; dynamic sets by name. A rule of the other address family can never match and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.diagram import ACCEPT, DROP, NO_CHAIN, REJECT, RETURN, Builder, Diagrams, Item, Rules
from fwcompiler.proof.meaning import Clause
from fwcompiler.proof.space import (
    DESTINATION,
    INTERFACE,
    PORT,
    PROTOCOL,
    SOURCE,
    SOURCE_PORT,
    STATE,
    TYPE,
    Condition,
    Space,
)
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
    Foreign,
    Goto,
    Hook,
    InRanges,
    InSet,
    Interface,
    Jump,
    Limit,
    Match,
    PortIn,
    ProtocolIs,
    Rule,
    Ruleset,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Unknown,
    Untrack,
)

_SIDE = {"source": SOURCE, "destination": DESTINATION}
_PORT_SIDE = {"source": SOURCE_PORT, "destination": PORT}
_FINAL = {Final.ACCEPT: ACCEPT, Final.DROP: DROP, Final.REJECT: REJECT, Final.RETURN: RETURN}


@dataclass(frozen=True, slots=True)
class Composed:
    """One rule or clause: all conditions hold, then the verdict, or on in a chain."""

    conditions: tuple[Condition, ...]
    verdict: int = RETURN
    chain: str = ""
    goto: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """All chains of one family, and the base chains of the hook with their policies, in the kernel's order."""

    chains: Mapping[str, Sequence[Composed]]
    bases: tuple[tuple[str, int], ...]

    def conditions(self) -> Iterator[Condition]:
        """Every condition, for making the space."""
        for rules in self.chains.values():
            for rule in rules:
                yield from rule.conditions

    def diagram(self, diagrams: Diagrams, space: Space) -> int:
        """What the hook does with every packet; with no base chain everything is accepted."""
        result = ACCEPT
        for base, policy in self.bases:
            result = diagrams.both(result, Builder(diagrams, self._rules(base, policy, space)).build())
        return result

    def _rules(self, base: str, policy: int, space: Space) -> Rules:
        numbers = {base: 0}
        for name in self.chains:
            numbers.setdefault(name, len(numbers))
        chains: list[list[Item]] = [[] for _ in numbers]
        for name, rules in self.chains.items():
            for rule in rules:
                conditions = _masks(rule.conditions, space)
                if conditions is not None:
                    chain = numbers.get(rule.chain, NO_CHAIN) if rule.chain else NO_CHAIN
                    chains[numbers[name]].append(Item(conditions, rule.verdict, chain, rule.goto))
        return Rules(chains, policy)


def _masks(conditions: Iterable[Condition], space: Space) -> dict[int, int] | None:
    """Masks by field, the ones that say nothing left out; None where a field has no value left."""
    masks: dict[int, int] = {}
    for condition in conditions:
        number, mask = space.place(condition)
        masks[number] = masks.get(number, space.everything(number)) & mask
    if not all(masks.values()):
        return None
    return {number: mask for number, mask in masks.items() if mask != space.everything(number)}


def from_ruleset(ruleset: Ruleset, version: int, hook: str = "input") -> Program:
    """What a ruleset does at a hook with packets of one family."""
    reader = _Reader(ruleset, version)
    chains = {chain.name: tuple(reader.rules(chain)) for chain in ruleset.chains}
    return Program(chains, tuple((c.name, ACCEPT if h.policy == "accept" else DROP) for c, h in base_chains(ruleset, hook)))


def base_chains(ruleset: Ruleset, hook: str) -> list[tuple[Chain, Hook]]:
    """Base chains on a packet's way to a hook, in the order in which the kernel runs them: prerouting comes first."""
    way = ("prerouting", hook) if hook in ("input", "forward") else (hook,)
    found = [(c, c.hook) for c in ruleset.chains if c.hook and c.hook.name in way]
    return sorted(found, key=lambda pair: (way.index(pair[1].name), pair[1].priority))


class _Reader:
    """Turns rules into conditions, numbering the atoms of equal text in the order in which they stand."""

    def __init__(self, ruleset: Ruleset, version: int) -> None:
        self._sets: Mapping[str, AddressSet] = {s.name: s for s in ruleset.sets}
        self._chains = {c.name for c in ruleset.chains}
        self._version = version
        self._seen: dict[str, int] = {}

    def rules(self, chain: Chain) -> Iterator[Composed]:
        for rule in chain.rules:
            yield from self._rule(rule)

    def _rule(self, rule: Rule) -> Iterator[Composed]:
        unknown = next((m.text for m in rule.matches if isinstance(m, Unknown)), "")
        if (rule.verdict is None and not unknown) or not all(self._possible(m) for m in rule.matches):
            return
        conditions = tuple(c for i, m in enumerate(rule.matches) for c in self._conditions(m, last=i == len(rule.matches) - 1))
        match rule.verdict:
            case None:
                # A target nobody modelled may do anything.
                yield Composed((*conditions, self._atom(f"drops: {unknown}")), DROP)
                yield Composed(conditions, ACCEPT)
            case Jump(name) if name not in self._chains:
                return
            case Goto(name) | Jump(name):
                yield Composed(conditions, RETURN, name, isinstance(rule.verdict, Goto))
            case Translate() | Untrack() | Undecided():
                # Rulesets of others are read by `proof.host`; here these may do anything.
                yield Composed((*conditions, self._atom(f"drops: {rule.verdict}")), DROP)
                yield Composed((*conditions, self._atom(f"accepts: {rule.verdict}")), ACCEPT)
            case Final():
                yield Composed(conditions, _FINAL[rule.verdict])

    def _possible(self, match: Match) -> bool:
        """False for a match of the other family, or on an output interface, which a packet coming in does not have."""
        match match:
            case InSet(_, _, version, _) | InRanges(_, version, _, _) | Family(version) | TypeIn(version, _):
                return version == self._version
            case Interface("out", _, negated):
                return negated
            case _:
                return True

    def _conditions(self, match: Match, *, last: bool) -> list[Condition]:
        """What a possible match asks."""
        match match:
            case InSet() | InRanges() | Family():
                return self._addresses(match)
            case Interface(way, name, negated):
                return [Condition(INTERFACE, frozenset((name,)), negated)] if way == "in" else []
            case ProtocolIs(number, negated):
                return [Condition(PROTOCOL, ((number, number),), negated)]
            case PortIn(side, protocol, span, negated):
                return [_protocol(protocol), Condition(_PORT_SIDE[side], (span,), negated)]
            case StateIn(states, negated):
                return [Condition(STATE, frozenset(states), negated)]
            case TypeIn(version, types):
                numbers = tuple((t, t) for t in types)
                return [_protocol("icmp" if version == 4 else "icmpv6"), Condition(TYPE, _joined(numbers))]
            case Limit():
                # One that stands before other tests counts packets that the rule is not about.
                return [self._atom(limit_text(match) + ("" if last else ", before other tests"))]
            case Unknown(text):
                return [self._atom(f"unknown: {text}")]
            case Foreign():
                return [self._atom(f"unknown: {match}")]

    def _addresses(self, match: InSet | InRanges | Family) -> list[Condition]:
        match match:
            case InSet(side, name, _, negated):
                known = self._sets.get(name)
                if known is None or known.dynamic:
                    return [Condition(_SIDE[side], negated=negated, atom=f"{side} is a member of {name}")]
                return [Condition(_SIDE[side], known.ranges, negated)]
            case InRanges(side, _, ranges, negated):
                return [Condition(_SIDE[side], ranges, negated)]
            case Family():
                return []

    def _atom(self, text: str) -> Condition:
        self._seen[text] = self._seen.get(text, 0) + 1
        number = self._seen[text]
        return Condition(SOURCE, atom=text if number == 1 else f"{text} ({number})")


def limit_text(limit: Limit) -> str:
    """The name of a limit's atom: it holds while the limit is not exhausted."""
    return f"limit {limit.rate}/{limit.per} burst {limit.burst}"


def _protocol(name: str) -> Condition:
    number = PROTOCOLS[name]
    return Condition(PROTOCOL, ((number, number),))


def _joined(numbers: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    from fwcompiler.addresses import merged

    return merged(numbers)


def from_clauses(clauses: Sequence[Clause], version: int) -> Program:
    """The reference meaning for packets of one family."""
    rules = [rule for clause in clauses for rule in _clause(clause, version)]
    return Program({"meaning": rules}, (("meaning", DROP),))


def _clause(clause: Clause, version: int) -> Iterator[Composed]:
    verdict = ACCEPT if clause.verdict == "accept" else DROP
    conditions: list[Condition] = []
    if clause.loopback is not None:
        conditions.append(Condition(INTERFACE, frozenset(("lo",)), not clause.loopback))
    if clause.destination is not None:
        conditions.append(Condition(DESTINATION, clause.destination.family(version)))
    if clause.states is not None:
        conditions.append(Condition(STATE, frozenset(clause.states)))
    if clause.limit is not None:
        conditions.append(Condition(SOURCE, atom=limit_text(clause.limit)))
    if clause.icmp is not None:
        if clause.icmp[0] != version:
            return
        conditions += [_protocol("icmp" if version == 4 else "icmpv6"), Condition(TYPE, _joined(tuple((t, t) for t in clause.icmp[1])))]
    conditions += [Condition(SOURCE, negated=True, atom=member_text(name, version)) for name in clause.spared]
    if clause.spared_source is not None:
        conditions.append(Condition(SOURCE, clause.spared_source.family(version), negated=True))
    for ports in _alternatives(clause):
        for source in _sources(clause, version):
            yield Composed((*conditions, *ports, *source), verdict)


def _alternatives(clause: Clause) -> Iterator[list[Condition]]:
    if clause.ports is None:
        yield []
        return
    for ports in clause.ports:
        yield [_protocol(ports.protocol), *([Condition(PORT, ports.ranges)] if ports.ranges else [])]


def _sources(clause: Clause, version: int) -> Iterator[list[Condition]]:
    if clause.source is None and not clause.dynamic:
        yield []
    if clause.source is not None:
        yield [Condition(SOURCE, clause.source.family(version))]
    for name in clause.dynamic:
        yield [Condition(SOURCE, atom=member_text(name, version))]


def member_text(group: str, version: int) -> str:
    """The atom of a group's dynamic members; kernels name the set so."""
    return f"source is a member of {group}.dynamic.v{version}"
