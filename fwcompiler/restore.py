"""Loads the last confirmed generation, as at boot: from the state directory alone, with no policy, list file or name server.

A generation that is damaged or that the kernel does not take gives way to the confirmed one before it. If none is left, the
minimal rules are loaded: loopback, what is established, ICMP, and ssh from whom the last readable generation let in. A
dialer never boots open.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fwcompiler.addresses import Addresses
from fwcompiler.backend import Backend
from fwcompiler.choose import ORDER
from fwcompiler.diagnostics import EXIT_OK, Failure, HostRefused, Position
from fwcompiler.kernel import netns, runner
from fwcompiler.members import Event, Journal, with_members
from fwcompiler.pipeline import Host, observe, recorded, target
from fwcompiler.plan import keeping_members, set_changes
from fwcompiler.ports import Ports
from fwcompiler.registry import installed, load
from fwcompiler.ruleset import Ruleset
from fwcompiler.state import StateDir

if TYPE_CHECKING:
    from fwcompiler.shapes import RestoreShape

BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, Failure)
"""What reading or loading a damaged generation may end with."""


@dataclass(frozen=True, slots=True)
class Restored:
    """The generation in force; None where `fwc remove` was the last word."""

    generation: int | None
    backend: str = ""
    notes: tuple[str, ...] = ()


def restore(state: StateDir, netns_name: str | None) -> Restored:
    """Load the last confirmed generation and end a trial that is pending.

    Raises:
        HostRefused: something else had to be loaded, or nothing could be; the message says what is in force.
    """
    with ExitStack() as stack:
        notes: list[str] = []
        try:
            stack.enter_context(state.lock("restore"))
        except HostRefused as refused:
            # A state directory that cannot be written to is no reason to boot open.
            notes.append(f"restored without the lock: {refused.message.partition(';')[0]}")
        namespace = stack.enter_context(target(netns_name))
        with suppress(*BROKEN):
            _forget_what_is_unconfirmed(state)
        if state.is_removed():
            return Restored(None, notes=(*notes, "`fwc remove` took the rules out: nothing is loaded"))
        problems: list[str] = []
        for number in state.bootable():
            try:
                backend = _load_generation(state, namespace, number)
            except BROKEN as error:
                problems.append(f"generation {number} cannot be loaded: {error or type(error).__name__}")
                continue
            if problems:
                state.point_to(number)
                raise HostRefused(f"{'; '.join(problems)}; generation {number} is in force", hint="`fwc apply` the policy anew")
            return Restored(number, backend.name, notes=tuple(notes))
        return _minimal(state, namespace, problems or ["no confirmed generation is recorded"])


def run(state: StateDir, netns_name: str | None, *, as_json: bool, quiet: bool) -> int:
    """The command: restore, and say what is in force."""
    done = restore(state, netns_name)
    if as_json:
        shape: RestoreShape = {"generation": done.generation, "backend": done.backend, "notes": list(done.notes)}
        print(json.dumps(shape, indent=2))
    elif not quiet:
        for note in done.notes:
            print(f"note: {note}")
        if done.generation is not None:
            print(f"restored: generation {done.generation} ({done.backend})")
    return EXIT_OK


def _forget_what_is_unconfirmed(state: StateDir) -> None:
    state.finish()
    trial = state.trial()
    if trial is not None:
        state.end_trial(trial, "restored before it was confirmed")
    pending = state.interrupted()
    if pending is not None:
        state.discard(pending)


def _load_generation(state: StateDir, namespace: netns.Namespace, number: int) -> Backend:
    state.check(number)
    backend = load(state.generation(number).backend)
    wanted = recorded(backend, state, number)
    if not wanted:
        raise ValueError("it holds no rules")
    now = time.time()
    with suppress(HostRefused):
        wanted = with_members(wanted, Journal(state.path).standing(now), now)
    load_rules(Host(backend, namespace, state), wanted)
    return backend


def load_rules(host: Host, wanted: Ruleset) -> None:
    """Make the kernel hold a ruleset, whatever it holds of ours now, and read it back.

    Raises:
        HostRefused: the kernel refuses, or lists something else afterwards.
    """
    backend = host.backend
    contents = wanted.contents()
    live = observe(host, contents)
    wanted = keeping_members(live, wanted)
    steps = backend.update(live, wanted, set_changes(live, wanted)) if live else backend.load(wanted)
    with host.namespace.entered():
        runner.execute(steps)
    after = observe(host, contents)
    changes = set_changes(after, wanted)
    if not after or any(c.add or c.remove for c in changes) or backend.update(after, wanted, changes):
        raise HostRefused(f"{backend.name}: the kernel lists other rules than were sent")


def _minimal(state: StateDir, namespace: netns.Namespace, problems: Sequence[str]) -> Restored:
    """Load the minimal rules through the first backend that can; this is never a success.

    Raises:
        HostRefused: always, saying what is in force now.
    """
    said = list(problems)
    who = _who_may_log_in(state)
    members: Sequence[Event] = ()
    with suppress(*BROKEN):
        members = Journal(state.path).standing(time.time())
    ruleset = minimal(who, members)
    words = "anybody: nobody knows the admins" if who.get("anywhere") else "the recorded admins"
    for name in _backends(state):
        try:
            backend = load(name)
            runner.require(backend.programs)
            load_rules(Host(backend, namespace, state), ruleset)
        except BROKEN as error:
            said.append(f"{name}: {error or type(error).__name__}")
            continue
        raise HostRefused(
            f"{'; '.join(said)}; ONLY THE MINIMAL RULES ARE IN FORCE ({name}): loopback, established, ICMP, ssh from {words}",
            hint="`fwc apply` the policy; until then no call gets through",
        )
    raise HostRefused(
        f"{'; '.join(said)}; NOTHING COULD BE LOADED: UNLESS RULES ARE IN FORCE FROM BEFORE, THIS HOST IS OPEN",
        hint="as root, with nftables installed, `fwc apply` the policy",
    )


def _backends(state: StateDir) -> Iterator[str]:
    """Backends in the order to try: those of recorded generations first."""
    names: list[str] = []
    for number in reversed(state.numbers()):
        with suppress(*BROKEN):
            names.append(state.generation(number).backend)
    known = installed()
    yield from (name for name in dict.fromkeys((*names, *ORDER)) if name in known)


def _who_may_log_in(state: StateDir) -> Mapping[str, Any]:
    """As the newest generation that can be read says, confirmed ones first. Where none can, everybody: a login still needs its key."""
    for number in dict.fromkeys((*state.bootable(), *reversed(state.numbers()))):
        with suppress(*BROKEN):
            who = state.ssh(number)
            minimal(who)
            return who
    return {"ports": [[22, 22]], "anywhere": True, "v4": [], "v6": [], "dynamic": []}


def minimal(who: Mapping[str, Any], members: Sequence[Event] = ()) -> Ruleset:
    """Loopback, established, ICMP, and ssh from the recorded sources (see `fwcompiler.guard.who_may_log_in`).

    `members`: dynamic members that stand; those of groups that ssh names may log in too.

    Raises:
        LookupError, TypeError, ValueError: the record is damaged.
    """
    from fwcompiler.lower import lower
    from fwcompiler.resolved import Resolved, ResolvedGroup
    from fwcompiler.service import ResolvedService

    at = Position("", 1)
    addresses = Addresses.of(*([(int(low), int(high)) for low, high in who[family]] for family in ("v4", "v6")))
    for _, version, address in (e.key for e in members if e.group in who["dynamic"]):
        addresses = addresses | Addresses.of(**{f"v{version}": [(address, address)]})
    ports = (Ports("tcp", tuple((int(low), int(high)) for low, high in who["ports"])),)
    anywhere = bool(who["anywhere"])
    groups = {} if anywhere else {"admins": ResolvedGroup("admins", addresses, at)}
    ssh = ResolvedService("ssh", ports, "admin", None if anywhere else ("admins",), at, early=not anywhere)
    return lower(Resolved("minimal", groups, (ssh,)))
