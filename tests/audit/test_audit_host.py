"""The audit of two hosts in namespaces: on the right one it finds nothing, on the wrong one every planted fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from contextlib import chdir
from pathlib import Path

import pytest
from audit.dialer import EXAMPLES, NAME, OK, REDIRECT, Dialer, certificate, dialer
from cli.harness import BACKENDS, Host, Ran, program, valid

from fwcompiler.asterisk import MAX_BYTES

POLICY = """version: 1
name: dialer1
groups:
  carriers: [198.51.100.16/28]
  cluster: [10.20.0.0/24]
  admins: [192.0.2.10]
services:
  sip: {from: [carriers, cluster]}
  rtp: {from: anywhere, ports: 10000-14999}
  http: {from: anywhere}
  https: {from: anywhere}
  wss: {from: [cluster, admins]}
  ssh: {from: [admins]}
"""

HTTP_CONF = (EXAMPLES / "http.conf").read_text(encoding="utf-8")
SIP_CONF = (EXAMPLES / "sip-behind-nat.conf").read_text(encoding="utf-8").replace("192.168.50.0/255.255.255.0", "10.20.0.0/255.255.255.0")


@pytest.fixture
def host(tmp_path: Path, netns: str) -> Host:
    """A host for `fwc`."""
    return Host(tmp_path, netns)


def audit(host: Host, *arguments: str) -> Ran:
    """Audit the policy that was written last, from its folder."""
    (host.folder / "asterisk").mkdir(exist_ok=True)
    if not (host.folder / "ca.pem").exists():
        (host.folder / "ca.pem").write_bytes(certificate("Example CA", authority=True).pem)
    with chdir(host.folder):
        return host.fwc("audit", "policy.yaml", "--asterisk-dir", "asterisk", "--name", NAME, "--ca", "ca.pem", *arguments)


def right(made: Dialer) -> None:
    """Everything as it should be."""
    authority = certificate("Example CA", authority=True)
    (made.folder / "ca.pem").write_bytes(authority.pem)
    good = certificate(issuer=authority)
    made.write("good.pem", good.pem.decode())
    made.write("rtp.conf", (EXAMPLES / "rtp-dialer1.conf").read_text(encoding="utf-8"))
    made.write("http.conf", HTTP_CONF.replace("/etc/apache2/ssl.crt/vicibox.crt", "good.pem"))
    made.write(
        "sip.conf", f"{SIP_CONF}register => user:word@198.51.100.18/100\n[carrier](!)\ntype=peer\n[a](carrier)\nhost=198.51.100.17\n"
    )
    made.write("manager.conf", "[general]\nenabled=yes\nbindaddr=127.0.0.1\n[vici]\nsecret=0tR-vq81_long-one\n")
    made.udp(5060)
    made.tcp(22)
    made.tcp(80, answer=REDIRECT)
    made.tcp(443, tls=good)
    made.tcp(8089, tls=good)
    made.tcp(5038, "127.0.0.1")
    made.tcp(8088, "127.0.0.1")


def wrong(made: Dialer) -> None:
    """The faults, one of each kind."""
    authority = certificate("Example CA", authority=True)
    (made.folder / "ca.pem").write_bytes(authority.pem)
    expired, other = certificate(issuer=authority, start=-100, days=90), certificate("pbx.example.org")
    made.write("renewed.pem", certificate(issuer=authority).pem.decode())
    made.write("rtp.conf", (EXAMPLES / "rtp-dialer2.conf").read_text(encoding="utf-8").replace("strictrtp=yes", "strictrtp=no"))
    http = HTTP_CONF.replace("/etc/apache2/ssl.crt/vicibox.crt", "renewed.pem")
    made.write("http.conf", http.replace("bindaddr=127.0.0.1", "bindaddr=0.0.0.0"))
    sip = SIP_CONF.replace("allowguest=no", "").replace("externip=203.0.113.5", "externip=203.0.113.99")
    made.write("sip.conf", f"{sip}register => user:word@198.51.100.99\n[named]\nhost=sip.example.net\n#exec /bin/false\n")
    made.write("manager.conf", f"{(EXAMPLES / 'manager-risky.conf').read_text(encoding='utf-8')}\n[cron]\nsecret = 1234\n")
    made.udp(5060)
    made.tcp(22)
    made.tcp(80, answer=OK)
    made.tcp(443, tls=expired)
    made.tcp(8089, tls=other)
    made.tcp(5038)
    made.tcp(8088)
    made.tcp(9999)
    made.connect("10.20.0.11", "203.0.113.5", 22)
    for rule in DOCKER:
        made.run("iptables-nft", "-t", "nat", *rule.split())
    made.run("iptables-legacy", "-I", "INPUT", "-s", "192.0.2.66", "-j", "DROP")


DOCKER = (
    "-N DOCKER",
    "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
    "-A DOCKER -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
    "-A DOCKER -d 127.0.0.1/32 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 172.17.0.3:80",
)
"""As docker publishes two ports, the second for the host itself only."""

PLANTED = {
    ("ami-bind", "warning"),
    ("ami-permit", "warning"),
    ("ami-secret", "error"),
    ("asterisk-file", "note"),
    ("certificate-chain", "error"),
    ("certificate-expired", "error"),
    ("certificate-name", "error"),
    ("certificate-stale", "warning"),
    ("docker-bypass", "error"),
    ("drift", "error"),
    ("external-address", "warning"),
    ("guests", "warning"),
    ("http-plain", "warning"),
    ("listener", "warning"),
    ("lock-out", "error"),
    ("peer-missing", "error"),
    ("peer-name", "note"),
    ("redirect", "error"),
    ("rtp-range", "error"),
    ("rules-before", "warning"),
    ("rtp-range", "warning"),
    ("strict-rtp", "warning"),
    ("two-variants", "warning"),
}
MACHINE = {"sip-helper"}
"""What depends on the machine's modules, not on the namespace."""


def found(ran: Ran) -> set[tuple[str, str]]:
    """Codes and severities of an audit's JSON."""
    return {(f["code"], f["severity"]) for f in valid("audit", ran.json)["findings"] if f["code"] not in MACHINE}


def drift(host: Host) -> None:
    """A rule by hand, in front of all of ours."""
    if host.backend == "nftables":
        host.run("nft", "insert", "rule", "inet", "fwc", "input", "tcp", "dport", "9999", "accept")
    else:
        host.iptables("-I", "FWC-input", "-p", "tcp", "--dport", "9999", "-j", "ACCEPT")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_found_on_the_right_host(host: Host, backend: str) -> None:
    """A host that agrees with its policy in everything: no finding at all, and the exit code says so."""
    host.backend = backend
    host.apply(POLICY)
    with dialer(host.netns, host.folder) as made:
        right(made)
        ran = audit(host, "--json", "--fail-on", "warning")

    assert found(ran) == set()
    assert (ran.code, ran.json["ok"], ran.json["in_sync"], ran.json["left_out"]) == (0, True, True, [])
    assert {c["place"] for c in ran.json["certificates"]} == {"tcp/443", "tcp/8089", "asterisk/good.pem"}
    assert {c["days_left"] for c in ran.json["certificates"]} == {88}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_planted_fault_is_found(host: Host, backend: str) -> None:
    """One fault of each kind, and each is found with its code and severity; nothing else is."""
    host.backend = backend
    host.apply(POLICY)
    drift(host)
    with dialer(host.netns, host.folder) as made:
        wrong(made)
        ran = audit(host, "--json")

    assert found(ran) == PLANTED
    assert ran.code == 1
    places = {(f["code"], f["at"] or f["place"]) for f in ran.json["findings"]}
    policy, asterisk = "policy.yaml", "asterisk"
    assert places >= {
        ("rtp-range", f"{policy}:9:3"),
        ("redirect", f"{policy}:10:3"),
        ("lock-out", f"{policy}:13:3"),
        ("drift", f"{policy}:1:1"),
        ("ami-secret", f"{asterisk}/manager.conf:8:1"),
        ("ami-bind", f"{asterisk}/manager.conf:5:1"),
        ("guests", f"{asterisk}/sip.conf:1:1"),
        ("peer-missing", f"{asterisk}/sip.conf:12:1"),
        ("strict-rtp", f"{asterisk}/rtp.conf:4:1"),
        ("certificate-expired", "tcp/443"),
        ("certificate-name", "tcp/8089"),
        ("certificate-chain", "tcp/8089"),
        ("docker-bypass", "tcp/8080"),
        ("listener", "tcp/9999"),
        ("listener", "tcp/5038"),
        ("listener", "tcp/8088"),
    }
    assert ("docker-bypass", "tcp/8081") not in places
    assert "secret = " not in json.dumps(ran.json)


UNPRIVILEGED = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--ambient-caps=-all")


def test_without_any_right(host: Host) -> None:
    """Who may not see rules gets everything else, and is told what was left out."""
    host.apply(POLICY)
    with dialer(host.netns, host.folder) as made:
        wrong(made)
        with (made.asterisk / "manager.conf").open("a", encoding="utf-8") as file:
            file.write("#include closed/*.conf\n#include closed/users.conf\n#include users.conf\n")
        made.write("users.conf", "[somebody]\nsecret=1234\n")
        (made.asterisk / "closed").mkdir(mode=0)
        (made.asterisk / "users.conf").chmod(0)
        inside = ("ip", "netns", "exec", host.netns, *UNPRIVILEGED)
        arguments = ("--asterisk-dir", "asterisk", "--name", NAME, "--ca", "ca.pem", "--state-dir", str(host.state), "--json")
        ran = program("audit", "policy.yaml", *arguments, prefix=inside, cwd=host.folder)

    assert ran.code == 1, ran.err
    assert {code for code, _ in PLANTED} - {code for code, _ in found(ran)} == {"docker-bypass", "drift", "rules-before", "two-variants"}
    assert ran.json["in_sync"] is None
    assert [line.partition(":")[0] for line in ran.json["left_out"]] == ["other packet filters", "drift"]
    closed = [f["at"] for f in ran.json["findings"] if "cannot be read here" in f["message"]]
    assert closed == [f"asterisk/manager.conf:{line}:1" for line in (9, 10, 11)]


def test_asterisks_folder_without_any_right(host: Host) -> None:
    """As it is installed, only Asterisk's own group may look into the folder: that is said once, and the rest is looked at."""
    host.apply(POLICY)
    made = host.folder / "asterisk"
    made.mkdir(mode=0)
    inside = ("ip", "netns", "exec", host.netns, *UNPRIVILEGED)
    arguments = ("--asterisk-dir", "asterisk", "--state-dir", str(host.state), "--json")
    ran = program("audit", "policy.yaml", *arguments, prefix=inside, cwd=host.folder)

    assert (ran.code, ran.err) == (0, "")
    assert [line for line in ran.json["left_out"] if "Asterisk" in line] == [
        "agreement with Asterisk: asterisk cannot be looked into (this needs root, or the group asterisk)"
    ]


def test_a_wrong_command_line(host: Host) -> None:
    """Folders, files and forms that are not there are refused before anything is asked."""
    host.write(POLICY)
    policy = str(host.folder / "policy.yaml")

    for wrong_ in (("--asterisk-dir", "nowhere"), ("--ca", "nowhere"), ("--ca", policy), ("--json", "--sarif"), ("--fail-on", "sometimes")):
        ran = host.fwc("audit", policy, *wrong_)
        assert (ran.code, ran.out) == (2, ""), wrong_
    assert host.fwc("audit", policy, "--html", str(host.folder / "no" / "page.html")).code == 2
    assert host.fwc("audit", str(host.folder / "none.yaml")).code == 3


@pytest.mark.parametrize(("level", "code"), [("never", 0), ("error", 0), ("warning", 1), ("note", 1)])
def test_fail_on(host: Host, level: str, code: int) -> None:
    """The exit code is 1 from the severity on that was asked for."""
    host.apply("version: 1\ngroups:\n  admins: [192.0.2.10]\nservices:\n  ssh: {from: [admins]}\n")

    assert audit(host, "--fail-on", level).code == code


def test_the_text_says_where_and_what_to_do(host: Host) -> None:
    """For a terminal: place, severity, code, message, remedy; then the counts. Secrets are not among it."""
    host.apply(POLICY)
    with dialer(host.netns, host.folder) as made:
        wrong(made)
        ran = audit(host, "-v")

    assert "asterisk/manager.conf:8:1: error[ami-secret]: the manager user `cron` has a secret" in ran.out
    assert re.search(r"^  remedy: strictrtp=yes$", ran.out, re.M)
    assert re.search(r"^carriers +yes +yes +yes +yes +- +-$", ran.out, re.M)
    assert re.search(r"^tcp/443 +dialer1.example.net +-10$", ran.out, re.M)
    assert re.search(r"^policy.yaml: 9 errors, 13 warnings, [0-9] notes?$", ran.out, re.M)
    assert "1234" not in ran.out


def test_sarif_points_at_lines(host: Host) -> None:
    """SARIF 2.1.0 by its essentials: every result has a rule, a level, a text, and a place that begins at 1:1 or behind."""
    host.apply(POLICY)
    with dialer(host.netns, host.folder) as made:
        wrong(made)
        log = audit(host, "--sarif").json

    assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
    driver, results = log["runs"][0]["tool"]["driver"], log["runs"][0]["results"]
    assert driver["name"] == "fwc"
    rules = [rule["id"] for rule in driver["rules"]]
    assert len(rules) == len(set(rules))
    for result in results:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        place = result["locations"][0]["physicalLocation"]
        assert re.fullmatch(r"[\w./-]+", place["artifactLocation"]["uri"])
        assert min(place["region"].values()) >= 1
    where = {(r["ruleId"], r["locations"][0]["physicalLocation"]["region"]["startLine"]) for r in results}
    assert where >= {("rtp-range", 9), ("redirect", 10), ("lock-out", 13), ("ami-secret", 8), ("docker-bypass", 1)}


IMAGE = Path(__file__).resolve().parents[2] / "docs" / "images" / "audit.png"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=0.8", "--window-size=1160,1900"),
)


def chromium(folder: Path, file: Path, *arguments: str) -> str:
    """What headless Chromium prints about a file; skips where there is no Chromium."""
    program = next((p for name in CHROMIUM if (p := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs Chromium (scripts/test installs it)")
    profile = folder / f"profile-{len(list(folder.iterdir()))}"
    command = (program, *FLAGS, f"--user-data-dir={profile}", *arguments, file.as_uri())
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    return done.stdout


def test_the_page_opens_in_a_browser(host: Host, update_picture: bool) -> None:
    """The page shows its findings, the matrix, the plan and the certificates in Chromium, and is drawn; the docs show that picture."""
    host.apply(POLICY)
    drift(host)
    with dialer(host.netns, host.folder) as made:
        wrong(made)
        assert audit(host, "--html", "audit.html", "-q").code == 1

    page, picture = host.folder / "audit.html", host.folder / "audit.png"
    text = re.sub(r"<[^>]+>", " ", chromium(host.folder, page, "--dump-dom").partition("<body>")[2])
    for words in ("Firewall audit of dialer1", "Something has to be done now", "ami-secret", "Remedy", "rtp udp/10000-14999"):
        assert words in text
    assert re.search(r"audio\s+udp/15000-19999", text)
    assert re.search(r"tcp/443\s+dialer1.example.net\s+CN=Example CA\s+\d{4}-\d\d-\d\d\s+-10", text)
    assert "1234" not in text
    chromium(host.folder, page, f"--screenshot={picture}")
    head = picture.read_bytes()[:24]
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (928, 1520)
    assert picture.stat().st_size > 40_000
    if update_picture:
        IMAGE.write_bytes(picture.read_bytes())


def test_ports_that_a_map_hands_on(host: Host) -> None:
    """A port that a map of nftables hands on to a container goes past the policy as one that a rule names does."""
    host.apply(POLICY)
    with dialer(host.netns, host.folder) as made:
        made.run("nft", BY_MAP)
        ran = audit(host)

    assert re.search(
        r"tcp/7777: error\[docker-bypass\].* redirects them: table ip published, chain p: dnat to tcp dport map @ports", ran.out
    )
    assert "tcp/7778: error[docker-bypass]" in ran.out


BY_MAP = """
add table ip published
add chain ip published p { type nat hook prerouting priority dstnat; }
add map ip published ports { type inet_service : ipv4_addr; elements = { 7777 : 172.17.0.5 } }
add rule ip published p dnat to tcp dport map @ports
add rule ip published p tcp dport 7778 dnat to 172.17.0.6:80
"""


def test_rules_in_front_of_ours(host: Host) -> None:
    """A rule that lets strangers in before ours are asked is an error; one that keeps somebody out is a warning."""
    host.backend = "iptables-nft"
    host.apply(POLICY)
    host.iptables("-I", "INPUT", "-p", "tcp", "--dport", "7779", "-j", "ACCEPT")
    host.iptables("-I", "INPUT", "-s", "192.0.2.66", "-j", "DROP")
    ran = audit(host)

    assert re.search(r"error\[rules-before\].*tcp/7779.*but the host accepts them", ran.out)
    assert re.search(r"warning\[rules-before\].*192.0.2.66.*but the host drops them", ran.out)


def test_an_rtp_conf_that_is_too_large(host: Host) -> None:
    """It is left out, with the reason; nothing is said about what it sets."""
    host.apply(POLICY)
    (host.folder / "asterisk").mkdir()
    (host.folder / "asterisk" / "http.conf").write_text(HTTP_CONF, encoding="utf-8")
    (host.folder / "asterisk" / "rtp.conf").write_bytes(b"[general]\n" + b"\n" * MAX_BYTES)
    ran = audit(host, "--json")

    assert not {"rtp-values", "rtp-range"} & {f["code"] for f in ran.json["findings"]}
    assert [line for line in ran.json["left_out"] if "rtp.conf" in line] == [
        "agreement with Asterisk: asterisk/rtp.conf is larger than 8 MiB"
    ]


def test_servers_that_talk_something_else(host: Host) -> None:
    """What answers on the web ports is not believed: no garbage reaches the terminal, and TLS ports without TLS are errors."""
    host.apply(POLICY)
    with dialer(host.netns, host.folder) as made:
        for port in (80, 443, 8089):
            made.tcp(port, answer=b"\x00\x1b[31m garbage\r\n\r\n")
        ran = audit(host)

    assert "the redirect on tcp/80: what answers does not talk HTTP" in ran.out
    assert all(f"tcp/{port}: error[certificate-none]" in ran.out for port in (443, 8089))
    assert all(c.isprintable() or c == "\n" for c in ran.out)


@pytest.mark.parametrize("target", ["http://dialer1.example.net:99999/", "http://[::1", "https:"])
def test_redirects_that_lead_nowhere(host: Host, target: str) -> None:
    """What a server sends for a place is no URL: it does not end at HTTPS, and is told as it is."""
    host.apply(POLICY)
    with dialer(host.netns, host.folder) as made:
        made.tcp(80, answer=REDIRECT.replace(f"https://{NAME}/".encode(), target.encode()))
        ran = audit(host)

    assert f"error[redirect]: plain HTTP leads to {target} and does not end at HTTPS after 1 requests" in ran.out
