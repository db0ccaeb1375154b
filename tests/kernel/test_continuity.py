"""Flows go on while rules change under them: calls that run, calls that begin, on every backend."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from livehost import USABLE, Host, listed, live_host, newcomers, policy, traffic

from fwcompiler.registry import load

BLACKLIST = 55_000
both_families = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture(params=USABLE)
def host(request: pytest.FixtureRequest, tmp_path: Path, kernel_allowed: bool) -> Iterator[Host]:
    """A host without any rules yet, for each backend whose programs are here."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    with live_host(load(request.param), tmp_path) as made:
        yield made


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


def blacklist(shift: int) -> str:
    """55,000 single addresses, none next to another; another `shift` is another list altogether."""
    numbers = (0x0B000000 + 64 * n + shift for n in range(BLACKLIST))
    return "\n".join(f"{n >> 24}.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}" for n in numbers)


def call_policy(*members: str, rest: str = "") -> str:
    """As `policy`, with the blacklist, agents that come and go, and trunks at ports of their own."""
    text = policy(*members, rest=f"  trunks: {{ports: [udp/30000-39999], from: [peers, agents]}}\n{rest}block: {{from: [bad]}}\n")
    return text.replace("groups: {", "groups: {bad: [{file: bad.txt, allow: [shrink]}], agents: {members: [203.0.113.9], dynamic: {}}, ")


class TestLiveCalls:
    """What a dialer does all day, while everything is changed that can be changed: nothing is lost."""

    def test_blacklist_is_replaced(self, host: Host) -> None:
        """55,000 entries are replaced by 55,000 others, twice: no packet of a running or of a beginning call is lost."""
        (host.folder / "bad.txt").write_text(blacklist(0))
        host.apply(call_policy("two"))
        flow = host.udp("stranger", 4, 12000)
        flow.both_ways()
        with newcomers(host, "two", 30000, burst=1, pause=0.001) as beginning, traffic(flow) as running:
            for shift in (17, 34):
                (host.folder / "bad.txt").write_text(blacklist(shift))
                host.apply(call_policy("two"))

        assert running.lost() == []
        assert running.count > 200
        assert beginning.lost() == []
        assert beginning.count > 200

    def test_members_come_and_go(self, host: Host) -> None:
        """Agents log in and out thirty times: neither a running call nor one that begins notices."""
        (host.folder / "bad.txt").write_text("11.0.0.1")
        host.apply(call_policy("two"))
        flow = host.udp("stranger", 4, 12000)
        flow.both_ways()
        with newcomers(host, "two", 30000, burst=1, pause=0.001) as beginning, traffic(flow) as running:
            for n in range(30):
                host.fwc("allow", "agents", f"198.51.100.{n}", "--for", "1h")
                if n % 3:
                    host.fwc("revoke", "agents", f"198.51.100.{n}")

        assert (running.lost(), beginning.lost()) == ([], [])
        assert min(running.count, beginning.count) > 200

    def test_every_chain_changes(self, host: Host) -> None:
        """Rules, sets and blacklist change together in one apply, there and back: nothing is lost."""
        (host.folder / "bad.txt").write_text(blacklist(0))
        host.apply(call_policy("two"))
        flow = host.udp("stranger", 4, 12000)
        flow.both_ways()
        more = "  https: {from: anywhere}\n  iax2: {from: [peers]}\n  ssh: {from: [peers, agents]}\n"
        with newcomers(host, "two", 30000, burst=1, pause=0.001) as beginning, traffic(flow) as running:
            for n, (members, rest) in enumerate(((("one", "two"), more), (("two",), ""))):
                (host.folder / "bad.txt").write_text(blacklist(n + 1))
                host.apply(call_policy(*members, rest=rest))

        assert (running.lost(), beginning.lost()) == ([], [])
        assert min(running.count, beginning.count) > 200
