"""A throw-away network for the lab: a host, and at each of its interfaces one station. Nothing leads outside.

All namespaces are anonymous. They live as long as this process holds them open, so that nothing is left behind,
however the process ends, and no name can clash with another run. No process is started either: a socket stays in
the namespace it was created in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fwcompiler.addresses import BITS, address_text
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel.netns import Namespace, scratch

_NODAD = 2  # IFA_F_NODAD: usable at once, not after a second of duplicate detection (RFC 4862)
_LINK = 253  # RT_SCOPE_LINK: what a gateway has to be reachable by (rtnetlink(7))
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

_FORWARDING = {
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
}

GATEWAYS = {4: 0xA9FE0001, 6: (0xFE80 << 112) + 1}
"""Link-local addresses by which stations know their router (RFC 3927, RFC 4291): 169.254.0.1 and fe80::1. No packet has one of them."""


@dataclass(frozen=True, slots=True)
class Station:
    """One address of each family at most, alone on its wire.

    ``unasked``: families in which the station knows the host's link address without asking. A router in between
    does as much for a source whose neighbour solicitations the host drops.
    """

    addresses: Mapping[int, int]
    unasked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Router:
    """A host that sends on: by interface name, its own addresses there (family and number) and the numbers of the stations."""

    addresses: Mapping[str, tuple[tuple[int, int], ...]]
    stations: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Network:
    """The host under test and the stations around it; station `n` is at the host's interface `eth<n>`, or where a router has it."""

    host: Namespace
    addresses: Mapping[int, int]
    stations: tuple[Station, ...]
    namespaces: tuple[Namespace, ...]
    router: Router | None = None


@contextmanager
def network(host: Mapping[int, int], stations: Sequence[Station], router: Router | None = None) -> Iterator[Network]:
    """A network for the length of a block; afterwards it is gone. With a ``router``, stations share wires and see one another through it.

    Raises:
        HostRefused: this user may make no namespaces, or the kernel refuses a link, an address, a route or to forward.
    """
    from pyroute2 import NetlinkError

    with ExitStack() as held:
        spaces = tuple(held.enter_context(scratch()) for _ in stations)
        built = Network(held.enter_context(scratch()), dict(host), tuple(stations), spaces, router)
        try:
            if router is None:
                _lay_out(built)
            else:
                _lay_out_around(built, router, {name: held.enter_context(scratch()) for name in router.stations})
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
                _wire(link, (f"eth{number}", link_address(number)), ("eth0", None), namespace)
                own = {v: a for v, a in built.addresses.items() if v in station.addresses}
                _address(link, f"eth{number}", own, station.addresses)
    for number, (station, namespace) in enumerate(zip(built.stations, built.namespaces, strict=True)):
        peer = {v: built.addresses[v] for v in station.addresses}
        with namespace.entered():
            _set_sysctls()
            with IPRoute() as link:
                _address(link, "eth0", station.addresses, peer)
                _introduce(link, number, {v: peer[v] for v in station.unasked})


def _wire(link: Any, own: tuple[str, str | None], other: tuple[str, str | None], namespace: Namespace) -> None:
    """A veth pair by names and Ethernet addresses, the other end in its namespace from the start: its name never shows up here."""
    with namespace.entered():
        descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        peer = {"ifname": other[0], "net_ns_fd": descriptor, **({"address": other[1]} if other[1] else {})}
        link.link("add", ifname=own[0], kind="veth", peer=peer, **({"address": own[1]} if own[1] else {}))
    finally:
        os.close(descriptor)


def _lay_out_around(built: Network, router: Router, switches: Mapping[str, Namespace]) -> None:
    """A switch for each of the router's interfaces. Everybody knows everybody's link address: rules may drop what asks for it."""
    from pyroute2 import IPRoute

    for wire, (name, switch) in enumerate(switches.items()):
        with switch.entered(), IPRoute() as link:
            link.link("add", ifname="br0", kind="bridge")
            bridge = link.link_lookup(ifname="br0")[0]
            link.link("set", index=bridge, state="up")
            ends = [("router", (name, link_address(wire)), built.host)]
            ends += [(f"p{n}", ("eth0", _station_link(n)), built.namespaces[n]) for n in router.stations[name]]
            for port, end, namespace in ends:
                _wire(link, (port, None), end, namespace)
                link.link("set", index=link.link_lookup(ifname=port)[0], master=bridge, state="up")
    with built.host.entered():
        _set_sysctls()
        _forward()
        with IPRoute() as link:
            link.link("set", index=1, state="up")
            for name, numbers in router.stations.items():
                _address(link, name, {}, {})
                _own(link, name, router.addresses[name])
                for number in numbers:
                    _reach(link, name, built.stations[number].addresses, _station_link(number))
    for wire, numbers in enumerate(router.stations.values()):
        for number in numbers:
            with built.namespaces[number].entered():
                _set_sysctls()
                with IPRoute() as link:
                    _address(link, "eth0", built.stations[number].addresses, {})
                    gateways = {v: a for v, a in GATEWAYS.items() if v in built.stations[number].addresses}
                    _reach(link, "eth0", gateways, link_address(wire))
                    for version, gateway in gateways.items():
                        everything = "0.0.0.0/0" if version == 4 else "::/0"
                        index = link.link_lookup(ifname="eth0")[0]
                        link.route("add", dst=everything, gateway=address_text(version, gateway), oif=index)


def _station_link(number: int) -> str:
    """A station's Ethernet address on a switch; locally administered."""
    return f"02:00:00:01:{number >> 8:02x}:{number & 255:02x}"


def _address(link: Any, interface: str, own: Mapping[int, int], peer: Mapping[int, int]) -> None:
    """Bring an interface up with its own addresses and routes to single peers."""
    index = link.link_lookup(ifname=interface)[0]
    link.link("set", index=index, state="up")
    for version, address in own.items():
        flags = {"flags": _NODAD} if version == 6 else {}
        link.addr("add", index=index, address=address_text(version, address), prefixlen=BITS[version], **flags)
    for version, address in peer.items():
        link.route("add", dst=f"{address_text(version, address)}/{BITS[version]}", oif=index)


def _own(link: Any, interface: str, addresses: Iterable[tuple[int, int]]) -> None:
    """More than one address of an interface, the first ones first."""
    index = link.link_lookup(ifname=interface)[0]
    for version, address in addresses:
        flags = {"flags": _NODAD} if version == 6 else {}
        link.addr("add", index=index, address=address_text(version, address), prefixlen=BITS[version], **flags)


def _reach(link: Any, interface: str, peer: Mapping[int, int], hardware: str) -> None:
    """A route to single peers, whose link address is known for good."""
    index = link.link_lookup(ifname=interface)[0]
    for version, address in peer.items():
        link.route("add", dst=f"{address_text(version, address)}/{BITS[version]}", oif=index, scope=_LINK)
        link.neigh("add", dst=address_text(version, address), lladdr=hardware, ifindex=index, state=_PERMANENT)


def _introduce(link: Any, number: int, peer: Mapping[int, int]) -> None:
    index = link.link_lookup(ifname="eth0")[0]
    for version, address in peer.items():
        link.neigh("add", dst=address_text(version, address), lladdr=link_address(number), ifindex=index, state=_PERMANENT)


def _forward() -> None:
    """Send packets on, and tell nobody of shorter ways (ICMP redirects).

    Raises:
        HostRefused: /proc/sys cannot be written, as in many containers.
    """
    for name, value in _FORWARDING.items():
        _set_sysctl(name, value)
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        with open(f"/proc/sys/net/{name}", encoding="ascii") as stream:  # noqa: PTH123 - procfs
            if stream.read().strip() != "1":
                raise HostRefused(f"cannot switch on net.{name.replace('/', '.')} in a namespace", hint="/proc/sys/net has to be writable")


def _set_sysctls() -> None:
    """Quiet and permissive; a container's read-only /proc/sys has to do with the defaults."""
    for name, value in _SYSCTLS.items():
        _set_sysctl(name, value)


def _set_sysctl(name: str, value: str) -> None:
    with suppress(OSError), open(f"/proc/sys/net/{name}", "w", encoding="ascii") as stream:  # noqa: PTH123 - procfs wants one write
        stream.write(value)
