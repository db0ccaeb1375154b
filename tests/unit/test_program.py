"""The evaluator of neutral rulesets: every match, every verdict, and how base chains go together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fwcompiler.addresses import Ranges
from fwcompiler.proof.atoms import cut
from fwcompiler.proof.program import Outcome, Point, Program, sets_of
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
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
    TypeIn,
    Unknown,
    Verdict,
)

SOURCE: Ranges = ((100, 199),)
TCP = Point(6, 22)
INPUT = Hook("input", 0, "accept")


def outcome(ruleset: Ruleset, point: Point = TCP) -> tuple[Program, Outcome]:
    """Run a ruleset, its classes cut so that 100 to 199 of either family stand apart."""
    program = Program(ruleset, cut([*sets_of(ruleset), (4, SOURCE), (6, SOURCE)]))
    return program, program.run(point)


def drops(*matches: Match, point: Point = TCP, version: int = 4, source: int = 150) -> bool:
    """True where a rule with these matches drops a packet from that source."""
    ruleset = Ruleset((Chain("input", (Rule(matches, Final.DROP),), INPUT),), (AddressSet("s", 4, SOURCE),))
    atoms = cut([*sets_of(ruleset), (version, ((source, source),))])
    found = Program(ruleset, atoms).run(point)
    return not found.accepts() & atoms.masks[version, ((source, source),)]


@pytest.mark.parametrize(
    ("match", "point", "expected"),
    [
        (ProtocolIs(6), TCP, True),
        (ProtocolIs(17), TCP, False),
        (ProtocolIs(17, negated=True), TCP, True),
        (PortIn("destination", "tcp", (22, 23)), TCP, True),
        (PortIn("destination", "tcp", (23, 23)), TCP, False),
        (PortIn("destination", "udp", (22, 22)), TCP, False),
        (PortIn("destination", "tcp", (22, 22), negated=True), TCP, False),
        (PortIn("destination", "tcp", (80, 80), negated=True), TCP, True),
        (PortIn("destination", "udp", (80, 80), negated=True), TCP, False),
        (PortIn("source", "tcp", (40000, 40000)), TCP, True),
        (PortIn("source", "tcp", (22, 22)), TCP, False),
        (StateIn(frozenset(("new", "invalid"))), TCP, True),
        (StateIn(frozenset(("established",))), TCP, False),
        (StateIn(frozenset(("established",)), negated=True), TCP, True),
        (Interface("in", "eth0"), TCP, True),
        (Interface("in", "lo"), TCP, False),
        (Interface("in", "lo", negated=True), TCP, True),
        (Interface("out", "eth0"), TCP, False),
        (Family(4), TCP, True),
        (Family(6), TCP, False),
        (TypeIn(4, (8,)), Point(1, icmp_type=8), True),
        (TypeIn(4, (3, 11)), Point(1, icmp_type=8), False),
        (TypeIn(6, (8,)), Point(1, icmp_type=8), False),
        (TypeIn(4, (8,)), Point(6, 22), False),
        (Limit(5, "second", 5), TCP, True),
        (InSet("source", "s", 4), TCP, True),
        (InSet("source", "s", 4, negated=True), TCP, False),
        (InSet("source", "not-there", 4), TCP, False),
        (InSet("source", "not-there", 4, negated=True), TCP, True),
        (InRanges("source", 4, ((150, 150),)), TCP, True),
        (InRanges("source", 4, ((151, 200),)), TCP, False),
        (InRanges("source", 6, ((150, 150),), negated=True), TCP, False),
        (InRanges("destination", 4, ((7, 9),)), replace(TCP, destination=(4, 8)), True),
        (InRanges("destination", 4, ((7, 9),)), replace(TCP, destination=(4, 10)), False),
        (InRanges("destination", 4, ((7, 9),), negated=True), replace(TCP, destination=(4, 10)), True),
        (InRanges("destination", 4, ((7, 9),)), TCP, False),
        (InRanges("destination", 4, ((7, 9),), negated=True), TCP, True),
    ],
)
def test_matches(match: Match, point: Point, expected: bool) -> None:
    """Each match holds for exactly the packets that its kind means, its family among them."""
    assert drops(match, point=point) is expected


def test_all_matches_have_to_hold() -> None:
    """A rule is the conjunction of its matches."""
    port = PortIn("destination", "tcp", (22, 22))

    assert drops(port, InSet("source", "s", 4))
    assert not drops(port, InSet("source", "s", 4), source=99)
    assert not drops(port, InSet("source", "s", 4), version=6)


def verdicts(*chains: Chain) -> bool:
    """True where a packet from 150 is accepted."""
    program, found = outcome(Ruleset(chains))
    del program
    return bool(found.accepts())


@pytest.mark.parametrize(
    ("first", "called", "accepted"),
    [
        (Jump("x"), (), True),
        (Jump("x"), (Rule((), Final.RETURN),), True),
        (Jump("x"), (Rule((), Final.DROP),), False),
        (Jump("x"), (Rule((), None),), True),
        (Goto("x"), (), False),
        (Goto("x"), (Rule((), Final.RETURN),), False),
        (Goto("x"), (Rule((), Final.ACCEPT),), True),
        (Final.REJECT, (), False),
        (Final.RETURN, (), False),
        (None, (), True),
    ],
)
def test_verdicts(first: Verdict, called: tuple[Rule, ...], accepted: bool) -> None:
    """After a jump the caller goes on, after a goto its policy decides; no verdict goes on."""
    base = Chain("input", (Rule((), first), Rule((), Final.ACCEPT)), Hook("input", 0, "drop"))

    assert verdicts(base, Chain("x", called)) is accepted


def test_returning_from_a_nested_chain() -> None:
    """`return` ends one chain, not all of them."""
    inner = Chain("inner", (Rule((), Final.RETURN), Rule((), Final.DROP)))
    outer = Chain("outer", (Rule((), Jump("inner")), Rule((), Final.ACCEPT)))

    assert verdicts(Chain("input", (Rule((), Jump("outer")), Rule((), Final.DROP)), INPUT), outer, inner)


@pytest.mark.parametrize(
    ("first", "second", "accepted"),
    [("accept", "accept", True), ("accept", "drop", False), ("drop", "accept", False), ("drop", "drop", False)],
)
def test_base_chains_of_one_hook(first: str, second: str, accepted: bool) -> None:
    """A drop in any base chain is final, an accept goes on to the next one; whatever order they are listed in."""
    chains = [Chain(n, (), Hook("input", p, v)) for n, p, v in (("b", 10, second), ("a", -10, first))]  # type: ignore[arg-type]

    assert verdicts(*chains) is verdicts(*reversed(chains)) is accepted


def test_other_hooks_do_not_decide() -> None:
    """A forward chain says nothing about what arrives for the host."""
    assert verdicts(Chain("forward", (), Hook("forward", 0, "drop")), Chain("input", (), INPUT))


def test_unknown_matches_decide_nothing_for_sure() -> None:
    """What a rule with an unknown match may do is kept apart, and the packet goes on."""
    rules = (Rule((InRanges("source", 4, SOURCE), Unknown("?")), Final.DROP), Rule((), Final.ACCEPT))

    program, found = outcome(Ruleset((Chain("input", rules, INPUT),)))

    assert (found.accepts().bit_count(), found.uncertain.bit_count()) == (4, 1)
    assert program.run(TCP).dropped == {}


def test_chains_that_are_missing_or_call_themselves() -> None:
    """A jump to nowhere and a ring of jumps are uncertain, not endless."""
    ring = Chain("ring", (Rule((), Jump("ring")),))
    for target in ("ring", "nowhere"):
        _, found = outcome(Ruleset((Chain("input", (Rule((), Goto(target)),), INPUT), ring)))

        assert found.uncertain


def test_access_by_service() -> None:
    """Accepted sources are told by the service whose rule accepts them."""
    rules = (Rule((InRanges("source", 4, SOURCE),), Final.ACCEPT, "ssh"), Rule((), Final.DROP, "ssh"))

    _, found = outcome(Ruleset((Chain("input", rules, INPUT),)))

    assert (set(found.accepted), set(found.dropped)) == ({"ssh"}, {"ssh"})
    assert found.accepted["ssh"].bit_count() == 1
