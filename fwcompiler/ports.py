"""Protocols and ports: `tcp/443`, `udp/10000-20000`, `vrrp`, `icmp/echo-request`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fwcompiler.addresses import Range, Ranges, intersect, merged, subtract

PROTOCOLS: dict[str, int] = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "vrrp": 112}
"""Names fwc knows, and their numbers (IANA protocol numbers). Only tcp and udp have ports."""

WITH_PORTS = ("tcp", "udp")
FIRST, LAST = 1, 65535

_SPEC = re.compile(r"^\s*([a-z0-9]+)\s*(?:/\s*(\S+?)\s*)?$")


class PortError(ValueError):
    """Text that is no port. ``code`` is one of ``diagnostics.CODES``."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


@dataclass(frozen=True, slots=True, order=True)
class Ports:
    """One protocol with the port ranges of a service; ``ranges`` is empty for protocols without ports."""

    protocol: str
    ranges: Ranges = ()

    def __str__(self) -> str:
        return ", ".join(self.texts())

    def texts(self) -> tuple[str, ...]:
        """``udp/5060``, ``udp/10000-20000``; one text a range."""
        if not self.ranges:
            return (self.protocol,)
        return tuple(f"{self.protocol}/{port_text(r)}" for r in self.ranges)


def port_text(span: Range) -> str:
    """``5060`` or ``10000-20000``."""
    return str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"


def parse_ports(text: str) -> Ports:
    """Read ``protocol/port``, ``protocol/first-last`` or a protocol without ports.

    Raises:
        PortError: unknown protocol, or a port outside 1 to 65535.
    """
    match = _SPEC.match(text.lower())
    protocol, spec = (match[1], match[2]) if match else ("", None)
    if protocol not in PROTOCOLS:
        raise PortError("port", f"`{text[:60]}` is not a protocol and port", "write tcp/443, udp/10000-20000 or vrrp")
    if protocol not in WITH_PORTS:
        if spec is not None:
            raise PortError("port", f"{protocol} has no ports", f"write `{protocol}` alone")
        return Ports(protocol)
    if spec is None:
        raise PortError("port", f"{protocol} needs a port", f"write {protocol}/5060 or {protocol}/10000-20000")
    return Ports(protocol, (parse_port_range(spec),))


def parse_service_ports(text: str, standard: tuple[Ports, ...]) -> list[Ports]:
    """Read what a service says of its ports: `udp/5080`, or `5080` alone where its ``standard`` ports tell the protocol.

    Raises:
        PortError: it is neither.
    """
    if "/" in text or not text[:1].isdigit():
        ports = parse_ports(text)
        if ports.protocol in ("icmp", "icmpv6"):
            raise PortError("port", f"{ports.protocol} is no service: a host cannot do without it", "fwc accepts what is needed, and ping")
        return [ports]
    protocols = sorted({p.protocol for p in standard if p.protocol in WITH_PORTS})
    if not protocols:
        parse_port_range(text)
        raise PortError("port", f"`{text}` does not say which protocol", f"write tcp/{text} or udp/{text}")
    span = parse_port_range(text)
    return [Ports(protocol, (span,)) for protocol in protocols]


def parse_port_range(text: str) -> Range:
    """Read ``5060`` or ``10000-20000``.

    Raises:
        PortError: no numbers, outside 1 to 65535 (iptables would wrap them), or ends before start.
    """
    low_text, dash, high_text = text.partition("-")
    low = _port(low_text.strip(), text)
    high = _port(high_text.strip(), text) if dash else low
    if high < low:
        raise PortError("range-order", f"range ends ({high}) before it starts ({low})", "write the lower port first")
    return low, high


def _port(text: str, whole: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        raise PortError("port", f"`{whole[:60]}` is not a port", "write 5060 or 10000-20000")
    value = int(text)
    if not FIRST <= value <= LAST:
        raise PortError("port-bounds", f"port {value} is outside {FIRST} to {LAST}")
    return value


def joined(ports: Iterable[Ports]) -> tuple[Ports, ...]:
    """One :class:`Ports` a protocol, ranges merged, protocols in order."""
    by_protocol: dict[str, list[Range]] = {}
    for p in ports:
        by_protocol.setdefault(p.protocol, []).extend(p.ranges)
    return tuple(Ports(name, merged(by_protocol[name])) for name in sorted(by_protocol))


def overlap(a: Ports, b: Ports) -> Ports | None:
    """The ports that both claim, or None."""
    if a.protocol != b.protocol:
        return None
    if not a.ranges or not b.ranges:
        return Ports(a.protocol)
    common = intersect(a.ranges, b.ranges)
    return Ports(a.protocol, common) if common else None


def difference(a: Ports, b: Ports) -> Ranges:
    """Port ranges of ``a`` that ``b`` does not have; both of one protocol."""
    return subtract(a.ranges, b.ranges)
