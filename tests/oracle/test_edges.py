"""The kernel as oracle for edges: NAT and the forward hook, and nobody may disagree about where any packet ends."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import kernelspace
import pytest
import yaml
from cli.harness import BACKENDS
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle.compare import read
from oracle.packets import member_commands, members, with_members
from oracle.through import (
    LAN,
    WAN,
    Comparison,
    EdgeBench,
    EdgeTally,
    Wrong,
    agree,
    edge_bench,
    edge_packets,
    edges,
    resolved_edge_of,
    try_edge,
)

from fwcompiler.kernel import runner
from fwcompiler.lower import lower
from fwcompiler.registry import load

PER_POLICY = 320
SHARE = 2
"""One packet is sent through an edge for so many that `--oracle-packets` asks for."""


@pytest.fixture(autouse=True)
def kernel(kernel_allowed: bool) -> None:
    """Skips where this user may not make network namespaces."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")


@pytest.fixture(params=BACKENDS)
def pair(request: pytest.FixtureRequest) -> Iterator[EdgeBench]:
    """Two kernels laid out as edges, for each backend."""
    backend = load(request.param)
    runner.require(backend.programs)
    with edge_bench(backend) as made:
        yield made


def wrong_ones(bench: EdgeBench, document: dict[str, Any], number: int, tally: EdgeTally) -> list[Wrong]:
    """What is not unanimous about a policy's packets."""
    policy = resolved_edge_of(document)
    if policy is None:
        return []
    random = Random(number)
    who = members(policy, random)
    with bench.loaded(lower(policy)) as held, bench.ruled.space.entered():
        for argv in member_commands(bench.backend.set_kind, "add", held, who):
            kernelspace.run(argv)
        names = {s.name for s in held.sets}
        full = with_members(policy, {key: a for key, a in who.items() if f"{key[0]}.dynamic.v{key[1]}" in names})
        return try_edge(bench, Comparison(full, read(bench.backend)), edge_packets(full, random, PER_POLICY), tally)


def test_nobody_disagrees_about_an_edge(pair: EdgeBench, pytestconfig: pytest.Config) -> None:
    """Where a packet ends, and under which address and port, is the same for meaning, diagram, listing and kernel."""
    packets, start = int(pytestconfig.getoption("--oracle-packets")), int(pytestconfig.getoption("--oracle-seed"))
    rerun = f"pytest tests/oracle/test_edges.py -k '{pair.backend.name}' --oracle-packets {packets} --oracle-seed {start}"
    tally = EdgeTally()

    @seed(start)
    @settings(max_examples=max(1, packets // SHARE // PER_POLICY), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(edges(), st.integers(0, 2**32))
    def run(document: dict[str, Any], number: int) -> None:
        wrong = wrong_ones(pair, document, number, tally)
        if wrong:
            shown = "\n".join(each.text for each in wrong[:8])
            pytest.fail(f"{len(wrong)} packets:\n{shown}\n\n{yaml.safe_dump(document, sort_keys=False)}\nagain: {rerun}")

    run()

    assert tally.sent > packets // SHARE // 3
    met = {(verdict, out, sent_on) for (verdict, out, _, sent_on), count in tally.fates.items() if count}
    assert met >= {(v, LAN, sent) for v in ("accept", "drop") for sent in (True, False)} | {("accept", WAN, False), ("drop", WAN, False)}


POLICY: dict[str, Any] = {
    "version": 1,
    "groups": {"alpha": ["10.0.0.0/28", "2001:db8::/124"], "bad": ["10.0.0.32"]},
    "hosts": {
        "gw": {"role": "edge", "wan": WAN, "lan": LAN, "addresses": ["203.0.113.1", "10.20.0.1", "2001:db8:1::1"]},
        "dialer11": {"role": "dialer", "addresses": ["10.20.0.11", "2001:db8:20::11"]},
        "dialer12": {"role": "dialer", "addresses": ["10.20.0.12"]},
    },
    "edge": {"host": "gw", "inbound_sip": "dialer11", "rtp": {"first": 10000, "chunk": 100}},
    "block": {"from": ["bad"]},
    "services": {"sip": {"from": ["alpha", "cluster"]}, "rtp": {"from": "anywhere"}},
}


def planted(name: str, where: str) -> tuple[str, ...]:
    """A rule as somebody would type it: signalling to the wrong host, all forwarded, or a port that is given away."""
    nft = {
        "arriving": "meta nfproto ipv4 udp dport 5060 dnat ip to 10.20.0.12",
        "inbound": "accept",
        "postrouting": 'oifname "wan0" ip saddr 10.20.0.12 udp sport 10000-10099 masquerade',
    }[where]
    iptables = {
        "arriving": ("nat", "-p udp --dport 5060 -j DNAT --to-destination 10.20.0.12"),
        "inbound": ("filter", "-j ACCEPT"),
        "postrouting": ("nat", "-o wan0 -s 10.20.0.12 -p udp --sport 10000:10099 -j MASQUERADE"),
    }[where]
    if name == "nftables":
        return ("nft", "insert", "rule", "inet", "fwc", where, *nft.split())
    return (name, "-t", iptables[0], "-I", f"FWC-{where}", *iptables[1].split())


@pytest.mark.parametrize("told", [True, False], ids=["listed", "unlisted"])
@pytest.mark.parametrize("where", ["arriving", "inbound", "postrouting"])
def test_a_wrong_rule_of_an_edge_is_found(pair: EdgeBench, where: str, told: bool) -> None:
    """A rule too many on the way is noticed by the kernel, and by the readings of a listing that has it."""
    policy = resolved_edge_of(POLICY)
    assert policy
    with pair.loaded(lower(policy)) as held, pair.ruled.space.entered():
        kernelspace.run(planted(pair.backend.name, where))
        comparison = Comparison(policy, read(pair.backend) if told else held)
        wrong = try_edge(pair, comparison, edge_packets(policy, Random(1), 6000), EdgeTally())

    assert wrong
    for each in wrong:
        assert not agree(each.meaning, each.kernel), each.text
        assert agree(each.diagram, each.kernel) == told, each.text
