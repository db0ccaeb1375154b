"""A generation on trial: it returns by itself unless somebody confirms it over a new connection.

What brings the old rules back is armed before the new ones are committed, and lives outside of this process: a transient
timer of systemd's where that runs, else a process in a session of its own. Both run this module, which needs no policy
file: what the kernel held is written down before the commit.
"""

from __future__ import annotations

import os
import signal
import sys
import syslog
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fwcompiler import connections
from fwcompiler.backend import Backend, Command
from fwcompiler.diagnostics import Failure, HostRefused
from fwcompiler.kernel import detached, runner, session
from fwcompiler.members import Event, Journal, group_of, with_members
from fwcompiler.pipeline import Host, applied, observe, put_back, recorded, target
from fwcompiler.plan import Plan, make_plan, with_static
from fwcompiler.proof.access import compare
from fwcompiler.proof.sending import compare_sending
from fwcompiler.records import Found, Generation, Trial
from fwcompiler.registry import load
from fwcompiler.ruleset import AddressSet, Ruleset
from fwcompiler.state import StateDir

POLL = 0.25
"""Seconds between two looks at whether the trial is over."""
GRACE = 5.0
"""Seconds that whoever applied has to let go of the lock once the time is up."""
TRIES = 20
PAUSE = 3.0


class Starter:
    """Puts what an apply prepared on trial; `netns` is the name that the namespace of `host` has."""

    def __init__(self, host: Host, seconds: float, netns: str | None) -> None:
        self.host, self.seconds, self.netns = host, seconds, netns
        self.trial: Trial | None = None

    def begin(self, pending: Path, plan: Plan) -> Generation:
        """Write the trial down and arm what ends it.

        Raises:
            HostRefused: either cannot be done; nothing was changed.
        """
        state = self.host.state
        previous = state.confirmed()
        before = tuple(_found(self.host, backend) for backend in (self.host.backend, *([load(plan.replaces)] if plan.replaces else [])))
        number = state.generation("pending").number
        deadline = session.uptime() + self.seconds
        self.trial = Trial(number, previous.number if previous else None, deadline, session.boot_id(), session.identity(), pid=os.getpid())
        generation = state.begin_trial(pending, self.trial, before)
        try:
            self._arm(self.trial)
        except BaseException as error:
            self.cancel()
            if isinstance(error, HostRefused):
                error.message = f"the return of the old rules cannot be armed: {error.message}; nothing was changed"
            raise
        return generation

    def _arm(self, trial: Trial) -> None:
        argv = watcher(self.host.state.path, trial.number, self.netns)
        if detached.systemd_runs():
            unit = f"fwc-trial-{trial.number}" + (f"-{self.netns}" if self.netns else "")
            try:
                detached.run(timer(argv, unit, self.seconds, time.time() + self.seconds))
            except HostRefused as refused:
                print(f"warning: systemd keeps no timer for us, so a process does: {refused.message}", file=sys.stderr)
            else:
                self.trial = replace(trial, unit=unit)
                self.host.state.note_trial(self.trial)
                return
        detached.start(argv)

    def cancel(self) -> None:
        """The apply failed and nothing of it is in force: no trial, no generation."""
        if self.trial is not None:
            disarm(self.trial)
            self.host.state.end_trial(self.trial, "the apply failed")
            self.host.state.erase(self.trial.number)


def watcher(state: Path, number: int, netns: str | None) -> tuple[str, ...]:
    """The command that ends a trial: waits for its deadline and brings the old rules back."""
    return (sys.executable, "-P", "-m", "fwcompiler.trial", str(state.resolve()), str(number), *([netns] if netns else []))


def timer(argv: Sequence[str], unit: str, seconds: float, at: float) -> Command:
    """How systemd is asked to run a command once (systemd-run(1), systemd.timer(5)).

    Both clocks count: the monotonic one stands still while the machine is suspended, the other one can be set. The command
    itself waits for the deadline, so being called early does no harm.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at + 1))
    return Command(
        (
            "systemd-run",
            "--quiet",
            "--collect",
            f"--unit={unit}",
            "--description=Return from a firewall that nobody confirmed",
            f"--on-active={max(seconds, 0.1):.1f}s",
            f"--on-calendar={when}",
            "--timer-property=AccuracySec=100ms",
            "--property=Type=oneshot",
            "--",
            *argv,
        )
    )


def disarm(trial: Trial) -> None:
    """Take a timer of systemd's back; a process of ours sees by itself that the trial is over."""
    if trial.unit:
        with suppress(HostRefused):
            detached.run(Command(("systemctl", "stop", f"{trial.unit}.timer")))


def left(trial: Trial) -> float:
    """Seconds until a trial ends; 0 once it has, or where the machine was started again meanwhile."""
    return max(0.0, trial.deadline - session.uptime()) if trial.boot == session.boot_id() else 0.0


def _found(host: Host, backend: Backend) -> Found:
    """What the kernel holds now, in a form that can be written down."""
    here = replace(host, backend=backend)
    live = observe(here)
    with host.namespace.entered():
        listing = runner.outputs(backend.listing())
    now = session.uptime()
    # Recorded members come back out of their own record: somebody may revoke one during the trial.
    recorded_ones = {e.key for e in Journal(host.state.path).standing(time.time())}
    members = {
        s.name: [
            (address, None if ms is None else round(now + ms / 1000, 3))
            for address, ms in s.members
            if (group_of(s), s.version, address) not in recorded_ones
        ]
        for s in live.sets
        if s.dynamic
    }
    return Found(backend.name, listing, live.contents(), members)


def rules_of(found: Found, standing: Sequence[Event]) -> Ruleset:
    """What was found, as rules again; members have the time that is left to them now, recorded ones (`standing`) included."""
    listed = with_static(load(found.backend).parse(found.listing), found.contents)
    now = session.uptime()
    known = with_members(listed, standing, time.time())
    return replace(known, sets=tuple(_with_members(s, found, now) for s in known.sets))


def _with_members(each: AddressSet, found: Found, now: float) -> AddressSet:
    if not each.dynamic:
        return each
    timed = ((address, None if end is None else int((end - now) * 1000)) for address, end in found.members.get(each.name, ()))
    members = {**dict(each.members), **{address: ms for address, ms in timed if ms is None or ms > 0}}
    return replace(each, members=tuple(sorted(members.items())))


def go_back(host: Host, trial: Trial, why: str) -> None:
    """End a trial: the rules, static sets and dynamic members from before it are back. The caller holds the lock.

    Raises:
        HostRefused: the kernel cannot be brought back; the trial stays, so that it can be tried again.
    """
    for backend, before in _before(host, trial):
        here = replace(host, backend=backend)
        now = observe(here)
        put_back(now, before, here)
        after = observe(here)
        if not make_plan(backend, after, before).in_sync if before else bool(after):
            raise HostRefused(f"{backend.name}: the kernel lists other rules than before the trial")
        for failed in _end_connections(now, after, host) if after else ():
            syslog.syslog(syslog.LOG_WARNING, f"fwc: {failed}")
    host.state.end_trial(trial, why)
    disarm(trial)


def _end_connections(now: Ruleset, after: Ruleset, host: Host) -> Iterator[str]:
    change = compare(now, after)
    failed = [
        connections.end(connections.lost_access(now, after, change), host.namespace),
        connections.end_astray(change.gained, host.namespace),
    ]
    if compare_sending(now, after).lost:
        failed.append(connections.end_sent(now, after, host.namespace))
    yield from filter(None, failed)


def _before(host: Host, trial: Trial) -> Iterator[tuple[Backend, Ruleset]]:
    """What to go back to, what holds rules first: so the host is never without."""
    try:
        found = host.state.found()
    except (OSError, ValueError):
        # Whatever happened to that file: the last confirmed generation is the next best.
        previous = host.state.confirmed()
        current = load(host.state.generation(trial.number).backend)
        if previous is not None:
            backend = load(previous.backend)
            yield backend, recorded(backend, host.state, previous.number)
        if previous is None or previous.backend != current.name:
            yield current, Ruleset()
        return
    same_boot = trial.boot == session.boot_id()
    standing = Journal(host.state.path).standing(time.time())
    pairs = [(load(f.backend), rules_of(f if same_boot else replace(f, members={}), standing)) for f in found]
    yield from sorted(pairs, key=lambda pair: not pair[1])


def settle(host: Host) -> str:
    """Finish what an earlier fwc left behind: a trial whose time is up, an apply that was killed. The caller holds the lock.

    Returns what became of the latter, in words.

    Raises:
        HostRefused: a trial is pending and has time left, or cannot be ended.
    """
    host.state.finish()
    trial = host.state.trial()
    if trial is None:
        return _recover(host)
    if trial.boot != session.boot_id():
        host.state.end_trial(trial, "the machine was started again")
        return ""
    if left(trial):
        no_trial(host.state)
    go_back(host, trial, "not confirmed in time")
    return f"the time of generation {trial.number} was up: the rules from before are back"


def no_trial(state: StateDir) -> None:
    """Refuse what would come in the way of a trial.

    Raises:
        HostRefused: one is pending.
    """
    trial = state.trial()
    if trial is not None:
        raise HostRefused(
            f"generation {trial.number} is on trial for {left(trial):.0f} s more; nothing was changed",
            hint="`fwc confirm` over a new connection keeps it, `fwc rollback` returns to what was before",
        )


def _recover(host: Host) -> str:
    """An apply that was killed between the kernel and its record: recorded where the kernel holds all of it, else dropped."""
    state = host.state
    pending = state.interrupted()
    if pending is None:
        return ""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, Failure):
        generation = state.generation("pending")
        backend = load(generation.backend)
        wanted = recorded(backend, state, "pending")
        live = observe(replace(host, backend=backend), wanted.contents())
        if not generation.trial and make_plan(backend, live, wanted).in_sync:
            recorded_now = state.commit(pending)
            return f"{_killed(generation)} had done all but its record: it is generation {recorded_now.number} now"
    what = "an apply"
    with suppress(OSError, ValueError):
        what = _killed(state.generation("pending"))
    state.discard(pending)
    return f"{what} did not get to its end, and is not recorded"


def _killed(generation: Generation) -> str:
    return f"an apply of {generation.policy} ({generation.applied_at}, by {generation.applied_by}) that was killed"


def interruption(host: Host, live: Ruleset) -> str:
    """What an apply that was killed left behind, in words with the remedy; nothing where none was, or while one is at work.

    `live`: the rules that the kernel holds now, as :func:`fwcompiler.pipeline.observe` says it.
    """
    state = host.state
    if state.interrupted() is None or state.trial() is not None or state.holder() is not None:
        return ""
    try:
        generation = state.generation("pending")
        same = make_plan(host.backend, live, recorded(host.backend, state, "pending")).in_sync
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "an apply was killed while it wrote down what it was going to do; `fwc apply` puts it right"
    before = applied(host)
    if same:
        found = "all of its rules are in force, and are not recorded yet"
    elif before is not None and make_plan(host.backend, live, before).in_sync:
        found = "the rules from before are in force"
    else:
        found = "what is in force is neither what it wanted nor what was before"
    return f"{_killed(generation)} did not get to its end: {found}; `fwc apply {generation.policy}` puts it right"


def confirm(host: Host, *, same_session: bool) -> Generation:
    """Keep the generation on trial.

    Raises:
        HostRefused: there is none, its time is up, or this is the connection it was applied over.
    """
    state = host.state
    with state.lock("confirm"):
        trial = state.trial()
        if trial is None:
            raise HostRefused("no generation is on trial", hint=_last_return(state))
        if not left(trial):
            raise HostRefused(f"the time of generation {trial.number} is up: it cannot be confirmed any more", hint="`fwc apply` it again")
        if not same_session and session.identity() == trial.applier:
            raise HostRefused(
                f"this is the connection that generation {trial.number} was applied over: it says nothing about a new one",
                hint="log in anew and confirm there (ssh -o ControlPath=none, where ssh shares connections); --same-session overrides",
            )
        state.confirm_trial(trial)
    disarm(trial)
    return state.generation(trial.number)


def _last_return(state: StateDir) -> str:
    numbers = state.numbers()
    why = state.ending(numbers[-1]) if numbers else ""
    return f"generation {numbers[-1]} was rolled back: {why}" if why else ""


def watch(state: StateDir, number: int, netns: str | None) -> int:
    """Wait for the end of a trial and bring the old rules back; returns an exit code."""
    while True:
        trial = state.trial()
        if trial is None or trial.number != number:
            return 0
        remaining = left(trial)
        if not remaining:
            break
        time.sleep(min(remaining, POLL))
    _free_the_lock(state, trial)
    for _ in range(TRIES):
        try:
            with state.lock("the end of a trial"), target(netns) as namespace:
                trial = state.trial()
                if trial is None or trial.number != number:
                    return 0
                backend = load(state.generation(number).backend)
                go_back(Host(backend, namespace, state), trial, "not confirmed in time")
        except (Failure, OSError, ValueError) as error:
            syslog.syslog(syslog.LOG_ERR, f"fwc: generation {number} is still in force: {error}")
            time.sleep(PAUSE)
        else:
            syslog.syslog(syslog.LOG_WARNING, f"fwc: generation {number} was not confirmed in time: the rules from before are back")
            return 0
    return 4


def _free_the_lock(state: StateDir, trial: Trial) -> None:
    """Whoever applied may have been stopped (Ctrl-Z) or hang with the lock in its hand: it had its time."""
    deadline = time.monotonic() + GRACE
    while state.holder() == trial.pid:
        if time.monotonic() > deadline:
            with suppress(OSError):
                os.kill(trial.pid, signal.SIGKILL)
            return
        time.sleep(POLL)


def main(arguments: Sequence[str]) -> int:
    """What the timer or the process runs: state directory, generation, and the namespace's name if it has one."""
    path, number, *netns = arguments
    state = StateDir(path)
    # What is needed later is imported now: packages may be on a disk that is full or being upgraded by then.
    for found in state.found():
        load(found.backend)
    load(state.generation(int(number)).backend)
    with suppress(OSError):
        os.write(1, detached.READY)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return watch(state, int(number), netns[0] if netns else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
