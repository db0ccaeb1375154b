"""Runs a policy's own `tests` against its meaning: every address and port of a test, not a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from fwcompiler.addresses import Addresses, Ranges, intersect, subtract
from fwcompiler.diagnostics import Position, Report
from fwcompiler.edge import ResolvedEdge
from fwcompiler.ports import PROTOCOLS, Ports, port_text
from fwcompiler.proof.edge import deliveries, passage
from fwcompiler.proof.fields import ECHO_REQUEST
from fwcompiler.proof.meaning import Clause, clauses
from fwcompiler.resolve import Resolved, ResolvedTest

Piece = tuple[Ranges, Addresses]
"""Ports and sources that go through the same clauses so far."""


def run_tests(policy: Resolved, report: Report) -> None:
    """Report every test that the policy does not meet, with an example of what happens instead."""
    for test, wrong in results(policy):
        if wrong:
            where = f" on {policy.host.name}" if policy.host else ""
            report.error("policy-test", f"expected {test.expect} from {test.source} to {test.ports}{where}, but {wrong}", test.at)


def results(policy: Resolved) -> Iterator[tuple[ResolvedTest, str]]:
    """Every test with what is wrong with it; the empty string where it is met."""
    meaning = clauses(policy)
    for test in policy.tests:
        wrong = next((p for p in _decide(test, policy, meaning) if p[0].verdict != test.expect), None)
        if wrong is None:
            yield test, ""
            continue
        clause, (ports, sources) = wrong
        yield test, f"{sources.texts()[0]} to {_to(test.ports, ports)} is {_PAST[clause.verdict]}: {clause.reason}"


def results_of_hosts(policies: Iterable[Resolved]) -> list[tuple[ResolvedTest, str]]:
    """Every test once, with what is wrong with it on the first host where something is."""
    found: dict[Position, tuple[ResolvedTest, str]] = {}
    for policy in policies:
        for test, wrong in results(policy):
            if test.at not in found or (wrong and not found[test.at][1]):
                found[test.at] = test, f"on {policy.host.name}, {wrong}" if wrong and policy.host else wrong
    return [found[at] for at in sorted(found)]


_PAST = {"accept": "accepted", "drop": "dropped"}


def _to(ports: Ports, ranges: Ranges) -> str:
    return f"{ports.protocol}/{port_text(ranges[0])}" if ports.ranges else ports.protocol


def _decide(test: ResolvedTest, policy: Resolved, meaning: tuple[Clause, ...]) -> list[tuple[Clause, Piece]]:
    """All packets of a test with the clauses that decide them; at an edge, those that it sends on where they go."""
    pieces: list[Piece] = [(test.ports.ranges or ((0, 0),), test.addresses)]
    if policy.edge is None:
        return _walk(test, meaning, pieces)[0]
    decided: list[tuple[Clause, Piece]] = []
    inbound = passage(policy, policy.edge, policy.edge.wan, policy.edge.lan)
    for version, address, clause in _ways_on(policy, policy.edge, test):
        sent, pieces = _walk(test, (clause,), pieces, only=version)
        for _, piece in sent:
            decided += _walk(test, inbound, [piece], (version, address))[0]
    reachable = [(ports, s) for ports, each in pieces for v in (4, 6) if policy.edge.addresses.family(v) and (s := each.only(v))]
    return [*decided, *_walk(test, meaning, reachable)[0]]


def _ways_on(policy: Resolved, edge: ResolvedEdge, test: ResolvedTest) -> Iterator[tuple[int, int, Clause]]:
    """Family, address, and packets that go there: what the edge sends on, and over IPv6 what goes to the same hosts directly.

    Later packets of a connection go where its ports say.
    """
    if test.state == "new":
        for delivery in deliveries(policy, edge):
            yield 4, delivery.address, replace(delivery.clause, destination=None)
    for forward in edge.forwards:
        for version in (4, 6):
            address = forward.host.first(version)
            if address is not None and (version == 6 or test.state != "new"):
                yield version, address, Clause("accept", "", ports=forward.service.ports)


def _walk(
    test: ResolvedTest, meaning: tuple[Clause, ...], pieces: list[Piece], at: tuple[int, int] | None = None, only: int | None = None
) -> tuple[list[tuple[Clause, Piece]], list[Piece]]:
    """Packets with the clauses that decide them, and the rest. ``at``: their destination; ``only``: those of one family."""
    left = pieces
    decided: list[tuple[Clause, Piece]] = []
    for clause in meaning:
        rest: list[Piece] = []
        for ports, sources in left:
            taken_ports, taken_sources = _taken(clause, test, ports, sources, at)
            if only is not None:
                taken_sources = taken_sources.only(only)
            if not taken_ports or not taken_sources:
                rest.append((ports, sources))
                continue
            decided.append((clause, (taken_ports, taken_sources)))
            rest += [(subtract(ports, taken_ports), sources), (taken_ports, sources - taken_sources)]
        left = [(ports, sources) for ports, sources in rest if ports and sources]
    return decided, left


def _taken(clause: Clause, test: ResolvedTest, ports: Ranges, sources: Addresses, at: tuple[int, int] | None) -> Piece:
    """The part of a piece for which a clause holds; packets come in from outside, to an address of this host, or to `at`.

    Limits count as not exceeded.
    """
    if clause.loopback or clause.over is not None or (clause.destination is not None and (at is None or at not in clause.destination)):
        return (), sources
    if clause.states is not None and test.state not in clause.states:
        return (), sources
    if clause.spared_ports is not None and clause.spared_ports.protocol == test.ports.protocol:
        ports = subtract(ports, clause.spared_ports.ranges)
    if clause.source is not None:
        sources = sources & clause.source
    if clause.spared_source is not None:
        sources = sources - clause.spared_source
    if clause.icmp is not None:
        return _icmp(clause, test, ports, sources)
    if clause.ports is not None:
        same = [p for p in clause.ports if PROTOCOLS[p.protocol] == PROTOCOLS[test.ports.protocol]]
        if not same:
            return (), sources
        ports = intersect(ports, same[0].ranges) if same[0].ranges else ports
    return ports, sources


def _icmp(clause: Clause, test: ResolvedTest, ports: Ranges, sources: Addresses) -> Piece:
    """`icmp` in a test means an echo request; each family has its own."""
    assert clause.icmp is not None
    version, types = clause.icmp
    protocol = PROTOCOLS["icmp" if version == 4 else "icmpv6"]
    if test.ports.protocol not in ("icmp", "icmpv6") or ECHO_REQUEST[protocol] not in types:
        return (), sources
    return ports, sources.only(version)
