"""Removal bites: whoever loses access loses his connections, and nobody else does. Real flows, on every backend.

What connection tracking knows is read from ``/proc``, not through the code that deletes it.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernelspace import Space
from livehost import PEERS, USABLE, Flow, Host, listed, live_host

from fwcompiler.addresses import Addresses, address_text
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import conntrack, netlink
from fwcompiler.kernel.conntrack import Cut
from fwcompiler.registry import load

UDP = 17
both_families = pytest.mark.parametrize("version", [4, 6])
PORTS = (12000, 12001)


@pytest.fixture(autouse=True)
def kernel(kernel_allowed: bool) -> None:
    """Skips where this user may not make network namespaces."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")


@pytest.fixture(params=USABLE)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """A host without any rules yet, with each backend whose programs are here."""
    with live_host(load(request.param), tmp_path) as made:
        yield made


def policy(audio: str, *, rest: str = "", groups: str = "") -> str:
    """A policy whose service `audio` has two UDP ports, which is what changes."""
    named = f"groups:\n  peers: [{listed('one')}]\n  others: [{listed('two')}]\n{groups}"
    service = f"  audio: {{ports: [udp/{PORTS[0]}-{PORTS[1]}], from: {audio}}}\n" if audio else ""
    return f"{named}services:\n  sip: {{from: [peers, others]}}\n{service}{rest}"


def entries(host: Host, who: str, version: int, port: int, protocol: str = "udp") -> list[str]:
    """Entries of connections that a station opened to a port, as the kernel prints them."""
    with host.net.host.entered():
        lines = Path("/proc/thread-self/net/nf_conntrack").read_text(encoding="ascii").splitlines()
    source = address_text(version, PEERS[who][version])
    spelled = source if version == 4 else ":".join(f"{int.from_bytes(p, 'big'):04x}" for p in _words(PEERS[who][version]))
    opened = re.compile(rf"^\S+ +\d+ {protocol} [^=]*src={spelled} dst=\S+ sport=\d+ dport={port} ")
    return [line for line in lines if opened.match(line)]


def _words(address: int) -> Iterator[bytes]:
    data = address.to_bytes(16, "big")
    yield from (data[i : i + 2] for i in range(0, 16, 2))


def flows(host: Host, version: int, port: int) -> dict[str, Flow]:
    """One established flow from each station, to one server socket each; ports follow one another."""
    made = {}
    for who in ("one", "stranger"):
        made[who] = host.udp(who, version, port + (who == "stranger"))
        made[who].both_ways()
    return made


@both_families
def test_public_becomes_restricted(host: Host, version: int) -> None:
    """A source that a public service no longer lets in loses its established flow and its entry; a peer that stays keeps both."""
    host.apply(policy("anywhere"))
    made = flows(host, version, PORTS[0])
    host.apply(policy("[peers]"))

    made["stranger"].client.send(b"next")
    assert not made["stranger"].arrives(b"next", 0.3)
    assert entries(host, "stranger", version, PORTS[1]) == []
    assert len(entries(host, "one", version, PORTS[0])) == 1
    made["one"].client.send(b"next")
    assert made["one"].arrives(b"next")


@both_families
def test_server_opens_the_flow_again(host: Host, version: int) -> None:
    """A server that keeps asking its peer, as Asterisk's qualify does, opens the flow again, but nothing of the peer arrives."""
    host.apply(policy("[peers, others]"))
    flow = host.udp("two", version, PORTS[0])
    flow.both_ways()
    stop = threading.Event()

    def qualify() -> None:
        while not stop.wait(0.01):
            flow.server.send(b"qualify")

    asking = threading.Thread(target=qualify)
    asking.start()
    try:
        host.apply(policy("[peers]"))
        flow.client.settimeout(2)
        heard = [flow.client.recv(100) for _ in range(3)]
        for _ in range(20):
            flow.client.send(b"answer")
        assert heard == [b"qualify"] * 3
        assert not flow.arrives(b"answer", 0.3)
    finally:
        stop.set()
        asking.join()
    assert entries(host, "two", version, PORTS[0]) == []


@both_families
def test_service_that_goes(host: Host, version: int) -> None:
    """Connections to a service that is no longer in the policy end: the established rule alone would have kept them."""
    web = "  web: {ports: [tcp/8000], from: anywhere}\n"
    host.apply(policy("anywhere", rest=web))
    media, page = host.udp("stranger", version, PORTS[0]), host.tcp("stranger", version, 8000)
    media.both_ways()
    page.both_ways()
    host.apply(policy(""))

    for flow in (media, page):
        flow.client.send(b"next")
        assert not flow.arrives(b"next", 0.3)
    assert entries(host, "stranger", version, 8000, "tcp") == []


@both_families
def test_access_by_another_group(host: Host, version: int) -> None:
    """Whoever moves to another group, is trusted from now on, or is a dynamic member keeps his entry: no packet is sent in between."""
    host.apply(policy("[peers, others]"))
    flow = host.udp("two", version, PORTS[0])
    flow.both_ways()
    moves = (
        policy("[peers, more]", groups=f"  more: [{listed('two', 'stranger')}]\n"),
        policy("[peers]", rest="trust: [others]\n"),
    )
    for text in moves:
        host.apply(text)
        assert len(entries(host, "two", version, PORTS[0])) == 1

    home = policy("[home]", groups="  home: {members: [], dynamic: {timeout: 1h}}\n")
    host.apply(home.replace("members: []", f"members: [{listed('two')}]"))
    host.fwc("allow", "home", address_text(version, PEERS["two"][version]))
    host.apply(home)

    assert len(entries(host, "two", version, PORTS[0])) == 1
    flow.client.send(b"next")
    assert flow.arrives(b"next")


@both_families
def test_member_loses_its_group(host: Host, version: int) -> None:
    """A dynamic member whose group a service no longer names loses its entry there, though no list of addresses changed."""
    groups = "  home: {members: [], dynamic: {timeout: 1h}}\n"
    host.apply(policy("[peers, home]", groups=groups, rest="  wss: {from: [home]}\n"))
    host.fwc("allow", "home", address_text(version, PEERS["stranger"][version]))
    flows(host, version, PORTS[0])
    host.apply(policy("[peers]", groups=groups, rest="  wss: {from: [home]}\n"))

    assert entries(host, "stranger", version, PORTS[1]) == []
    assert len(entries(host, "one", version, PORTS[0])) == 1


@both_families
def test_revoked(host: Host, version: int) -> None:
    """A member that is taken out loses its entry at once, and no other; one whose time runs out loses access with the next packet."""
    home = "  home: {members: [], dynamic: {timeout: 1h}}\n"
    host.apply(policy("[peers, home]", groups=home))
    stranger = address_text(version, PEERS["stranger"][version])
    host.fwc("allow", "home", stranger)
    made = flows(host, version, PORTS[0])
    host.fwc("revoke", "home", stranger)

    assert entries(host, "stranger", version, PORTS[1]) == []
    assert len(entries(host, "one", version, PORTS[0])) == 1
    made["stranger"].client.send(b"next")
    assert not made["stranger"].arrives(b"next", 0.3)


def test_refresh_is_seen_by_packets(host: Host) -> None:
    """A member that logs in again before its time is over keeps its flow beyond the first time, and loses it after the second."""
    home = "  home: {members: [], dynamic: {timeout: 1h}}\n"
    host.apply(policy("[home]", groups=home))
    two = address_text(4, PEERS["two"][4])
    host.fwc("allow", "home", two, "--for", "2s")
    flow = host.udp("two", 4, PORTS[0])
    flow.both_ways()
    host.fwc("allow", "home", two, "--for", "4s")
    threading.Event().wait(2.5)

    flow.client.send(b"later")
    assert flow.arrives(b"later")
    threading.Event().wait(2.5)
    flow.client.send(b"too late")
    assert not flow.arrives(b"too late", 0.3)


def test_trial_that_ends(host: Host) -> None:
    """Whoever got access by a trial loses the connections made with it when the trial is rolled back."""
    host.apply(policy("[peers]"))
    path = host.folder / "policy.yaml"
    path.write_text(f"version: 1\n{policy('anywhere')}", encoding="utf-8")
    host.fwc("apply", str(path), "--yes", "--confirm", "60s")
    made = flows(host, 4, PORTS[0])
    host.fwc("rollback", "--yes")

    assert entries(host, "stranger", 4, PORTS[1]) == []
    assert len(entries(host, "one", 4, PORTS[0])) == 1
    made["stranger"].client.send(b"next")
    assert not made["stranger"].arrives(b"next", 0.3)


def test_refused(host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Where the kernel will not delete, that is said, and the new rules stay."""
    host.apply(policy("anywhere"))

    def refuse(_: object) -> int:
        raise HostRefused("not today")

    monkeypatch.setattr(conntrack, "delete", refuse)
    host.apply(policy("[peers]"))

    assert "the connections of sources that lost access were not ended: not today" in capfd.readouterr().err
    host.fwc("verify", str(host.folder / "policy.yaml"))


def injected(channel: netlink.Channel, version: int, count: int, port: int) -> None:
    """Entries of UDP flows from as many sources, put into the table through ctnetlink."""
    width, base = (4, 10 << 24) if version == 4 else (16, 0x20010DB8 << 96)
    here = (base + (1 << 20)).to_bytes(width, "big")
    kinds = (1, 2) if version == 4 else (3, 4)

    def side(kind: int, source: bytes, destination: bytes, sport: int, dport: int) -> bytes:
        ip = netlink.nested(1, netlink.attribute(kinds[0], source), netlink.attribute(kinds[1], destination))
        ports = (netlink.attribute(2, struct.pack(">H", sport)), netlink.attribute(3, struct.pack(">H", dport)))
        return netlink.nested(kind, ip, netlink.nested(2, netlink.attribute(1, bytes((UDP,))), *ports))

    texts = []
    for n in range(count):
        source = (base + n).to_bytes(width, "big")
        rest = netlink.attribute(7, struct.pack(">I", 600)) + netlink.attribute(3, struct.pack(">I", 0xA))
        texts.append(side(1, source, here, 4000, port) + side(2, here, source, port, 4000) + rest)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    for start in range(0, count, 100):
        assert not any(channel.ask_each(0x100, family, texts[start : start + 100], netlink.NLM_F_CREATE | netlink.NLM_F_EXCL))


def sources(space: Space, port: int) -> set[str]:
    """Sources of all entries to a port, as the kernel prints them."""
    with space.entered():
        text = Path("/proc/thread-self/net/nf_conntrack").read_text(encoding="ascii")
    return {m[1] for line in text.splitlines() if (m := re.search(rf"src=(\S+) dst=\S+ sport=\d+ dport={port} ", line))}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("removed", [[7], list(range(0, 250))], ids=["one", "many"])
@pytest.mark.parametrize("ports", [(5060, 5060), (5000, 5100)], ids=["a port", "a range"])
def test_of_many_flows(space: Space, version: int, removed: list[int], ports: tuple[int, int]) -> None:
    """Of 300 flows exactly those of the sources named go, by every way the table is asked, and those to other ports stay."""
    base = 10 << 24 if version == 4 else 0x20010DB8 << 96
    spans = tuple((base + n, base + n) for n in removed)
    with space.entered():
        with netlink.Channel() as channel:
            injected(channel, version, 300, 5060)
            injected(channel, version, 300, 9999)
        deleted = conntrack.delete([Cut(UDP, ports, Addresses.of(spans) if version == 4 else Addresses.of((), spans))])

    assert deleted == len(removed)
    assert (len(sources(space, 5060)), len(sources(space, 9999))) == (300 - len(removed), 300)


@pytest.mark.parametrize("version", [4, 6])
def test_of_flows_to_certain_addresses(space: Space, version: int) -> None:
    """Where a cut names destinations, flows of the same sources to others go on."""
    base = 10 << 24 if version == 4 else 0x20010DB8 << 96
    here = base + (1 << 20)
    spans = ((base, base + 99),)
    named = Addresses.of(spans) if version == 4 else Addresses.of((), spans)
    with space.entered():
        with netlink.Channel() as channel:
            injected(channel, version, 100, 5060)
        deleted = [conntrack.delete([Cut(UDP, (5060, 5060), named, {version: ((a, a),)})]) for a in (here + 1, here)]

    assert deleted == [0, 100]
