"""Docker writes the same intent twice, for iptables and for nftables: 102 configurations of both, read and compared for all packets.

Where the two really differ is listed here, with the reason; a difference that is not listed fails, and so does one that is gone.
Golden files are read as they are: iptables' as text, nftables' as the kernel lists them after loading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Literal, cast

import kernelspace
import pytest
from foreign import corpus
from foreign.comparing import behind, differences, rewritings

from fwcompiler.addresses import Ranges
from fwcompiler.ruleset import Final, HookName, InRanges, Interface, Rule, Ruleset, Side, StateIn


def _ranges(network: str) -> Ranges:
    whole = ip_network(network)
    return ((int(whole[0]), int(whole[-1])),)


FOLDER = corpus.CORPUS / "moby" / "drivers" / "bridge" / "internal"
NFT, IPTABLES = FOLDER / "nftabler" / "testdata" / "TestNftabler", FOLDER / "iptabler" / "testdata" / "TestIptabler"
HOOKS = ("input", "forward", "output")
CONFIGURATIONS = 102
BRIDGE = "br-dummy"
NETWORK = {4: _ranges("192.168.0.0/24"), 6: _ranges("fd49:efd7:54aa::/64")}
CONTAINER = {4: int(ip_address("192.168.0.2")), 6: int(ip_address("fd49:efd7:54aa::1"))}
INTERNAL = {f"hairpin={hairpin},internal=true,icc={icc}" for hairpin in ("false", "true") for icc in ("false", "true")}

pytestmark = pytest.mark.skipif(not NFT.is_dir(), reason="the corpus is not here")


@dataclass(frozen=True)
class Pair:
    """One configuration of one family in both languages."""

    configuration: str
    version: int
    iptables: Ruleset
    nft: Ruleset


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """All of them."""
    if not kernelspace.allowed():
        pytest.skip("needs the right to make network namespaces (root)")
    return list(_pairs())


def _pairs() -> Iterator[Pair]:
    for path in sorted(NFT.glob("*.golden")):
        configuration, _, family = path.stem.rpartition("__")
        version = 4 if family == "ip" else 6
        twin = IPTABLES / f"{configuration}__{'iptables' if version == 4 else 'ip6tables'}.golden"
        yield Pair(configuration, version, corpus.read_dump(twin), _listed(path))


def _listed(path: Path) -> Ruleset:
    ruleset = corpus.read_listing(path)
    assert ruleset is not None, f"{path.name} does not load"
    return ruleset


def test_filtering_and_destinations_are_equal(pairs: list[Pair]) -> None:
    """On the way to input, forward and output, rewritten destinations followed, all configurations but internal networks are equal."""
    assert len(pairs) == 2 * CONFIGURATIONS
    for pair in pairs:
        for hook in HOOKS:
            found = differences(pair.iptables, pair.nft, pair.version, hook)
            if hook != "forward" or pair.configuration not in INTERNAL:
                assert not found, (pair.configuration, pair.version, hook, found[0])


def test_internal_networks_differ_as_known(pairs: list[Pair]) -> None:
    """Internal networks are equal but for two kinds of packets, and do differ there.

    iptables closes them by addresses, nftables by interfaces, so packets whose address is not behind their interface part; and
    nftables lets packets of known connections pass whatever their addresses.
    """
    seen = 0
    for pair in pairs:
        if pair.configuration in INTERNAL:
            seen += 1
            assert differences(pair.iptables, pair.nft, pair.version, "forward"), "now equal: take the reason out"
            left_out = [*_not_behind(pair.version), *_of_known_connections()]
            first, second = (behind(each, left_out, "forward") for each in (pair.iptables, pair.nft))
            assert not differences(first, second, pair.version, "forward"), pair.configuration
    assert seen == 2 * len(INTERNAL)


def _not_behind(version: int) -> Iterator[Rule]:
    """Packets in or out by the bridge without an address of its network, or with one by another interface."""
    ways: tuple[tuple[Side, Literal["in", "out"]], ...] = (("source", "in"), ("destination", "out"))
    for side, way in ways:
        for inside in (False, True):
            bridge = Interface(way, BRIDGE, negated=inside)
            yield Rule((bridge, InRanges(side, version, NETWORK[version], negated=not inside)), Final.DROP)


def _of_known_connections() -> Iterator[Rule]:
    ways: tuple[Literal["in", "out"], ...] = ("in", "out")
    for way in ways:
        yield Rule((StateIn(frozenset(("established", "related"))), Interface(way, BRIDGE)), Final.DROP)


def test_destinations_are_rewritten_alike(pairs: list[Pair]) -> None:
    """The nat chains of prerouting and output rewrite the same packets in the same way in all configurations."""
    for pair in pairs:
        for hook in ("prerouting", "output"):
            assert rewritings(pair.iptables, pair.nft, pair.version, cast(HookName, hook)) == [], (pair.configuration, hook)


def test_sources_are_rewritten_alike_where_the_bridge_is_involved(pairs: list[Pair]) -> None:
    """Forwarded packets leave with the same source in all configurations, once two kinds of packets are left out.

    iptables cannot ask for the input interface behind routing, so it also rewrites packets from the network that came in and leave
    elsewhere; and the hairpin rule of a container to its own published port asks for no interface, where nftables' one does.
    """
    differing = Counter[bool]()
    for pair in pairs:
        differing[bool(rewritings(pair.iptables, pair.nft, pair.version, "postrouting"))] += 1
        first, second = (behind(each, list(_elsewhere(pair.version)), "postrouting") for each in (pair.iptables, pair.nft))
        assert rewritings(first, second, pair.version, "postrouting") == [], pair.configuration
    assert differing == {False: 76, True: 128}


def _elsewhere(version: int) -> Iterator[Rule]:
    """Packets that neither come in nor leave by the bridge, and those of a container to itself that do not leave by it."""
    leaves = Interface("out", BRIDGE, negated=True)
    own = ((CONTAINER[version], CONTAINER[version]),)
    yield Rule((Interface("in", BRIDGE, negated=True), leaves), Final.ACCEPT)
    yield Rule((InRanges("source", version, own), InRanges("destination", version, own), leaves), Final.ACCEPT)
