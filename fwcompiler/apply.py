"""Puts a plan into force: prepare the record, commit, read back, record. Or put everything back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fwcompiler import connections
from fwcompiler.backend import Backend
from fwcompiler.diagnostics import HostRefused, RolledBack
from fwcompiler.dynamic import reconcile
from fwcompiler.guard import who_may_log_in
from fwcompiler.kernel import netns, runner
from fwcompiler.pipeline import Compiled, Host, NormalForm, disproof, list_sizes, observe, put_back
from fwcompiler.plan import Plan, make_plan
from fwcompiler.records import Generation, Note, Record, Trial
from fwcompiler.registry import load
from fwcompiler.ruleset import AddressSet, Chain, Ruleset
from fwcompiler.state import StateDir

if TYPE_CHECKING:
    from fwcompiler.kernel.watch import Watch
    from fwcompiler.proof.describe import CounterExample
    from fwcompiler.trial import Starter


@dataclass(frozen=True)
class Applied:
    """How an apply ended: the generation in force, whether the kernel had to be changed, the trial that began, and
    what could not be done besides."""

    generation: Generation
    changed: bool
    trial: Trial | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proven:
    """A ruleset that was shown to mean what a policy says, for all packets."""

    compiled: Compiled
    ruleset: Ruleset

    def disproof(self, after: Ruleset) -> tuple[CounterExample, ...]:
        """What speaks against another ruleset. The same rules over the same addresses need no second proof."""
        if all({each.name: each for each in a} == {each.name: each for each in b} for a, b in self._parts(after)):
            return ()
        return disproof(self.compiled, after)

    def _parts(self, after: Ruleset) -> Iterator[tuple[Iterable[Chain | AddressSet], Iterable[Chain | AddressSet]]]:
        yield self.ruleset.chains, after.chains
        yield self.ruleset.sets, after.sets


def apply(
    compiled: Compiled,
    plan: Plan,
    wanted: NormalForm,
    host: Host,
    *,
    proof: bool = True,
    note: Note | None = None,
    trial: Starter | None = None,
) -> Applied:
    """Commit a plan, with a `trial` only until it is over. The caller holds the state's lock.

    Raises:
        HostRefused: the state directory or the kernel refused; nothing was changed.
        RolledBack: the kernel took it, but lists something else than was wanted; the old rules are back.
    """
    record = _record(compiled, wanted, host.backend, proof, note or Note())
    current = host.state.current()
    if plan.in_sync and current is not None and current.fingerprint == record.fingerprint():
        return Applied(current, False, notes=reconcile(host, plan.live))
    return _put_into_force(host.state.prepare(record), Proven(compiled, wanted.ruleset) if proof else None, plan, host, trial)


def reapply(number: int, plan: Plan, host: Host, note: Note, trial: Starter | None = None) -> Applied:
    """Commit a plan that leads to a recorded generation, which becomes a new one. The caller holds the state's lock.

    Raises:
        HostRefused, RolledBack: as :func:`apply`.
    """
    return _put_into_force(host.state.prepare_again(number, note), None, plan, host, trial)


def _put_into_force(pending: Path, proven: Proven | None, plan: Plan, host: Host, trial: Starter | None) -> Applied:
    before = load(plan.replaces) if plan.replaces else None
    generation = trial.begin(pending, plan) if trial else None
    found = plan.live
    said: tuple[str, ...] = ()
    try:
        if plan.steps:
            said = _execute(plan, host)
            found = _verify(proven, plan, host)
    except BaseException:
        if trial:
            trial.cancel()
        host.state.discard(pending)
        raise
    if generation is None:
        generation = _recorded(pending, plan, host)
    notes = (*said, *reconcile(host, found), *_end_connections(plan, found, host))
    if before is not None:
        try:
            _take_out(before, host.namespace)
        except HostRefused as refused:
            in_force = f"generation {generation.number} is in force, but the rules of {before.name} are still there"
            refused.message = f"{in_force}: {refused.message}"
            refused.hint = f"`fwc remove --backend {before.name}`"
            raise
    return Applied(generation, not plan.in_sync, trial.trial if trial else None, notes)


def _recorded(pending: Path, plan: Plan, host: Host) -> Generation:
    try:
        return host.state.commit(pending)
    except HostRefused as refused:
        _return(plan, host)
        refused.message += "; the previous ruleset was restored"
        raise


def _end_connections(plan: Plan, found: Ruleset, host: Host) -> tuple[str, ...]:
    """Whoever lost access loses his connections, and flows that go elsewhere now begin anew; what could not be done, in words."""
    if not plan.steps:
        return ()
    failed = [
        connections.end(connections.lost_access(plan.live, found, plan.access), host.namespace),
        connections.end_astray(plan.access.gained, host.namespace),
    ]
    if plan.sending.lost or plan.sending.members_lost:
        failed.append(connections.end_sent(plan.live, found, host.namespace))
    return tuple(filter(None, failed))


class Stale(HostRefused):
    """Somebody changed our rules after the plan was made: carrying it out would overwrite that unseen."""


def _execute(plan: Plan, host: Host) -> tuple[str, ...]:
    """Run the steps, unless somebody changed our rules since they were planned. Returns what there is to say about others' changes.

    A step that fails behind the one that commits leaves the new rules: then the old ones come back.
    """
    try:
        with host.namespace.entered(), runner.undisturbed(host.backend.set_kind) as watch:
            _refuse_stale(plan, host)
            runner.execute(plan.steps, watch)
            return _others(plan, watch)
    except Stale:
        raise
    except HostRefused as refused:
        if make_plan(host.backend, observe(host), plan.live).in_sync:
            raise
        _return(plan, host)
        said = refused.message.removesuffix(runner.UNCHANGED)
        raise RolledBack(f"{said}; the previous ruleset was restored", refused.findings) from refused


def _refuse_stale(plan: Plan, host: Host) -> None:
    """Look once more, right before the commit. Others' tables change all the time, and concern nobody here.

    Raises:
        Stale: our rules are no longer those that the plan starts from.
    """
    if plan.seen is not None and plan.seen == runner.generation_id():
        return
    if observe(host, plan.live.contents()) != plan.live:
        hint = "`fwc status` shows what differs; run it again"
        raise Stale("somebody changed the rules of fwc since this was planned; nothing was changed", hint=hint)


def _others(plan: Plan, watch: Watch | None) -> tuple[str, ...]:
    """Whether somebody else's transaction on our table came between the last look and the end of ours."""
    heard = watch.heard() if watch else None
    if watch and watch.missed:
        return ("somebody else changed rules during this apply, perhaps table inet fwc; the rules in force are those of the policy",)
    if heard is None or len(heard) <= runner.heard_transactions(plan.steps):
        return ()
    who = " and ".join(dict.fromkeys(t.process for t in heard))
    return (f"somebody else changed table inet fwc during this apply ({who}); the rules in force are those of the policy",)


def _record(compiled: Compiled, wanted: NormalForm, backend: Backend, proven: bool, note: Note) -> Record:
    empty = replace(compiled.ruleset, sets=tuple(replace(s, ranges=()) for s in compiled.ruleset.sets))
    rendered = backend.render(empty).files
    policy = str(Path(compiled.path).resolve())
    lists = list_sizes(compiled.resolved)
    texts = compiled.document.texts
    return Record(
        backend.name,
        policy,
        compiled.policy.name,
        texts,
        rendered,
        wanted.listing,
        wanted.ruleset,
        lists,
        proven,
        note,
        who_may_log_in(compiled.resolved),
    )


def _verify(proven: Proven | None, plan: Plan, host: Host) -> Ruleset:
    """Read the live rules back and prove them; where anything is wrong with them, put back what was there before.

    Without a policy to prove them against, they are only compared with what was sent.
    """
    try:
        after = observe(host, plan.wanted.contents())
        if not make_plan(host.backend, after, plan.wanted).in_sync:
            raise RolledBack("the kernel lists other rules than were sent")
        wrong = proven.disproof(after) if proven else ()
        if wrong:
            raise RolledBack(f"the live rules do not mean what the policy says\n  {wrong[0]}")
        return after
    except BaseException as error:
        _return(plan, host)
        if isinstance(error, RolledBack):
            error.message += "; the previous ruleset was restored"
            raise
        raise RolledBack(f"{error or type(error).__name__}; the previous ruleset was restored") from error


def _return(plan: Plan, host: Host) -> None:
    """Go back to what was there before a commit, also where the kernel cannot be read at present."""
    try:
        now = observe(host, plan.wanted.contents())
    except HostRefused:
        now = replace(plan.wanted, others=("set unlisted",))
    try:
        put_back(now, plan.live, host)
    except HostRefused as refused:
        said = refused.message.removesuffix(runner.UNCHANGED)
        raise HostRefused(f"THE NEW RULES ARE IN FORCE: putting back the old ones failed: {said}", hint="look at `fwc status`") from refused


def _take_out(backend: Backend, namespace: netns.Namespace) -> bool:
    """Remove what one backend has loaded; False where that was nothing."""
    runner.require(backend.programs)
    with namespace.entered():
        live = backend.parse(runner.outputs(backend.listing()))
        if not live:
            return False
        runner.execute(backend.remove(live))
        if backend.parse(runner.outputs(backend.listing())):
            raise HostRefused(f"{backend.name}: rules of fwc are still there after the removal")
    return True


def remove(backends: list[Backend], namespace: netns.Namespace, state: StateDir) -> Iterator[str]:
    """Take out everything of ours, backend by backend; yields the names of those that had something.

    Raises:
        HostRefused: one of them cannot be asked or refuses.
    """
    for backend in backends:
        if _take_out(backend, namespace):
            yield backend.name
    current = state.current()
    if current is not None and current.backend in {b.name for b in backends}:
        state.forget()
