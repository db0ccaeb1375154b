"""What a host may send, with real packets on every backend: who is reached, how a refusal looks to a program, and what ends."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kernelspace import run
from livehost import PEERS, USABLE, Flow, Host, listed, live_host

from fwcompiler import cli
from fwcompiler.addresses import address_text
from fwcompiler.kernel import runner
from fwcompiler.registry import load

both_families = pytest.mark.parametrize("version", [4, 6])
REFUSED = {4: errno.EHOSTUNREACH, 6: errno.EACCES}
"""What a program hears of "administratively prohibited" (net/ipv4/icmp.c, ``icmp_err_convert``; net/ipv6/icmp.c, ``tab_unreach``)."""


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


def policy(*entries: str, conntrack: str = "track", services: str = "") -> str:
    """A policy whose group `one` is the first station, and `two` the second; entries of egress as text."""
    groups = f"groups: {{one: [{listed('one')}], two: [{listed('two')}]}}\n"
    offered = f"services:\n  sip: {{from: [one]}}\n  rtp: {{from: anywhere, conntrack: {conntrack}}}\n{services}"
    return f"{groups}{offered}egress:\n" + "".join(f"  - {each}\n" for each in entries)


def asks(host: Host, who: str, version: int, port: int, own: int = 0) -> bool:
    """Whether a station hears a packet that the host sends to its port, and the host hears the answer. A refusal is an error at once."""
    with (
        host.socket(who, version, socket.SOCK_DGRAM, port=port) as server,
        host.socket("host", version, socket.SOCK_DGRAM, port=own) as client,
    ):
        try:
            client.sendto(b"ask", (address_text(version, PEERS[who][version]), port))
        except PermissionError:
            return False
        data, back = server.recvfrom(100)
        server.sendto(b"answer", back)
        return (data, client.recv(100)) == (b"ask", b"answer")


def connects(host: Host, who: str, version: int, port: int) -> int:
    """The error that a program of the host gets from a connection to a station: 0 where it stands, -1 where it waits in vain."""
    listener = host.socket(who, version, socket.SOCK_STREAM, port=port)
    listener.listen()
    client = host.socket("host", version, socket.SOCK_STREAM)
    client.settimeout(5)
    try:
        client.connect((address_text(version, PEERS[who][version]), port))
    except OSError as error:
        return error.errno or -1
    finally:
        listener.close()
        client.close()
    return 0


@both_families
def test_who_is_reached(host: Host, version: int) -> None:
    """Names are asked at the group of the entry only, and nobody's other port; a stranger is refused at once, loopback never."""
    host.apply(policy("dns: one", "web: two"))

    assert [asks(host, who, version, 53) for who in ("one", "two", "stranger")] == [True, False, False]
    assert not asks(host, "one", version, 54)
    assert [connects(host, who, version, 443) for who in ("two", "one")] == [0, REFUSED[version]]
    own = host.socket("host", version, socket.SOCK_DGRAM)
    own.sendto(b"self", own.getsockname()[:2])
    assert own.recv(100) == b"self"


@both_families
@pytest.mark.parametrize("conntrack", ["track", "bypass"])
def test_answers_pass(host: Host, version: int, conntrack: str) -> None:
    """A call that comes in is answered though no entry names the caller: signalling, and audio also past connection tracking."""
    host.apply(policy("dns: two", conntrack=conntrack))

    host.udp("one", version, 5060).both_ways()
    host.udp("stranger", version, 12000).both_ways()
    begun = asks(host, "stranger", version, 40002, own=12002)
    assert begun == (conntrack == "bypass"), "untracked, what begins cannot be told from an answer"


@both_families
def test_audio_and_signalling_by_own_port(host: Host, version: int) -> None:
    """Audio leaves from this host's media ports to any port; SIP reaches a phone at the port that its router gave it."""
    host.apply(policy("rtp: anywhere", "sip: one"))

    assert asks(host, "stranger", version, 41000, own=12000)
    assert not asks(host, "stranger", version, 12000)
    assert asks(host, "one", version, 61234, own=5060)
    assert asks(host, "one", version, 5060)
    assert not asks(host, "two", version, 61235, own=5060)


@both_families
def test_what_is_taken_out_ends(host: Host, version: int) -> None:
    """Connections that the host opened through an entry end with it; those through others, and those of callers, go on."""
    host.apply(policy("web: [one, two]"))
    sessions = {who: opened(host, who, version) for who in ("one", "two")}
    call = host.udp("one", version, 5060)
    call.both_ways()
    host.apply(policy("web: two"))

    sessions["two"].both_ways()
    call.both_ways()
    with suppress(OSError):  # a later packet is one of a new connection, which is refused
        sessions["one"].client.send(b"more")
    assert not sessions["one"].arrives(b"more", 0.3)


def opened(host: Host, who: str, version: int) -> Flow:
    """A TCP connection from the host to a station's web server, used both ways."""
    listener = host.socket(who, version, socket.SOCK_STREAM, port=443)
    listener.listen()
    client = host.socket("host", version, socket.SOCK_STREAM)
    client.connect(listener.getsockname()[:2])
    server, _ = listener.accept()
    host.sockets.append(server)
    flow = Flow(client, server)
    flow.both_ways()
    return flow


def test_members_are_called_while_they_are_in(host: Host) -> None:
    """A dynamic member may be called as soon as it is let in, and no longer once it is out; an open call to it ends."""
    groups = "groups: {phones: {members: ['192.0.2.99'], dynamic: {timeout: 1h}}}\n"
    host.apply(f"{groups}services: {{sip: {{from: [phones]}}}}\negress: [{{sip: phones}}]\n")
    phone = address_text(4, PEERS["stranger"][4])

    before = asks(host, "stranger", 4, 5060)
    host.fwc("allow", "phones", phone)
    during = asks(host, "stranger", 4, 5060)
    client, server = host.socket("host", 4, socket.SOCK_DGRAM), host.socket("stranger", 4, socket.SOCK_DGRAM, port=5060)
    client.connect((phone, 5060))
    server.connect(client.getsockname())
    Flow(client, server).both_ways()
    host.fwc("revoke", "phones", phone)

    assert (before, during) == (False, True)
    with pytest.raises(PermissionError):
        client.send(b"more")


def test_counted(host: Host) -> None:
    """What leaves is counted by its entry, and so is what is refused; incoming packets of the same service are not among them."""
    host.apply(policy("sip: one"))
    host.udp("one", 4, 5060).both_ways()
    asks(host, "one", 4, 5060)
    asks(host, "two", 4, 53)
    with host.net.host.entered():
        counters = host.backend.counters(runner.outputs(host.backend.listing()))

    assert (counters["egress.sip.accept"][0], counters["egress.reject"][0]) == (1, 1)
    assert counters["sip.accept"][0] > 1


OTHERS = """table inet others {
	chain out {
		type filter hook output priority 10; policy accept;
		udp dport 53 drop
		tcp dport 25 accept
	}
}
"""


def test_rules_of_others_are_seen(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody else's rule that drops what an entry lets out is named by `verify`; one that accepts what is rejected changes nothing."""
    host.apply(policy("dns: one"))
    arguments = [str(host.folder / "policy.yaml"), "--backend", host.backend.name, "--state-dir", str(host.folder / "state")]
    with host.net.host.entered():
        assert cli.run(["verify", *arguments]) == 0
        run(("nft", "-f", "-"), OTHERS)
        capsys.readouterr()
        found = cli.run(["verify", "--json", *arguments])
        told = json.loads(capsys.readouterr().out)["foreign"]
        where = ["--to", "udp/53", "--to-addr", address_text(4, PEERS["one"][4])]
        assert cli.run(["explain", *arguments, *where, "--live", "--json"]) == 0
        traced = json.loads(capsys.readouterr().out)

    assert found == 1
    assert {each["packets"].partition(" at ")[0] for each in told} == {"from this host to udp/53"}
    assert {each["host"] for each in told} == {"drop"}
    assert (traced["verdict"], traced["by"], traced["policy"]["verdict"]) == ("drop", "others", "accept")
