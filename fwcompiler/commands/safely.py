"""What every change of a host goes through: the guard, the trial, and the words at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from fwcompiler.commands.app import Options, print_json
from fwcompiler.diagnostics import EXIT_OK, RolledBack, UsageError, format_findings

if TYPE_CHECKING:
    from fwcompiler.apply import Applied
    from fwcompiler.diagnostics import Finding
    from fwcompiler.pipeline import Compiled, Host
    from fwcompiler.plan import Plan
    from fwcompiler.records import Trial
    from fwcompiler.trial import Starter

Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept in the history.")]
Lockout = Annotated[bool, typer.Option("--allow-lockout", help="Go on although somebody who is logged in could not log in any more.")]
Confirm = Annotated[str | None, typer.Option("--confirm", metavar="TIME", help="Return unless `fwc confirm` comes in time: 2m.")]
Wait = Annotated[bool | None, typer.Option("--wait/--no-wait", help="Wait for the end of the trial (default: at a terminal).")]

SHORTEST, LONGEST = 1, 86400
LOOK = 0.2
"""Seconds between two looks at a trial that somebody waits for."""


def trial_time(text: str | None) -> int:
    """The length of a trial in seconds; 0 without one.

    Raises:
        UsageError: it is no time between a second and a day.
    """
    from fwcompiler.durations import seconds

    if text is None:
        return 0
    value = seconds(text)
    if value is None or not SHORTEST <= value <= LONGEST:
        raise UsageError(f"`{text}` is no time for a trial", hint="from one second to one day: 90s, 2m, 1h30m")
    return value


def starter(host: Host, seconds: int, options: Options) -> Starter | None:
    """What puts an apply on trial, where one was asked for."""
    from fwcompiler.trial import Starter

    return Starter(host, seconds, options.netns) if seconds else None


def knock(planned: Plan, compiled: Compiled | None, host: Host, options: Options, *, allow: bool) -> str:
    """Ask whether everybody who is logged in can come back; returns who cannot, where that is allowed.

    Raises:
        HostRefused: somebody would be locked out, or it cannot be told, and that is not allowed.
    """
    from fwcompiler.diagnostics import Finding, HostRefused
    from fwcompiler.guard import OVERRIDE, judge, refuse, ssh_ports, visitors

    try:
        everybody = visitors(ssh_ports(compiled.resolved if compiled else None), host.namespace, ancestors=options.netns is None)
    except HostRefused as refused:
        if not allow:
            refused.message += "; nothing was changed"
            refused.hint = OVERRIDE
            raise
        _warn([Finding("lock-out", f"who is logged in cannot be told: {refused.message}")], options)
        return ""
    verdict = judge(everybody, planned.wanted, planned.live, compiled)
    if not options.quiet:
        _warn(verdict.notes, options)
    if not allow:
        refuse(verdict)
    _warn(verdict.locked_out, options)
    return ", ".join(verdict.who)


def _warn(findings: tuple[Finding, ...] | list[Finding], options: Options) -> None:
    color = options.color and sys.stderr.isatty()
    if findings:
        print(format_findings([replace(f, severity="warning") for f in findings], color=color), file=sys.stderr)


def say(note: str, options: Options) -> None:
    """A note beside the output; nothing where it is empty."""
    if note and not options.quiet:
        print(f"note: {note}", file=sys.stderr)


def access_words(planned: Plan, compiled: Compiled | None) -> tuple[str, ...]:
    """Access gained and lost, one line each, as history tells it."""
    from fwcompiler.report import access_lines, sending_lines

    policy = compiled.resolved if compiled else None
    gained = access_lines(planned.access.gained, policy, "+", "may reach", wanted=planned.wanted)
    lost = access_lines(planned.access.lost, policy, "-", "may no longer reach", planned.live, planned.wanted)
    more, less = sending_lines(planned.sending, policy, "+", "-")
    return (*gained, *more, *lost, *less)


def finish(applied: Applied, planned: Plan, host: Host, options: Options, wait: bool | None) -> int:
    """Say how an apply ended; where it is on trial, how to keep it, and wait for that if asked to.

    Raises:
        RolledBack: it waited, and nobody confirmed.
    """
    trial = applied.trial
    for note in applied.notes:
        print(f"warning: {note}", file=sys.stderr)
    number = applied.generation.number
    if options.json:
        from fwcompiler.report import diff_json

        on_trial = {"seconds": applied.generation.trial, "previous": trial.previous} if trial else None
        print_json({**diff_json(planned), "applied": applied.changed, "generation": number, "trial": on_trial})
    elif not options.quiet:
        print(f"{'applied' if applied.changed else 'in sync'}: generation {number} ({host.backend.name})")
    if trial is None:
        return EXIT_OK
    if not options.json:
        print(_how_to_go_on(trial, applied), file=sys.stdout if not options.quiet else sys.stderr)
    sys.stdout.flush()
    if wait is False or (wait is None and not sys.stdin.isatty()):
        return EXIT_OK
    return _wait(trial, host, options)


def _how_to_go_on(trial: Trial, applied: Applied) -> str:
    back = f"generation {trial.previous}" if trial.previous else "what was before"
    return (
        f"on trial for {applied.generation.trial:.0f} s: log in over a new connection and say `fwc confirm` there to keep it; "
        f"otherwise the rules return to {back} (`fwc rollback` does so at once)"
    )


def _wait(trial: Trial, host: Host, options: Options) -> int:
    """Show the countdown until the trial is over; Ctrl-C ends the waiting, not the trial."""
    from fwcompiler.trial import left

    show = sys.stderr.isatty() and not options.quiet
    shown = -1
    try:
        while (now := host.state.trial()) is not None and now.number == trial.number:
            remaining = int(left(trial) + 0.999)
            if show and remaining != shown:
                print(f"\r{remaining} s left \x1b[K", end="", file=sys.stderr, flush=True)
                shown = remaining
            time.sleep(LOOK)
    except KeyboardInterrupt:
        print(f"\nno longer waiting; the trial goes on: without `fwc confirm` the rules return in {left(trial):.0f} s", file=sys.stderr)
        raise
    if show:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if host.state.outcome(trial.number) == "confirmed":
        print(f"confirmed: generation {trial.number}")
        return EXIT_OK
    # The reason is written right behind the end of the trial, where there is room for it.
    for _ in range(5):
        if host.state.ending(trial.number):
            break
        time.sleep(LOOK)
    why = host.state.ending(trial.number)
    raise RolledBack(f"generation {trial.number} was rolled back: {why or 'not confirmed'}; the rules from before are in force")
