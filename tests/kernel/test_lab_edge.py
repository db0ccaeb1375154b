"""The lab of an edge: who is on which side of it, what is sent, and that wrong rules of every kind are noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fwcompiler import cli
from fwcompiler.addresses import parse_address
from fwcompiler.kernel import runner
from fwcompiler.kernel.labnet import network
from fwcompiler.lab import lab_text, run_lab, try_packets
from fwcompiler.lab_edge import PAST, plan_edge_lab
from fwcompiler.pipeline import Compiled, compile_policy
from fwcompiler.registry import installed, load
from fwcompiler.ruleset import Chain, Final, PortIn, Rule, Translate, masqueraded, sent_on

USABLE = [name for name in installed() if all(runner.find(p) for p in load(name).programs)]
POLICY = """version: 1
groups:
  carriers: [198.51.100.16/28, "2001:db8:51::/48"]
  bad: [192.0.2.99, 198.51.100.20]
  staff: [192.0.2.128/25]
hosts:
  gw: {role: edge, wan: wan0, lan: lan0, addresses: [10.20.0.1, 203.0.113.1, "2001:db8:1::1"]}
  dialer1: {role: dialer, addresses: [10.20.0.11, "2001:db8:20::11"]}
  dialer2: {role: dialer, addresses: [10.20.0.12, "2001:db8:20::12"]}
edge: {host: gw, inbound_sip: dialer2, rtp: {first: 10000, chunk: 5000}}
block: {from: [bad]}
trust: [staff]
services:
  sip: {from: [carriers, cluster]}
  rtp: {from: anywhere}
"""


@pytest.fixture
def kernel(kernel_allowed: bool) -> None:
    """Skips where this user may not make network namespaces."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The policy, compiled for its edge."""
    path = tmp_path_factory.mktemp("edge") / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    return compile_policy(str(path), host="gw")


def with_rules(edge: Compiled, chain: str, *rules: Rule) -> Compiled:
    """The policy with other rules in one chain."""
    chains = tuple(Chain(c.name, rules, c.hook) if c.name == chain else c for c in edge.ruleset.chains)
    return replace(edge, ruleset=replace(edge.ruleset, chains=chains))


def chain(edge: Compiled, name: str) -> tuple[Rule, ...]:
    """The rules of a chain."""
    return next(c.rules for c in edge.ruleset.chains if c.name == name)


def test_who_is_on_which_side(edge: Compiled) -> None:
    """Groups of the policy are outside, its hosts behind; the public address is the one that is asked; no outsider has a host's address."""
    plan = plan_edge_lab(edge.resolved)

    assert plan.places == ("gw", "staff", "carriers", "internet", "blocked", "blocked carriers", "dialer1", "dialer2")
    assert plan.host == {4: parse_address("203.0.113.1")[1], 6: parse_address("2001:db8:1::1")[1]}
    assert plan.router is not None
    assert plan.router.stations == {"wan0": (0, 1, 2, 3, 4), "lan0": (5, 6)}
    assert [address for _, address in plan.router.addresses["lan0"]] == [parse_address("10.20.0.1")[1]]
    assert not [t for t in plan.trials if t.target.service == PAST and t.client.name == "carriers" and t.expected]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("backend", USABLE)
def test_the_policy_agrees(backend: str, edge: Compiled) -> None:
    """Every packet fares as the policy says, and the matrix names the host that got it."""
    result = run_lab(edge, load(backend))
    text = lab_text(result)

    assert result.agrees, text
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in reversed(text.splitlines()) if line}
    assert rows["carriers", "198.51.100.17"] == ["dialer2", "dialer1", "dialer2", "dropped", "gw", "dropped"]
    assert rows["internet", "2001:db8::1"] == ["dropped", "dialer1", "dialer2", "dropped", "gw", "dropped"]
    assert rows["dialer1", "10.20.0.11"][:3] == ["dialer2", "dialer1", "dialer2"]
    seen = {(p["client"], p["source_port"]): p["seen_port"] for p in result.as_json()["probes"] if p["source_port"] and "." in p["from"]}
    assert seen["dialer2", 5060] == 5060
    assert seen["dialer1", 14999] == 14999
    assert seen["dialer1", 5060] != 5060
    assert seen["dialer1", 15000] != 15000


@pytest.mark.usefixtures("kernel")
def test_each_mistake_is_noticed(edge: Compiled) -> None:
    """Media to the wrong dialer, SIP for strangers, a drop that is gone, ports that are not kept or given away: all of it shows."""
    arriving, leaving, inbound = (chain(edge, name) for name in ("arriving", "postrouting", "inbound"))
    first = {4: parse_address("10.20.0.11")[1]}
    swapped = [replace(r, verdict=sent_on(first[4])) if isinstance(r.verdict, Translate) else r for r in arriving]
    plain = [replace(r, verdict=masqueraded()) for r in leaving]
    spare = [replace(r, verdict=masqueraded((61000, 65535))) if any(isinstance(m, PortIn) for m in r.matches) else r for r in leaving]
    wrong = {
        "everything to one dialer": ("arriving", swapped),
        "nothing is sent on": ("arriving", []),
        "a stranger's signalling": ("guard.sip", [Rule((), Final.RETURN)]),
        "every drop is gone": ("inbound", [r for r in inbound if r.verdict is not Final.DROP]),
        "others' ports are kept": ("postrouting", plain),
        "no port is kept": ("postrouting", spare),
        "nobody returns": ("postrouting", leaving[:-1]),
    }
    plan = plan_edge_lab(edge.resolved)
    backend = load(USABLE[-1])
    unnoticed = []
    for what, (name, rules) in wrong.items():
        # A network each: connections that are known keep the translation they have.
        with network(plan.host, plan.stations, plan.router) as net:
            with net.host.entered():
                runner.execute(backend.load(with_rules(edge, name, *rules).ruleset))
            if all(o.agrees for o in try_packets(edge.resolved, plan, net, (0.1, 0.1))):
                unnoticed.append(what)

    assert unnoticed == []


@pytest.mark.usefixtures("kernel")
def test_what_differs_is_told(edge: Compiled) -> None:
    """A packet at the wrong host is named with that host, the right one, and the reason."""
    arriving = [replace(r, verdict=sent_on(parse_address("10.20.0.11")[1])) for r in chain(edge, "arriving")]
    result = run_lab(with_rules(edge, "arriving", *arriving), load(USABLE[-1]))
    text = lab_text(result)

    assert not result.agrees
    assert "DIALER1!" in text
    assert "MISMATCH dialer1 10.20.0.11 -> 203.0.113.1 udp/15000: reached dialer1, but the policy says reached dialer2: rtp goes to" in text
    assert "MISMATCH internet 192.0.2.1 -> 203.0.113.1 udp/15000: dropped, but the policy says reached dialer2: rtp goes to" in text


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("host", ["gw", "dialer1"])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str) -> None:
    """`fwc lab --host` works for the edge and for a dialer, whose own address is the one that is tried."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    assert cli.run(["lab", str(path), "--host", host, "--backend", USABLE[-1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert (found["host"], found["agrees"], found["left_out"]) == (host, True, [])
    assert {p["reached_host"] for p in found["probes"]} == (
        {"gw", "dialer1", "dialer2", "internet", "carriers", None} if host == "gw" else {None}
    )
