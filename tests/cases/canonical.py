"""Prints a compiled policy in the harness's own words: groups, services, and the neutral rules in order.

Nothing here is shared with a backend, so a change that only concerns one backend's text does not touch it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from fwcompiler.addresses import Ranges, range_text
from fwcompiler.egress import Outlet
from fwcompiler.pipeline import Compiled
from fwcompiler.ports import PROTOCOLS, port_text
from fwcompiler.resolved import Resolved, ResolvedGroup
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
    ForHost,
    Goto,
    InRanges,
    InSet,
    Interface,
    Jump,
    Limit,
    Match,
    OverLimit,
    PortIn,
    ProtocolIs,
    Rewritten,
    Rule,
    SetDscp,
    StateIn,
    Translate,
    TypeIn,
    Unknown,
    Untrack,
    Verdict,
)
from fwcompiler.service import ResolvedService

SHOWN = 24
"""Ranges up to which a set is written out."""

_NAMES = {number: name for name, number in PROTOCOLS.items()}


def canonical(compiled: Compiled) -> str:
    """The whole text."""
    policy, ruleset = compiled.resolved, compiled.ruleset
    lines = [f"policy {policy.name or '(no name)'}"]
    lines += [line for group in policy.groups.values() for line in _group(group)]
    lines += _before_services(policy)
    lines += [_service(service) for service in policy.services]
    lines += [f"egress {_outlet(each)}" for each in (policy.egress.outlets if policy.egress else ())]
    lines += [f"test {t.expect} {t.words() if t.leaving else f'{t.source} -> {t.ports}'} {t.state}" for t in policy.tests]
    lines += [f"set {s.name}{_set(s)}" for s in ruleset.sets]
    lines += [line for chain in ruleset.chains for line in _chain(chain)]
    return "\n".join((*lines, ""))


def _group(group: ResolvedGroup) -> Iterator[str]:
    dynamic = f", dynamic members for {group.timeout} s, at most {group.size}" if group.dynamic else ""
    yield f"group {group.name}: addresses {group.addresses.size}, ranges {len(group.addresses)}{dynamic}"
    yield from (f"    {text}" for text in _ranges(group.addresses.texts()))


def _ranges(texts: Sequence[str]) -> Iterator[str]:
    if len(texts) <= SHOWN:
        yield from texts
        return
    yield from texts[:2]
    yield f"... {len(texts) - 4} more; sha256 of all lines {hashlib.sha256(chr(10).join(texts).encode()).hexdigest()}"
    yield from texts[-2:]


def _before_services(policy: Resolved) -> Iterator[str]:
    if policy.block:
        yield f"block {', '.join(policy.block.groups)} except {', '.join(policy.block.excepted) or 'nobody'}"
    if policy.trust:
        yield f"trust {', '.join(policy.trust)}"


def _service(service: ResolvedService) -> str:
    who = "anywhere" if service.groups is None else ", ".join(service.groups)
    when = "before" if service.early else "after"
    exposed = f" (exposed: {service.expose})" if service.expose else ""
    options = [f"limit {each.group} {each}" for each in service.options.limits]
    options += ["past connection tracking"] if service.options.bypass else []
    options += [f"marked {service.options.dscp}"] if service.options.dscp is not None else []
    rest = f"; {'; '.join(options)}" if options else ""
    return f"service {service.name} {', '.join(service.port_texts())}: {service.kind}, {when} established, from {who}{exposed}{rest}"


def _outlet(each: Outlet) -> str:
    ports = [*(text for p in each.there for text in p.texts()), *(f"from {text}" for p in each.here for text in p.texts())]
    besides = f" and {', '.join(each.multicast.texts())}" if each.multicast else ""
    return f"{each.name} {', '.join(ports)}: to {'anywhere' if each.groups is None else ', '.join(each.groups)}{besides}"


def _set(each: AddressSet) -> str:
    if each.dynamic:
        return f": dynamic, {each.timeout} s, at most {each.size}"
    if len(each.ranges) > SHOWN:
        return f": {len(each.ranges)} ranges"
    return f": {_texts(each.version, each.ranges)}"


def _texts(version: int, ranges: Ranges) -> str:
    return ", ".join(range_text(version, span) for span in ranges)


def _chain(chain: Chain) -> Iterator[str]:
    hook = f" at {chain.hook.name}, priority {chain.hook.priority}, policy {chain.hook.policy}" if chain.hook else ""
    yield f"chain {chain.name}{hook}"
    yield from (f"    {_rule(rule)}" for rule in chain.rules)


def _rule(rule: Rule) -> str:
    matches = ", ".join(_match(m) for m in rule.matches) or "everything"
    log = f" log {rule.log_prefix!r}" if rule.log_prefix else ""
    label = f" [{rule.service}]" if rule.service else ""
    at = f" <- line {rule.origin.line}" if rule.origin else ""
    return f"{matches}:{log}{_verdict(rule.verdict)}{label}{at}"


def _verdict(verdict: Verdict) -> str:
    match verdict:
        case Final():
            return f" {verdict.value}"
        case Goto(chain):
            return f" goto {chain}"
        case Jump(chain):
            return f" jump {chain}"
        case Untrack():
            return " untracked, go on"
        case SetDscp(value):
            return f" mark {value}, go on"
        case Translate(ports=ports):
            return f" {verdict.text} to port {port_text(ports)}" if ports else f" {verdict.text}"
        case None:
            return " go on"


def _match(match: Match) -> str:
    no = "not " if getattr(match, "negated", False) else ""
    match match:
        case InSet(side, name, version):
            return f"IPv{version} {side} {no}in {name}"
        case InRanges(side, version, ranges):
            return f"IPv{version} {side} {no}{_texts(version, ranges)}"
        case Family(version):
            return f"IPv{version}"
        case Interface(way, name):
            return f"{no}{way} {name}"
        case ProtocolIs(number):
            return f"{no}{_NAMES.get(number, number)}"
        case PortIn(side, protocol, span):
            return f"{no}{side} {protocol}/{port_text(span)}"
        case StateIn(states):
            return f"{no}{', '.join(sorted(states))}"
        case TypeIn(version, types):
            return f"{'icmp' if version == 4 else 'icmpv6'} type {', '.join(map(str, types))}"
        case Limit(rate, per, burst):
            return f"at most {rate} a {per}, {burst} at once"
        case OverLimit(version, name, rate, per, burst):
            return f"IPv{version} source over {rate} a {per}, {burst} at once, as {name}"
        case Rewritten(side):
            return f"{side} {no}rewritten"
        case ForHost():
            return "for this host"
        case Unknown(text):
            return f"unknown {text}"
