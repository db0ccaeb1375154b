"""Reads the packet that `fwc explain` is asked about, and asks the loaded ruleset about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast, get_args

from fwcompiler.addresses import AddressError, Addresses, address_text, parse_address
from fwcompiler.diagnostics import UsageError, did_you_mean
from fwcompiler.edge import ResolvedEdge
from fwcompiler.listing import HOW, read_listing
from fwcompiler.neighbours import ON_THE_WAY, WholeHost, read_host
from fwcompiler.pipeline import Host, observe
from fwcompiler.ports import PortError, parse_ports
from fwcompiler.proof.ask import Answer, Candidate, Word, ask
from fwcompiler.proof.describe import packet_text, rule_text
from fwcompiler.proof.edge import Passed, explain_packet, follow
from fwcompiler.proof.fields import Packet, packet_to
from fwcompiler.proof.leaving import HOOK
from fwcompiler.proof.meaning import Explanation
from fwcompiler.proof.memberaccess import SUFFIX
from fwcompiler.proof.trace import Decision, trace, trace_through
from fwcompiler.report import explain_json
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import BUILT_IN, Ruleset, State

if TYPE_CHECKING:
    from fwcompiler.shapes import ListingExplainShape, LiveExplainShape


def packet_from(source: str, to: str, to_addr: str | None, interface: str, state: str) -> Packet:
    """A packet from the words of the command line.

    Raises:
        UsageError: a word is no address, no port or no state, or the addresses are of different families.
    """
    try:
        version, value = parse_address(source)
        destination = parse_address(to_addr) if to_addr is not None else None
        ports = parse_ports(to)
    except (AddressError, PortError) as error:
        raise UsageError(error.message, hint=error.hint) from error
    if ports.ranges and ports.ranges[0][0] != ports.ranges[0][1]:
        raise UsageError(f"`{to}` is a range: a packet goes to one port", hint=f"ask about {ports.protocol}/{ports.ranges[0][0]}")
    if state not in get_args(State):
        raise UsageError(f"there is no state `{state}`", hint=did_you_mean(state, get_args(State)) or ", ".join(get_args(State)))
    if destination is not None and destination[0] != version:
        raise UsageError(f"`{source}` and `{to_addr}` are of different families")
    return packet_to(
        version, value, ports, destination=destination[1] if destination else None, interface=interface, state=cast(State, state)
    )


def packet_sent(to: str, to_addr: str, own: str | None, interface: str, state: str, from_port: int | None) -> Packet:
    """A packet that this host sends, from the words of the command line. ``own``: one of its addresses, None: any.

    Raises:
        UsageError: as for `packet_from`.
    """
    unknown = "::" if ":" in to_addr else "0.0.0.0"
    packet = packet_from(own or unknown, to, to_addr, interface, state)
    return replace(packet, leaving=True, source_port=packet.source_port if from_port is None else from_port)


@dataclass(frozen=True, slots=True)
class Traced:
    """What the host does with a packet, beside what the policy says.

    `decision` is that of our rules, `answer` that of everybody's together (None: there are no others), `host` who they are.
    """

    decision: Decision
    policy: Explanation
    host: WholeHost
    answer: Answer | None = None
    to: int | None = None

    @property
    def verdict(self) -> Word:
        """What becomes of the packet on this host."""
        return self.answer.verdict if self.answer else cast("Word", self.decision.verdict)

    @property
    def agrees(self) -> bool:
        """True when the host does what the policy says, and at an edge sends the packet to the same host."""
        return self.to == self.decision.to and self._same_verdict

    @property
    def _same_verdict(self) -> bool:
        return self.verdict == self.policy.verdict or (self.verdict == "reject" and self.policy.verdict == "drop")

    @property
    def stranger(self) -> Candidate | None:
        """The rule of somebody else's that decides, or may; None where ours do."""
        if self.answer is None or self.answer.verdict == "accept" == self.decision.verdict:
            return None
        verdicts = {"accept": ("accept",), "drop": ("drop",), "reject": ("reject",), "redirect": ("rewrite",)}
        unsure = self.answer.verdict == "may"
        ends = verdicts.get(self.answer.verdict, ("drop", "reject", "rewrite"))
        perhaps = [c for c in self.answer.candidates if unsure and c.verdict == "accept" and not c.certain]
        found = [c for c in self.answer.candidates if c in perhaps or (c.verdict in ends and (c.certain or unsure))]
        theirs = [c for c in found if not self.host.is_ours(c)]
        return None if not theirs or (self.answer.verdict != "may" and self.host.is_ours(found[0])) else theirs[0]

    def reason(self) -> str:
        """The rule that decides."""
        if self.stranger is not None:
            depends = f"; depends on {'; '.join(self.answer.depends)}" if self.answer and self.answer.depends else ""
            return f"{self.host.text(self.stranger)}{depends}"
        where = f"chain {self.decision.chain}" if self.decision.chain else "no chain of ours"
        what = f"{where}: {rule_text(self.decision.rule)}" if self.decision.rule else f"the end of {where}"
        what += f"; sent on to {address_text(4, self.decision.to)}" if self.decision.to is not None else ""
        return f"{what}; not understood on the way: {self.decision.unsure}" if self.decision.unsure else what

    def as_json(self) -> LiveExplainShape:
        """The shape of `explain --live --json`."""
        service = self.decision.service if self.stranger is None else ""
        return {
            "verdict": self.verdict,
            "service": None if service in BUILT_IN else service or None,
            "reason": self.reason(),
            "at": str(self.policy.at) if self.policy.at and self.agrees and self.stranger is None else None,
            "agrees": self.agrees,
            "by": "fwc" if self.stranger is None else "others",
            "policy": explain_json(self.policy),
            "not_looked_at": list(self.host.unread),
        }

    def text(self) -> str:
        """One line, another one where the two part, and what was not looked at."""
        by = " (a rule that is not fwc's)" if self.stranger else ""
        lines = [f"live: {self.verdict}: {self.reason()}{by}"]
        if not self.agrees:
            whose = "the host says" if self.stranger else "the loaded rules say"
            says = [self._with_target(v, to) for v, to in ((self.policy.verdict, self.to), (self.verdict, self.decision.to))]
            lines.append(f"here they part: the policy says {says[0]}, {whose} {says[1]}")
        return "\n".join((*lines, *(f"not looked at: {what}" for what in self.host.unread)))

    def _with_target(self, verdict: str, to: int | None) -> str:
        """`accept at 10.20.0.11` where the two differ in that."""
        if self.to == self.decision.to:
            return verdict
        return f"{verdict} at {address_text(4, to)}" if to is not None else f"{verdict}, and it is not sent on"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the rules in a saved listing do with a packet: yes, no, or may."""

    packet: Packet
    answer: Answer

    def reason(self) -> str:
        """The rule that decides, or what the answer depends on."""
        if self.answer.verdict == "may":
            return f"depends on {'; '.join(self.answer.depends)}" if self.answer.depends else "several ends are possible"
        return "; ".join(_candidate(c) for c in self.answer.candidates) or "nothing stands in its way"

    def at(self) -> str | None:
        """Where the deciding rule stands in the listing; None where there are several, or a policy decides."""
        found = [c.rule.origin for c in self.answer.candidates if c.rule and c.rule.origin]
        return str(found[0]) if len(found) == 1 else None

    def as_json(self) -> ListingExplainShape:
        """The shape of `explain --listing --json`."""
        return {
            "verdict": self.answer.verdict if self.answer.verdict != "redirect" else "accept",
            "service": None,
            "reason": self.reason(),
            "at": self.at(),
            "possible": sorted(self.answer.possible),
            "depends": list(self.answer.depends),
        }

    def text(self) -> str:
        """The answer, and the rules that decide or may decide."""
        lines = [packet_text(self.packet), f"{self.answer.verdict}: {self.reason()}"]
        if self.answer.verdict == "may":
            lines += [f"  {'' if c.certain else 'perhaps '}{_candidate(c)}" for c in self.answer.candidates]
        return "\n".join(lines)


def _candidate(candidate: Candidate) -> str:
    where = f" ({candidate.rule.origin})" if candidate.rule and candidate.rule.origin else ""
    what = rule_text(candidate.rule) if candidate.rule else f"the policy: {candidate.verdict}"
    return f"chain {candidate.chain}: {what}{where}"


def explain_listing(files: Sequence[str], packet: Packet) -> Asked:
    """Ask the saved listing of one host, in one file or several, whoever wrote its rules.

    Raises:
        UsageError: a file cannot be read, is no listing, or all of them are of the other address family.
    """
    listing = read_listing(files)
    if listing is None:
        raise UsageError(f"`{files[0]}` is no listing that can be read", hint=HOW)
    ruleset = listing.foreign()
    if packet.version not in listing.versions(ruleset):
        raise UsageError(f"{listing.files} says nothing about IPv{packet.version}", hint=HOW)
    return Asked(packet, ask(ruleset, packet, HOOK if packet.leaving else "input"))


def explain_live(host: Host, policy: Resolved, packet: Packet) -> Traced:
    """Send a packet through everything that the kernel holds now: our rules, and everybody else's on its way.

    The policy is asked with the dynamic members that this host has.

    Raises:
        HostRefused: the kernel cannot be asked.
    """
    live = observe(host)
    whole = read_host(host, live)
    policy, groups = _with_members(policy, live, packet)
    explanation = explain_packet(policy, packet)
    if groups:
        member = f"{address_text(packet.version, _peer(packet))} is a dynamic member of {', '.join(groups)} on this host"
        explanation = replace(explanation, steps=(explanation.steps[0], member, *explanation.steps[1:]))
    passed = follow(policy, policy.edge, packet) if policy.edge and not packet.leaving else None
    if policy.edge and not packet.leaving and packet.interface in (policy.edge.wan, policy.edge.lan):
        through = _trace_at_edge(live, packet, policy.edge, passed)
        if passed and (passed.leaves or through.to is not None):
            others = () if whole.alone_on_the_way else (ON_THE_WAY,)
            target = passed.packet.destination if passed.sent else None
            return Traced(
                through, explanation, replace(whole, unread=(*whole.unread, *others)), to=target if packet.state == "new" else None
            )
    if packet.leaving:
        return Traced(trace(live, packet, HOOK), explanation, whole, None if whole.alone else whole.ask(packet))
    return Traced(trace(live, packet), explanation, whole, None if whole.alone else whole.ask(packet))


def _with_members(policy: Resolved, live: Ruleset, packet: Packet) -> tuple[Resolved, tuple[str, ...]]:
    """The policy with the peer in those groups whose member it is at present, and their names."""
    peer = _peer(packet)
    sets = (s for s in live.sets if s.dynamic and s.version == packet.version and any(a == peer for a, _ in s.members))
    names = tuple(name for name in (s.name.partition(SUFFIX)[0] for s in sets) if name in policy.groups)
    own = Addresses.of(*([(peer, peer)] if packet.version == version else [] for version in (4, 6)))
    members = {name: replace(policy.groups[name], addresses=policy.groups[name].addresses | own) for name in names}
    return replace(policy, groups={**policy.groups, **members}), names


def _peer(packet: Packet) -> int:
    """Who it is that groups are asked about: the sender, or the addressee of what this host sends."""
    return packet.source if not packet.leaving or packet.destination is None else packet.destination


def _trace_at_edge(live: Ruleset, packet: Packet, edge: ResolvedEdge, passed: Passed | None) -> Decision:
    """The way that the loaded rules have for a packet. One to the edge itself has its first own address as destination."""
    own = edge.addresses.family(packet.version)
    arriving = replace(packet, destination=own[0][0] if own else None) if packet.destination is None else packet
    if passed and packet.state != "new":
        arriving = passed.packet
    return trace_through(live, arriving, (passed.leaves if passed else "") or edge.lan)
