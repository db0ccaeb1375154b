"""Calls through an edge: real SIP and RTP between a carrier, its media gateway elsewhere, a phone, a stranger and three dialers.

Each has a network namespace of its own, and so have the edge and the two wires (`wan`, `lan`) between them. The dialers write
the public address into `Contact` and SDP, as Asterisk does with `externaddr`.
"""

from __future__ import annotations

import re
import select
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kernelspace import in_named, named_namespace, named_socket

from fwcompiler import cli
from fwcompiler.kernel import runner
from fwcompiler.registry import installed, load

USABLE = [name for name in installed() if all(runner.find(p) for p in load(name).programs)]
PUBLIC = "203.0.113.1"
OUTSIDE = {"internet": "192.0.2.66", "carrier": "198.51.100.17", "media": "192.0.2.77", "agent": "203.0.113.200"}
DIALERS = {"dialer1": "10.20.0.11", "dialer2": "10.20.0.12", "dialer3": "10.20.0.13"}
MEDIA = {"dialer1": 10000, "dialer2": 15000, "dialer3": 20000}
SIP = 5060
COMES, STAYS_AWAY = 5.0, 0.3
"""Seconds to wait for a packet that has to come, and for one that must not."""
POLICY = """version: 1
groups:
  carriers: [198.51.100.16/28]
  agents: {members: [], dynamic: {timeout: 1h, max: 64}}
hosts:
  gw: {role: edge, wan: wan0, lan: lan0, addresses: [203.0.113.1, 10.20.0.1]}
  dialer1: {role: dialer, addresses: [10.20.0.11]}
  dialer2: {role: dialer, addresses: [10.20.0.12]}
  dialer3: {role: dialer, addresses: [10.20.0.13]}
edge: {host: gw, inbound_sip: dialer1, rtp: {first: 10000, chunk: 5000}}
services:
  sip: {from: [carriers, agents, cluster]}
  rtp: {from: anywhere}
"""


@dataclass
class Telephony:
    """The network, the backend whose rules the edge has, and the sockets of a test, by who has them and their port."""

    names: Mapping[str, str]
    backend: str
    folder: Path
    sockets: dict[tuple[str, int], socket.socket] = field(default_factory=dict)

    def fwc(self, *arguments: str) -> int:
        """Run fwc for the edge."""
        common = ("--netns", self.names["edge"], "--host", "gw", "--backend", self.backend, "--state-dir", str(self.folder / "state"))
        return cli.run([*common, *arguments])

    def apply(self) -> None:
        """Put the policy into force."""
        path = self.folder / "policy.yaml"
        path.write_text(POLICY, encoding="utf-8")
        assert self.fwc("apply", str(path), "--yes", "-q") == 0

    def at(self, who: str, port: int = SIP) -> socket.socket:
        """Somebody's socket at a port."""
        if (who, port) not in self.sockets:
            self.sockets[who, port] = named_socket(self.names[who], {**OUTSIDE, **DIALERS}[who], port)
        return self.sockets[who, port]

    def send(self, who: str, message: bytes, to: tuple[str, int] = (PUBLIC, SIP), port: int = SIP) -> None:
        """One datagram."""
        self.at(who, port).sendto(message, to)

    def receive(self, who: str, port: int = SIP) -> tuple[bytes, tuple[str, int]]:
        """The next datagram of somebody who has to get one, and from where it seems to come."""
        waiting = self.at(who, port)
        assert select.select([waiting], [], [], COMES)[0], f"nothing came to {who}"
        message, peer = waiting.recvfrom(4096)
        return message, peer[:2]

    def quiet(self) -> bool:
        """True where nobody has got anything more, after a while."""
        return not select.select(list(self.sockets.values()), [], [], STAYS_AWAY)[0]

    def listen(self, port: int = SIP) -> None:
        """All dialers listen at a port."""
        for name in DIALERS:
            self.at(name, port)

    def close(self) -> None:
        """The end of a test."""
        for each in self.sockets.values():
            each.close()
        self.sockets.clear()


@contextmanager
def network() -> Iterator[dict[str, str]]:
    """The namespaces by what they stand for, wired and addressed."""
    with ExitStack() as held:
        names = {n: held.enter_context(named_namespace()) for n in (*OUTSIDE, "wan", "edge", "lan", *DIALERS)}
        settings = [f"net.ipv4.conf.{where}.{key}=0" for where in ("all", "default") for key in ("rp_filter", "send_redirects")]
        in_named(names["edge"], "sysctl", "-qw", "net.ipv4.ip_forward=1", *settings)
        for wire, who in (("wan", OUTSIDE), ("lan", DIALERS)):
            lines = ["link add br0 type bridge", "link set br0 up"]
            for end, link in (("edge", f"{wire}0"), *((name, "eth0") for name in who)):
                lines += [f"link add p-{end} type veth peer name {link} netns {names[end]}", f"link set p-{end} master br0 up"]
            batch(names[wire], *lines)
        for name, address in {**OUTSIDE, **DIALERS}.items():
            gateway = "203.0.113.1" if name in OUTSIDE else "10.20.0.1"
            route = (f"route add {gateway} dev eth0", f"route add default via {gateway}")
            batch(names[name], "link set eth0 up", "link set lo up", f"addr add {address}/32 dev eth0", *route)
        addresses = ("addr add 203.0.113.1/24 dev wan0", "addr add 10.20.0.1/24 dev lan0")
        batch(names["edge"], "link set lo up", "link set wan0 up", "link set lan0 up", *addresses, "route add default dev wan0")
        yield names


def batch(name: str, *lines: str) -> None:
    """Several `ip` commands in a namespace."""
    in_named(name, "ip", "-batch", "-", stdin="".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def wired(kernel_allowed: bool) -> Iterator[dict[str, str]]:
    """One network for all tests; each backend takes its rules out again."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    with network() as names:
        yield names


@pytest.fixture(scope="module", params=USABLE)
def ruled(request: pytest.FixtureRequest, wired: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Telephony]:
    """The network whose edge has the rules of one backend."""
    made = Telephony(wired, request.param, tmp_path_factory.mktemp("state"))
    made.apply()
    try:
        yield made
    finally:
        assert made.fwc("remove", "--yes", "-q") == 0


@pytest.fixture
def calls(ruled: Telephony) -> Iterator[Telephony]:
    """The same with no sockets left from another test."""
    try:
        yield ruled
    finally:
        ruled.close()


# Just enough of RFC 3261 for whole calls.


def request(method: str, who: str, to: str, call: str, cseq: int, *, address: str = "", port: int = SIP, media: int = 0) -> bytes:
    """A request of somebody who is known at `address`."""
    address = address or OUTSIDE.get(who, PUBLIC)
    user = to.partition("@")[0]
    heads = [
        f"{method} sip:{to} SIP/2.0",
        f"Via: SIP/2.0/UDP {address}:{port};branch=z9hG4bK-{call}-{cseq}-{method.lower()};rport",
        "Max-Forwards: 70",
        f"From: <sip:{who}@{address}>;tag={who}",
        f"To: <sip:{user if method == 'REGISTER' else to}>",
        f"Call-ID: {call}@{address}",
        f"CSeq: {cseq} {method}",
        f"Contact: <sip:{who}@{address}:{port}>",
    ]
    return whole(heads, media, address)


def response(status: str, asked: bytes, who: str, *, address: str = PUBLIC, media: int = 0) -> bytes:
    """The answer to a request: the heads by which it is recognised are copied (RFC 3261, 8.2.6)."""
    lines = asked.decode().split("\r\n")
    copied = [line for line in lines if re.match(r"(Via|From|To|Call-ID|CSeq):", line)]
    copied = [f"{line};tag={who}" if line.startswith("To:") and ";tag" not in line else line for line in copied]
    return whole([f"SIP/2.0 {status}", *copied, f"Contact: <sip:{who}@{address}:{SIP}>"], media, address)


def whole(heads: list[str], media: int, address: str) -> bytes:
    """A message with its body: an offer or answer of one stream of audio, where there is a port for it."""
    lines = ("v=0", f"o=- 1 1 IN IP4 {address}", "s=-", f"c=IN IP4 {address}", "t=0 0", f"m=audio {media} RTP/AVP 0", "")
    body = "\r\n".join(lines) if media else ""
    kind = ["Content-Type: application/sdp"] if media else []
    return "\r\n".join((*heads, *kind, f"Content-Length: {len(body)}", "", body)).encode()


def first_line(message: bytes) -> str:
    """`INVITE sip:… SIP/2.0`, `SIP/2.0 200 OK`."""
    return message.decode().split("\r\n", 1)[0]


def offered(message: bytes) -> tuple[str, int]:
    """Where the sender of an offer or answer wants its media."""
    text = message.decode()
    address, port = re.search(r"^c=IN IP4 (\S+)", text, re.M), re.search(r"^m=audio (\d+)", text, re.M)
    assert address
    assert port
    return address[1], int(port[1])


def rtp(sequence: int) -> bytes:
    """A packet of 20 ms of silence (RFC 3550, RFC 3551: payload type 0)."""
    return b"\x80\x00" + sequence.to_bytes(2, "big") + (160 * sequence).to_bytes(4, "big") + b"fwc1" + b"\xff" * 160


def talk(calls: Telephony, one: tuple[str, int], other: tuple[str, int], where: tuple[str, int], *, other_first: bool = False) -> None:
    """Media in both directions between somebody's port and a dialer's; the outer one sends to `where`, and sees the dialer there."""
    for sequence in range(3):
        ways = [(one, other, where), (other, one, (OUTSIDE[one[0]], one[1]))]
        for sender, receiver, to in reversed(ways) if other_first else ways:
            calls.send(sender[0], rtp(sequence), to, sender[1])
            packet, peer = calls.receive(*receiver)
            assert packet == rtp(sequence)
            assert peer == (where if receiver == one else to_seen(one))


def to_seen(outer: tuple[str, int]) -> tuple[str, int]:
    """Dialers see who is really calling."""
    return OUTSIDE[outer[0]], outer[1]


def test_a_call_comes_in(calls: Telephony) -> None:
    """INVITE, 100, 200, ACK, media from another address, BYE, 200: all of it between the carrier and the owner of 5060."""
    calls.listen()
    calls.listen(10500)
    gateway = ("media", 40000)
    calls.at(*gateway)
    invite = request("INVITE", "carrier", f"100@{PUBLIC}", "in1", 1, media=40000).replace(b"c=IN IP4 198.51.100.17", b"c=IN IP4 192.0.2.77")
    calls.send("carrier", invite)
    got, peer = calls.receive("dialer1")
    assert (got, peer) == (invite, (OUTSIDE["carrier"], SIP))
    assert offered(got) == (OUTSIDE["media"], 40000)
    for status, media in (("100 Trying", 0), ("200 OK", 10500)):
        calls.send("dialer1", response(status, got, "dialer1", media=media), peer)
        answer, seen = calls.receive("carrier")
        assert (first_line(answer), seen) == (f"SIP/2.0 {status}", (PUBLIC, SIP))
    assert offered(answer) == (PUBLIC, 10500)
    calls.send("carrier", request("ACK", "carrier", f"100@{PUBLIC}", "in1", 1))
    assert first_line(calls.receive("dialer1")[0]).startswith("ACK")
    talk(calls, gateway, ("dialer1", 10500), (PUBLIC, 10500))
    calls.send("carrier", request("BYE", "carrier", f"100@{PUBLIC}", "in1", 2))
    bye, peer = calls.receive("dialer1")
    calls.send("dialer1", response("200 OK", bye, "dialer1"), peer)

    assert first_line(calls.receive("carrier")[0]) == "SIP/2.0 200 OK"
    assert calls.quiet(), "the other dialers heard nothing of it"


@pytest.mark.parametrize("dialer", DIALERS)
def test_a_dialer_calls_out(calls: Telephony, dialer: str) -> None:
    """Each dialer's call: the owner's SIP leaves from 5060, that of the others from a spare port, and media from its chunk's."""
    port, gateway = MEDIA[dialer] + 4998, ("media", 40002)
    calls.at("carrier")
    calls.at(*gateway)
    calls.at(dialer, port)
    invite = request("INVITE", dialer, f"49301234@{OUTSIDE['carrier']}", f"out-{dialer}", 1, media=port)
    calls.send(dialer, invite, (OUTSIDE["carrier"], SIP))
    got, seen = calls.receive("carrier")
    assert got == invite
    assert seen[0] == PUBLIC
    assert seen[1] == SIP if dialer == "dialer1" else 61000 <= seen[1] <= 65535
    answer = response("200 OK", got, "carrier", address=OUTSIDE["media"], media=40002)
    calls.send("carrier", answer, seen)
    assert calls.receive(dialer) == (answer, (OUTSIDE["carrier"], SIP))
    calls.send(dialer, request("ACK", dialer, f"49301234@{OUTSIDE['carrier']}", f"out-{dialer}", 1), (OUTSIDE["carrier"], SIP))
    assert calls.receive("carrier")[1] == seen
    assert offered(got) == (PUBLIC, port)
    talk(calls, gateway, (dialer, port), (PUBLIC, port), other_first=True)
    calls.send("carrier", request("BYE", "carrier", f"{dialer}@{PUBLIC}", f"out-{dialer}", 2), seen)

    assert first_line(calls.receive(dialer)[0]).startswith("BYE")
    assert calls.quiet()


@pytest.mark.parametrize("dialer", DIALERS)
def test_media_of_nobody_known_comes_to_one_dialer(calls: Telephony, dialer: str) -> None:
    """RTP from an address that no list has, to the first and the last port of a chunk: that dialer gets it, and no other."""
    for port in (MEDIA[dialer], MEDIA[dialer] + 4999):
        calls.listen(port)
        calls.send("internet", rtp(1), (PUBLIC, port), 30000)
        assert calls.receive(dialer, port) == (rtp(1), (OUTSIDE["internet"], 30000))
    assert calls.quiet()


def test_a_stranger_gets_nothing(calls: Telephony) -> None:
    """Whatever a stranger says to 5060 reaches nobody, and nothing is answered; nor does it from the carrier's media address."""
    calls.listen()
    for who in ("internet", "media"):
        for method in ("INVITE", "REGISTER", "OPTIONS"):
            calls.send(who, request(method, who, f"100@{PUBLIC}", f"{method}1", 1))

    assert calls.quiet()


def test_a_phone_registers_once_it_is_named(calls: Telephony) -> None:
    """REGISTER of an agent goes unheard; after `allow` it is answered with 200, after `revoke` unheard again."""
    calls.listen()
    register = request("REGISTER", "agent", PUBLIC, "reg", 1)
    calls.send("agent", register)
    assert calls.quiet()
    assert calls.fwc("allow", "agents", OUTSIDE["agent"], "-q") == 0
    calls.send("agent", register)
    got, peer = calls.receive("dialer1")
    assert (got, peer) == (register, (OUTSIDE["agent"], SIP))
    calls.send("dialer1", response("200 OK", got, "dialer1"), peer)
    assert first_line(calls.receive("agent")[0]) == "SIP/2.0 200 OK"
    assert calls.fwc("revoke", "agents", OUTSIDE["agent"], "-q") == 0
    calls.send("agent", register)

    assert calls.quiet()


def test_a_dialer_calls_the_owner_by_the_public_address(calls: Telephony) -> None:
    """Hairpin: INVITE, 200 and ACK between two dialers that know each other by the public address only."""
    calls.listen()
    invite = request("INVITE", "dialer3", f"100@{PUBLIC}", "hairpin", 1, media=20002)
    calls.send("dialer3", invite)
    got, peer = calls.receive("dialer1")
    assert (got, peer[0]) == (invite, "10.20.0.1")
    answer = response("200 OK", got, "dialer1", media=10002)
    calls.send("dialer1", answer, peer)
    assert calls.receive("dialer3") == (answer, (PUBLIC, SIP))
    calls.send("dialer3", request("ACK", "dialer3", f"100@{PUBLIC}", "hairpin", 1))
    assert first_line(calls.receive("dialer1")[0]).startswith("ACK")
    calls.at("dialer1", 10002)
    calls.send("dialer3", rtp(1), offered(answer), 20002)

    assert calls.receive("dialer1", 10002)[0] == rtp(1)
    assert calls.quiet()


@contextmanager
def answering(calls: Telephony, who: str) -> Iterator[None]:
    """A sipp that takes one call, for the length of a block."""
    argv = ("sipp", "-sn", "uas", "-i", {**OUTSIDE, **DIALERS}[who], "-p", str(SIP), "-m", "1", "-nostdin")
    process = subprocess.Popen(
        ("ip", "netns", "exec", calls.names[who], *argv), cwd=calls.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def ring(calls: Telephony, who: str, to: str, seconds: int = 10) -> int:
    """How one call of sipp's ends, from INVITE to the answer to BYE: 0 when all went well."""
    own = {**OUTSIDE, **DIALERS}[who]
    argv = (
        "sipp",
        "-sn",
        "uac",
        "-i",
        own,
        "-p",
        str(SIP),
        "-m",
        "1",
        "-d",
        "100",
        "-nostdin",
        "-timeout",
        str(seconds),
        "-timeout_error",
        to,
    )
    in_space = ("ip", "netns", "exec", calls.names[who], *argv)
    return subprocess.run(in_space, cwd=calls.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


@pytest.mark.skipif(not shutil.which("sipp"), reason="needs sipp (package sip-tester)")
def test_a_real_sip_stack_agrees(calls: Telephony) -> None:
    """sipp completes calls from the carrier to the owner and back out; a stranger's call ends in nothing."""
    with answering(calls, "dialer1"):
        assert ring(calls, "carrier", f"{PUBLIC}:{SIP}") == 0
    with answering(calls, "carrier"):
        assert ring(calls, "dialer1", f"{OUTSIDE['carrier']}:{SIP}") == 0
    with answering(calls, "dialer1"):
        assert ring(calls, "internet", f"{PUBLIC}:{SIP}", seconds=1) != 0
