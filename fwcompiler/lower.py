"""Lowers a resolved policy to the neutral ruleset, in the order that section "the meaning" of the design gives.

One input chain, one chain a service. Restricted services are decided before the established rule, so that
whoever is taken out of a group is cut off at once; public ones after it, so that a call's packets pass early.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import get_args

from fwcompiler.addresses import LOOPBACK, Addresses
from fwcompiler.diagnostics import Position
from fwcompiler.lower_edge import DESTINATIONS, edge_chains, edge_sets
from fwcompiler.lower_egress import egress_chain
from fwcompiler.options import ResolvedLimit
from fwcompiler.ports import PROTOCOLS
from fwcompiler.resolved import Resolved, ResolvedGroup
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
    ForHost,
    Goto,
    Hook,
    InRanges,
    InSet,
    Interface,
    Limit,
    Match,
    OverLimit,
    PortIn,
    ProtocolIs,
    Rewritten,
    Rule,
    Ruleset,
    SetDscp,
    Side,
    StateIn,
    TypeIn,
    Untrack,
    redirected,
)
from fwcompiler.service import ResolvedService

FAMILIES = (4, 6)
RAW, MANGLE = -300, -150
"""Priorities before connection tracking, and of marks (include/uapi/linux/netfilter_ipv4.h)."""
LOG_PREFIX = "fwc drop: "

ICMP_ERRORS = (3, 11, 12)
"""Destination unreachable (PMTU among them), time exceeded, parameter problem (RFC 792, RFC 1191)."""
ICMPV6_ERRORS = (1, 2, 3, 4)
"""What must pass through a firewall (RFC 4890, section 4.3.1); neighbours and listeners are asked on one link only."""
ICMPV6_NEEDED = (1, 2, 3, 4, 130, 131, 132, 133, 134, 135, 136, 143)
"""Errors and packet too big (RFC 4443), MLD (RFC 2710, RFC 3810), neighbour discovery (RFC 4861; see RFC 4890)."""
ECHO = {4: 8, 6: 128}
ECHO_LIMIT = Limit(20, "second", 40)
LOG_LIMIT = Limit(5, "second", 10)


def lower(policy: Resolved) -> Ruleset:
    """The ruleset that means what the policy says. Same policy, same value."""
    early = [s for s in policy.services if s.early]
    late = [s for s in policy.services if not s.early]
    spared = [s for s in early if _is_spared(policy, s)]
    invalid = Rule((StateIn(frozenset(("invalid",))),), Final.DROP, "invalid")
    sources = (*_block(policy), *_trust(policy))
    rules = (
        *_loopback(),
        *((invalid, *_dispatch(spared), *sources) if spared else (*sources, invalid)),
        *_dispatch([s for s in early if s not in spared]),
        Rule((StateIn(frozenset(("established", "related"))),), Final.ACCEPT, "established"),
        *_dispatch(late),
        *_icmp(),
        Rule((LOG_LIMIT,), None, log_prefix=LOG_PREFIX),
        Rule((), Final.DROP, "other"),
    )
    services = tuple(_service_chain(s, policy) for s in (*early, *late))
    aside = (*_redirects(policy), *(early_chains(policy) if policy.edge is None else ()), *_untracked(policy), *_marks(policy))
    ours = (Chain("input", rules, Hook("input")), *_egress(policy))
    return Ruleset((*services, *aside, *_edge(policy), *ours), tuple(_sets(policy)))


def _egress(policy: Resolved) -> Iterator[Chain]:
    if policy.egress is not None:
        needed: dict[int, Sequence[int]] = {4: ICMP_ERRORS, 6: ICMPV6_NEEDED}
        yield egress_chain(policy, policy.egress, needed, LOG_LIMIT, lambda name, version: _set_names(policy.groups[name], version))


def _edge(policy: Resolved) -> Iterator[Chain]:
    if policy.edge is None:
        return
    first = (*_block(policy), *_trust(policy))
    icmp = (*_icmp_types(4, ICMP_ERRORS), *_icmp_types(6, ICMPV6_ERRORS))
    last = (*icmp, Rule((LOG_LIMIT,), None, log_prefix=LOG_PREFIX), Rule((), Final.DROP, "other"))

    def sources(names: Iterable[str], version: int) -> Iterator[str]:
        for name in names:
            yield from _set_names(policy.groups[name], version)

    yield from edge_chains(policy, policy.edge, first, last, sources)


def chain_name(service: ResolvedService) -> str:
    """Name of a service's chain."""
    return f"service.{service.name}"


def _loopback() -> Iterator[Rule]:
    yield Rule((Interface("in", "lo"),), Final.ACCEPT, "loopback")
    for version in FAMILIES:
        for side in get_args(Side):
            yield Rule((InRanges(side, version, (LOOPBACK[version],)),), Final.DROP, "loopback")


def _block(policy: Resolved) -> Iterator[Rule]:
    """Excepted groups are taken out of the block set here; only their dynamic members are left to be tested."""
    if policy.block is None:
        return
    excepted = [policy.groups[name] for name in sorted(policy.block.excepted) if policy.groups[name].dynamic]
    for version in FAMILIES:
        if _blocked(policy).family(version):
            spared = (InSet("source", dynamic_name(g, version), version, negated=True) for g in excepted)
            yield Rule((InSet("source", f"block.v{version}", version), *spared), Final.DROP, "block", origin=policy.block.at)
        for name in sorted(policy.block.groups):
            if policy.groups[name].dynamic and name not in policy.block.excepted:
                spared = (InSet("source", s, version, negated=True) for s in _spared_sets(policy, version))
                matches = (InSet("source", dynamic_name(policy.groups[name], version), version), *spared)
                yield Rule(matches, Final.DROP, "block", origin=policy.block.at)


def _spared_sets(policy: Resolved, version: int) -> Iterator[str]:
    """Sets whose members the block list spares although they are dynamic members of a blocked group."""
    assert policy.block is not None
    for name in policy.block.excepted:
        yield from _set_names(policy.groups[name], version)


def _blocks_dynamic(policy: Resolved) -> bool:
    """True where the dynamic members of a blocked group have to be compared with the spared groups at run time."""
    return policy.block is not None and any(policy.groups[n].dynamic and n not in policy.block.excepted for n in policy.block.groups)


def _blocked(policy: Resolved) -> Addresses:
    assert policy.block is not None
    return policy.addresses(policy.block.groups) - policy.addresses(policy.block.excepted)


def _is_spared(policy: Resolved, service: ResolvedService) -> bool:
    """True where the block list holds nobody whom the service accepts, and nobody is let in before services are asked.

    Then the service's own look at the source says what both would say, and its packets pay for one.
    """
    groups = service.groups
    return policy.block is not None and not policy.trust and groups is not None and set(groups) <= set(policy.block.excepted)


def _trust(policy: Resolved) -> Iterator[Rule]:
    yield from _accept_groups(policy, policy.trust, "trust", policy.trust_at)


def _accept_groups(policy: Resolved, groups: Iterable[str], service: str, at: Position | None) -> Iterator[Rule]:
    """By name: the order in which a policy names groups means nothing, so it changes nothing."""
    for name in sorted(groups):
        for version in FAMILIES:
            for set_name in _set_names(policy.groups[name], version):
                yield Rule((InSet("source", set_name, version),), Final.ACCEPT, service, origin=at)


def _dispatch(services: Iterable[ResolvedService]) -> Iterator[Rule]:
    """One rule a port range, by protocol and port."""
    entries = [(p.protocol, span, s) for s in services for p in s.ports for span in p.ranges or (None,)]
    for protocol, span, service in sorted(entries, key=lambda e: (e[0], e[1] or (0, 0))):
        match: Match = ProtocolIs(PROTOCOLS[protocol]) if span is None else PortIn("destination", protocol, span)
        yield Rule((match,), Goto(chain_name(service)), origin=service.at)
    for service in services:
        if service.options.responder:
            responder = PortIn("destination", "tcp", (service.options.responder, service.options.responder))
            yield Rule((responder, Rewritten("destination")), Goto(chain_name(service)), origin=service.at)


def _redirects(policy: Resolved) -> Iterator[Chain]:
    """New connections to a service with a responder go to its port, but those of the groups that stay in the clear."""
    for service in policy.services:
        port = service.options.responder
        if port is None:
            continue
        # A new destination would hide from the input chain that the old one was a loopback address.
        rules = [Rule((InRanges("destination", version, (LOOPBACK[version],)),), Final.ACCEPT) for version in FAMILIES]
        for span in (span for ports in service.ports for span in ports.ranges):
            to: tuple[Match, ...] = (PortIn("destination", "tcp", span), ForHost())
            for group in service.options.plain:
                plain = ((name, version) for version in FAMILIES for name in _set_names(policy.groups[group], version))
                rules += [Rule((InSet("source", name, version), *to), Final.ACCEPT, origin=service.at) for name, version in plain]
            rules.append(Rule(to, redirected(port), origin=service.at))
        yield Chain("responder", tuple(rules), Hook("prerouting", DESTINATIONS, "accept", "nat"))


def _service_chain(service: ResolvedService, policy: Resolved) -> Chain:
    """Groups without a limit come first: a source that is in one of them as well is not limited."""
    name, at, limit = service.name, service.at, service.options.limit("anywhere")
    if service.groups is None:
        rules: tuple[Rule, ...] = (Rule((), Final.ACCEPT, name, origin=at),)
        if limit:
            over = (Rule((*_counted(service), _over(service, limit, v)), Final.DROP, name, origin=limit.at) for v in FAMILIES)
            rules = (*_accept_groups(policy, policy.named, name, at), *over, *rules)
        return Chain(chain_name(service), rules)
    free = [g for g in service.groups if service.options.limit(g) is None]
    limited = (rule for g in service.groups if (each := service.options.limit(g)) for rule in _limited(policy, service, each))
    return Chain(chain_name(service), (*_accept_groups(policy, free, name, at), *limited, Rule((), Final.DROP, name, origin=at)))


def _limited(policy: Resolved, service: ResolvedService, limit: ResolvedLimit) -> Iterator[Rule]:
    """Set after set, so that no packet is counted twice."""
    for version in FAMILIES:
        for set_name in _set_names(policy.groups[limit.group], version):
            member = InSet("source", set_name, version)
            yield Rule((member, *_counted(service), _over(service, limit, version)), Final.DROP, service.name, origin=limit.at)
            yield Rule((member,), Final.ACCEPT, service.name, origin=service.at)


def _counted(service: ResolvedService) -> tuple[Match, ...]:
    """Over UDP every packet counts, over TCP every new connection."""
    return (StateIn(frozenset(("new",))),) if service.ports[0].protocol == "tcp" else ()


def _over(service: ResolvedService, limit: ResolvedLimit, version: int) -> OverLimit:
    return OverLimit(version, f"{service.name}.{limit.group}", limit.rate, limit.per, limit.burst)


def early_chains(policy: Resolved) -> Iterator[Chain]:
    """Drops before connection tracking, where a drop costs less and makes no entry: blocked sources, and strangers to signalling.

    Only what `input` would drop as well, so that nothing depends on this chain. The media, most of a dialer's packets, pay one
    look at the port. Signalling pays one at its own sources: a look into a large set costs more than all the rest of the chain,
    so a stranger who is blocked as well is dropped as a stranger. Packets that are not for this host are not ours to drop; at
    an edge nobody knows that before NAT, so an edge has no such chain. What goes on is counted at `input`.
    """
    strangers = [s for s in policy.services if s.early and s.kind == "restricted" and any(p.protocol == "udp" for p in s.ports)]
    if policy.block is None and not strangers and not any(s.options.bypass for s in policy.services):
        return
    own = Rule((Interface("in", "lo"),), Final.ACCEPT)
    for service in strangers:
        known = _accept_groups(policy, dict.fromkeys((*policy.trust, *(service.groups or ()))), "", service.at)
        yield Chain(early_name(service), (*known, own, Rule((ForHost(),), Final.DROP, service.name, origin=service.at)))
    ports = [(span, s) for s in strangers for p in s.ports if p.protocol == "udp" for span in p.ranges]
    dispatch = (Rule((PortIn("destination", "udp", span),), Goto(early_name(s)), origin=s.at) for span, s in ports)
    blocked = [replace(r, matches=(*r.matches, ForHost())) for r in _block(policy)]
    rules = (*_media(policy), *dispatch, *((own, *blocked) if blocked else ()))
    yield Chain("early", rules, Hook("prerouting", RAW, "accept"))


def early_name(service: ResolvedService) -> str:
    """Name of the chain that drops strangers to a service early."""
    return f"early.{service.name}"


def _media(policy: Resolved) -> Iterator[Rule]:
    for service in policy.services:
        if service.name == "rtp":
            for match in _port_matches(service, "destination"):
                if service.options.bypass:
                    yield Rule((match,), Untrack(), origin=service.at)
                yield Rule((match,), Final.ACCEPT, origin=service.at)


def _untracked(policy: Resolved) -> Iterator[Chain]:
    """The other way of media that connection tracking leaves alone."""
    rules = [Rule((m,), Untrack(), origin=s.at) for s in policy.services if s.options.bypass for m in _port_matches(s, "source")]
    if rules:
        yield Chain("untracked", tuple(rules), Hook("output", RAW, "accept"))


def _marks(policy: Resolved) -> Iterator[Chain]:
    """Marks on what this host sends from a service's ports. A changed mark may change the route, hence the kind."""
    rules = [
        Rule((Family(version), match), SetDscp(service.options.dscp), origin=service.at)
        for service in policy.services
        if service.options.dscp is not None
        for match in _port_matches(service, "source")
        for version in FAMILIES
    ]
    if rules:
        yield Chain("marks", tuple(rules), Hook("output", MANGLE, "accept", "route"))


def _port_matches(service: ResolvedService, side: Side) -> Iterator[PortIn]:
    yield from (PortIn(side, p.protocol, span) for p in service.ports for span in p.ranges)


def _icmp() -> Iterator[Rule]:
    yield from (*_icmp_types(4, ICMP_ERRORS), *_icmp_types(6, ICMPV6_NEEDED))


def _icmp_types(version: int, types: Iterable[int]) -> Iterator[Rule]:
    yield from (Rule((TypeIn(version, (number,)),), Final.ACCEPT, "icmp") for number in types)
    yield Rule((TypeIn(version, (ECHO[version],)), ECHO_LIMIT), Final.ACCEPT, "icmp")


def dynamic_name(group: ResolvedGroup, version: int) -> str:
    """Name of the set that holds a group's dynamic members of one family."""
    return f"{group.name}.dynamic.v{version}"


def _set_names(group: ResolvedGroup, version: int) -> Iterator[str]:
    """The sets a group has in one family: none where it has no address of that family and cannot get one."""
    if group.addresses.family(version):
        yield f"{group.name}.v{version}"
    if group.dynamic:
        yield dynamic_name(group, version)


def _sets(policy: Resolved) -> Iterator[AddressSet]:
    """Sets that the rules name, in a fixed order."""
    forwarded = policy.edge.forwards if policy.edge else ()
    accepted = [*policy.trust, *(g for s in (*policy.services, *(f.service for f in forwarded)) for g in s.groups or ())]
    accepted += [g for s in policy.services for g in s.options.plain]
    accepted += policy.egress.groups() if policy.egress else ()
    accepted += [g for s in policy.services if s.options.limit("anywhere") for g in policy.named]
    static = {*accepted, *(policy.block.excepted if policy.block and _blocks_dynamic(policy) else ())}
    blocking = (*policy.block.groups, *policy.block.excepted) if policy.block else ()
    for name in dict.fromkeys((*accepted, *blocking)):
        group = policy.groups[name]
        for version in FAMILIES:
            if name in static and group.addresses.family(version):
                yield AddressSet(f"{name}.v{version}", version, group.addresses.family(version), origin=group.at)
            if group.dynamic:
                yield AddressSet(dynamic_name(group, version), version, timeout=group.timeout, size=group.size, origin=group.at)
    for version in FAMILIES if policy.block else ():
        blocked = _blocked(policy).family(version)
        if blocked and policy.block:
            yield AddressSet(f"block.v{version}", version, blocked, origin=policy.block.at)
    if policy.edge:
        yield from edge_sets(policy.edge)
