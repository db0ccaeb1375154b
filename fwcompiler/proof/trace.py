"""Sends one packet through a ruleset, rule by rule, and says which rule decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fwcompiler.addresses import covers
from fwcompiler.foreign import LOCAL
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.compose import base_chains, limit_text, over_text
from fwcompiler.proof.fields import Packet
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
    Foreign,
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
    Ruleset,
    SetDscp,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Unknown,
    Untrack,
    redirected,
)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a ruleset does with a packet. `rule` is None where a base chain's policy decides, or nothing of ours.

    `unsure` names the first match on the way that nobody models; the verdict holds if that match does not. `to`: the address
    that an edge sent it on to.
    """

    verdict: str
    chain: str = ""
    rule: Rule | None = None
    unsure: str = ""
    to: int | None = None

    @property
    def service(self) -> str:
        """The service under which the deciding rule counts, or the empty string."""
        return self.rule.service if self.rule else ""


def trace(ruleset: Ruleset, packet: Packet, hook: str = "input", given: Mapping[str, bool] | None = None) -> Decision:
    """Run all base chains of a hook in order; a drop in one is final, an accept goes on to the next.

    Limits count as not exhausted, destinations as this host's, members of dynamic sets are those that were read, unless
    ``given`` says otherwise, by the names that the prover has for these (`Space.atoms`).
    """
    runner = _Trace(ruleset, packet, given or {}, packet.interface if packet.leaving else "")
    last = Decision("accept")
    for chain, where in base_chains(ruleset, hook):
        decided = runner.chain(chain, 0) or Decision(where.policy, chain.name)
        last = Decision(decided.verdict, decided.chain, decided.rule, runner.unsure)
        if last.verdict != "accept":
            break
    return last


def trace_through(ruleset: Ruleset, packet: Packet, leaves: str) -> Decision:
    """Follow a packet at an edge: where NAT sends it on to, and what the forward hook does with it there.

    `leaves`: the interface it goes out by. A new packet that NAT leaves alone is decided with the destination it has; one
    without a destination is for the edge itself. NAT does not see later packets.
    """
    if packet.state == "new":
        runner = _Trace(ruleset, packet, {}, nat=True)
        chains = [c for c, hook in base_chains(ruleset, "forward") if hook.name == "prerouting" and hook.kind == "nat"]
        sent = next((found for c in chains if (found := runner.chain(c, 0)) and found.to is not None), None)
        packet = replace(packet, destination=sent.to) if sent else packet
    else:
        sent = None
    runner = _Trace(ruleset, packet, {}, out=leaves)
    last = Decision("accept")
    for chain, where in base_chains(ruleset, "forward"):
        if where.kind == "nat":
            continue
        decided = runner.chain(chain, 0) or Decision(where.policy, chain.name)
        last = Decision(decided.verdict, decided.chain, decided.rule, runner.unsure)
        if last.verdict != "accept":
            break
    return replace(last, to=sent.to if sent else None)


class _Trace:
    def __init__(self, ruleset: Ruleset, packet: Packet, given: Mapping[str, bool], out: str = "", *, nat: bool = False) -> None:
        self._out, self._nat = out, nat
        self._rewritten = False
        self._chains: Mapping[str, Chain] = {c.name: c for c in ruleset.chains}
        self._sets: Mapping[str, AddressSet] = {s.name: s for s in ruleset.sets}
        self._packet = packet
        self._given = given
        self.unsure = ""

    def chain(self, chain: Chain, depth: int) -> Decision | None:
        """The decision in a chain, or None where the packet comes out at its end."""
        for rule in chain.rules:
            if not all(self._holds(m) for m in rule.matches):
                continue
            if self._nat and isinstance(rule.verdict, Translate) and rule.verdict.side == "destination" and rule.verdict.ranges:
                return Decision("accept", chain.name, rule, to=rule.verdict.ranges[0][0])
            if isinstance(rule.verdict, Translate) and rule.verdict.ports and rule.verdict == redirected(rule.verdict.ports[0]):
                self._packet, self._rewritten = replace(self._packet, port=rule.verdict.ports[0]), True
                return Decision("accept", chain.name, rule)
            unknown = next((_name(m) for m in rule.matches if isinstance(m, Unknown | Foreign)), "")
            if isinstance(rule.verdict, Translate | Undecided):
                unknown = unknown or str(rule.verdict)
            if unknown:
                self.unsure = self.unsure or unknown
                continue
            match rule.verdict:
                case Untrack():
                    self._packet = replace(self._packet, state="untracked")
                case None | SetDscp() | Translate() | Undecided():
                    continue
                case Final.RETURN:
                    return None
                case Final():
                    return Decision(rule.verdict.value, chain.name, rule)
                case Goto(name) | Jump(name):
                    called = self._chains.get(name)
                    inner = self.chain(called, depth + 1) if called and depth < 64 else None
                    if inner or isinstance(rule.verdict, Goto):
                        return inner
        return None

    def _holds(self, match: Match) -> bool:
        packet = self._packet
        match match:
            case InSet() | InRanges():
                return self._address(match)
            case Family(version):
                return packet.version == version
            case Interface("out", name, negated):
                return bool(self._out) and (self._out == name) != negated
            case Interface(_, name, negated):
                return (not packet.leaving and packet.interface == name) != negated
            case ProtocolIs(number, negated):
                return (packet.protocol == number) != negated
            case PortIn(side, protocol, (low, high), negated):
                port = packet.port if side == "destination" else packet.source_port
                return packet.protocol == PROTOCOLS[protocol] and (low <= port <= high) != negated
            case StateIn(states, negated):
                return (packet.state in states) != negated
            case TypeIn(version, types):
                number = PROTOCOLS["icmp" if version == 4 else "icmpv6"]
                return packet.version == version and packet.protocol == number and packet.icmp_type in types
            case Limit():
                return self._given.get(limit_text(match), True)
            case OverLimit():
                return self._given.get(over_text(match), False)
            case ForHost():
                return self._given.get(LOCAL, True)
            case Rewritten(_, negated):
                # Where no rule translates it, a packet is what it was sent as.
                return self._rewritten != negated
            case Unknown() | Foreign():
                return True

    def _address(self, match: InSet | InRanges) -> bool:
        if match.version != self._packet.version:
            return False
        value = self._packet.source if match.side == "source" else self._packet.destination
        inside = value is not None and self._contains(match, value)
        return inside != match.negated

    def _contains(self, match: InSet | InRanges, value: int) -> bool:
        if isinstance(match, InRanges):
            return covers(match.ranges, value)
        known = self._sets.get(match.set)
        if known is None or known.dynamic:
            given = self._given.get(f"{match.side} is a member of {match.set}")
            if given is not None:
                return given
        return known is not None and (covers(known.ranges, value) or any(value == address for address, _ in known.members))


def _name(match: Unknown | Foreign) -> str:
    return match.text if isinstance(match, Unknown) else str(match)
