"""The meaning of a policy: the reference that compilers, kernels and explanations are held against.

Written straight from the policy, clause by clause in the order of the design's "the meaning", and sharing nothing
with `lower` or the backends but value types. The first clause that holds decides a packet.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fwcompiler.addresses import LOOPBACK, Addresses, address_text, covers, range_text
from fwcompiler.diagnostics import Position
from fwcompiler.options import ResolvedLimit
from fwcompiler.ports import PROTOCOLS, Ports, port_text
from fwcompiler.proof.fields import Packet
from fwcompiler.ruleset import Limit, Period, State

if TYPE_CHECKING:
    from fwcompiler.resolved import Resolved
    from fwcompiler.service import ResolvedService

Verdict = Literal["accept", "drop", "reject"]

_LOOPBACK = Addresses((LOOPBACK[4],), (LOOPBACK[6],))
ECHO_LIMIT = Limit(20, "second", 40)
_ICMP: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    4: ((3, 11, 12), (8,)),
    6: ((1, 2, 3, 4, 130, 131, 132, 133, 134, 135, 136, 143), (128,)),
}
"""By family: types that are accepted, and types that are accepted at a limited rate."""


@dataclass(frozen=True, slots=True)
class Over:
    """The source has exceeded `rate` packets per `per` (after `burst` at once), as counted under `name`."""

    name: str
    rate: int
    per: Period
    burst: int


@dataclass(frozen=True, slots=True)
class Clause:
    """One sentence of the meaning. A field that is None says nothing; all others have to hold.

    `dynamic` names groups whose members at run time hold as well as `source`; `spared` those whose members at run
    time do not, nor does `spared_source`. `members` names groups whose members at run time hold as well as `destination`.
    `protocol` is a number; `from_ports` are this end's. Packets to `spared_ports` are not meant. With a `limit`, it holds only while
    the limit is not exhausted; with `over`, only for a source that has exceeded its own.
    """

    verdict: Verdict
    reason: str
    service: str | None = None
    at: Position | None = None
    loopback: bool | None = None
    source: Addresses | None = None
    destination: Addresses | None = None
    ports: tuple[Ports, ...] | None = None
    states: frozenset[State] | None = None
    icmp: tuple[int, tuple[int, ...]] | None = None
    groups: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    spared_source: Addresses | None = None
    spared_ports: Ports | None = None
    limit: Limit | None = None
    over: Over | None = None
    from_ports: tuple[Ports, ...] | None = None
    members: tuple[str, ...] = ()
    protocol: int | None = None

    def holds(self, packet: Packet, exhausted: Container[Limit | Over] = ()) -> bool:
        """True when every field that says something agrees with the packet, and no limit is exhausted but these."""
        if self.limit in exhausted or (self.over is not None and self.over not in exhausted):
            return False
        if self.spared_ports is not None and _to_ports(self.spared_ports, packet, packet.port):
            return False
        if self.loopback is not None and self.loopback != (packet.interface == "lo"):
            return False
        if self.source is not None and (packet.version, packet.source) not in self.source:
            return False
        if self.spared_source is not None and (packet.version, packet.source) in self.spared_source:
            return False
        if self.source is None and self.dynamic:
            return False
        if self.destination is not None and (packet.destination is None or (packet.version, packet.destination) not in self.destination):
            return False
        if self.states is not None and packet.state not in self.states:
            return False
        if self.protocol is not None and packet.protocol != self.protocol:
            return False
        if self.from_ports is not None and not any(_to_ports(p, packet, packet.source_port) for p in self.from_ports):
            return False
        if self.icmp is not None and not self._is_icmp(packet):
            return False
        return self.ports is None or any(_to_ports(p, packet, packet.port) for p in self.ports)

    def _is_icmp(self, packet: Packet) -> bool:
        assert self.icmp is not None
        version, types = self.icmp
        protocol = PROTOCOLS["icmp" if version == 4 else "icmpv6"]
        return packet.version == version and packet.protocol == protocol and packet.icmp_type in types


def _to_ports(ports: Ports, packet: Packet, port: int) -> bool:
    return packet.protocol == PROTOCOLS[ports.protocol] and (not ports.ranges or covers(ports.ranges, port))


def clauses(policy: Resolved) -> tuple[Clause, ...]:
    """The whole meaning of a policy, in order; the last clause holds for every packet."""
    early = [s for s in policy.services if s.early]
    late = [s for s in policy.services if not s.early]
    untracked = next((s.ports[0] for s in policy.services if s.options.bypass), None)
    return (
        Clause("accept", "the loopback interface is open", loopback=True),
        Clause("drop", "a loopback address may not come from outside", source=_LOOPBACK),
        Clause("drop", "a loopback address may not be reached from outside", destination=_LOOPBACK),
        *blocking(policy),
        *trusting(policy),
        Clause("drop", "connection tracking finds the packet invalid", states=frozenset(("invalid",)), spared_ports=untracked),
        *(c for s in early for c in _service(policy, s)),
        Clause("accept", "it belongs to an established connection", states=frozenset(("established", "related")), spared_ports=untracked),
        *(c for s in late for c in _service(policy, s)),
        *_icmp(),
        Clause("drop", "no service covers it"),
    )


def blocking(policy: Resolved) -> Iterator[Clause]:
    """A source in a blocked group, unless it is in an excepted one; members at run time count on both sides."""
    block = policy.block
    if block is None:
        return
    spared = tuple(name for name in block.excepted if policy.groups[name].dynamic)
    yield Clause(
        "drop",
        "the block list has the source",
        at=block.at,
        source=policy.addresses(block.groups),
        groups=block.groups,
        dynamic=tuple(name for name in block.groups if policy.groups[name].dynamic),
        spared=spared,
        spared_source=policy.addresses(block.excepted),
    )


def trusting(policy: Resolved) -> Iterator[Clause]:
    """Sources whose every packet is accepted."""
    for name in policy.trust:
        group = policy.groups[name]
        dynamic = (name,) if group.dynamic else ()
        yield Clause("accept", "the source is trusted", at=policy.trust_at, source=group.addresses, groups=(name,), dynamic=dynamic)


def _service(policy: Resolved, service: ResolvedService) -> Iterator[Clause]:
    """Groups without a limit come first: a source that is in one of them as well is not limited."""
    name, at = service.name, service.at
    limit = service.options.limit("anywhere")
    if service.groups is None:
        if limit:
            for group in policy.named:
                yield _accept(policy, service, group, f"{group} is never limited")
            yield replace(_over(service, limit), reason=f"{name} takes at most {limit} from each source that no service names")
        what = f"{name} is open to anywhere" + (f", up to {limit} from each source" if limit else "")
        what += f" ({service.expose})" if service.expose else ""
        yield Clause("accept", what, name, at, ports=service.ports)
        return
    for group in sorted(service.groups, key=lambda g: service.options.limit(g) is not None):
        limit = service.options.limit(group)
        accepted = _accept(policy, service, group, f"{name} names the source" + (f", up to {limit}" if limit else ""))
        if limit:
            over = _over(service, limit)
            yield replace(over, source=accepted.source, groups=accepted.groups, dynamic=accepted.dynamic)
        yield accepted
    yield Clause("drop", f"{name} does not name the source: it is in none of {', '.join(service.groups)}", name, at, ports=service.ports)


def _accept(policy: Resolved, service: ResolvedService, group: str, reason: str) -> Clause:
    known = policy.groups[group]
    dynamic = (group,) if known.dynamic else ()
    return Clause("accept", reason, service.name, service.at, source=known.addresses, ports=service.ports, groups=(group,), dynamic=dynamic)


def _over(service: ResolvedService, limit: ResolvedLimit) -> Clause:
    """Over UDP every packet counts, over TCP every new connection."""
    states: frozenset[State] | None = frozenset(("new",)) if service.ports[0].protocol == "tcp" else None
    over = Over(f"{service.name}.{limit.group}", limit.rate, limit.per, limit.burst)
    reason = f"{service.name} takes at most {limit} from each source in {limit.group}"
    return Clause("drop", reason, service.name, limit.at, ports=service.ports, states=states, over=over)


def _icmp() -> Iterator[Clause]:
    for version, (plain, limited) in _ICMP.items():
        family = "ICMP" if version == 4 else "ICMPv6"
        yield Clause("accept", f"an {family} type that a host needs", icmp=(version, plain))
        yield Clause("accept", "ping is answered, at a limited rate", icmp=(version, limited), limit=ECHO_LIMIT)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one packet is accepted or dropped."""

    verdict: Verdict
    service: str | None
    reason: str
    at: Position | None
    steps: tuple[str, ...]


def explain(policy: Resolved, packet: Packet, exhausted: Container[Limit | Over] = ()) -> Explanation:
    """Decide one packet and say why: the clause that decides, and where the source's address comes from.

    ``exhausted``: limits that are used up.
    """
    return explain_by(policy, packet, clauses(policy), exhausted)


def explain_by(policy: Resolved, packet: Packet, meaning: tuple[Clause, ...], exhausted: Container[Limit | Over] = ()) -> Explanation:
    """Decide one packet by clauses of which one holds for every packet."""
    source = address_text(packet.version, packet.source)
    steps = [f"{source} -> {target_text(packet)}, {packet.state}, in {packet.interface}"]
    steps += _spared(policy, packet, source)
    decided = next(c for c in meaning if c.holds(packet, exhausted))
    reason = decided.reason
    for name in decided.groups:
        at = policy.groups[name].where(packet.version, packet.source)
        if at is not None:
            reason = f"{reason}: {source} is in {name} ({_entry(policy, name, packet)}, {at})"
            break
    open_to = sorted({g for c in meaning if c.service == decided.service and c.service for g in c.dynamic})
    if decided.verdict == "drop" and open_to:
        steps.append(f"dynamic members of {', '.join(open_to)} would be accepted; only the running host knows them")
    steps.append(f"{decided.verdict}: {reason}")
    return Explanation(decided.verdict, decided.service, reason, decided.at, tuple(steps))


def _spared(policy: Resolved, packet: Packet, source: str) -> Iterator[str]:
    """A source that the block list has and an exception spares deserves a word."""
    if policy.block is None:
        return
    for blocked in policy.block.groups:
        at = policy.groups[blocked].where(packet.version, packet.source)
        for name in policy.block.excepted if at else ():
            if (packet.version, packet.source) in policy.groups[name].addresses:
                yield f"the block list has {source} ({at}), but {name} is never blocked"
                return


def _entry(policy: Resolved, group: str, packet: Packet) -> str:
    """The range that covers the source, in canonical form."""
    for span in policy.groups[group].addresses.family(packet.version):
        if span[0] <= packet.source <= span[1]:
            return range_text(packet.version, span)
    return address_text(packet.version, packet.source)


def target_text(packet: Packet) -> str:
    """`udp/5060`, with the destination where there is one."""
    to = f"{packet.protocol_name}/{port_text((packet.port, packet.port))}" if packet.port else packet.protocol_name
    return to if packet.destination is None else f"{address_text(packet.version, packet.destination)} {to}"
