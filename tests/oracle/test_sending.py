"""The kernel as oracle for what a host sends: random policies with `egress`, and mistakes written into their rules.

The meaning (`proof/leaving.py`), the listing read rule by rule, the prover's diagram and the kernel say the same about every packet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import kernelspace
import pytest
from cli.harness import BACKENDS
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from oracle.compare import read
from oracle.mutations import POLICY, Edit, added, gone, moved, sub
from oracle.packets import HOST, member_commands, members, with_members
from oracle.reading import Diagram, meant
from oracle.sending import INTERFACE, Sender, probes, sender
from oracle.test_mutations import form, load_text
from oracle.wire import Probe, Way
from property.strategies import documents, egress, resolved

from fwcompiler.backend import Backend
from fwcompiler.kernel import runner
from fwcompiler.lower import lower
from fwcompiler.proof.describe import counter_examples
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.host import of_host
from fwcompiler.proof.leaving import HOOK, explain_leaving, leaving
from fwcompiler.proof.prove import prove
from fwcompiler.proof.trace import trace
from fwcompiler.registry import load
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import Ruleset, State

PER_POLICY = 160
POLICIES = 12
WHOLE: dict[str, Any] = {
    **POLICY,
    "egress": [
        {"dns": "admins"},
        {"sip": ["carriers", "agents"]},
        {"rtp": "anywhere"},
        {"web": {"to": "carriers", "ports": ["tcp/443", "tcp/8443-8445"]}},
        {"ntp": "anywhere"},
        {"icmp": "admins"},
        {"vrrp": "carriers"},
    ],
}
"""A policy in which every kind of rule for outgoing packets decides something."""
UNTRACKED: dict[str, Any] = {**WHOLE, "services": {**POLICY["services"], "rtp": {"from": "anywhere", "conntrack": "bypass", "dscp": "ef"}}}


@dataclass
class Bench:
    """A kernel that holds no rules of fwc and says what a packet is, and one that holds those of a backend."""

    backend: Backend
    bare: Sender
    ruled: Sender
    met: Counter[tuple[str, str]] = field(default_factory=Counter)

    def try_policy(self, document: dict[str, Any], number: int) -> list[str]:
        """Load a policy, send packets, and tell those about which not all agree."""
        random, policy = Random(number), resolved(document)
        with self.ruled.space.entered():
            runner.execute(self.backend.load(lower(policy)))
            try:
                joined = members(policy, random)
                known = {s.name for s in lower(policy).sets}
                joined = {key: who for key, who in joined.items() if f"{key[0]}.dynamic.v{key[1]}" in known}
                for argv in member_commands(self.backend.set_kind, "add", read(self.backend), joined):
                    kernelspace.run(argv)
                full, held = with_members(policy, joined), read(self.backend)
                return self._compare(full, held, probes(full, random, PER_POLICY))
            finally:
                runner.execute(self.backend.remove(read(self.backend)))

    def _compare(self, policy: Resolved, held: Ruleset, sent: list[Probe]) -> list[str]:
        diagrams = {version: Diagram(held, version, of_host(held, version, HOOK)) for version in (4, 6)}
        meaning, wrong = leaving(policy), []
        states, through = self.bare.ask(sent), self.ruled.ask(sent)
        for probe, state, out in zip(sent, states, through, strict=True):
            if state is None:
                assert out is None, probe
                continue
            packet = as_sent(probe, state)
            clause = meant(meaning, packet)
            self.met[state, clause.verdict] += 1
            said = (clause.verdict, trace(held, packet, HOOK).verdict, diagrams[packet.version].verdict(packet))
            if len(set(said)) > 1 or (clause.verdict == "accept") != (out is not None):
                wrong.append(f"{packet}: meaning {said[0]} ({clause.reason}), listing {said[1]}, diagram {said[2]}, kernel {out}")
        return wrong


def as_sent(probe: Probe, state: State) -> Packet:
    """A probe in the words of the proof; which of its own addresses a host sends from, no rule asks."""
    return replace(probe.packet(state), source=0, interface=INTERFACE, leaving=True)


@pytest.fixture(params=BACKENDS)
def pair(request: pytest.FixtureRequest, kernel_allowed: bool) -> Iterator[Bench]:
    """Two kernels, for each backend."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    backend = load(request.param)
    runner.require(backend.programs)
    with ExitStack() as made:
        yield Bench(backend, made.enter_context(sender()), made.enter_context(sender()))


@st.composite
def restricted(draw: Callable[..., Any]) -> tuple[dict[str, Any], int]:
    """A policy with `egress`, and where its packets are drawn from."""
    document = draw(documents())
    return {**document, "egress": draw(egress(document))}, draw(st.integers(0, 2**32))


def test_nobody_disagrees(pair: Bench) -> None:
    """Meaning, listing, diagram and kernel say the same about every packet, and all states were met with both ends."""

    @seed(0)
    @settings(max_examples=POLICIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(restricted())
    @example((WHOLE, 1))
    @example((UNTRACKED, 2))
    def run(case: tuple[dict[str, Any], int]) -> None:
        wrong = pair.try_policy(*case)
        assert not wrong, "\n".join((*wrong[:8], str(case)))

    run()

    assert {(state, end) for state in ("new", "invalid") for end in ("accept", "reject")} <= set(pair.met)
    assert {(state, "accept") for state in ("established", "related", "untracked")} <= set(pair.met)
    assert ("established", "reject") not in pair.met


MUTATIONS: dict[str, tuple[Edit, Edit]] = {
    "destination lost": (
        sub(r"(udp dport 53 )ip daddr @admins.v4 ", r"\1"),
        sub(r"(--dport 53) -m set --match-set fwc-admins4 dst", r"\1"),
    ),
    "source for destination": (
        sub(r"tcp dport 53 ip daddr @admins", "tcp dport 53 ip saddr @admins"),
        sub(r"(--dport 53 -m set --match-set fwc-admins4) dst", r"\1 src"),
    ),
    "port of the other end": (
        sub(r"udp sport 10000-20000 (counter name \"egress)", r"udp dport 10000-20000 \1"),
        sub(r"--sport 10000:20000", "--dport 10000:20000"),
    ),
    "port off by one": (sub(r"tcp dport 8443-8445", "tcp dport 8443-8446"), sub(r"--dport 8443:8445", "--dport 8443:8446")),
    "established lost": (
        sub(r'(oifname "lo" accept\n)\t\tct state established,related accept\n', r"\1"),
        gone(r"-A FWC-output -m conntrack --ctstate ESTABLISHED,RELATED"),
    ),
    "loopback lost": (gone('oifname "lo" accept'), gone("-A FWC-output -o lo")),
    "neighbours lost": (
        sub(r'(oifname "lo"[\s\S]*?)\t\ticmp type 3 accept\n', r"\1"),
        gone("-A FWC-output -p icmp -m icmp --icmp-type 3"),
    ),
    "accept for reject": (
        sub(r'"egress.reject" reject with icmpx admin-prohibited', '"egress.reject" accept'),
        sub("egress -j REJECT --reject-with icmp-admin-prohibited", "egress -j ACCEPT"),
    ),
    "drop for reject": (
        sub(r'"egress.reject" reject with icmpx admin-prohibited', '"egress.reject" drop'),
        sub("egress -j REJECT --reject-with icmp-admin-prohibited", "egress -j DROP"),
    ),
    "reject too early": (
        moved(r'"egress.reject"', r"tcp dport 53 ip daddr"),
        moved("-A FWC-output .*egress -j REJECT", "-A FWC-output .*--dport 53"),
    ),
    "everything let out": (
        sub(r'(\t\toifname "lo" accept\n)', "\\1\t\tmeta nfproto ipv4 accept\n"),
        added("-A FWC-output -o lo", "-A FWC-output -j ACCEPT"),
    ),
    "an entry lost": (gone(r'counter name "egress.ntp.accept"'), gone(r"-A FWC-output .*egress.ntp")),
}
WAYS: dict[str, Way] = {"new": "alone", "established": "original", "related": "related", "invalid": "broken", "untracked": "alone"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations(pair: Bench, name: str) -> None:
    """The prover finds every mistake in the rules for outgoing packets, and where one can be sent its example fares as it says."""
    policy = resolved(WHOLE)
    files = dict(pair.backend.render(lower(policy)).files)
    which, edit = ("fwc.nft", MUTATIONS[name][0]) if form(pair.backend) == "nft" else ("fwc.v4", MUTATIONS[name][1])
    changed = edit(files[which])
    assert changed != files[which]
    with pair.ruled.space.entered():
        load_text(pair.backend, {**files, which: changed})
        held = read(pair.backend)
        differences = prove(leaving(policy), held, HOOK)
        found = list(counter_examples(differences, policy, held, leaving=True))
        boxes = [box for each in differences for box in each.boxes]

        assert found
        for each, box in zip(found, boxes, strict=True):
            wanted, got = box.verdicts
            if not each.given:
                assert explain_leaving(policy, each.packet).verdict == wanted
            assert trace(held, each.packet, HOOK, each.given).verdict == got
            assert each.packets.startswith("from this host")
            shown(pair, each.packet, got, bool(each.given))


def shown(pair: Bench, packet: Packet, end: str, given: bool) -> None:
    """Send the packet for real where that can be done: it leaves exactly where the listing lets it out."""
    if packet.interface != INTERFACE or packet.destination is None or given:
        return
    probe = Probe(
        packet.version,
        packet.source or HOST[packet.version],
        packet.destination,
        packet.protocol,
        packet.port,
        packet.source_port,
        packet.icmp_type,
        INTERFACE,
        WAYS[packet.state],
    )
    if pair.bare.ask([probe]) == [packet.state]:
        assert (pair.ruled.ask([probe])[0] is not None) == (end == "accept"), packet
