"""One policy for a whole installation on the command line: real fleets, every host's files, and what goes into rtp.conf."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fwcompiler import cli

FLEETS = Path(__file__).resolve().parent.parent / "data" / "fleet"
ROLES = {
    "telephony": "dialer",
    "web": "web",
    "database": "database",
    "database-replica": "database",
    "archive": "archive",
    "db+web+telephony": "all-in-one",
}
SERVICES = """services:
  sip: {from: [carriers, cluster]}
  rtp: {from: anywhere}
  http: {from: anywhere}
  https: {from: anywhere}
  mariadb: {from: [cluster]}
  ami: {from: [cluster]}
  ftp: {from: [cluster]}
  ssh: {from: [admins]}
"""
GROUPS = "version: 1\ngroups: {carriers: [198.51.100.16/28], admins: [192.0.2.10]}\n"


def rows(name: str) -> list[dict[str, str]]:
    """The lines of a fleet's table, without its notes."""
    lines = (FLEETS / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def public_policy(folder: Path, name: str) -> Path:
    """A fleet of hosts with roles and addresses as a policy."""
    hosts = []
    for row in rows(name):
        addresses = ", ".join(filter(None, (row["public_ip"], row["lan_ip"])))
        rtp = f", rtp: {row['rtp_start']}-{row['rtp_end']}" if row.get("rtp_start") else ""
        hosts.append(f"  {row['host']}: {{role: {ROLES[row['roles']]}, addresses: [{addresses}]{rtp}}}\n")
    path = folder / "fleet.yaml"
    path.write_text(f"{GROUPS}hosts:\n{''.join(hosts)}{SERVICES}", encoding="utf-8")
    return path


def nat_policy(folder: Path, name: str, chunk: int = 2500) -> Path:
    """A fleet behind one firewall as a policy."""
    dialers = rows(name)
    owner = next(row["host"] for row in dialers if row["sip_5060_target"] == "yes")
    hosts = "".join(f"  {row['host']}: {{role: dialer, addresses: [{row['lan_ip']}]}}\n" for row in dialers)
    edge = f"edge: {{host: gw, inbound_sip: {owner}, rtp: {{first: 10000, chunk: {chunk}}}}}\n"
    path = folder / "fleet.yaml"
    gateway = "  gw: {role: edge, wan: eth0, lan: eth1, addresses: [203.0.113.5, 192.168.50.1]}\n"
    path.write_text(f"{GROUPS}hosts:\n{gateway}{hosts}{edge}{SERVICES}", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state directory of the test's own."""
    monkeypatch.setenv("FWC_STATE_DIR", str(tmp_path / "state"))


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_every_host_of_a_public_cluster(tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Seventeen hosts with public and private addresses: each gets what its role needs, and the cluster is all of them."""
    policy = public_policy(tmp_path, "cluster-300-agents-public.csv")
    out = tmp_path / "out"
    assert cli.run(["compile", str(policy), "--all", "-o", str(out), "--backend", backend, "-q"]) == 0, capsys.readouterr().err
    texts = {p.name: "".join(f.read_text(encoding="utf-8") for f in sorted(p.iterdir())) for p in out.iterdir()}

    assert sorted(texts) == sorted(row["host"] for row in rows("cluster-300-agents-public.csv"))
    port = "dport 3306"
    assert {name for name, text in texts.items() if port in text} == {"DB1", "DB2"}
    assert {name for name, text in texts.items() if "dport 21 " in text} == {"archive1"}
    assert {name for name, text in texts.items() if "dport 5060" in text} == {f"dial{i}" for i in range(1, 13)}
    assert all(text.count("192.168.50.4") and text.count("203.0.113.2") for name, text in texts.items() if name.startswith("dial"))


def test_one_host_for_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The all-in-one host offers everything that the policy has."""
    policy = public_policy(tmp_path, "all-in-one.csv")
    assert cli.run(["compile", str(policy), "--host", "vici1", "--backend", "nftables"]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out

    assert all(f"chain service.{name}" in text for name in ("sip", "rtp", "http", "https", "mariadb", "ami", "ftp", "ssh"))


def test_twelve_dialers_behind_one_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table's own plan comes out: every dialer's chunk in its rtp.conf, in its rules and in the edge's."""
    policy = nat_policy(tmp_path, "cluster-12-behind-nat.csv")
    assert cli.run(["check", str(policy), "--backend", "nftables", "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert [f["code"] for f in found["findings"] if f["severity"] == "warning"] == ["local-ports", "not-forwarded", "not-forwarded"]
    out = tmp_path / "out"
    assert cli.run(["compile", str(policy), "--all", "-o", str(out), "--backend", "nftables", "-q"]) == 0

    edge = (out / "gw" / "fwc.nft").read_text(encoding="utf-8")
    for row in rows("cluster-12-behind-nat.csv"):
        conf = f"[general]\nrtpstart={row['rtp_start']}\nrtpend={row['rtp_end']}\n"
        assert (out / "gw" / f"rtp.conf.{row['host']}").read_text(encoding="utf-8") == conf
        assert (out / row["host"] / f"rtp.conf.{row['host']}").read_text(encoding="utf-8") == conf
        assert f"udp dport {row['rtp_start']}-{row['rtp_end']} dnat ip to {row['lan_ip']}\n" in edge
        assert f"udp dport {row['rtp_start']}-{row['rtp_end']} goto" in (out / row["host"] / "fwc.nft").read_text(encoding="utf-8")
    assert edge.count("udp dport 5060 dnat ip to 192.168.50.11") == edge.count("udp dport 5060 dnat")


def test_twelve_large_chunks_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """5,000 ports fit eleven dialers: fwc says so, and what fits twelve."""
    policy = nat_policy(tmp_path, "cluster-12-behind-nat.csv", 5000)

    assert cli.run(["check", str(policy), "--backend", "nftables"]) == 3
    error = capsys.readouterr().err
    assert "11 would, the last one 60000-64999" in error
    assert "chunk: 4600 fits 12" in error


def test_what_is_printed_can_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dialers' rtp.conf stands in comments where the rules are printed; as JSON it is a file among the others."""
    policy = nat_policy(tmp_path, "cluster-12-behind-nat.csv")
    assert cli.run(["compile", str(policy), "--host", "dial2", "--backend", "nftables"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["# rtp.conf.dial2:", "# [general]", "# rtpstart=12500", "# rtpend=14999"]
    assert all(line.startswith("#") for line in lines[: lines.index("table inet fwc {")])
    assert cli.run(["compile", str(policy), "--host", "dial2", "--backend", "nftables", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["files"]) >= {"fwc.nft", "rtp.conf.dial2"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compile", "--all"], "say where: -o DIR"),
        (["compile", "--all", "-o", "out", "--host", "gw"], "leave --host or --all out"),
        (["compile"], "hosts of this policy: gw, dial1"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that would have to guess a host or a folder says what is missing."""
    policy = nat_policy(tmp_path, "cluster-12-behind-nat.csv")

    assert cli.run([arguments[0], str(policy), *arguments[1:], "--backend", "nftables"]) == 2
    assert said in capsys.readouterr().err
