"""The port plan as data: who has which ports, to scale, host by host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fwcompiler.addresses import Range
from fwcompiler.asterisk import rtp_ports
from fwcompiler.audit.facts import Facts
from fwcompiler.ports import port_text
from fwcompiler.resolved import Resolved

Kind = Literal["public", "restricted", "asterisk", "local"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A range of ports with its name."""

    label: str
    span: Range
    kind: Kind
    detail: str = ""

    def text(self) -> str:
        """For a tool tip: `rtp udp/10000-20000`."""
        return f"{self.label} {self.detail or port_text(self.span)}".strip()


@dataclass(frozen=True, slots=True)
class Lane:
    """One line of the plan."""

    title: str
    bars: tuple[Bar, ...]


def port_plan(policy: Resolved, facts: Facts) -> tuple[Lane, ...]:
    """The chunks of an edge's dialers; what is open to anywhere and to groups; rtp.conf; the host's own outgoing ports."""
    lanes = [*_chunks(policy), Lane("open to anywhere", _bars(policy, public=True)), Lane("open to groups", _bars(policy, public=False))]
    if (configuration := facts.asterisk.get("rtp.conf")) is not None:
        taken = rtp_ports(configuration)
        lanes.append(Lane("Asterisk’s rtp.conf", (Bar("audio", (taken.first, taken.last), "asterisk", f"udp/{taken.first}-{taken.last}"),)))
    if facts.local_ports:
        lanes.append(Lane("outgoing connections", (Bar("local ports", facts.local_ports, "local"),)))
    return tuple(lane for lane in lanes if lane.bars)


def _bars(policy: Resolved, *, public: bool) -> tuple[Bar, ...]:
    return tuple(
        Bar(service.name, span, "public" if public else "restricted", f"{ports.protocol}/{port_text(span)}")
        for service in policy.services
        if (service.groups is None) == public
        for ports in service.ports
        for span in ports.ranges
    )


def _chunks(policy: Resolved) -> Iterator[Lane]:
    """Where every dialer's media ports lie; those of the host that the policy is compiled for stand out."""
    for chunk in policy.plan.chunks if policy.plan else ():
        here = policy.host is not None and policy.host.name == chunk.host.name
        yield Lane(chunk.host.name, (Bar("media", chunk.span, "public" if here else "local", f"udp/{port_text(chunk.span)}"),))
