"""What an edge's policy means, that its rules mean the same for all packets, and that the proof finds every mistake written into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwcompiler.addresses import EVERYONE, parse_address
from fwcompiler.diagnostics import Report
from fwcompiler.include import load_merged
from fwcompiler.lower import lower
from fwcompiler.policy import validate
from fwcompiler.ports import parse_ports
from fwcompiler.proof import passing
from fwcompiler.proof.access import compare
from fwcompiler.proof.edge import explain_packet
from fwcompiler.proof.fields import packet_to
from fwcompiler.proof.passing import Passing, edge_examples, prove_edge
from fwcompiler.proof.prove import Difference, differ
from fwcompiler.resolve import resolve
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import (
    Chain,
    Final,
    InRanges,
    InSet,
    Interface,
    PortIn,
    Rewritten,
    Rule,
    Ruleset,
    StateIn,
    Translate,
    masqueraded,
    sent_on,
)

POLICY = """
groups:
  carriers: [198.51.100.16/28, "2001:db8:51::/48"]
  agents: {members: [203.0.113.128/25], dynamic: {timeout: 12h}}
  partner: [192.0.2.192/28]
  bad: [192.0.2.99, "2001:db8:bad::/48"]
hosts:
  gw: {role: edge, wan: eth0, lan: eth1, addresses: [203.0.113.1, 10.20.0.1]}
  d1: {role: dialer, addresses: [10.20.0.11, "2001:db8:20::11"]}
  d2: {role: dialer, addresses: [10.20.0.12, "2001:db8:20::12"]}
  w1: {role: web, addresses: [10.20.0.20]}
edge: {host: gw, inbound_sip: d1, rtp: {first: 10000, chunk: 5000}, forward: {https: w1, wss: d1}}
block: {from: [bad]}
trust: [partner]
services:
  sip: {from: [carriers, agents, cluster]}
  rtp: {from: anywhere}
  https: {from: anywhere}
  wss: {from: [agents]}
  ssh: {from: [partner]}
"""


def read(folder: Path, text: str = POLICY) -> Resolved:
    """The policy resolved for its edge."""
    path = folder / "policy.yaml"
    path.write_text(f"version: 1\n{text}", encoding="utf-8")
    report = Report()
    document = load_merged(str(path), report)
    assert document is not None
    policy = validate(document, report)
    assert policy is not None, report.findings
    found = resolve(policy, document, report, today=date(2026, 1, 1), host="gw")
    assert not report.failed, report.findings
    return found


@pytest.mark.parametrize(
    ("source", "to", "state", "interface", "to_addr", "expected"),
    [
        ("198.51.100.17", "udp/5060", "new", "eth0", None, "accept sip; sent on to d1 (10.20.0.11)"),
        ("198.51.100.17", "udp/5060", "established", "eth0", None, "accept sip; sent on to d1 (10.20.0.11)"),
        ("8.8.8.8", "udp/5060", "new", "eth0", None, "drop None"),
        ("8.8.8.8", "udp/5060", "established", "eth0", None, "drop sip"),
        ("8.8.8.8", "udp/14999", "new", "eth0", None, "accept rtp; sent on to d1 (10.20.0.11)"),
        ("8.8.8.8", "udp/15000", "new", "eth0", None, "accept rtp; sent on to d2 (10.20.0.12)"),
        ("8.8.8.8", "udp/20000", "new", "eth0", None, "drop None"),
        ("8.8.8.8", "tcp/443", "new", "eth0", None, "accept https; sent on to w1 (10.20.0.20)"),
        ("203.0.113.200", "tcp/8089", "new", "eth0", None, "accept wss; sent on to d1 (10.20.0.11)"),
        ("192.0.2.99", "udp/14999", "new", "eth0", None, "drop None"),
        ("192.0.2.193", "tcp/8089", "new", "eth0", None, "accept None; sent on to d1 (10.20.0.11)"),
        ("192.0.2.193", "tcp/22", "new", "eth0", None, "accept None"),
        ("198.51.100.17", "tcp/22", "new", "eth0", None, "drop ssh"),
        ("10.20.0.12", "udp/5060", "new", "eth1", None, "accept sip; sent on to d1 (10.20.0.11)"),
        ("10.20.0.12", "udp/5060", "new", "eth1", "198.51.100.17", "accept None"),
        ("2001:db8:51::1", "udp/5060", "new", "eth0", "2001:db8:20::11", "accept sip; passes through to d1 (2001:db8:20::11)"),
        ("2001:db8:51::1", "udp/5060", "new", "eth0", "2001:db8:20::12", "drop None"),
        ("2001:db8:51::1", "udp/5060", "established", "eth0", "2001:db8:20::12", "accept None; passes through to d2 (2001:db8:20::12)"),
        ("2001:db8:99::1", "udp/5060", "established", "eth0", "2001:db8:20::12", "drop sip"),
        ("2001:db8:bad::1", "udp/15000", "new", "eth0", "2001:db8:20::12", "drop None"),
        ("172.17.0.2", "udp/5060", "new", "docker0", None, "drop None"),
    ],
)
def test_where_packets_go(tmp_path: Path, source: str, to: str, state: str, interface: str, to_addr: str | None, expected: str) -> None:
    """A packet at an edge is decided by its policy, and the explanation says which host gets it."""
    version, address = parse_address(source)
    destination = parse_address(to_addr)[1] if to_addr else None
    packet = packet_to(version, address, parse_ports(to), state=state, interface=interface, destination=destination)
    found = explain_packet(read(tmp_path), packet)
    where = found.reason.partition("; ")[2]

    assert f"{found.verdict} {found.service}" + (f"; {where}" if where else "") == expected


@pytest.mark.parametrize(
    ("source", "to", "interface", "reason"),
    [
        ("8.8.8.8", "udp/5060", "eth0", "sip goes to d1, and does not name the source: it is in none of carriers, agents, cluster"),
        ("198.51.100.17", "tcp/8089", "eth0", "wss goes to d1, and does not name the source: it is in none of agents"),
        ("8.8.8.8", "udp/20000", "eth0", "no service covers it"),
        ("172.17.0.2", "udp/5060", "docker0", "no service covers it"),
        ("192.0.2.99", "udp/5060", "eth0", "the block list has the source: 192.0.2.99 is in bad"),
    ],
)
def test_a_drop_at_the_edge_tells_the_service_that_was_meant(tmp_path: Path, source: str, to: str, interface: str, reason: str) -> None:
    """What a service would send on, were its source named, is dropped by the edge itself for that reason."""
    version, address = parse_address(source)
    found = explain_packet(read(tmp_path), packet_to(version, address, parse_ports(to), interface=interface))

    assert (found.verdict, found.service) == ("drop", None)
    assert found.reason.startswith(reason)


def test_the_compiled_rules_mean_what_the_policy_says(tmp_path: Path) -> None:
    """From arrival to departure, for both families, to the edge and through it: no packet fares otherwise."""
    policy = read(tmp_path)

    assert prove_edge(policy, lower(policy)) == ()


def test_right_rules_are_proven_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways are followed as a whole, which grows with the square of the dialers, only where a step differs."""
    policy = read(tmp_path)
    right = lower(policy)
    followed: list[int] = []

    def follow(first: Passing, second: Passing, version: int) -> Difference | None:
        followed.append(version)
        return differ(first, second, version)

    monkeypatch.setattr(passing, "differ", follow)
    assert (prove_edge(policy, right), followed) == ((), [])

    chain, change, _ = MUTATIONS["SIP goes to another dialer"]
    assert prove_edge(policy, changed(right, chain, change))
    assert followed


def test_steps_that_part_may_be_one_way(tmp_path: Path) -> None:
    """A rule that only another step makes superfluous is no difference: the ways are compared as a whole then."""
    policy = read(tmp_path)
    right = lower(policy)
    forward = next(c for c in right.chains if c.name == "forward")
    assert forward.hook is not None
    empty = Chain("more", (), replace(forward.hook, priority=10))

    assert prove_edge(policy, replace(right, chains=(*right.chains, empty))) == ()


def changed(ruleset: Ruleset, chain: str, change: Callable[[tuple[Rule, ...]], tuple[Rule, ...]]) -> Ruleset:
    """The ruleset with other rules in one chain."""
    assert any(c.name == chain for c in ruleset.chains)
    return replace(ruleset, chains=tuple(replace(c, rules=change(c.rules)) if c.name == chain else c for c in ruleset.chains))


def first(test: Callable[[Rule], bool], change: Callable[[Rule], tuple[Rule, ...]]) -> Callable[[tuple[Rule, ...]], tuple[Rule, ...]]:
    """Changes the first rule that fits into others."""

    def apply(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        at = next(i for i, rule in enumerate(rules) if test(rule))
        return (*rules[:at], *change(rules[at]), *rules[at + 1 :])

    return apply


def matching(rule: Rule, **ports: int) -> bool:
    """True for rules about a port."""
    return any(isinstance(m, PortIn) and m.span[0] == ports["port"] for m in rule.matches)


def but(rule: Rule, kind: type, new: object | None) -> tuple[Rule, ...]:
    """The rule with a match of a kind replaced, or left out."""
    matches = tuple(x for m in rule.matches for x in ([m] if not isinstance(m, kind) else [] if new is None else [new]))
    return (replace(rule, matches=matches),)


D1, D2, W1 = (parse_address(a)[1] for a in ("10.20.0.11", "10.20.0.12", "10.20.0.20"))
ESTABLISHED = StateIn(frozenset(("established", "related")))
Mutation = tuple[str, Callable[[tuple[Rule, ...]], tuple[Rule, ...]], str]
MUTATIONS: dict[str, Mutation] = {
    "SIP goes to another dialer": (
        "arriving",
        first(lambda r: matching(r, port=5060), lambda r: (replace(r, verdict=sent_on(D2)),)),
        "partner (192.0.2.192/28) to udp/5060",
    ),
    "a chunk goes to another dialer": (
        "arriving",
        first(lambda r: matching(r, port=15000), lambda r: (replace(r, verdict=sent_on(D1)),)),
        "udp/15000-19999",
    ),
    "a chunk begins a port late": (
        "arriving",
        first(lambda r: matching(r, port=15000), lambda r: but(r, PortIn, PortIn("destination", "udp", (15001, 19999)))),
        "udp/15000",
    ),
    "a chunk ends a port late": (
        "arriving",
        first(lambda r: matching(r, port=10000), lambda r: but(r, PortIn, PortIn("destination", "udp", (10000, 15000)))),
        "udp/15000",
    ),
    "a chunk in tcp": (
        "arriving",
        first(lambda r: matching(r, port=10000), lambda r: but(r, PortIn, PortIn("destination", "tcp", (10000, 14999)))),
        "10000-14999",
    ),
    "the port is not kept": (
        "arriving",
        first(
            lambda r: matching(r, port=443), lambda r: (replace(r, verdict=Translate("destination", "", 4, ((W1, W1),), ports=(80, 80))),)
        ),
        "tcp/443",
    ),
    "SIP for everybody": ("arriving", first(lambda r: matching(r, port=5060), lambda r: but(r, InSet, None)), "udp/5060"),
    "SIP for nobody named": ("arriving", first(lambda r: matching(r, port=5060), lambda _: ()), "partner (192.0.2.192/28)"),
    "web is dropped on its way": ("inbound", first(lambda r: matching(r, port=443), lambda _: ()), "tcp/443"),
    "one family of media is dropped": (
        "inbound",
        first(lambda r: matching(r, port=10000) and r.version == 6, lambda _: ()),
        "2001:db8:20::11",
    ),
    "established before strangers": (
        "inbound",
        lambda rules: (Rule((ESTABLISHED,), Final.ACCEPT, "established"), *rules),
        "state established or related",
    ),
    "established media of a dialer that has none": (
        "inbound",
        first(lambda r: ESTABLISHED in r.matches, lambda _: ()),
        "state established or related",
    ),
    "a blocked source passes": ("inbound", lambda rules: tuple(r for r in rules if r.service != "block"), "192.0.2.99"),
    "a trusted source does not": ("inbound", lambda rules: tuple(r for r in rules if r.service != "trust"), "partner (192.0.2.192/28)"),
    "the drop at the end is gone": ("inbound", lambda rules: rules[:-1], "any"),
    "strangers to SIP on another dialer": (
        "inbound",
        first(
            lambda r: matching(r, port=5060) and any(isinstance(m, InRanges) and m.ranges == ((D2, D2),) for m in r.matches), lambda _: ()
        ),
        "at 10.20.0.12",
    ),
    "invalid packets leave": ("outbound", lambda rules: tuple(r for r in rules if r.service != "invalid"), "state invalid"),
    "what comes in is taken for what goes out": (
        "forward",
        lambda rules: (replace(rules[0], verdict=rules[1].verdict), *rules[1:]),
        "eth0",
    ),
    "whatever the output interface": (
        "forward",
        lambda rules: (replace(rules[0], matches=(Interface("in", "eth0"),)), *rules[1:]),
        "out interface",
    ),
    "any interface to our address": (
        "prerouting",
        lambda rules: (replace(rules[0], matches=rules[0].matches[1:]), *rules),
        "state new, interface",
    ),
    "any address from the wan": ("prerouting", lambda rules: (replace(rules[0], matches=rules[0].matches[:1]), *rules[1:]), "at "),
    "media leaves from any port": (
        "postrouting",
        first(
            lambda r: matching(r, port=10000) and r.verdict == masqueraded(), lambda r: (replace(r, verdict=masqueraded((61000, 65535))),)
        ),
        "from port 10000-14999",
    ),
    "5060 of others stays": (
        "postrouting",
        first(lambda r: matching(r, port=5060) and r.verdict != masqueraded(), lambda r: (replace(r, verdict=masqueraded()),)),
        "from port 5060",
    ),
    "the spare ports reach into a chunk": (
        "postrouting",
        first(
            lambda r: matching(r, port=5060) and r.verdict != masqueraded(), lambda r: (replace(r, verdict=masqueraded((10000, 65535))),)
        ),
        "from port 5060",
    ),
    "hosts leave under their own address": ("postrouting", lambda rules: tuple(r for r in rules if len(r.matches) != 2), "d"),
    "everybody leaves under ours": (
        "postrouting",
        lambda rules: (*rules, Rule((Interface("out", "eth0"),), masqueraded())),
        "any IPv",
    ),
    "no way back by hairpin": (
        "postrouting",
        lambda rules: tuple(r for r in rules if not any(isinstance(m, Rewritten) for m in r.matches)),
        "10.20.0.20",
    ),
    "the lan is rewritten among itself": (
        "postrouting",
        first(lambda r: any(isinstance(m, Rewritten) for m in r.matches), lambda r: but(r, Rewritten, None)),
        "10.20.0.11",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_the_rules_is_found(tmp_path: Path, name: str) -> None:
    """Each wrong rule is found, with packets that show it; and the packets' example really fares otherwise than the policy says."""
    policy = read(tmp_path)
    chain, change, expected = MUTATIONS[name]
    wrong = changed(lower(policy), chain, change)
    found = list(edge_examples(prove_edge(policy, wrong), policy))

    assert found
    assert any(expected in each.packets for each in found), [str(each) for each in found]
    assert all(each.policy != each.kernel for each in found)


def test_a_mistake_in_a_set_is_found(tmp_path: Path) -> None:
    """A set with an address too much, or an own address too few, sends packets elsewhere."""
    policy = read(tmp_path)
    right = lower(policy)
    for name in ("carriers.v4", "edge.v4", "behind.v4", "block.v4", "cluster.v4"):
        sets = tuple(replace(s, ranges=s.ranges[1:]) if s.name == name else s for s in right.sets)
        assert prove_edge(policy, replace(right, sets=sets)), name


def test_rules_that_others_would_put_there_are_found(tmp_path: Path) -> None:
    """A second base chain at the forward hook that drops is part of the answer."""
    policy = read(tmp_path)
    right = lower(policy)
    forward = next(c for c in right.chains if c.name == "forward")
    assert forward.hook is not None
    more = Chain("more", (Rule((PortIn("destination", "udp", (12000, 12000)),), Final.DROP),), replace(forward.hook, priority=10))
    found = list(edge_examples(prove_edge(policy, replace(right, chains=(*right.chains, more))), policy))

    assert any("udp/12000" in each.packets and each.kernel == "dropped" for each in found)


def test_access_says_which_host_is_reached(tmp_path: Path) -> None:
    """What an edge grants is told by the host behind it; a chunk that moves is lost there and gained here."""
    before = read(tmp_path)
    after = read(tmp_path, POLICY.replace("chunk: 5000", "chunk: 4000").replace("https: w1", "https: d2").replace("on: web", ""))
    found = compare(Ruleset(), lower(before)).gained
    media = {(a.to, a.at): a.addresses.family(4) == EVERYONE.family(4) for a in found if a.service == "rtp" and "." in a.at}
    (sip,) = (a for a in found if a.service == "sip" and "." in a.at)
    change = compare(lower(before), lower(after))

    assert set(media) == {("udp/10000-14999", "10.20.0.11"), ("udp/15000-19999", "10.20.0.12")}
    assert (sip.to, sip.at) == ("udp/5060", "10.20.0.11")
    assert sip.addresses == before.addresses(("carriers", "agents", "cluster")).only(4)
    assert {(a.to, a.at) for a in change.gained if "." in a.at and a.service == "rtp"} == {("udp/14000-14999", "10.20.0.12")}
    assert {(a.to, a.at) for a in change.lost if "." in a.at and a.service == "rtp"} == {
        ("udp/14000-14999", "10.20.0.11"),
        ("udp/18000-19999", "10.20.0.12"),
    }
    assert {(a.at) for a in change.gained if a.service == "https"} == {"10.20.0.12", "2001:db8:20::12"}
    assert {(a.at) for a in change.lost if a.service == "https"} == {"10.20.0.20"}


def test_what_is_sent_on_is_no_access_to_the_edge(tmp_path: Path) -> None:
    """A trusted source reaches every port of the edge but those that go on to somebody else."""
    found = compare(Ruleset(), lower(read(tmp_path))).gained
    own = [a.to for a in found if not a.at and a.to.startswith("udp/") and a.service is None]

    assert own == ["udp/0-5059", "udp/5061-9999", "udp/20000-65535"]


def six_of(number: int) -> str:
    """Another address behind the first."""
    return f', "2001:db8::{number:x}"'


ports = st.integers(1024, 60000).map(lambda n: n // 2 * 2)


@settings(deadline=None, max_examples=15)
@given(
    dialers=st.integers(1, 4),
    plan=st.tuples(ports.filter(lambda n: 6000 < n < 30000), st.integers(1, 3000).map(lambda n: 2 * n)),
    public=st.booleans(),
    six=st.booleans(),
    dynamic=st.booleans(),
    trust=st.booleans(),
    block=st.sampled_from(["", "block: {from: [b]}\n", "block: {from: [b, a], except: []}\n"]),
    forward=st.sampled_from(["{}", "{https: d0}", "{https: w, wss: d0}", "{ntp: w, own: w}"]),
    rtp=st.sampled_from(["anywhere", "[a, cluster]"]),
)
def test_random_edges_are_compiled_as_they_are_meant(
    tmp_path_factory: pytest.TempPathFactory,
    dialers: int,
    plan: tuple[int, int],
    public: bool,
    six: bool,
    dynamic: bool,
    trust: bool,
    block: str,
    forward: str,
    rtp: str,
) -> None:
    """Whatever the plan, the services and who may use them: rules and meaning are equal for all packets."""
    group = "{members: [198.51.100.0/28], dynamic: {timeout: 1h}}" if dynamic else "[198.51.100.0/28, 10.0.0.10]"
    net, names = "203.0.113" if public else "10.0.0", [f"d{i}" for i in range(dialers)]
    addresses = [f"{net}.{10 + i}{six_of(i) if six else ''}" for i in range(dialers)]
    hosts = "".join(f"  {name}: {{role: dialer, addresses: [{own}]}}\n" for name, own in zip(names, addresses, strict=True))
    chunks = f"{{first: {plan[0]}, chunk: {plan[1]}}}"
    text = f"""
groups:
  a: {group}
  b: [198.51.100.4/30, 192.0.2.0/24]
hosts:
  gw: {{role: edge, wan: eth0, lan: eth1, addresses: [203.0.113.1, 10.0.0.1]}}
{hosts}  w: {{role: [web, dialer], addresses: [10.0.0.5]}}
edge: {{host: gw, inbound_sip: d0, rtp: {chunks}, dialers: [{", ".join(names)}], forward: {forward}}}
{"trust: [b]" if trust else ""}
{block}services:
  sip: {{from: [a, cluster]}}
  sip-tcp: {{from: [a]}}
  rtp: {{from: {rtp}}}
  https: {{from: anywhere}}
  wss: {{from: [b]}}
  ntp: {{from: [a], on: [web]}}
  own: {{ports: [tcp/700, udp/700-702], from: [b], on: [web]}}
"""
    policy = read(tmp_path_factory.mktemp("edge"), text)

    assert [str(e) for e in edge_examples(prove_edge(policy, lower(policy)), policy)] == []
