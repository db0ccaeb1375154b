"""Commands about what was applied: confirm, rollback, history."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from fwcompiler.commands.app import Options, app, ask, chosen_host, must_ask, print_json, show_plan, state_dir, target_namespace
from fwcompiler.commands.safely import Confirm, Lockout, Reason, Wait, access_words, finish, knock, say, starter, trial_time
from fwcompiler.diagnostics import EXIT_OK, HostRefused
from fwcompiler.records import Note

if TYPE_CHECKING:
    from fwcompiler.pipeline import Host


@app.command()
def confirm(
    context: typer.Context,
    same_session: Annotated[bool, typer.Option("--same-session", help="Also over the connection that it was applied over.")] = False,
) -> int:
    """Keep the generation on trial. Comes over a new connection, which shows that one is possible."""
    from fwcompiler import trial

    options: Options = context.obj
    with chosen_host(options) as host:
        generation = trial.confirm(host, same_session=same_session)
    if options.json:
        print_json({"confirmed": generation.number})
    elif not options.quiet:
        print(f"confirmed: generation {generation.number}")
    return EXIT_OK


@app.command()
def rollback(
    context: typer.Context,
    number: Annotated[int | None, typer.Argument(metavar="N", help="Generation to return to; default: the one before.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    confirm: Confirm = None,
    wait: Wait = None,
    reason: Reason = "",
    allow_lockout: Lockout = False,
) -> int:
    """Return to a recorded generation. During a trial: end it at once."""
    from fwcompiler import apply as stage
    from fwcompiler.pipeline import plan_recorded
    from fwcompiler.trial import settle

    options: Options = context.obj
    seconds = trial_time(confirm)
    with chosen_host(options) as host:
        if number is None and host.state.trial() is not None and _ended(host, options):
            return EXIT_OK
        must_ask(yes)
        with host.state.lock("rollback"):
            say(settle(host), options)
            target, there = _destination(host, number, options)
            planned = plan_recorded(there, target)
            note = Note(reason, trial=seconds, restores=target, changes=access_words(planned, None))
            if not planned.in_sync:
                note = replace(note, lockout=knock(planned, None, there, options, allow=allow_lockout))
                if not options.json:
                    show_plan(planned, None, options)
                ask(yes, f"return to generation {target}?")
            applied = stage.reapply(target, planned, there, note, starter(there, seconds, options))
        return finish(applied, planned, there, options, wait)


def _ended(host: Host, options: Options) -> bool:
    """End the pending trial; False where it was over meanwhile."""
    from fwcompiler.trial import go_back

    with host.state.lock("rollback"):
        trial = host.state.trial()
        if trial is None:
            return False
        go_back(host, trial, "fwc rollback")
    if options.json:
        print_json({"ended_trial": trial.number, "generation": trial.previous})
    elif not options.quiet:
        back = f"generation {trial.previous}" if trial.previous else "what was before"
        print(f"rolled back: generation {trial.number} is not in force any more, {back} is")
    return True


def _destination(host: Host, number: int | None, options: Options) -> tuple[int, Host]:
    """The generation to return to, and the host through its backend.

    Raises:
        HostRefused: there is none, or it is damaged.
    """
    from fwcompiler.registry import load

    state = host.state
    if number is None:
        bootable = state.bootable()
        current = state.current()
        earlier = [n for n in bootable if current is None or n < current.number]
        if not earlier:
            raise HostRefused("there is no earlier generation to return to; nothing was changed", hint="`fwc history` shows what there is")
        number = max(earlier)
    try:
        state.check(number)
        generation = state.generation(number)
    except (OSError, ValueError, KeyError) as error:
        said = "there is no such generation" if number not in state.numbers() else str(error)
        raise HostRefused(
            f"cannot return to generation {number}: {said}; nothing was changed", hint="`fwc history` shows what there is"
        ) from error
    if options.backend is None or options.backend == generation.backend:
        return number, replace(host, backend=load(generation.backend))
    raise HostRefused(
        f"generation {number} is one of {generation.backend}; nothing was changed", hint="leave --backend out, or apply its policy anew"
    )


@app.command()
def history(context: typer.Context) -> int:
    """Tell who applied what, when, from where and why, and what became of it; the newest first."""
    from fwcompiler.history import history_json, history_text

    options: Options = context.obj
    state = state_dir(options)
    with target_namespace(options):
        if options.json:
            print_json(history_json(state))
        else:
            print(history_text(state, whole=options.verbose))
    return EXIT_OK
