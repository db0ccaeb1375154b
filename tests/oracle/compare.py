"""One policy on one backend: what its meaning, the reading of its listing and the kernel say about many packets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import kernelspace
import yaml
from oracle.machine import Machine, machine
from oracle.packets import Members, joined, member_commands, members, packets, with_members
from oracle.reading import Diagram, is_for_several, meant
from oracle.wire import Probe
from property.strategies import resolved

from fwcompiler.addresses import address_text
from fwcompiler.backend import Backend
from fwcompiler.foreign import LOCAL
from fwcompiler.kernel import observe, runner
from fwcompiler.lower import lower
from fwcompiler.plan import make_plan, with_contents
from fwcompiler.proof.describe import packet_text, rule_text
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.meaning import Clause, clauses
from fwcompiler.proof.trace import trace
from fwcompiler.ruleset import Ruleset, State


@dataclass(frozen=True)
class Case:
    """A policy, the one that is in force when it comes, and where members and packets are drawn from."""

    document: dict[str, Any]
    seed: int
    before: dict[str, Any] | None = None


@dataclass(frozen=True)
class Disagreement:
    """A packet about which not all agree."""

    packet: Packet
    clause: Clause
    traced: str
    rule: str
    diagram: str
    kernel: str

    def __str__(self) -> str:
        packet = self.packet
        destination = address_text(packet.version, packet.destination or 0)
        return (
            f"{packet_text(packet)}, to {destination}, source port {packet.source_port}\n"
            f"  meaning {self.clause.verdict} ({self.clause.reason}), listing {self.traced} ({self.rule}), "
            f"diagram {self.diagram}, kernel {self.kernel}"
        )


@dataclass
class Tally:
    """What a run looked at: it says nothing if it never met both verdicts in every state."""

    sent: int = 0
    arrived: int = 0
    verdicts: Counter[tuple[State, str]] = field(default_factory=Counter)
    clauses: Counter[str] = field(default_factory=Counter)


def read(backend: Backend) -> Ruleset:
    """What the kernel of the namespace that this thread is in holds, contents of sets included."""
    listed = backend.parse(runner.outputs(backend.listing()))
    return Ruleset(listed.chains, tuple(observe.fill_in(backend.set_kind, s, {}) for s in listed.sets), listed.others)


@dataclass(frozen=True)
class Bench:
    """A kernel that holds no rules of fwc and says what a packet is, and one that holds those of a backend."""

    backend: Backend
    bare: Machine
    ruled: Machine
    tally: Tally = field(default_factory=Tally)

    def try_policy(self, case: Case, count: int) -> list[Disagreement]:
        """Load a policy, over another one where the case names it, send packets, and name those about which not all agree.

        Raises:
            InvalidRun: reports of the kernel were lost.
        """
        random = Random(case.seed)
        policy, at_present = resolved(case.document), {}
        with self.loaded(lower(resolved(case.before)) if case.before else None) as live, self.ruled.space.entered():
            if case.before:
                old = self._join(live, members(resolved(case.before), random))
                self.update(lower(policy))
                stay = {s.name for s in lower(policy).sets}
                at_present = {key: who for key, who in old.items() if f"{key[0]}.dynamic.v{key[1]}" in stay}
            else:
                runner.execute(self.backend.load(lower(policy)))
            at_present = joined(at_present, self._join(read(self.backend), members(policy, random)))
            full = with_members(policy, at_present)
            return self.compare(clauses(full), read(self.backend), packets(full, random, count))

    @contextmanager
    def loaded(self, ruleset: Ruleset | None) -> Iterator[Ruleset]:
        """Rules for the length of a block, and how the backend reads what the kernel lists; what comes on top goes as well."""
        backend = self.backend
        try:
            with self.ruled.space.entered():
                runner.execute(backend.load(ruleset) if ruleset else ())
                held = read(backend)
            yield held
        finally:
            with self.ruled.space.entered():
                runner.execute(backend.remove(read(backend)))

    def update(self, ruleset: Ruleset) -> None:
        """Go from what is loaded to other rules as an apply does: by the difference."""
        backend = self.backend
        with kernelspace.namespace() as scratch, scratch.entered():
            listing = runner.try_out(backend.load(ruleset), backend.listing())
        plan = make_plan(backend, read(backend), with_contents(backend.parse(listing), ruleset))
        runner.execute(plan.steps)
        assert make_plan(backend, read(backend), plan.wanted).in_sync

    def _join(self, held: Ruleset, who: Members) -> Members:
        """Let members into the sets that a kernel holds, and say which are in one."""
        for argv in member_commands(self.backend.set_kind, "add", held, who):
            kernelspace.run(argv)
        names = {each.name for each in held.sets}
        return {key: addresses for key, addresses in who.items() if f"{key[0]}.dynamic.v{key[1]}" in names}

    def compare(self, meaning: Sequence[Clause], held: Ruleset, probes: Sequence[Probe]) -> list[Disagreement]:
        """What the meaning, two readings of a listing and the kernel say about packets, where that is not the same."""
        states = self.bare.ask(probes)
        kernel = self.ruled.ask(probes)
        diagrams = {version: Diagram(held, version) for version in (4, 6)}
        wrong = []
        for probe, state, through in zip(probes, states, kernel, strict=True):
            self.tally.sent += 1
            if state is None:
                assert through is None, f"{probe} arrives only where there are rules"
                continue
            packet = probe.packet(state)
            clause = meant(meaning, packet)
            decision = trace(held, packet, given={LOCAL: not is_for_several(packet)})
            said = (clause.verdict, decision.verdict, diagrams[packet.version].verdict(packet), "accept" if through else "drop")
            self._count(clause, packet)
            if len(set(said)) > 1 or decision.unsure:
                rule = rule_text(decision.rule) if decision.rule else "the end of the chain"
                wrong.append(Disagreement(packet, clause, f"{said[1]}{' unsure' if decision.unsure else ''}", rule, said[2], said[3]))
        return wrong

    def _count(self, clause: Clause, packet: Packet) -> None:
        self.tally.arrived += 1
        self.tally.verdicts[packet.state, clause.verdict] += 1
        reason = clause.reason.split(":")[0]
        self.tally.clauses[reason.replace(clause.service, "SERVICE", 1) if clause.service else reason] += 1


@contextmanager
def bench(backend: Backend) -> Iterator[Bench]:
    """Two kernels for a backend, for the length of a block."""
    with ExitStack() as held:
        yield Bench(backend, held.enter_context(machine()), held.enter_context(machine()))


def report(case: Case, wrong: Sequence[Disagreement], rerun: str) -> str:
    """What a failing test prints: the policy, some of the packets with everybody's verdict, and how to see it again."""
    shown = "\n".join(map(str, wrong[:8]))
    before = f"\nin place of\n{yaml.safe_dump(case.before, sort_keys=False)}" if case.before else ""
    return f"{len(wrong)} packets:\n{shown}\n\n{yaml.safe_dump(case.document, sort_keys=False)}{before}\nagain: {rerun}"
