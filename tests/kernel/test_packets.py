"""Real packets through real rules, on every backend: they fare as the policy's meaning says, also while rules change.

Every test builds a network of namespaces of its own (`fwcompiler.kernel.labnet`); nothing of the machine's is touched.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cases.loader import all_cases, load_case
from livehost import FAMILY, HOST, PEERS, USABLE, Host, live_host, policy, traffic

from fwcompiler.addresses import address_text, covers
from fwcompiler.backend import Backend
from fwcompiler.kernel import runner
from fwcompiler.kernel.labnet import network
from fwcompiler.kernel.netns import Namespace
from fwcompiler.lab import Outcome, try_packets
from fwcompiler.lab_edge import plan_edge_lab
from fwcompiler.lab_plan import UNUSABLE, Client, plan_lab
from fwcompiler.pipeline import compile_policy
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.meaning import clauses
from fwcompiler.registry import load
from fwcompiler.ruleset import State

WAITS = (0.15, 0.4, 0.8, 1.5)


@pytest.fixture(autouse=True)
def kernel(kernel_allowed: bool) -> None:
    """Skips where this user may not make network namespaces."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend whose programs are here."""
    return load(request.param)


@pytest.fixture
def host(backend: Backend, tmp_path: Path) -> Iterator[Host]:
    """A host without any rules yet."""
    with live_host(backend, tmp_path) as made:
        yield made


both_families = pytest.mark.parametrize("version", [4, 6])


class TestMatrix:
    """Every scenario, from its clients and from the sources its packets name."""

    @pytest.mark.parametrize("path", all_cases(), ids=lambda path: path.stem)
    def test_case(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """UDP, TCP, ICMP and VRRP over IPv4 and IPv6 reach the host exactly where the meaning accepts them, the same on all backends."""
        case = load_case(path)
        case.write_inputs(tmp_path)
        monkeypatch.chdir(tmp_path)
        compiled = compile_policy("policy.yaml", host=case.host)
        sources = dict.fromkeys((p.version, p.source) for p in case.packets if not p.leaving and not covers(UNUSABLE[p.version], p.source))
        clients = [Client(address_text(v, a), {v: a}) for v, a in sources]
        planned = plan_edge_lab(compiled.resolved) if compiled.resolved.edge else plan_lab(compiled.resolved, clients)
        wrong: dict[str, list[str]] = {}
        for name in USABLE:
            # A network each: connections that an edge has sent on stay what they are.
            with network(planned.host, planned.stations, planned.router) as net:
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
