"""Runs a policy's own `tests` against its meaning: every address and port of a test, not a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from fwcompiler.addresses import Addresses, Ranges, covers, intersect, subtract
from fwcompiler.diagnostics import Position, Report
from fwcompiler.edge import ResolvedEdge
from fwcompiler.ports import PROTOCOLS, Ports, port_text
from fwcompiler.proof.edge import deliveries, passage
from fwcompiler.proof.fields import ECHO_REQUEST
from fwcompiler.proof.leaving import leaving
from fwcompiler.proof.meaning import Clause, clauses
from fwcompiler.resolved import Resolved, ResolvedTest

Piece = tuple[Ranges, Addresses]
"""Ports and sources that go through the same clauses so far."""


def run_tests(policy: Resolved, report: Report) -> None:
    """Report every test that the policy does not meet, with an example of what happens instead."""
    for test, wrong in results(policy):
        if wrong:
            where = f" on {policy.host.name}" if policy.host else ""
            report.error("policy-test", f"expected {test.expect} {test.words()}{where}, but {wrong}", test.at)


def results(policy: Resolved) -> Iterator[tuple[ResolvedTest, str]]:
    """Every test with what is wrong with it; the empty string where it is met."""
    meaning = clauses(policy)
    for test in policy.tests:
        decided = _decide_leaving(test, policy) if test.leaving else _decide(test, policy, meaning)
        wrong = next((p for p in decided if p[0].verdict != test.expect), None)
        if wrong is None:
            yield test, ""
            continue
        clause, (ports, others) = wrong
        what = f"{others.texts()[0]} {'at' if test.leaving else 'to'} {_to(test.ports, ports)}"
        yield test, f"{'what goes to ' if test.leaving else ''}{what} is {_PAST[clause.verdict]}: {clause.reason}"


def results_of_hosts(policies: Iterable[Resolved]) -> list[tuple[ResolvedTest, str]]:
    """Every test once, with what is wrong with it on the first host where something is."""
    found: dict[Position, tuple[ResolvedTest, str]] = {}
    for policy in policies:
        for test, wrong in results(policy):
            if test.at not in found or (wrong and not found[test.at][1]):
                found[test.at] = test, f"on {policy.host.name}, {wrong}" if wrong and policy.host else wrong
    return [found[at] for at in sorted(found)]


_PAST = {"accept": "accepted", "drop": "dropped", "reject": "rejected"}


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


def _decide_leaving(test: ResolvedTest, policy: Resolved) -> list[tuple[Clause, Piece]]:
    """All packets of a test about what this host sends, with the clauses that decide them. The addresses of pieces are where to."""
    services = [p for s in policy.services for p in s.ports]
    outlets = [p for o in (policy.egress.outlets if policy.egress else ()) for p in o.here]
    taken = [span for p in (*services, *outlets) for span in p.ranges]
    port = test.from_port or next(p for p in range(40000, 65536) if not any(low <= p <= high for low, high in taken))
    return _divide(
        leaving(policy), [(test.ports.ranges or ((0, 0),), test.addresses)], lambda c, ports, to: _taken_leaving(c, test, ports, to, port)
    )[0]


def _taken_leaving(clause: Clause, test: ResolvedTest, ports: Ranges, to: Addresses, port: int) -> Piece:
    """The part of a piece for which a clause holds, sent from a port through a real interface."""
    protocol = PROTOCOLS[test.ports.protocol]
    other_state = clause.states is not None and test.state not in clause.states
    if clause.loopback or other_state or clause.protocol not in (None, protocol):
        return (), to
    if clause.from_ports is not None and not any(p.protocol == test.ports.protocol and covers(p.ranges, port) for p in clause.from_ports):
        return (), to
    if clause.destination is not None:
        to = to & clause.destination
    if clause.icmp is not None:
        return _icmp(clause, test, ports, to)
    return _to_ports(clause, test, ports), to


def _to_ports(clause: Clause, test: ResolvedTest, ports: Ranges) -> Ranges:
    """Those of a test's ports that a clause is about."""
    if clause.ports is None:
        return ports
    same = [p for p in clause.ports if PROTOCOLS[p.protocol] == PROTOCOLS[test.ports.protocol]]
    if not same:
        return ()
    return intersect(ports, same[0].ranges) if same[0].ranges else ports


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

    def taken(clause: Clause, ports: Ranges, sources: Addresses) -> Piece:
        ports, sources = _taken(clause, test, ports, sources, at)
        return ports, sources if only is None else sources.only(only)

    return _divide(meaning, pieces, taken)


def _divide(
    meaning: tuple[Clause, ...], pieces: list[Piece], taken: Callable[[Clause, Ranges, Addresses], Piece]
) -> tuple[list[tuple[Clause, Piece]], list[Piece]]:
    """Packets with the clauses that decide them, and the rest. ``taken``: the part of a piece for which a clause holds."""
    left = pieces
    decided: list[tuple[Clause, Piece]] = []
    for clause in meaning:
        rest: list[Piece] = []
        for ports, others in left:
            some, who = taken(clause, ports, others)
            if not some or not who:
                rest.append((ports, others))
                continue
            decided.append((clause, (some, who)))
            rest += [(subtract(ports, some), others), (some, others - who)]
        left = [(ports, others) for ports, others in rest if ports and others]
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
    return _to_ports(clause, test, ports), sources


def _icmp(clause: Clause, test: ResolvedTest, ports: Ranges, sources: Addresses) -> Piece:
    """`icmp` in a test means an echo request; each family has its own."""
    assert clause.icmp is not None
    version, types = clause.icmp
    protocol = PROTOCOLS["icmp" if version == 4 else "icmpv6"]
    if test.ports.protocol not in ("icmp", "icmpv6") or ECHO_REQUEST[protocol] not in types:
        return (), sources
    return ports, sources.only(version)
