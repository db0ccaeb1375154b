"""Asterisk's files against the policy: what each check says, where, and when it is silent."""

from __future__ import annotations

from pathlib import Path

import pytest
from audit.facts import HEAD, POLICY, compiled, facts, said

from fwcompiler.addresses import Addresses, parse_entry
from fwcompiler.audit.agreement import agreement
from fwcompiler.audit.endpoints import Endpoint, endpoint, network, of_register, of_uri
from fwcompiler.audit.signalling import signalling, sip_names

EXAMPLES = Path(__file__).parent / "asterisk"
RTP = "[general]\nrtpstart=10000\nrtpend=14999\n"
HTTP = "[general]\nenabled=yes\nbindaddr=127.0.0.1\ntlsenable=yes\ntlsbindaddr=0.0.0.0:8089\n"
AMI = "[general]\nenabled=yes\nbindaddr={}\n[vici]\nsecret={}\n{}\n"
ANYWHERE = POLICY.replace("sip: {from: [carriers, agents, cluster]}", 'sip: {from: anywhere, expose: "mobile agents"}')


def test_files_that_agree(tmp_path: Path) -> None:
    """Nothing is said about files that agree with the policy."""
    files = {"rtp": RTP, "http": HTTP, "manager": AMI.format("127.0.0.1", "long-and-random", "")}
    assert said(agreement(compiled(tmp_path).resolved, facts(tmp_path, files))) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtpstart=15000\nrtpend=19999", [("rtp-range", "error", 10), ("rtp-range", "warning", 10)]),
        ("rtpstart=10000\nrtpend=20000", [("rtp-range", "error", 10)]),
        ("rtpstart=10000\nrtpend=12499", [("rtp-range", "warning", 10)]),
        ("rtpstart=10000", [("rtp-values", "warning", 1), ("rtp-range", "error", 10)]),
        ("rtpstart=14999\nrtpend=10000", [("rtp-values", "warning", 3), ("rtp-range", "error", 10)]),
        ("rtpstart=10000\nrtpend=14999\nstrictrtp=no", [("strict-rtp", "warning", 4)]),
        ("rtpstart=10000\nrtpend=14999\nstrictrtp=seqno", []),
    ],
)
def test_rtp_conf(tmp_path: Path, text: str, expected: list[tuple[str, str, int]]) -> None:
    """Ports that Asterisk uses and nobody opens are an error, ports that are open in vain a warning."""
    found = agreement(compiled(tmp_path).resolved, facts(tmp_path, {"rtp": f"[general]\n{text}\n"}))

    assert said(found) == expected


def test_no_rtp_conf_means_the_defaults(tmp_path: Path) -> None:
    """A dialer without rtp.conf uses 5000 to 31000."""
    found = list(agreement(compiled(tmp_path).resolved, facts(tmp_path, {"manager": "[general]\nenabled=no\n"})))

    assert [i.code for i in found] == ["rtp-values", "rtp-range"]
    assert "does not open 5000-5059, 5061-9999, 15000-31000" in found[-1].message


@pytest.mark.parametrize(
    ("name", "codes"),
    [("rtp-dialer1", []), ("rtp-dialer2", ["error", "warning"]), ("rtp-dialer3", ["error", "warning"]), ("rtp-wrong-default", ["error"])],
)
def test_the_dialers_of_the_examples(tmp_path: Path, name: str, codes: list[str]) -> None:
    """Only the first of three dialers has the chunk that this policy opens; one that kept the defaults uses too much."""
    text = (EXAMPLES / f"{name}.conf").read_text(encoding="utf-8")

    found = list(agreement(compiled(tmp_path).resolved, facts(tmp_path, {"rtp": text})))

    assert [(i.code, i.severity) for i in found] == [("rtp-range", c) for c in codes]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("enabled=no", [("wss", "warning", 12)]),
        ("enabled=yes\nbindaddr=127.0.0.1", [("wss", "warning", 12)]),
        ("enabled=yes\nbindaddr=0.0.0.0\ntlsenable=yes", [("http-plain", "warning", 3)]),
        ("enabled=yes\nbindaddr=::\ntlsenable=yes", [("http-plain", "warning", 3)]),
        ("enabled=yes\nbindaddr=127.0.0.1\ntlsenable=yes\ntlsbindaddr=127.0.0.1:8089", [("wss", "warning", 5)]),
        ("enabled=yes\nbindaddr=127.0.0.1\ntlsenable=yes\ntlsbindaddr=0.0.0.0:8443", [("wss", "error", 5)]),
        ("enabled=yes\nbindaddr=127.0.0.1\ntlsenable=yes\ntlsbindaddr=[::]:8089", []),
        ("enabled=yes\nbindaddr=127.0.0.1\nsslenable=yes\nsslbindaddr=0.0.0.0\nsslbindport=8089", []),
        ("enabled=yes\nbindaddr=0.0.0.0\nbindport=443", [("http-plain", "error", 3), ("wss", "warning", 12)]),
    ],
)
def test_http_conf(tmp_path: Path, text: str, expected: list[tuple[str, str, int]]) -> None:
    """Plain HTTP stays on the host, TLS is where the policy opens it."""
    found = agreement(compiled(tmp_path).resolved, facts(tmp_path, {"rtp": RTP, "http": f"[general]\n{text}\n"}))

    assert said(found) == expected


@pytest.mark.parametrize(
    ("bind", "secret", "more", "expected"),
    [
        ("127.0.0.1", "1234", "", [("ami-secret", "warning", 5)]),
        ("0.0.0.0", "1234", "permit=0.0.0.0/0", [("ami-bind", "warning", 3), ("ami-secret", "error", 5), ("ami-permit", "warning", 4)]),
        ("0.0.0.0", "vici", "deny=0.0.0.0/0.0.0.0\npermit=127.0.0.1", [("ami-bind", "warning", 3), ("ami-secret", "error", 5)]),
        ("10.20.0.11", "long-and-random", "permit=10.20.0.0/24", [("ami-bind", "warning", 3), ("ami-permit", "warning", 4)]),
        ("10.20.0.11", "long-and-random", "deny=0.0.0.0/0\npermit=10.20.0.0/255.255.255.0", [("ami-bind", "warning", 3)]),
        ("10.20.0.11", "short", "acl=office", [("ami-bind", "warning", 3), ("ami-secret", "error", 5)]),
    ],
)
def test_manager_conf(tmp_path: Path, bind: str, secret: str, more: str, expected: list[tuple[str, str, int]]) -> None:
    """Where the manager interface listens, and who could log in; no finding repeats a secret."""
    found = list(agreement(compiled(tmp_path).resolved, facts(tmp_path, {"rtp": RTP, "manager": AMI.format(bind, secret, more)})))

    assert said(found) == expected
    assert not [i for i in found if secret in f"{i.message} {i.remedy}".replace("`vici`", "")]


def test_the_manager_of_the_examples(tmp_path: Path) -> None:
    """The sample of VICIdial listens on every address; a policy that opens it to a group knows what it does."""
    text = (EXAMPLES / "manager-risky.conf").read_text(encoding="utf-8")
    opened = POLICY + "  ami: {from: [cluster]}\n"

    assert said(agreement(compiled(tmp_path).resolved, facts(tmp_path, {"rtp": RTP, "manager": text}))) == [("ami-bind", "warning", 5)]
    assert said(agreement(compiled(tmp_path, opened).resolved, facts(tmp_path))) == []


SIP = "[general]\nallowguest=no\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("bindport=5080", [("sip-port", "error", 3)]),
        ("udpbindaddr=127.0.0.1:5080", []),
        ("tcpenable=yes", [("sip-port", "error", 3)]),
        ("allowguest=yes", [("guests", "warning", 3)]),
        ("register => me:word@198.51.100.17:5060/100~60", []),
        ("register => peer?udp://me:word@203.0.114.1", [("peer-missing", "error", 3)]),
        ("register => me:word@sip.example.net", [("peer-name", "note", 3)]),
        ("[out](!)\nhost=8.8.8.8\n[a](out)\nhost=198.51.100.18\n[b]\nhost=dynamic\n[c]\nhost=10.20.0.9", []),
        ("[out](!)\nhost=8.8.8.8\n[a](out)\ntype=peer", [("peer-missing", "error", 4)]),
        ("externaddr=203.0.113.5\nlocalnet=10.20.0.0/255.255.255.0", []),
        ("externaddr=203.0.113.5\nlocalnet=192.168.0.0/16", [("local-nets", "warning", 4)]),
        ("externaddr=203.0.113.5", [("local-nets", "warning", 3)]),
        ("externaddr=203.0.113.9:5060\nlocalnet=10.0.0.0/8", [("external-address", "warning", 3)]),
        ("externhost=pbx.example.net\nlocalnet=10.0.0.0/8", [("external-address", "note", 3)]),
    ],
)
def test_sip_conf(tmp_path: Path, text: str, expected: list[tuple[str, str, int]]) -> None:
    """chan_sip's ports, guests, addresses and peers."""
    known = facts(tmp_path, {"sip": f"{SIP}{text}\n"}, ["203.0.113.5", "10.20.0.11"], listeners=())

    assert said(signalling(compiled(tmp_path).resolved, known)) == expected


TRANSPORT = "[udp]\ntype=transport\nbind=0.0.0.0\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("[ws]\ntype=transport\nprotocol=wss\nbind=0.0.0.0:9999\n", []),
        ("[tls]\ntype=transport\nprotocol=tls\nbind=0.0.0.0\n", [("sip-port", "error", 7)]),
        ("[anonymous]\ntype=endpoint\n", [("guests", "warning", 4)]),
        ("[c]\ntype=identify\nmatch=198.51.100.16/29,198.51.100.30\n", []),
        ("[c]\ntype=identify\nmatch=198.51.100.0/24\n", [("peer-missing", "error", 6)]),
        ("[c]\ntype=aor\ncontact=sip:me@198.51.100.17:5060,sip:198.51.100.50\n", [("peer-missing", "error", 6)]),
        ("[c]\ntype=registration\nserver_uri=sip:[2001:db8:51::1]:5060\\;transport=udp\n", []),
        ("[c]\ntype=registration\nserver_uri=sips:sip.example.net\n", [("peer-name", "note", 6)]),
        ("[udp](+)\nexternal_media_address=203.0.113.99\nlocal_net=10.20.0.0/24\n", [("external-address", "warning", 5)]),
    ],
)
def test_pjsip_conf(tmp_path: Path, text: str, expected: list[tuple[str, str, int]]) -> None:
    """chan_pjsip's transports, endpoints, identities and registrations."""
    known = facts(tmp_path, {"pjsip": TRANSPORT + text}, ["203.0.113.5"], listeners=())

    assert said(signalling(compiled(tmp_path).resolved, known)) == expected


def test_sip_of_the_examples(tmp_path: Path) -> None:
    """A dialer behind NAT whose local net is another one than the policy's cluster, in both drivers."""
    files = {k: (EXAMPLES / f"{k}-behind-nat.conf").read_text(encoding="utf-8") for k in ("sip", "pjsip")}
    found = signalling(compiled(tmp_path).resolved, facts(tmp_path, files, ["192.168.50.11"], listeners=()))
    same = POLICY.replace("10.20.0.0/24", "192.168.50.0/24")

    assert said(found) == [("local-nets", "warning", 5), ("local-nets", "warning", 7)]
    assert said(signalling(compiled(tmp_path, same).resolved, facts(tmp_path, files, ["192.168.50.11"], listeners=()))) == []


def test_behind_nat_without_an_external_address(tmp_path: Path) -> None:
    """Private addresses only and carriers outside: Asterisk has to be told its address."""
    found = list(signalling(compiled(tmp_path).resolved, facts(tmp_path, {"sip": SIP}, ["192.168.50.11"], listeners=())))

    assert said(found) == [("external-address", "warning", 1)]
    inside = f"{HEAD}services:\n  sip: {{from: [cluster]}}\n"
    assert said(signalling(compiled(tmp_path, inside).resolved, facts(tmp_path, {"sip": SIP}, ["192.168.50.11"], listeners=()))) == []


def test_sip_open_to_anywhere(tmp_path: Path) -> None:
    """Guests are an error then, and no peer can be missing."""
    files = {"sip": "[general]\nregister => me@8.8.8.8\n"}
    known = facts(tmp_path, files, ["203.0.113.5"], listeners=())

    assert said(signalling(compiled(tmp_path, ANYWHERE).resolved, known)) == [("guests", "error", 1)]


def test_members_at_run_time_and_names_that_were_looked_up(tmp_path: Path) -> None:
    """A peer may be a dynamic member; a name counts by its addresses once somebody looked it up."""
    files = {"sip": f"{SIP}register => me@192.0.2.77\nregister => me@SIP.example.net\n"}
    assert sip_names(dict(facts(tmp_path, files).asterisk)) == ["sip.example.net"]
    members = {"agents": Addresses.of([parse_entry("192.0.2.77").span])}

    for text, codes in (("198.51.100.17", []), ("198.51.100.99", ["peer-missing"])):
        names = {"sip.example.net": Addresses.of([parse_entry(text).span])}
        known = facts(tmp_path, files, members=members, resolved_names=names, listeners=())
        assert [i.code for i in signalling(compiled(tmp_path).resolved, known)] == codes


def test_without_sockets_the_files_say_what_nobody_binds(tmp_path: Path) -> None:
    """Where listening sockets cannot be read, a SIP service without a bind is seen in the files."""
    found = signalling(compiled(tmp_path).resolved, facts(tmp_path, {"sip": f"{SIP}bindport=5080\n"}))

    assert said(found) == [("sip-port", "error", 3), ("sip-port", "warning", 9)]


@pytest.mark.parametrize(
    ("text", "host", "port", "scope"),
    [
        ("0.0.0.0", "0.0.0.0", 1, "all"),
        ("::", "::", 1, "all"),
        ("[::]:8089", "::", 8089, "all"),
        ("", "", 1, "all"),
        (":8089", "", 8089, "all"),
        ("127.0.0.5:80", "127.0.0.5", 80, "loopback"),
        ("::1", "::1", 1, "loopback"),
        ("localhost:80", "localhost", 80, "loopback"),
        ("192.0.2.1", "192.0.2.1", 1, "address"),
        ("sip.example.net:5080", "sip.example.net", 5080, "name"),
    ],
)
def test_endpoints(text: str, host: str, port: int, scope: str) -> None:
    """Every way in which Asterisk writes an address with a port."""
    found = endpoint(text, 1)

    assert found == Endpoint(host, port)
    assert found is not None
    assert found.scope == scope


def test_what_is_no_endpoint() -> None:
    """Ports out of bounds, text with blanks, URIs of other kinds, and registers without a host."""
    assert [endpoint(text, 1) for text in ("192.0.2.1:99999", "a b", "[::1")] == [None, None, None]
    assert [of_uri(text) for text in ("http://192.0.2.1", "sip:")] == [None, None]
    assert of_register("word") is None
    assert network("carrier.example") is None
    assert network("192.0.2.7/255.255.255.0") == Addresses.of([parse_entry("192.0.2.0/24").span])
