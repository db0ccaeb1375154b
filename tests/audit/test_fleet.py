"""Whole installations from tables: one host for everything, a cluster with public addresses, twelve dialers behind one firewall."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from audit.facts import facts

from fwcompiler.audit.agreement import agreement
from fwcompiler.audit.audit import audit
from fwcompiler.audit.signalling import signalling
from fwcompiler.pipeline import Compiled, compile_policy

FLEET = Path(__file__).parent / "fleet"
ROLES = {"telephony": "dialer", "web": "web", "database": "database", "database-replica": "database", "archive": "archive"}
SERVICES = """services:
  sip: {from: [carriers, cluster]}
  rtp: {from: anywhere}
  https: {from: anywhere}
  ami: {from: [cluster]}
  mariadb: {from: [cluster]}
  ssh: {from: [admins]}
"""
GROUPS = "version: 1\ngroups:\n  carriers: [198.51.100.16/28]\n  admins: [192.0.2.10]\nhosts:\n"
SIP = "[general]\nallowguest=no\nexternaddr={}\nlocalnet=192.168.50.0/24\n"


def table(name: str) -> list[dict[str, str]]:
    """Rows of one installation."""
    lines = [line for line in (FLEET / f"{name}.csv").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def hosts(rows: list[dict[str, str]]) -> Iterator[str]:
    """The `hosts` of a policy."""
    for row in rows:
        role = "all-in-one" if "+" in row.get("roles", "") else ROLES[row.get("roles") or "telephony"]
        addresses = ", ".join(a for a in (row["lan_ip"], row.get("public_ip")) if a)
        yield f"  {row['host']}: {{role: {role}, addresses: [{addresses}]}}\n"


def behind_nat() -> str:
    """The policy of twelve dialers behind one firewall, with chunks of 2,500 ports."""
    rows = table("cluster-12-behind-nat")
    edge = "  gw: {role: edge, wan: eth0, lan: eth1, addresses: [203.0.113.5, 192.168.50.1]}\n"
    names = ", ".join(row["host"] for row in rows)
    owner = next(row["host"] for row in rows if row["sip_5060_target"] == "yes")
    plan = f"edge:\n  host: gw\n  inbound_sip: {owner}\n  rtp: {{first: 10000, chunk: 2500}}\n  dialers: [{names}]\n"
    return f"{GROUPS}{edge}{''.join(hosts(rows))}{plan}{SERVICES}"


def compiled(folder: Path, text: str, host: str) -> Compiled:
    """A policy for several, for one of its hosts."""
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return compile_policy(str(path), host=host)


def rtp_conf(first: str, last: str) -> dict[str, str]:
    """An rtp.conf."""
    return {"rtp": f"[general]\nrtpstart={first}\nrtpend={last}\n"}


def test_every_dialer_behind_the_firewall_has_its_chunk(tmp_path: Path) -> None:
    """The table's plan is the policy's: each dialer agrees with its own rtp.conf, and with nobody else's."""
    rows = table("cluster-12-behind-nat")
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        policy = compiled(tmp_path, behind_nat(), row["host"]).resolved
        own, wrong = (facts(tmp_path, rtp_conf(r["rtp_start"], r["rtp_end"])) for r in (row, other))
        assert list(agreement(policy, own)) == []
        found = list(agreement(policy, wrong))
        assert [i.severity for i in found] == ["error", "warning"]
        assert found[0].remedy.startswith(f"rtpstart={row['rtp_start']} and rtpend={row['rtp_end']}")


def test_the_plan_shows_all_dialers(tmp_path: Path) -> None:
    """One lane a dialer, in order and without a gap; the host's own stands out."""
    rows = table("cluster-12-behind-nat")
    found = audit(compiled(tmp_path, behind_nat(), "dial3"), facts(tmp_path))
    lanes = found.plan[: len(rows)]

    assert [(lane.title, *map(str, lane.bars[0].span)) for lane in lanes] == [(r["host"], r["rtp_start"], r["rtp_end"]) for r in rows]
    assert [lane.title for lane in lanes if lane.bars[0].kind == "public"] == ["dial3"]
    assert found.host == "dial3"


def test_the_external_address_is_the_edges(tmp_path: Path) -> None:
    """A dialer behind the firewall has to tell its peers the firewall's address."""
    policy = compiled(tmp_path, behind_nat(), "dial2").resolved

    for address, codes in (("203.0.113.5", []), ("203.0.113.6", ["external-address"])):
        known = facts(tmp_path, {"sip": SIP.format(address)}, ["192.168.50.12"], listeners=())
        assert [i.code for i in signalling(policy, known)] == codes


@pytest.mark.parametrize("row", [r for r in table("cluster-300-agents-public") if r["rtp_start"]], ids=lambda r: r["host"])
def test_dialers_with_public_addresses(tmp_path: Path, row: dict[str, str]) -> None:
    """Each has its own address and the usual ports; its neighbour's address would be wrong."""
    rows = table("cluster-300-agents-public")
    policy = compiled(tmp_path, f"{GROUPS}{''.join(hosts(rows))}{SERVICES}", row["host"]).resolved
    files = {**rtp_conf(row["rtp_start"], row["rtp_end"]), "sip": SIP.format(row["public_ip"])}
    known = facts(tmp_path, files, [row["public_ip"], row["lan_ip"]], listeners=())
    assert [i.code for i in (*agreement(policy, known), *signalling(policy, known))] == []

    other = facts(tmp_path, {"sip": SIP.format("203.0.113.250")}, [row["public_ip"], row["lan_ip"]], listeners=())
    assert [i.code for i in signalling(policy, other)] == ["external-address"]


def test_hosts_without_telephony(tmp_path: Path) -> None:
    """A database or web server has no Asterisk: nothing is said about its files, and the matrix shows its own services."""
    rows = table("cluster-300-agents-public")
    text = f"{GROUPS}{''.join(hosts(rows))}{SERVICES}"

    for name, labels in (("DB1", {"mariadb", "ssh"}), ("web1", {"https", "ssh"})):
        found = audit(compiled(tmp_path, text, name), facts(tmp_path))
        assert {c.label for c in found.matrix.columns} == labels
        assert [i for i in found.issues if i.code.startswith(("rtp", "sip", "wss"))] == []


def test_one_host_for_everything(tmp_path: Path) -> None:
    """All roles on one machine: every service is in its matrix."""
    text = f"{GROUPS}{''.join(hosts(table('all-in-one')))}{SERVICES}"
    found = audit(compiled(tmp_path, text, "vici1"), facts(tmp_path, rtp_conf("10000", "20000")))

    assert {c.label for c in found.matrix.columns} == {"sip", "rtp", "https", "ami", "mariadb", "ssh"}
    assert [i.code for i in found.issues if i.code.startswith("rtp")] == []
