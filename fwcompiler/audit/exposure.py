"""Who reaches what: the matrix of groups and services, sockets without a service, services without a socket, one-family services."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fwcompiler.addresses import LOOPBACK, Addresses, address_text
from fwcompiler.audit.endpoints import covering
from fwcompiler.audit.facts import Facts
from fwcompiler.audit.findings import Issue
from fwcompiler.ports import port_text
from fwcompiler.resolved import Resolved
from fwcompiler.service import ResolvedService

if TYPE_CHECKING:
    from fwcompiler.kernel.sockets import Listener

Reach = Literal["all", "some", "none"]
ON_DEMAND = ("rtp", "udptl", "dhcpv6-client")
"""Services whose sockets are there only while a call lasts, or while an address is asked for."""
DHCP_CLIENTS = (68, 546)
"""A DHCP client opens these, and reads its answers before any firewall (or by its own rule)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the matrix: a group, or everybody else, and how much of it reaches each service."""

    who: str
    size: str
    cells: tuple[Reach, ...]
    dynamic: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A service of this host, or one that it forwards to another (`on`)."""

    service: ResolvedService
    on: str = ""

    @property
    def label(self) -> str:
        """`sip`, or `sip → dialer1`."""
        return f"{self.service.name} → {self.on}" if self.on else self.service.name

    @property
    def public(self) -> bool:
        """Open to anywhere."""
        return self.service.groups is None


@dataclass(frozen=True, slots=True)
class Matrix:
    """Who × service, from the policy alone."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def matrix(policy: Resolved) -> Matrix:
    """The internet first, then every group that is named somewhere; exact for the fixed addresses of each."""
    columns = (*map(Column, policy.services), *(Column(f.service, f.host.name) for f in (policy.edge.forwards if policy.edge else ())))
    services = tuple(column.service for column in columns)
    trusted = policy.addresses(policy.trust)
    reaching = tuple(policy.addresses(s.groups) | trusted if s.groups is not None else None for s in services)
    blocked = policy.addresses(policy.block.groups) - policy.addresses(policy.block.excepted) if policy.block else Addresses()
    anywhere = Row("anywhere", "every address", tuple("all" if s.groups is None else "none" for s in services))
    rows = [anywhere]
    for group in policy.groups.values():
        cells = tuple(_reach(policy, s, group.name, group.addresses - blocked, known) for s, known in zip(services, reaching, strict=True))
        rows.append(Row(group.name, _size(group.addresses, dynamic=group.dynamic), cells, group.dynamic))
    return Matrix(columns, tuple(rows))


def _reach(policy: Resolved, service: ResolvedService, name: str, unblocked: Addresses, known: Addresses | None) -> Reach:
    """How much of a group reaches a service, whose sources are `known` (None: everybody); `unblocked`: who of it no block drops.

    A group without fixed addresses is judged by its name.
    """
    members = policy.groups[name].addresses
    if not members:
        named = known is None or name in policy.trust or name in (service.groups or ())
        return "all" if named and not (policy.block and name in policy.block.groups) else "none"
    reaching = unblocked if known is None else unblocked & known
    return "all" if reaching == members else "some" if reaching else "none"


def _size(addresses: Addresses, *, dynamic: bool) -> str:
    parts = []
    for version in (4, 6):
        ranges = addresses.family(version)
        if ranges:
            count = sum(high - low + 1 for low, high in ranges)
            parts.append(f"{count:,} IPv4" if version == 4 else f"{len(ranges):,} IPv6 {'network' if len(ranges) == 1 else 'networks'}")
    return ", ".join([*parts, *(["changing members"] if dynamic else [])]) or "no address"


def exposure(policy: Resolved, facts: Facts) -> Iterator[Issue]:
    """Sockets, services and families that do not match."""
    if facts.listeners is not None:
        yield from _uncovered(policy, facts, facts.listeners)
        yield from _unheard(policy, facts.listeners)
    if facts.addresses is not None:
        yield from _parity(policy, facts)


def beyond(listener: Listener) -> bool:
    """True where others than the host itself reach a socket."""
    low, high = LOOPBACK[listener.version]
    return not low <= listener.address <= high


def _uncovered(policy: Resolved, facts: Facts, listeners: tuple[Listener, ...]) -> Iterator[Issue]:
    shown: set[tuple[str, int]] = set()
    low, high = facts.local_ports or (0, 0)
    for each in listeners:
        key = (each.protocol, each.port)
        if not beyond(each) or key in shown or covering(policy, *key):
            continue
        if each.protocol == "udp" and (each.port in DHCP_CLIENTS or low <= each.port <= high):
            continue  # a client's own socket, such as a resolver's
        shown.add(key)
        who = f"`{each.processes[0].name}`" if each.processes else "somebody"
        address = "every address" if not each.address else address_text(each.version, each.address)
        message = f"{who} listens on {each.protocol}/{each.port} at {address}, which no service covers; only the firewall keeps others out"
        remedy = f"let it listen on 127.0.0.1, stop it, or write a service for {each.protocol}/{each.port}"
        yield Issue("listener", "warning", message, place=f"{each.protocol}/{each.port}", remedy=remedy)


def _unheard(policy: Resolved, listeners: tuple[Listener, ...]) -> Iterator[Issue]:
    taken = {(each.protocol, each.port): each for each in listeners}
    for service in policy.services:
        ports = service.heard_ports()
        if service.name in ON_DEMAND or not any(p.ranges for p in ports):
            continue
        heard = [each for p in ports for (protocol, port), each in taken.items() if p.protocol == protocol and _inside(port, p.ranges)]
        texts = ", ".join(text for p in ports for text in p.texts())
        if not heard:
            message = f"`{service.name}` opens {texts}, and nothing listens there: whatever starts there is open at once"
            yield Issue("unheard", "warning", message, service.at, remedy="take the service out, or start what it is for")
        elif not any(beyond(each) for each in heard):
            found = ", ".join(sorted({f"{each.protocol}/{port_text((each.port, each.port))}" for each in heard}))
            message = f"`{service.name}` opens {texts}, and what listens ({found}) is reached from the host itself only"
            yield Issue("unheard", "warning", message, service.at, remedy="take the service out, or let it listen on an outer address")


def _inside(port: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= port <= high for low, high in ranges)


def _parity(policy: Resolved, facts: Facts) -> Iterator[Issue]:
    """With addresses of both families, a service whose groups have those of one only is lost to the other half of its users."""
    for service in policy.services:
        if service.groups is None or any(policy.groups[g].dynamic for g in service.groups):
            continue
        known = policy.addresses(service.groups)
        for version, other in ((6, 4), (4, 6)):
            if facts.own(version) and known.family(other) and not known.family(version):
                names = ", ".join(service.groups)
                message = f"`{service.name}` is reachable over IPv{other} only: {names} has no IPv{version} address, and this host has one"
                remedy = f"add their IPv{version} addresses, or let no name of this host lead to its IPv{version} address"
                yield Issue("ipv6-parity", "note", message, service.at, remedy=remedy)
