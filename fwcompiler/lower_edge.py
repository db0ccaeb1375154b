"""Lowers what an edge does with packets that are not for itself: where they go, which of them may pass, under which address they leave.

Only what passes between its wan and its lan is looked at, and what comes back to the lan because it was sent to the edge's
own address (hairpin). Everything else that is forwarded, a container's traffic for one, meets no rule of ours but these tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from fwcompiler.addresses import Range
from fwcompiler.edge import Forward, ResolvedEdge
from fwcompiler.ports import PROTOCOLS
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
    Goto,
    Hook,
    InRanges,
    InSet,
    Interface,
    Jump,
    Match,
    PortIn,
    ProtocolIs,
    Rewritten,
    Rule,
    StateIn,
    masqueraded,
    sent_on,
)
from fwcompiler.service import udp_spans

DESTINATIONS, SOURCES = -100, 100
"""Priorities of NAT (include/uapi/linux/netfilter_ipv4.h: NF_IP_PRI_NAT_DST, NF_IP_PRI_NAT_SRC)."""

Sources = Callable[[Iterable[str], int], Iterable[str]]
"""The sets that groups have in one family."""


def edge_chains(policy: Resolved, edge: ResolvedEdge, first: tuple[Rule, ...], last: tuple[Rule, ...], sources: Sources) -> Iterator[Chain]:
    """All chains of an edge. ``first``: rules that block and trust, ``last``: ICMP that passes and the final drop."""
    yield from _guards(edge, sources)
    established = Rule((StateIn(frozenset(("established", "related"))),), Final.ACCEPT, "established")
    invalid = Rule((StateIn(frozenset(("invalid",))),), Final.DROP, "invalid")
    guarded = tuple(_guarded(edge))
    early = [f for f in edge.forwards if f.service.early]
    late = [f for f in edge.forwards if not f.service.early]
    yield Chain("inbound", (*first, invalid, *guarded, *_admitted(early), established, *_admitted(late), *last))
    yield Chain("outbound", (*(r for r in first if r.verdict is Final.DROP), invalid))
    yield Chain("within", (*first, *guarded))
    wan, lan = edge.wan, edge.lan
    ways = ((wan, lan, "inbound"), (lan, wan, "outbound"), (lan, lan, "within"))
    passing = (Rule((Interface("in", came), Interface("out", leaves)), Goto(chain)) for came, leaves, chain in ways)
    yield Chain("forward", tuple(passing), Hook("forward", 0, "accept"))
    if edge.addresses.v4 and edge.forwards:
        own = InSet("destination", "edge.v4", 4)
        yield Chain("arriving", tuple(_sent_on(policy, edge, sources)))
        arriving = tuple(Rule((Interface("in", name), own), Goto("arriving"), origin=edge.at) for name in (wan, lan))
        yield Chain("prerouting", arriving, Hook("prerouting", DESTINATIONS, "accept", "nat"))
    if edge.hidden:
        yield Chain("postrouting", tuple(_leaving(edge)), Hook("postrouting", SOURCES, "accept", "nat"))


def edge_sets(edge: ResolvedEdge) -> Iterator[AddressSet]:
    """The edge's own addresses, and those that leave under them."""
    if edge.addresses.v4 and edge.forwards:
        yield AddressSet("edge.v4", 4, edge.addresses.v4, origin=edge.at)
    if edge.hidden:
        yield AddressSet("behind.v4", 4, edge.hidden.v4, origin=edge.at)


def guard_name(forward: Forward) -> str:
    """Name of the chain that keeps strangers from a service behind the edge."""
    return f"guard.{forward.service.name}"


def _guards(edge: ResolvedEdge, sources: Sources) -> Iterator[Chain]:
    """Named sources come back from here, others do not."""
    for name in dict.fromkeys(f.service.name for f in (*edge.guarded, *(g for g in edge.forwards if g.service.groups is not None))):
        forward = next(f for f in (*edge.guarded, *edge.forwards) if f.service.name == name)
        groups = forward.service.groups or ()
        named = [
            Rule((InSet("source", each, version),), Final.RETURN, origin=forward.at)
            for version in (4, 6)
            for each in sources(groups, version)
        ]
        yield Chain(guard_name(forward), (*named, Rule((), Final.DROP, name, origin=forward.at)))


def _guarded(edge: ResolvedEdge) -> Iterator[Rule]:
    for forward in edge.guarded:
        yield from (Rule(matches, Jump(guard_name(forward)), origin=forward.at) for matches in _towards(forward))


def _admitted(forwards: Iterable[Forward]) -> Iterator[Rule]:
    for forward in forwards:
        service = forward.service
        for matches in _towards(forward):
            if service.groups is not None and not service.early:
                yield Rule(matches, Jump(guard_name(forward)), origin=forward.at)
            yield Rule(matches, Final.ACCEPT, service.name, origin=forward.at)


def _towards(forward: Forward) -> Iterator[tuple[Match, ...]]:
    """One rule an address and range of ports, since no rule has a set without a name."""
    for version, address in forward.host.addresses:
        there = InRanges("destination", version, ((address, address),))
        for protocol, span in _ports(forward):
            yield there, ProtocolIs(PROTOCOLS[protocol]) if span is None else PortIn("destination", protocol, span)


def _ports(forward: Forward) -> Iterator[tuple[str, Range | None]]:
    yield from ((p.protocol, span) for p in forward.service.ports for span in p.ranges or (None,))


def _sent_on(policy: Resolved, edge: ResolvedEdge, sources: Sources) -> Iterator[Rule]:
    """Packets to the edge's own address, by port and for those who may, each to the one host that owns it."""
    for forward in edge.forwards:
        if forward.target is None:
            continue
        for protocol, span in _ports(forward):
            to: Match = ProtocolIs(PROTOCOLS[protocol]) if span is None else PortIn("destination", protocol, span)
            if forward.service.groups is None:
                yield Rule((Family(4), to), sent_on(forward.target), origin=forward.at)
                continue
            for name in sources(dict.fromkeys((*policy.trust, *forward.service.groups)), 4):
                yield Rule((InSet("source", name, 4), to), sent_on(forward.target), origin=forward.at)


def _leaving(edge: ResolvedEdge) -> Iterator[Rule]:
    """Hosts keep the ports that are theirs alone; nobody else gets away with those; what came back by hairpin must return here."""
    behind = InSet("source", "behind.v4", 4)
    out = Interface("out", edge.wan)
    for forward in edge.forwards:
        for version, address in forward.host.addresses:
            if version == 4 and (4, address) in edge.hidden:
                own = InRanges("source", 4, ((address, address),))
                yield from (
                    Rule((out, own, PortIn("source", "udp", s)), masqueraded(), origin=forward.at) for s in udp_spans(forward.service)
                )
    for span in edge.reserved():
        yield Rule((out, behind, PortIn("source", "udp", span)), masqueraded(edge.spare), origin=edge.at)
    yield Rule((out, behind), masqueraded(), origin=edge.at)
    yield Rule((Interface("out", edge.lan), behind, Rewritten("destination")), masqueraded(), origin=edge.at)
