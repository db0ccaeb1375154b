"""The lab: a policy's own people in a throw-away network, real packets from each of them, compared with the meaning.

`plan_lab` is pure: it decides who is in the network, with which addresses, what is sent, and what has to become of
it. `fwcompiler.kernel` builds the network and sends; what came of it is a :class:`LabResult`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from fwcompiler.addresses import EVERYONE, LAST, LOOPBACK, MULTICAST, NOBODY, Addresses, address_text, covers, subtract
from fwcompiler.diagnostics import PolicyRejected, Position, UsageError
from fwcompiler.kernel import labprobe, runner
from fwcompiler.kernel.labnet import Network, Station, network
from fwcompiler.kernel.labprobe import Probe
from fwcompiler.ports import LAST as LAST_PORT
from fwcompiler.ports import PROTOCOLS, WITH_PORTS
from fwcompiler.proof.fields import ECHO_REQUEST, Packet
from fwcompiler.proof.meaning import Clause, clauses, explain
from fwcompiler.resolve import Resolved, ResolvedService

if TYPE_CHECKING:
    from fwcompiler.backend import Backend
    from fwcompiler.pipeline import Compiled

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
    """Something to be reached: a port of a service, a port that no service covers, or the answer to a ping."""

    service: str
    protocol: str
    port: int = 0

    def protocol_in(self, version: int) -> str:
        """The protocol in one family: a ping is ICMP or ICMPv6."""
        return self.protocol if version == 4 or self.service != PING else "icmpv6"

    def text(self, version: int) -> str:
        """`udp/5060`, `vrrp`."""
        return f"{self.protocol}/{self.port}" if self.port else self.protocol_in(version)


@dataclass(frozen=True, slots=True)
class Trial:
    """One packet of the lab, and the clause that decides it."""

    client: Client
    version: int
    target: Target
    packet: Packet
    probe: Probe
    clause: Clause

    @property
    def expected(self) -> bool:
        """True where the packet has to arrive."""
        return self.clause.verdict == "accept"


@dataclass(frozen=True, slots=True)
class LabPlan:
    """All that the lab is going to do. ``left_out`` says what it cannot, in sentences."""

    host: Mapping[int, int]
    clients: tuple[Client, ...]
    targets: tuple[Target, ...]
    stations: tuple[Station, ...]
    trials: tuple[Trial, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one packet, what should have, and why."""

    trial: Trial
    reached: bool
    reason: str
    at: Position | None

    @property
    def agrees(self) -> bool:
        """True where the kernel did what the policy says."""
        return self.reached == self.trial.expected


@dataclass(frozen=True, slots=True)
class LabResult:
    """The lab's matrix, and whether all of it is as the policy says."""

    policy: str
    backend: str
    plan: LabPlan
    outcomes: tuple[Outcome, ...]
    seconds: float = field(default=0.0, compare=False)

    @property
    def agrees(self) -> bool:
        """True where every packet fared as the policy says."""
        return all(o.agrees for o in self.outcomes)

    def as_json(self) -> dict[str, Any]:
        """The shape of `lab --json`: `fwcompiler.shapes.LabShape`."""
        probes = [_probe_json(o) for o in self.outcomes]
        return {"backend": self.backend, "agrees": self.agrees, "probes": probes, "left_out": list(self.plan.left_out)}


def _probe_json(outcome: Outcome) -> dict[str, Any]:
    trial = outcome.trial
    return {
        "client": trial.client.name,
        "from": address_text(trial.version, trial.packet.source),
        "to": trial.target.text(trial.version),
        "service": trial.target.service if trial.target.service not in (PING, NO_SERVICE) else None,
        "reached": outcome.reached,
        "expected": trial.expected,
    }


def run_lab(compiled: Compiled, backend: Backend) -> LabResult:
    """Build the network, load the policy's rules there, send, take everything down again.

    Raises:
        PolicyRejected: the backend cannot express something.
        UsageError: the host is an edge.
        HostRefused: no right to make namespaces, a program is missing, or the kernel refuses.
    """
    if compiled.resolved.edge:
        raise UsageError("the lab tries one host that answers for itself, and an edge sends on", hint="try its hosts: --host NAME")
    started = monotonic()
    refused = backend.refuse(compiled.ruleset)
    if refused:
        raise PolicyRejected(findings=refused)
    runner.require(backend.programs)
    plan = plan_lab(compiled.resolved)
    with network(plan.host, plan.stations) as net:
        with net.host.entered():
            runner.execute(backend.load(compiled.ruleset))
        outcomes = try_packets(compiled.resolved, plan, net)
    return LabResult(compiled.path, backend.name, plan, outcomes, monotonic() - started)


def try_packets(policy: Resolved, plan: LabPlan, net: Network, waits: Sequence[float] = labprobe.WAITS) -> tuple[Outcome, ...]:
    """Send all packets of a plan; the rules are loaded already."""
    reached = labprobe.fire(net, [t.probe for t in plan.trials], waits)
    return tuple(_outcome(policy, trial, r) for trial, r in zip(plan.trials, reached, strict=True))


def _outcome(policy: Resolved, trial: Trial, reached: bool) -> Outcome:
    """The full explanation is looked up where it is needed; with big lists it takes its time."""
    clause = trial.clause
    reason = clause.reason if reached == trial.expected else explain(policy, trial.packet).reason
    return Outcome(trial, reached, reason, clause.at)


# Who is in the lab.


def plan_lab(policy: Resolved, others: Iterable[Client] = ()) -> LabPlan:
    """Clients, targets and packets for a policy, and what the policy says about each packet.

    ``others`` come along with those that the policy asks for; the caller sees to it that stations can have their addresses.
    """
    chosen, left_out = choose_clients(policy)
    clients = (*chosen, *others)
    host = {v: _host_address(policy, v, clients) for v in FAMILIES}
    meaning = clauses(policy)
    stations, homes = _stations(meaning, clients)
    targets = tuple(_targets(policy))
    trials = tuple(
        _trial(meaning, client, version, target, homes[version, client.addresses[version]])
        for client in clients
        for version in client.addresses
        for target in targets
    )
    return LabPlan(host, clients, targets, stations, trials, left_out)


def choose_clients(policy: Resolved) -> tuple[tuple[Client, ...], tuple[str, ...]]:
    """Everybody the policy speaks about, and a stranger; then the groups that nobody can stand for."""
    named = dict.fromkeys((*policy.trust, *(g for s in policy.services for g in s.groups or ())))
    block = policy.block
    excepted = block.excepted if block else ()
    blocked = policy.addresses(block.groups) - policy.addresses(excepted) if block else NOBODY
    taken: dict[int, set[int]] = {4: set(), 6: set()}
    clients: list[Client] = []
    left_out: list[str] = []
    for name in dict.fromkeys((*named, *excepted)):
        clients.append(_client(name, _of_group(policy, name, blocked), taken))
        left_out += _missing(policy, clients[-1])
    clients.append(_client(STRANGER, (_less(policy, pool) for pool in (STRANGER_POOL, EVERYONE)), taken))
    for name in block.groups if block else ():
        label = BLOCKED if block and len(block.groups) == 1 else f"{BLOCKED} by {name}"
        clients.append(_client(label, (policy.groups[name].addresses & blocked,), taken))
    for name in excepted:
        spared = policy.groups[name].addresses & policy.addresses(block.groups if block else ())
        clients.append(_client(f"{BLOCKED} {name}", (spared,), taken))
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
    return _decide(meaning, Packet(6, source, PROTOCOLS["icmpv6"], icmp_type=SOLICITATION)).verdict == "accept"


def _decide(meaning: Sequence[Clause], packet: Packet) -> Clause:
    return next(c for c in meaning if c.holds(packet))


# What is sent.


def _targets(policy: Resolved) -> Iterator[Target]:
    """First and last port of every service, one port a protocol that no service covers, and a ping."""
    for service in policy.services:
        for ports in service.ports:
            ends = dict.fromkeys(port for span in ports.ranges for port in span)
            yield from (Target(service.name, ports.protocol, port) for port in ends)
            if not ports.ranges:
                yield Target(service.name, ports.protocol)
    for protocol in WITH_PORTS:
        port = _uncovered(policy.services, protocol)
        if port is not None:
            yield Target(NO_SERVICE, protocol, port)
    yield Target(PING, "icmp")


def _uncovered(services: Iterable[ResolvedService], protocol: str) -> int | None:
    ranges = [p.ranges for s in services for p in s.ports if p.protocol == protocol]
    return next((port for port in range(9, LAST_PORT + 1) if not any(covers(r, port) for r in ranges)), None)


def _trial(meaning: Sequence[Clause], client: Client, version: int, target: Target, station: int) -> Trial:
    protocol, source = target.protocol_in(version), client.addresses[version]
    number = PROTOCOLS[protocol]
    packet = Packet(version, source, number, target.port, icmp_type=ECHO_REQUEST.get(number, 0), interface=f"eth{station}")
    clause = _decide(meaning, packet)
    return Trial(client, version, target, packet, Probe(station, version, protocol, target.port, clause.verdict == "accept"), clause)


# What is printed.


def _word(reached: bool) -> str:
    return "reached" if reached else "dropped"


def lab_text(result: LabResult, *, color: bool = False, width: int = 140) -> str:
    """The matrix, every disagreement in full below it, and the verdict on the whole."""
    red, off = ("\033[31m", "\033[0m") if color else ("", "")
    wrong = [o for o in result.outcomes if not o.agrees]
    lines = [*_matrix(result, width), *result.plan.left_out]
    for o in wrong:
        to, source = o.trial.target.text(o.trial.version), address_text(o.trial.version, o.trial.packet.source)
        what = f"{o.trial.client.name} {source} -> {to}: {_word(o.reached)}, but the policy says {_word(o.trial.expected)}: {o.reason}"
        lines.append(f"{red}MISMATCH{off} {what}" + (f" ({o.at})" if o.at else ""))
    count = f"{len(result.outcomes)} packets from {len(result.plan.clients)} clients through {result.backend}"
    verdict = f"{len(wrong)} of them otherwise than the policy says" if wrong else "all as the policy says"
    return "\n".join((*lines, f"{count} in {result.seconds:.1f} s: {verdict}"))


def _matrix(result: LabResult, width: int) -> Iterator[str]:
    """One line a client and family, one column a service; several tables where one would be too wide."""
    columns = dict.fromkeys(t.service for t in result.plan.targets)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in result.outcomes:
        who = (outcome.trial.client.name, address_text(outcome.trial.version, outcome.trial.packet.source))
        cells = rows.setdefault(who, {})
        service = outcome.trial.target.service
        cells[service] = _joined(cells.get(service), _word(outcome.reached) if outcome.agrees else f"{_word(outcome.reached).upper()}!")
    left = [max(len(who[i]) for who in [("from", "address"), *rows]) for i in (0, 1)]
    widths = {c: max(len(c), *(len(cells.get(c, "")) for cells in rows.values())) + 2 for c in columns}
    for block in _blocks(widths, width - sum(left) - 4):
        yield _line(("from", "address"), left, block, {c: c for c in block})
        yield from (_line(who, left, block, cells) for who, cells in rows.items())
        yield ""


def _joined(old: str | None, new: str) -> str:
    """One word for all ports of a service; a disagreement at one of them is not hidden by the others."""
    if old is None or old == new:
        return new
    return next((word for word in (old, new) if word.endswith("!")), "mixed")


def _blocks(widths: Mapping[str, int], room: int) -> Iterator[dict[str, int]]:
    """Columns with their widths, as many together as there is room for."""
    block: dict[str, int] = {}
    for name, width in widths.items():
        if block and sum(block.values()) + width > room:
            yield block
            block = {}
        block[name] = width
    yield block


def _line(who: tuple[str, str], left: Sequence[int], block: Mapping[str, int], cells: Mapping[str, str]) -> str:
    start = "  ".join(text.ljust(size) for text, size in zip(who, left, strict=True))
    return f"{start}  {''.join(cells.get(c, '-').ljust(width) for c, width in block.items())}".rstrip()
