"""Sends real packets through a lab network and tells which arrived.

Everything runs in one thread around one selector: sockets are created inside the namespaces and used from outside.
All probes of a batch are sent first; then their answers are collected. UDP and TCP are answered by who received them: where
that was, and from whom it seemed to come. ICMP has to be answered by the kernel, other protocols have to reach a raw socket.
"""

from __future__ import annotations

import errno
import selectors
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from random import randrange
from time import monotonic
from types import TracebackType

from fwcompiler.addresses import address_text, parse_address
from fwcompiler.kernel.labnet import Network
from fwcompiler.kernel.netns import Namespace
from fwcompiler.ports import PROTOCOLS

WAITS = (0.3, 0.4, 0.8, 1.5)
"""Seconds that each round waits. The first is also how long a packet has to stay away to be called dropped."""
BATCH = 500
"""Sockets open at once, as far as it can be foreseen: many systems grant a process 1,024 descriptors."""

_ICMP = {4: (PROTOCOLS["icmp"], 8, 0), 6: (PROTOCOLS["icmpv6"], 128, 129)}
"""Protocol, echo request and reply by family (RFC 792, RFC 4443)."""
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_TOKEN = struct.Struct("!8sI")
_MAGIC = b"fwc lab\0"
_ANSWER = struct.Struct("!8sIi16sH")
_ANSWERED = b"fwc got\0"
_ECHO = struct.Struct("!BBHHH")
HOST = 0
"""The place of the host itself; that of station `n` is `n + 1`."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to try: from a station, by a protocol of :data:`~fwcompiler.ports.PROTOCOLS`.

    `to`: the address it goes to, None: the host's own. `source_port`: the UDP port it comes from, 0: any.
    """

    station: int
    version: int
    protocol: str
    port: int = 0
    expected: bool = True
    to: int | None = None
    source_port: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """Where a probe came in, and from which address and port as seen there; -1 and 0 where the kernel answered by itself."""

    place: int
    source: int = -1
    port: int = 0


def fire(network: Network, probes: Sequence[Probe], waits: Sequence[float] = WAITS, also: Iterable[int] = ()) -> tuple[Arrival | None, ...]:
    """Where each probe arrived, in their order; None: nowhere. Around a router every station listens, else only the host.
    ``also``: TCP ports where somebody listens besides those that are tried, because rules redirect to them.

    What does not arrive is sent again in further rounds while a probe that is expected to arrive is missing: a busy
    machine loses packets, and slowness must not be taken for a firewall's drop.
    """
    reached: list[Arrival | None] = []
    places = _places(network)
    for batch in _batches(probes, len(places)):
        with _Range(network, places, batch, tuple(also)) as shooting:
            reached += shooting.run(waits)
    return tuple(reached)


Place = tuple[Namespace, tuple[tuple[int, int], ...]]
"""A namespace, and the addresses at which somebody listens in it."""


def _places(network: Network) -> tuple[Place, ...]:
    if network.router is None:
        return ((network.host, tuple(network.addresses.items())),)
    own = tuple(dict.fromkeys(pair for pairs in network.router.addresses.values() for pair in pairs))
    stations = zip(network.namespaces, network.stations, strict=True)
    return ((network.host, own), *((space, tuple(s.addresses.items())) for space, s in stations))


def _batches(probes: Sequence[Probe], places: int) -> Iterator[Sequence[Probe]]:
    """As many probes together as there are descriptors for: one a probe, and one in every place for each port."""
    start, ports = 0, set[tuple[int, str, int]]()
    for number, probe in enumerate(probes):
        ports |= {(probe.version, probe.protocol, probe.port)}
        if number > start and number - start + len(ports) * places > BATCH:
            yield probes[start:number]
            start, ports = number, {(probe.version, probe.protocol, probe.port)}
    if start < len(probes):
        yield probes[start:]


class _Range:
    """One batch: who listens, the stations' sockets, and what has arrived so far."""

    def __init__(self, network: Network, places: Sequence[Place], probes: Sequence[Probe], also: Sequence[int]) -> None:
        self.network, self.places, self.probes, self.also = network, places, probes, also
        self.reached: list[Arrival | None] = [None] * len(probes)
        # Echo requests of one identifier are one connection to conntrack; each probe has its own, and so has each batch.
        self._identifier = randrange(1 << 16)
        self._held = ExitStack()
        self._selector = self._held.enter_context(selectors.DefaultSelector())
        self._connecting: list[socket.socket] = []
        self._bound: dict[tuple[int, int, int], socket.socket] = {}

    def __enter__(self) -> _Range:
        families = {p.version for p in self.probes}
        wanted = sorted({(p.version, p.protocol, p.port) for p in self.probes} | {(v, "tcp", p) for v in families for p in self.also})
        try:
            for place, (namespace, addresses) in enumerate(self.places):
                with namespace.entered():
                    for version, protocol, port in wanted:
                        own = [a for v, a in addresses if v == version]
                        self._listen(place, version, protocol, port, own)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    def run(self, waits: Sequence[float]) -> list[Arrival | None]:
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

    # Who is sent to.

    def _listen(self, place: int, version: int, protocol: str, port: int, own: Sequence[int]) -> None:
        if protocol in ("icmp", "icmpv6") or not own:
            return
        if protocol not in ("udp", "tcp"):
            self._watch(self._socket(version, socket.SOCK_RAW, PROTOCOLS[protocol]), lambda s: self._arrived(place, s))
            return
        for address in own:
            if protocol == "udp":
                self._open_port(place, version, address, port)
                continue
            sock = self._socket(version, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the batch before left connections in TIME_WAIT
            sock.bind((address_text(version, address), port))
            sock.listen(128)
            self._watch(sock, lambda s: _accept(place, s))

    def _open_port(self, place: int, version: int, address: int, port: int) -> socket.socket:
        """A UDP socket at an address: the same one hears and speaks."""
        key = (version, address, port)
        if key not in self._bound:
            self._bound[key] = sock = self._socket(version, socket.SOCK_DGRAM)
            sock.bind((address_text(version, address), port))
            self._watch(sock, lambda s: self._datagrams(place, s))
        return self._bound[key]

    def _datagrams(self, place: int, sock: socket.socket) -> None:
        """A probe is answered, an answer noted."""
        for data, peer in _received(sock):
            if len(data) == _TOKEN.size and data.startswith(_MAGIC):
                with suppress(OSError):
                    sock.sendto(_answer(place, peer, _TOKEN.unpack(data)[1]), peer)
            elif len(data) == _ANSWER.size and data.startswith(_ANSWERED):
                index, arrival = _heard(data)
                self.reached[index] = arrival

    def _arrived(self, place: int, sock: socket.socket) -> None:
        """A packet of a protocol without ports came in."""
        for data, peer in _received(sock):
            body = data[(data[0] & 15) * 4 :] if sock.family == socket.AF_INET else data
            if len(body) == _TOKEN.size and body.startswith(_MAGIC):
                self.reached[_TOKEN.unpack(body)[1]] = Arrival(place, parse_address(peer[0])[1])

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
            there = (address_text(probe.version, self._target(probe)), probe.port)
            if probe.protocol == "tcp":
                self._connect(index, probe.version, there)
                continue
            if probe.source_port:
                own = self.network.stations[probe.station].addresses[probe.version]
                sock = self._open_port(probe.station + 1, probe.version, own, probe.source_port)
            else:
                key = (probe.version, probe.protocol)
                sock = shared[key] if key in shared else shared.setdefault(key, self._open(*key))
            identifier = self._identifier + index & 0xFFFF
            data = _echo_request(probe.version, identifier, index) if probe.protocol.startswith("icmp") else _TOKEN.pack(_MAGIC, index)
            with suppress(OSError):
                sock.sendto(data, there if probe.protocol == "udp" else (there[0], 0))

    def _target(self, probe: Probe) -> int:
        return self.network.addresses[probe.version] if probe.to is None else probe.to

    def _open(self, version: int, protocol: str) -> socket.socket:
        if protocol == "udp":
            sock = self._socket(version, socket.SOCK_DGRAM)
            self._watch(sock, lambda s: self._datagrams(-1, s))
        else:
            sock = self._socket(version, socket.SOCK_RAW, PROTOCOLS[protocol])
            if protocol.startswith("icmp"):
                self._watch(sock, self._answered)
        return sock

    def _answered(self, sock: socket.socket) -> None:
        version = 4 if sock.family == socket.AF_INET else 6
        for data, _ in _received(sock):
            body = data[(data[0] & 15) * 4 :] if version == 4 else data
            if len(body) == _ECHO.size + len(_MAGIC) and body.endswith(_MAGIC) and body[0] == _ICMP[version][2]:
                index = _ECHO.unpack_from(body)[4]
                to = (version, self._target(self.probes[index]))
                self.reached[index] = Arrival(next((i for i, (_, own) in enumerate(self.places) if to in own), HOST))

    def _connect(self, index: int, version: int, there: tuple[str, int]) -> None:
        sock = self._socket(version, socket.SOCK_STREAM)
        if sock.connect_ex(there) in (0, errno.EINPROGRESS):
            self._watch(sock, lambda s: self._connected(index, s))
            self._connecting.append(sock)

    def _connected(self, index: int, sock: socket.socket) -> None:
        """Whoever accepted has said where it is, or the connection failed."""
        data = b""
        with suppress(OSError):
            data = sock.recv(_ANSWER.size)
        self._selector.unregister(sock)
        self._connecting.remove(sock)
        if len(data) == _ANSWER.size:
            self.reached[index] = _heard(data)[1]
        sock.close()


def _answer(place: int, peer: tuple[str, int], index: int = 0) -> bytes:
    return _ANSWER.pack(_ANSWERED, index, place, parse_address(peer[0])[1].to_bytes(16, "big"), peer[1])


def _heard(data: bytes) -> tuple[int, Arrival]:
    _, index, place, source, port = _ANSWER.unpack(data)
    return index, Arrival(place, int.from_bytes(source, "big"), port)


def _received(sock: socket.socket) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """Everything that is waiting at a socket, and from whom."""
    with suppress(OSError):
        while True:
            data, peer = sock.recvfrom(2048)
            yield data, peer[:2]


def _accept(place: int, sock: socket.socket) -> None:
    with suppress(OSError):
        while True:
            accepted, peer = sock.accept()
            with accepted:
                accepted.send(_answer(place, peer[:2]))


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
