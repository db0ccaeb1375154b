"""Addresses as Asterisk's files write them: binds, networks, SIP URIs, `register` lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Literal

from fwcompiler.addresses import LOOPBACK, AddressError, Addresses, parse_address, parse_entry
from fwcompiler.ports import FIRST, LAST
from fwcompiler.resolved import Resolved
from fwcompiler.service import ResolvedService

PRIVATE = Addresses.of(
    [
        *((0x0A000000, 0x0AFFFFFF), (0xAC100000, 0xAC1FFFFF), (0xC0A80000, 0xC0A8FFFF), (0x64400000, 0x647FFFFF)),
        *((0xA9FE0000, 0xA9FEFFFF), LOOPBACK[4]),
    ],
    [(0xFC << 120, (0xFE << 120) - 1), (0xFE80 << 112, (0xFEC0 << 112) - 1), LOOPBACK[6]],
)
"""Addresses that mean nothing on the internet (RFC 1918, 6598, 3927, 4193, 4291)."""

Scope = Literal["all", "loopback", "address", "name"]

_HOST = re.compile(
    r"^(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<bare>[0-9a-fA-F]*:[0-9a-fA-F]*:[0-9a-fA-F:.]*)|(?P<name>[^:\s]*))(?::(?P<port>[0-9]{1,5}))?$"
)
_URI = re.compile(r"^<?\s*sips?:(?:[^@;>]*@)?(?P<host>\[[^\]]+\](?::\d+)?|[^;>?,\s]+)", re.I)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host, by address or name, with a port; `host` is empty for every address."""

    host: str
    port: int

    @property
    def scope(self) -> Scope:
        """From where it can be reached when something listens on it."""
        if self.host in ("", "0.0.0.0", "::", "*"):
            return "all"
        if self.host.lower() == "localhost":
            return "loopback"
        try:
            version, value = parse_address(self.host)
        except AddressError:
            return "name"
        return "loopback" if LOOPBACK[version][0] <= value <= LOOPBACK[version][1] else "address"

    def __str__(self) -> str:
        host = self.host or "every address"
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def endpoint(text: str, port: int) -> Endpoint | None:
    """`0.0.0.0`, `192.0.2.1:8089`, `[::]:8089`, `::`, `sip.example.net:5080`; `port` is what counts without one."""
    match = _HOST.match(text.strip())
    if match is None:
        return None
    number = int(match["port"]) if match["port"] else port
    if not FIRST <= number <= LAST:
        return None
    return Endpoint(match["six"] or match["bare"] or match["name"] or "", number)


def of_uri(text: str, port: int = 5060) -> Endpoint | None:
    """The host of `sip:user@host:port;transport=tcp`."""
    match = _URI.match(text.strip())
    return endpoint(match["host"], port) if match else None


def of_register(text: str) -> Endpoint | None:
    """The host of `register => [peer?][transport://]user[:secret[:authuser]]@host[:port][/extension][~expiry]`."""
    _, at, host = text.rpartition("@")
    return endpoint(re.split("[/~]", host, maxsplit=1)[0], 5060) if at else None


def network(text: str) -> Addresses | None:
    """An address or network, also with a netmask in dots; None for a name."""
    text = text.strip()
    try:
        if re.search(r"/\d+\.\d+\.\d+\.\d+$", text):
            text = str(ip_network(text, strict=False))
        entry = parse_entry(text, ("everyone", "loopback", "multicast"))
    except (AddressError, ValueError):
        return None
    return Addresses.of([entry.span] if entry.version == 4 else [], [entry.span] if entry.version == 6 else [])


def covering(policy: Resolved, protocol: str, port: int) -> ResolvedService | None:
    """The service that a port belongs to; there is at most one."""
    for service in policy.services:
        for ports in (*service.ports, *service.heard_ports()):
            if ports.protocol == protocol and any(low <= port <= high for low, high in ports.ranges):
                return service
    return None


def items(text: str) -> Iterator[str]:
    """The parts of a list with commas."""
    return (part.strip() for part in text.split(",") if part.strip())
