"""Edges: what the meaning, two readings of a listing and the kernel say about packets that are to be sent on.

The kernel routes as an edge does, between `wan0`, `lan0` and somebody else's `other0`, and reports a packet where it ends: at the
input hook, or behind NAT at the end of postrouting, with the addresses and ports that it has there.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from random import Random
from typing import Any, get_args

import yaml
from hypothesis import strategies as st
from oracle.compare import Bench
from oracle.machine import LAST_PRIORITY, Layout, Report, machine, tuple_key, turned
from oracle.packets import Borders
from oracle.reading import Diagram, meant
from oracle.wire import ICMP, ICMPV6, TCP, UDP, Flow, Probe, flow
from property.strategies import HOME, documents

from fwcompiler.addresses import BITS, Range, address_text, covers, parse_address
from fwcompiler.backend import Backend
from fwcompiler.diagnostics import Report as Findings
from fwcompiler.edge import PRIVATE, ResolvedEdge
from fwcompiler.policy import validate
from fwcompiler.proof.conditions import ordered, outs
from fwcompiler.proof.describe import packet_text
from fwcompiler.proof.edge import Departure, departures, follow, passage
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.meaning import Clause, clauses
from fwcompiler.proof.passing import Ends, listed
from fwcompiler.proof.trace import trace, trace_through
from fwcompiler.resolve import resolve
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import Ruleset, State
from fwcompiler.source import parse_document

WAN, LAN, OTHER = "wan0", "lan0", "other0"
PUBLIC, INNER = parse_address("203.0.113.1")[1], parse_address("10.20.0.1")[1]
PUBLIC6 = parse_address("2001:db8:1::1")[1]
ELSEWHERE = {4: parse_address("172.17.0.2")[1], 6: parse_address("2001:db8:99::2")[1]}
SPARE_LAN = {4: parse_address("10.20.0.99")[1], 6: parse_address("2001:db8:20::99")[1]}
OUTSIDE = {4: parse_address("192.0.2.66")[1], 6: parse_address("2001:db8:66::66")[1]}
CHUNKS = 10000
INPUT = "input"


def edge_layout(edge: ResolvedEdge | None, own: Sequence[tuple[int, int]], behind: Sequence[tuple[int, int]]) -> Layout:
    """A host that routes between an edge's interfaces and `other0`; private IPv4 addresses of its own are on the lan."""
    wan, lan = (edge.wan, edge.lan) if edge else (WAN, LAN)
    states = get_args(State)
    reports = "\n".join(f'oifname "{o}" ct state {s} log prefix "{o} {s}" group 1 drop' for o in (wan, lan, OTHER) for s in states)
    inner = [pair for pair in own if pair[0] == 4 and covers(PRIVATE, pair[1])]
    lines = []
    for pair in own:
        nodad = " nodad" if pair[0] == 6 else ""
        lines.append(f"addr add {address_text(*pair)}/{BITS[pair[0]]} dev {lan if pair in inner else wan}{nodad}")
    ways = [(pair, BITS[pair[0]], lan) for pair in behind]
    ways += [((v, a), BITS[v], lan) for v, a in SPARE_LAN.items()] + [((v, a), BITS[v], OTHER) for v, a in ELSEWHERE.items()]
    lines += [f"-{v} route replace {address_text(v, a)}/{length} dev {name}" for (v, a), length, name in ways]
    lines += [f"-{version} route add default dev {wan}" for version in (4, 6)]
    rules = f"""
table inet oracle {{
	chain end {{
		type filter hook input priority {LAST_PRIORITY}; policy drop;
		{"; ".join(f'ct state {s} log prefix "{INPUT} {s}" group 1 drop' for s in states)}
	}}
	chain through {{
		type filter hook postrouting priority {LAST_PRIORITY}; policy drop;
		{reports}
	}}
	chain out {{
		type filter hook output priority {LAST_PRIORITY}; policy drop;
	}}
}}
"""
    return Layout((wan, lan, OTHER), rules, tuple(tuple(f"ip {line}".split()) for line in lines), _ROUTING)


_ROUTING = {
    "ipv4/ip_forward": 1,
    "ipv6/conf/all/forwarding": 1,
    "ipv4/conf/all/send_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
}
LAYOUT = edge_layout(
    None,
    [(4, PUBLIC), (4, INNER), (6, PUBLIC6)],
    [(v, base + n) for v, base in ((4, INNER - 1), (6, SPARE_LAN[6] - 0x99)) for n in (*range(11, 16), *range(0x11, 0x16))],
)


@st.composite
def edges(draw: Callable[..., Any]) -> dict[str, Any]:
    """A policy with an edge in front of one to three dialers, and now and then a web host; its groups and services are any."""
    document: dict[str, Any] = draw(documents())
    services, names = document["services"], list(document["groups"])
    some = st.lists(st.sampled_from([*names, "cluster"]), min_size=1, max_size=3, unique=True)
    if draw(st.integers(0, 5)):
        services["sip"] = {"from": draw(some)}
    if draw(st.integers(0, 5)):
        services["rtp"] = {"from": draw(st.just("anywhere") | st.just("anywhere") | some)}
    for service in services.values():
        service.pop("conntrack", None)
    services.get("rtp", {}).pop("ports", None)
    count = draw(st.integers(1, 3))
    public = [address_text(4, PUBLIC), address_text(4, INNER), address_text(6, PUBLIC6)]
    hosts: dict[str, Any] = {"gw": {"role": "edge", "wan": WAN, "lan": LAN, "addresses": public[: draw(st.integers(2, 3))]}}
    for number in range(11, 11 + count + draw(st.integers(0, 1))):
        role = "dialer" if number < 11 + count else "web"
        both = [f"10.20.0.{number}", f"2001:db8:20::{number}"]
        hosts[f"{role}{number}"] = {"role": role, "addresses": both[: draw(st.integers(1, 2))]}
    document["hosts"] = hosts
    document["edge"] = edge = {"host": "gw"}
    if {"sip", "sip-tcp", "sips"} & {*services}:
        edge["inbound_sip"] = draw(st.sampled_from([n for n in hosts if n.startswith("dialer")]))
    if "rtp" in services:
        edge["rtp"] = {"first": CHUNKS, "chunk": draw(st.sampled_from((100, 2000, 5000)))}
    free = [name for name in services if name not in ("sip", "sip-tcp", "sips", "rtp", "udptl", "vrrp")]
    if free and draw(st.booleans()):
        edge["forward"] = {n: draw(st.sampled_from([*hosts][1:])) for n in draw(st.lists(st.sampled_from(free), max_size=2, unique=True))}
    return document


def resolved_edge_of(document: dict[str, Any]) -> Resolved | None:
    """The policy for its edge; None where the drawn pieces do not go together (a service forwarded to a host without it)."""
    report = Findings()
    read = parse_document("policy.yaml", yaml.safe_dump(document, sort_keys=False), report)
    policy = validate(read, report) if read else None
    found = resolve(policy, read, report, today=date(2026, 1, 1), host="gw") if policy and read else None
    return None if report.failed else found


@dataclass(frozen=True)
class Fate:
    """What becomes of a packet. `out`: `input`, or where it leaves; `to`, and whom it then comes from (None: not told)."""

    verdict: str
    out: str = ""
    to: int | None = None
    source: int | None = None
    ports: Range | None = None

    def __str__(self) -> str:
        if self.verdict != "accept":
            return self.verdict
        ends = [address_text(4 if a >> 32 == 0 else 6, a) if a is not None else "any" for a in (self.to, self.source)]
        return f"accept by {self.out} to {ends[0]} from {ends[1]} port {self.ports}"


@dataclass
class EdgeTally:
    """What a run looked at."""

    sent: int = 0
    fates: Counter[tuple[str, str, str, bool]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Wrong:
    """A packet about which not all agree, and what each says."""

    text: str
    meaning: Fate
    diagram: Fate
    kernel: Fate


class EdgeBench(Bench):
    """A kernel without rules, and one with those of a backend, both laid out as edges."""


@contextmanager
def edge_bench(backend: Backend) -> Iterator[EdgeBench]:
    """Two kernels for a backend, for the length of a block."""
    with ExitStack() as held:
        yield EdgeBench(backend, held.enter_context(machine(LAYOUT)), held.enter_context(machine(LAYOUT)))


class Comparison:
    """One edge policy, with the members that its dynamic groups have at present, against one listing."""

    def __init__(self, policy: Resolved, held: Ruleset) -> None:
        assert policy.edge
        self.policy, self.edge, self.held, self.own = policy, policy.edge, held, clauses(policy)
        names = ordered((*outs(held), WAN, LAN))
        self._ends = {(v, inside): Ends() for v in (4, 6) for inside in (True, False)}
        self._diagrams = {
            (v, inside): Diagram(held, v, listed(held, v, names, ends, inside=inside)) for (v, inside), ends in self._ends.items()
        }

    def wanted(self, packet: Packet, out: str) -> tuple[Fate, Clause | None, Packet]:
        """What the policy says; ``out``: where an untouched packet would end. With the packet as the forward hook sees it."""
        passed = follow(self.policy, self.edge, packet)
        on, leaves = passed.packet, out
        if packet.interface in (WAN, LAN) and passed.leaves:
            leaves = LAN if passed.sent else out
            if passed.host or (packet.version, packet.destination) in self.edge.hidden:
                assert (passed.leaves, leaves) == (LAN, LAN), f"{packet} does not leave by {passed.leaves}"
        if leaves == INPUT:
            clause = meant(self.own, packet)
            return Fate(clause.verdict, *((INPUT, packet.destination, packet.source) if clause.verdict == "accept" else ())), clause, packet
        meaning = passage(self.policy, self.edge, packet.interface, leaves)
        found = next((c for c in meaning if c.holds(on)), None)
        if found is not None and found.verdict == "drop":
            return Fate("drop"), found, on
        departure = self._departure(on, leaves, sent=passed.sent) if packet.state == "new" and packet.version == 4 else None
        source = packet.source if departure is None else {WAN: PUBLIC, LAN: INNER}[leaves]
        kept = (packet.source_port, packet.source_port)
        ports = (departure.ports if departure and departure.ports else kept) if packet.protocol in (TCP, UDP) else None
        return Fate("accept", leaves, on.destination, source, ports), found, on

    def _departure(self, packet: Packet, leaves: str, *, sent: bool) -> Departure | None:
        def holds(each: Departure) -> bool:
            ports = each.source_ports is None or (packet.protocol == UDP and covers((each.source_ports,), packet.source_port))
            return each.out == leaves and (4, packet.source) in each.source and ports and (sent or not each.returned)

        return next((d for d in departures(self.edge) if holds(d)), None)

    def diagram(self, packet: Packet, on: Packet, out: str) -> Fate:
        """What the prover reads in the listing, told as far as it knows: that it is translated, not to which own address."""
        inside = out == INPUT
        seen = packet if packet.state == "new" else on
        terminal = self._diagrams[packet.version, inside].terminal(seen, "" if inside else out)
        changes = self._ends[packet.version, inside].changes(terminal)
        if changes is None:
            return Fate("drop")
        destination, source = changes
        if inside and destination:
            return self.diagram(packet, on, LAN)
        to = destination[0][0][0] if destination else seen.destination
        address = packet.source if source is None else {WAN: PUBLIC, LAN: INNER}.get(out)
        kept = (packet.source_port, packet.source_port)
        ports = (source[1] if source and source[1] else kept) if packet.protocol in (TCP, UDP) and not inside else None
        return Fate("accept", out, to, address, ports)

    def traced(self, packet: Packet, on: Packet, out: str) -> tuple[str, int | None]:
        """Verdict and destination as rule by rule reading has them."""
        if out == INPUT:
            return trace(self.held, packet).verdict, packet.destination
        seen = packet if packet.state == "new" else on
        decision = trace_through(self.held, seen, out)
        return decision.verdict, seen.destination if decision.to is None else decision.to


def kernel_fate(report: Report | None) -> Fate:
    """What the kernel says."""
    if report is None:
        return Fate("drop")
    out, head = report.prefix.split(" ")[0], report.head
    version = head[0] >> 4
    at, size, length = (12, 4, (head[0] & 15) * 4) if version == 4 else (8, 16, 40)
    source, to = (int.from_bytes(head[at + i * size : at + (i + 1) * size], "big") for i in (0, 1))
    protocol = head[9] if version == 4 else head[6]
    port = struct.unpack_from("!H", head, length)[0] if protocol in (TCP, UDP) and out != INPUT else None
    return Fate("accept", out, to, source, None if port is None else (port, port))


def agree(wanted: Fate, found: Fate) -> bool:
    """True where a packet fared as it should; of a range of ports any may have been taken."""
    if wanted.verdict == "drop" or found.verdict == "drop":
        return wanted.verdict == found.verdict
    within = wanted.ports is None or (found.ports is not None and wanted.ports[0] <= found.ports[0] <= found.ports[1] <= wanted.ports[1])
    return within and (wanted.out, wanted.to, wanted.source) == (found.out, found.to, found.source)


def edge_packets(policy: Resolved, random: Random, count: int) -> list[Probe]:
    """Packets at the borders of an edge's policy: to its own addresses, to the hosts behind, past both, and from all sides."""
    assert policy.edge
    services = (*policy.services, *(f.service for f in policy.edge.forwards))
    borders = Borders.of(replace(policy, services=services))
    behind = {v: [a for f in policy.edge.forwards for w, a in f.host.addresses if w == v] for v in (4, 6)}
    own = {v: [a for a, _ in policy.edge.addresses.family(v)] for v in (4, 6)}
    found: list[Probe] = []
    for number in range(count):
        version = random.choice((4, 4, 6))
        inner = (*behind[version], SPARE_LAN[version])
        sources = (*borders.addresses[version], *inner, OUTSIDE[version], HOME[version] + random.randrange(64))
        destinations = (*own[version] * 4, *inner, *behind[version], OUTSIDE[version], ELSEWHERE[version])
        protocol = random.choice((TCP, UDP, UDP, UDP, ICMP if version == 4 else ICMPV6, 47))
        came = random.choice((WAN, WAN, WAN, LAN, LAN, LAN, OTHER))
        if came == LAN and random.random() < 0.6:
            sources, destinations = inner, (OUTSIDE[version], OUTSIDE[version], *destinations)
        ports = protocol in (TCP, UDP)
        found.append(
            Probe(
                version,
                random.choice(sources),
                random.choice(destinations),
                protocol,
                random.choice(borders.ports) if ports else 0,
                (random.choice(borders.ports) if random.random() < 0.5 else 1024 + number) if ports else 0,
                random.choice((3, 11, 12, 13) if version == 4 else (1, 2, 3, 4, 144)) if not ports and protocol != 47 else 0,
                came,
                random.choice(("alone", "alone", "alone", "original", "reply", "broken")),
            )
        )
    return found


def known_flow(edge: ResolvedEdge, probe: Probe) -> Flow | None:
    """The connection that a later packet belongs to. To a port of the edge that a host owns: one that NAT has sent on, or let out."""
    made = flow(probe)
    mine = (4, probe.destination) in edge.addresses and probe.version == 4 and probe.interface in (WAN, LAN)
    if made is None or not mine or not probe.has_ports:
        return made
    owner = next((f for f in edge.forwards for p in f.service.ports if _is_to(p.protocol, p.ranges, probe)), None)
    if owner is None or owner.target is None:
        return made
    if probe.way == "original" or probe.interface == LAN:
        return replace(flow(replace(probe, way="original")) or made, translated=("destination", owner.target))
    return replace(made, source=owner.target, translated=("source", probe.destination))


def _apart(edge: ResolvedEdge, probes: Iterable[Probe]) -> Iterator[Probe]:
    """Probes of connections that share no direction with another one's, before or behind NAT: a kernel can know all of them."""
    known: set[tuple[object, ...]] = set()
    for probe in probes:
        made = known_flow(edge, probe)
        if made is not None:
            side, address = made.translated or ("", 0)
            behind = replace(made, **{side: address}) if side else made
            keys = {key for each in (made, behind, flow(probe) or made) for key in (tuple_key(each), tuple_key(turned(each)))}
            if keys & known:
                continue
            known |= keys
        yield probe


def _is_to(protocol: str, ranges: Sequence[Range], probe: Probe) -> bool:
    number = {"tcp": TCP, "udp": UDP}.get(protocol)
    return number == probe.protocol and covers(tuple(ranges), probe.port)


def try_edge(bench: EdgeBench, comparison: Comparison, probes: Sequence[Probe], tally: EdgeTally) -> list[Wrong]:
    """Ask everybody about packets, and tell whatever is not unanimous."""
    wrong: list[Wrong] = []
    first = [p for p in probes if p.way in ("alone", "broken")]
    later = list(_apart(comparison.edge, (p for p in probes if p.way not in ("alone", "broken"))))
    for some in (first, later):
        flows = [f for p in some if (f := known_flow(comparison.edge, p))]
        bare = bench.bare.reports(some, [f for p in some if (f := flow(p))])
        for probe, before, after in zip(some, bare, bench.ruled.reports(some, flows), strict=True):
            tally.sent += 1
            if before is not None:
                wrong += _one(comparison, probe, before, kernel_fate(after), tally)
    return wrong


def _one(comparison: Comparison, probe: Probe, before: Report, kernel: Fate, tally: EdgeTally) -> Iterator[Wrong]:
    out, state = before.prefix.split(" ")
    packet = probe.packet(state)  # type: ignore[arg-type]
    wanted, clause, on = comparison.wanted(packet, out)
    way = LAN if out == INPUT and on.destination != packet.destination else out
    read, (verdict, to) = comparison.diagram(packet, on, way), comparison.traced(packet, on, way)
    tally.fates[wanted.verdict, way, state, on.destination != packet.destination] += 1
    same = verdict == wanted.verdict and (verdict == "drop" or to == wanted.to)
    if not (agree(wanted, kernel) and agree(wanted, read) and same):
        destination = address_text(packet.version, packet.destination or 0)
        reason = clause.reason if clause else "passes"
        text = (
            f"{packet_text(packet)}, to {destination}, source port {packet.source_port}, {probe.way}\n"
            f"  meaning {wanted} ({reason}), diagram {read}, listing {verdict} at {to}, kernel {kernel}"
        )
        yield Wrong(text, wanted, read, kernel)
