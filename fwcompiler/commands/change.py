"""Commands that change a host, and those that show what would change: diff, apply, remove."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from fwcompiler.commands.app import (
    Full,
    NoProof,
    Options,
    PolicyFile,
    app,
    ask,
    chosen_backend,
    chosen_host,
    compiled_policy,
    must_ask,
    print_json,
    proof_wanted,
    show_plan,
    state_dir,
    target_namespace,
)
from fwcompiler.commands.safely import Confirm, Lockout, Reason, Wait, access_words, finish, knock, say, starter, trial_time
from fwcompiler.diagnostics import EXIT_DIFFERS, EXIT_OK
from fwcompiler.records import Note

if TYPE_CHECKING:
    from fwcompiler.apply import Applied
    from fwcompiler.pipeline import Compiled, Host
    from fwcompiler.plan import Plan
    from fwcompiler.trial import Starter

PLANS = 3
"""How often an apply plans while somebody else keeps changing our rules."""


@app.command()
def diff(
    context: typer.Context,
    policy: PolicyFile,
    against: Annotated[
        list[str],
        typer.Option(
            help="What to compare with: `live`, `applied`, the file of another policy, or a saved listing: `nft -j list ruleset`, "
            "`iptables-save`, whoever wrote the rules. May be said again where a host's listing is in several files."
        ),
    ] = ["live"],  # noqa: B006 - typer reads it as the default and copies it
    full: Full = False,
    no_proof: NoProof = False,
) -> int:
    """Show what an apply would change: access gained and lost, then the kernel changes."""
    from fwcompiler.neighbours import notes
    from fwcompiler.pipeline import plan, sampled
    from fwcompiler.report import sampled_text
    from fwcompiler.trial import interruption

    options: Options = context.obj
    compiled = compiled_policy(policy, options)
    with chosen_host(options, full=full) as host:
        proof = proof_wanted(no_proof)
        planned = plan(compiled, host, proof=proof)[0] if against == ["live"] else _compared(compiled, host, against, proof=proof)
        if against == ["live"]:
            killed = interruption(host, planned.live)
            big = () if full else sampled_text(sampled(planned.live))
            told = (*((killed,) if killed else ()), *notes(host, planned.live), *big)
            planned = replace(planned, notes=(*planned.notes, *told))
            if not planned.in_sync:
                knock(planned, compiled, host, options, allow=True)
    if against != ["live"] and planned.in_sync and not options.json:
        if not options.quiet:
            print("\n".join((*planned.notes, f"no difference to {' and '.join(against)}")))
        return EXIT_OK
    show_plan(planned, compiled, options)
    return EXIT_OK if planned.in_sync else EXIT_DIFFERS


def _compared(compiled: Compiled, host: Host, against: list[str], *, proof: bool) -> Plan:
    """The way from a recorded generation, another policy or saved listings."""
    from pathlib import Path

    from fwcompiler.listing import compare_with_listing, read_listing
    from fwcompiler.pipeline import compare_with

    if len(against) == 1 and (against[0] in ("live", "applied") or not Path(against[0]).is_file()):
        return compare_with(compiled, host, against[0], proof=proof)
    listing = read_listing(against)
    if listing is None:
        return compare_with(compiled, host, against[0], proof=proof)
    return compare_with_listing(compiled, host, listing, proof=proof)


@dataclass(frozen=True)
class _Change:
    """A policy about to be put into force, and what was said about it on the command line."""

    compiled: Compiled
    host: Host
    options: Options
    yes: bool
    allow_lockout: bool
    proof: bool
    note: Note

    def carried_out(self, trial: Starter | None) -> tuple[Applied, Plan]:
        """Plan, show, ask, commit; all of it again where somebody changed our rules in between, since nobody saw that change.

        Raises:
            HostRefused: they do not hold still.
        """
        from fwcompiler import apply as stage
        from fwcompiler.pipeline import plan

        for attempt in range(1, PLANS + 1):
            planned, wanted = plan(self.compiled, self.host, proof=self.proof)
            note = self._shown(planned)
            try:
                return stage.apply(self.compiled, planned, wanted, self.host, proof=self.proof, note=note, trial=trial), planned
            except stage.Stale as stale:
                if attempt == PLANS:
                    raise
                print(f"note: {stale.message.partition(';')[0]}; planning anew", file=sys.stderr)
        raise AssertionError

    def _shown(self, planned: Plan) -> Note:
        note = replace(self.note, changes=access_words(planned, self.compiled))
        if planned.in_sync:
            return note
        note = replace(note, lockout=knock(planned, self.compiled, self.host, self.options, allow=self.allow_lockout))
        if not self.options.json:
            show_plan(planned, self.compiled, self.options)
        ask(self.yes, "apply this?")
        return note


@app.command()
def apply(
    context: typer.Context,
    policy: PolicyFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    confirm: Confirm = None,
    wait: Wait = None,
    reason: Reason = "",
    allow_lockout: Lockout = False,
    full: Full = False,
    no_proof: NoProof = False,
) -> int:
    """Put a policy into force: check, try, show the difference, commit in one transaction, read back."""
    from fwcompiler.pipeline import is_outdated, plan
    from fwcompiler.trial import settle

    options: Options = context.obj
    started = time.time()
    compiled = compiled_policy(policy, options)
    proof = proof_wanted(no_proof)
    seconds = trial_time(confirm)
    with chosen_host(options, full=full) as host:
        if dry_run:
            planned, _ = plan(compiled, host, proof=proof)
            if not planned.in_sync:
                knock(planned, compiled, host, options, allow=True)
            show_plan(planned, compiled, options)
            return EXIT_OK if planned.in_sync else EXIT_DIFFERS
        must_ask(yes)
        with host.state.lock(f"apply {policy}"):
            say(settle(host), options)
            if is_outdated(compiled, started):
                compiled = compiled_policy(policy, options)
            change = _Change(compiled, host, options, yes, allow_lockout, proof, Note(reason, trial=seconds))
            applied, planned = change.carried_out(starter(host, seconds, options))
        return finish(applied, planned, host, options, wait)


@app.command()
def remove(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Take out everything that is fwc's, and nothing else."""
    from fwcompiler import apply as stage
    from fwcompiler.kernel.runner import find
    from fwcompiler.registry import installed, load
    from fwcompiler.trial import no_trial

    options: Options = context.obj
    names = [chosen_backend(options).name] if options.backend else list(installed())
    state = state_dir(options)
    current = state.current()
    in_force = {current.backend} if current else set()
    backends = [b for b in map(load, names) if options.backend or b.name in in_force or all(find(p) for p in b.programs)]
    must_ask(yes)
    with target_namespace(options) as namespace, state.lock("remove"):
        no_trial(state)
        ask(yes, "take out all rules of fwc? what they protect is open then")
        removed = list(stage.remove(backends, namespace, state))
    if options.json:
        print_json({"removed": removed})
    elif not options.quiet:
        print(f"removed: {', '.join(removed)}" if removed else "there was nothing of fwc")
    return EXIT_OK
