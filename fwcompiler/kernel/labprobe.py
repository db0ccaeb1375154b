"""Sends real packets through a lab network and tells which arrived.

Everything runs in one thread around one selector: sockets are created inside the namespaces and used from outside.
All probes of a batch are sent first; then their answers are collected. UDP is echoed, TCP has to connect, ICMP has
to be answered by the kernel, other protocols have to reach a raw socket of the host.
"""

from __future__ import annotations

import errno
import selectors
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from random import randrange
from time import monotonic
from types import TracebackType

from fwcompiler.addresses import address_text
from fwcompiler.kernel.labnet import Network
from fwcompiler.ports import PROTOCOLS

WAITS = (0.3, 0.4, 0.8, 1.5)
"""Seconds that each round waits. The first is also how long a packet has to stay away to be called dropped."""
BATCH = 250
"""Probes under way at once. Each may need two descriptors, and many systems grant a process 1,024."""

_ICMP = {4: (PROTOCOLS["icmp"], 8, 0), 6: (PROTOCOLS["icmpv6"], 128, 129)}
"""Protocol, echo request and reply by family (RFC 792, RFC 4443)."""
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_TOKEN = struct.Struct("!8sI")
_MAGIC = b"fwc lab\0"
_ECHO = struct.Struct("!BBHHH")


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to try: from a station to the host, by a protocol of :data:`~fwcompiler.ports.PROTOCOLS`."""

    station: int
    version: int
    protocol: str
    port: int = 0
    expected: bool = True


def fire(network: Network, probes: Sequence[Probe], waits: Sequence[float] = WAITS) -> tuple[bool, ...]:
    """Which probes reached the host, in their order.

    What does not arrive is sent again in further rounds while a probe that is expected to arrive is missing: a busy
    machine loses packets, and slowness must not be taken for a firewall's drop.
    """
    reached: list[bool] = []
    for start in range(0, len(probes), BATCH):
        with _Range(network, probes[start : start + BATCH]) as shooting:
            reached += shooting.run(waits)
    return tuple(reached)


class _Range:
    """One batch: the host's listeners, the stations' sockets, and what has arrived so far."""

    def __init__(self, network: Network, probes: Sequence[Probe]) -> None:
        self.network, self.probes = network, probes
        self.reached = [False] * len(probes)
        # Echo requests of one identifier are one connection to conntrack; each probe has its own, and so has each batch.
        self._identifier = randrange(1 << 16)
        self._held = ExitStack()
        self._selector = self._held.enter_context(selectors.DefaultSelector())
        self._connecting: list[socket.socket] = []

    def __enter__(self) -> _Range:
        try:
            with self.network.host.entered():
                for version, protocol, port in sorted({(p.version, p.protocol, p.port) for p in self.probes}):
                    self._listen(version, protocol, port)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    def run(self, waits: Sequence[float]) -> list[bool]:
        """All rounds that are needed."""
        for wait in waits:
            self._send_all()
            self._collect(wait, waits[0])
            if not self._missing():
                break
        return self.reached

    def _missing(self) -> bool:
        return any(p.expected and not r for p, r in zip(self.probes, self.reached, strict=True))

    def _collect(self, wait: float, quiet: float) -> None:
        start = now = monotonic()
        while now < start + (wait if self._missing() else quiet) and not all(self.reached):
            for key, _ in self._selector.select(0.02):
                key.data()
            now = monotonic()

    def _socket(self, version: int, kind: int, protocol: int = 0) -> socket.socket:
        made = self._held.enter_context(socket.socket(_FAMILY[version], kind | socket.SOCK_NONBLOCK, protocol))
        if version == 6 and kind != socket.SOCK_RAW:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        return made

    def _watch(self, sock: socket.socket, handler: Callable[[socket.socket], None], events: int = selectors.EVENT_READ) -> None:
        self._selector.register(sock, events, lambda: handler(sock))

    # The host's side.

    def _listen(self, version: int, protocol: str, port: int) -> None:
        here = (address_text(version, self.network.addresses[version]), port)
        match protocol:
            case "udp":
                sock = self._socket(version, socket.SOCK_DGRAM)
                sock.bind(here)
                self._watch(sock, _echo)
            case "tcp":
                sock = self._socket(version, socket.SOCK_STREAM)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the batch before left connections in TIME_WAIT
                sock.bind(here)
                sock.listen(128)
                self._watch(sock, _accept)
            case "icmp" | "icmpv6":
                pass
            case _:
                self._watch(self._socket(version, socket.SOCK_RAW, PROTOCOLS[protocol]), self._arrived)

    def _arrived(self, sock: socket.socket) -> None:
        """A datagram of ours came in, at the host or back as an echo."""
        for data in _received(sock):
            body = data[(data[0] & 15) * 4 :] if sock.type & socket.SOCK_RAW == socket.SOCK_RAW and sock.family == socket.AF_INET else data
            if len(body) == _TOKEN.size and body.startswith(_MAGIC):
                self.reached[_TOKEN.unpack(body)[1]] = True

    # The stations' side.

    def _send_all(self) -> None:
        """Send what has not arrived yet, by fresh sockets: every round is a new connection."""
        for sock in self._connecting:
            self._selector.unregister(sock)
            sock.close()
        self._connecting.clear()
        for number, namespace in enumerate(self.network.namespaces):
            left = [(i, p) for i, p in enumerate(self.probes) if p.station == number and not self.reached[i]]
            if left:
                with namespace.entered():
                    self._send(left)

    def _send(self, probes: Sequence[tuple[int, Probe]]) -> None:
        shared: dict[tuple[int, str], socket.socket] = {}
        for index, probe in probes:
            there = (address_text(probe.version, self.network.addresses[probe.version]), probe.port)
            if probe.protocol == "tcp":
                self._connect(index, probe.version, there)
                continue
            key = (probe.version, probe.protocol)
            if key not in shared:
                shared[key] = self._open(*key)
            identifier = self._identifier + index & 0xFFFF
            data = _echo_request(probe.version, identifier, index) if probe.protocol.startswith("icmp") else _TOKEN.pack(_MAGIC, index)
            with suppress(OSError):
                shared[key].sendto(data, there if probe.protocol == "udp" else (there[0], 0))

    def _open(self, version: int, protocol: str) -> socket.socket:
        if protocol == "udp":
            sock = self._socket(version, socket.SOCK_DGRAM)
            self._watch(sock, self._arrived)
        else:
            sock = self._socket(version, socket.SOCK_RAW, PROTOCOLS[protocol])
            if protocol.startswith("icmp"):
                self._watch(sock, self._answered)
        return sock

    def _answered(self, sock: socket.socket) -> None:
        version = 4 if sock.family == socket.AF_INET else 6
        for data in _received(sock):
            body = data[(data[0] & 15) * 4 :] if version == 4 else data
            if len(body) == _ECHO.size + len(_MAGIC) and body.endswith(_MAGIC) and body[0] == _ICMP[version][2]:
                self.reached[_ECHO.unpack_from(body)[4]] = True

    def _connect(self, index: int, version: int, there: tuple[str, int]) -> None:
        sock = self._socket(version, socket.SOCK_STREAM)
        if sock.connect_ex(there) in (0, errno.EINPROGRESS):
            self._watch(sock, lambda s: self._connected(index, s), selectors.EVENT_WRITE)
            self._connecting.append(sock)

    def _connected(self, index: int, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._connecting.remove(sock)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            self.reached[index] = True
        sock.close()


def _received(sock: socket.socket) -> Iterator[bytes]:
    """Everything that is waiting at a socket."""
    with suppress(OSError):
        while True:
            yield sock.recv(2048)


def _echo(sock: socket.socket) -> None:
    with suppress(OSError):
        while True:
            data, peer = sock.recvfrom(2048)
            sock.sendto(data, peer)


def _accept(sock: socket.socket) -> None:
    with suppress(OSError):
        while True:
            sock.accept()[0].close()


def _echo_request(version: int, identifier: int, index: int) -> bytes:
    """An echo request that carries its number. The kernel fills in ICMPv6's checksum, ours is RFC 1071's."""
    kind = _ICMP[version][1]
    plain = _ECHO.pack(kind, 0, 0, identifier, index) + _MAGIC
    if version == 6:
        return plain
    total = sum(struct.unpack(f"!{len(plain) // 2}H", plain))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return _ECHO.pack(kind, 0, ~total & 0xFFFF, identifier, index) + _MAGIC
