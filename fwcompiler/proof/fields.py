"""A packet as the firewall sees it: the fields that policies and rules speak about."""

from __future__ import annotations

from dataclasses import dataclass

from fwcompiler.ports import PROTOCOLS, Ports
from fwcompiler.ruleset import State

ECHO_REQUEST = {1: 8, 58: 128}
"""By protocol number: the type asked about when nothing else is said (RFC 792, RFC 4443)."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet that arrives for this host, or that it sends (`leaving`). Addresses are integers of the family `version`.

    `destination` None stands for an address of this host that is not a loopback address. Of a packet that leaves, `interface` is
    where it goes out, and the source 0 stands for such an address.
    """

    version: int
    source: int
    protocol: int
    port: int = 0
    destination: int | None = None
    source_port: int = 40000
    icmp_type: int = 0
    interface: str = "eth0"
    state: State = "new"
    leaving: bool = False

    @property
    def protocol_name(self) -> str:
        """`udp`, or the number where fwc has no name for it."""
        return next((name for name, number in PROTOCOLS.items() if number == self.protocol), str(self.protocol))


def packet_to(version: int, source: int, to: Ports, **fields: object) -> Packet:
    """A packet to one service; of a range the first port. ICMP follows the address family."""
    protocol = PROTOCOLS[to.protocol]
    if to.protocol in ("icmp", "icmpv6"):
        protocol = PROTOCOLS["icmp" if version == 4 else "icmpv6"]
    port = to.ranges[0][0] if to.ranges else 0
    return Packet(version, source, protocol, port, icmp_type=ECHO_REQUEST.get(protocol, 0), **fields)  # type: ignore[arg-type]
