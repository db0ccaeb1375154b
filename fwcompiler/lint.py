"""What a policy says in vain: entries that nothing uses, that others cover, or that contradict each other.

Nothing here stops a run. Every finding comes out of the same set algebra that decides packets, so it is exact: what
is called covered is covered for every address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fwcompiler.addresses import Addresses, intersect, range_text
from fwcompiler.diagnostics import Position, Report
from fwcompiler.edge import LOCAL_PORTS
from fwcompiler.lint_egress import lint_egress
from fwcompiler.lint_groups import covered_groups, entry_at
from fwcompiler.resolved import Resolved, ResolvedGroup
from fwcompiler.source import Document

MAX_NAMED = 3


def lint(policy: Resolved, report: Report, document: Document) -> None:
    """Report everything that could be left out or was hardly meant, as warnings at its place in ``document``."""
    _unused(policy, report)
    if not policy.services and not policy.trust and not (policy.edge and policy.edge.forwards):
        who, at = (f"`{policy.host.name}` has", policy.host.at) if policy.host else ("the policy names", Position(document.file, 1))
        report.warn("covered", f"{who} no service: everything but ping will be dropped", at)
    for group in policy.groups.values():
        _covered_entries(group, report)
    for service in policy.services:
        entries = ("services", service.name, "from")
        covered_groups(policy, service.groups or (), f"`{service.name}`", report, document, entries)
        if service.early and any(intersect(p.ranges, (LOCAL_PORTS,)) for p in service.ports):
            hint = "answers to the host's own connections arrive on these ports, and are dropped unless the sender is named"
            report.warn("local-ports", f"`{service.name}` lies in the range of ports that the host itself uses", service.at, hint)
        if service.expose and service.groups is None:
            report.warn("exposed", f"`{service.name}` is open to anywhere: {service.expose}", service.at)
    covered_groups(policy, policy.trust, "`trust`", report, document, ("trust",))
    _trusted_anyway(policy, report, document)
    if policy.egress is not None:
        lint_egress(policy, policy.egress, report, document)
    if policy.block is not None:
        _block(policy, report, document)


def _named_by_services(policy: Resolved) -> dict[str, None]:
    return dict.fromkeys(g for s in policy.services for g in s.groups or ())


def _unused(policy: Resolved, report: Report) -> None:
    used = set(policy.trust) | set(_named_by_services(policy)) | set(policy.named) | set(policy.egress.groups() if policy.egress else ())
    if policy.block:
        used |= set(policy.block.groups) | set(policy.block.excepted)
    for group in policy.groups.values():
        if group.name not in used and not group.generated:
            report.warn("group-unused", f"nothing names the group `{group.name}`", group.at)


def _covered_entries(group: ResolvedGroup, report: Report) -> None:
    """Entries written into the policy itself; list files are other people's, and full of them."""
    for version in (4, 6):
        entries = sorted((low, -high, high, at) for v, low, high, at in group.inline if v == version)
        last_low, last_high, last_at = 0, -1, None
        for low, _, high, at in entries:
            if high <= last_high:
                inner, outer = range_text(version, (low, high)), range_text(version, (last_low, last_high))
                report.warn("covered", f"`{inner}` is already in `{outer}` ({last_at})", at, "one of them can go")
            else:
                last_low, last_high, last_at = low, high, at


def _trusted_anyway(policy: Resolved, report: Report, document: Document) -> None:
    trusted = policy.addresses(policy.trust)
    for service in policy.services:
        for name in service.groups or ():
            group = policy.groups[name]
            if trusted and group.addresses and not group.dynamic and not group.addresses - trusted:
                at = entry_at(document, ("services", service.name, "from"), name)
                report.warn("covered", f"`{service.name}` names `{name}`, whose every packet `trust` accepts", at)


def _block(policy: Resolved, report: Report, document: Document) -> None:
    assert policy.block is not None
    covered_groups(policy, policy.block.groups, "the block list", report, document, ("block", "from"))
    if "except" in document.data["block"]:
        covered_groups(policy, policy.block.excepted, "`except`", report, document, ("block", "except"))
    listed, spared = policy.addresses(policy.block.groups), policy.addresses(policy.block.excepted)
    dynamic = any(policy.groups[name].dynamic for name in policy.block.groups)
    if listed and not listed - spared and not dynamic:
        report.warn("covered", "the block list blocks nobody: every address in it is excepted", policy.block.at)
    named = dict.fromkeys((*policy.trust, *_named_by_services(policy)))
    _swallowed(policy, listed - spared, named, report)


def _swallowed(policy: Resolved, blocked: Addresses, names: Iterable[str], report: Report) -> None:
    """A trusted group is not excepted from the block list by itself; losing all of it is rarely meant."""
    assert policy.block is not None
    for name in names:
        group = policy.groups[name]
        lost = group.addresses & blocked
        if lost:
            what = "every address" if not group.addresses - blocked else ", ".join(_few(lost))
            hint = f"if that is not meant: except: [{', '.join((*policy.block.excepted, name))}]"
            report.warn("swallowed", f"the block list drops {what} of `{name}`", policy.block.at, hint)


def _few(addresses: Addresses) -> Iterator[str]:
    texts = addresses.texts()
    yield from texts[:MAX_NAMED]
    if len(texts) > MAX_NAMED:
        yield f"and {len(texts) - MAX_NAMED} more"
