"""A kernel that says what its rules do with packets that it sends itself.

A raw socket takes whole packets, so they begin their way at the output hook, with a source, a destination and ports of our choice.
What is left of one at that hook's end is reported and dropped before connection tracking would confirm it. Everything but the
addresses of this host lies behind ``eth0``; what goes out there is reported, what goes to the host itself is not: a refusal is one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from random import Random
from typing import get_args

from oracle.machine import LAST_PRIORITY, Layout, Machine, machine
from oracle.packets import HOST, SEVERAL, Borders
from oracle.wire import ICMP, ICMPV6, TCP, UDP, Probe, Way
from property.strategies import HOME, own_ports

from fwcompiler.addresses import LAST, address_text
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import State

INTERFACE = "eth0"
WAYS: tuple[Way, ...] = ("alone", "alone", "alone", "original", "reply", "related", "broken")
PROTOCOLS = {4: (ICMP, 2, 47, 112, 132), 6: (ICMPV6, 47, 112, 132)}
TYPES = (0, 1, 2, 3, 4, 8, 11, 12, 13, 128, 129, 130, 133, 135, 136, 137, 143)
GROUPS = {4: (0xE0000012, 0xE0000016), 6: ((0xFF02 << 112) + 0x12, (0xFF02 << 112) + 0x16)}
_RULES = f"""
table inet oracle {{
	chain end {{
		type filter hook output priority {LAST_PRIORITY}; policy drop;
		{"; ".join(f'oifname "{INTERFACE}" ct state {state} log prefix "{state}" group 1 drop' for state in get_args(State))}
	}}
}}
"""


def _layout() -> Layout:
    network = []
    for version, length in ((4, 32), (6, 128)):
        own = f"{address_text(version, HOST[version])}/{length}"
        network.append(("ip", "address", "add", own, "dev", INTERFACE, *(("nodad",) if version == 6 else ())))
        network.append(("ip", f"-{version}", "route", "add", "default", "dev", INTERFACE))
    return Layout((INTERFACE,), _RULES, tuple(network))


class Sender(Machine):
    """Such a kernel: what it is asked about it sends itself."""

    def __init__(self, made: Machine) -> None:
        self.__dict__.update(made.__dict__)
        with self.space.entered():
            v4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
            v6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
            self._scope = socket.if_nametoindex(INTERFACE)
        v4.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.sockets = {4: v4, 6: v6}

    def _send(self, probe: Probe, data: bytes) -> None:
        where = (address_text(probe.version, probe.destination), 0)
        multicast = probe.version == 6 and probe.destination >> 120 == 0xFF
        with suppress(PermissionError):  # what no rule lets out is an error of the call
            self.sockets[probe.version].sendto(data, (*where, 0, self._scope) if multicast else where)


@contextmanager
def sender() -> Iterator[Sender]:
    """Such a kernel without rules of fwc, for the length of a block."""
    with machine(_layout()) as made:
        found = Sender(made)
        try:
            yield found
        finally:
            for each in found.sockets.values():
                each.close()


def probes(policy: Resolved, random: Random, count: int) -> list[Probe]:
    """Packets for a policy whose groups hold their members, at and beside the borders of addresses and of ports at both ends."""
    borders = Borders.of(policy)
    ports = own_ports(policy)
    return [_probe(borders, ports, random, 1024 + n) for n in range(count)]


def _probe(borders: Borders, ports: Sequence[int], random: Random, own_port: int) -> Probe:
    version = random.choice((4, 6))
    protocol = random.choice((TCP, TCP, UDP, UDP, UDP, random.choice(PROTOCOLS[version])))
    has_ports = protocol in (TCP, UDP)
    return Probe(
        version,
        HOST[version],
        _destination(borders, random, version),
        protocol,
        port=random.choice(ports) if has_ports else 0,
        source_port=random.choice(ports) if has_ports and random.random() < 0.4 else own_port,
        icmp_type=random.choice(TYPES) if protocol in (ICMP, ICMPV6) else 0,
        way=random.choice(WAYS),
    )


def _destination(borders: Borders, random: Random, version: int) -> int:
    """Where the routing leads out: not the host's own addresses, and none that packets are not sent to."""
    if random.random() < 0.1:
        return random.choice(GROUPS[version])
    near = random.random() < 0.8
    value = random.choice(borders.addresses[version]) if near else HOME[version] + random.randrange(70)
    first = value >> 24 if version == 4 else value >> 120
    usable = 0 < first < 224 and first != 127 if version == 4 else first not in (0, 0xFF, 0xFE)
    return value if usable and value not in (HOST[version], LAST[version], *SEVERAL[version]) else HOME[version] + 5
