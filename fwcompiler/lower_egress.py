"""Lowers `egress`: the chain at the output hook that lets out what the policy names, and rejects the rest.

Entries say what this host may begin, so established connections come first, and one look decides most packets. A rejected packet
is answered: programs on this host learn at once that it is the firewall's doing, instead of waiting for an answer. The order in
which a policy names entries means nothing, so it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from fwcompiler.addresses import MULTICAST
from fwcompiler.egress import LABEL, PING, Outlet, ResolvedEgress
from fwcompiler.ports import PROTOCOLS, Ports
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import (
    Chain,
    Family,
    Final,
    Hook,
    InRanges,
    InSet,
    Interface,
    Limit,
    Match,
    PortIn,
    ProtocolIs,
    Rule,
    Side,
    StateIn,
    TypeIn,
)

FAMILIES = (4, 6)
LOG_PREFIX = "fwc egress: "
IGMP = 2
"""Protocol number (RFC 3376): a host says which multicast groups it listens to, as keepalived's."""
DHCP = {4: (68, 67), 6: (546, 547)}
"""Ports of a client and of its server (RFC 2131, RFC 8415)."""

Sets = Callable[[str, int], Iterable[str]]
"""The names of the sets that a group has in one family."""


def egress_chain(policy: Resolved, egress: ResolvedEgress, needed: dict[int, Sequence[int]], log: Limit, sets: Sets) -> Chain:
    """The chain of outgoing packets. ``needed``: ICMP types by family that a host sends of itself."""
    rules = (
        Rule((Interface("out", "lo"),), Final.ACCEPT),
        *(Rule((match,), Final.ACCEPT) for s in policy.services if s.options.bypass for p in s.ports for match in _matches(p, "source")),
        Rule((StateIn(frozenset(("established", "related"))),), Final.ACCEPT),
        *_needs(needed),
        *(Rule((to,), Final.ACCEPT, f"{LABEL}.trust", origin=policy.trust_at) for to in _members(policy.trust, sets)),
        *sorted((rule for each in egress.outlets for rule in _outlet(each, sets)), key=lambda r: (r.service, str(r.matches))),
        Rule((log,), None, log_prefix=LOG_PREFIX),
        Rule((), Final.REJECT, LABEL, origin=egress.at),
    )
    return Chain("output", tuple(dict.fromkeys(rules)), Hook("output"))


def _needs(needed: dict[int, Sequence[int]]) -> Iterator[Rule]:
    yield from (Rule((TypeIn(version, (number,)),), Final.ACCEPT) for version in FAMILIES for number in needed[version])
    yield Rule((InRanges("destination", 4, (MULTICAST[4],)), ProtocolIs(IGMP)), Final.ACCEPT)
    for version, (here, there) in DHCP.items():
        yield Rule((Family(version), PortIn("source", "udp", (here, here)), PortIn("destination", "udp", (there, there))), Final.ACCEPT)


def _outlet(each: Outlet, sets: Sets) -> Iterator[Rule]:
    matches = [*(m for p in each.there for m in _matches(p, "destination")), *(m for p in each.here for m in _matches(p, "source"))]
    where: list[Match] = list(_members(each.groups or (), sets))
    where += [InRanges("destination", v, each.multicast.family(v)) for v in FAMILIES if each.multicast.family(v)]
    for match in matches:
        if each.groups is None:
            yield Rule((match,), Final.ACCEPT, each.label, origin=each.at)
        for to in where:
            if not isinstance(match, TypeIn) or not isinstance(to, InSet | InRanges) or to.version == match.version:
                yield Rule((match, to), Final.ACCEPT, each.label, origin=each.at)


def _members(groups: Iterable[str], sets: Sets) -> Iterator[InSet]:
    yield from (InSet("destination", name, version) for group in sorted(groups) for version in FAMILIES for name in sets(group, version))


def _matches(ports: Ports, side: Side) -> Iterator[Match]:
    """A ping is an echo request of either family; a protocol without ports is itself."""
    if ports.protocol in PING:
        yield from (TypeIn(4, (8,)), TypeIn(6, (128,)))
    elif ports.ranges:
        yield from (PortIn(side, ports.protocol, span) for span in ports.ranges)
    else:
        yield ProtocolIs(PROTOCOLS[ports.protocol])
