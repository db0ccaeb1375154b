"""Compares a host with what was last applied to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from fwcompiler import second_reading
from fwcompiler.dynamic import rows
from fwcompiler.kernel import hostfacts, runner
from fwcompiler.kernel import second_reading as kernel_reading
from fwcompiler.members import Journal, group_of
from fwcompiler.membership import member_json, member_lines
from fwcompiler.neighbours import ON_THE_WAY, notes, read_host
from fwcompiler.pipeline import Host, applied, edited, is_loaded, observe, remembered, sampled
from fwcompiler.plan import make_plan
from fwcompiler.registry import installed, load
from fwcompiler.report import counters_json, sampled_text
from fwcompiler.ruleset import InRanges, Interface, Ruleset
from fwcompiler.tables import table_text
from fwcompiler.trial import interruption, left

if TYPE_CHECKING:
    from fwcompiler.shapes import GenerationShape, MemberShape, PendingShape, StatusShape

MAX_LINES = 40
READINGS = 3
"""How often the rules are read a second time when they change meanwhile."""


def read_status(host: Host) -> StatusShape:
    """The shape of `status --json`: in sync or drifted (and what), generation, counters, dynamic members."""
    backend, state = host.backend, host.state
    known = remembered(host)
    live = observe(host, known)
    listing = _listing(host)
    wanted = applied(host)
    plan = make_plan(backend, live, wanted) if wanted else None
    current = state.current()
    other = f"the generation in force is one of {current.backend}" if current else "no generation is recorded"
    unrecorded = [f"rules of fwc are loaded, but {other}"] if live else []
    return {
        "backend": backend.name,
        "in_sync": plan.in_sync if plan else not live,
        "drift": list(plan.changes()) if plan else unrecorded,
        "edited": list(edited(host, live, known)) if plan and not plan.in_sync else [],
        "generation": None if current is None else cast("GenerationShape", asdict(current)),
        "trial": _trial(host),
        "counters": counters_json(backend.counters(listing)),
        "members": _members(host, live),
        "notes": [*_interrupted(host, live), *_routing(host, live), *notes(host, live), *_elsewhere(host), *_sampled(host, live)],
        "second_reading": _second_reading(host, listing),
    }


def _trial(host: Host) -> PendingShape | None:
    trial = host.state.trial()
    return None if trial is None else {"number": trial.number, "seconds_left": round(left(trial), 1), "previous": trial.previous}


def _interrupted(host: Host, live: Ruleset) -> list[str]:
    said = interruption(host, live)
    return [said] if said else []


def _listing(host: Host) -> tuple[str, ...]:
    with host.namespace.entered():
        return runner.outputs(host.backend.listing())


def _second_reading(host: Host, listing: Sequence[str]) -> str | None:
    """What python-iptables says to our reading of a legacy host; None for other backends, and where it is not installed.

    It takes no lock, so the two may have read before and after somebody's change: a difference counts if nothing has changed since.
    """
    if host.backend.name != "iptables-legacy":
        return None
    ours = host.backend.parse(listing)
    for _ in range(READINGS):
        with host.namespace.entered():
            answer = kernel_reading.ask()
        if not answer.text:
            return f"not possible: {answer.reason}" if answer.reason else None
        try:
            theirs = second_reading.read(answer.text)
        except ValueError as error:
            return f"not possible: {error}"
        difference, unread = second_reading.compare(ours, theirs), second_reading.unread(theirs)
        if difference is None:
            return f"agrees, but for {unread} rules that it cannot read" if unread else "agrees"
        before, ours = ours, host.backend.parse(_listing(host))
        if ours == before:
            return f"differs: {difference}"
    return "not possible: the rules change while they are read"


def _sampled(host: Host, live: Ruleset) -> tuple[str, ...]:
    return () if host.full else sampled_text(sampled(live))


def _routing(host: Host, live: Ruleset) -> Iterator[str]:
    """What keeps an edge from sending on, and rules of others that are not looked at there."""
    pairs = ([m.name for m in r.matches if isinstance(m, Interface)] for c in live.chains for r in c.rules)
    names = dict.fromkeys(name for pair in pairs if len(pair) == 2 for name in pair)
    if names:
        versions = (
            (4, 6) if any(isinstance(m, InRanges) and m.version == 6 for c in live.chains for r in c.rules for m in r.matches) else (4,)
        )
        with host.namespace.entered():
            found = hostfacts.routing(tuple(names), versions)
        yield from hostfacts.routing_text(found)
        if not read_host(host, live).alone_on_the_way:
            yield f"not looked at: {ON_THE_WAY}"


def _elsewhere(host: Host) -> Iterator[str]:
    """Rules of fwc that another backend holds: whoever drops first decides."""
    for name in installed():
        if name == host.backend.name:
            continue
        other = load(name)
        if all(runner.find(p) for p in other.programs) and is_loaded(other, host.namespace):
            yield f"rules of fwc are also loaded through {name}: `fwc remove --backend {name}` takes them out"


def _members(host: Host, live: Ruleset) -> dict[str, list[MemberShape]]:
    members: dict[str, list[MemberShape]] = {group_of(s): [] for s in live.sets if s.dynamic}
    for row in rows(live, Journal(host.state.path).read(), time.time()):
        members.setdefault(row.group, []).append(member_json(row))
    return members


def _rows(found: StatusShape) -> Iterator[tuple[str, str, str]]:
    """Packets by service, the verdicts side by side."""
    for service, verdicts in found["counters"].items():
        refused = "reject" if "reject" in verdicts else "drop"
        accepted, dropped = (str(verdicts[v]["packets"]) if v in verdicts else "-" for v in ("accept", refused))
        yield service, accepted, dropped


def _trial_text(trial: PendingShape) -> str:
    back = f"generation {trial['previous']}" if trial["previous"] else "what was before"
    if not trial["seconds_left"]:
        return f"ON TRIAL, AND ITS TIME IS UP: `fwc rollback` returns to {back}"
    return f"on trial: returns to {back} in {trial['seconds_left']:.0f} s, unless `fwc confirm` comes over a new connection"


def _first(texts: Sequence[str]) -> Iterator[str]:
    yield from (f"  {text}" for text in texts[:MAX_LINES])
    if len(texts) > MAX_LINES:
        yield f"  and {len(texts) - MAX_LINES} more"


def status_text(found: StatusShape, *, color: bool = False) -> str:
    """`status` for people."""
    generation = found["generation"]
    lines = []
    if generation:
        lines.append(
            f"generation {generation['number']} of {generation['policy']}, applied {generation['applied_at']} by {generation['applied_by']}"
        )
    else:
        lines.append("no policy is in force")
    if found["trial"]:
        lines.append(_trial_text(found["trial"]))
    if generation and generation["backend"] != found["backend"]:
        lines.append(f"it is in force through {generation['backend']}; this is about {found['backend']}:")
        lines.append("nothing of fwc is loaded" if found["in_sync"] else "rules of fwc are loaded here as well")
    elif not generation and found["in_sync"]:
        lines.append(f"backend {found['backend']}: nothing of fwc is loaded")
    else:
        lines.append(f"backend {found['backend']}: {'in sync' if found['in_sync'] else 'drifted'}")
    if found["second_reading"] is not None:
        lines.append(f"second reading (python-iptables): {found['second_reading']}")
    if found["edited"]:
        lines.append("changed by hand since it was applied (`fwc diff` shows how an apply puts it right):")
    elif found["drift"]:
        lines.append("what differs, as an apply would change it:")
    lines += _first(found["edited"] or found["drift"])
    lines += [f"note: {note}" for note in found["notes"]]
    if found["counters"]:
        lines.append(table_text(("service", "accepted", "dropped"), _rows(found), right=(1, 2), color=color))
    for group, members in found["members"].items():
        lines.append(f"dynamic members of {group}: {len(members)}")
        lines += member_lines(members, 40)
    return "\n".join(lines)
