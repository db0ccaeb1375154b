"""Hosts of a policy: which one is meant, what each offers, and the chunk plan of the dialers behind an edge."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwcompiler.catalogue import CATALOGUE
from fwcompiler.diagnostics import Finding, PolicyRejected, Report, UsageError
from fwcompiler.edge import LOCAL_PORTS
from fwcompiler.fleet import pick_host
from fwcompiler.include import load_merged
from fwcompiler.pipeline import compile_all
from fwcompiler.policy import validate
from fwcompiler.resolve import resolve
from fwcompiler.resolved import Resolved

NAMES = ("gw", "dialer1", "dialer2.example.net", "Web1")


def resolved(folder: Path, text: str, host: str | None = None) -> tuple[Resolved, tuple[Finding, ...]]:
    """A policy resolved for one host, and what was found on the way."""
    path = folder / "policy.yaml"
    path.write_text(f"version: 1\n{text}", encoding="utf-8")
    report = Report()
    document = load_merged(str(path), report)
    assert document is not None
    policy = validate(document, report)
    assert policy is not None, report.findings
    return resolve(policy, document, report, today=date(2026, 1, 1), host=host), report.sorted()


def ports(policy: Resolved) -> Mapping[str, tuple[str, ...]]:
    """By service, the ports of the host."""
    return {s.name: s.port_texts() for s in policy.services}


@pytest.mark.parametrize(
    ("asked", "machine", "expected"),
    [
        (None, "dialer1", "dialer1"),
        (None, "dialer1.example.net", "dialer1"),
        (None, "dialer2", "dialer2.example.net"),
        (None, "dialer2.example.net", "dialer2.example.net"),
        (None, "WEB1", "Web1"),
        ("gw", "dialer1", "gw"),
        ("gw.example.net", "dialer1", "gw"),
    ],
)
def test_a_host_is_known_by_its_short_or_full_name(asked: str | None, machine: str, expected: str) -> None:
    """The name asked for decides, else the machine's; one of both may have a domain, upper case does not matter."""
    assert pick_host(NAMES, asked, machine) == expected


@pytest.mark.parametrize("machine", ["dialer2.example.org", "laptop", "dialer"])
def test_another_machine_is_told_all_hosts(machine: str) -> None:
    """A machine that is none of the hosts, or of another domain than the host of its name, is refused and shown the list."""
    with pytest.raises(UsageError) as refused:
        pick_host(NAMES, None, machine)

    assert machine in refused.value.message
    assert "gw, dialer1, dialer2.example.net, Web1" in refused.value.hint


def test_a_name_that_could_be_two_hosts_is_refused() -> None:
    """Two hosts of the same first label are told apart by their full names only."""
    with pytest.raises(UsageError, match="could be"):
        pick_host(("a.example.net", "a.example.org"), "a", "elsewhere")
    assert pick_host(("a.example.net", "a.example.org"), "a.example.org", "elsewhere") == "a.example.org"


def test_names_that_differ_in_capitals_only(tmp_path: Path) -> None:
    """They are one name, which the policy's errors say; the exact one is still found, so that they can be told."""
    text = """
hosts:
  dialer1: {role: dialer, addresses: [10.20.0.11]}
  Dialer1: {role: dialer, addresses: [10.20.0.12]}
services: {ssh: {from: [cluster]}}
"""
    _, findings = resolved(tmp_path, text, "dialer1")

    assert [(f.code, f.at and f.at.line) for f in findings] == [("name", 5)]
    assert pick_host(("dialer1", "Dialer1"), "Dialer1", "elsewhere") == "Dialer1"


def test_a_policy_without_hosts_is_for_any_machine() -> None:
    """Without `hosts` there is nothing to choose, and a --host is a mistake."""
    assert pick_host((), None, "anything") is None
    with pytest.raises(UsageError):
        pick_host((), "gw", "anything")


EVERY_SERVICE = "groups: {a: [192.0.2.1]}\nservices:\n" + "".join(
    f"  {name}: {{from: [a]}}\n" for name in CATALOGUE if name not in ("iax2", "udptl")
)


@pytest.mark.parametrize(
    ("role", "has", "lacks"),
    [
        ("dialer", "sip rtp wss ami https dynportal ssh ntp node-exporter", "mariadb ftp rsync"),
        ("web", "http https dynportal ssh", "sip rtp wss ami mariadb ftp"),
        ("database", "mariadb ssh", "sip https ami ftp"),
        ("archive", "ftp rsync ssh", "sip https mariadb"),
        ("edge", "ssh ntp node-exporter", "sip rtp https mariadb ftp"),
        ("[web, database]", "https mariadb", "sip ftp"),
    ],
)
def test_the_catalogue_binds_services_to_roles(tmp_path: Path, role: str, has: str, lacks: str) -> None:
    """Each role offers what hosts of its kind offer, and nothing else."""
    policy, _ = resolved(tmp_path, EVERY_SERVICE + f"hosts: {{h: {{role: {role}, addresses: [10.0.0.1]}}}}", "h")
    offered = set(ports(policy))

    assert set(has.split()) <= offered
    assert not set(lacks.split()) & offered


def test_all_in_one_is_a_policy_without_hosts(tmp_path: Path) -> None:
    """The host of a policy that names none, and one that plays every role, offer the same."""
    alone, _ = resolved(tmp_path, EVERY_SERVICE)
    named, _ = resolved(tmp_path, EVERY_SERVICE + "hosts: {h: {role: all-in-one, addresses: [10.0.0.1]}}", "h")

    assert alone.services == named.services
    assert len(alone.services) == len(CATALOGUE) - 2


@pytest.mark.parametrize(("host", "expected"), [("d1", {"ssh", "own", "sip"}), ("d2", {"own", "here"}), ("w1", {"own", "https", "here"})])
def test_on_takes_the_place_of_the_roles(tmp_path: Path, host: str, expected: set[str]) -> None:
    """`on` names roles or hosts; a service of one's own is everywhere where nothing is said."""
    text = """
groups: {a: [192.0.2.1]}
hosts:
  d1: {role: dialer, addresses: [10.0.0.1]}
  d2: {role: dialer, addresses: [10.0.0.2]}
  w1: {role: web, addresses: [10.0.0.3]}
services:
  sip: {from: [a], on: d1}
  https: {from: anywhere, on: [web]}
  ssh: {from: [a], on: [d1]}
  own: {from: [a], ports: tcp/9999}
  here: {from: [a], ports: tcp/9998, on: [web, d2]}
"""
    policy, _ = resolved(tmp_path, text, host)

    assert set(ports(policy)) == expected


def test_the_cluster_is_every_address_of_every_host(tmp_path: Path) -> None:
    """The generated group holds public and private addresses of all hosts, the one compiled for too, each with its line."""
    text = """
hosts:
  d1: {role: dialer, addresses: [203.0.113.11, "2001:db8::11"]}
  db: {role: database, addresses: [192.168.50.4]}
services:
  mariadb: {from: [cluster]}
"""
    policy, findings = resolved(tmp_path, text, "db")
    cluster = policy.groups["cluster"]

    assert cluster.addresses.texts() == ("192.168.50.4", "203.0.113.11", "2001:db8::11")
    where = cluster.where(4, 0xCB00710B)
    assert where is not None
    assert (where.line, where.column) == (4, 34)
    assert findings == ()


def test_a_cluster_of_ones_own_wins_and_a_forgotten_host_is_told(tmp_path: Path) -> None:
    """A group called `cluster` in the policy is taken as it stands; a host with no address in it earns a warning."""
    text = """
groups: {cluster: [10.20.0.0/24]}
hosts:
  d1: {role: dialer, addresses: [10.20.0.11, 203.0.113.11]}
  db: {role: database, addresses: [10.30.0.4]}
services:
  mariadb: {from: [cluster]}
"""
    policy, findings = resolved(tmp_path, text, "db")

    assert policy.groups["cluster"].addresses.texts() == ("10.20.0.0/24",)
    assert [(f.code, f.severity, f.message) for f in findings] == [
        ("host-unknown", "warning", "no address of the host `db` is in the group `cluster`")
    ]


def fleet(count: int, plan: str) -> str:
    """A policy with an edge and dialers behind it."""
    dialers = "".join(f"  d{i}: {{role: dialer, addresses: [10.0.0.{i + 10}]}}\n" for i in range(count))
    return (
        "hosts:\n  gw: {role: edge, wan: eth0, lan: eth1, addresses: [203.0.113.1]}\n"
        + dialers
        + f"edge: {{host: gw, inbound_sip: d0, rtp: {plan}}}\nservices: {{sip: {{from: [cluster]}}, rtp: {{from: anywhere}}}}\n"
    )


def test_every_dialer_opens_its_own_chunk_only(tmp_path: Path) -> None:
    """The chunks are dealt out in order, and each dialer's rtp is its chunk."""
    opened = [ports(resolved(tmp_path, fleet(3, "{first: 10000, chunk: 5000}"), f"d{i}")[0])["rtp"] for i in range(3)]

    assert opened == [("udp/10000-14999",), ("udp/15000-19999",), ("udp/20000-24999",)]


@pytest.mark.parametrize(
    ("edge", "dialer", "message"),
    [
        ("203.0.113.1", '"2001:db8::5"', "is behind the edge and has no IPv4 address"),
        ('"2001:db8::1"', "10.0.0.5", "the edge has no IPv4 address"),
        ("203.0.113.1, 10.0.0.1", "10.0.0.1, 10.0.0.5", "its first IPv4 address is the edge's own"),
        ("203.0.113.1", "10.0.0.5, 203.0.113.1", ""),
        ('"2001:db8::1"', '"2001:db8::5"', ""),
    ],
)
def test_what_an_edge_sends_on_has_to_arrive(tmp_path: Path, edge: str, dialer: str, message: str) -> None:
    """A dialer that packets to the edge could not be sent on to, or that they would come back from, is refused at its line."""
    text = f"""hosts:
  gw: {{role: edge, wan: eth0, lan: eth1, addresses: [{edge}]}}
  d0: {{role: dialer, addresses: [{dialer}]}}
edge: {{host: gw, inbound_sip: d0, rtp: {{first: 10000}}}}
services: {{sip: {{from: [cluster]}}, rtp: {{from: anywhere}}}}
"""
    _, findings = resolved(tmp_path, text, "d0")
    errors = [f for f in findings if f.is_error]

    assert [f.code for f in errors] == (["host-address"] if message else [])
    assert all(f.message.endswith(message) and f.at and f.at.line == 4 for f in errors)


def test_a_dialer_may_have_ports_of_its_own(tmp_path: Path) -> None:
    """`rtp` at a host is taken as it stands, and the others get chunks as if it were not there."""
    text = fleet(3, "{first: 10000, chunk: 1000}").replace("addresses: [10.0.0.11]", "addresses: [10.0.0.11], rtp: 20000-20999")
    opened = [ports(resolved(tmp_path, text, f"d{i}")[0])["rtp"] for i in range(3)]

    assert opened == [("udp/10000-10999",), ("udp/20000-20999",), ("udp/11000-11999",)]


def test_public_dialers_may_share_ports(tmp_path: Path) -> None:
    """Without an edge every dialer has an address of its own, and the same media ports are no conflict."""
    text = """
hosts:
  d1: {role: dialer, addresses: [203.0.113.11], rtp: 10000-20000}
  d2: {role: dialer, addresses: [203.0.113.12], rtp: 10000-20000}
services: {rtp: {from: anywhere}}
"""
    policy, findings = resolved(tmp_path, text, "d2")

    assert ports(policy)["rtp"] == ("udp/10000-20000",)
    assert findings == ()


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), first=st.integers(1024, 65535), chunk=st.integers(2, 64512))
def test_chunks_are_disjoint_in_bounds_or_refused(tmp_path_factory: pytest.TempPathFactory, count: int, first: int, chunk: int) -> None:
    """Whatever the plan: all dialers get chunks of the size asked for that nobody shares, or the plan is refused."""
    policy, findings = resolved(tmp_path_factory.mktemp("plan"), fleet(count, f"{{first: {first}, chunk: {chunk}}}"), "d0")
    codes = {f.code for f in findings}
    assert policy.plan is not None
    spans = [c.span for c in policy.plan.chunks]

    assert ("chunk-fit" in codes) == (first + count * chunk > 65536)
    assert ("chunk-fit" in codes) == (spans == [])
    assert all(1024 <= low <= high <= 65535 and high - low + 1 == chunk for low, high in spans)
    assert all(a[1] < b[0] for a, b in pairwise(spans))
    if spans:
        assert ("chunk-odd" in codes) == any(low % 2 for low, _ in spans)
        assert ("local-ports" in codes) == any(low <= LOCAL_PORTS[1] and high >= LOCAL_PORTS[0] for low, high in spans)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 60), first=st.sampled_from([10000, 16384, 40000]))
def test_the_chunk_that_is_proposed_fits(tmp_path_factory: pytest.TempPathFactory, count: int, first: int) -> None:
    """Where the dialers do not fit, the chunk in the hint makes them fit."""
    _, findings = resolved(tmp_path_factory.mktemp("plan"), fleet(count, f"{{first: {first}, chunk: 60000}}"), "d0")
    hint = next(f.hint for f in findings if f.code == "chunk-fit")
    proposed = int(hint.split()[1])
    _, again = resolved(tmp_path_factory.mktemp("plan"), fleet(count, f"{{first: {first}, chunk: {proposed}}}"), "d0")

    assert "chunk-fit" not in {f.code for f in again}


def test_findings_of_all_hosts_come_together(tmp_path: Path) -> None:
    """Checking all hosts reports what is wrong on any of them, once each."""
    path = tmp_path / "policy.yaml"
    path.write_text(
        """version: 1
hosts:
  d1: {role: dialer, addresses: [10.0.0.1]}
  d2: {role: dialer, addresses: [10.0.0.2]}
services: {rtp: {from: anywhere}}
tests:
  - {from: 8.8.8.8, to: udp/10000, expect: drop, host: d1}
  - {from: 8.8.8.8, to: udp/10002, expect: drop, host: d2}
  - {from: 8.8.8.8, to: udp/9999, expect: accept, host: d2}
""",
        encoding="utf-8",
    )
    with pytest.raises(PolicyRejected) as rejected:
        compile_all(str(path))

    assert [f.at.line for f in rejected.value.findings if f.at] == [7, 8, 9]
    assert "on d1, but" in rejected.value.findings[0].message
