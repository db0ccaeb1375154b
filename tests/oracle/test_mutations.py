"""Mutation of the compiler: mistakes written into rendered rules are caught by the prover, and what it says of them is true.

Each mutated text is loaded as it stands into a kernel of its own and read back. A counter-example has to hold three times: for
the policy's meaning against one-packet readings of the listing, all over its box, and for the kernel with the real packet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import kernelspace
import pytest
from cli.harness import BACKENDS
from oracle.compare import read
from oracle.machine import Machine, machine
from oracle.mutations import MUTATIONS, POLICY, Mutation
from oracle.packets import HOST, Members, member_commands, with_members
from oracle.wire import Probe, Way
from property.strategies import resolved, verdict

from fwcompiler.backend import Backend
from fwcompiler.lower import lower
from fwcompiler.proof.compose import limit_text
from fwcompiler.proof.describe import CounterExample, counter_examples
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.meaning import clauses
from fwcompiler.proof.prove import Box, prove
from fwcompiler.proof.space import DESTINATION, INTERFACE, OTHER_INTERFACE, PORT, PROTOCOL, SOURCE, SOURCE_PORT, STATE, TYPE, Space
from fwcompiler.proof.trace import trace
from fwcompiler.registry import load
from fwcompiler.ruleset import Limit, Ruleset

FULL = resolved(POLICY)
LOWERED = lower(FULL)
ALONE = replace(LOWERED, chains=tuple(c for c in LOWERED.chains if not c.name.startswith("early")))
"""Without the chains before connection tracking, which drop again what the input chain drops and would hide its mistakes."""
WAYS: dict[str, Way] = {"new": "alone", "established": "original", "related": "related", "invalid": "broken", "untracked": "alone"}
PINGS = 300
"""More than any limit's burst lets through at once."""
SAMPLES = 12


@pytest.fixture(scope="module")
def bare(kernel_allowed: bool) -> Iterator[Machine]:
    """A kernel without rules, which says what a packet is."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    with machine() as made:
        yield made


def load_text(backend: Backend, files: Mapping[str, str]) -> None:
    """Load rendered files where this thread is, with the programs that they are written for."""
    if "fwc.nft" in files:
        kernelspace.run(("nft", "-f", "-"), files["fwc.nft"])
        return
    kernelspace.run(("ipset", "restore"), files["fwc.ipset"])
    variant = backend.name.removeprefix("iptables-")
    for family, text in (("", files["fwc.v4"]), ("6", files["fwc.v6"])):
        kernelspace.run((f"ip{family}tables-{variant}-restore", "--noflush"), text)


def form(backend: Backend) -> str:
    """Which text a backend writes."""
    return "nft" if backend.set_kind == "nft" else "iptables"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("ruleset", [LOWERED, ALONE], ids=["whole", "input"])
def test_the_unmutated_text_is_right(bare: Machine, name: str, ruleset: Ruleset) -> None:
    """The text that the mutations start from is proven equal: what is caught below is the mutation."""
    del bare
    backend = load(name)
    with kernelspace.namespace() as space, space.entered():
        load_text(backend, backend.render(ruleset).files)

        assert prove(clauses(FULL), read(backend)) == ()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "-"))
def test_mutation(bare: Machine, name: str, mutation: Mutation) -> None:
    """The prover finds every mutation that changes a packet's fate; its packets fare as it says, and it finds no other."""
    backend = load(name)
    files = mutation.apply(backend.render(LOWERED if mutation.early else ALONE).files)
    with machine() as ruled, ruled.space.entered():
        if mutation.refused:
            with pytest.raises(kernelspace.KernelSaysNo):
                load_text(backend, files)
            return
        load_text(backend, files)
        held = read(backend)
        differences = prove(clauses(FULL), held)
        examples = list(counter_examples(differences, FULL, held))
        if mutation.why_same(form(backend)):
            assert not examples, examples[0]
            return

        assert examples
        boxes = [(d.space, box) for d in differences for box in d.boxes]
        for example, (space, box) in zip(examples, boxes, strict=True):
            holds(held, example, space, box)
        shown = sum(seen(Pair(backend, bare, ruled, held), each, box) for each, (_, box) in zip(examples, boxes, strict=True))
    assert shown or mutation.unseen, examples


def holds(held: Ruleset, example: CounterExample, space: Space, box: Box) -> None:
    """What a counter-example says is so: for its packet and all over its box, by two readings of the listing; and it says why."""
    wanted, found = box.verdicts
    random = Random(str(example))
    for packet in (example.packet, *(inside(space, box, example.packet, random) for _ in range(SAMPLES))):
        assert meant(packet, example.given) == wanted, (example, packet)
        assert trace(held, packet, given=example.given).verdict == found, (example, packet)
        if found != "reject":
            assert verdict(under(held, packet, example.given), packet) == found, (example, packet)
    assert example.policy.startswith(f"{wanted}: "), "a reason"
    assert example.kernel.startswith(f"{found}s them") or found == "accept", example
    decided = trace(held, example.packet, given=example.given)
    assert not decided.chain or decided.chain in example.kernel


def meant(packet: Packet, given: Mapping[str, bool]) -> str:
    """What the policy says about a packet, where limits and members are as given."""
    policy = with_members(FULL, members(packet, given))
    return next(c.verdict for c in clauses(policy) if c.holds(packet) and (not c.limit or given.get(limit_text(c.limit), True)))


def members(packet: Packet, given: Mapping[str, bool]) -> Members:
    """The source, in the dynamic sets that it is given to be in."""
    suffix = f".dynamic.v{packet.version}"
    names = [name.split()[-1].removesuffix(suffix) for name, holds in given.items() if holds and name.endswith(suffix)]
    return {(name, packet.version): (packet.source,) for name in names}


def under(held: Ruleset, packet: Packet, given: Mapping[str, bool]) -> Ruleset:
    """The ruleset as it stands where limits and members are as given: without rules that do not hold, sets with their members."""

    def left(limits: Sequence[Limit]) -> bool:
        return all(given.get(limit_text(each), True) for each in limits)

    chains = tuple(replace(c, rules=tuple(r for r in c.rules if left([m for m in r.matches if isinstance(m, Limit)]))) for c in held.chains)
    own = ((packet.source, packet.source),)
    inside = {f"{name}.dynamic.v{version}" for name, version in members(packet, given)}
    return replace(held, chains=chains, sets=tuple(replace(s, ranges=own) if s.name in inside else s for s in held.sets))


def inside(space: Space, box: Box, usual: Packet, random: Random) -> Packet:
    """Some packet of a box, more often than not from the ends of its ranges. Where it asks about no loopback, nor do we."""

    def number(field: int, value: int) -> int:
        if field not in box.masks:
            return value
        low, high = random.choice(space.ranges(field, box.masks[field]))
        return random.choice((low, high, random.randint(low, high)))

    interfaces = space.names(INTERFACE, box.masks.get(INTERFACE, space.everything(INTERFACE)))
    interface = random.choice(interfaces)
    return replace(
        usual,
        source=number(SOURCE, usual.source),
        protocol=number(PROTOCOL, usual.protocol),
        port=number(PORT, usual.port),
        source_port=number(SOURCE_PORT, usual.source_port),
        icmp_type=number(TYPE, usual.icmp_type),
        destination=number(DESTINATION, 0) if DESTINATION in box.masks else usual.destination,
        interface="eth0" if interface == OTHER_INTERFACE else interface,
        state=random.choice(space.names(STATE, box.masks.get(STATE, space.everything(STATE)))),
    )


@dataclass(frozen=True)
class Pair:
    """A kernel without rules and one with mutated ones, and the listing of those."""

    backend: Backend
    bare: Machine
    ruled: Machine
    held: Ruleset


def seen(pair: Pair, example: CounterExample, box: Box) -> bool:
    """Whether the kernel was shown the packet; it must then do what the counter-example says.

    A limit is exhausted by sending the packet often. What cannot be sent, or arrives in another state, shows nothing.
    """
    packet = example.packet
    probe = Probe(
        packet.version,
        packet.source,
        HOST[packet.version] if packet.destination is None else packet.destination,
        packet.protocol,
        packet.port,
        packet.source_port,
        packet.icmp_type,
        packet.interface,
        WAYS[packet.state],
    )
    if pair.bare.ask([probe]) != [packet.state]:
        return False
    limits = {holds for name, holds in example.given.items() if name.startswith("limit ")}
    if len(limits) > 1:
        return False
    joined = members(packet, example.given)
    for argv in member_commands(pair.backend.set_kind, "add", pair.held, joined):
        kernelspace.run(argv)
    through = pair.ruled.ask([probe] * (PINGS if False in limits else 1))[-1]
    for argv in member_commands(pair.backend.set_kind, "delete", pair.held, joined):
        kernelspace.run(argv)
    assert (through is not None) == (box.verdicts[1] == "accept"), example
    return True


def test_there_are_enough_kinds() -> None:
    """Every kind has a name of its own, and most are caught by proof, not by a refusal or by meaning nothing."""
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    for each in ("nft", "iptables"):
        assert sum(not m.refused and not m.why_same(each) for m in MUTATIONS) >= 50
    assert sum(bool(m.unseen) for m in MUTATIONS) <= 5
