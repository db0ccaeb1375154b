"""Policies' clauses and kernels' rules in one form: conditions on fields, and what follows.

A ruleset is composed as the kernel runs it: the base chains of a hook one after the other, by priority; a drop in
one is final, an accept goes on to the next. What no packet shows becomes an atom: `limit …` and unknown matches, one
a rule; dynamic sets by name. A rule of the other address family can never match and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from fwcompiler.ports import PROTOCOLS, Ports
from fwcompiler.proof.diagram import ACCEPT, DROP, NO_CHAIN, REJECT, RETURN, Builder, Diagrams, Item, Rules
from fwcompiler.proof.meaning import Clause, Over
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
    Chain,
    Hook,
    Limit,
    OverLimit,
    Ruleset,
    Side,
)


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


def base_chains(ruleset: Ruleset, hook: str) -> list[tuple[Chain, Hook]]:
    """Base chains on a packet's way to a hook, in the order in which the kernel runs them: prerouting comes first."""
    way = ("prerouting", hook) if hook in ("input", "forward") else (hook,)
    found = [(c, c.hook) for c in ruleset.chains if c.hook and c.hook.name in way]
    return sorted(found, key=lambda pair: (way.index(pair[1].name), pair[1].priority))


def rewritten_side(side: str) -> str:
    """The atom of a connection whose one side was rewritten."""
    return f"the {side} of the connection was rewritten"


def limit_text(limit: Limit) -> str:
    """The name of a limit's atom: it holds while the limit is not exhausted."""
    return f"limit {limit.rate}/{limit.per} burst {limit.burst}"


def over_text(limit: OverLimit | Over) -> str:
    """The name of the atom of a limit by source: it holds once the limit is exceeded."""
    return f"the source exceeds {limit.rate}/{limit.per} burst {limit.burst}, counted as {limit.name}"


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
    verdict = {"accept": ACCEPT, "drop": DROP, "reject": REJECT}[clause.verdict]
    conditions: list[Condition] = []
    if clause.loopback is not None:
        conditions.append(Condition(INTERFACE, frozenset(("lo",)), not clause.loopback))
    if clause.protocol is not None:
        conditions.append(Condition(PROTOCOL, ((clause.protocol, clause.protocol),)))
    if clause.states is not None:
        conditions.append(Condition(STATE, frozenset(clause.states)))
    if clause.limit is not None:
        conditions.append(Condition(SOURCE, atom=limit_text(clause.limit)))
    if clause.over is not None:
        conditions.append(Condition(SOURCE, atom=over_text(clause.over)))
    if clause.icmp is not None:
        if clause.icmp[0] != version:
            return
        conditions += [_protocol("icmp" if version == 4 else "icmpv6"), Condition(TYPE, _joined(tuple((t, t) for t in clause.icmp[1])))]
    conditions += [Condition(SOURCE, negated=True, atom=member_text(name, version)) for name in clause.spared]
    if clause.spared_source is not None:
        conditions.append(Condition(SOURCE, clause.spared_source.family(version), negated=True))
    parts = (_alternatives(clause.ports, PORT), _alternatives(clause.from_ports, SOURCE_PORT), _destinations(clause, version))
    for chosen in product(*parts, _sources(clause, version), _others(clause)):
        yield Composed((*conditions, *(c for part in chosen for c in part)), verdict)


def _alternatives(several: tuple[Ports, ...] | None, side: int) -> Iterator[list[Condition]]:
    if several is None:
        yield []
        return
    for ports in several:
        yield [_protocol(ports.protocol), *([Condition(side, ports.ranges)] if ports.ranges else [])]


def _destinations(clause: Clause, version: int) -> Iterator[list[Condition]]:
    if clause.destination is None and not clause.members:
        yield []
    if clause.destination is not None:
        yield [Condition(DESTINATION, clause.destination.family(version))]
    for name in clause.members:
        yield [Condition(SOURCE, atom=member_text(name, version, "destination"))]


def _others(clause: Clause) -> Iterator[list[Condition]]:
    """Everything but the spared ports, in two parts: other protocols, and this one's other ports."""
    if clause.spared_ports is None:
        yield []
        return
    protocol = _protocol(clause.spared_ports.protocol)
    yield [replace(protocol, negated=True)]
    yield [protocol, Condition(PORT, clause.spared_ports.ranges, negated=True)]


def _sources(clause: Clause, version: int) -> Iterator[list[Condition]]:
    if clause.source is None and not clause.dynamic:
        yield []
    if clause.source is not None:
        yield [Condition(SOURCE, clause.source.family(version))]
    for name in clause.dynamic:
        yield [Condition(SOURCE, atom=member_text(name, version))]


def member_text(group: str, version: int, side: Side = "source") -> str:
    """The atom of a group's dynamic members; kernels name the set so."""
    return f"{side} is a member of {group}.dynamic.v{version}"
