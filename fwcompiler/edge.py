"""The firewall in front of several dialers: who owns 5060, which media ports are whose, and what is forwarded where.

5060 has one owner, because a packet to it names no dialer. Media ports are dealt out in chunks, because two dialers
behind one address that use the same port get another one from the kernel (measured: 10500 became 1216).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from fwcompiler.addresses import AddressError, Addresses, Range, Ranges, intersect, merged, parse_entry, subtract
from fwcompiler.catalogue import CATALOGUE
from fwcompiler.diagnostics import Position, Report, did_you_mean
from fwcompiler.fleet import PORTS, ResolvedHost
from fwcompiler.policy import Edge, Policy, RtpPlan
from fwcompiler.ports import Ports, port_text
from fwcompiler.service import ResolvedService, udp_spans
from fwcompiler.source import Document, KeyPath

SIP = ("sip", "sip-tcp", "sips")
"""Signalling from outside goes to one dialer, whatever it is carried by."""
RTP = "rtp"
LOCAL_PORTS: Range = (32768, 60999)
"""From where a host opens its own connections (ip-sysctl, ip_local_port_range)."""
PRIVATE: Ranges = ((0x0A000000, 0x0AFFFFFF), (0x64400000, 0x647FFFFF), (0xAC100000, 0xAC1FFFFF), (0xC0A80000, 0xC0A8FFFF))
"""10/8, 100.64/10, 172.16/12, 192.168/16 (RFC 1918, RFC 6598): they go out under the edge's address."""
SPARE: Range = (61000, 65535)
"""Above the local ports: where sources that must not keep their port go, as far as no chunk is there."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The media ports of one dialer."""

    host: ResolvedHost
    span: Range
    at: Position

    def rtp_conf(self) -> str:
        """The section of the dialer's rtp.conf that goes with it."""
        return f"[general]\nrtpstart={self.span[0]}\nrtpend={self.span[1]}\n"


@dataclass(frozen=True, slots=True)
class EdgePlan:
    """What the policy says of its edge, names resolved: the same whichever host is compiled."""

    host: ResolvedHost
    at: Position
    dialers: tuple[ResolvedHost, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    owner: ResolvedHost | None = None
    forward: tuple[tuple[str, ResolvedHost, Position], ...] = ()
    networks: Ranges = ()

    def chunk(self, name: str) -> Range | None:
        """The media ports of a host, if it is one of the dialers."""
        return next((c.span for c in self.chunks if c.host.name == name), None)

    def rtp_confs(self, host: ResolvedHost | None) -> dict[str, str]:
        """By file name, what belongs into rtp.conf: of every dialer for the edge, of itself for a dialer."""
        return {f"rtp.conf.{c.host.name}": c.rtp_conf() for c in self.chunks if host in (self.host, c.host)}


@dataclass(frozen=True, slots=True)
class Forward:
    """A service as the edge forwards it: with its ports there, to the one host that owns them."""

    service: ResolvedService
    host: ResolvedHost
    at: Position

    @property
    def target(self) -> int | None:
        """The IPv4 address that packets to the edge's own address are sent on to."""
        return self.host.first(4)


@dataclass(frozen=True, slots=True)
class ResolvedEdge:
    """What the edge forwards, in the policy's order; `guarded`: the restricted ones of these with every host that has them.

    `hidden`: IPv4 addresses that go out under the edge's own. `spare`: ports for those that must not keep theirs.
    """

    wan: str
    lan: str
    addresses: Addresses
    forwards: tuple[Forward, ...]
    guarded: tuple[Forward, ...]
    hidden: Addresses
    spare: Range
    at: Position

    def reserved(self) -> Ranges:
        """UDP ports of the edge's address that belong to one host each."""
        return merged(span for f in self.forwards for span in udp_spans(f.service))


def read_plan(policy: Policy, hosts: Mapping[str, ResolvedHost], document: Document, report: Report) -> EdgePlan | None:
    """The edge of a policy; None where it has none, or what is wrong was reported."""
    if policy.edge is None:
        return None
    return _Reading(policy, policy.edge, hosts, document, report).plan()


class _Reading:
    """The inputs of reading one `edge` section."""

    def __init__(self, policy: Policy, edge: Edge, hosts: Mapping[str, ResolvedHost], document: Document, report: Report) -> None:
        self.policy, self.edge, self.hosts, self.document, self.report = policy, edge, hosts, document, report

    def plan(self) -> EdgePlan | None:
        host = self._edge_host()
        dialers = self._dialers(host)
        owner = self._owner(dialers)
        chunks = self._chunks(dialers)
        forward = tuple(self._forward(host))
        if host is None:
            return None
        for each in dict.fromkeys((*dialers, *(to for _, to, _ in forward))):
            self._check_target(host, each)
        return EdgePlan(host, self._at("host"), dialers, chunks, owner, forward, self._networks())

    def _check_target(self, edge: ResolvedHost, to: ResolvedHost) -> None:
        """What is sent on has to arrive: in one family at least, and not at the edge again."""
        own, target = edge.first(4), to.first(4)
        if own is not None and target is None:
            hint = "packets to the edge's IPv4 address are sent on to it"
            self.report.error("host-address", f"`{to.name}` is behind the edge and has no IPv4 address", to.at, hint)
        elif own is None and to.first(6) is None:
            hint = "name an IPv4 address of the edge, or IPv6 addresses of what is behind it"
            self.report.error("host-address", f"nobody outside reaches `{to.name}`: the edge has no IPv4 address", to.at, hint)
        elif target is not None and (4, target) in edge.addresses:
            hint = "name first the address that it has on the private network"
            self.report.error("host-address", f"`{to.name}` is behind the edge, and its first IPv4 address is the edge's own", to.at, hint)

    def _at(self, *path: str | int, key: bool = False) -> Position:
        return self.document.locate(("edge", *path), key=key)

    def _named(self, name: str, path: KeyPath, fit: Callable[[ResolvedHost], bool], what: str) -> ResolvedHost | None:
        """A host that is named in the section, and is what it has to be there."""
        at = self.document.locate(("edge", *path))
        host = self.hosts.get(name)
        if host is None:
            hint = did_you_mean(name, self.hosts) or (f"hosts: {', '.join(self.hosts)}" if self.hosts else "name the hosts under `hosts`")
            self.report.error("host-unknown", f"there is no host `{name}`", at, hint)
        elif not fit(host):
            self.report.error("host-role", f"`{name}` is {what}", at, f"it has the role {', '.join(host.roles)} ({host.at})")
            return None
        return host

    def _edge_host(self) -> ResolvedHost | None:
        host = self._named(self.edge.host, ("host",), lambda h: "edge" in h.roles, "no edge")
        for key in ("wan", "lan"):
            if host and not getattr(host, key):
                hint = "wan: eth0, lan: eth1: fwc touches what passes between the two, and nothing else that is forwarded"
                self.report.error("required", f"the edge `{host.name}` does not name its interface `{key}`", host.at, hint)
        if host is None:
            return None
        return host

    def _dialers(self, edge: ResolvedHost | None) -> tuple[ResolvedHost, ...]:
        if self.edge.dialers is None:
            return tuple(h for h in self.hosts.values() if h.plays("dialer") and h is not edge)
        found: dict[str, ResolvedHost] = {}
        for i, name in enumerate(self.edge.dialers):
            host = self._named(name, ("dialers", i), lambda h: h.plays("dialer") and h is not edge, "no dialer")
            if host and name in found:
                self.report.error("host-unknown", f"`{name}` is listed twice", self._at("dialers", i), "every dialer has one chunk")
            elif host:
                found[name] = host
        return tuple(found.values())

    def _owner(self, dialers: tuple[ResolvedHost, ...]) -> ResolvedHost | None:
        """The one dialer that gets what comes in for 5060."""
        offered = [name for name in SIP if name in self.policy.services]
        if self.edge.inbound_sip is None:
            if offered and dialers:
                hint = f"inbound_sip: {dialers[0].name}: a packet to 5060 names no dialer, so one of them takes all inbound calls"
                self.report.error("sip-owner", "no dialer owns 5060, and SIP from outside would go nowhere", self._at(key=True), hint)
            return None
        owner = self._named(self.edge.inbound_sip, ("inbound_sip",), lambda h: h.plays("dialer"), "no dialer: it cannot own 5060")
        if owner and owner not in dialers:
            self.report.error("sip-owner", f"`{owner.name}` is not among the edge's dialers", self._at("inbound_sip"), "list it there")
        if owner and not offered:
            self.report.warn("sip-owner", "the policy has no service `sip`: nothing is forwarded to it", self._at("inbound_sip"))
        return owner

    def _chunks(self, dialers: tuple[ResolvedHost, ...]) -> tuple[Chunk, ...]:
        if RTP not in self.policy.services or not dialers:
            if self.edge.rtp is not None:
                why = "the policy has no service `rtp`" if dialers else "the edge has no dialers"
                self.report.error("chunk-fit", f"{why}: these chunks would stay closed", self._at("rtp", key=True), "rtp: {from: anywhere}")
            return ()
        for key in ("ports", "rtp_conf"):
            if getattr(self.policy.services[RTP], key) is not None:
                at = self.document.locate(("services", RTP, key))
                self.report.error("chunk-overlap", "the edge deals out the media ports, one chunk a dialer", at, f"take `{key}` out here")
        given = [Chunk(d, d.rtp, self.document.locate(("hosts", d.name, "rtp"))) for d in dialers if d.rtp]
        without = [d for d in dialers if self.policy.hosts[d.name].rtp is None]
        computed = list(self._computed(without))
        order = {d.name: i for i, d in enumerate(dialers)}
        chunks = sorted((*given, *computed), key=lambda c: order[c.host.name])
        _check_overlaps(chunks, self.report)
        self._check_values(given, computed)
        return tuple(chunks)

    def _computed(self, dialers: list[ResolvedHost]) -> Iterator[Chunk]:
        """One chunk after the other, or an error that says how many fit and what would."""
        plan = self.edge.rtp
        if not dialers:
            if plan is not None:
                self.report.warn(
                    "chunk-fit", "every dialer has an `rtp` of its own: this plan gives nobody a chunk", self._at("rtp", key=True)
                )
            return
        if plan is None:
            hint = "rtp: {first: 10000, chunk: 5000} deals them out, or give the host its own: rtp: 10000-14999"
            self.report.error("required", f"nothing says which media ports `{dialers[0].name}` has", dialers[0].at, hint)
            return
        fit = (PORTS[1] + 1 - plan.first) // plan.chunk
        if fit < len(dialers):
            self._too_many(plan, len(dialers), fit)
            return
        for i, dialer in enumerate(dialers):
            low = plan.first + i * plan.chunk
            yield Chunk(dialer, (low, low + plan.chunk - 1), self._at("rtp"))

    def _too_many(self, plan: RtpPlan, wanted: int, fit: int) -> None:
        """Say how many dialers fit, and propose a chunk that fits all."""
        at = self._at("rtp", "chunk") if isinstance(self.document.data["edge"]["rtp"], dict) else self._at("rtp")
        last = f", the last one {plan.first + (fit - 1) * plan.chunk}-{plan.first + fit * plan.chunk - 1}" if fit else ""
        message = f"{wanted} chunks of {plan.chunk} ports from {plan.first} do not fit below {PORTS[1] + 1}: {fit or 'none'} would{last}"
        best = _round((PORTS[1] + 1 - plan.first) // wanted)
        calm = _round((LOCAL_PORTS[0] - plan.first) // wanted)
        hint = f"chunk: {best} fits {wanted}" if best >= 2 else "begin lower"
        if 100 <= calm < best:
            hint += f"; chunk: {calm} also stays below the ports from which hosts open connections ({LOCAL_PORTS[0]})"
        self.report.error("chunk-fit", message, at, hint)

    def _check_values(self, given: list[Chunk], computed: list[Chunk]) -> None:
        for chunk in given:
            self._check_even(chunk)
            self._check_local([chunk])
        odd = next((c for c in computed if c.span[0] % 2), None)
        if odd:
            self._check_even(odd)
        self._check_local([c for c in computed if intersect((c.span,), (LOCAL_PORTS,))])

    def _check_even(self, chunk: Chunk) -> None:
        if chunk.span[0] % 2:
            message = f"the chunk of `{chunk.host.name}` begins with an odd port, {chunk.span[0]}"
            self.report.warn("chunk-odd", message, chunk.at, "RTP has the even ports, RTCP the odd ones behind (RFC 3550, section 11)")

    def _check_local(self, chunks: list[Chunk]) -> None:
        chunks = [c for c in chunks if intersect((c.span,), (LOCAL_PORTS,))]
        if not chunks:
            return
        spans = merged(c.span for c in chunks)
        reserved = ",".join(port_text(r) for r in intersect(spans, (LOCAL_PORTS,)))
        who = chunks[0].host.name if len(chunks) == 1 else f"{chunks[0].host.name} to {chunks[-1].host.name}"
        message = f"media ports of {who} are among those from which hosts open their own connections ({port_text(LOCAL_PORTS)})"
        self.report.warn("local-ports", message, chunks[0].at, f"sysctl net.ipv4.ip_local_reserved_ports={reserved} keeps them free")

    def _forward(self, edge: ResolvedHost | None) -> Iterator[tuple[str, ResolvedHost, Position]]:
        for name, to in self.edge.forward.items():
            at = self._at("forward", name, key=True)
            if name in SIP:
                self.report.error("sip-owner", f"`{name}` goes to the owner of 5060", at, f"inbound_sip: {to}")
                continue
            if name == RTP:
                self.report.error("chunk-overlap", "media goes to the dialer whose chunk it is", at, "`rtp` is dealt out in chunks")
                continue
            if name not in self.policy.services:
                self.report.error("forward", f"the policy has no service `{name}` to forward", at, did_you_mean(name, self.policy.services))
            host = self._named(to, ("forward", name), lambda h: h is not edge, "the edge itself")
            if host and name in self.policy.services:
                yield name, host, at

    def _networks(self) -> Ranges:
        found: list[Range] = []
        for i, text in enumerate(self.edge.networks):
            at = self._at("networks", i)
            try:
                entry = parse_entry(text.strip())
            except AddressError as error:
                self.report.error(error.code, error.message, at, error.hint)
                continue
            if entry.masked:
                self.report.warn("host-bits", f"`{text}` has host bits set, read as {entry.masked}", at)
            if entry.version == 6:
                self.report.error("address-family", f"`{text}` is IPv6, which goes out under its own addresses", at, "IPv4 networks only")
            else:
                found.append(entry.span)
        return merged(found)


def _round(ports: int) -> int:
    """A chunk size that is easy to read and even."""
    return ports // 100 * 100 if ports >= 200 else ports // 2 * 2


def _check_overlaps(chunks: Sequence[Chunk], report: Report) -> None:
    in_order = sorted(c.span for c in chunks)
    if all(first[1] < second[0] for first, second in pairwise(in_order)):
        return
    for first, second in combinations(chunks, 2):
        both = intersect((first.span,), (second.span,))
        if both:
            message = f"`{second.host.name}` and `{first.host.name}` ({first.at}) both have the media ports {port_text(both[0])}"
            report.error("chunk-overlap", message, second.at, "behind one address every media port belongs to one dialer")


def resolved_edge(
    plan: EdgePlan,
    services: Iterable[ResolvedService],
    has: Callable[[ResolvedHost, str], bool],
    hosts: Iterable[ResolvedHost],
    report: Report,
) -> ResolvedEdge:
    """What the edge itself has to do. ``services``: all of the policy, ``has``: whether a host offers one."""
    everything = {s.name: s for s in services}
    forwards = tuple(_forwards(plan, everything, has, report))
    behind = [h for h in hosts if h is not plan.host]
    _warn_of_not_forwarded(plan, [s for s in everything.values() if not has(plan.host, s.name)], has, behind, report)
    restricted = dict.fromkeys(f.service.name for f in forwards if f.service.early)
    others = (Forward(everything[name], h, everything[name].at) for name in restricted if name != RTP for h in behind if has(h, name))
    guarded = (*others, *(f for f in forwards if f.service.name == RTP and f.service.early))
    own = Addresses.of((a, a) for h in behind for v, a in h.addresses if v == 4)
    hidden = Addresses(merged((*intersect(own.v4, PRIVATE), *plan.networks)))
    taken = merged(span for f in forwards for p in f.service.ports for span in p.ranges)
    return ResolvedEdge(plan.host.wan, plan.host.lan, plan.host.all(), forwards, guarded, hidden, _spare(taken), plan.at)


def _forwards(
    plan: EdgePlan, services: Mapping[str, ResolvedService], has: Callable[[ResolvedHost, str], bool], report: Report
) -> Iterator[Forward]:
    for name in SIP if plan.owner else ():
        if name in services and plan.owner and has(plan.owner, name):
            yield Forward(services[name], plan.owner, services[name].at)
        elif name in services and plan.owner:
            hint = "name it in `on`, or let another dialer own 5060"
            report.error("forward", f"`{plan.owner.name}` owns 5060 and does not offer `{name}`", services[name].at, hint)
    for name, host, at in plan.forward:
        if name in services and not has(host, name):
            roles = CATALOGUE[name].roles if name in CATALOGUE else ()
            hint = f"`{name}` is on hosts with the role {' or '.join(roles)}; `on` at the service says otherwise" if roles else ""
            report.error("forward", f"`{host.name}` does not offer `{name}`", at, hint)
        elif name in services:
            yield Forward(services[name], host, at)
    for chunk in plan.chunks if RTP in services else ():
        yield Forward(replace(services[RTP], ports=(Ports("udp", (chunk.span,)),)), chunk.host, services[RTP].at)


def _warn_of_not_forwarded(
    plan: EdgePlan,
    services: Iterable[ResolvedService],
    has: Callable[[ResolvedHost, str], bool],
    behind: Sequence[ResolvedHost],
    report: Report,
) -> None:
    """What is open to anywhere, and only on hosts that nobody outside reaches but through the edge, ends there unless it is sent on."""
    sent = {*SIP, RTP, *(name for name, _, _ in plan.forward)}
    for service in services:
        if service.groups is not None or service.name in sent or not service.ports:
            continue
        hosts = [h for h in behind if has(h, service.name)]
        if not hosts or not all(_is_private(h) for h in hosts):
            continue
        roles = CATALOGUE[service.name].roles if service.name in CATALOGUE else ()
        best = min(hosts, key=lambda h: next((i for i, role in enumerate(roles) if h.plays(role)), len(roles)))
        message = f"`{service.name}` is open to anywhere, and the edge sends it to nobody: from outside it is closed"
        report.warn("not-forwarded", message, service.at, f"forward: {{{service.name}: {best.name}}}, or narrow its `from`")


def _is_private(host: ResolvedHost) -> bool:
    """True where a host has no address of its own that the internet knows."""
    return bool(host.addresses) and all(v == 4 and any(low <= a <= high for low, high in PRIVATE) for v, a in host.addresses)


def _spare(taken: Ranges) -> Range:
    """The longest free stretch above the local ports; where chunks fill that, the longest one there is."""
    for within in (SPARE, PORTS):
        free = subtract((within,), taken)
        if free:
            best = max(free, key=lambda r: (r[1] - r[0], r[0]))
            if best[1] - best[0] >= 100 or within == PORTS:
                return best
    return SPARE
