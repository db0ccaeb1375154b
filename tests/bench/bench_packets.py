"""What a packet costs behind compiled rules, beside no firewall and hand-written rules of the same meaning, in one run.

    python tests/bench/bench_packets.py [--networks 1000,10000] [--rounds 15] [--packets 20000]
                                        [--backends nftables,iptables-nft,iptables-legacy] [--bypass no,yes]

A thread writes frames into one end of a veth pair with sendmmsg(2), and the kernel receives them at the other end in the same
thread's time, or in that of ksoftirqd of the same CPU: the figure is the CPU time of both for a packet, sending included, which is
the same for all. Every ruleset has a host of its own, and everybody takes a turn in each round, in random order; ratios to no firewall
are taken round by round. What arrives is counted at the host's sockets, so that rules that do something else have no figure;
that hand-written rules mean what the policy means is shown by `fwc diff --against` first. Needs root; all of it is in namespaces
of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import handwritten
from bench_apply import FWC

from fwcompiler.kernel.labnet import Station, link_address, network
from fwcompiler.kernel.netns import Namespace
from fwcompiler.pipeline import compile_policy
from fwcompiler.registry import load

HOST, PEER = "198.18.0.1", "198.18.0.2"
SIP, RTP, HTTPS = 5060, 12000, 443
BATCH = 64
BARE = "no firewall"
_PACKET, _QDISC_BYPASS = 263, 20  # SOL_PACKET, PACKET_QDISC_BYPASS: linux/if_packet.h


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """``struct mmsghdr`` of sendmmsg(2)."""

    _fields_ = (
        *(("name", ctypes.c_void_p), ("name_length", ctypes.c_uint32), ("vectors", ctypes.POINTER(_Vector))),
        *(("count", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t)),
        *(("flags", ctypes.c_int), ("sent", ctypes.c_uint32)),
    )


_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class Frames:
    """Frames that are sent over and over, whether rules let them in, and whom the host answers first, so that flows are established."""

    name: str
    frames: Sequence[bytes]
    accepted: bool
    answered: Sequence[tuple[str, int]] = ()
    memory: list[object] = field(default_factory=list)

    def messages(self) -> ctypes.Array[_Message]:
        """The frames as sendmmsg takes them."""
        found = (_Message * len(self.frames))()
        for message, frame in zip(found, self.frames, strict=True):
            buffer = ctypes.create_string_buffer(frame, len(frame))
            vector = _Vector(ctypes.addressof(buffer), len(frame))
            self.memory += [buffer, vector]
            message.vectors, message.count = ctypes.pointer(vector), 1
        return found


def udp_frame(source: int, source_port: int, port: int) -> bytes:
    """An Ethernet frame with 160 bytes of UDP payload, as a packet of G.711 has."""
    body = struct.pack("!HHHH", source_port, port, 168, 0) + bytes(160)
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 188, 0, 0, 64, 17, 0, source.to_bytes(4, "big"), socket.inet_aton(HOST))
    total = sum(struct.unpack("!10H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    link = bytes.fromhex(link_address(0).replace(":", "")) + bytes(6) + b"\x08\x00"
    return link + head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:] + body


@dataclass
class Wire:
    """A host and a peer on one wire; the sender's socket, the host's socket for media."""

    host: Namespace
    sender: socket.socket
    media: socket.socket

    def send(self, messages: ctypes.Array[_Message], count: int) -> float:
        """Send so many frames; nanoseconds of CPU for each, the receiving included."""
        descriptor, done = self.sender.fileno(), 0
        before = time.thread_time_ns() + softirq_time()
        while done < count:
            done += max(_LIBC.sendmmsg(descriptor, messages, BATCH, 0), 0)
        return (time.thread_time_ns() + softirq_time() - before) / done

    def received(self) -> int:
        """UDP packets that came to a socket of the host, whether it had room or not."""
        with self.host.entered():
            lines = [line.split() for line in Path("/proc/thread-self/net/snmp").read_text(encoding="ascii").splitlines() if "Udp:" in line]
        figures = dict(zip(lines[0][1:], map(int, lines[1][1:]), strict=True))
        return figures["InDatagrams"] + figures["InErrors"]


def pin() -> None:
    """Stay on the last CPU, and know the kernel thread that receives there what is left over."""
    cpu = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    for path in Path("/proc").glob("[0-9]*/comm"):
        if path.read_text(encoding="utf-8").strip() == f"ksoftirqd/{cpu}":
            _softirq.append(path.with_name("schedstat"))


_softirq: list[Path] = []


def softirq_time() -> int:
    """Nanoseconds that this CPU's ksoftirqd has run."""
    return sum(int(path.read_text(encoding="ascii").split()[0]) for path in _softirq)


def run(namespace: Namespace, *argv: str, stdin: str = "") -> str:
    """A program inside a namespace; it has to succeed."""
    with namespace.entered():
        ran = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(argv)}: {ran.stderr}")
    return ran.stdout


@contextmanager
def wire() -> Iterator[Wire]:
    """A host and a peer, each in a namespace, for the length of a block.

    The host's sockets hardly hold a packet, so that all packets that are let in cost the same there.
    """
    address = {4: int.from_bytes(socket.inet_aton(HOST), "big")}
    with ExitStack() as held:
        net = held.enter_context(network(address, [Station({4: int.from_bytes(socket.inet_aton(PEER), "big")})]))
        run(net.host, "ip", "route", "add", "default", "via", PEER, "dev", "eth0", "onlink")
        with net.namespaces[0].entered():
            sender = held.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            sender.bind(("eth0", 0))
        sender.setsockopt(_PACKET, _QDISC_BYPASS, 1)
        ears = {}
        for port in (SIP, RTP, HTTPS):
            with net.host.entered():
                ears[port] = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            ears[port].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            ears[port].bind((HOST, port))
        yield Wire(net.host, sender, ears[RTP])


def ranges(count: int, first: int, draw: random.Random) -> list[str]:
    """Networks apart from each other, as lists of carriers and of the blocked have them."""
    starts = ((first + i * 1024 + draw.randrange(3) * 256).to_bytes(4, "big") for i in range(count))
    return [f"{socket.inet_ntoa(start)}/{draw.choice((24, 28, 32))}" for start in starts]


Loader = Callable[[Wire], None]


@dataclass(frozen=True)
class Rules:
    """A ruleset by name: how it is loaded, and, of hand-written ones, the commands that list it."""

    load: Loader
    listing: tuple[tuple[str, ...], ...] = ()


def nft_loader(text: str) -> Loader:
    """Through `nft -f`."""
    return lambda net: void(run(net.host, "nft", "-f", "-", stdin=text))


def iptables_loader(variant: str, files: Mapping[str, str]) -> Loader:
    """Through `ipset restore` and `iptables-restore`."""

    def loaded(net: Wire) -> None:
        run(net.host, "ipset", "restore", stdin=files["ipset"])
        for version, program in (("4", "iptables"), ("6", "ip6tables")):
            run(net.host, f"{program}-{variant}-restore", "--noflush", stdin=files[version])

    return loaded


def void(_: object) -> None:
    """Nothing."""


def rulesets(backend: str, policy: Path, carriers: Sequence[str], bad: Sequence[str], *, bypass: bool) -> dict[str, Rules]:
    """What is compared, by name."""
    ruleset = compile_policy(str(policy)).ruleset
    files = load(backend).render(ruleset).files
    found = {BARE: Rules(lambda _: None)}
    if backend == "nftables":
        listing = (("nft", "-j", "list", "ruleset"),)
        shapes = handwritten.nft(carriers, bad, bypass=bypass).items()
        found |= {f"by hand, {name}": Rules(nft_loader(text), listing) for name, text in shapes}
        return {**found, "fwc": Rules(nft_loader("".join(files.values())))}
    variant = backend.removeprefix("iptables-")
    listing = ((f"iptables-{variant}-save",), (f"ip6tables-{variant}-save",), ("ipset", "save"))
    hand = handwritten.iptables(carriers, bad, bypass=bypass).items()
    found |= {f"by hand, {name}": Rules(iptables_loader(variant, texts), listing) for name, texts in hand}
    ours = {"ipset": files["fwc.ipset"], "4": files["fwc.v4"], "6": files["fwc.v6"]}
    return {**found, "fwc": Rules(iptables_loader(variant, ours))}


def check_meaning(net: Wire, name: str, rules: Rules, policy: Path) -> None:
    """Compare hand-written rules with the policy.

    Raises:
        SystemExit: they do not mean the same, so that a figure would say nothing.
    """
    options: list[str] = []
    for n, command in enumerate(rules.listing):
        path = policy.with_name(f"listing{n}")
        path.write_text(run(net.host, *command), encoding="utf-8")
        options += ["--against", str(path)]
    if options:
        ran = subprocess.run([str(FWC), "diff", str(policy), *options], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(f"{name} does not mean what the policy means\n{ran.stdout}{ran.stderr}")


def kinds(carriers: Sequence[str], bad: Sequence[str]) -> list[Frames]:
    """The packets that a dialer lives on, and those that it is flooded with."""
    last = int.from_bytes(socket.inet_aton(carriers[-1].split("/")[0]), "big")
    blocked = int.from_bytes(socket.inet_aton(bad[-1].split("/")[0]), "big")
    stranger = 0x0B000000
    answered = [(carriers[-1].split("/")[0], 20000 + i) for i in range(BATCH)]
    return [
        Frames("SIP from the last carrier", [udp_frame(last, 5060 + i, SIP) for i in range(BATCH)], accepted=True),
        Frames("RTP, established", [udp_frame(last, 20000 + i, RTP) for i in range(BATCH)], accepted=True, answered=answered),
        Frames("RTP from a stranger", [udp_frame(stranger + i * 257, 30000 + i, RTP) for i in range(BATCH)], accepted=True),
        Frames("SIP from strangers, dropped", [udp_frame(stranger + i * 257, 5060, SIP) for i in range(BATCH)], accepted=False),
        Frames("SIP from a blocked source", [udp_frame(blocked, 5060 + i, SIP) for i in range(BATCH)], accepted=False),
    ]


def measure(net: Wire, each: Frames, messages: ctypes.Array[_Message], count: int, *, bare: bool) -> float:
    """One figure.

    Raises:
        SystemExit: the packets did not fare as the rules say, so the figure would mean nothing.
    """
    net.send(messages, BATCH * 4)
    for answer in each.answered:
        net.media.sendto(b"answer", answer)
    before = net.received()
    cost = net.send(messages, count)
    time.sleep(0.001)  # the last ones may wait for ksoftirqd
    arrived = (net.received() - before) / (-(-count // BATCH) * BATCH)
    wanted = 1.0 if each.accepted or bare else 0.0
    if abs(arrived - wanted) > 0.02:
        raise SystemExit(f"{each.name}: {arrived:.2f} of the packets arrived instead of {wanted}")
    return cost


def compare(backend: str, count: int, *, bypass: bool, rounds: int, packets: int) -> None:
    """All kinds of packets behind all rulesets of one backend; prints a table for each."""
    draw = random.Random(1)
    carriers, bad = ranges(count, 0x14000000, draw), ranges(count, 0x40000000, draw)
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        (folder / "carriers.txt").write_text("\n".join(carriers), encoding="ascii")
        (folder / "bad.txt").write_text("\n".join(bad), encoding="ascii")
        policy = folder / "policy.yaml"
        policy.write_text(handwritten.POLICY.format(rtp=", conntrack: bypass" if bypass else ""), encoding="ascii")
        wires = {}
        for name, rules in rulesets(backend, policy, carriers, bad, bypass=bypass).items():
            wires[name] = held.enter_context(wire())
            rules.load(wires[name])
            check_meaning(wires[name], name, rules, policy)
        for each in kinds(carriers, bad):
            messages = each.messages()
            found: dict[str, list[float]] = {name: [] for name in wires}
            for _ in range(rounds):
                for name in draw.sample(list(wires), len(wires)):
                    found[name].append(measure(wires[name], each, messages, packets, bare=name == BARE))
            title = f"{backend}{', conntrack: bypass' if bypass else ''}, {count} networks: {each.name}"
            print_table(title, found)


def print_table(title: str, found: Mapping[str, Sequence[float]]) -> None:
    """Nanoseconds a packet, rate against no firewall and against the best by hand: medians of the rounds; in brackets the middle half."""
    best = min((name for name in found if name.startswith("by hand")), key=lambda name: statistics.median(found[name]))
    print(f"\n{title}\n  {'':30}{'ns':>7}{'no firewall = 1':>24}{'best by hand = 1':>24}")
    for name, costs in found.items():
        cells = []
        for other in (found[BARE], found[best]):
            low, middle, high = statistics.quantiles((b / c for b, c in zip(other, costs, strict=True)), n=4)
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        print(f"  {name:30}{statistics.median(costs):7.0f}{cells[0]:>24}{cells[1]:>24}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="1000,10000")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--packets", type=int, default=20000)
    parser.add_argument("--backends", default="nftables,iptables-nft,iptables-legacy")
    parser.add_argument("--bypass", default="no,yes")
    options = parser.parse_args()
    pin()
    for backend in options.backends.split(","):
        for bypass in options.bypass.split(","):
            for count in map(int, options.networks.split(",")):
                compare(backend, count, bypass=bypass == "yes", rounds=options.rounds, packets=options.packets)


if __name__ == "__main__":
    sys.exit(main())
