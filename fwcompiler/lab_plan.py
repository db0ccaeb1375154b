"""What a lab of one host tries: who is in the network, with which addresses, what is sent, and what has to become of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fwcompiler.addresses import EVERYONE, LAST, LOOPBACK, MULTICAST, NOBODY, Addresses, Range, covers, subtract
from fwcompiler.kernel.labnet import Router, Station
from fwcompiler.kernel.labprobe import Probe
from fwcompiler.ports import LAST as LAST_PORT
from fwcompiler.ports import PROTOCOLS, WITH_PORTS
from fwcompiler.proof.fields import ECHO_REQUEST, Packet
from fwcompiler.proof.meaning import Clause, clauses
from fwcompiler.resolved import Resolved
from fwcompiler.service import ResolvedService

FAMILIES = (4, 6)
STRANGER = "internet"
BLOCKED = "blocked"
PING = "(ping)"
NO_SERVICE = "(no service)"
SOLICITATION = 135
"""ICMPv6 type of the question for a neighbour's link address (RFC 4861)."""

HOST_POOL = Addresses.of([(0xC6120000, 0xC613FFFF)], [(0x20010002 << 96, (0x20010002 << 96) + (1 << 80) - 1)])
"""Addresses of test networks: 198.18.0.0/15 and 2001:2::/48 (RFC 2544, RFC 5180). The host takes one that is free."""
STRANGER_POOL = Addresses.of(
    [(0xC0000200, 0xC00002FF), (0xC6336400, 0xC63364FF), (0xCB007100, 0xCB0071FF)],
    [(0x20010DB8 << 96, (0x20010DB9 << 96) - 1), (0x3FFF << 112, (0x3FFF << 112) + (1 << 108) - 1)],
)
"""Documentation addresses (RFC 5737, RFC 3849, RFC 9637), where a stranger comes from while one is left."""
UNUSABLE = {
    4: ((0, 0x00FFFFFF), LOOPBACK[4], MULTICAST[4], (LAST[4], LAST[4])),
    6: ((0, LAST[4]), (0xFFFF << 32, (0xFFFF << 32) | LAST[4]), (0xFE80 << 112, (0xFEC0 << 112) - 1), MULTICAST[6]),
}
"""Not the address of any single station: unspecified, loopback, IPv4 in IPv6, link-local, multicast, broadcast."""


@dataclass(frozen=True, slots=True)
class Client:
    """Somebody in the lab: the name of a group or role, and an address of each family it has."""

    name: str
    addresses: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Target:
    """Something to be reached: a port of a service, a port that no service covers, or the answer to a ping.

    `title`: what stands above its column, where that is not the service's name.
    """

    service: str
    protocol: str
    port: int = 0
    title: str = ""

    @property
    def column(self) -> str:
        """Targets with the same words share a column of the matrix."""
        return self.title or self.service

    def protocol_in(self, version: int) -> str:
        """The protocol in one family: a ping is ICMP or ICMPv6."""
        return self.protocol if version == 4 or self.service != PING else "icmpv6"

    def text(self, version: int) -> str:
        """`udp/5060`, `vrrp`."""
        return f"{self.protocol}/{self.port}" if self.port else self.protocol_in(version)


@dataclass(frozen=True, slots=True)
class Fare:
    """How a packet has to come in that an edge lets pass: at which host, from one of these addresses and ports as seen there.

    No ports: it keeps its own, whichever that is.
    """

    place: str
    sources: Addresses
    ports: Range | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One packet of the lab, and the clause that decides it. `fare`: None where the host under test has to get it."""

    client: Client
    version: int
    target: Target
    packet: Packet
    probe: Probe
    clause: Clause
    fare: Fare | None = None

    @property
    def expected(self) -> bool:
        """True where the packet has to arrive."""
        return self.clause.verdict == "accept"


@dataclass(frozen=True, slots=True)
class LabPlan:
    """All that the lab is going to do. ``left_out`` says what it cannot, in sentences.

    `router` and `places`, the names of the host and of every station, are there where the host sends on.
    """

    host: Mapping[int, int]
    clients: tuple[Client, ...]
    targets: tuple[Target, ...]
    stations: tuple[Station, ...]
    trials: tuple[Trial, ...]
    left_out: tuple[str, ...] = ()
    router: Router | None = None
    places: tuple[str, ...] = ()


# Who is in the lab.


def plan_lab(policy: Resolved, others: Iterable[Client] = ()) -> LabPlan:
    """Clients, targets and packets for a policy, and what the policy says about each packet.

    ``others`` come along with those that the policy asks for; the caller sees to it that stations can have their addresses.
    """
    own = policy.host.all() if policy.host else NOBODY
    chosen, left_out = choose_clients(policy, own)
    clients = (*chosen, *others)
    host = {v: pick(own, v) or _host_address(policy, v, clients) for v in FAMILIES}
    meaning = clauses(policy)
    stations, homes = _stations(meaning, clients)
    targets = (*service_targets(policy.services), *other_targets(policy.services))
    trials = tuple(
        _trial(meaning, client, version, target, homes[version, client.addresses[version]])
        for client in clients
        for version in client.addresses
        for target in targets
    )
    return LabPlan(host, clients, targets, stations, trials, left_out)


def choose_clients(policy: Resolved, inhabited: Addresses = NOBODY) -> tuple[tuple[Client, ...], tuple[str, ...]]:
    """Everybody the policy speaks about, and a stranger; then the groups that nobody can stand for.

    ``inhabited``: addresses that somebody else in the lab has. A group of nobody else has no client.
    """
    services = (*policy.services, *(f.service for f in policy.edge.forwards)) if policy.edge else policy.services
    named = dict.fromkeys((*policy.trust, *(g for s in services for g in s.groups or ())))
    block = policy.block
    excepted = block.excepted if block else ()
    blocked = policy.addresses(block.groups) - policy.addresses(excepted) if block else NOBODY
    taken: dict[int, set[int]] = {4: set(), 6: set()}
    clients: list[Client] = []
    left_out: list[str] = []
    for name in dict.fromkeys((*named, *excepted)):
        clients.append(_client(name, (each - inhabited for each in _of_group(policy, name, blocked)), taken))
        if not policy.groups[name].addresses or policy.groups[name].addresses - inhabited:
            left_out += _missing(policy, clients[-1])
    clients.append(_client(STRANGER, (_less(policy, pool) - inhabited for pool in (STRANGER_POOL, EVERYONE)), taken))
    for name in block.groups if block else ():
        label = BLOCKED if block and len(block.groups) == 1 else f"{BLOCKED} by {name}"
        clients.append(_client(label, ((policy.groups[name].addresses & blocked) - inhabited,), taken))
    for name in excepted:
        spared = policy.groups[name].addresses & policy.addresses(block.groups if block else ())
        clients.append(_client(f"{BLOCKED} {name}", (spared - inhabited,), taken))
    return tuple(c for c in clients if c.addresses), tuple(left_out)


def _of_group(policy: Resolved, name: str, blocked: Addresses) -> Iterator[Addresses]:
    """Addresses that can stand for a group, the most telling ones first: those that no other group has."""
    own = policy.groups[name].addresses
    yield _less(policy, own - blocked, but=name)
    yield own - blocked
    yield own


def _less(policy: Resolved, addresses: Addresses, but: str = "") -> Addresses:
    """What no group has; `but` is not counted. One group after the other: most are small, and so is what is left."""
    for group in policy.groups.values():
        if group.name != but:
            addresses = addresses - group.addresses
    return addresses


def _missing(policy: Resolved, client: Client) -> Iterator[str]:
    if not client.addresses:
        why = "has dynamic members only" if policy.groups[client.name].dynamic else "has no address that a station could use"
        yield f"{client.name} {why}: nobody stands for it"


def _client(name: str, choices: Iterable[Addresses], taken: Mapping[int, set[int]]) -> Client:
    """By family, from the first choice that has a free address; an address of another client rather than none."""
    found: dict[int, int] = {}
    looked_at: list[Addresses] = []
    for choice in choices:
        looked_at.append(choice)
        found = {v: a for v in FAMILIES if (a := found.get(v, pick(choice, v, taken[v]))) is not None}
        if len(found) == len(FAMILIES):
            break
    for choice in looked_at:
        found = {v: a for v in FAMILIES if (a := found.get(v, pick(choice, v))) is not None}
    for version, address in found.items():
        taken[version].add(address)
    return Client(name, found)


def pick(addresses: Addresses, version: int, avoid: Iterable[int] = ()) -> int | None:
    """The first good address of a set: not the one that names a whole network, where there is another."""
    usable = subtract(addresses.family(version), UNUSABLE[version])
    not_these = frozenset(avoid)
    for low, high in usable:
        first = low + 1 if high - low >= 3 else low
        for address in range(first, min(high, first + len(not_these)) + 1):
            if address not in not_these:
                return address
    return next((low for low, _ in usable if low not in not_these), None)


def _host_address(policy: Resolved, version: int, clients: Iterable[Client]) -> int:
    """One that no client has, and no group if that can be had."""
    taken = {c.addresses[version] for c in clients if version in c.addresses}
    for choice in (_less(policy, HOST_POOL), HOST_POOL):
        address = pick(choice, version, taken)
        if address is not None:
            return address
    raise AssertionError("a lab has fewer clients than its pool has addresses")


def _stations(meaning: Sequence[Clause], clients: Iterable[Client]) -> tuple[tuple[Station, ...], dict[tuple[int, int], int]]:
    """One a client, but one address is in one place only; by address, the number of its station."""
    stations: list[Station] = []
    homes: dict[tuple[int, int], int] = {}
    for client in clients:
        own = {v: a for v, a in client.addresses.items() if (v, a) not in homes}
        homes |= {(v, a): len(stations) for v, a in own.items()}
        if own:
            unasked = frozenset((6,)) if 6 in own and not _hears_neighbour(meaning, own[6]) else frozenset[int]()
            stations.append(Station(own, unasked))
    return tuple(stations), homes


def _hears_neighbour(meaning: Sequence[Clause], source: int) -> bool:
    return decide(meaning, Packet(6, source, PROTOCOLS["icmpv6"], icmp_type=SOLICITATION)).verdict == "accept"


def decide(meaning: Sequence[Clause], packet: Packet) -> Clause:
    """The first clause that holds."""
    return next(c for c in meaning if c.holds(packet))


# What is sent.


def service_targets(services: Iterable[ResolvedService], title: str = "") -> Iterator[Target]:
    """First and last port of every service, and the protocols that have none."""
    for service in services:
        for ports in service.ports:
            ends = dict.fromkeys(port for span in ports.ranges for port in span)
            yield from (Target(service.name, ports.protocol, port, title) for port in ends)
            if not ports.ranges:
                yield Target(service.name, ports.protocol, 0, title)


def other_targets(services: Sequence[ResolvedService]) -> Iterator[Target]:
    """One port of each protocol that no service covers, the responder's own, and a ping."""
    for protocol in WITH_PORTS:
        port = _uncovered(services, protocol)
        if port is not None:
            yield Target(NO_SERVICE, protocol, port)
    yield from (Target(NO_SERVICE, "tcp", s.options.responder) for s in services if s.options.responder)
    yield Target(PING, "icmp")


def _uncovered(services: Iterable[ResolvedService], protocol: str) -> int | None:
    ranges = [p.ranges for s in services for p in s.ports if p.protocol == protocol]
    return next((port for port in range(9, LAST_PORT + 1) if not any(covers(r, port) for r in ranges)), None)


def _trial(meaning: Sequence[Clause], client: Client, version: int, target: Target, station: int) -> Trial:
    protocol, source = target.protocol_in(version), client.addresses[version]
    number = PROTOCOLS[protocol]
    packet = Packet(version, source, number, target.port, icmp_type=ECHO_REQUEST.get(number, 0), interface=f"eth{station}")
    clause = decide(meaning, packet)
    return Trial(client, version, target, packet, Probe(station, version, protocol, target.port, clause.verdict == "accept"), clause)
