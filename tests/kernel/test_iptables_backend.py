"""Both iptables variants against the kernel of this machine, each test in a network namespace of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from fwcompiler_iptables import legacy, nft
from fwcompiler_iptables.commands import Iptables

from fwcompiler.addresses import LOOPBACK, Ranges, merged, subtract
from fwcompiler.backend import Command, Do, Fill, SetChange, Step
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import ipset
from fwcompiler.kernel.netns import scratch
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
    Goto,
    Hook,
    InRanges,
    InSet,
    Interface,
    Jump,
    Limit,
    PortIn,
    ProtocolIs,
    Rule,
    Ruleset,
    StateIn,
    TypeIn,
    Unknown,
)

pytestmark = pytest.mark.skipif(subprocess.run(("unshare", "-n", "true"), check=False).returncode != 0, reason="needs root")

CARRIERS: Ranges = ((0x0A010000, 0x0A0100FF), (0x0A020000, 0x0A0200FF))
BLOCKED: Ranges = ((0xC0000200, 0xC00002FF),)
CARRIERS6: Ranges = ((0x20010DB8 << 96, (0x20010DB8 << 96) + (1 << 96) - 1),)
FOREIGN = """*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
:ufw-before-input - [0:0]
-A INPUT -s {0} -m comment --comment "odd \\"words' -j FWC-input" -j ACCEPT
-A INPUT -j ufw-before-input
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -p tcp -m multiport --dports 22,80:90 -j ACCEPT
COMMIT
"""


def policy(*, carriers: Ranges = CARRIERS, sip: tuple[Rule, ...] = (), size: int = 4096) -> Ruleset:
    """A ruleset such as the compiler hands over: every kind of match, both families."""
    no_agent = InSet("source", "agents.dynamic.v4", 4, negated=True)
    rules = (
        Rule((Interface("in", "lo"),), Final.ACCEPT, "loopback"),
        *(Rule((InRanges("source", v, (LOOPBACK[v],)),), Final.DROP, "loopback") for v in (4, 6)),
        Rule((InSet("source", "block.v4", 4), no_agent), Final.DROP, "block"),
        Rule((StateIn(frozenset(("invalid",))),), Final.DROP, "invalid"),
        Rule((PortIn("destination", "udp", (5060, 5060)),), Goto("service.sip")),
        Rule((ProtocolIs(112),), Goto("service.vrrp")),
        Rule((StateIn(frozenset(("established", "related"))),), Final.ACCEPT, "established"),
        Rule((PortIn("destination", "udp", (10000, 20000)),), Final.ACCEPT, "rtp"),
        Rule((TypeIn(4, (3, 11, 12)),), Final.ACCEPT, "icmp"),
        Rule((TypeIn(6, (1, 2, 3, 4, 130)),), Final.ACCEPT, "icmp"),
        Rule((TypeIn(4, (8,)), Limit(20, "second", 40)), Final.ACCEPT, "icmp"),
        Rule((Limit(5, "second", 10),), None, log_prefix="fwc drop: "),
        Rule((), Final.DROP, "other"),
    )
    members = (
        Rule((InSet("source", "carriers.v4", 4),), Final.ACCEPT, "sip"),
        Rule((InSet("source", "carriers.v6", 6),), Final.ACCEPT, "sip"),
        *sip,
        Rule((InSet("source", "agents.dynamic.v4", 4),), Final.ACCEPT, "sip"),
        Rule((), Final.DROP, "sip"),
    )
    chains = (
        Chain("input", rules, Hook("input", 0, "drop")),
        Chain("service.sip", members),
        Chain("service.vrrp", (Rule((InRanges("source", 4, ((0x0A140000, 0x0A1400FF),)),), Final.ACCEPT, "vrrp"), Rule((), Final.DROP, "vrrp"))),
    )
    sets = (
        AddressSet("agents.dynamic.v4", 4, timeout=43200, size=size),
        AddressSet("block.v4", 4, BLOCKED),
        AddressSet("carriers.v4", 4, carriers),
        AddressSet("carriers.v6", 6, CARRIERS6),
    )
    return Ruleset(chains, sets)


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """A fresh network namespace for each test; gone afterwards."""
    with scratch() as fresh, fresh.entered():
        yield


@pytest.fixture(params=[nft, legacy], ids=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> Iptables:
    """Each variant in turn."""
    each: Iptables = request.param
    return each


def shell(text: str, stdin: str = "") -> str:
    """Run a command line of the test's own; it must not fail."""
    return subprocess.run(("sh", "-c", text), input=stdin, capture_output=True, text=True, check=True).stdout


def do(what: Do) -> str:
    """What the executor of the tool does with one step, without its error messages."""
    if isinstance(what, Fill):
        ipset.change(what.set, what.version, what.add, what.remove)
        return ""
    result = subprocess.run(what.argv, input=what.stdin, capture_output=True, text=True, check=False)
    if result.returncode and not (what.missing_ok and "does not exist" in result.stderr):
        raise HostRefused(f"{what.argv} {result.stderr} {what.stdin}")
    return result.stdout


def run(steps: Sequence[Step]) -> None:
    """Run steps; after a failure undo all that was begun, the failed step included, as the tool's executor does."""
    undo: list[Do] = []
    try:
        for step in steps:
            undo[:0] = step.undo
            do(step.do)
    except HostRefused:
        for each in undo:
            do(each)
        raise


def listed(backend: Iptables) -> Ruleset:
    """The live ruleset as the backend reads it."""
    return backend.parse([do(c) for c in backend.listing()])


def wanted(backend: Iptables, ruleset: Ruleset) -> Ruleset:
    """A ruleset in the form a kernel gives back, set contents grafted on."""
    with scratch() as other, other.entered():
        run(backend.load(ruleset))
        read = listed(backend)
    contents = {s.name: s.ranges for s in ruleset.sets}
    return replace(read, sets=tuple(replace(s, ranges=contents[s.name]) for s in read.sets))


def everything(backend: Iptables) -> str:
    """All that a removal must leave alone: both families, all tables, nft's own view, all sets; without dates."""
    saves = shell(f"iptables-{backend.variant}-save; ip6tables-{backend.variant}-save; ipset save")
    native = shell("nft list ruleset 2>/dev/null") if backend.variant == "nft" else ""
    return re.sub(r"^#.*\n", "", re.sub(r"\[\d+:\d+\]", "", saves), flags=re.M) + native


def foreign(backend: Iptables) -> None:
    """Rules of others: a DROP policy, docker-like and ufw-like chains, a comment made to confuse."""
    for program, network in (("iptables", "203.0.113.9/32"), ("ip6tables", "2001:db8:9::/64")):
        shell(f"{program}-{backend.variant}-restore", FOREIGN.format(network))
    shell("ipset create theirs hash:ip; ipset add theirs 192.0.2.77")


def change(ruleset: Ruleset, name: str, old: Ranges, new: Ranges) -> SetChange:
    """The change of one set from old to new content."""
    each = next(s for s in ruleset.sets if s.name == name)
    return SetChange(replace(each, ranges=new), subtract(new, old), subtract(old, new))
