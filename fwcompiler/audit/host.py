"""What the running host shows: drift, lock-out, what goes past the rules, plain HTTP, the connection table, the SIP helper."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from fwcompiler.audit.facts import Answer, Changed, Conntrack, Drift, Facts, Helper, Rules, Severity
from fwcompiler.audit.findings import Issue, of_policy
from fwcompiler.diagnostics import Position
from fwcompiler.kernel.hostfacts import Routing
from fwcompiler.ports import port_text
from fwcompiler.resolved import Resolved
from fwcompiler.service import ResolvedService

NEARLY_FULL = 0.75
LEAST_ROOM = 65_536
"""Entries that a table should hold at least, where audio from anywhere makes them."""
HTTPS_AFTER = 6
"""Redirects that a browser would still find reasonable on the way to HTTPS."""


def host(policy: Resolved, facts: Facts, where: Position) -> Iterator[Issue]:
    """Every check of the running host; `where` is the policy file."""
    if facts.drift is not None:
        yield from _drift(facts.drift, where)
    yield from (of_policy(finding) for finding in facts.locked_out or ())
    if facts.rules is not None:
        yield from _rules(facts.rules)
    yield from _redirects(policy, facts)
    if facts.helper is not None:
        yield from _helper(facts.helper)
    if facts.routing is not None:
        yield from _routing(facts.routing)
    if facts.conntrack is not None:
        yield from _room(policy, facts.conntrack)


def _drift(drift: Drift, where: Position) -> Iterator[Issue]:
    if not drift.loaded:
        yield Issue("not-loaded", "error", "no rules of fwc are loaded: nothing of this policy is in force", where, remedy="fwc apply")
    elif not drift.in_sync:
        more = f", and {len(drift.changes) - 3} more" if len(drift.changes) > 3 else ""
        what = "; ".join(drift.access[:3]) or "; ".join(drift.changes[:3]) + more
        message = f"the live rules differ from the policy; an apply would change: {what}"
        yield Issue("drift", "error", message, where, remedy="`fwc diff` shows everything, `fwc apply` puts it right")


def _rules(rules: Rules) -> Iterator[Issue]:
    for each in rules.published:
        ports = f"{each.protocol}/{port_text(each.span)}"
        message = f"{ports} is handed on to {each.to} by {each.by}, before this policy is asked: whoever reaches the host reaches it"
        remedy = f"publish it on one address only (`127.0.0.1:{each.span[0]}:…`), or filter it where it is forwarded (docker: DOCKER-USER)"
        yield Issue("docker-bypass", "error", message, place=ports, remedy=remedy)
    yield from map(_changed, rules.meddling)
    if rules.legacy and rules.nft:
        message = (
            f"{rules.legacy} rules of iptables-legacy are in force beside nftables: every packet passes both, and each tool shows half"
        )
        yield Issue(
            "two-variants", "warning", message, place="packet filter", remedy="move the legacy rules over, then `iptables-legacy -F`"
        )


def _changed(found: Changed) -> Issue:
    if found.ports:
        remedy = "take the rule out, or filter it where it is forwarded (docker: DOCKER-USER)"
        return Issue("docker-bypass", "error", found.text, place=found.ports, remedy=remedy)
    severity: Severity = "error" if found.opens else "warning"
    return Issue("rules-before", severity, found.text, place="packet filter", remedy="if that is not meant, take the rule out")


def _redirects(policy: Resolved, facts: Facts) -> Iterator[Issue]:
    service = next((s for s in policy.services if s.name == "http"), None)
    if service is None or facts.answers is None:
        return
    for answer in facts.answers:
        if not answer.error:
            yield from _redirect(answer, service)


def _redirect(answer: Answer, service: ResolvedService) -> Iterator[Issue]:
    """The last hop has to lead to HTTPS; one that serves content in the clear is what the check is for."""
    place = f"tcp/{answer.port} ({answer.where})"
    url, status, target = answer.hops[-1]
    remedy = "redirect everything but /.well-known/acme-challenge/ to https:// (`fwc compile -o` writes the lines for Apache and nginx)"
    if 300 <= status < 400 and _is_https(target):
        return
    if 200 <= status < 300:
        message = f"plain HTTP answers {status} for {url}: passwords of agents and managers pass in the clear"
        yield Issue("redirect", "error", message, service.at, place, remedy)
    elif 300 <= status < 400:
        message = f"plain HTTP leads to {target or 'nowhere'} and does not end at HTTPS after {len(answer.hops)} requests"
        yield Issue("redirect", "error", message, service.at, place, remedy)
    else:
        yield Issue("redirect", "warning", f"plain HTTP answers {status} for {url} and does not lead to HTTPS", service.at, place, remedy)


def _is_https(target: str) -> bool:
    """True for `https://` and a host; servers send what is no URL as well."""
    try:
        parts = urlsplit(target)
        return parts.scheme == "https" and bool(parts.hostname)
    except ValueError:
        return False


def _helper(helper: Helper) -> Iterator[Issue]:
    remedy = "take the rule out; `rmmod nf_conntrack_sip nf_nat_sip`"
    for rule in helper.rules:
        message = f"{rule} gives SIP to the kernel's helper: it rewrites messages, and media from a second address of a carrier is lost"
        yield Issue("sip-helper", "error", message, place="packet filter", remedy=remedy)
    if helper.loaded and helper.automatic:
        message = "the kernel's SIP helper is loaded and given to every connection to port 5060"
        yield Issue(
            "sip-helper", "error", message, place="net.netfilter.nf_conntrack_helper", remedy="sysctl net.netfilter.nf_conntrack_helper=0"
        )
    elif helper.loaded and not helper.rules:
        message = "the kernel's SIP helper is loaded; no rule gives it anything"
        yield Issue("sip-helper", "note", message, place="nf_conntrack_sip", remedy="rmmod nf_nat_sip nf_conntrack_sip")


def _routing(routing: Routing) -> Iterator[Issue]:
    names = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
    for version in routing.off:
        message = f"{names[version]} is 0: this edge sends no IPv{version} packet on, whatever the policy says"
        yield Issue("forwarding-off", "error", message, place=names[version], remedy=f"sysctl {names[version]}=1, and in /etc/sysctl.d/")
    for name in routing.missing:
        message = f"there is no interface `{name}`, between which and the other one this edge is to filter"
        yield Issue("interface-missing", "error", message, place=name, remedy="`ip link` shows the names: set `wan` and `lan` to them")
    for name in routing.strict:
        message = f"rp_filter is strict on {name}: packets whose answer would leave by another interface are dropped before any rule"
        yield Issue("rp-filter", "note", message, place=f"net.ipv4.conf.{name}.rp_filter", remedy="fine with one way out; else set it to 2")


def flood(conntrack: Conntrack) -> int:
    """Packets a second from invented addresses that fill the table, each making an entry that lasts the UDP timeout."""
    return conntrack.room // max(1, conntrack.udp_timeout)


def _room(policy: Resolved, conntrack: Conntrack) -> Iterator[Issue]:
    share = conntrack.count / conntrack.room if conntrack.room else 0.0
    remedy = "sysctl net.netfilter.nf_conntrack_max (262144 or more), and nf_conntrack_buckets with it"
    if share >= NEARLY_FULL:
        message = f"the connection table holds {conntrack.count:,} of {conntrack.room:,} entries: when it is full, new calls are dropped"
        yield Issue(
            "conntrack-room", "error" if share >= 0.95 else "warning", message, place="net.netfilter.nf_conntrack_max", remedy=remedy
        )
    public = [s for s in policy.services if s.groups is None and any(p.protocol == "udp" for p in s.ports)]
    ports = sum(high - low + 1 for s in public for p in s.ports if p.protocol == "udp" for low, high in p.ranges)
    if ports and conntrack.room < max(LEAST_ROOM, 4 * ports):
        message = (
            f"the connection table has room for {conntrack.room:,} entries, and {ports:,} UDP ports are open to anywhere: "
            f"{flood(conntrack):,} packets a second from invented addresses fill it"
        )
        yield Issue("conntrack-room", "warning", message, place="net.netfilter.nf_conntrack_max", remedy=remedy)
