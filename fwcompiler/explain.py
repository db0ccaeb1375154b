"""Reads the packet that `fwc explain` is asked about, and asks the loaded ruleset about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

from fwcompiler.addresses import AddressError, parse_address
from fwcompiler.diagnostics import UsageError, did_you_mean
from fwcompiler.pipeline import Host, observe
from fwcompiler.ports import PortError, parse_ports
from fwcompiler.proof.describe import rule_text
from fwcompiler.proof.fields import Packet, packet_to
from fwcompiler.proof.meaning import Explanation
from fwcompiler.proof.trace import Decision, trace
from fwcompiler.report import explain_json
from fwcompiler.ruleset import BUILT_IN, State

if TYPE_CHECKING:
    from fwcompiler.shapes import LiveExplainShape


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


@dataclass(frozen=True, slots=True)
class Traced:
    """What the loaded ruleset does with a packet, beside what the policy says."""

    decision: Decision
    policy: Explanation

    @property
    def agrees(self) -> bool:
        """True when both come to the same verdict."""
        return self.decision.verdict == self.policy.verdict

    def reason(self) -> str:
        """The rule that decides."""
        where = f"chain {self.decision.chain}" if self.decision.chain else "no chain of ours"
        what = f"{where}: {rule_text(self.decision.rule)}" if self.decision.rule else f"the end of {where}"
        return f"{what}; not understood on the way: {self.decision.unsure}" if self.decision.unsure else what

    def as_json(self) -> LiveExplainShape:
        """The shape of `explain --live --json`."""
        service = self.decision.service
        return {
            "verdict": "accept" if self.decision.verdict == "accept" else "reject" if self.decision.verdict == "reject" else "drop",
            "service": None if service in BUILT_IN else service or None,
            "reason": self.reason(),
            "at": str(self.policy.at) if self.policy.at and self.agrees else None,
            "agrees": self.agrees,
            "policy": explain_json(self.policy),
        }

    def text(self) -> str:
        """One line, and another one where the two part."""
        line = f"live: {self.decision.verdict}: {self.reason()}"
        if self.agrees:
            return line
        return f"{line}\nhere they part: the policy says {self.policy.verdict}, the loaded rules say {self.decision.verdict}"


def explain_live(host: Host, packet: Packet, explanation: Explanation) -> Traced:
    """Send a packet through the listing that the kernel holds now.

    Raises:
        HostRefused: the kernel cannot be asked.
    """
    return Traced(trace(observe(host), packet), explanation)
