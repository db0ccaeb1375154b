"""The phases of fwc, in order. Reading this file is reading the design.

Everything up to :class:`Compiled` is pure but for reading files; `normal_form` and `observe` ask a kernel, the
first in a scratch namespace; `plan` is pure again. Changing a host is `apply`'s business.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fwcompiler.addresses import Ranges
from fwcompiler.backend import Backend, Rendered
from fwcompiler.diagnostics import Finding, HostRefused, PolicyRejected, Report, Unreadable, UsageError
from fwcompiler.kernel import netns, runner
from fwcompiler.kernel import observe as kernel
from fwcompiler.members import Journal, with_members
from fwcompiler.plan import Plan, make_plan, with_contents, with_static
from fwcompiler.registry import installed, load
from fwcompiler.ruleset import Ruleset
from fwcompiler.state import StateDir

if TYPE_CHECKING:
    # Reading a policy is what costs time to import; going back to a recorded generation does without.
    from fwcompiler.policy import Policy
    from fwcompiler.proof.describe import CounterExample
    from fwcompiler.resolved import Resolved
    from fwcompiler.source import Document


@dataclass(frozen=True)
class Compiled:
    """A policy that was accepted: its meaning, its neutral ruleset, and the warnings on the way."""

    path: str
    document: Document
    policy: Policy
    resolved: Resolved
    ruleset: Ruleset
    findings: tuple[Finding, ...]

    def files(self) -> tuple[str, ...]:
        """The policy file and everything it includes."""
        return tuple(dict.fromkeys((self.path, *(at.file for at in self.document.values.values()))))


@dataclass(frozen=True)
class Host:
    """Where a command acts: through which backend, in which namespace, with which memory.

    ``full``: what the memory holds of large sets is not taken for what the kernel holds; they are read whole.
    """

    backend: Backend
    namespace: netns.Namespace
    state: StateDir
    full: bool = False


@dataclass(frozen=True)
class NormalForm:
    """A ruleset as a kernel lists it: what wanted and live are compared in."""

    ruleset: Ruleset
    listing: tuple[str, ...]


def compile_policy(path: str, *, host: str | None = None, tests: bool = True) -> Compiled:
    """File -> model -> addresses -> ruleset, and the policy's own tests unless somebody else runs them.

    ``host``: the one to compile for, where the policy names several; by default this machine.

    Raises:
        PolicyRejected: with every finding of the stage that failed.
        UsageError: the policy has no such host.
    """
    return _compile(path, *_read(path), host, tests=tests)


def is_outdated(compiled: Compiled, since: float) -> bool:
    """True where a file of a policy was written after that moment (seconds since the epoch), or is gone: it was read before the lock
    was had, and somebody may have waited for his turn with an older text.
    """
    files = (*compiled.files(), *(each.file for _, each in compiled.resolved.lists()))
    try:
        return any(os.stat(file).st_ctime > since for file in files)  # noqa: PTH116
    except OSError:
        return True


def compile_all(path: str, *, tests: bool = True) -> tuple[Compiled, ...]:
    """The policy for every host that it names, in its order; for the one it is for, where it names none.

    Raises:
        PolicyRejected: with the findings of all hosts.
    """
    document, policy = _read(path)
    found: list[Compiled] = []
    report = Report()
    for name in policy.hosts or (None,):
        try:
            found.append(_compile(path, document, policy, name, tests=tests))
        except PolicyRejected as rejected:
            report.findings += [f for f in rejected.findings if f not in report.findings]
    report.stop_on_error()
    return tuple(found)


def _read(path: str) -> tuple[Document, Policy]:
    from fwcompiler.include import load_merged
    from fwcompiler.policy import validate

    report = Report()
    document = load_merged(path, report)
    report.stop_on_error()
    assert document is not None
    policy = validate(document, report)
    report.stop_on_error()
    assert policy is not None
    return document, policy


def _compile(path: str, document: Document, policy: Policy, host: str | None, *, tests: bool) -> Compiled:
    from fwcompiler.fleet import pick_host
    from fwcompiler.lint import lint
    from fwcompiler.lower import lower
    from fwcompiler.resolve import resolve
    from fwcompiler.testing import run_tests

    report = Report()
    name = pick_host(policy.hosts, host, os.uname().nodename)
    resolved = resolve(policy, document, report, today=datetime.now(UTC).date(), host=name)
    report.stop_on_error()
    lint(resolved, report, document)
    if tests:
        run_tests(resolved, report)
    report.stop_on_error()
    return Compiled(path, document, policy, resolved, lower(resolved), report.sorted())


def render(compiled: Compiled, backend: Backend) -> Rendered:
    """The ruleset as the backend's files.

    Raises:
        PolicyRejected: the backend cannot express something, each with its policy line.
    """
    refused = backend.refuse(compiled.ruleset)
    if refused:
        raise PolicyRejected(findings=refused)
    return backend.render(compiled.ruleset)


def normal_form(
    compiled: Compiled, backend: Backend, *, proof: bool = True, fill: bool = True, known: Mapping[str, Ranges] | None = None
) -> NormalForm:
    """Load the ruleset into a scratch namespace and list it there: the kernel accepts it, and says what it made of it.

    What it made of it is proven to mean what the policy says, for all packets. Without `fill` large sets stay empty there, for who is
    going to fill those of the host: the kernel takes such a filling whole or not at all, and its rules are the same.

    With ``known`` the sets are read there as `observe` reads a host's, and that is what is proven. Without, they count as filled with
    what was sent.

    Raises:
        PolicyRejected: the backend cannot express something.
        HostRefused: a program is missing, the kernel refuses, or the listing does not mean what the policy says.
    """
    render_check = backend.refuse(compiled.ruleset)
    if render_check:
        raise PolicyRejected(findings=render_check)
    runner.require(backend.programs)
    with netns.scratch() as scratch, scratch.entered():
        listing = runner.try_out(backend.load(compiled.ruleset), backend.listing(), fill=fill)
        listed = backend.parse(listing)
        listed = with_contents(listed, compiled.ruleset) if known is None else _filled(backend, listed, known)
    wrong = disproof(compiled, listed) if proof else ()
    if wrong:
        raise HostRefused(
            f"{backend.name} loaded rules that do not mean what the policy says; nothing was changed\n  {wrong[0]}",
            hint="this is a bug in fwc: please report it with the policy",
        )
    return NormalForm(listed, listing)


def disproof(compiled: Compiled, ruleset: Ruleset) -> tuple[CounterExample, ...]:
    """Packets that a ruleset treats otherwise than the policy's meaning says; none: proven equal for all packets.

    Packets for other hosts have to pass untouched, but at an edge, where the policy says what becomes of them.
    """
    from fwcompiler.proof.bystanders import touched
    from fwcompiler.proof.describe import counter_examples
    from fwcompiler.proof.leaving import HOOK, leaving
    from fwcompiler.proof.prove import prove

    found = (*_arriving(compiled, ruleset), *(touched(ruleset) if compiled.resolved.edge is None else ()))
    if compiled.resolved.egress is None and not any(c.hook and c.hook.name == HOOK for c in ruleset.chains):
        return found
    differences = prove(leaving(compiled.resolved), ruleset, HOOK)
    return (*found, *counter_examples(differences, compiled.resolved, ruleset, leaving=True))


def _arriving(compiled: Compiled, ruleset: Ruleset) -> tuple[CounterExample, ...]:
    from fwcompiler.proof.describe import counter_examples
    from fwcompiler.proof.meaning import clauses
    from fwcompiler.proof.prove import prove

    if compiled.resolved.edge:
        from fwcompiler.proof.passing import edge_examples, prove_edge

        return tuple(edge_examples(prove_edge(compiled.resolved, ruleset), compiled.resolved))
    if any(s.options.responder for s in compiled.resolved.services):
        from fwcompiler.proof.redirected import redirect_examples

        return tuple(redirect_examples(compiled.resolved, ruleset))
    differences = prove(clauses(compiled.resolved), ruleset)
    return tuple(counter_examples(differences, compiled.resolved, ruleset))


def observe(host: Host, known: Mapping[str, Ranges] | None = None) -> Ruleset:
    """What the kernel holds of ours, set contents and dynamic members included.

    ``known``: contents of big sets as last applied, trusted where their size and samples agree with the kernel; by default
    those of the current generation. Nothing is where the host is to be read in full.

    Raises:
        HostRefused: a program is missing, or this user may not ask.
    """
    backend = host.backend
    runner.require(backend.programs)
    netns.require_host()
    if host.full:
        known = {}
    elif known is None:
        known = remembered(host)
    big = any(len(ranges) > kernel.READ_WHOLE for ranges in known.values())
    with host.namespace.entered():
        return _filled(backend, backend.parse(runner.outputs(backend.listing(big=big))), known)


def put_back(now: Ruleset, before: Ruleset, host: Host) -> None:
    """Return from `now` to `before`, both as observed."""
    steps = make_plan(host.backend, now, before).steps if before else tuple(host.backend.remove(now))
    with host.namespace.entered():
        runner.execute(steps)


def _filled(backend: Backend, listed: Ruleset, known: Mapping[str, Ranges]) -> Ruleset:
    """A listing with the contents of its sets, read from the kernel that we are with."""
    return replace(listed, sets=tuple(kernel.fill_in(backend.set_kind, s, known) for s in listed.sets))


def sampled(live: Ruleset) -> tuple[str, ...]:
    """Sets so big that `observe` compared their content by number, by samples, and by what was applied."""
    return tuple(s.name for s in live.sets if len(s.ranges) > kernel.READ_WHOLE)


def generation_id(host: Host) -> int | None:
    """The number of the kernel's present ruleset, which every transaction raises; None where what we load is not all covered by it."""
    if host.backend.set_kind != "nft":
        return None
    netns.require_host()
    with host.namespace.entered():
        return runner.generation_id()


def plan(compiled: Compiled, host: Host, *, proof: bool = True) -> tuple[Plan, NormalForm]:
    """Everything an apply would do, with nothing done yet."""
    refuse_shrinking(compiled.resolved, host.state)
    # The host first: trying rules out without root moves this process into a namespace of its own.
    seen = generation_id(host)
    known = remembered(host)
    live = observe(host, known)
    before = previous(host)
    wanted = normal_form(compiled, host.backend, proof=proof, fill=False)
    now = time.time()
    filled = with_members(wanted.ruleset, Journal(host.state.path).standing(now), now)
    made = replace(make_plan(host.backend, live, filled), replaces=before.name if before else "", seen=seen)
    if made.in_sync:
        return made, wanted
    notes = (*made.notes, *(_dropped_for_others(live) if compiled.resolved.edge is None else ()))
    return replace(made, edited=edited(host, live, known), notes=notes), wanted


def _dropped_for_others(live: Ruleset) -> Iterator[str]:
    """What somebody made our rules do to packets that are for another host, which no comparison of access is about."""
    from fwcompiler.proof.bystanders import touched
    from fwcompiler.proof.diagram import StepsExceeded

    try:
        yield from (f"{each.packets}: our rules as they are {each.kernel.replace('drops', 'drop', 1)}" for each in touched(live))
    except StepsExceeded:
        yield "our rules as they are perhaps drop packets for another host"


def edited(host: Host, live: Ruleset, known: Mapping[str, Ranges]) -> tuple[str, ...]:
    """What somebody changed since the last apply, in words; `known`: the contents that were applied. Nothing where an apply was killed:
    then it is not known whose changes these are.
    """
    from fwcompiler.drift import by_hand

    current = host.state.current()
    if current is None or current.backend != host.backend.name or host.state.interrupted():
        return ()
    try:
        before = with_static(host.backend.parse(host.state.listing(current.number)), known)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ()
    return by_hand(live, before)


def plan_recorded(host: Host, number: int) -> Plan:
    """Everything that a return to a recorded generation would do. Its rules are tried in a scratch namespace of this kernel first.

    Raises:
        HostRefused: it is damaged, or the kernel does not take it any more.
    """
    backend = host.backend
    seen = generation_id(host)
    live = observe(host)
    before = previous(host)
    try:
        known = recorded(backend, host.state, number)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise HostRefused(f"generation {number} is damaged: {error}; nothing was changed") from error
    with netns.scratch() as scratch, scratch.entered():
        listing = runner.try_out(backend.load(known), backend.listing())
    now = time.time()
    wanted = with_members(with_contents(backend.parse(listing), known), Journal(host.state.path).standing(now), now)
    return replace(make_plan(backend, live, wanted), replaces=before.name if before else "", seen=seen)


def compare_with(compiled: Compiled, host: Host, against: str, *, proof: bool = True) -> Plan:
    """The way to a policy from the last applied generation, or from another policy.

    Raises:
        UsageError: there is no such thing to compare with.
    """
    if against == "applied":
        before = applied(host)
        if before is None:
            raise UsageError(f"no generation of {host.backend.name} is recorded", hint="compare with --against live")
    elif Path(against).is_file():
        before = normal_form(compile_policy(against), host.backend, proof=proof).ruleset
    else:
        raise UsageError(f"cannot compare against `{against}`", hint="live, applied, or the file of another policy")
    return make_plan(host.backend, before, normal_form(compiled, host.backend, proof=proof).ruleset)


def applied(host: Host) -> Ruleset | None:
    """The ruleset of the current generation, as a kernel listed it when it was tried."""
    current = host.state.current()
    if current is None or current.backend != host.backend.name:
        return None
    try:
        return recorded(host.backend, host.state, current.number)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def recorded(backend: Backend, state: StateDir, number: int | str) -> Ruleset:
    """The ruleset of a generation, as a kernel listed it when it was tried.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: it is not there, or damaged.
    """
    return with_static(backend.parse(state.listing(number)), state.contents(number))


def previous(host: Host) -> Backend | None:
    """Another backend whose rules of ours are loaded: that of the generation in force, or any, where none is known.

    Raises:
        HostRefused: it cannot be asked, or both are variants that share their sets, so that one has to go first.
    """
    current = host.state.current()
    if current is not None and current.backend == host.backend.name:
        return None
    known = [current.backend] if current else [name for name in installed() if name != host.backend.name]
    for name in known:
        if name not in installed():
            continue
        other = load(name)
        if current is None and not all(runner.find(p) for p in other.programs):
            continue
        if is_loaded(other, host.namespace):
            return _may_follow(other, host.backend)
    return None


def is_loaded(backend: Backend, namespace: netns.Namespace) -> bool:
    """True where a kernel holds rules of fwc in this backend's form.

    Raises:
        HostRefused: its programs are missing, or this user may not ask.
    """
    runner.require(backend.programs)
    with namespace.entered():
        try:
            return bool(backend.parse(runner.outputs(backend.listing())))
        except Unreadable as error:
            if error.ours:
                raise
            return False


def _may_follow(other: Backend, backend: Backend) -> Backend:
    if other.set_kind == backend.set_kind:
        raise HostRefused(
            f"rules of {other.name} are in force and share their sets with {backend.name}; nothing was changed",
            hint=f"`fwc remove --backend {other.name}` first, or go on with --backend {other.name}",
        )
    return other


def list_sizes(resolved: Resolved) -> dict[str, int]:
    """How many entries each list file has, by family: one IPv6 prefix outnumbers all IPv4 addresses there are."""
    return {f"{key}:v{version}": len(each.spans[version]) for key, each in resolved.lists() for version in (4, 6)}


def refuse_shrinking(resolved: Resolved, state: StateDir) -> None:
    """A list that lost more than half since the last apply is more often a broken download than a decision.

    Raises:
        PolicyRejected: naming every such list, unless its entry says `allow: [shrink]`.
    """
    generation = state.current()
    if generation is None:
        return
    try:
        before = state.list_sizes(generation.number)
    except (OSError, ValueError):
        return
    report = Report()
    sizes = list_sizes(resolved)
    for key, each in resolved.lists():
        for version in (4, 6):
            now, then = sizes[f"{key}:v{version}"], before.get(f"{key}:v{version}", 0)
            if now * 2 < then and not each.may_shrink:
                message = f"`{each.file}` had {then} IPv{version} entries at the last apply and has {now} now"
                report.error("list-shrink", message, each.at, "if that is meant, say `allow: [shrink]` at this entry")
    report.stop_on_error()


def remembered(host: Host) -> dict[str, Ranges]:
    """Contents of the static sets as the current generation loaded them."""
    generation = host.state.current()
    if generation is None or generation.backend != host.backend.name:
        return {}
    try:
        return host.state.contents(generation.number)
    except (OSError, ValueError):
        return {}


@contextmanager
def target(name: str | None) -> Iterator[netns.Namespace]:
    """The namespace to act in: the one called `name`, or the one we are in."""
    namespace = netns.Namespace() if name is None else netns.named(name)
    try:
        yield namespace
    finally:
        namespace.close()
