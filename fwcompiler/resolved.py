"""A policy for one host with its names resolved: what every later stage reads. It refers to the policy by position only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fwcompiler.addresses import NOBODY, Addresses
from fwcompiler.diagnostics import Position
from fwcompiler.edge import EdgePlan, ResolvedEdge
from fwcompiler.egress import ResolvedEgress
from fwcompiler.fleet import ResolvedHost
from fwcompiler.lists import AddressList
from fwcompiler.ports import Ports
from fwcompiler.service import ResolvedService


@dataclass(frozen=True, slots=True)
class ResolvedGroup:
    """A group's fixed addresses, where each came from, and its room for dynamic members."""

    name: str
    addresses: Addresses
    at: Position
    lists: tuple[AddressList, ...] = ()
    inline: tuple[tuple[int, int, int, Position], ...] = ()
    timeout: int | None = None
    size: int | None = None
    generated: bool = False

    @property
    def dynamic(self) -> bool:
        """True where members may come and go at run time."""
        return self.timeout is not None

    def where(self, version: int, address: int) -> Position | None:
        """The line that brought an address into the group, in the policy or in a list file."""
        for v, low, high, at in self.inline:
            if v == version and low <= address <= high:
                return at
        for each in self.lists:
            line = each.line_of(version, address)
            if line is not None:
                return Position(each.file, line)
        return None


@dataclass(frozen=True, slots=True)
class ResolvedBlock:
    """Groups to drop first, less the groups that are never blocked."""

    groups: tuple[str, ...]
    excepted: tuple[str, ...]
    at: Position


@dataclass(frozen=True, slots=True)
class ResolvedTest:
    """An expectation with its addresses and ports; ``source`` as the policy spells it.

    ``leaving``: about what this host sends, from the port ``from_port`` (0: one of no service); the addresses are where to then.
    """

    source: str
    addresses: Addresses
    ports: Ports
    expect: Literal["accept", "drop", "reject"]
    state: str
    at: Position
    leaving: bool = False
    from_port: int = 0

    def words(self) -> str:
        """`from carriers to udp/5060`, or what it says of outgoing packets."""
        if not self.leaving:
            return f"from {self.source} to {self.ports}"
        return f"from this host{f' port {self.from_port}' if self.from_port else ''} to {self.source} at {self.ports}"


@dataclass(frozen=True, slots=True)
class Resolved:
    """A whole policy for one host, names resolved.

    `services` are those of this host; what an edge forwards is in `edge`. `named`: the groups that services of any host name.
    Without `egress` it may send everything.
    """

    name: str
    groups: Mapping[str, ResolvedGroup]
    services: tuple[ResolvedService, ...]
    trust: tuple[str, ...] = ()
    trust_at: Position | None = None
    block: ResolvedBlock | None = None
    tests: tuple[ResolvedTest, ...] = ()
    host: ResolvedHost | None = None
    edge: ResolvedEdge | None = None
    plan: EdgePlan | None = None
    named: tuple[str, ...] = ()
    egress: ResolvedEgress | None = None

    def lists(self) -> Iterator[tuple[str, AddressList]]:
        """Every list file with a key that names it over time: its group and its path."""
        for group in self.groups.values():
            for each in group.lists:
                yield f"{group.name}:{os.path.realpath(each.file)}", each

    def addresses(self, groups: Iterable[str]) -> Addresses:
        """The fixed addresses of several groups together."""
        total = NOBODY
        for name in groups:
            total = total | self.groups[name].addresses
        return total
