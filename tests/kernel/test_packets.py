"""Real packets through real rules, on every backend: they fare as the policy's meaning says, also while rules change.

Every test builds a network of namespaces of its own (`fwcompiler.kernel.labnet`); nothing of the machine's is touched.
"""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cases.loader import all_cases, load_case

from fwcompiler import cli
from fwcompiler.addresses import address_text, covers, parse_address
from fwcompiler.backend import Backend
from fwcompiler.kernel import runner
from fwcompiler.kernel.labnet import Network, Station, network
from fwcompiler.kernel.netns import Namespace
from fwcompiler.lab import UNUSABLE, Client, Outcome, plan_lab, try_packets
from fwcompiler.pipeline import compile_policy
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.meaning import clauses
from fwcompiler.registry import installed, load
from fwcompiler.ruleset import State

USABLE = [name for name in installed() if all(runner.find(p) for p in load(name).programs)]
WAITS = (0.15, 0.4, 0.8, 1.5)
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

HOST = {4: parse_address("198.18.0.1")[1], 6: parse_address("2001:2::1")[1]}
PEERS = {
    name: {4: parse_address(f"192.0.2.{n}")[1], 6: parse_address(f"2001:db8::{n}")[1]}
    for n, name in enumerate(("one", "two", "stranger"), 1)
}


@pytest.fixture(autouse=True)
def kernel(kernel_allowed: bool) -> None:
    """Skips where this user may not make network namespaces."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend whose programs are here."""
    return load(request.param)


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
        with self.net.host.entered():
            assert (
                cli.run(["apply", str(path), "--yes", "-q", "--backend", self.backend.name, "--state-dir", str(self.folder / "state")]) == 0
            )

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


@pytest.fixture
def host(backend: Backend, tmp_path: Path) -> Iterator[Host]:
    """A host without any rules yet."""
    with network(HOST, [Station(addresses) for addresses in PEERS.values()]) as net:
        made = Host(net, backend, tmp_path)
        try:
            yield made
        finally:
            for each in made.sockets:
                each.close()


both_families = pytest.mark.parametrize("version", [4, 6])


def policy(*members: str, rest: str = "") -> str:
    """Peers by name, who may use sip and wss; rtp is open to anywhere."""
    services = f"services:\n  sip: {{from: [peers]}}\n  wss: {{from: [peers]}}\n  rtp: {{from: anywhere}}\n{rest}"
    return f"groups: {{peers: [{listed(*members)}]}}\n{services}"


def listed(*members: str) -> str:
    """The addresses of stations, for a policy."""
    return ", ".join(f"'{address_text(v, a)}'" for name in members for v, a in PEERS[name].items())


class TestMatrix:
    """Every scenario, from its clients and from the sources its packets name."""

    @pytest.mark.parametrize("path", all_cases(), ids=lambda path: path.stem)
    def test_case(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """UDP, TCP, ICMP and VRRP over IPv4 and IPv6 reach the host exactly where the meaning accepts them, the same on all backends."""
        case = load_case(path)
        case.write_inputs(tmp_path)
        monkeypatch.chdir(tmp_path)
        compiled = compile_policy("policy.yaml")
        sources = dict.fromkeys((p.version, p.source) for p in case.packets if not covers(UNUSABLE[p.version], p.source))
        planned = plan_lab(compiled.resolved, [Client(address_text(v, a), {v: a}) for v, a in sources])
        wrong: dict[str, list[str]] = {}
        with network(planned.host, planned.stations) as net:
            for name in USABLE:
                with loaded(load(name), net.host, compiled.ruleset):
                    outcomes = try_packets(compiled.resolved, planned, net, WAITS)
                wrong[name] = [told(o) for o in outcomes if not o.agrees]

        assert {name: [] for name in USABLE} == wrong
        assert len(planned.trials) > 0


@contextmanager
def loaded(backend: Backend, namespace: Namespace, ruleset: object) -> Iterator[None]:
    """Rules for the length of a block; afterwards nothing of ours is there."""
    with namespace.entered():
        runner.execute(backend.load(ruleset))  # type: ignore[arg-type]
    yield
    with namespace.entered():
        runner.execute(backend.remove(backend.parse(runner.outputs(backend.listing()))))
        assert not backend.parse(runner.outputs(backend.listing()))


def told(outcome: Outcome) -> str:
    """One outcome, for a failing test."""
    source = address_text(outcome.trial.version, outcome.trial.packet.source)
    verdict = "reached" if outcome.reached else "dropped"
    return f"{outcome.trial.client.name} {source} -> {outcome.trial.target.text(outcome.trial.version)} {verdict}: {outcome.reason}"


class TestRemoval:
    """Who is taken out of a group is cut off at once; who stays notices nothing."""

    @both_families
    def test_udp(self, host: Host, version: int) -> None:
        """The next packet of an established SIP flow no longer arrives, though the host itself keeps sending to the peer."""
        host.apply(policy("one", "two"))
        removed = host.udp("one", version, 5060)
        removed.both_ways()
        host.apply(policy("two"))

        removed.client.send(b"next")
        assert not removed.arrives(b"next", 0.3)
        removed.server.send(b"qualify")  # as Asterisk does; it opens the flow again from our side
        assert removed.client.recv(100) == b"qualify"
        removed.client.send(b"answer")
        assert not removed.arrives(b"answer", 0.3)

    @both_families
    def test_tcp(self, host: Host, version: int) -> None:
        """Data on an established connection to a restricted service no longer arrives."""
        host.apply(policy("one", "two"))
        removed = host.tcp("one", version, 8089)
        removed.both_ways()
        host.apply(policy("two"))

        removed.client.send(b"next")
        assert not removed.arrives(b"next", 0.5)

    @both_families
    def test_remaining_peer(self, host: Host, version: int) -> None:
        """Of the flows of a peer that stays, SIP and a TCP connection, no packet is lost while the other is removed and put back."""
        host.apply(policy("one", "two"))
        sip, wss = host.udp("two", version, 5060), host.tcp("two", version, 8089)
        sip.both_ways()
        wss.both_ways()
        with traffic(sip) as sent:
            for members in (("two",), ("one", "two"), ("two",)):
                host.apply(policy(*members))

        assert sent.lost() == []
        wss.client.send(b"still here")
        assert wss.arrives(b"still here")

    @both_families
    def test_blocked(self, host: Host, version: int) -> None:
        """A source that is put on the block list loses its established flow to a public service too."""
        host.apply(policy("two"))
        flow = host.udp("stranger", version, 12000)
        flow.both_ways()
        bad = address_text(version, PEERS["stranger"][version])
        host.apply(policy("two", rest="block: {from: [bad]}\n").replace("groups: {", f"groups: {{bad: ['{bad}'], "))

        flow.client.send(b"next")
        assert not flow.arrives(b"next", 0.3)


class TestApply:
    """Flows go on while rules change under them."""

    @both_families
    def test_rtp(self, host: Host, version: int) -> None:
        """An established RTP flow of a stranger loses no packet in four applies: sets, services and the block list change."""
        host.apply(policy("one"))
        flow = host.udp("stranger", version, 12000)
        flow.both_ways()
        changes = [
            policy("one", "two"),
            policy("one", "two", rest="  https: {from: anywhere}\n"),
            policy("one", rest="block: {from: [bad]}\n").replace("groups: {", "groups: {bad: [203.0.113.9, '2001:db8:bad::/48'], "),
            policy("one"),
        ]
        with traffic(flow) as sent:
            for text in changes:
                host.apply(text)

        assert sent.lost() == []
        assert sent.count > 100

    @pytest.mark.parametrize(("who", "first"), [("stranger", 10000), ("two", 30000)])
    def test_new_flows(self, host: Host, who: str, first: int) -> None:
        """New connections are not lost at any moment of an apply: a stranger's to a public service, a staying peer's to a restricted one.

        A packet can be half-way through the old rules when the new ones come into force (nftables: an anonymous map
        is emptied under it). So there are 25,000 packets a second and a dozen applies, with sets and services changing.
        """
        trunks, https = "  trunks: {ports: [udp/30000-39999], from: [peers]}\n", "  https: {from: anywhere}\n"
        host.apply(policy("two", rest=trunks))
        with newcomers(host, who, first) as sent:
            for _ in range(4):
                host.apply(policy("one", "two", rest=trunks))
                host.apply(policy("one", "two", rest=trunks + https))
                host.apply(policy("two", rest=trunks))

        assert sent.lost() == []
        assert sent.count > 1000

    @both_families
    def test_answer_to_the_hosts_own_question(self, host: Host, version: int) -> None:
        """A time server outside the cluster answers the host, which asks from the very port that it serves the cluster at."""
        host.apply(f"groups: {{cluster: [{listed('one')}]}}\nservices: {{ntp: {{from: [cluster]}}}}\n")
        asking = host.socket("host", version, socket.SOCK_DGRAM, port=123)
        server = host.socket("stranger", version, socket.SOCK_DGRAM, port=123)
        asking.sendto(b"time?", server.getsockname()[:2])
        question, peer = server.recvfrom(100)
        server.sendto(b"now", peer)

        assert question == b"time?"
        assert asking.recv(100) == b"now"


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
os.set_blocking(0, False)
count = 0
while count < 60000:
    for count in range(count, count + 20):
        sock.sendto(b"%d" % count, (there, first + count % 9900))
    count += 1
    time.sleep(0.0005)
    try:
        if not os.read(0, 1):
            break
    except BlockingIOError:
        pass
print(count)
"""
"""Sends numbers, each to another port and so as a new connection, until its standard input ends; then says how many."""


@contextmanager
def newcomers(host: Host, who: str, first: int) -> Iterator[Sent]:
    """New connections to the ports from `first` on, by a process of their own: they are dense while this one is busy."""
    source = host.socket(who, 4, socket.SOCK_DGRAM)
    ears = host.socket("host", 4, socket.SOCK_RAW, socket.IPPROTO_UDP)
    ears.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE: room for all of them
    there = address_text(4, HOST[4])
    source.sendto(b"first", (there, first))  # the neighbours get to know each other
    assert ears.recv(100)[28:] == b"first"
    command = (sys.executable, "-S", "-c", SENDER, str(source.fileno()), there, str(first))
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


class TestIcmp:
    """What a host needs of ICMP and ICMPv6 gets in, and a flood of pings does not."""

    @both_families
    def test_every_type(self, host: Host, version: int) -> None:
        """All 256 types fare as the meaning says, given what conntrack makes of a message that nobody asked for."""
        host.apply(policy("one"))
        compiled = compile_policy(str(host.folder / "policy.yaml"))
        meaning, protocol = clauses(compiled.resolved), PROTOCOLS["icmp" if version == 4 else "icmpv6"]
        expected = {}
        for kind in range(256):
            packet = Packet(version, PEERS["stranger"][version], protocol, icmp_type=kind, state=unasked(version, kind))
            expected[kind] = next(c for c in meaning if c.holds(packet)).verdict == "accept"
        ears = host.socket("host", version, socket.SOCK_RAW, protocol)
        mouth = host.socket("stranger", version, socket.SOCK_RAW, protocol)
        for kind in range(256):
            mouth.sendto(icmp(version, kind, kind), (address_text(version, HOST[version]), 0))
        time.sleep(0.1)

        assert {k for k, accepted in expected.items() if accepted} == set(heard(ears, version))

    @both_families
    def test_ping(self, host: Host, version: int) -> None:
        """A ping is answered; of 300 at once some are, by the limit of 20 a second after a burst of 40, and later one is again."""
        host.apply(policy("one"))
        protocol, request, reply = (1, 8, 0) if version == 4 else (58, 128, 129)
        sock = host.socket("stranger", version, socket.SOCK_RAW, protocol)
        there = (address_text(version, HOST[version]), 0)
        started = time.monotonic()
        for n in range(300):
            sock.sendto(icmp(version, request, n), there)
        time.sleep(0.05)
        answered = heard(sock, version).count(reply)
        allowed = 40 + 20 * (time.monotonic() - started)

        assert 20 <= answered <= allowed + 1
        time.sleep(0.3)
        sock.sendto(icmp(version, request, 300), there)
        time.sleep(0.1)
        assert reply in heard(sock, version)

    @both_families
    def test_path_mtu(self, host: Host, version: int) -> None:
        """A router's `fragmentation needed` or `packet too big` about the host's own packet reaches it, and it sends smaller ones."""
        host.apply(policy("one"))
        sender = host.socket("host", version, socket.SOCK_DGRAM, port=12000)
        discover, level = (10, socket.IPPROTO_IP) if version == 4 else (23, socket.IPPROTO_IPV6)  # IP_MTU_DISCOVER, IPV6_MTU_DISCOVER
        sender.setsockopt(level, discover, 2)
        peer = host.socket("one", version, socket.SOCK_DGRAM)
        sender.connect(peer.getsockname()[:2])
        sender.send(bytes(1400))
        assert len(peer.recv(2000)) == 1400
        raw = host.socket("one", version, socket.SOCK_RAW, 1 if version == 4 else 58)
        raw.sendto(too_big(version, 1300, sender, peer), (address_text(version, HOST[version]), 0))
        time.sleep(0.1)

        with suppress(OSError):
            sender.send(b"")  # takes the error that came in
        with pytest.raises(OSError, match="Message too long") as refused:
            sender.send(bytes(1400))
        assert refused.value.errno == errno.EMSGSIZE
        sender.send(bytes(1200))
        assert len([n for n in sizes(peer) if n == 1200]) == 1

    def test_neighbours(self, host: Host) -> None:
        """IPv6 neighbour discovery works both ways: the host answers solicitations, and hears the answers to its own."""
        host.apply(policy("one"))
        for who, port in (("one", 5060), ("stranger", 12000)):
            server = host.socket("host", 6, socket.SOCK_DGRAM, port=port)
            client = host.socket(who, 6, socket.SOCK_DGRAM)
            server.sendto(b"hello", client.getsockname()[:2])
            assert client.recv(100) == b"hello"
        with host.net.namespaces[1].entered():
            fresh = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        host.sockets.append(fresh)
        fresh.sendto(b"hello", (address_text(6, HOST[6]), 12000))
        assert server.recv(100) == b"hello"


def unasked(version: int, kind: int) -> State:
    """The state that conntrack gives to an ICMP message out of the blue (nf_conntrack_proto_icmp.c, nf_conntrack_proto_icmpv6.c)."""
    if version == 4:
        return "new" if kind in (8, 13, 15, 17) else "invalid"
    if 130 <= kind <= 137 or kind == 143:
        return "untracked"
    return "new" if kind in (128, 139) else "invalid"


def icmp(version: int, kind: int, number: int, rest: bytes = b"fwc packet tests") -> bytes:
    """A message of 24 bytes; ICMPv6's checksum is the kernel's business."""
    plain = struct.pack("!BBHHH", kind, 0, 0, number, 1) + rest
    return plain if version == 6 else with_checksum(plain)


def with_checksum(plain: bytes) -> bytes:
    """An ICMP message with its checksum in place (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(plain) // 2}H", plain))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return plain[:2] + struct.pack("!H", ~total & 0xFFFF) + plain[4:]


def heard(sock: socket.socket, version: int) -> list[int]:
    """The ICMP types waiting at a raw socket."""
    types = []
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            data = sock.recv(2000)
            types.append(data[(data[0] & 15) * 4] if version == 4 else data[0])
    return types


def sizes(sock: socket.socket) -> list[int]:
    """The lengths of all datagrams waiting at a socket."""
    found = []
    sock.settimeout(0.2)
    with suppress(TimeoutError):
        while True:
            found.append(len(sock.recv(2000)))
    return found


def too_big(version: int, mtu: int, sender: socket.socket, peer: socket.socket) -> bytes:
    """What a router says about a datagram of the sender's that was too long for the next link (RFC 1191, RFC 4443)."""
    udp = struct.pack("!HHHH", sender.getsockname()[1], peer.getsockname()[1], 1408, 0) + bytes(8)
    ends: Mapping[int, bytes] = {
        v: socket.inet_pton(FAMILY[v], sender.getsockname()[0]) + socket.inet_pton(FAMILY[v], peer.getsockname()[0]) for v in (version,)
    }
    if version == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 1428, 1, 0x4000, 64, 17, 0) + ends[4]
        return with_checksum(struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + header + udp)
    return struct.pack("!BBHI", 2, 0, 0, mtu) + struct.pack("!IHBB", 0x60000000, 1408, 17, 64) + ends[6] + udp
