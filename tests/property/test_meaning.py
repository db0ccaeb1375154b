"""The laws that tie the halves together: what a policy means, what the compiler makes of it, and what a kernel holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from cli.harness import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from property.strategies import (
    DEAR_LAW,
    HOME,
    KERNEL_LAW,
    LAW,
    address_sets,
    documents,
    own_ports,
    packets,
    resolved,
    sent,
    spans,
    verdict,
)

from fwcompiler.addresses import EVERYONE, LOOPBACK, NOBODY, Addresses, Ranges, covers, merged
from fwcompiler.kernel import netns, observe, runner
from fwcompiler.lower import lower
from fwcompiler.plan import make_plan, with_contents
from fwcompiler.proof.access import compare
from fwcompiler.proof.atoms import cut
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.leaving import HOOK, explain_leaving, leaving
from fwcompiler.proof.meaning import explain
from fwcompiler.proof.prove import prove
from fwcompiler.proof.sending import Sending, compare_sending
from fwcompiler.proof.trace import trace
from fwcompiler.registry import load
from fwcompiler.ruleset import Ruleset

PACKETS = 60


@LAW
@given(st.data())
def test_atoms_are_a_partition(data: st.DataObject) -> None:
    """Classes neither overlap nor leave anything out, and every set is the union of its classes."""
    sets: list[tuple[int, Ranges]] = []
    for version in data.draw(st.lists(st.sampled_from((4, 6)), max_size=6)):
        sets.append((version, merged(data.draw(st.lists(spans(version), max_size=4)))))

    atoms = cut(sets)

    total = NOBODY
    for i in range(len(atoms.classes)):
        one = atoms.addresses(1 << i)
        assert one
        assert not one & total
        total = total | one
    assert total == EVERYONE == atoms.addresses(atoms.everyone)
    for version, ranges in sets:
        assert atoms.addresses(atoms.masks[version, ranges]) == Addresses(ranges if version == 4 else (), ranges if version == 6 else ())


@DEAR_LAW
@given(documents(), st.data())
def test_compiled_rules_mean_the_policy(document: dict[str, Any], data: st.DataObject) -> None:
    """Whatever the policy and whatever the packet: the neutral ruleset does what the meaning says."""
    policy = resolved(document)
    ruleset = lower(policy)

    for packet in data.draw(st.lists(packets(policy), min_size=5, max_size=15)):
        assert verdict(ruleset, packet) == explain(policy, packet).verdict, packet


@DEAR_LAW
@given(documents(), st.data())
def test_compiled_rules_mean_egress(document: dict[str, Any], data: st.DataObject) -> None:
    """Whatever the host sends: the neutral ruleset does what the meaning says, and so says the proof about all packets."""
    policy = resolved(document)
    ruleset = lower(policy)

    assert prove(leaving(policy), ruleset, HOOK) == ()
    for packet in data.draw(st.lists(sent(policy), min_size=5, max_size=15)):
        assert trace(ruleset, packet, HOOK).verdict == explain_leaving(policy, packet).verdict, packet


@DEAR_LAW
@given(documents(), documents(), st.data())
def test_comparison_tells_what_may_be_sent(one: dict[str, Any], other: dict[str, Any], data: st.DataObject) -> None:
    """A new connection of the host's is among what it may send now exactly where the second ruleset lets it out and the first does not."""
    policy, second = resolved(one), resolved(other)
    a, b = lower(policy), lower(second)
    change, back = compare_sending(a, b), compare_sending(b, a)

    assert (change.gained, change.lost) == (back.lost, back.gained)
    named = {p for each in (policy, second) for p in own_ports(each)}
    for packet in data.draw(st.lists(sent(data.draw(st.sampled_from((policy, second)))), min_size=5, max_size=10)):
        plain = replace(packet, source_port=39999)
        loopback = covers((LOOPBACK[packet.version],), packet.destination or 0)
        if packet.state != "new" or packet.interface == "lo" or packet.protocol not in (6, 17) or 39999 in named or loopback:
            continue
        was, now = (trace(each, plain, HOOK).verdict == "accept" for each in (a, b))
        assert among(change.gained, plain) == (now and not was), plain
        assert among(change.lost, plain) == (was and not now), plain


def among(parts: Sequence[Sending], packet: Packet) -> bool:
    """Whether a packet from a port that nothing names is among what is said to be gained or lost."""
    assert packet.destination is not None
    name = {6: "tcp", 17: "udp"}[packet.protocol]
    for part in parts:
        low, _, high = part.to.partition("/")[2].partition("-")
        there = part.to.startswith(f"{name}/") and not part.from_port and int(low) <= packet.port <= int(high or low)
        if there and (packet.version, packet.destination) in part.addresses:
            return True
    return False


@DEAR_LAW
@given(documents(), documents(), st.data())
def test_comparison_tells_every_packet(one: dict[str, Any], other: dict[str, Any], data: st.DataObject) -> None:
    """A new connection is among the access gained exactly where the second ruleset accepts it and the first does not."""
    policy, second = resolved(one), resolved(other)
    a, b = lower(policy), lower(second)
    change = compare(a, b)

    for packet in data.draw(st.lists(packets(data.draw(st.sampled_from((policy, second)))), min_size=5, max_size=10)):
        if packet.state != "new" or packet.interface == "lo" or packet.destination is not None or packet.protocol not in (6, 17):
            continue
        before, after = verdict(a, packet), verdict(b, packet)
        assert told(change.gained, packet) == ((before, after) == ("drop", "accept")), packet
        assert told(change.lost, packet) == ((before, after) == ("accept", "drop")), packet


def told(parts: tuple[Any, ...], packet: Packet) -> bool:
    """True where one of the lines of access covers the packet."""
    for part in parts:
        protocol, _, ports = part.to.partition("/")
        low, _, high = ports.partition("-")
        same = protocol == {6: "tcp", 17: "udp"}[packet.protocol] and int(low) <= packet.port <= int(high or low)
        if same and (packet.version, packet.source) in part.addresses:
            return True
    return False


@LAW
@given(address_sets(), address_sets())
def test_comparison_of_one_service(old: Addresses, new: Addresses) -> None:
    """For one service, access gained and lost are the differences of its sources, loopback apart."""
    home = Addresses(((HOME[4], HOME[4] + 63),), ((HOME[6], HOME[6] + 63),))
    old, new = old & home, new & home
    rulesets = [lower(resolved(one_service(each))) for each in (old, new)]

    change = compare(*rulesets)

    assert total(change.gained) == (new - old if old else new)
    assert total(change.lost) == old - new


def one_service(sources: Addresses) -> dict[str, Any]:
    """A policy with one service; an address outside `sources` keeps its group from being empty."""
    members = [*sources.texts(), "203.0.113.1"]
    return {"version": 1, "groups": {"alpha": members}, "services": {"ssh": {"from": ["alpha"]}}}


def total(parts: tuple[Any, ...]) -> Addresses:
    """All addresses of several lines of access."""
    result = NOBODY
    for part in parts:
        result = result | part.addresses
    return result


@pytest.mark.parametrize("name", BACKENDS)
def test_kernels_hold_what_the_policy_means(kernel_allowed: bool, name: str) -> None:
    """Random policies, loaded into a scratch kernel, listed and read back, still do what the meaning says for every packet tried.

    A second plan from what was read to itself has nothing to do: reading is faithful.
    """
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    backend = load(name)
    runner.require(backend.programs)

    @KERNEL_LAW
    @given(documents(), st.data())
    def law(document: dict[str, Any], data: st.DataObject) -> None:
        policy = resolved(document)
        wanted = lower(policy)
        assert not backend.refuse(wanted)
        with netns.scratch() as scratch, scratch.entered():
            runner.execute(backend.load(wanted))
            listed = backend.parse(runner.outputs(backend.listing()))
            held = Ruleset(listed.chains, tuple(observe.fill_in(backend.set_kind, s, {}) for s in listed.sets), listed.others)

        assert held.others == ()
        assert {s.name: s.ranges for s in held.sets} == {s.name: s.ranges for s in wanted.sets}
        assert make_plan(backend, held, with_contents(listed, wanted)).in_sync
        for packet in data.draw(st.lists(packets(policy), min_size=PACKETS, max_size=PACKETS)):
            assert verdict(held, packet) == explain(policy, packet).verdict, packet

    law()
