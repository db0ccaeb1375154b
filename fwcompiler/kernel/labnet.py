"""A throw-away network for the lab: a host, and at each of its interfaces one station. Nothing leads outside.

All namespaces are anonymous. They live as long as this process holds them open, so that nothing is left behind,
however the process ends, and no name can clash with another run. No process is started either: a socket stays in
the namespace it was created in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from fwcompiler.addresses import BITS, address_text
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel.netns import Namespace, scratch

_NODAD = 2  # IFA_F_NODAD: usable at once, not after a second of duplicate detection (RFC 4862)
_PERMANENT = 0x80  # NUD_PERMANENT: a neighbour that is never asked for

_SYSCTLS = {
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/default/rp_filter": "0",
    "ipv6/conf/all/disable_ipv6": "0",
    "ipv6/conf/default/disable_ipv6": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/addr_gen_mode": "1",  # no link-local addresses
    "ipv6/conf/default/router_solicitations": "0",
}


@dataclass(frozen=True, slots=True)
class Station:
    """One address of each family at most, alone on its wire.

    ``unasked``: families in which the station knows the host's link address without asking. A router in between
    does as much for a source whose neighbour solicitations the host drops.
    """

    addresses: Mapping[int, int]
    unasked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Network:
    """The host under test and the stations around it; station `n` is at the host's interface `eth<n>`."""

    host: Namespace
    addresses: Mapping[int, int]
    stations: tuple[Station, ...]
    namespaces: tuple[Namespace, ...]


@contextmanager
def network(host: Mapping[int, int], stations: Sequence[Station]) -> Iterator[Network]:
    """A network for the length of a block; afterwards it is gone.

    Raises:
        HostRefused: this user may make no namespaces, or the kernel refuses a link, an address or a route.
    """
    from pyroute2 import NetlinkError

    with ExitStack() as held:
        built = Network(held.enter_context(scratch()), dict(host), tuple(stations), tuple(held.enter_context(scratch()) for _ in stations))
        try:
            _lay_out(built)
        except NetlinkError as error:
            raise HostRefused(f"cannot build the lab's network: {os.strerror(error.code)}") from error
        yield built


def link_address(number: int) -> str:
    """The host's Ethernet address at one of its interfaces; locally administered."""
    return f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"


def _lay_out(built: Network) -> None:
    from pyroute2 import IPRoute

    with built.host.entered():
        _set_sysctls()
        with IPRoute() as link:
            link.link("set", index=1, state="up")
            for number, (station, namespace) in enumerate(zip(built.stations, built.namespaces, strict=True)):
                _wire(link, number, namespace)
                own = {v: a for v, a in built.addresses.items() if v in station.addresses}
                _address(link, f"eth{number}", own, station.addresses)
    for number, (station, namespace) in enumerate(zip(built.stations, built.namespaces, strict=True)):
        peer = {v: built.addresses[v] for v in station.addresses}
        with namespace.entered():
            _set_sysctls()
            with IPRoute() as link:
                _address(link, "eth0", station.addresses, peer)
                _introduce(link, number, {v: peer[v] for v in station.unasked})


def _wire(link: Any, number: int, namespace: Namespace) -> None:
    """A veth pair, the other end in the station's namespace from the start: its name never shows up in the host."""
    with namespace.entered():
        descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        other = {"ifname": "eth0", "net_ns_fd": descriptor}
        link.link("add", ifname=f"eth{number}", kind="veth", address=link_address(number), peer=other)
    finally:
        os.close(descriptor)


def _address(link: Any, interface: str, own: Mapping[int, int], peer: Mapping[int, int]) -> None:
    """Bring an interface up with its own addresses and routes to single peers."""
    index = link.link_lookup(ifname=interface)[0]
    link.link("set", index=index, state="up")
    for version, address in own.items():
        flags = {"flags": _NODAD} if version == 6 else {}
        link.addr("add", index=index, address=address_text(version, address), prefixlen=BITS[version], **flags)
    for version, address in peer.items():
        link.route("add", dst=f"{address_text(version, address)}/{BITS[version]}", oif=index)


def _introduce(link: Any, number: int, peer: Mapping[int, int]) -> None:
    index = link.link_lookup(ifname="eth0")[0]
    for version, address in peer.items():
        link.neigh("add", dst=address_text(version, address), lladdr=link_address(number), ifindex=index, state=_PERMANENT)


def _set_sysctls() -> None:
    """Quiet and permissive; a container's read-only /proc/sys has to do with the defaults."""
    for name, value in _SYSCTLS.items():
        try:
            with open(f"/proc/sys/net/{name}", "w", encoding="ascii") as stream:  # noqa: PTH123 - procfs wants one write
                stream.write(value)
        except OSError:
            continue
