"""Says in words where a ruleset and a policy part: the packets, one example, and what decides it on either side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fwcompiler.addresses import LAST, LOOPBACK, Ranges, address_text, range_text, subtract
from fwcompiler.ports import PROTOCOLS, port_text
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.meaning import explain
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
from fwcompiler.resolve import Resolved
from fwcompiler.ruleset import (
    STATES,
    AnyOf,
    Family,
    Final,
    Foreign,
    Goto,
    InRanges,
    InSet,
    Interface,
    InterfaceIn,
    Jump,
    Limit,
    Match,
    Opaque,
    PortIn,
    PortsIn,
    ProtocolIn,
    ProtocolIs,
    Rule,
    Ruleset,
    State,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Unknown,
    Untrack,
    Verdict,
)

MAX_RANGES = 4
USUAL_STATES: tuple[State, ...] = ("new", "established", "related")
"""A box with all of these needs no word about states."""


@dataclass(frozen=True, slots=True)
class CounterExample:
    """Packets that a kernel treats otherwise than the policy says, and one of them."""

    packets: str
    packet: Packet
    policy: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.packets}: the policy says {self.policy}; the kernel {self.kernel}"


def counter_examples(differences: tuple[Difference, ...], policy: Resolved, ruleset: Ruleset) -> Iterator[CounterExample]:
    """One for every box of a difference between a policy and a ruleset, in that order."""
    for difference in differences:
        for box in difference.boxes:
            packet = example(difference.space, box)
            wanted, found = box.verdicts
            explained, decided = explain(policy, packet), trace(ruleset, packet)
            at = f" ({explained.at})" if explained.at else ""
            says = f"{wanted}: {explained.reason}{at}" if explained.verdict == wanted else wanted
            yield CounterExample(box_text(difference.space, box), packet, says, _kernel(found, decided))


def _kernel(verdict: str, decided: Decision) -> str:
    where = f", in chain {decided.chain}" if decided.chain and decided.verdict == verdict else ""
    label = f" as {decided.service}" if decided.service and decided.verdict == verdict else ""
    unsure = f"; not modelled on the way: {decided.unsure}" if decided.unsure else ""
    return f"{verdict}s them{label}{where}{unsure}"


def box_text(space: Space, box: Box) -> str:
    """`from 198.51.100.16/28 to udp/5060, state new`."""
    masks = box.masks
    source = _addresses(space, SOURCE, masks) or f"any IPv{space.version} address"
    to = _target(space, masks)
    destination = _addresses(space, DESTINATION, masks)
    rest = [f"at {destination}"] if destination and not destination.startswith("any") else []
    if STATE in masks and set(USUAL_STATES) - set(space.names(STATE, masks[STATE])):
        rest.append(f"state {' or '.join(space.names(STATE, masks[STATE]))}")
    if INTERFACE in masks and masks[INTERFACE] != space.everything(INTERFACE) & ~_interface(space, "lo"):
        rest.append(f"interface {' or '.join(space.names(INTERFACE, masks[INTERFACE]))}")
    if SOURCE_PORT in masks:
        rest.append(f"from port {_numbers(space.ranges(SOURCE_PORT, masks[SOURCE_PORT]))}")
    names = {FIRST_ATOM + i: name for name, i in space.atoms.items()}
    rest += [("" if mask == 2 else "not: ") + names[number] for number, mask in sorted(masks.items()) if number >= FIRST_ATOM]
    return ", ".join([f"from {source} to {to}", *rest])


def _interface(space: Space, name: str) -> int:
    return 1 << space.interfaces.index(name) if name in space.interfaces else 0


def _addresses(space: Space, number: int, masks: object) -> str:
    assert isinstance(masks, dict)
    if number not in masks:
        return ""
    ranges = space.ranges(number, masks[number])
    if ranges == subtract(((0, LAST[space.version]),), (LOOPBACK[space.version],)):
        return f"any IPv{space.version} address"
    shown = ", ".join(range_text(space.version, r) for r in ranges[:MAX_RANGES])
    return shown + (f" and {len(ranges) - MAX_RANGES} more" if len(ranges) > MAX_RANGES else "")


def _target(space: Space, masks: object) -> str:
    assert isinstance(masks, dict)
    protocols = space.ranges(PROTOCOL, masks[PROTOCOL]) if PROTOCOL in masks else ()
    names = {number: name for name, number in PROTOCOLS.items()}
    protocol = ", ".join(names.get(low, str(low)) if low == high else f"protocols {low}-{high}" for low, high in protocols[:MAX_RANGES])
    parts = [protocol + (" …" if len(protocols) > MAX_RANGES else "") or "any protocol"]
    if PORT in masks:
        parts.append(_numbers(space.ranges(PORT, masks[PORT])))
    if TYPE in masks:
        parts.append(f"type {_numbers(space.ranges(TYPE, masks[TYPE]))}")
    return "/".join(parts)


def _numbers(ranges: Ranges) -> str:
    return ", ".join(port_text(r) for r in ranges[:MAX_RANGES]) + (" …" if len(ranges) > MAX_RANGES else "")


def example(space: Space, box: Box) -> Packet:
    """One packet of a box, as ordinary as the box allows."""
    masks = box.masks

    def number(field: int, usual: int) -> int:
        if field not in masks:
            return usual
        ranges = space.ranges(field, masks[field])
        return usual if any(low <= usual <= high for low, high in ranges) else ranges[0][0]

    interfaces = space.names(INTERFACE, masks.get(INTERFACE, space.everything(INTERFACE)))
    interface = "eth0" if OTHER_INTERFACE in interfaces else interfaces[0]
    states: tuple[State, ...] = tuple(s for s in STATES if s in space.names(STATE, masks.get(STATE, space.everything(STATE))))
    usual_host = 0xC0000201 if space.version == 4 else (0x2001_0DB8 << 96) + 1
    usual_source = 0x08080808 if space.version == 4 else 0x2001_4860 << 96
    return Packet(
        space.version,
        number(SOURCE, usual_source),
        number(PROTOCOL, 17),
        number(PORT, 5060),
        number(DESTINATION, usual_host) if DESTINATION in masks else None,
        number(SOURCE_PORT, 40000),
        number(TYPE, 0),
        interface,
        states[0],
    )


def packet_text(packet: Packet) -> str:
    """`198.51.100.17 -> udp/5060, new, in eth0`."""
    port = f"/{packet.port}" if packet.protocol in (6, 17) else f"/{packet.icmp_type}" if packet.protocol in (1, 58) else ""
    return f"{address_text(packet.version, packet.source)} -> {packet.protocol_name}{port}, {packet.state}, in {packet.interface}"


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
        case Unknown(text) | Opaque(text):
            return f"{no}{text}"
        case Foreign():
            return no + _foreign_text(match)
