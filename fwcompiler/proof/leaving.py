"""The meaning of `egress`: which packets this host may send. Written from the policy, apart from what compiles it.

The first clause that holds decides a packet that leaves this host. The order of entries says nothing; here they stand by name.
Which connection a packet belongs to comes before them: they say what this host may begin, and answers to what was let in always
pass. Media past connection tracking may be such an answer, and nobody can tell, so it passes too. Forwarded packets of an edge
are not this host's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fwcompiler.addresses import MULTICAST, NOBODY, Addresses, address_text, range_text
from fwcompiler.ports import Ports
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.meaning import Clause, Explanation, target_text

if TYPE_CHECKING:
    from fwcompiler.resolved import Resolved

HOOK: Final = "output"
_PINGS = ("icmp", "icmpv6")
_IGMP = 2
_NEEDED: dict[int, tuple[int, ...]] = {4: (3, 11, 12), 6: (1, 2, 3, 4, 130, 131, 132, 133, 134, 135, 136, 143)}
"""Errors, and what IPv6 finds its neighbours and listeners by (RFC 792, RFC 4443, RFC 4861, RFC 2710, RFC 3810)."""


def leaving(policy: Resolved) -> tuple[Clause, ...]:
    """The whole meaning for packets that this host sends, in order; the last clause holds for every packet."""
    if policy.egress is None:
        return (Clause("accept", "the policy does not restrict what this host sends"),)
    untracked = tuple(p for s in policy.services if s.options.bypass for p in s.ports)
    media = (Clause("accept", "media past connection tracking may be an answer", from_ports=untracked),) if untracked else ()
    return (
        Clause("accept", "the loopback interface is open", loopback=True),
        *media,
        Clause("accept", "it belongs to an established connection", states=frozenset(("established", "related"))),
        *_needs(),
        *_trusted(policy),
        *_entries(policy),
        Clause("reject", "no entry of egress covers it", at=policy.egress.at),
    )


def _needs() -> Iterator[Clause]:
    """What a host does by itself: errors, neighbours, listeners, and its address (RFC 3376, RFC 2131, RFC 8415)."""
    for version, types in _NEEDED.items():
        yield Clause("accept", f"an {'ICMP' if version == 4 else 'ICMPv6'} type that a host needs", icmp=(version, types))
    yield Clause("accept", "this host joins multicast groups", protocol=_IGMP, destination=Addresses((MULTICAST[4],)))
    for here, there, everyone in ((68, 67, Addresses(((0, (1 << 32) - 1),))), (546, 547, Addresses((), ((0, (1 << 128) - 1),)))):
        ports = (Ports("udp", ((there, there),)),)
        own = (Ports("udp", ((here, here),)),)
        yield Clause("accept", "this host asks for its address (DHCP)", ports=ports, from_ports=own, destination=everyone)


def _trusted(policy: Resolved) -> Iterator[Clause]:
    for name in policy.trust:
        yield _to(policy, (name,), Clause("accept", "the destination is trusted", at=policy.trust_at))


def _entries(policy: Resolved) -> Iterator[Clause]:
    assert policy.egress is not None
    for each in sorted(policy.egress.outlets, key=lambda o: o.label):
        where = "anywhere" if each.groups is None else "the destination"
        reason = f"egress names {where} for {each.name}"
        plain = Clause("accept", reason, each.name, each.at)
        ways = [replace(plain, from_ports=(ports,)) for ports in each.here]
        for ports in each.there:
            pings = [replace(plain, icmp=(version, (number,))) for version, number in ((4, 8), (6, 128))]
            ways += pings if ports.protocol in _PINGS else [replace(plain, ports=(ports,))]
        for way in ways:
            yield way if each.groups is None else _to(policy, each.groups, way, each.multicast)


def _to(policy: Resolved, groups: Iterable[str], clause: Clause, besides: Addresses = NOBODY) -> Clause:
    """The clause for packets to these groups only."""
    names = tuple(groups)
    dynamic = tuple(name for name in names if policy.groups[name].dynamic)
    return replace(clause, destination=policy.addresses(names) | besides, groups=names, members=dynamic)


def explain_leaving(policy: Resolved, packet: Packet) -> Explanation:
    """Decide one packet that this host sends, and say why, with where the destination's address comes from."""
    assert packet.destination is not None
    meaning = leaving(policy)
    decided = next(c for c in meaning if c.holds(packet))
    destination, reason = address_text(packet.version, packet.destination), decided.reason
    for name in decided.groups:
        at = policy.groups[name].where(packet.version, packet.destination)
        if at is not None:
            span = next(s for s in policy.groups[name].addresses.family(packet.version) if s[0] <= packet.destination <= s[1])
            reason = f"{reason}: {destination} is in {name} ({range_text(packet.version, span)}, {at})"
            break
    port = f" port {packet.source_port}" if packet.source_port != Packet(4, 0, 0).source_port else ""
    steps = [f"this host{port} -> {target_text(packet)}, {packet.state}, out {packet.interface}"]
    open_to = sorted({g for c in meaning for g in c.members if replace(c, destination=None, members=()).holds(packet)})
    if decided.verdict == "reject" and open_to:
        steps.append(f"what goes to dynamic members of {', '.join(open_to)} may pass; only the running host knows them")
    steps.append(f"{decided.verdict}: {reason}")
    return Explanation(decided.verdict, decided.service, reason, decided.at, tuple(steps))
