"""What `egress` says in vain, and what a dialer needs to send and may not: names, time, its carriers, the calls' audio."""

from __future__ import annotations

from collections.abc import Iterator

from fwcompiler.addresses import EVERYONE, NOBODY, Addresses, merged, subtract
from fwcompiler.diagnostics import Position, Report
from fwcompiler.egress import Outlet, ResolvedEgress
from fwcompiler.lint_groups import covered_groups, entry_at
from fwcompiler.options import NEVER_LIMITED
from fwcompiler.ports import Ports, overlap
from fwcompiler.resolved import Resolved
from fwcompiler.service import ResolvedService
from fwcompiler.source import Document, KeyPath

DNS, NTP = Ports("udp", ((53, 53),)), Ports("udp", ((123, 123),))
CALLED = ("sip", "iax2")
"""Over UDP a host calls whoever may call it; over TCP phones connect by themselves, and only carriers and peers are called."""
CONNECTED = ("sip-tcp", "sips")
MEDIA = "rtp"


def lint_egress(policy: Resolved, egress: ResolvedEgress, report: Report, document: Document) -> None:
    """Report it, as warnings at the entry or at `egress`."""
    places = _places(document)
    for port, what, hint in ((DNS, "look up names", "dns: resolvers"), (NTP, "ask for the time", "ntp: anywhere")):
        if not _allowed(policy, egress, port):
            report.warn("egress", f"this host may not {what}: nothing lets {port} out", egress.at, f"- {hint}")
    for service in policy.services:
        _callers(policy, egress, service, report)
        if service.name == MEDIA and not service.options.bypass and not any(o.name == MEDIA for o in egress.outlets):
            message = "this host may not send the calls' audio before the other side does"
            report.warn("egress", message, egress.at, f"- {MEDIA}: anywhere")
    for outlet in egress.outlets:
        _covered_groups(policy, outlet, report, document, places.get(outlet.at, ("egress",)))
    _covered_outlets(policy, egress, report)


def _callers(policy: Resolved, egress: ResolvedEgress, service: ResolvedService, report: Report) -> None:
    """Whoever is let in to call has to be called, registered with or asked whether he is there."""
    for name in service.groups or ():
        group = policy.groups[name]
        if service.name not in CALLED and not (service.name in CONNECTED and NEVER_LIMITED.search(name)):
            continue
        reached = [o for o in egress.outlets if any(overlap(a, b) for a in o.there for b in service.ports)]
        if any(name in (o.groups or ()) for o in reached) or name in policy.trust:
            continue
        missing = group.addresses - _where(policy, reached) - policy.addresses(policy.trust)
        if missing or (group.dynamic and not any(o.groups is None for o in reached)):
            some = f"some of them ({missing.texts()[0]} …)" if missing else "those who come and go"
            who = "them" if missing == group.addresses else some
            message = f"`{service.name}` is open to `{name}`, and this host may not call {who}"
            report.warn("egress", message, egress.at, f"- {service.name}: {name}")


def _allowed(policy: Resolved, egress: ResolvedEgress, port: Ports) -> bool:
    """True where at least somebody may be asked at a port."""
    return bool(policy.trust) or any(overlap(port, each) for o in egress.outlets for each in o.there)


def _where(policy: Resolved, outlets: list[Outlet]) -> Addresses:
    total = NOBODY
    for each in outlets:
        total = total | (EVERYONE if each.groups is None else policy.addresses(each.groups))
    return total


def _places(document: Document) -> dict[Position, KeyPath]:
    """By the place of an entry: that of what it says of where to."""
    found: dict[Position, KeyPath] = {}
    for i, each in enumerate(document.data.get("egress") or ()):
        for name, form in each.items():
            path = ("egress", i, name)
            found[document.locate(path, key=True)] = (*path, "to") if isinstance(form, dict) else path
    return found


def _covered_groups(policy: Resolved, outlet: Outlet, report: Report, document: Document, path: KeyPath) -> None:
    """Groups that add nothing to an entry, because another one of it or `trust` has them, unless they have members at run time."""
    trusted = policy.addresses(policy.trust)
    for name in outlet.groups or ():
        group = policy.groups[name]
        if not group.dynamic and group.addresses and not group.addresses - trusted:
            at = entry_at(document, path, name)
            report.warn("covered", f"`{outlet.name}` names `{name}`, to whom `trust` lets everything out", at)
    covered_groups(policy, outlet.groups or (), f"`{outlet.name}`", report, document, path)
    untracked = any(s.name == MEDIA and s.options.bypass for s in policy.services)
    if outlet.name == MEDIA and untracked and outlet.groups is not None:
        message = "media past connection tracking may be an answer to anybody, and is let out whatever `rtp` says"
        report.warn("covered", message, outlet.at, "`conntrack: track` tells answers from other packets")


def _covered_outlets(policy: Resolved, egress: ResolvedEgress, report: Report) -> None:
    """Entries all of whose packets another one lets out; of two that say the same, the later one."""
    covered: list[Outlet] = []
    for inner, outer in _pairs(egress):
        if inner in covered or outer in covered or not _inside(inner.there, outer.there) or not _inside(inner.here, outer.here):
            continue
        dynamic = any(policy.groups[g].dynamic and g not in (outer.groups or ()) for g in inner.groups or ())
        if outer.groups is None or (inner.groups is not None and not dynamic and not _where(policy, [inner]) - _where(policy, [outer])):
            covered.append(inner)
            report.warn("covered", f"`{inner.name}` lets out nothing that `{outer.name}` ({outer.at}) does not", inner.at, "it can go")


def _pairs(egress: ResolvedEgress) -> Iterator[tuple[Outlet, Outlet]]:
    """Every two entries, the later one as the one that may be covered first."""
    for i, later in enumerate(egress.outlets):
        for earlier in egress.outlets[:i]:
            yield later, earlier
            yield earlier, later


def _inside(inner: tuple[Ports, ...], outer: tuple[Ports, ...]) -> bool:
    spans = {p.protocol: merged(span for o in outer if o.protocol == p.protocol for span in o.ranges) for p in inner}
    return all(not subtract(p.ranges, spans[p.protocol]) if p.ranges else p in outer for p in inner)
