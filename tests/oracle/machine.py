"""A kernel that says what its rules do with any packet: a network namespace with a tun device for each interface name.

A packet written to a device goes the whole way of a packet from the wire. What is left of it at the end of the input hook
is reported through NFLOG and dropped there, before connection tracking would confirm it, so no packet leaves a trace for the
next one. Known connections are put into the table beforehand, through ctnetlink.

A report that got lost (ENOBUFS, or a gap in the numbers) makes the whole run invalid: silence means "dropped" here.

Numbers are those of ``linux/if_tun.h``, ``linux/netfilter/nfnetlink_log.h`` and ``nfnetlink_conntrack.h``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast, get_args

import kernelspace
from oracle.wire import TCP, Flow, Probe, encoded, flow

from fwcompiler.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    SO_RCVBUFFORCE,
    SO_SNDBUFFORCE,
    attribute,
    attributes,
    message,
    nested,
)
from fwcompiler.ruleset import State

INTERFACES = ("eth0", "wan7")
LOOPBACK = "lo"

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_ULOG, _CTNETLINK = 4 << 8, 1 << 8
_LOG_CONFIG, _CT_NEW, _CT_DELETE = _ULOG | 1, _CTNETLINK, _CTNETLINK | 2
_CFG_CMD, _CFG_MODE, _CFG_QTHRESH, _CFG_FLAGS = 1, 2, 5, 6
_PAYLOAD, _PREFIX, _SEQ = 9, 10, 12
_GROUP = 1
_SEEN_REPLY, _ASSURED, _CONFIRMED = 2, 4, 8
_TCP_ESTABLISHED = 3
_LIBERAL = b"\x08\x08"
"""IP_CT_TCP_FLAG_BE_LIBERAL, and the mask of what is said: sequence numbers are not looked at."""
_ETHERNET = {4: bytes(12) + b"\x08\x00", 6: bytes(12) + b"\x86\xdd"}
"""The head of a frame from the loopback device to itself."""
_ROOM = 64 << 20
_FLOWS_AT_ONCE = 200

LAST_PRIORITY = 2147483645
"""One before the place where connection tracking confirms an entry: INT_MAX in IPv4, one less in IPv6
(include/uapi/linux/netfilter_ipv4.h; net/netfilter/nf_conntrack_proto.c, ``ipv6_conntrack_ops``)."""
_RULES = f"""
table inet oracle {{
	chain end {{
		type filter hook input priority {LAST_PRIORITY}; policy drop;
		{"; ".join(f'ct state {state} log prefix "{state}" group {_GROUP} drop' for state in get_args(State))}
	}}
	chain out {{
		type filter hook output priority {LAST_PRIORITY}; policy drop;
	}}
}}
"""

_SYSCTLS = {
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    "ipv4/conf/all/accept_local": 1,
    "ipv4/conf/all/route_localnet": 1,
    "ipv4/icmp_ratelimit": 0,
    "ipv6/icmp/ratelimit": 0,
    "ipv6/conf/all/disable_ipv6": 0,
    "ipv6/conf/default/disable_ipv6": 0,
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/default/accept_ra": 0,
    "ipv6/conf/default/addr_gen_mode": 1,
    "ipv6/conf/default/router_solicitations": 0,
}
_CONNTRACK_SYSCTLS = {"nf_conntrack_checksum": 0, "nf_conntrack_tcp_loose": 0}
"""These appear once something in the namespace asks for connection tracking."""


class InvalidRun(Exception):
    """Reports were lost: nothing that this run found means anything."""


@dataclass(frozen=True)
class Layout:
    """What kind of host it is: its interfaces, the rules that report, and what has to be run and set."""

    interfaces: tuple[str, ...] = INTERFACES
    rules: str = _RULES
    network: tuple[tuple[str, ...], ...] = ()
    sysctls: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What came out: what the reporting rule says of it, and the beginning of the packet as it was there."""

    prefix: str
    head: bytes


class Machine:
    """One such kernel; it lives as long as its block."""

    def __init__(self, space: kernelspace.Space, held: ExitStack, layout: Layout) -> None:
        self.space = space
        with space.entered():
            _configure({**_SYSCTLS, **layout.sysctls})
            self._devices = {name: held.enter_context(_tun(name)) for name in layout.interfaces}
            for argv in (*_up((LOOPBACK, *layout.interfaces)), *(layout.network or _network())):
                kernelspace.run(argv)
            kernelspace.run(("nft", "-f", "-"), layout.rules)
            _configure({f"netfilter/{name}": value for name, value in _CONNTRACK_SYSCTLS.items()})
            self._log, self._connections = (held.enter_context(_netlink()) for _ in range(2))
            self._wire = held.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            self._wire.bind((LOOPBACK, 0))
        self._expected = 0
        self._subscribe()

    def ask(self, probes: Sequence[Probe]) -> list[State | None]:
        """Send packets; for each, the state in which it came to the end of the input hook, or None where it never did.

        Raises:
            InvalidRun: reports were lost.
        """
        told = self.reports(probes, [f for probe in probes if (f := flow(probe))])
        return [cast(State, each.prefix) if each else None for each in told]

    def reports(self, probes: Sequence[Probe], flows: Iterable[Flow]) -> list[Report | None]:
        """Send packets to a kernel that knows these connections; for each, what was reported of it.

        Raises:
            InvalidRun: reports were lost.
        """
        self._forget()
        self._know(flows)
        found: list[Report | None] = [None] * len(probes)
        for number, probe in enumerate(probes):
            self._send(probe, encoded(probe, number))
            for at, report in self._reports():
                found[at] = report
        return found

    def _send(self, probe: Probe, data: bytes) -> None:
        if probe.interface == LOOPBACK:
            self._wire.send(_ETHERNET[probe.version] + data)
        else:
            os.write(self._devices[probe.interface], data)

    def _reports(self) -> Iterator[tuple[int, Report]]:
        """What came out: a packet is through before the call that sent it returns, so nothing is waited for."""
        while True:
            try:
                data = self._log.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    raise InvalidRun("the kernel had no room for a report") from error
                raise
            for start, end in _messages(data):
                yield self._report(data, start, end)

    def _report(self, data: bytes, start: int, end: int) -> tuple[int, Report]:
        found = {kind: data[low:high] for kind, low, high in attributes(data, start + 20, end)}
        sequence = int.from_bytes(found[_SEQ], "big")
        if sequence != self._expected:
            raise InvalidRun(f"report {self._expected} is missing, {sequence} came")
        self._expected += 1
        head = found[_PAYLOAD]
        number = int.from_bytes(head[4:6], "big") if head[0] >> 4 == 4 else int.from_bytes(head[0:4], "big") & 0xFFFFF
        return number, Report(found[_PREFIX].rstrip(b"\0").decode(), head)

    def _subscribe(self) -> None:
        for part in (
            attribute(_CFG_CMD, b"\x01"),
            attribute(_CFG_MODE, struct.pack("!IBx", 48, 2)),
            attribute(_CFG_QTHRESH, struct.pack("!I", 1)) + attribute(_CFG_FLAGS, struct.pack("!H", 1)),
        ):
            _acknowledged(self._log, message(_LOG_CONFIG, NLM_F_ACK, 1, socket.AF_UNSPEC, _GROUP, part))

    def _forget(self) -> None:
        """Empty the connection table."""
        _acknowledged(self._connections, message(_CT_DELETE, NLM_F_ACK, 1, socket.AF_UNSPEC, 0))

    def _know(self, flows: Iterable[Flow]) -> None:
        """Put connections into the table. Of two that are one, in whichever direction, the first stays."""
        known: dict[tuple[object, ...], None] = {}
        parts: list[bytes] = []
        for each in flows:
            for one in (each.expected_by, each):
                if one is None or tuple_key(one) in known or tuple_key(turned(one)) in known:
                    continue
                known[tuple_key(one)] = None
                parts.append(_entry(one, len(parts)))
        for start in range(0, len(parts), _FLOWS_AT_ONCE):
            chunk = parts[start : start + _FLOWS_AT_ONCE]
            self._connections.send(b"".join(chunk))
            for _ in chunk:
                _raise_error(self._connections.recv(4096))


@contextmanager
def machine(layout: Layout | None = None) -> Iterator[Machine]:
    """A kernel without rules of its own, for the length of a block."""
    with kernelspace.namespace() as space, ExitStack() as held:
        yield Machine(space, held, layout or Layout())


def _configure(values: dict[str, int]) -> None:
    for name, value in values.items():
        path = Path("/proc/sys/net") / name
        if path.exists():
            path.write_text(str(value), encoding="ascii")


@contextmanager
def _tun(name: str) -> Iterator[int]:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        yield descriptor
    finally:
        os.close(descriptor)


def _up(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    return (("ip", "link", "set", name, "up") for name in names)


def _network() -> Iterator[tuple[str, ...]]:
    """Every address is this host's own."""
    for family, everything in (("-4", "0.0.0.0/0"), ("-6", "::/0")):
        yield ("ip", family, "route", "add", "local", everything, "dev", LOOPBACK)


@contextmanager
def _netlink() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as made:
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _ROOM)
        made.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, _ROOM)
        made.bind((0, 0))
        yield made


def _messages(data: bytes) -> Iterator[tuple[int, int]]:
    start = 0
    while start + 16 <= len(data):
        length = int(struct.unpack_from("=I", data, start)[0])
        yield start, start + length
        start += (length + 3) & ~3


def _acknowledged(channel: socket.socket, data: bytes) -> None:
    channel.send(data)
    _raise_error(channel.recv(4096))


def _raise_error(answer: bytes) -> None:
    code = -int(struct.unpack_from("=i", answer, 16)[0])
    if code:
        raise OSError(code, f"netlink: {os.strerror(code)}")


def tuple_key(flow: Flow) -> tuple[object, ...]:
    """What tells a connection from others, in one direction."""
    return flow.version, flow.source, flow.destination, flow.protocol, flow.source_port, flow.port


def turned(flow: Flow) -> Flow:
    """The other direction."""
    return Flow(flow.version, flow.destination, flow.source, flow.protocol, flow.port, flow.source_port, flow.replied)


def _entry(each: Flow, sequence: int) -> bytes:
    """``IPCTNL_MSG_CT_NEW``. An entry with a master is one that was expected, so its first packets are related."""
    status = _CONFIRMED | (_SEEN_REPLY | _ASSURED if each.replied else 0)
    parts = [
        _tuple(1, each),
        _tuple(2, turned(each)),
        attribute(3, struct.pack("!I", status)),
        attribute(7, struct.pack("!I", 600)),
    ]
    if each.protocol == TCP:
        info = (attribute(1, bytes((_TCP_ESTABLISHED,))), attribute(4, _LIBERAL), attribute(5, _LIBERAL))
        parts.append(nested(4, nested(1, *info)))
    if each.expected_by:
        parts.append(_tuple(14, each.expected_by))
    if each.translated:
        side, address = each.translated
        parts.append(nested(13 if side == "destination" else 6, attribute(1, address.to_bytes(4, "big"))))
    family = socket.AF_INET if each.version == 4 else socket.AF_INET6
    return message(_CT_NEW, NLM_F_ACK | NLM_F_CREATE, sequence, family, 0, *parts)


def _tuple(kind: int, each: Flow) -> bytes:
    first, length = (1, 4) if each.version == 4 else (3, 16)
    ends = (attribute(first + i, a.to_bytes(length, "big")) for i, a in enumerate((each.source, each.destination)))
    ports = (attribute(2 + i, struct.pack("!H", p)) for i, p in enumerate((each.source_port, each.port)))
    return nested(kind, nested(1, *ends), nested(2, attribute(1, bytes((each.protocol,))), *ports))
