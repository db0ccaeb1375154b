"""The meaning of an edge: which packets it sends on, which of those pass, and under which address and port they leave.

Written from the policy, apart from what compiles it, and in three steps, as packets take them:

1. Arriving (IPv4). A new packet to one of the edge's own addresses goes on to the one host that owns its port, if the service
   is open to its sender. All others are for the edge itself, or are routed as they are.
2. Passing from wan to lan. Blocked sources are dropped, trusted ones pass; then restricted services are decided, new or
   established, then what is established passes, then public services. From lan to wan only blocked sources and invalid packets
   are dropped. From lan to lan, only blocked sources and strangers to restricted services. All else that is forwarded passes.
3. Leaving through wan (IPv4). Private sources take the edge's address. A port that one host owns stays its own, and is
   nobody else's. What came back to the lan because it was sent to the edge's address returns through the edge.

IPv6 passes by the same rules; nothing is translated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fwcompiler.addresses import Addresses, Range, address_text
from fwcompiler.edge import Forward, ResolvedEdge
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.leaving import explain_leaving
from fwcompiler.proof.meaning import ECHO_LIMIT, Clause, Explanation, blocking, clauses, explain, explain_by, trusting
from fwcompiler.resolved import Resolved
from fwcompiler.service import udp_spans

PASSING_ICMP: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {4: ((3, 11, 12), (8,)), 6: ((1, 2, 3, 4), (128,))}
"""By family: types that pass, and types that pass at a limited rate (RFC 4890, section 4.3)."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """New packets for which the clause holds go on to an address of a host, with the port that they came for."""

    clause: Clause
    host: str
    address: int


@dataclass(frozen=True, slots=True)
class Departure:
    """Packets that leave through `out` take its address. `ports`: and one of these ports, None: they keep theirs.

    `source_ports`: only UDP packets from these. `returned`: only those whose destination the edge has rewritten.
    """

    out: str
    source: Addresses
    source_ports: Range | None = None
    ports: Range | None = None
    returned: bool = False


def deliveries(policy: Resolved, edge: ResolvedEdge) -> Iterator[Delivery]:
    """Step 1, the first that holds."""
    own = edge.addresses.only(4)
    for forward in edge.forwards:
        address = forward.target
        if address is None:
            continue
        clause = Clause(
            "accept",
            f"{forward.service.name} goes to {forward.host.name}",
            forward.service.name,
            forward.at,
            destination=own,
            ports=forward.service.ports,
            states=frozenset(("new",)),
        )
        if forward.service.groups is None:
            yield Delivery(clause, forward.host.name, address)
            continue
        for name in dict.fromkeys((*policy.trust, *forward.service.groups)):
            group = policy.groups[name]
            dynamic = (name,) if group.dynamic else ()
            named = replace(clause, source=group.addresses, groups=(name,), dynamic=dynamic)
            yield Delivery(named, forward.host.name, address)


def passage(policy: Resolved, edge: ResolvedEdge, came: str, leaves: str) -> tuple[Clause, ...]:
    """Step 2 for one pair of interfaces, the first clause that holds; none: the packet passes."""
    if (came, leaves) == (edge.wan, edge.lan):
        return tuple(_inbound(policy, edge))
    if (came, leaves) == (edge.lan, edge.wan):
        return (*blocking(policy), _invalid())
    if (came, leaves) == (edge.lan, edge.lan):
        # The services only say why: here all else passes anyway.
        served = (_passes(f) for f in edge.forwards if f.service.early or f.service.groups is None)
        return (*blocking(policy), *trusting(policy), *_strangers(policy, edge), *served)
    return ()


def _invalid() -> Clause:
    return Clause("drop", "connection tracking finds the packet invalid", states=frozenset(("invalid",)))


def _inbound(policy: Resolved, edge: ResolvedEdge) -> Iterator[Clause]:
    yield from blocking(policy)
    yield from trusting(policy)
    yield _invalid()
    yield from _strangers(policy, edge)
    for forward in edge.forwards:
        if forward.service.early:
            # Whoever is not named was dropped before.
            yield replace(_passes(forward), groups=forward.service.groups or ())
    yield Clause("accept", "it belongs to an established connection", states=frozenset(("established", "related")))
    for forward in edge.forwards:
        if not forward.service.early:
            yield from _late(policy, forward)
    for version, (plain, limited) in PASSING_ICMP.items():
        family = "ICMP" if version == 4 else "ICMPv6"
        yield Clause("accept", f"an {family} type that hosts behind the edge need", icmp=(version, plain))
        yield Clause("accept", "ping passes, at a limited rate", icmp=(version, limited), limit=ECHO_LIMIT)
    yield Clause("drop", "nothing of this is forwarded")


def _strangers(policy: Resolved, edge: ResolvedEdge) -> Iterator[Clause]:
    """A forwarded service that is restricted is closed to everybody else, on every host behind that has it."""
    for forward in edge.guarded:
        groups = forward.service.groups or ()
        yield Clause(
            "drop",
            f"{forward.service.name} does not name the source: it is in none of {', '.join(groups)}",
            forward.service.name,
            forward.at,
            destination=forward.host.all(),
            ports=forward.service.ports,
            spared=tuple(name for name in groups if policy.groups[name].dynamic),
            spared_source=policy.addresses(groups),
        )


def _passes(forward: Forward) -> Clause:
    what = f"{forward.service.name} goes to {forward.host.name}"
    return Clause("accept", what, forward.service.name, forward.at, destination=forward.host.all(), ports=forward.service.ports)


def _late(policy: Resolved, forward: Forward) -> Iterator[Clause]:
    service = forward.service
    if service.groups is None:
        yield _passes(forward)
        return
    for name in service.groups:
        group = policy.groups[name]
        dynamic = (name,) if group.dynamic else ()
        yield replace(_passes(forward), source=group.addresses, groups=(name,), dynamic=dynamic)
    yield replace(_passes(forward), verdict="drop", reason=f"{service.name} does not name the source")


def departures(edge: ResolvedEdge) -> Iterator[Departure]:
    """Step 3, the first that holds."""
    for forward in edge.forwards:
        own = forward.host.all() & edge.hidden
        for span in udp_spans(forward.service) if own else ():
            yield Departure(edge.wan, own, span)
    for forward in edge.forwards:
        yield from (Departure(edge.wan, edge.hidden, span, edge.spare) for span in udp_spans(forward.service))
    yield Departure(edge.wan, edge.hidden)
    yield Departure(edge.lan, edge.hidden, returned=True)


@dataclass(frozen=True, slots=True)
class Passed:
    """Where one packet goes, and the clauses that decide it there, of which one holds for every packet.

    `packet` is what those see. `host`: the one behind that it goes to, where that is one of the policy's. `sent`: it was addressed
    to the edge. `leaves`: the interface it goes out by; empty for what is for the edge itself.
    """

    packet: Packet
    meaning: tuple[Clause, ...]
    host: str = ""
    sent: bool = False
    leaves: str = ""


def follow(policy: Resolved, edge: ResolvedEdge, packet: Packet) -> Passed:
    """The way of one packet. Without a destination it is for the edge's own first address; of a later packet of a
    connection, that stands for where the connection goes."""
    if packet.interface not in (edge.wan, edge.lan):
        return Passed(packet, clauses(policy))
    own = edge.addresses.family(packet.version)
    to_edge = packet.destination is None or (packet.version, packet.destination) in edge.addresses
    arriving = replace(packet, destination=own[0][0] if own else None) if packet.destination is None else packet
    sent = _sent(policy, edge, arriving) if to_edge else None
    if to_edge and sent is None:
        return Passed(packet, clauses(policy))
    on = replace(arriving, destination=sent[1]) if sent else arriving
    known = (f.host for f in (*edge.forwards, *edge.guarded))
    host = next((h for h in known if (on.version, on.destination) in h.addresses), None)
    private = on.destination is not None and (on.version, on.destination) in edge.hidden
    leaves = edge.lan if sent or host or private or packet.interface == edge.wan else edge.wan
    rest = Clause("accept", f"what goes from {packet.interface} to {leaves} passes")
    return Passed(on, (*passage(policy, edge, packet.interface, leaves), rest), host.name if host else "", sent is not None, leaves)


def _sent(policy: Resolved, edge: ResolvedEdge, packet: Packet) -> tuple[str, int] | None:
    """The host and address that a packet to the edge goes on to."""
    if packet.version != 4:
        return None
    if packet.state == "new":
        return next(((d.host, d.address) for d in deliveries(policy, edge) if d.clause.holds(packet)), None)
    if packet.state in ("established", "related"):
        passes = ((f, _passes(f)) for f in edge.forwards)
        owners = (f for f, clause in passes if f.target is not None and replace(clause, destination=None).holds(packet))
        return next(((f.host.name, f.target) for f in owners if f.target is not None), None)
    return None


def explain_packet(policy: Resolved, packet: Packet) -> Explanation:
    """Decide one packet and say why, at an edge also where it goes."""
    if packet.leaving:
        return explain_leaving(policy, packet)
    if policy.edge is None:
        return explain(policy, packet)
    passed = follow(policy, policy.edge, packet)
    meaning = passed.meaning
    if not passed.leaves and packet.interface in (policy.edge.wan, policy.edge.lan):
        # The edge drops it for want of a service of its own; the service that was meant is the reason to tell.
        meaning = (*meaning[:-1], *_not_sent_on(policy.edge, packet), meaning[-1])
    explained = explain_by(policy, passed.packet, meaning)
    if not passed.host or passed.packet.destination is None:
        return explained
    to = f"{passed.host} ({address_text(packet.version, passed.packet.destination)})"
    step = f"sent on to {to}" if passed.sent else f"passes through to {to}"
    reason = f"{explained.reason}; {step}" if explained.verdict == "accept" else explained.reason
    return replace(explained, reason=reason, steps=(explained.steps[0], step, *explained.steps[1:]))


def _not_sent_on(edge: ResolvedEdge, packet: Packet) -> Iterator[Clause]:
    """The drop at the edge itself of a packet that a service would be sent on with, were its source named."""
    for forward in edge.forwards if packet.version == 4 else ():
        service, groups = forward.service, forward.service.groups
        if groups is not None and replace(_passes(forward), destination=None).holds(packet):
            reason = f"{service.name} goes to {forward.host.name}, and does not name the source: it is in none of {', '.join(groups)}"
            yield Clause("drop", reason, at=forward.at)
