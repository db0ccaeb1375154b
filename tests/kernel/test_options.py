"""What services may say besides, on every backend and with real packets: limits by source, untracked media, marks."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from livehost import HOST, USABLE, Flow, Host, listed, live_host

from fwcompiler.addresses import address_text
from fwcompiler.backend import Backend
from fwcompiler.kernel import runner
from fwcompiler.registry import load

LIMITED = """groups: {{phones: [{phones}], carriers: [{carriers}]}}
services:
  sip: {{from: [carriers, phones], limit: {{phones: {sip}}}}}
  wss: {{from: [phones], limit: {{phones: 10/h burst 3}}}}
  rtp: {{from: anywhere, limit: {{anywhere: 10/h burst 5}}, conntrack: {conntrack}}}
"""
RECEIVE_MARK = {4: (socket.IPPROTO_IP, socket.IP_RECVTOS), 6: (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS)}
both_families = pytest.mark.parametrize("version", [4, 6])


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


def limited(phones: tuple[str, ...], *, sip: str = "10/h burst 10", conntrack: str = "track") -> str:
    """A policy that limits phones, and strangers' media."""
    return LIMITED.format(phones=listed(*phones), carriers=listed("two"), sip=sip, conntrack=conntrack)


def arrived(host: Host, who: str, version: int, port: int, count: int = 30) -> int:
    """How many of so many packets from a station come in at a port of the host."""
    server = host.socket("host", version, socket.SOCK_DGRAM, port=port)
    client = host.socket(who, version, socket.SOCK_DGRAM)
    for _ in range(count):
        client.sendto(b"x", (address_text(version, HOST[version]), port))
    server.settimeout(0.3)
    found = 0
    with suppress(TimeoutError):
        while server.recv(100):
            found += 1
    server.close()
    return found


def tracked(host: Host) -> int:
    """Entries in the host's connection table."""
    with host.net.host.entered():
        return int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text(encoding="ascii"))


class TestLimits:
    """A source beyond its limit is dropped, and nobody else."""

    @both_families
    def test_packets(self, host: Host, version: int) -> None:
        """Of a phone's packets the burst comes in, for each phone by itself; of a carrier's all do."""
        host.apply(limited(("one", "stranger")))

        assert [arrived(host, who, version, 5060) for who in ("one", "two", "stranger")] == [10, 30, 10]

    def test_connections(self, host: Host) -> None:
        """Only new connections count: the fourth is not answered, and the first goes on."""
        host.apply(limited(("one",)))
        first, *_ = (host.tcp("one", 4, 8089) for _ in range(3))
        fourth = host.socket("one", 4, socket.SOCK_STREAM)
        fourth.settimeout(0.5)

        with pytest.raises(TimeoutError):
            fourth.connect((address_text(4, HOST[4]), 8089))
        for _ in range(20):
            first.both_ways()

    @both_families
    def test_strangers(self, host: Host, version: int) -> None:
        """Media from whom no service names is limited while the host does not answer, past connection tracking always."""
        for conntrack in ("track", "bypass"):
            host.apply(limited(("one",), conntrack=conntrack))
            got = [arrived(host, who, version, port) for who, port in (("stranger", 12000), ("one", 12001), ("two", 12002))]

            assert got[1:] == [30, 30], conntrack
            assert got[0] in ((5,) if conntrack == "track" else (0, 5)), conntrack

    def test_answered_media_is_free(self, host: Host) -> None:
        """A call that goes both ways is an established connection, which no limit touches."""
        host.apply(limited(("one",)))
        flow = host.udp("stranger", 4, 12000)
        for _ in range(20):
            flow.both_ways()

    def test_other_figures(self, host: Host) -> None:
        """A changed limit counts with its new figures at once, not with those that the kernel has kept."""
        host.apply(limited(("one",)))
        before = arrived(host, "one", 4, 5060)
        host.apply(limited(("one",), sip="10/h burst 20"))

        assert (before, arrived(host, "one", 4, 5060)) == (10, 20)


class TestUntracked:
    """Media past connection tracking."""

    @both_families
    def test_no_entry(self, host: Host, version: int) -> None:
        """A call's media makes entries where it is tracked, and none past it, whoever speaks first."""
        made = {}
        for n, conntrack in enumerate(("track", "bypass")):
            host.apply(f"services: {{rtp: {{from: anywhere, conntrack: {conntrack}}}}}\n")
            inward, outward = host.udp("stranger", version, 12000 + 2 * n), host.udp("stranger", version, 12001 + 2 * n)
            before = tracked(host)
            inward.both_ways()
            Flow(outward.server, outward.client).both_ways()
            made[conntrack] = tracked(host) - before

        assert made == {"track": 2, "bypass": 0}

    def test_blocked(self, host: Host) -> None:
        """A blocked source's media is dropped as before."""
        host.apply(
            f"groups: {{bad: [{listed('one')}]}}\nblock: {{from: [bad]}}\nservices: {{rtp: {{from: anywhere, conntrack: bypass}}}}\n"
        )

        assert [arrived(host, who, 4, 12000) for who in ("one", "two")] == [0, 30]


class TestMarks:
    """DSCP on what the host sends."""

    @both_families
    def test_on_the_wire(self, host: Host, version: int) -> None:
        """Answers from a service's ports carry its mark, others none, and a policy without marks takes them away."""
        marks = []
        for dscp in ("dscp: ef", "conntrack: track"):
            host.apply(f"services:\n  rtp: {{from: anywhere, {dscp}}}\n  stun: {{from: anywhere}}\n")
            for port in (12000, 3478):
                flow = host.udp("one", version, port)
                flow.client.setsockopt(*RECEIVE_MARK[version], 1)
                flow.client.send(b"ask")
                assert flow.arrives(b"ask")
                flow.server.send(b"answer")
                _, ((_, _, mark), *_), *_ = flow.client.recvmsg(100, 100)
                marks.append(mark[0] >> 2)
                flow.server.close()

        assert marks == [46, 0, 0, 0]


def test_strangers_make_no_way_into_tracking(host: Host) -> None:
    """A stranger's SIP, and what a blocked source sends, is dropped before connection tracking; the media is not looked at there."""
    host.apply(
        f"groups: {{peers: [{listed('two')}], bad: [{listed('one')}]}}\nblock: {{from: [bad]}}\n"
        "services: {sip: {from: [peers]}, rtp: {from: anywhere}, https: {from: anywhere}}\n"
    )
    for who, port in (("stranger", 5060), ("one", 443), ("one", 12000), ("two", 5060)):
        arrived(host, who, 4, port, 5)
    with host.net.host.entered():
        listing = runner.outputs(host.backend.listing())
    drops = {name: count for name, (count, _) in host.backend.counters(listing).items() if name.endswith(".drop") and count}

    assert drops == {"sip.drop": 5, "block.drop": 10}
    assert not any(rule.count[0] for c in host.backend.parse(listing).chains if c.name == "service.sip" for rule in c.rules[-1:])
