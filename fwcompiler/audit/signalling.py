"""Whether SIP in Asterisk's files and the policy agree: ports, guests, external and local addresses, peers.

Both channel drivers are read: chan_sip's sip.conf (sip.conf.sample) and chan_pjsip's pjsip.conf (pjsip.conf.sample).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fwcompiler.addresses import EVERYONE, LOOPBACK, NOBODY, Addresses, address_text, parse_address
from fwcompiler.asterisk import Configuration, Section, Setting
from fwcompiler.audit.endpoints import PRIVATE, Endpoint, covering, endpoint, items, network, of_register, of_uri
from fwcompiler.audit.facts import Facts
from fwcompiler.audit.findings import Issue
from fwcompiler.diagnostics import Position
from fwcompiler.resolved import Resolved
from fwcompiler.service import ResolvedService

SIP, SIPS = 5060, 5061
SIP_SERVICES = ("sip", "sip-tcp", "sips")
_OLD = ("externaddr", "externip", "externhost")
_EXTERNAL = "externaddr in sip.conf, or external_media_address and external_signaling_address in pjsip.conf, with the local nets"


@dataclass(frozen=True, slots=True)
class Bound:
    """A transport: protocol and where it listens."""

    protocol: str
    at: Position
    to: Endpoint


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody Asterisk exchanges calls with, by address, network or name."""

    host: str
    what: str
    at: Position


def signalling(policy: Resolved, facts: Facts) -> Iterator[Issue]:
    """Everything about SIP."""
    sip, pjsip = facts.asterisk.get("sip.conf"), facts.asterisk.get("pjsip.conf")
    bound = [*(_sip_bound(sip) if sip else ()), *(_pjsip_bound(pjsip) if pjsip else ())]
    services = _sip_services(policy, bound)
    for each in bound:
        if each.to.scope != "loopback" and covering(policy, each.protocol, each.to.port) is None:
            message = f"Asterisk's SIP listens on {each.protocol}/{each.to.port}, which no service opens: calls do not come in"
            yield Issue(
                "sip-port", "error", message, each.at, remedy=f"`ports: {each.to.port}` at the SIP service, or another port in Asterisk"
            )
    if bound and facts.listeners is None:
        yield from _not_bound(policy, bound)
    guests = [*(_sip_guests(sip) if sip else ()), *(_pjsip_guests(pjsip) if pjsip else ())]
    for at, message, remedy in guests:
        open_to_all = any(s.groups is None for s in services)
        yield Issue("guests", "error" if open_to_all else "warning", message, at, remedy=remedy)
    for configuration, external, local in _translations(sip, pjsip):
        yield from _external(policy, facts, configuration, external, services)
        yield from _local(policy, external, local, services)
    yield from _peers(policy, facts, [*(_sip_peers(sip) if sip else ()), *(_pjsip_peers(pjsip) if pjsip else ())], services)


def _sip_services(policy: Resolved, bound: list[Bound]) -> list[ResolvedService]:
    """Services that carry SIP: by name, or since Asterisk's SIP listens there."""
    found = [s for s in policy.services if s.name in SIP_SERVICES]
    found += [s for b in bound if (s := covering(policy, b.protocol, b.to.port)) is not None]
    return list({s.name: s for s in found}.values())


def _general(configuration: Configuration) -> Section:
    return configuration.section("general") or Section("general", Position(configuration.file, 1))


def _sip_bound(configuration: Configuration) -> Iterator[Bound]:
    general = _general(configuration)
    port = general.last("bindport", "port")
    default = int(port.value) if port and port.value.isdigit() else SIP
    address = general.last("udpbindaddr", "bindaddr")
    found = endpoint(address.value if address else "0.0.0.0", default)
    if found:
        yield Bound("udp", (port or address or Setting("", "", general.at)).at, found)
    for switch, names, default_port in (("tcpenable", ("tcpbindaddr",), SIP), ("tlsenable", ("tlsbindaddr",), SIPS)):
        on, to = general.last(switch), general.last(*names)
        if on is not None and on.on:
            host = to.value if to else (found.host if found else "")
            bind = endpoint(f"[{host}]" if to is None and ":" in host else host, default_port)
            if bind:
                yield Bound("tcp", (to or on).at, bind)


def _pjsip_bound(configuration: Configuration) -> Iterator[Bound]:
    for transport in configuration.of_type("transport"):
        protocol = (transport.last("protocol") or Setting("", "udp", transport.at)).value.lower()
        bind = transport.last("bind")
        if bind is None or protocol not in ("udp", "tcp", "tls"):
            continue  # ws and wss go through Asterisk's HTTP server
        found = endpoint(bind.value, SIPS if protocol == "tls" else SIP)
        if found:
            yield Bound("udp" if protocol == "udp" else "tcp", bind.at, found)


def _not_bound(policy: Resolved, bound: list[Bound]) -> Iterator[Issue]:
    """Where sockets cannot be read, the files say what nobody listens for."""
    taken = {(b.protocol, b.to.port) for b in bound}
    for service in policy.services:
        if service.name in SIP_SERVICES:
            for ports in service.ports:
                if not any((ports.protocol, n) in taken for low, high in ports.ranges for n in range(low, high + 1)):
                    message = f"the policy opens {ports} for `{service.name}`, and no file of Asterisk binds SIP there"
                    yield Issue("sip-port", "warning", message, service.at, remedy="take the service out, or set Asterisk's port to it")


def _sip_guests(configuration: Configuration) -> Iterator[tuple[Position, str, str]]:
    general = _general(configuration)
    allow = general.last("allowguest")
    if allow is None:
        yield general.at, "`allowguest` is not set in sip.conf, which means yes: calls are taken without a password", "allowguest=no"
    elif allow.on:
        yield allow.at, "sip.conf allows guests: calls are taken without a password", "allowguest=no"


def _pjsip_guests(configuration: Configuration) -> Iterator[tuple[Position, str, str]]:
    for section in configuration.of_type("endpoint"):
        if section.name.lower() == "anonymous" or section.name.lower().startswith("anonymous@"):
            yield section.at, "pjsip.conf has an `anonymous` endpoint: calls are taken without a password", "take the endpoint out"


def _translations(sip: Configuration | None, pjsip: Configuration | None) -> Iterator[tuple[Configuration, list[Setting], list[Setting]]]:
    """External addresses and local networks, each set that belongs together."""
    if sip is not None:
        general = _general(sip)
        yield sip, general.all(*_OLD), general.all("localnet")
    if pjsip is not None:
        for transport in pjsip.of_type("transport"):
            yield pjsip, transport.all("external_media_address", "external_signaling_address"), transport.all("local_net")


def _external(
    policy: Resolved, facts: Facts, configuration: Configuration, external: list[Setting], services: list[ResolvedService]
) -> Iterator[Issue]:
    own = Addresses.of(facts.own(4), facts.own(6))
    edge = policy.plan.host if policy.plan and policy.host and policy.host.name in (d.name for d in policy.plan.dialers) else None
    outside = edge.all() - PRIVATE if edge else NOBODY
    public = own - PRIVATE
    if not external:
        if own.v4 and not public.v4 and _beyond(policy, services):
            message = (
                "this host has private addresses only, and Asterisk is told no other: peers outside are sent an address they cannot reach"
            )
            yield Issue("external-address", "warning", message, Position(configuration.file, 1), remedy=_EXTERNAL)
        return
    for setting in external:
        found = endpoint(setting.value, SIP)
        if found is None or found.scope == "name":
            message = f"`{setting.name}` is the name `{setting.value}`, which is not looked up"
            yield Issue("external-address", "note", message, setting.at)
            continue
        address = parse_address(found.host)
        if edge and outside and address not in outside:
            message = f"`{setting.name}` is {found.host}, and this host is reached through `{edge.name}`"
            remedy = f"an address of the edge: {', '.join(outside.texts())}"
            yield Issue("external-address", "error", message, setting.at, remedy=remedy)
        elif facts.addresses is not None and address not in own and public.family(address[0]):
            others = ", ".join(address_text(address[0], low) for low, _ in public.family(address[0]))
            message = f"`{setting.name}` is {found.host}, which is none of this host's public addresses ({others})"
            yield Issue("external-address", "warning", message, setting.at, remedy="the address under which peers reach this host")


def _beyond(policy: Resolved, services: list[ResolvedService]) -> bool:
    """True where SIP is open to addresses outside of private networks."""
    return any(s.groups is None or policy.addresses(s.groups) - PRIVATE for s in services)


def _local(policy: Resolved, external: list[Setting], local: list[Setting], services: list[ResolvedService]) -> Iterator[Issue]:
    """Private networks that SIP is open to have to be local, or they are told the external address."""
    if not external:
        return
    named = NOBODY
    for setting in local:
        for part in items(setting.value):
            named = named | (network(part.removeprefix("!")) or NOBODY)
    told = _families(external)
    for service in services:
        for group in service.groups or ():
            strangers = (policy.groups[group].addresses & PRIVATE & told) - named
            if strangers:
                at = (local or external)[-1].at
                option = "localnet" if external[0].name.lower() in _OLD else "local_net"
                message = f"{', '.join(strangers.texts()[:3])} of `{group}` is in no local net: Asterisk tells it the external address"
                yield Issue("local-nets", "warning", message, at, remedy=f"{option}={strangers.texts()[0]}")
                return


def _families(external: list[Setting]) -> Addresses:
    """Every address of the families that external addresses are of; of IPv4, where they are names."""
    versions = {parse_address(e.host)[0] for s in external if (e := endpoint(s.value, SIP)) and e.scope == "address"} or {4}
    return Addresses(*(EVERYONE.family(v) if v in versions else () for v in (4, 6)))


def _sip_peers(configuration: Configuration) -> Iterator[Peer]:
    general = _general(configuration)
    for line in general.all("register"):
        found = of_register(line.value)
        if found:
            yield Peer(found.host, "`register`", line.at)
    for section in configuration.visible():
        if section.name.lower() in ("general", "authentication"):
            continue
        host = section.last("host")
        if host is not None and host.value.lower() != "dynamic" and (found := endpoint(host.value, SIP)):
            yield Peer(found.host, f"the peer `{section.name}`", host.at)


def _pjsip_peers(configuration: Configuration) -> Iterator[Peer]:
    for section in configuration.of_type("identify"):
        for setting in section.all("match"):
            yield from (Peer(part, f"`match` of `{section.name}`", setting.at) for part in items(setting.value))
    for kind, names in (("aor", ("contact",)), ("registration", ("server_uri", "outbound_proxy"))):
        for section in configuration.of_type(kind):
            for setting in section.all(*names):
                for part in items(setting.value):
                    if found := of_uri(part):
                        yield Peer(found.host, f"`{setting.name}` of `{section.name}`", setting.at)


def _peers(policy: Resolved, facts: Facts, peers: list[Peer], services: list[ResolvedService]) -> Iterator[Issue]:
    """Peers whose packets the SIP services would drop, answers to our own requests among them."""
    if not services or any(s.groups is None for s in services):
        return
    groups = list(dict.fromkeys(g for s in services for g in s.groups or ()))
    members = [facts.members[g] for g in groups if g in facts.members]
    known = policy.addresses((*groups, *policy.trust)) | Addresses((LOOPBACK[4],), (LOOPBACK[6],))
    for more in members:
        known = known | more
    at = services[0].at
    seen: set[str] = set()
    for peer in peers:
        if peer.host.lower() in seen:
            continue
        seen.add(peer.host.lower())
        addresses = network(peer.host) or facts.resolved_names.get(peer.host.lower())
        if addresses is None:
            message = f"{peer.what} is the name `{peer.host}`, which is not looked up"
            yield Issue(
                "peer-name", "note", message, peer.at, remedy="`fwc audit --resolve` asks the resolver; the policy needs its addresses"
            )
        elif addresses - known:
            which = peer.host if network(peer.host) else f"{peer.host} ({', '.join((addresses - known).texts()[:3])})"
            message = f"{peer.what} is {which}, which is in none of {', '.join(groups)} ({at}): its calls and its answers are dropped"
            yield Issue("peer-missing", "error", message, peer.at, remedy=f"add it to a group that `{services[0].name}` names")


def sip_names(asterisk: dict[str, Configuration]) -> list[str]:
    """Names of peers, for whoever may look them up."""
    sip, pjsip = asterisk.get("sip.conf"), asterisk.get("pjsip.conf")
    peers = [*(_sip_peers(sip) if sip else ()), *(_pjsip_peers(pjsip) if pjsip else ())]
    names = [p.host.lower() for p in peers if network(p.host) is None]
    return list(dict.fromkeys(names))
