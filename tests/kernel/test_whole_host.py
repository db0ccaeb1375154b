"""Beside other people's rules, `explain --live` and `verify` speak about the host: held against real packets on each backend.

A host with an address on the internet and a container behind it; docker's, fail2ban's, crowdsec's and older rules around ours.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import kernelspace
import pytest
from cli.harness import BACKENDS, Host, valid

HOST, CONTAINER = "203.0.113.1", "172.17.0.2"
CARRIER, STRANGER, BANNED = "198.51.100.17", "192.0.2.7", "192.0.2.66"
PORTS = (5060, 10000, 10001, 12000, 7000)
POLICY = """version: 1
groups:
  carriers: [198.51.100.16/28]
  admins: [192.0.2.10]
services:
  sip: {from: [carriers]}
  rtp: {from: anywhere}
  ssh: {from: [admins]}
"""
FAIL2BAN = f"""table inet f2b-table {{
	set addr-set-rtp {{
		type ipv4_addr
		elements = {{ {BANNED} }}
	}}
	chain f2b-chain {{
		type filter hook input priority filter - 1; policy accept;
		udp dport {{ 10000, 7000 }} ip saddr @addr-set-rtp reject with icmp port-unreachable
	}}
}}
"""
CROWDSEC = f"""table ip crowdsec {{
	set blacklist {{
		type ipv4_addr
		flags timeout
		elements = {{ {BANNED} timeout 4h }}
	}}
	chain in {{
		type filter hook input priority filter + 10; policy accept;
		ip saddr @blacklist counter drop
	}}
}}
"""
ACCEPTS = """table inet others {
	chain in {
		type filter hook input priority filter - 10; policy accept;
		accept
	}
}
"""
DOCKER = f"""*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER ! -i docker0 -p udp -m udp --dport 5060 -j DNAT --to-destination {CONTAINER}:5060
-A DOCKER ! -i docker0 -p udp -m udp --dport 7000 -j DNAT --to-destination {CONTAINER}:12000
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -j DOCKER
-A DOCKER-USER -s {BANNED} -j DROP
-A DOCKER -d {CONTAINER} ! -i docker0 -o docker0 -p udp -m udp --dport 5060 -j ACCEPT
-A DOCKER -d {CONTAINER} ! -i docker0 -o docker0 -p udp -m udp --dport 12000 -j ACCEPT
COMMIT
"""
MOVED = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p udp -m udp --dport 10001 -j REDIRECT --to-ports 12000\nCOMMIT\n"
BAN = f"*filter\n-I INPUT 1 -s {BANNED} -p udp -m multiport --dports 10000,5060 -j DROP\nCOMMIT\n"
WORLDS: Mapping[str, Sequence[tuple[str, str]]] = {
    "fail2ban": (("nft -f -", FAIL2BAN),),
    "crowdsec": (("nft -f -", CROWDSEC),),
    "an accept that is none": (("nft -f -", ACCEPTS),),
    "docker": (("iptables-nft-restore --noflush", DOCKER),),
    "docker, the older kind": (("iptables-legacy-restore --noflush", DOCKER),),
    "redirect": (("iptables-nft-restore --noflush", MOVED),),
    "a ban beside nft": (("iptables-legacy-restore --noflush", BAN),),
    "everybody": (("nft -f -", FAIL2BAN + CROWDSEC + ACCEPTS), ("iptables-nft-restore --noflush", DOCKER)),
}
QUIET = ("an accept that is none",)
"""What changes nothing about anybody's access."""


@dataclass(frozen=True)
class Net:
    """Namespaces of the internet, of the host (by name) and of a container behind it."""

    internet: kernelspace.Space
    host: kernelspace.Space
    container: kernelspace.Space
    name: str

    def arrivals(self, source: str) -> dict[int, str]:
        """Where one packet from an address to each port of the host arrives: `host`, `container`, another port, or nowhere."""
        with ExitStack() as stack:
            receivers = {}
            for where, space, address in (("host", self.host, HOST), ("container", self.container, CONTAINER)):
                for port in PORTS:
                    receiver = stack.enter_context(_socket(space, address, port))
                    receivers[receiver] = (where, port)
            for port in PORTS:
                sender = stack.enter_context(_socket(self.internet, source, 0))
                sender.sendto(str(port).encode(), (HOST, port))
            found = dict.fromkeys(PORTS, "")
            while ready := select.select(list(receivers), [], [], 0.3)[0]:
                for receiver in ready:
                    sent_to = int(receiver.recv(100))
                    where, port = receivers[receiver]
                    found[sent_to] = where if where == "container" or port == sent_to else "another port"
            return found


def _socket(space: kernelspace.Space, address: str, port: int) -> socket.socket:
    with space.entered():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, port))
    return made


@contextmanager
def network() -> Iterator[Net]:
    """A host between the internet and a container."""
    with ExitStack() as stack:
        names = [stack.enter_context(kernelspace.named_namespace()) for _ in range(3)]
        spaces = []
        for name in names:
            spaces.append(kernelspace.Space(os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)))
            stack.callback(os.close, spaces[-1].descriptor)
        internet, host, container = spaces
        for name, inner, outer in ((names[0], "up0", "eth0"), (names[2], "c0", "docker0")):
            host.run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        _addresses(internet, host, container)
        yield Net(internet, host, container, names[1])


def _addresses(internet: kernelspace.Space, host: kernelspace.Space, container: kernelspace.Space) -> None:
    for space, links in ((internet, {"up0": "203.0.113.2/24"}), (container, {"c0": f"{CONTAINER}/16"})):
        space.run("ip", "link", "set", "lo", "up")
        for link, address in links.items():
            space.run("ip", "addr", "add", address, "dev", link)
            space.run("ip", "link", "set", link, "up")
    for address in (CARRIER, STRANGER, BANNED):
        internet.run("ip", "addr", "add", f"{address}/32", "dev", "lo")
    host.run("ip", "link", "set", "lo", "up")
    for link, address in (("eth0", f"{HOST}/24"), ("docker0", "172.17.0.1/16")):
        host.run("ip", "addr", "add", address, "dev", link)
        host.run("ip", "link", "set", link, "up")
    host.run("ip", "route", "add", "default", "via", "203.0.113.2")
    container.run("ip", "route", "add", "default", "via", "172.17.0.1")
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth0.rp_filter=0")


@pytest.fixture
def net(kernel_allowed: bool) -> Iterator[Net]:
    """The network; skips where this user may not make one."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    with network() as made:
        yield made


ENDS = {"accept": "host", "drop": "", "reject": ""}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", WORLDS)
def test_explain_live_is_what_happens(tmp_path: Path, net: Net, backend: str, world: str) -> None:
    """For every source and port: `explain --live` says what becomes of a real packet, beside whatever others loaded."""
    host = Host(tmp_path, net.name, backend)
    host.apply(POLICY)
    for command, text in WORLDS[world]:
        host.run(*command.split(), stdin=text)

    happens, said, by = {}, {}, set()
    for source in (CARRIER, STRANGER, BANNED):
        arrived = net.arrivals(source)
        for port in PORTS:
            found = host.fwc("explain", host.write(POLICY), "--live", "--from", source, "--to", f"udp/{port}", "--json").json
            happens[source, port] = arrived[port]
            verdict = valid("explain-live", found)["verdict"]
            said[source, port] = ENDS.get(verdict, arrived[port] if verdict == "redirect" and arrived[port] != "host" else verdict)
            by.add(found["by"])

    assert said == happens
    assert by == ({"fwc"} if world in QUIET else {"fwc", "others"})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", WORLDS)
def test_verify_finds_what_others_take(tmp_path: Path, net: Net, backend: str, world: str) -> None:
    """`verify` fails exactly where a rule of somebody else's changes what becomes of a packet, and is certain of it."""
    host = Host(tmp_path, net.name, backend)
    host.apply(POLICY)
    before = {source: net.arrivals(source) for source in (CARRIER, STRANGER, BANNED)}
    for command, text in WORLDS[world]:
        host.run(*command.split(), stdin=text)

    ran = host.fwc("verify", host.write(POLICY), "--json")
    found = valid("verify", ran.json)
    differing = {
        (source, port) for source in before for port, end in net.arrivals(source).items() if (end or "") != (before[source][port] or "")
    }

    assert (ran.code, found["equal"]) == ((1, False) if differing else (0, True)), ran
    assert bool(found["foreign"]) == bool(differing)
    assert (found["problems"], found["counter_examples"]) == ([], [])
    assert all(each["certain"] for each in found["foreign"])


def test_the_rule_is_named_as_its_program_prints_it(tmp_path: Path, net: Net) -> None:
    """Table, chain and the rule's own text, of nft as of iptables; and that it is not ours."""
    host = Host(tmp_path, net.name)
    host.apply(POLICY)
    for command, text in WORLDS["everybody"]:
        host.run(*command.split(), stdin=text)

    verified = host.fwc("verify", host.write(POLICY)).out
    banned = host.fwc("explain", host.write(POLICY), "--live", "--from", BANNED, "--to", "udp/10000").out
    status = host.fwc("status").out

    rule = "table inet f2b-table, chain f2b-chain: udp dport { 7000, 10000 } ip saddr @addr-set-rtp reject"
    dnat = "table nat: -A DOCKER ! -i docker0 -p udp -m udp --dport 5060 -j DNAT --to-destination 172.17.0.2:5060"
    assert "rules that are not fwc's" in verified
    assert dnat in verified
    assert rule in banned
    assert "a rule that is not fwc's" in banned
    assert dnat in status


def test_a_table_that_cannot_be_listed(tmp_path: Path, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table that this nft stumbles over hides nothing else, and it is said that it was not looked at."""
    host = Host(tmp_path, net.name)
    host.apply(POLICY)
    host.run("nft", "-f", "-", stdin=FAIL2BAN + CROWDSEC)
    wrapper = tmp_path / "bin" / "nft"
    wrapper.parent.mkdir()
    wrapper.write_text('#!/bin/sh\ncase "$*" in *crowdsec*) echo "nft: netlink.c: BUG" >&2; exit 134;; esac\nexec /usr/sbin/nft "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")

    found = host.fwc("verify", host.write(POLICY), "--json").json
    text = host.fwc("explain", host.write(POLICY), "--live", "--from", BANNED, "--to", "udp/10000").out

    assert len(found["not_looked_at"]) == 1
    assert "table ip crowdsec" in found["not_looked_at"][0]
    assert ["f2b-table" in each["rule"] for each in found["foreign"]] == [True], str(found["foreign"])
    assert "not looked at: table ip crowdsec" in text


def test_policy_drop_of_another_base_chain(tmp_path: Path, net: Net) -> None:
    """A base chain of others that drops by its policy takes away what ours accept, and the chain is named."""
    host = Host(tmp_path, net.name)
    host.apply(POLICY)
    host.run("nft", "add table ip closed { chain in { type filter hook input priority 5; policy drop; ct state established accept; }; }")

    found = host.fwc("verify", host.write(POLICY), "--json").json
    text = host.fwc("explain", host.write(POLICY), "--live", "--from", CARRIER, "--to", "udp/5060").out

    assert any("table ip closed, chain in: the policy of the chain" in each["rule"] for each in found["foreign"])
    assert "table ip closed, chain in" in text


SENDING = f"{POLICY}egress:\n  - udp/5060: carriers\n  - udp/7000: anywhere\n"
SENT = tuple((address, port) for address in (CARRIER, STRANGER) for port in (5060, 7000, 12000))


def _out(priority: str, rule: str, hook: str = "output") -> str:
    return f"table inet out {{ chain c {{ type filter hook {hook} priority {priority}; policy accept; {rule}; }}; }}"


SENDERS: Mapping[str, Sequence[tuple[str, str]]] = {
    "dropped before us": (("nft -f -", _out("-10", "udp dport 5060 drop")),),
    "rejected behind us": (("nft -f -", _out("10", "ip daddr != 198.51.100.0/24 reject")),),
    "dropped on its way out": (("nft -f -", _out("0", "udp dport 7000 drop", "postrouting")),),
    "an accept that is none": (("nft -f -", _out("-10", "accept")),),
    "from another address": (("nft -f -", _out("-10", "ip saddr 203.0.113.9 drop")),),
    "to the host itself": (("nft -f -", _out("-10", f"ip daddr {HOST} drop; fib daddr type local drop; fib saddr type local accept")),),
    "dropped by iptables": (("iptables-nft-restore --noflush", "*filter\n-I OUTPUT -p udp --dport 7000 -j DROP\nCOMMIT\n"),),
    "dropped by the older kind": (("iptables-legacy-restore --noflush", f"*filter\n-I OUTPUT -d {CARRIER} -j DROP\nCOMMIT\n"),),
    "let out by iptables": (("iptables-nft-restore --noflush", "*filter\n-I OUTPUT -p udp --dport 12000 -j ACCEPT\nCOMMIT\n"),),
    "docker": (
        (
            "iptables-nft-restore --noflush",
            "*nat\n:DOCKER - [0:0]\n-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER\n"
            f"-A DOCKER ! -i docker0 -p udp --dport 7000 -j DNAT --to-destination {CONTAINER}:12000\n"
            "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\nCOMMIT\n",
        ),
    ),
    "sent elsewhere": (
        (
            "iptables-nft-restore --noflush",
            f"*nat\n-A OUTPUT -p udp --dport 7000 -d {STRANGER} -j DNAT --to-destination {CARRIER}\nCOMMIT\n",
        ),
    ),
}


def _departures(net: Net) -> dict[tuple[str, int], bool]:
    """By destination: whether a packet of the host's gets there."""
    with ExitStack() as stack:
        receivers = {stack.enter_context(_socket(net.internet, *to)): to for to in SENT}
        for address, port in SENT:
            sender = stack.enter_context(_socket(net.host, HOST, 0))
            with suppress(OSError):  # what is rejected
                sender.sendto(f"{address} {port}".encode(), (address, port))
        found = dict.fromkeys(SENT, False)
        while ready := select.select(list(receivers), [], [], 0.3)[0]:
            for receiver in ready:
                address, port = receivers[receiver]
                found[address, port] |= receiver.recv(100).decode() == f"{address} {port}"
        return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", SENDERS)
def test_what_others_do_to_what_is_sent(tmp_path: Path, net: Net, backend: str, world: str) -> None:
    """Where `egress` restricts it: `verify` fails exactly where others change where the host's packets get, and `explain` follows each."""
    host = Host(tmp_path, net.name, backend)
    host.apply(SENDING)
    before = _departures(net)
    for command, text in SENDERS[world]:
        host.run(*command.split(), stdin=text)
    after = _departures(net)

    ran = host.fwc("verify", host.write(SENDING), "--json")
    found = valid("verify", ran.json)
    said = {}
    for address, port in SENT:
        asked = (
            "explain",
            host.write(SENDING),
            "--live",
            "--from",
            HOST,
            "--out",
            "eth0",
            "--to-addr",
            address,
            "--to",
            f"udp/{port}",
            "--json",
        )
        said[address, port] = host.fwc(*asked).json["verdict"] == "accept"

    assert before == {to: to[1] == 7000 or to == (CARRIER, 5060) for to in SENT}
    assert said == after
    assert (ran.code, bool(found["foreign"])) == ((1, True) if after != before else (0, False)), ran
    assert (found["problems"], found["counter_examples"], found["not_looked_at"]) == ([], [], [])
    assert all(each["certain"] and each["packets"].startswith("from this host to ") for each in found["foreign"])
    assert all("chain c" in each["rule"] or "OUTPUT" in each["rule"] for each in found["foreign"])


def test_what_others_perhaps_do_to_what_is_sent(tmp_path: Path, net: Net) -> None:
    """A rule that asks who sends, which no packet shows, makes `verify` say perhaps; `diff` and `status` tell it as well."""
    host = Host(tmp_path, net.name)
    host.apply(SENDING)
    host.run("nft", "-f", "-", stdin=_out("-10", "udp dport 7000 meta skuid 1000 drop"))

    ran = host.fwc("verify", host.write(SENDING))
    told = "the host perhaps drops them: table inet out, chain c: udp dport 7000 meta skuid 1000 drop"

    assert ran.code == 1
    assert "  the host: perhaps drops them: table inet out, chain c: udp dport 7000 meta skuid 1000 drop" in ran.out
    assert told in host.fwc("diff", host.write(SENDING)).out
    assert told in host.fwc("status").out
