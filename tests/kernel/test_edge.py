"""An edge with three dialers behind it, in namespaces with real packets: who reaches whom, from which address and port.

A namespace for everybody outside (`world`, which has the addresses of a carrier, its media gateway and a stranger), one for the
edge, one for the switch of its lan, three dialers, and a container with a bridge of its own on the edge.
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kernelspace import in_named, named_namespace, named_socket, run

from fwcompiler import cli
from fwcompiler.kernel import runner
from fwcompiler.registry import installed, load

USABLE = [name for name in installed() if all(runner.find(p) for p in load(name).programs)]
CARRIER, MEDIA, STRANGER, WAN = "198.51.100.17", "192.0.2.77", "192.0.2.66", "203.0.113.1"
CARRIER6, STRANGER6 = "2001:db8:51::17", "2001:db8:66::66"
DIALERS = {"dialer1": 11, "dialer2": 12, "dialer3": 13}
QUIET = 0.3
"""Seconds after which a packet that has not come is taken to be dropped."""
POLICY = """version: 1
groups:
  carriers: [{carriers}]
  admins: [192.0.2.10]
  bad: [192.0.2.99, {blocked}]
hosts:
  gw: {{role: edge, wan: wan0, lan: lan0, addresses: [203.0.113.1, 10.20.0.1, "2001:db8:1::1"]}}
  dialer1: {{role: dialer, addresses: [10.20.0.11, "2001:db8:20::11"]}}
  dialer2: {{role: dialer, addresses: [10.20.0.12, "2001:db8:20::12"]}}
  dialer3: {{role: dialer, addresses: [10.20.0.13, "2001:db8:20::13"]}}
edge: {{host: gw, inbound_sip: dialer1, rtp: {{first: 10000, chunk: 5000}}, forward: {{https: dialer2}}}}
block: {{from: [bad]}}
services:
  sip: {{from: [carriers, cluster]}}
  rtp: {{from: anywhere}}
  https: {{from: anywhere}}
  ssh: {{from: [admins]}}
"""
SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    "net.ipv6.conf.all.accept_dad=0",
    "net.ipv6.conf.default.accept_dad=0",
)


@pytest.fixture(autouse=True)
def kernel(kernel_allowed: bool) -> None:
    """Skips where this user may not make network namespaces."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")


@dataclass
class Lan:
    """The network, the backend whose rules the edge has, and the sockets of a test."""

    names: Mapping[str, str]
    backend: str
    folder: Path
    sockets: list[socket.socket] = field(default_factory=list)

    def fwc(self, *arguments: str) -> int:
        """Run fwc for the edge."""
        common = ("--netns", self.names["edge"], "--host", "gw", "--backend", self.backend, "--state-dir", str(self.folder / "state"))
        return cli.run([*common, *arguments])

    def apply(self, carriers: str = f'{CARRIER}, "{CARRIER6}"', blocked: str = "192.0.2.98") -> str:
        """Put the policy into force and return its file."""
        path = self.folder / "policy.yaml"
        path.write_text(POLICY.format(carriers=carriers, blocked=blocked), encoding="utf-8")
        assert self.fwc("apply", str(path), "--yes", "-q") == 0
        return str(path)

    def socket(self, where: str, address: str, port: int, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
        """A socket in a namespace; it stays there."""
        made = named_socket(self.names[where], address, port, kind)
        self.sockets.append(made)
        return made

    def listeners(self, port: int, version: int = 4) -> dict[str, socket.socket]:
        """A socket at a port of every dialer, and of the edge itself."""
        own = {name: (f"10.20.0.{n}" if version == 4 else f"2001:db8:20::{n}") for name, n in DIALERS.items()}
        own["edge"] = WAN if version == 4 else "2001:db8:1::1"
        return {name: self.socket(name, address, port) for name, address in own.items()}

    def close(self) -> None:
        """The end of a test."""
        for each in self.sockets:
            each.close()
        self.sockets.clear()


def arrived(listeners: Mapping[str, socket.socket]) -> dict[str, tuple[str, int]]:
    """Who got a packet, and from where it seemed to come."""
    found: dict[str, tuple[str, int]] = {}
    names = {each: name for name, each in listeners.items()}
    while ready := select.select([s for s in names if names[s] not in found], [], [], QUIET if not found else 0.05)[0]:
        for each in ready:
            found[names[each]] = each.recvfrom(2048)[1][:2]
    return found


def batch(name: str, *lines: str) -> None:
    """Several `ip` commands in a namespace."""
    in_named(name, "ip", "-batch", "-", stdin="".join(f"{line}\n" for line in lines))


@contextmanager
def network() -> Iterator[dict[str, str]]:
    """The namespaces by what they stand for, wired and addressed."""
    with ExitStack() as held:
        names = {n: held.enter_context(named_namespace()) for n in ("world", "edge", "switch", *DIALERS, "container")}
        for name in names.values():
            for each in SYSCTLS:
                in_named(name, "sysctl", "-qw", each)
        batch(names["switch"], "link add br0 type bridge", "link set br0 up")
        wires = [("world", "eth0", "edge", "wan0"), ("container", "eth0", "edge", "docker0"), ("edge", "lan0", "switch", "p0")]
        wires += [(name, "eth0", "switch", f"p{n}") for name, n in DIALERS.items()]
        for left, one, right, other in wires:
            run(("ip", "-n", names[left], "link", "add", one, "type", "veth", "peer", "name", other, "netns", names[right]))
            for name, link in ((left, one), (right, other)):
                run(("ip", "-n", names[name], "link", "set", link, "up"))
            if right == "switch":
                run(("ip", "-n", names["switch"], "link", "set", other, "master", "br0"))
        outside = [f"addr add {a}/32 dev eth0" for a in (CARRIER, MEDIA, STRANGER, "192.0.2.99")]
        outside += [f"addr add {a}/128 dev eth0 nodad" for a in (CARRIER6, STRANGER6)]
        batch(
            names["world"],
            "link set lo up",
            "addr add 203.0.113.254/24 dev eth0",
            "addr add 2001:db8:1::254/64 dev eth0 nodad",
            *outside,
            "route add 2001:db8:20::/64 via 2001:db8:1::1",
            "route add 172.17.0.0/24 via 203.0.113.1",
        )
        batch(
            names["edge"],
            "link set lo up",
            "addr add 203.0.113.1/24 dev wan0",
            "addr add 2001:db8:1::1/64 dev wan0 nodad",
            "addr add 10.20.0.1/24 dev lan0",
            "addr add 2001:db8:20::1/64 dev lan0 nodad",
            "addr add 172.17.0.1/24 dev docker0",
            "route add default via 203.0.113.254",
            "route add ::/0 via 2001:db8:1::254",
        )
        for name, n in DIALERS.items():
            addresses = (f"addr add 10.20.0.{n}/24 dev eth0", f"addr add 2001:db8:20::{n}/64 dev eth0 nodad")
            batch(names[name], *addresses, "route add default via 10.20.0.1", "route add ::/0 via 2001:db8:20::1")
        batch(names["container"], "addr add 172.17.0.2/24 dev eth0", "route add default via 172.17.0.1")
        yield names


@pytest.fixture(params=USABLE)
def lan(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lan]:
    """A network whose edge has the rules of one backend."""
    with network() as names:
        found = Lan(names, request.param, tmp_path)
        found.apply()
        try:
            yield found
        finally:
            found.close()


def test_sip_reaches_the_owner_of_5060_only(lan: Lan) -> None:
    """A carrier's packet to the edge's 5060 comes to the owner, with its own address; a stranger's to nobody."""
    listeners = lan.listeners(5060)
    carrier, stranger = lan.socket("world", CARRIER, 5060), lan.socket("world", STRANGER, 5060)

    carrier.sendto(b"INVITE", (WAN, 5060))
    assert arrived(listeners) == {"dialer1": (CARRIER, 5060)}
    stranger.sendto(b"INVITE", (WAN, 5060))
    assert arrived(listeners) == {}


def test_the_answer_comes_back_from_where_it_was_asked(lan: Lan) -> None:
    """What the owner answers reaches the carrier from the edge's address and 5060."""
    dialer, carrier = lan.socket("dialer1", "10.20.0.11", 5060), lan.socket("world", CARRIER, 5060)
    carrier.sendto(b"INVITE", (WAN, 5060))
    _, peer = dialer.recvfrom(2048)
    dialer.sendto(b"200 OK", peer)

    assert arrived({"carrier": carrier}) == {"carrier": (WAN, 5060)}


@pytest.mark.parametrize(
    ("port", "owner"), [(10000, "dialer1"), (14999, "dialer1"), (15000, "dialer2"), (20002, "dialer3"), (24999, "dialer3")]
)
def test_media_reaches_the_dialer_whose_chunk_it_is(lan: Lan, port: int, owner: str) -> None:
    """Media from an address that nobody lists comes to one dialer, to the port it was sent to."""
    listeners = lan.listeners(port)
    lan.socket("world", MEDIA, 30000).sendto(b"RTP", (WAN, port))

    assert arrived(listeners) == {owner: (MEDIA, 30000)}


@pytest.mark.parametrize("port", [9999, 25000, 5061, 53])
def test_other_ports_reach_nobody(lan: Lan, port: int) -> None:
    """A port that no chunk and no service has goes nowhere, whoever sends."""
    listeners = lan.listeners(port)
    lan.socket("world", CARRIER, 30000).sendto(b"?", (WAN, port))

    assert arrived(listeners) == {}


def test_nobody_gets_past_the_plan_by_private_addresses(lan: Lan) -> None:
    """A neighbour on the wan who routes to a dialer's private address reaches its own chunk only, and no signalling."""
    run(("ip", "-n", lan.names["world"], "route", "add", "10.20.0.0/24", "via", "203.0.113.1"))
    stranger = lan.socket("world", STRANGER, 30000)
    for port in (5060, 15000, 22):
        listeners = lan.listeners(port)
        stranger.sendto(b"?", ("10.20.0.11", port))
        assert arrived(listeners) == {}, port


def test_media_leaves_from_its_own_port(lan: Lan) -> None:
    """Two dialers that send from a port of their chunks are seen at that port; so is the owner's 5060."""
    for name, n, port in (("dialer1", 11, 10500), ("dialer2", 12, 15500), ("dialer3", 13, 24998), ("dialer1", 11, 5060)):
        media = lan.socket("world", MEDIA, 31000 + n)
        lan.socket(name, f"10.20.0.{n}", port).sendto(b"RTP", (MEDIA, 31000 + n))
        assert arrived({"media": media}) == {"media": (WAN, port)}
        lan.close()


def test_nobody_leaves_from_a_port_of_somebody_else(lan: Lan) -> None:
    """A dialer that sends from another one's media port, or from 5060 which it does not own, is seen at another port."""
    media = lan.socket("world", MEDIA, 31000)
    for port in (10500, 5060):
        lan.socket("dialer2", "10.20.0.12", port).sendto(b"RTP", (MEDIA, 31000))
        (source,) = arrived({"media": media}).values()
        assert source[0] == WAN
        assert 61000 <= source[1] <= 65535
        lan.socket("dialer1", "10.20.0.11", port).sendto(b"RTP", (MEDIA, 31000))
        assert arrived({"media": media}) == {"media": (WAN, port)}


def test_a_dialer_reaches_the_owner_through_the_public_address(lan: Lan) -> None:
    """Hairpin: from the lan to the edge's public address, to the owner, and the answer comes back the same way."""
    listeners = lan.listeners(5060)
    caller = lan.socket("dialer3", "10.20.0.13", 5090)
    caller.sendto(b"INVITE", (WAN, 5060))
    found = arrived(listeners)
    assert found == {"dialer1": ("10.20.0.1", 5090)}
    listeners["dialer1"].sendto(b"200 OK", found["dialer1"])

    assert arrived({"caller": caller}) == {"caller": (WAN, 5060)}


def test_ipv6_passes_without_translation(lan: Lan) -> None:
    """Over IPv6 dialers have their own addresses: the owner's 5060 for the carrier, each its chunk, and nothing else."""
    for source, to, port, expected in (
        (CARRIER6, 11, 5060, {"dialer1": (CARRIER6, 30000)}),
        (CARRIER6, 12, 5060, {}),
        (STRANGER6, 11, 5060, {}),
        (STRANGER6, 12, 15002, {"dialer2": (STRANGER6, 30000)}),
        (STRANGER6, 12, 10002, {}),
        (STRANGER6, 13, 22, {}),
    ):
        listeners = lan.listeners(port, 6)
        lan.socket("world", source, 30000).sendto(b"?", (f"2001:db8:20::{to}", port))
        assert arrived(listeners) == expected, (source, to, port)
        lan.close()


def test_a_removed_carrier_is_cut_off_at_once(lan: Lan) -> None:
    """A flow that is established ends with the carrier's place in the policy, though its entry in connection tracking is alive."""
    dialer, carrier = lan.socket("dialer1", "10.20.0.11", 5060), lan.socket("world", CARRIER, 5060)
    carrier.sendto(b"INVITE", (WAN, 5060))
    assert arrived({"dialer": dialer})
    dialer.sendto(b"200 OK", (CARRIER, 5060))
    assert arrived({"carrier": carrier})
    lan.apply(carriers="198.51.100.99")

    carrier.sendto(b"BYE", (WAN, 5060))
    assert arrived({"dialer": dialer}) == {}


@pytest.mark.parametrize("backend", USABLE)
def test_a_flow_that_is_older_than_the_rules_arrives(backend: str, tmp_path: Path) -> None:
    """What a carrier sent to the edge before it had rules of fwc made an entry without translation; it does not last."""
    with network() as names:
        lan = Lan(names, backend, tmp_path)
        in_named(names["edge"], "nft", "-f", "-", stdin=TRACKING)
        try:
            dialers, carrier = lan.listeners(5060), lan.socket("world", CARRIER, 5060)
            carrier.sendto(b"OPTIONS", (WAN, 5060))
            assert set(arrived(dialers)) == {"edge"}
            lan.apply()

            carrier.sendto(b"OPTIONS", (WAN, 5060))
            assert arrived(dialers) == {"dialer1": (CARRIER, 5060)}
        finally:
            lan.close()


TRACKING = "table inet other { chain input { type filter hook input priority 0; ct state invalid counter; }; }\n"
"""Has the kernel track connections, as any firewall before fwc would have."""


def test_a_blocked_source_reaches_no_dialer(lan: Lan) -> None:
    """Media is open to anywhere, and still closed to the block list, new flows and established ones."""
    listeners = lan.listeners(10010)
    media, bad = lan.socket("world", MEDIA, 30000), lan.socket("world", "192.0.2.99", 30000)
    bad.sendto(b"RTP", (WAN, 10010))
    assert arrived(listeners) == {}
    media.sendto(b"RTP", (WAN, 10010))
    assert arrived(listeners) == {"dialer1": (MEDIA, 30000)}
    lan.apply(blocked=MEDIA)

    media.sendto(b"RTP", (WAN, 10010))
    assert arrived(listeners) == {}


def test_tcp_is_forwarded_to_the_host_that_owns_it(lan: Lan) -> None:
    """`forward: {https: dialer2}`: a connection to the edge's 443 is one with dialer2."""
    server = lan.socket("dialer2", "10.20.0.12", 443, socket.SOCK_STREAM)
    server.listen()
    client = lan.socket("world", STRANGER, 0, socket.SOCK_STREAM)
    client.settimeout(2)
    client.connect((WAN, 443))
    accepted, peer = server.accept()
    with accepted:
        assert peer[0] == STRANGER


def test_containers_are_left_alone(lan: Lan) -> None:
    """What a container on the edge sends out, and gets, meets no rule of ours, whatever the port."""
    outside, inside = lan.socket("world", STRANGER, 5060), lan.socket("container", "172.17.0.2", 5060)
    inside.sendto(b"out", (STRANGER, 5060))
    assert arrived({"outside": outside}) == {"outside": ("172.17.0.2", 5060)}
    other = lan.socket("world", MEDIA, 9)
    other.sendto(b"in", ("172.17.0.2", 5060))
    assert arrived({"inside": inside}) == {"inside": (MEDIA, 9)}


@pytest.mark.parametrize(
    ("source", "to", "verdict", "where"),
    [
        (CARRIER, "udp/5060", "accept", "sent on to 10.20.0.11"),
        (STRANGER, "udp/5060", "drop", ""),
        (STRANGER, "udp/20000", "accept", "sent on to 10.20.0.13"),
        ("192.0.2.98", "udp/20000", "drop", "sent on to 10.20.0.13"),
        (STRANGER, "tcp/22", "drop", ""),
        ("192.0.2.10", "tcp/22", "accept", ""),
    ],
)
def test_explain_follows_the_loaded_rules(
    lan: Lan, capsys: pytest.CaptureFixture[str], source: str, to: str, verdict: str, where: str
) -> None:
    """`explain --live` tells where the loaded rules send a packet, and agrees with the policy."""
    policy = lan.apply()
    capsys.readouterr()
    assert lan.fwc("explain", policy, "--from", source, "--to", to, "--live", "--json") == 0
    found = json.loads(capsys.readouterr().out)

    assert (found["verdict"], found["agrees"]) == (verdict, True)
    assert ("sent on" in found["reason"]) == bool(where)
    assert where in found["reason"]


def test_apply_verify_diff_and_remove(lan: Lan, capsys: pytest.CaptureFixture[str]) -> None:
    """What was applied is in sync and proven; a change by hand is found; removing leaves a router without rules of ours."""
    policy = lan.apply()
    assert lan.fwc("verify", policy) == 0
    assert lan.fwc("diff", policy) == 0
    assert "in sync" in capsys.readouterr().out
    assert lan.fwc("status") == 0
    assert "in sync" in capsys.readouterr().out

    if lan.backend == "nftables":
        in_named(
            lan.names["edge"],
            "nft",
            "insert",
            "rule",
            "inet",
            "fwc",
            "arriving",
            "meta",
            "nfproto",
            "ipv4",
            "udp",
            "dport",
            "5060",
            "dnat",
            "ip",
            "to",
            "10.20.0.12",
        )
    else:
        in_named(
            lan.names["edge"],
            f"{lan.backend}",
            "-t",
            "nat",
            "-I",
            "FWC-arriving",
            "-p",
            "udp",
            "--dport",
            "5060",
            "-j",
            "DNAT",
            "--to-destination",
            "10.20.0.12",
        )
    assert lan.fwc("verify", policy) == 1
    assert "10.20.0.12" in capsys.readouterr().out
    assert lan.fwc("explain", policy, "--from", CARRIER, "--to", "udp/5060", "--live") == 0
    assert "the policy says accept at 10.20.0.11, the loaded rules say drop at 10.20.0.12" in capsys.readouterr().out
    assert lan.fwc("diff", policy, "-q") == 1
    assert lan.fwc("apply", policy, "--yes", "-q") == 0
    assert lan.fwc("verify", policy) == 0

    assert lan.fwc("remove", "--yes") == 0
    listing = in_named(lan.names["edge"], "nft", "list", "ruleset")
    assert "FWC" not in listing
    assert "fwc" not in listing
    with suppress(Exception):
        assert "FWC" not in in_named(lan.names["edge"], "iptables-legacy-save")


def test_what_keeps_an_edge_from_its_work_is_told(lan: Lan, capsys: pytest.CaptureFixture[str]) -> None:
    """Forwarding that is off, a strict rp_filter, and rules of others on the way: `status`, `verify` and `audit` say so."""
    policy = lan.apply()
    capsys.readouterr()
    assert lan.fwc("status") == 0
    assert "ip_forward" not in capsys.readouterr().out
    assert lan.fwc("verify", policy) == 0
    assert "not looked at" not in capsys.readouterr().out
    edge = lan.names["edge"]
    if lan.backend != "nftables":
        in_named(edge, lan.backend, "-A", "FORWARD", "-o", "wan0", "-j", "DROP")
        assert lan.fwc("verify", policy) == 0
        assert "not looked at: rules of others that meet what hosts behind" in capsys.readouterr().out
        in_named(edge, lan.backend, "-D", "FORWARD", "-o", "wan0", "-j", "DROP")
    in_named(edge, "sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv4.conf.wan0.rp_filter=1")
    in_named(edge, "nft", "add table ip theirs; add chain ip theirs f { type filter hook forward priority 5; policy drop; }")
    assert lan.fwc("status") == 0
    notes = capsys.readouterr().out
    assert "note: net.ipv4.ip_forward is 0: this edge sends no IPv4 packet on" in notes
    assert "note: rp_filter is strict on wan0" in notes
    assert "rp_filter is strict on lan0" not in notes
    assert "note: not looked at: rules of others that meet what hosts behind this edge send" in notes
    assert lan.fwc("verify", policy) == 1
    verified = capsys.readouterr().out
    assert "table ip theirs, chain f: the policy of the chain, drop" in verified
    assert "not looked at: rules of others that meet what hosts behind this edge send" in verified
    lan.fwc("audit", policy, "--json")
    audited = json.loads(capsys.readouterr().out)
    found = {(f["code"], f["severity"]) for f in audited["findings"]}
    assert any(line.startswith("rules of others that meet what hosts behind") for line in audited["left_out"])
    assert {("forwarding-off", "error"), ("rp-filter", "note")} <= found
    assert ("interface-missing", "error") not in found
