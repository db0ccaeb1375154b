"""The pure checks of sockets, families, certificates, NAT rules, the redirect, the connection table and the SIP helper."""

from __future__ import annotations

from pathlib import Path

import pytest
from audit.dialer import certificate
from audit.facts import HEAD, NOW, POLICY, compiled, facts, listener, said
from cryptography.hazmat.primitives.asymmetric import rsa

from fwcompiler.audit.audit import audit
from fwcompiler.audit.certificates import certificates, read
from fwcompiler.audit.exposure import exposure, matrix
from fwcompiler.audit.facts import Answer, CertificateFile, Changed, Conntrack, Drift, Helper, Published, Rules, Served
from fwcompiler.audit.findings import CODES, Issue, in_order
from fwcompiler.audit.host import host
from fwcompiler.audit.published import published
from fwcompiler.backend import Saved
from fwcompiler.diagnostics import CODES as POLICY_CODES
from fwcompiler.diagnostics import Finding, Position
from fwcompiler.registry import load
from fwcompiler.ruleset import Ruleset

WHERE = Position("policy.yaml", 1)
HEARD = ("udp/0.0.0.0/5060", "tcp/0.0.0.0/443", "tcp/::/8089", "tcp/10.20.0.11/22")


def test_the_matrix_is_exact(tmp_path: Path) -> None:
    """All, some or none of a group, with blocks, exceptions, trust and dynamic groups counted."""
    text = HEAD + "trust: [admins]\nblock: {from: [bad]}\nservices:\n  sip: {from: [carriers, agents]}\n  https: {from: anywhere}\n"
    found = matrix(compiled(tmp_path, text).resolved)

    assert [c.label for c in found.columns] == ["sip", "https"]
    assert {row.who: row.cells for row in found.rows} == {
        "anywhere": ("none", "all"),
        "carriers": ("all", "all"),
        "agents": ("all", "all"),
        "cluster": ("none", "all"),
        "admins": ("all", "all"),
        "bad": ("some", "some"),
    }
    assert [row.size for row in found.rows][1:3] == ["16 IPv4, 1 IPv6 network", "256 IPv4, changing members"]


def test_sockets_and_services_that_match(tmp_path: Path) -> None:
    """Loopback sockets, a DHCP client, a resolver's own socket and audio ports are nobody's business."""
    more = ("tcp/127.0.0.1/5038", "tcp/::1/631", "udp/0.0.0.0/68", "udp/0.0.0.0/40123", "udp/0.0.0.0/10500")
    known = facts(tmp_path, listeners=tuple(map(listener, (*HEARD, *more))), local_ports=(32768, 60999))

    assert said(exposure(compiled(tmp_path).resolved, known)) == []


def test_sockets_without_a_service(tmp_path: Path) -> None:
    """Each port once, with the program's name; one family is enough."""
    sockets = (*map(listener, HEARD), listener("tcp/0.0.0.0/3306", "mariadbd"), listener("tcp/::/3306"), listener("udp/10.20.0.11/161"))
    found = list(exposure(compiled(tmp_path).resolved, facts(tmp_path, listeners=sockets)))

    assert [(i.code, i.place) for i in found] == [("listener", "tcp/3306"), ("listener", "udp/161")]
    assert "`mariadbd` listens on tcp/3306 at every address" in found[0].message
    assert "10.20.0.11" in found[1].message


def test_services_without_a_socket(tmp_path: Path) -> None:
    """A service that nothing listens for, and one that is reached from the host only."""
    sockets = tuple(map(listener, ("udp/0.0.0.0/5060", "tcp/127.0.0.1/443", "tcp/0.0.0.0/22")))
    found = list(exposure(compiled(tmp_path).resolved, facts(tmp_path, listeners=sockets)))

    assert said(found) == [("unheard", "warning", 11), ("unheard", "warning", 12)]
    assert "the host itself only" in found[0].message
    assert "nothing listens there" in found[1].message


def test_sockets_of_a_responder(tmp_path: Path) -> None:
    """Behind a redirect something has to listen at the responder's port, and at port 80 only for groups in the clear."""
    text = f"{HEAD}services:\n  http: {{from: anywhere, redirect: responder}}\n"
    heard = {port: (listener(f"tcp/0.0.0.0/{port}"),) for port in (80, 8880)}
    found = {port: list(exposure(compiled(tmp_path, text).resolved, facts(tmp_path, listeners=heard[port]))) for port in heard}
    clear = compiled(tmp_path, text.replace("responder}", "responder, plain: [cluster]}")).resolved

    assert found[8880] == []
    assert said(found[80]) == [("unheard", "warning", 9)]
    assert "opens tcp/8880, and nothing listens there" in found[80][0].message
    assert list(exposure(clear, facts(tmp_path, listeners=heard[80]))) == []


@pytest.mark.parametrize(
    ("addresses", "lines"), [(["203.0.113.5"], []), (["203.0.113.5", "2001:db8::5"], [12, 13]), (["2001:db8::5"], [12, 13]), ([], [])]
)
def test_one_family_only(tmp_path: Path, addresses: list[str], lines: list[int]) -> None:
    """Services whose groups have IPv4 only, on a host with IPv6; one with changing members may have any."""
    found = said(exposure(compiled(tmp_path).resolved, facts(tmp_path, addresses=addresses)))

    assert found == [("ipv6-parity", "note", line) for line in lines]


def served(pem: bytes, distrust: str = "") -> Served:
    """What port 443 shows."""
    return Served(443, "127.0.0.1", (pem,), distrust)


def made(name: str = "dialer1.example.net", start: float = -1, days: float = 90, key: rsa.RSAPrivateKey | None = None) -> bytes:
    """A certificate relative to the audit's time."""
    return certificate(name, start=start, days=days, key=key, now=NOW).pem


@pytest.mark.parametrize(
    ("pem", "distrust", "expected"),
    [
        (made(), "", []),
        (made("*.example.net"), "", []),
        (made("DIALER1.example.net"), "", []),
        (made("*.net"), "", [("certificate-name", "error")]),
        (made("other.example.net"), "", [("certificate-name", "error")]),
        (made(days=15), "", [("certificate-expires", "warning")]),
        (made(days=4), "", [("certificate-expires", "error")]),
        (made(start=-90, days=80), "certificate has expired", [("certificate-expired", "error")]),
        (made(start=1), "certificate is not yet valid", [("certificate-early", "error")]),
        (made(), "self-signed certificate", [("certificate-chain", "error")]),
        (made(key=rsa.generate_private_key(65537, 1024)), "", [("certificate-key", "error")]),
        (b"", "", [("certificate-none", "error")]),
    ],
)
def test_certificates(tmp_path: Path, pem: bytes, distrust: str, expected: list[tuple[str, str]]) -> None:
    """Name, time, trust and key; a wildcard stands for one label; what has expired is said once."""
    known = facts(tmp_path, served=(served(pem, distrust),))

    assert [(i.code, i.severity) for i in certificates(known)] == expected


def test_the_name_of_a_host_without_a_domain_is_not_compared(tmp_path: Path) -> None:
    """`dialer1` may be anything; the audit says that it did not compare."""
    known = facts(tmp_path, served=(served(made("other.example.net")),), name="dialer1")

    assert list(certificates(known)) == []
    assert any("--name" in line for line in audit(compiled(tmp_path), known).left_out)


def test_certificate_files(tmp_path: Path) -> None:
    """A file is judged by itself where no port shows it; where one does, both have to be the same."""
    old, new = made(days=60), made(days=80)

    def check(*served_: Served, content: bytes = new, error: str = "") -> list[str]:
        file = CertificateFile("a.pem", "http.conf:7:1", 443, content, error)
        return [i.code for i in certificates(facts(tmp_path, served=served_, certificate_files=(file,)))]

    assert check() == []
    assert check(served(new)) == []
    assert check(served(old)) == ["certificate-stale"]
    assert check(content=made(days=2)) == ["certificate-expires"]
    assert check(content=b"no certificate") == ["certificate-file"]
    assert check(content=b"", error="no such file") == ["certificate-file"]


def test_a_certificate_in_words() -> None:
    """Names, issuer and key of PEM with more around it; nothing where there is none."""
    found = read(b"some words before\n" + made())

    assert found is not None
    assert (found.names, found.key, found.self_signed) == (("dialer1.example.net",), "EC secp256r1", True)
    assert found.days_left(NOW) == 89
    assert read(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n") is None


@pytest.mark.parametrize(
    ("status", "target", "severity"),
    [
        (200, "", "error"),
        (301, "https://dialer1.example.net/", None),
        (308, "https://elsewhere.example.net/x", None),
        (302, "http://dialer1.example.net/", "error"),
        (301, "", "error"),
        (404, "", "warning"),
        (200, "https://dialer1.example.net/", "error"),
        (301, "https:", "error"),
        (301, "http://[::1", "error"),
    ],
)
def test_the_redirect(tmp_path: Path, status: int, target: str, severity: str | None) -> None:
    """Plain HTTP has to end at HTTPS by a redirect."""
    text = POLICY + "  http: {from: anywhere}\n"
    answer = Answer(80, "127.0.0.1", (("http://dialer1.example.net/", status, target),))
    found = list(host(compiled(tmp_path, text).resolved, facts(tmp_path, answers=(answer,)), WHERE))

    assert said(found) == ([("redirect", severity, 14)] if severity else [])


def test_no_answer_is_no_finding(tmp_path: Path) -> None:
    """Where nothing answers on port 80, or the policy has no http, there is nothing to redirect."""
    refused = facts(tmp_path, answers=(Answer(80, "127.0.0.1", (), "connection refused"),))

    assert list(host(compiled(tmp_path, POLICY + "  http: {from: anywhere}\n").resolved, refused, WHERE)) == []


@pytest.mark.parametrize(
    ("conntrack", "severities"),
    [
        (Conntrack(100, 262_144, 30), []),
        (Conntrack(200_000, 262_144, 30), ["warning"]),
        (Conntrack(260_000, 262_144, 30), ["error"]),
        (Conntrack(1, 16_384, 30), ["warning"]),
    ],
)
def test_room_in_the_connection_table(tmp_path: Path, conntrack: Conntrack, severities: list[str]) -> None:
    """Nearly full, or too small for audio ports that are open to anywhere."""
    found = list(host(compiled(tmp_path).resolved, facts(tmp_path, conntrack=conntrack), WHERE))

    assert [(i.code, i.severity) for i in found] == [("conntrack-room", s) for s in severities]


@pytest.mark.parametrize(
    ("helper", "severities"),
    [
        (Helper(False, False), []),
        (Helper(False, True), []),
        (Helper(True, False), ["note"]),
        (Helper(True, True), ["error"]),
        (Helper(True, False, ("iptables-nft: -A PREROUTING -j CT --helper sip",)), ["error"]),
    ],
)
def test_the_sip_helper(tmp_path: Path, helper: Helper, severities: list[str]) -> None:
    """A helper that is loaded is a remark, one that gets packets an error."""
    found = list(host(compiled(tmp_path).resolved, facts(tmp_path, helper=helper), WHERE))

    assert [(i.code, i.severity) for i in found] == [("sip-helper", s) for s in severities]


def test_drift_and_others(tmp_path: Path) -> None:
    """Rules that differ or are not there, who would be locked out, and what goes past the rules."""

    def check(**more: object) -> list[tuple[str, str, int]]:
        return said(host(compiled(tmp_path).resolved, facts(tmp_path, **more), WHERE))

    assert check(drift=Drift(True, True)) == []
    assert check(drift=Drift(True, False, ("add rule",))) == [("drift", "error", 1)]
    assert check(drift=Drift(False, False)) == [("not-loaded", "error", 1)]
    assert check(locked_out=(Finding("lock-out", "8.8.8.8 could not", Position("policy.yaml", 13)),)) == [("lock-out", "error", 13)]
    assert check(rules=Rules(legacy=3)) == []
    assert check(rules=Rules(legacy=3, nft=1)) == [("two-variants", "warning", 0)]
    assert check(rules=Rules(published=(Published("tcp", (80, 80), "172.17.0.2:80", "nat/DOCKER"),))) == [("docker-bypass", "error", 0)]
    assert check(rules=Rules(meddling=(Changed("ip filter INPUT drops everything before"),))) == [("rules-before", "warning", 0)]
    assert check(rules=Rules(meddling=(Changed("ip filter INPUT accepts everything before", opens=True),))) == [
        ("rules-before", "error", 0)
    ]
    assert check(rules=Rules(meddling=(Changed("dnat to tcp dport map @m", True, "tcp/7777"),))) == [("docker-bypass", "error", 0)]


DOCKER = """# Generated by iptables-save
*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A DOCKER ! -i docker0 -p udp -m udp --dport 16384:32768 -j DNAT --to-destination 172.17.0.3
-A DOCKER -d 127.0.0.1/32 ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 172.17.0.4:80
-A DOCKER -p tcp -m tcp --dport 8082 -j DNAT --to-destination 203.0.113.5:80
-A DOCKER -p tcp -m tcp --dport 8083 -j REDIRECT --to-ports 8084
COMMIT
"""


def test_published_ports() -> None:
    """Ports that are handed on to another address; not those for the host itself, on loopback, or redirected to a local port."""
    own = {4: ((0xCB007105, 0xCB007105),)}
    ruleset = load("iptables-nft").foreign([Saved("iptables-nft", DOCKER)], Ruleset())

    found = [(p.protocol, p.span, p.to, p.by) for p in published(ruleset, own, "iptables-nft")]

    assert found == [
        ("tcp", (8080, 8080), "172.17.0.2:80", "iptables-nft nat/DOCKER"),
        ("udp", (16384, 32768), "172.17.0.3", "iptables-nft nat/DOCKER"),
    ]


def test_findings_come_in_order() -> None:
    """The worst first, lines by number, nothing twice."""
    lines = [Issue("drift", "error", "x", Position("p", n)) for n in (10, 9, 100, 9)]
    found = in_order([Issue("sip-helper", "note", "n"), *lines, Issue("ami-bind", "warning", "w")])

    assert [(i.severity, i.at.line if i.at else 0) for i in found] == [
        ("error", 9),
        ("error", 10),
        ("error", 100),
        ("warning", 0),
        ("note", 0),
    ]


def test_codes_do_not_mean_two_things() -> None:
    """The audit's codes are none of the policy's, and every finding in the sources has one of both."""
    assert not set(CODES) & set(POLICY_CODES)
