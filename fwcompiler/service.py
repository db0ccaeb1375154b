"""A service with its ports and the groups that may use it: what the rules, the meaning and an edge are made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fwcompiler.addresses import Range
from fwcompiler.catalogue import Class
from fwcompiler.diagnostics import Position
from fwcompiler.options import NO_OPTIONS, Options
from fwcompiler.ports import Ports


@dataclass(frozen=True, slots=True)
class ResolvedService:
    """A service with its ports; ``groups`` is None where it is open to anywhere."""

    name: str
    ports: tuple[Ports, ...]
    kind: Class
    groups: tuple[str, ...] | None
    at: Position
    early: bool = False
    expose: str = ""
    options: Options = NO_OPTIONS

    def port_texts(self) -> tuple[str, ...]:
        """`udp/5060` and so on, one a range."""
        return tuple(text for p in self.ports for text in p.texts())

    def heard_ports(self) -> tuple[Ports, ...]:
        """Where something listens for it: the responder's port, and with that its own only where groups stay in the clear."""
        if self.options.responder is None:
            return self.ports
        responder = Ports("tcp", ((self.options.responder, self.options.responder),))
        return (responder, *self.ports) if self.options.plain else (responder,)


def udp_spans(service: ResolvedService) -> Iterator[Range]:
    """The UDP ports of a service."""
    for ports in service.ports:
        if ports.protocol == "udp":
            yield from ports.ranges
