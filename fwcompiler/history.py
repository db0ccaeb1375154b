"""What was applied on a host: who, when, from where, why, what it changed, and what became of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, cast

from fwcompiler.diagnostics import HostRefused
from fwcompiler.records import Generation
from fwcompiler.state import StateDir

if TYPE_CHECKING:
    from fwcompiler.shapes import HistoryEntryShape, HistoryShape

MAX_CHANGES = 6

State = Literal["in force", "on trial", "confirmed", "rolled back", "damaged"]


def history_json(state: StateDir) -> HistoryShape:
    """The shape of `history --json`, the newest first.

    Raises:
        HostRefused: this user may not read the state directory.
    """
    folder = state.path / "generations"
    try:
        os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HostRefused(f"cannot read {folder}: {error.strerror}", hint="run as root") from error
    return {"generations": [_entry(state, number) for number in reversed(state.numbers())]}


def _entry(state: StateDir, number: int) -> HistoryEntryShape:
    generation = _readable(state, number)
    current = state.current()
    outcome: State = cast(State, state.outcome(number))
    if generation is None:
        outcome = "damaged"
    elif outcome == "confirmed" and current is not None and current.number == number:
        outcome = "in force"
    known = generation or Generation(number, "", "", "", "", "", "", "")
    return {
        "number": number,
        "state": outcome,
        "ending": state.ending(number),
        "applied_at": known.applied_at,
        "applied_by": known.applied_by,
        "applied_from": known.applied_from,
        "reason": known.reason,
        "policy": known.policy,
        "backend": known.backend,
        "proven": known.proven,
        "lockout": known.lockout,
        "trial": known.trial,
        "restores": known.restores,
        "changes": list(state.changes(number)),
    }


def _readable(state: StateDir, number: int) -> Generation | None:
    try:
        return state.generation(number)
    except (OSError, ValueError):
        return None


def history_text(state: StateDir, *, whole: bool = False) -> str:
    """`history` for people; long lists of changes are cut unless `whole`."""
    entries = history_json(state)["generations"]
    if not entries:
        return "nothing was applied yet"
    return "\n".join(line for entry in entries for line in _lines(entry, whole))


def _lines(entry: HistoryEntryShape, whole: bool) -> Iterator[str]:
    state = entry["state"] + (f": {entry['ending']}" if entry["ending"] else "")
    if entry["state"] == "damaged":
        yield f"generation {entry['number']}: {state}"
        return
    whence = f" from {entry['applied_from']}" if entry["applied_from"] else ""
    what = f"a return to generation {entry['restores']}" if entry["restores"] else entry["policy"]
    yield f"generation {entry['number']}: {state}"
    yield f"  {entry['applied_at']} by {entry['applied_by']}{whence}: {what} ({entry['backend']})"
    if entry["reason"]:
        yield f"  reason: {entry['reason']}"
    if entry["trial"]:
        yield f"  on trial for {entry['trial']:.0f} s"
    if not entry["proven"]:
        yield "  NOT PROVEN: applied with --no-proof"
    if entry["lockout"]:
        yield f"  LOCKED OUT ON PURPOSE: {entry['lockout']}"
    changes = entry["changes"]
    shown = changes if whole else changes[:MAX_CHANGES]
    yield from (f"  {line}" for line in shown)
    if len(changes) > len(shown):
        yield f"  and {len(changes) - len(shown)} more (all of them with -v)"
