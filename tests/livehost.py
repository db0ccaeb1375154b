"""A host with peers around it, its rules applied as `fwc apply` does, and flows that go on meanwhile.

The network of namespaces is `fwcompiler.kernel.labnet`'s; nothing of the machine's own is touched.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fwcompiler import cli
from fwcompiler.addresses import address_text, parse_address
from fwcompiler.backend import Backend
from fwcompiler.kernel import runner
from fwcompiler.kernel.labnet import Network, Station, network
from fwcompiler.registry import installed, load

USABLE = [name for name in installed() if all(runner.find(p) for p in load(name).programs)]
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

HOST = {4: parse_address("198.18.0.1")[1], 6: parse_address("2001:2::1")[1]}
PEERS = {
    name: {4: parse_address(f"192.0.2.{n}")[1], 6: parse_address(f"2001:db8::{n}")[1]}
    for n, name in enumerate(("one", "two", "stranger"), 1)
}


@dataclass
class Host:
    """A host that a policy is applied to again and again, with three stations: `one`, `two` and `stranger`."""

    net: Network
    backend: Backend
    folder: Path
    sockets: list[socket.socket] = field(default_factory=list)

    def apply(self, text: str) -> None:
        """Put a policy into force as `fwc apply` does."""
        path = self.folder / "policy.yaml"
        path.write_text(f"version: 1\n{text}", encoding="utf-8")
        self.fwc("apply", str(path), "--yes")

    def fwc(self, *arguments: str) -> None:
        """Run a command on this host; it has to succeed."""
        with self.net.host.entered():
            assert cli.run([*arguments, "-q", "--backend", self.backend.name, "--state-dir", str(self.folder / "state")]) == 0

    def socket(self, who: str, version: int, kind: int, protocol: int = 0, port: int = 0) -> socket.socket:
        """A socket of the host or of a station, bound to its address; closed with the test."""
        place, addresses = (self.net.host, HOST) if who == "host" else (self.net.namespaces[list(PEERS).index(who)], PEERS[who])
        with place.entered():
            made = socket.socket(FAMILY[version], kind, protocol)
        self.sockets.append(made)
        made.settimeout(2)
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address_text(version, addresses[version]), port))
        return made

    def udp(self, who: str, version: int, port: int) -> Flow:
        """A UDP flow from a station to a port of the host, up and running in both directions."""
        server = self.socket("host", version, socket.SOCK_DGRAM, port=port)
        client = self.socket(who, version, socket.SOCK_DGRAM)
        client.connect(server.getsockname()[:2])
        server.connect(client.getsockname()[:2])
        return Flow(client, server)

    def tcp(self, who: str, version: int, port: int) -> Flow:
        """A TCP connection from a station to a port of the host."""
        listener = self.socket("host", version, socket.SOCK_STREAM, port=port)
        listener.listen()
        client = self.socket(who, version, socket.SOCK_STREAM)
        client.connect(listener.getsockname()[:2])
        server, _ = listener.accept()
        self.sockets.append(server)
        server.settimeout(2)
        listener.close()
        return Flow(client, server)


@dataclass(frozen=True)
class Flow:
    """Both ends of an established flow."""

    client: socket.socket
    server: socket.socket

    def both_ways(self) -> None:
        """Three exchanges: conntrack calls it established, and sees replies."""
        for n in range(3):
            self.client.send(f"{n}".encode())
            assert self.arrives(f"{n}".encode())
            self.server.send(f"re {n}".encode())
            assert self.client.recv(100) == f"re {n}".encode()

    def arrives(self, text: bytes, wait: float = 2) -> bool:
        """Whether the host's end receives this next."""
        self.server.settimeout(wait)
        try:
            return self.server.recv(100) == text
        except TimeoutError:
            return False


@contextmanager
def live_host(backend: Backend, folder: Path) -> Iterator[Host]:
    """A host without any rules yet; its sockets are closed behind it."""
    with network(HOST, [Station(addresses) for addresses in PEERS.values()]) as net:
        made = Host(net, backend, folder)
        try:
            yield made
        finally:
            for each in made.sockets:
                each.close()


def policy(*members: str, rest: str = "") -> str:
    """Peers by name, who may use sip and wss; rtp is open to anywhere."""
    services = f"services:\n  sip: {{from: [peers]}}\n  wss: {{from: [peers]}}\n  rtp: {{from: anywhere}}\n{rest}"
    return f"groups: {{peers: [{listed(*members)}]}}\n{services}"


def listed(*members: str) -> str:
    """The addresses of stations, for a policy."""
    return ", ".join(f"'{address_text(v, a)}'" for name in members for v, a in PEERS[name].items())


@dataclass
class Sent:
    """What a sender sent and what came in at the other end."""

    count: int = 0
    received: set[bytes] = field(default_factory=set)

    def lost(self) -> list[bytes]:
        """What did not arrive."""
        return [text for n in range(self.count) if (text := str(n).encode()) not in self.received]


@contextmanager
def traffic(flow: Flow) -> Iterator[Sent]:
    """Packets on a flow for the length of a block, by threads; all of them are collected by its end."""
    sent, stop = Sent(), threading.Event()
    flow.server.settimeout(0.5)

    def send() -> None:
        while not stop.wait(0.001):
            flow.client.send(str(sent.count).encode())
            sent.count += 1

    def receive() -> None:
        with suppress(TimeoutError):
            while True:
                sent.received.add(flow.server.recv(100))

    threads = [threading.Thread(target=each) for each in (send, receive)]
    for each in threads:
        each.start()
    try:
        yield sent
    finally:
        stop.set()
        for each in threads:
            each.join()


SENDER = """
import os, socket, sys, time
sock, there, first = socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3])
burst, pause = int(sys.argv[4]), float(sys.argv[5])
os.set_blocking(0, False)
count = 0
while count < 60000:
    for count in range(count, count + burst):
        sock.sendto(b"%d" % count, (there, first + count % 9900))
    count += 1
    time.sleep(pause)
    try:
        if not os.read(0, 1):
            break
    except BlockingIOError:
        pass
print(count)
"""
"""Sends numbers, each to another port and so as a new connection, until its standard input ends; then says how many."""


@contextmanager
def newcomers(host: Host, who: str, first: int, *, burst: int = 20, pause: float = 0.0005) -> Iterator[Sent]:
    """New connections to the ports from `first` on, by a process of their own: they are dense while this one is busy.

    `burst` of them, then a `pause` in seconds, up to 60,000.
    """
    source = host.socket(who, 4, socket.SOCK_DGRAM)
    ears = host.socket("host", 4, socket.SOCK_RAW, socket.IPPROTO_UDP)
    ears.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE: room for all of them
    there = address_text(4, HOST[4])
    source.sendto(b"first", (there, first))  # the neighbours get to know each other
    assert ears.recv(100)[28:] == b"first"
    command = (sys.executable, "-S", "-c", SENDER, str(source.fileno()), there, str(first), str(burst), str(pause))
    sent = Sent()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[source.fileno()]) as process:
        assert ears.recv(100)[28:] == b"0"
        sent.received.add(b"0")
        yield sent
        sent.count = int(process.communicate()[0])
    ears.settimeout(0.3)
    with suppress(TimeoutError):
        while True:
            sent.received.add(ears.recv(100)[28:])
