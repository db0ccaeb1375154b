"""Says in words where a ruleset and a policy part: the packets, one example, and what decides it on either side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fwcompiler.addresses import LAST, LOOPBACK, Addresses, Ranges, address_text, covers, merged, range_text, subtract
from fwcompiler.ports import PROTOCOLS, WITH_PORTS, port_text
from fwcompiler.proof.compose import limit_text, member_text, over_text
from fwcompiler.proof.fields import ECHO_REQUEST, Packet
from fwcompiler.proof.leaving import HOOK, explain_leaving
from fwcompiler.proof.meaning import Explanation, clauses, explain
from fwcompiler.proof.prove import Box, Difference
from fwcompiler.proof.space import (
    DESTINATION,
    FIRST_ATOM,
    INTERFACE,
    OTHER_INTERFACE,
    PORT,
    PROTOCOL,
    SOURCE,
    SOURCE_PORT,
    STATE,
    TYPE,
    Space,
)
from fwcompiler.proof.trace import Decision, trace
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import (
    STATES,
    AnyOf,
    Family,
    Final,
    Foreign,
    ForHost,
    Goto,
    InRanges,
    InSet,
    Interface,
    InterfaceIn,
    Jump,
    Limit,
    Match,
    Opaque,
    OverLimit,
    PortIn,
    PortsIn,
    ProtocolIn,
    ProtocolIs,
    Rewritten,
    Rule,
    Ruleset,
    SetDscp,
    Side,
    State,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Unknown,
    Untrack,
    Verdict,
)

_DYNAMIC = re.compile(r"(\w+) is a member of (.+)\.dynamic\.v[46]")
MAX_RANGES = 4
USUAL_PORT = 40000
"""Where a packet comes from when nothing depends on it."""
USUAL_STATES: tuple[State, ...] = ("new", "established", "related")
"""A box with all of these needs no word about states."""


@dataclass(frozen=True, slots=True)
class CounterExample:
    """Packets that a kernel treats otherwise than the policy says, and one of them.

    `given`: what no packet shows and the difference hangs on, by the prover's name for it: a limit that still holds or does
    not, a source that is a member of a dynamic set or is not.
    """

    packets: str
    packet: Packet
    policy: str
    kernel: str
    given: Mapping[str, bool]

    def __str__(self) -> str:
        return f"{self.packets}: the policy says {self.policy}; the kernel {self.kernel}; for example {packet_text(self.packet)}"


def counter_examples(
    differences: tuple[Difference, ...], policy: Resolved, ruleset: Ruleset, *, leaving: bool = False
) -> Iterator[CounterExample]:
    """One for every box of a difference between a policy and a ruleset, in that order. ``leaving``: about what this host sends."""
    for difference in differences:
        space = difference.space
        names = {name: group.addresses.family(space.version) for name, group in policy.groups.items()}
        for box in difference.boxes:
            packet, given = example(space, box, leaving=leaving), assumed(space, box)
            wanted, found = box.verdicts
            explained, decided = _explained(policy, packet, given), trace(ruleset, packet, HOOK if leaving else "input", given)
            at = f" ({explained.at})" if explained.at else ""
            says = f"{wanted}: {explained.reason}{at}" if explained.verdict == wanted else wanted
            yield CounterExample(box_text(space, box, names, leaving=leaving), packet, says, kernel_does(found, decided), given)


def assumed(space: Space, box: Box) -> dict[str, bool]:
    """What the packets of a box do not show, and the box says of it."""
    return {name: box.masks[FIRST_ATOM + i] == 2 for name, i in space.atoms.items() if FIRST_ATOM + i in box.masks}


def _explained(policy: Resolved, packet: Packet, given: Mapping[str, bool]) -> Explanation:
    """What the meaning says, where the source is a member of groups and limits are exhausted as given."""
    side: Side = "destination" if packet.leaving else "source"
    other = packet.destination or 0 if packet.leaving else packet.source
    own = Addresses.of(*(([(other, other)], []) if packet.version == 4 else ([], [(other, other)])))
    groups = {
        name: replace(g, addresses=g.addresses | own) if given.get(member_text(name, packet.version, side)) else g
        for name, g in policy.groups.items()
    }
    if packet.leaving:
        return explain_leaving(replace(policy, groups=groups), packet)
    limits = {c.limit for c in clauses(policy) if c.limit and not given.get(limit_text(c.limit), True)}
    over = {c.over for c in clauses(policy) if c.over and given.get(over_text(c.over))}
    return explain(replace(policy, groups=groups), packet, limits | over)


def kernel_does(verdict: str, decided: Decision) -> str:
    """`drops them in chain early: source in block.v4: drop (block)`."""
    where = "" if decided.chain or verdict != "accept" else ": they meet no rule of ours"
    if decided.chain and decided.verdict == verdict:
        where = f" in chain {decided.chain}: {rule_text(decided.rule)}" if decided.rule else f" at the end of chain {decided.chain}"
    unsure = f"; not modelled on the way: {decided.unsure}" if decided.unsure else ""
    return f"{verdict}s them{where}{unsure}"


def box_text(space: Space, box: Box, groups: Mapping[str, Ranges] | None = None, *, leaving: bool = False) -> str:
    """`from carriers (198.51.100.16/28) to udp/5060, state new`. ``groups``: names of sets of addresses."""
    masks = box.masks
    if leaving:
        where = _addresses(space, DESTINATION, masks, groups or {}) or f"any IPv{space.version} address"
        own = _addresses(space, SOURCE, masks, {})
        from_ = f"from this host{f' at {own}' if own else ''}"
        return ", ".join([f"{from_} to {_target(space, masks)} at {where}", *_besides(space, box)])
    source = _addresses(space, SOURCE, masks, groups or {}) or f"any IPv{space.version} address"
    to = _target(space, masks)
    destination = _addresses(space, DESTINATION, masks, {})
    rest = [f"at {destination}"] if destination and not destination.startswith("any") else []
    return ", ".join([f"from {source} to {to}", *rest, *_besides(space, box)])


def _besides(space: Space, box: Box) -> Iterator[str]:
    """States, interfaces, own ports, and what no packet shows."""
    masks = box.masks
    if STATE in masks and set(USUAL_STATES) - set(space.names(STATE, masks[STATE])):
        yield f"state {' or '.join(space.names(STATE, masks[STATE]))}"
    if INTERFACE in masks and masks[INTERFACE] != space.everything(INTERFACE) & ~_interface(space, "lo"):
        yield _interfaces(space, masks[INTERFACE])
    if SOURCE_PORT in masks:
        yield f"from port {_numbers(space.ranges(SOURCE_PORT, masks[SOURCE_PORT]))}"
    yield from sorted(_given_text(name, holds) for name, holds in assumed(space, box).items())


def _given_text(name: str, holds: bool) -> str:
    if name.startswith("limit "):
        return f"while the {name} {'is not' if holds else 'is'} exhausted"
    member = _DYNAMIC.fullmatch(name)
    if member:
        return f"{member[1]} is {'a' if holds else 'no'} dynamic member of {member[2]}"
    return f"{'if' if holds else 'unless'} {name}"


def _interfaces(space: Space, mask: int) -> str:
    """`interface eth0 or eth1`, or which ones it is not where it may be any other."""
    names = space.names(INTERFACE, mask)
    if OTHER_INTERFACE not in names:
        return f"interface {' or '.join(names)}"
    return f"any interface but {' and '.join(space.names(INTERFACE, space.everything(INTERFACE) & ~mask))}"


def _interface(space: Space, name: str) -> int:
    return 1 << space.interfaces.index(name) if name in space.interfaces else 0


def _addresses(space: Space, number: int, masks: Mapping[int, int], groups: Mapping[str, Ranges]) -> str:
    """Addresses in the policy's words: groups that lie inside by name; of most addresses, those that are missing."""
    if number not in masks:
        return ""
    version, ranges = space.version, space.ranges(number, masks[number])
    if 2 * sum(high - low + 1 for low, high in ranges) <= LAST[version]:
        return _named(version, ranges, groups)
    missing = subtract(_elsewhere(space), ranges)
    return f"any IPv{version} address" + (f" but {_named(version, missing, groups)}" if missing else "")


def _named(version: int, ranges: Ranges, groups: Mapping[str, Ranges]) -> str:
    """Groups that lie inside, the largest first and no address twice; then what is left of the ranges."""
    names: list[str] = []
    left = ranges
    for name in sorted(groups, key=lambda n: -sum(high - low + 1 for low, high in groups[n])):
        own = groups[name]
        if own and covers(left, own[0][0]) and covers(left, own[-1][1]) and not subtract(own, left):
            names.append(f"{name} ({_some(version, (), own)})")
            left = subtract(left, own)
    return _some(version, names, left)


def _some(version: int, names: Sequence[str], ranges: Ranges) -> str:
    texts = [*names, *(range_text(version, r) for r in ranges[:MAX_RANGES])][:MAX_RANGES]
    more = len(names) + len(ranges) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")


def _target(space: Space, masks: Mapping[int, int]) -> str:
    """`tcp/22, udp/5060`; ports and types stand with the protocols that have them."""
    ports = f"/{_numbers(space.ranges(PORT, masks[PORT]))}" if PORT in masks else ""
    types = f"/type {_numbers(space.ranges(TYPE, masks[TYPE]))}" if TYPE in masks else ""
    if PROTOCOL not in masks:
        return "any protocol" + (f" (tcp and udp{ports})" if ports else "") + (f" (icmp{types})" if types else "")
    within = space.ranges(PROTOCOL, masks[PROTOCOL])
    own = [name for name, number in PROTOCOLS.items() if covers(within, number)]
    texts = [name + (ports if name in WITH_PORTS else types if name.startswith("icmp") else "") for name in own]
    named = merged((number, number) for number in PROTOCOLS.values())
    others = subtract(within, named)
    if others == subtract(((0, 255),), named):
        texts.append("other protocols")
    else:
        texts += [f"protocol {low}" if low == high else f"protocols {low}-{high}" for low, high in others[:MAX_RANGES]]
        texts += ["…"] if len(others) > MAX_RANGES else []
    return ", ".join(texts)


def _numbers(ranges: Ranges) -> str:
    return ", ".join(port_text(r) for r in ranges[:MAX_RANGES]) + (" …" if len(ranges) > MAX_RANGES else "")


def example(space: Space, box: Box, *, leaving: bool = False) -> Packet:
    """One packet of a box, as ordinary as the box allows."""
    masks = box.masks

    def number(field: int, *usual: int) -> int:
        if field not in masks:
            return usual[0]
        ranges = space.ranges(field, masks[field])
        return next((value for value in usual if covers(ranges, value)), ranges[0][0])

    v4 = space.version == 4
    protocol = number(PROTOCOL, 17, 6, PROTOCOLS["icmp" if v4 else "icmpv6"], *PROTOCOLS.values())
    kind = number(TYPE, ECHO_REQUEST.get(protocol, 0))
    interfaces = space.names(INTERFACE, masks.get(INTERFACE, space.everything(INTERFACE)))
    other = 0x08080808 if v4 else 0x2001_4860 << 96
    there = (0xC0000201 if v4 else (0x2001_0DB8 << 96) + 1) if not leaving else other
    elsewhere = leaving or (DESTINATION in masks and subtract(_elsewhere(space), space.ranges(DESTINATION, masks[DESTINATION])))
    return Packet(
        space.version,
        number(SOURCE, 0 if leaving else other),
        protocol,
        number(PORT, *((5060, 22) if protocol == 17 else (22, 443))),
        number(DESTINATION, there) if elsewhere else None,
        number(SOURCE_PORT, USUAL_PORT),
        kind,
        "eth0" if OTHER_INTERFACE in interfaces else interfaces[0],
        _state(space.names(STATE, masks.get(STATE, space.everything(STATE))), protocol, kind),
        leaving,
    )


def _elsewhere(space: Space) -> Ranges:
    """Everything but loopback addresses: to be at one of these goes without saying."""
    return subtract(((0, LAST[space.version]),), (LOOPBACK[space.version],))


def _state(names: Sequence[str], protocol: int, kind: int) -> State:
    """The most ordinary of some states; connection tracking leaves neighbour discovery and MLD alone (nf_conntrack_proto_icmpv6.c)."""
    if protocol == PROTOCOLS["icmpv6"] and 130 <= kind <= 143 and "untracked" in names:
        return "untracked"
    return next(s for s in STATES if s in names)


def packet_text(packet: Packet) -> str:
    """`198.51.100.17 -> udp/5060, new, in eth0`."""
    port = f"/{packet.port}" if packet.protocol in (6, 17) else f"/{packet.icmp_type}" if packet.protocol in (1, 58) else ""
    at = f" at {address_text(packet.version, packet.destination)}" if packet.destination is not None else ""
    source = "this host" if packet.leaving and not packet.source else address_text(packet.version, packet.source)
    if packet.protocol in (6, 17) and packet.source_port != USUAL_PORT:
        source += f" port {packet.source_port}"
    return f"{source} -> {packet.protocol_name}{port}{at}, {packet.state}, {'out' if packet.leaving else 'in'} {packet.interface}"


def rule_text(rule: Rule) -> str:
    """A rule in words: `source in carriers.v4: accept (sip)`."""
    matches = ", ".join(match_text(m) for m in rule.matches) or "everything"
    return f"{matches}: {_verdict(rule.verdict)}" + (f" ({rule.service})" if rule.service else "")


def _verdict(verdict: Verdict) -> str:
    match verdict:
        case Final():
            return verdict.value
        case Goto(chain) | Jump(chain):
            return f"on in {chain}"
        case Translate(_, text) | Undecided(text):
            return text
        case Untrack():
            return "goes on, untracked"
        case SetDscp(value):
            return f"goes on, marked with DSCP {value}"
        case None:
            return "goes on"


def _foreign_text(match: Foreign) -> str:
    match match:
        case ProtocolIn(spans, _):
            return f"protocol {_numbers(spans)}"
        case PortsIn(side, _, spans, _):
            return f"{'from ' if side == 'source' else ''}port {_numbers(spans)}"
        case InterfaceIn(way, names, _):
            return f"{way} {' or '.join(names)}"
        case AnyOf(alternatives, _):
            return " or ".join("(" + ", ".join(match_text(m) for m in each) + ")" for each in alternatives)
        case _:
            return str(match)


def match_text(match: Match) -> str:
    """A match in words."""
    no = "not " if getattr(match, "negated", False) else ""
    match match:
        case InSet(side, name, _, _):
            return f"{side} {no}in {name}"
        case InRanges(side, version, ranges, _):
            return f"{side} {no}in {', '.join(range_text(version, r) for r in ranges[:MAX_RANGES])}"
        case Family(version):
            return f"IPv{version}"
        case Interface(way, name, _):
            return f"{no}{way} {name}"
        case ProtocolIs(number, _):
            return f"{no}protocol {number}"
        case PortIn(side, protocol, span, _):
            return f"{no}{protocol} {'from ' if side == 'source' else ''}port {port_text(span)}"
        case StateIn(states, _):
            return f"{no}{' or '.join(s for s in STATES if s in states)}"
        case TypeIn(version, types):
            return f"{'ICMP' if version == 4 else 'ICMPv6'} type {', '.join(map(str, types))}"
        case Limit(rate, per, _):
            return f"at most {rate} a {per}"
        case OverLimit(_, _, rate, per, burst):
            return f"source over {rate} a {per}, {burst} at once"
        case ForHost():
            return "for this host"
        case Rewritten(side, _):
            return f"{no}after its {side} was rewritten"
        case Unknown(text) | Opaque(text):
            return f"{no}{text}"
        case Foreign():
            return no + _foreign_text(match)
