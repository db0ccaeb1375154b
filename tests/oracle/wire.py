"""Packets as bytes, and the connections that a kernel should know before they arrive.

The number of a probe travels in the packet (IPv4 identification, IPv6 flow label), so that whatever comes out at the end
can be told apart. Layouts are those of RFC 791, 8200, 768, 9293, 792 and 4443. Checksums above IP are left at zero:
the oracle's kernels do not look at them, but for those of ICMP errors, which NAT does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from fwcompiler.proof.fields import Packet
from fwcompiler.ruleset import State

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
ERRORS = {ICMP: (3, 4, 5, 11, 12), ICMPV6: (1, 2, 3, 4)}
"""ICMP messages that quote the packet they are about."""
MOST = 0x10000
"""Numbers that fit into an IPv4 identification."""
SYN, ACK = 0x02, 0x10

Way = Literal["alone", "original", "reply", "related", "broken"]
"""How a packet stands to connections: the first of its own; of a known one, in either direction; of one that a known one
announced; too broken to belong to any. What the kernel calls it is the kernel's business."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A packet to send."""

    version: int
    source: int
    destination: int
    protocol: int
    port: int = 0
    source_port: int = 0
    icmp_type: int = 0
    interface: str = "eth0"
    way: Way = "alone"

    def packet(self, state: State) -> Packet:
        """The same in the words of the proof, once a kernel has said what state it is in."""
        return Packet(
            self.version,
            self.source,
            self.protocol,
            self.port,
            self.destination,
            self.source_port,
            self.icmp_type,
            self.interface,
            state,
        )

    @property
    def is_icmp(self) -> bool:
        """True for the ICMP of its family."""
        return self.protocol == (ICMP if self.version == 4 else ICMPV6)

    @property
    def has_ports(self) -> bool:
        """True for TCP and UDP."""
        return self.protocol in (TCP, UDP)


@dataclass(frozen=True, slots=True)
class Flow:
    """A connection as its first packet made it. `translated`: which side of it NAT rewrites, over IPv4, and to which address."""

    version: int
    source: int
    destination: int
    protocol: int
    source_port: int
    port: int
    replied: bool
    expected_by: Flow | None = None
    translated: tuple[str, int] | None = None


def encoded(probe: Probe, number: int) -> bytes:
    """The packet as it arrives."""
    if probe.protocol == TCP:
        body = _tcp(probe)
    elif probe.protocol == UDP:
        length = 4 if probe.way == "broken" else 16
        body = struct.pack("!HHHH8x", probe.source_port, probe.port, length, 0)
    elif probe.is_icmp:
        body = _icmp(probe)
    else:
        body = bytes(24)
    return _ip(probe.version, probe.source, probe.destination, probe.protocol, number, body)


def _ip(version: int, source: int, destination: int, protocol: int, number: int, body: bytes) -> bytes:
    if version == 6:
        head = struct.pack("!IHBB", 0x60000000 | number, len(body), protocol, 64)
        return head + source.to_bytes(16, "big") + destination.to_bytes(16, "big") + body
    addresses = source.to_bytes(4, "big") + destination.to_bytes(4, "big")
    plain = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), number, 0x4000, 64, protocol, 0) + addresses
    return plain[:10] + struct.pack("!H", _checksum(plain)) + plain[12:] + body


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def _tcp(probe: Probe) -> bytes:
    """A SYN opens; within a connection there is an ACK; no flags at all are never right."""
    flags = {"alone": SYN, "related": SYN, "broken": 0}.get(probe.way, ACK)
    return struct.pack("!HHIIBBHHH", probe.source_port, probe.port, 1000, 1000 if flags == ACK else 0, 0x50, flags, 64000, 0, 0)


def _icmp(probe: Probe) -> bytes:
    """An error quotes a packet that this host sent before, or would have."""
    head = struct.pack("!BBHHH", probe.icmp_type, 0, 0, probe.source_port, 0)
    if probe.icmp_type not in ERRORS[probe.protocol]:
        return head + bytes(16)
    quoted = struct.pack("!HHHH8x", probe.source_port, 9, 16, 0)
    body = _ip(probe.version, probe.destination, probe.source, UDP, 0, quoted)
    plain = struct.pack("!BBH4x", probe.icmp_type, 0, 0) + body
    return plain[:2] + struct.pack("!H", _checksum(_pseudo(probe, len(plain)) + plain)) + plain[4:]


def _pseudo(probe: Probe, length: int) -> bytes:
    """What ICMPv6 counts besides itself (RFC 8200, section 8.1)."""
    if probe.version == 4:
        return b""
    return probe.source.to_bytes(16, "big") + probe.destination.to_bytes(16, "big") + struct.pack("!I3xB", length, ICMPV6)


def flow(probe: Probe) -> Flow | None:
    """The connection that a probe needs for what it should be; None where it needs none, or where there is no such thing."""
    if probe.is_icmp and probe.icmp_type in ERRORS[probe.protocol]:
        if probe.way not in ("original", "reply", "related"):
            return None
        return Flow(probe.version, probe.destination, probe.source, UDP, probe.source_port, 9, replied=False)
    if not probe.has_ports or probe.way in ("alone", "broken"):
        return None
    there = Flow(probe.version, probe.source, probe.destination, probe.protocol, probe.source_port, probe.port, probe.way == "original")
    if probe.way == "reply":
        return Flow(probe.version, probe.destination, probe.source, probe.protocol, probe.port, probe.source_port, replied=True)
    if probe.way == "related":
        master = Flow(probe.version, probe.source, probe.destination, TCP, probe.source_port, 1, replied=True)
        return Flow(there.version, there.source, there.destination, there.protocol, there.source_port, there.port, False, master)
    return there
