"""Proves that rules mean what a policy says: those a kernel holds now, or those every backend would load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from fwcompiler.backend import Backend
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import runner
from fwcompiler.neighbours import ON_THE_WAY, Meddling, meddling, read_host
from fwcompiler.pipeline import Compiled, Host, disproof, normal_form, observe, sampled
from fwcompiler.proof.describe import CounterExample, box_text
from fwcompiler.proof.diagram import StepsExceeded
from fwcompiler.proof.edge import explain_packet
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.host import of_host
from fwcompiler.proof.leaving import HOOK
from fwcompiler.proof.prove import FAMILIES, differ
from fwcompiler.registry import installed, load
from fwcompiler.ruleset import AHEAD, Ruleset

MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Verified:
    """What was compared, and what speaks against equality: in words, and as packets.

    `sampled` names sets so big that their content was compared by samples and by the record of the last apply. `foreign`: what
    rules of others change, each with what the policy says; `unread`: rules of others that could not be looked at.
    """

    compared: tuple[str, ...]
    problems: tuple[str, ...] = ()
    counter_examples: tuple[CounterExample, ...] = ()
    sampled: tuple[str, ...] = ()
    foreign: tuple[tuple[Meddling, str], ...] = ()
    unread: tuple[str, ...] = ()
    alone: bool = True

    @property
    def equal(self) -> bool:
        """True when everything compared was proven equal for all packets, and nobody else's rules change that."""
        return not self.problems and not self.counter_examples and not self.foreign


def verify_live(compiled: Compiled, host: Host) -> Verified:
    """Prove that what the kernel holds means what the policy says. Ipsets are always read in full, since that is soon done."""
    full = host.full or host.backend.set_kind != "nft"
    live = observe(replace(host, full=full))
    if not live:
        return Verified((host.backend.name,), (f"{host.backend.name}: nothing of fwc is loaded",))
    by_samples = () if full else sampled(live)
    whole = read_host(host, live)
    problems = _strange(live, compiled.ruleset)
    found: list[tuple[Meddling, str]] = []
    try:
        found = [(each, _policy_says(compiled, each.packet)) for each in meddling(whole)]
    except StepsExceeded:
        problems.append("the rules of others are more than can be decided")
    passing = (ON_THE_WAY,) if compiled.resolved.edge and not whole.alone_on_the_way else ()
    unread = (*whole.unread, *passing)
    alone = whole.alone or bool(passing)
    return Verified((host.backend.name,), tuple(problems), disproof(compiled, live), by_samples, tuple(found), unread, alone)


def _policy_says(compiled: Compiled, packet: Packet) -> str:
    found = explain_packet(compiled.resolved, packet)
    return f"{found.verdict}: {found.reason}" + (f" ({found.at})" if found.at else "")


def _strange(live: Ruleset, wanted: Ruleset) -> list[str]:
    """What is among ours and outside of what the proof is about: it would be wrong to call that equal."""
    proven = {"input", "prerouting", HOOK, *(c.hook.name for c in wanted.chains if c.hook)}
    elsewhere = [f"chain {c.name} hangs at the hook {c.hook.name}" for c in live.chains if c.hook and c.hook.name not in proven]
    # What stands ahead of our call is composed with ours like all rules of others.
    return [*(f"fwc never makes this: {what}" for what in live.others if not what.startswith(AHEAD)), *elsewhere]


def verify_backends(compiled: Compiled, *, full: bool = False) -> Verified:
    """Prove what every usable backend loads equal to the policy, and to one another; with the contents that kernels then hold.

    ``full``: large sets are read whole, too.
    """
    known = {} if full else {s.name: s.ranges for s in compiled.ruleset.sets}
    loaded: list[tuple[Backend, Ruleset]] = []
    problems: list[str] = []
    for name in installed():
        backend = load(name)
        if not all(runner.find(p) for p in backend.programs):
            problems.append(f"{name}: its programs are not installed")
            continue
        try:
            loaded.append((backend, normal_form(compiled, backend, known=known).ruleset))
        except HostRefused as refused:
            problems.append(f"{name}: {refused.message}")
    for (first, one), (second, other) in pairwise(loaded):
        problems += [f"{first.name} and {second.name} differ: {text}" for text in _differences(one, other)]
    by_samples = dict.fromkeys(name for _, ruleset in loaded for name in sampled(ruleset)) if not full else ()
    return Verified(tuple(b.name for b, _ in loaded), tuple(problems), sampled=tuple(by_samples))


def _differences(first: Ruleset, second: Ruleset) -> list[str]:
    texts: list[str] = []
    for hook in ("input", HOOK):
        found = (differ(of_host(first, version, hook), of_host(second, version, hook), version) for version in FAMILIES)
        boxes = ((d.space, box) for d in found if d for box in d.boxes[:MAX_SHOWN])
        texts += [f"{box_text(space, box, leaving=hook == HOOK)}: {' and '.join(box.verdicts)}" for space, box in boxes]
    return texts
