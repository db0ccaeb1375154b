"""What a lab of an edge tries: people outside, the hosts behind, and what each of them sends to the edge and through it.

Everybody outside sends to the edge's address, over IPv6 to the host that a port belongs to, and past it to a private address
whose port is not theirs. The hosts behind send to the edge's address as well, and out, from ports that are theirs or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fwcompiler.addresses import Addresses, covers
from fwcompiler.edge import PRIVATE, RTP, SIP
from fwcompiler.fleet import ResolvedHost
from fwcompiler.kernel.labnet import Router, Station
from fwcompiler.kernel.labprobe import Probe
from fwcompiler.lab_plan import (
    FAMILIES,
    STRANGER,
    Client,
    Fare,
    LabPlan,
    Target,
    Trial,
    choose_clients,
    decide,
    other_targets,
    service_targets,
)
from fwcompiler.ports import PROTOCOLS, port_text
from fwcompiler.proof.edge import Passed, departures, follow
from fwcompiler.proof.fields import ECHO_REQUEST, Packet
from fwcompiler.resolved import Resolved
from fwcompiler.service import udp_spans

PAST = "(past the plan)"
"""Straight to a host behind, at a port that is not that host's."""
OUT = "(out)"
SINK = 9
"""Where packets to the outside go: the discard service, RFC 863."""
SIGNALLING = 5060


@dataclass(frozen=True, slots=True)
class Sent:
    """What somebody sends: to which target, at which address, from which UDP port (0: any)."""

    target: Target
    to: int
    source_port: int = 0


def plan_edge_lab(policy: Resolved) -> LabPlan:
    """Clients on both sides of an edge, packets, and what the policy says about each packet."""
    return _Planning(policy).plan()


def hosts_behind(policy: Resolved) -> tuple[ResolvedHost, ...]:
    """The dialers, and all others that something is forwarded to or kept from."""
    assert policy.edge
    assert policy.plan
    forwarded = (f.host for f in (*policy.edge.forwards, *policy.edge.guarded))
    known = {host.name: host for host in (*policy.plan.dialers, *forwarded)}
    return tuple(host for host in known.values() if host.addresses)


class _Planning:
    """The inputs of one plan, and who lives where."""

    def __init__(self, policy: Resolved) -> None:
        assert policy.edge
        assert policy.host
        self.policy, self.edge, self.host = policy, policy.edge, policy.host
        self.behind = hosts_behind(policy)
        self.inside = tuple(Client(h.name, {v: a for v in FAMILIES if (a := h.first(v)) is not None}) for h in self.behind)
        inhabited = self.host.all() | self.edge.hidden
        for each in self.behind:
            inhabited = inhabited | each.all()
        self.outside, self.left_out = choose_clients(policy, inhabited)
        self.own = dict(reversed(_outer_first(self.host.addresses)))
        self.homes: dict[tuple[int, int], int] = {}
        stations: list[Station] = []
        places = [self.host.name]
        for client in (*self.outside, *self.inside):
            own = {v: a for v, a in client.addresses.items() if (v, a) not in self.homes}
            if own:
                self.homes |= {(v, a): len(stations) for v, a in own.items()}
                stations.append(Station(own))
                places.append(client.name)
        self.stations, self.places = tuple(stations), tuple(places)

    def plan(self) -> LabPlan:
        trials = (*self._trials(self.outside, self.edge.wan), *self._trials(self.inside, self.edge.lan))
        targets = tuple(dict.fromkeys(t.target for t in trials))
        clients = (*self.outside, *self.inside)
        return LabPlan(self.own, clients, targets, self.stations, trials, self.left_out, self._router(), self.places)

    def _router(self) -> Router:
        """The first address that is not private stands on the wan, private ones on the lan."""
        wan: list[tuple[int, int]] = []
        lan: list[tuple[int, int]] = []
        for version in FAMILIES:
            ordered = [pair for pair in _outer_first(self.host.addresses) if pair[0] == version]
            for number, pair in enumerate(ordered):
                (lan if number and (version == 6 or covers(PRIVATE, pair[1])) else wan).append(pair)
        names = {client.name for client in self.inside}
        numbers = {
            name in names: tuple(n for n, p in enumerate(self.places[1:]) if (p in names) == (name in names)) for name in self.places[1:]
        }
        return Router(
            {self.edge.wan: tuple(wan), self.edge.lan: tuple(lan)},
            {self.edge.wan: numbers.get(False, ()), self.edge.lan: numbers.get(True, ())},
        )

    def _trials(self, clients: Iterable[Client], came: str) -> Iterator[Trial]:
        inside = came == self.edge.lan
        for version in FAMILIES:
            sent = [*self._to_the_edge(version), *self._past(version)] if not inside else [*self._to_the_edge(version)]
            for client in clients:
                if version in client.addresses:
                    mine = (*sent, *self._out(client, version)) if inside else sent
                    yield from (self._trial(client, version, each, came) for each in mine if each.to != client.addresses[version])

    def _to_the_edge(self, version: int) -> Iterator[Sent]:
        """Everything that the edge has or sends on; over IPv6 that is asked of its host."""
        own = self.own.get(version)
        for target in service_targets(self.policy.services) if own is not None else ():
            yield Sent(target, own or 0)
        for forward in self.edge.forwards:
            span = next(udp_spans(forward.service), None)
            title = f"{RTP} {port_text(span)}" if forward.service.name == RTP and span else ""
            to = own if version == 4 else forward.host.first(version)
            yield from (Sent(t, to) for t in service_targets((forward.service,), title) if to is not None)
        services = (*self.policy.services, *(f.service for f in self.edge.forwards))
        for target in other_targets(services) if own is not None else ():
            yield Sent(target, own or 0)

    def _past(self, version: int) -> Iterator[Sent]:
        """Signalling of a host that does not own it, and the media ports of another one."""
        for host in self.behind:
            to = host.first(version)
            mine = [span for f in self.edge.forwards if f.host.name == host.name for span in udp_spans(f.service)]
            others = [s for f in self.edge.forwards if f.service.name in (RTP, *SIP) for s in udp_spans(f.service)]
            foreign = dict.fromkeys(s[0] for s in others if not any(covers((span,), s[0]) for span in mine))
            if to is not None:
                yield from (Sent(Target(PAST, "udp", port), to) for port in list(foreign)[:2])

    def _out(self, client: Client, version: int) -> Iterator[Sent]:
        """Out: from 5060 to somebody whose answer may come back there; from its own media ports, and from somebody else's."""
        by_name = {c.name: c.addresses.get(version) for c in self.outside}
        chunks = [(f.host.name, span) for f in self.edge.forwards if f.service.name == RTP for span in udp_spans(f.service)]
        own = next((span[1] for name, span in chunks if name == client.name), None)
        other = next((span[0] for name, span in chunks if name != client.name), None)
        sip = next((f.service for f in self.edge.forwards if f.service.name in SIP), None)
        peers = [STRANGER] if sip is None or sip.groups is None else sip.groups
        peer = next((by_name[name] for name in peers if by_name.get(name) is not None), None)
        stranger = by_name.get(STRANGER)
        ways = (("out from 5060", SIGNALLING, peer), ("from its media", own, stranger), ("from other media", other, stranger))
        for title, port, to in ways:
            if port is not None and to is not None:
                yield Sent(Target(OUT, "udp", SINK, title), to, port)

    def _trial(self, client: Client, version: int, sent: Sent, came: str) -> Trial:
        protocol, source = sent.target.protocol_in(version), client.addresses[version]
        number = PROTOCOLS[protocol]
        packet = Packet(version, source, number, sent.target.port, sent.to, icmp_type=ECHO_REQUEST.get(number, 0), interface=came)
        if sent.source_port:
            packet = Packet(version, source, number, sent.target.port, sent.to, sent.source_port, interface=came)
        passed = follow(self.policy, self.edge, packet)
        clause = decide(passed.meaning, passed.packet)
        accepted = clause.verdict == "accept"
        probe = Probe(self.homes[version, source], version, protocol, sent.target.port, accepted, sent.to, sent.source_port)
        return Trial(client, version, sent.target, packet, probe, clause, self._fare(passed) if accepted else None)

    def _fare(self, passed: Passed) -> Fare:
        """Where it comes out, and whom it seems to come from there."""
        packet = passed.packet
        as_itself = Addresses.of(*(((packet.source, packet.source),) if packet.version == v else () for v in FAMILIES))
        if not passed.leaves:
            return Fare(self.host.name, as_itself)
        place = self.places[self.homes[packet.version, packet.destination or 0] + 1]
        if packet.version == 6:
            return Fare(place, as_itself)
        for each in departures(self.edge):
            udp = packet.protocol == PROTOCOLS["udp"]
            from_port = each.source_ports is None or (udp and covers((each.source_ports,), packet.source_port))
            if each.out == passed.leaves and (4, packet.source) in each.source and from_port and (passed.sent or not each.returned):
                return Fare(place, self.edge.addresses.only(4), each.ports)
        return Fare(place, as_itself)


def _outer_first(addresses: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Addresses in their order, private ones behind the others."""
    return sorted(addresses, key=lambda pair: pair[0] == 4 and covers(PRIVATE, pair[1]))
