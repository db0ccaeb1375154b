"""Ends the connections of sources that lost access: taken out of a group, a member's turn over, a service gone.

Restricted services and blocks are decided before the established rule, so most of it bites at once by the rules alone. What
this adds: connections to services that are no longer there, or are public no longer, and a table that tells the truth. What this host
opened itself goes on as established, whatever `egress` says by now, so there it is all that ends it. And at an edge, flows that are
older than the rules which hand them on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from fwcompiler.addresses import merged
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import conntrack, routes
from fwcompiler.kernel.conntrack import Begun, Cut
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.access import Access, AccessChange, compare
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.leaving import HOOK
from fwcompiler.proof.trace import trace
from fwcompiler.ruleset import AddressSet, Ruleset

if TYPE_CHECKING:
    from fwcompiler.kernel.netns import Namespace

TRACKED = ("tcp", "udp")


def lost_access(before: Ruleset, after: Ruleset, change: AccessChange) -> tuple[Access, ...]:
    """Who can no longer open what, dynamic members counted in: a member keeps what it has, whatever the policy's lists lose.

    `change` is the difference without them. Both rulesets were observed, sets with contents and members.
    """
    if not any(s.members for s in (*before.sets, *after.sets)):
        return change.lost
    # Where the rules are the same, a member can lose what it has by a block only, and that takes its echo requests too.
    if not change.lost and before.chains == after.chains:
        return ()
    return compare(_with_members(before), _with_members(after)).lost


def _with_members(ruleset: Ruleset) -> Ruleset:
    def held(each: AddressSet) -> AddressSet:
        return replace(each, ranges=merged((a, a) for a, _ in each.members)) if each.dynamic else each

    return replace(ruleset, sets=tuple(map(held, ruleset.sets)))


def end(lost: Iterable[Access], namespace: Namespace) -> str:
    """Delete the entries of connections that the sources could not open any more; what went wrong, in words, or nothing.

    A failure undoes nothing: the rules are in force, and decide about every packet that is not of an old connection.
    """
    cuts = list(_cuts(lost))
    if not cuts:
        return ""
    try:
        with namespace.entered():
            conntrack.delete(cuts)
    except HostRefused as refused:
        return f"the connections of sources that lost access were not ended: {refused.message}"
    return ""


def end_astray(gained: Iterable[Access], namespace: Namespace) -> str:
    """Delete the entries of flows that an edge hands on from now on; what went wrong, in words, or nothing.

    A translation is chosen with a flow's first packet. One that is older than the rules keeps what it began with, and UDP that
    never pauses, a carrier's keep-alive for one, would not arrive for ever.
    """
    handed_on = [a for a in gained if a.at and not a.direct and ":" not in a.at and a.to.startswith("udp/")]
    if not handed_on:
        return ""
    try:
        with namespace.entered():
            own = {4: routes.own_addresses(4)}
            conntrack.delete([replace(cut, to=own) for cut in _cuts(handed_on)])
    except HostRefused as refused:
        return f"flows that are older than the rules were not ended, and go where they went before: {refused.message}"
    return ""


def end_sent(before: Ruleset, after: Ruleset, namespace: Namespace) -> str:
    """Delete the entries of connections that this host opened and may not open any more; what went wrong, in words, or nothing.

    Every one of them is sent anew through the rules before and after, both as observed, members included.
    """

    def is_lost(begun: Begun) -> bool:
        packet = Packet(
            begun.version, begun.source, begun.protocol, begun.port, begun.destination, begun.source_port, interface="", leaving=True
        )
        return trace(before, packet, HOOK).verdict == "accept" != trace(after, packet, HOOK).verdict

    try:
        with namespace.entered():
            conntrack.delete_begun({version: routes.own_addresses(version) for version in (4, 6)}, is_lost)
    except HostRefused as refused:
        return f"the connections that this host may not have any more were not ended: {refused.message}"
    return ""


def _cuts(lost: Iterable[Access]) -> Iterator[Cut]:
    for access in lost:
        protocol, _, ports = access.to.partition("/")
        if protocol in TRACKED:
            low, _, high = ports.partition("-")
            yield Cut(PROTOCOLS[protocol], (int(low), int(high or low)), access.addresses)
