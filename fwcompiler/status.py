"""Compares a host with what was last applied to it."""

from __future__ import annotations

from typing import Any

from fwcompiler.addresses import address_text
from fwcompiler.backend import Backend
from fwcompiler.kernel import netns, runner
from fwcompiler.pipeline import observe, remembered
from fwcompiler.plan import make_plan, with_contents
from fwcompiler.report import status_json
from fwcompiler.ruleset import AddressSet, Ruleset
from fwcompiler.state import StateDir, as_json


def read_status(backend: Backend, namespace: netns.Namespace, state: StateDir) -> dict[str, Any]:
    """The shape of `status --json`: in sync or drifted (and what), generation, counters, dynamic members."""
    contents = remembered(state, backend)
    live = observe(backend, namespace, contents)
    with namespace.entered():
        counters = backend.counters(runner.outputs(backend.listing()))
    wanted = _applied(backend, state)
    plan = make_plan(backend, live, wanted) if wanted else None
    in_sync = plan.in_sync if plan else not live
    drift = plan.changes() if plan else ("rules of fwc are loaded, but no generation is recorded",) if live else ()
    return status_json(backend.name, in_sync, drift, as_json(state.current()), counters, _members(live))


def _applied(backend: Backend, state: StateDir) -> Ruleset | None:
    """The ruleset of the current generation, as a kernel listed it when it was tried."""
    current = state.current()
    if current is None or current.backend != backend.name:
        return None
    try:
        contents = state.contents(current.number)
        listed = backend.parse(state.listing(current.number))
    except (OSError, ValueError):
        return None
    known = Ruleset(sets=tuple(AddressSet(name, 4, ranges) for name, ranges in contents.items()))
    return with_contents(listed, known)


def _members(live: Ruleset) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for each in live.sets:
        if each.dynamic:
            group = each.name.partition(".")[0]
            rows = [{"address": address_text(each.version, a), "seconds_left": None if ms is None else ms // 1000} for a, ms in each.members]
            members.setdefault(group, []).extend(rows)
    return members


def status_text(found: dict[str, Any]) -> str:
    """`status` for people."""
    generation = found["generation"]
    lines = []
    if generation:
        lines.append(f"generation {generation['number']} of {generation['policy']}, applied {generation['applied_at']} by {generation['applied_by']}")
    else:
        lines.append("no policy is in force")
    lines.append(f"backend {found['backend']}: {'in sync' if found['in_sync'] else 'drifted'}")
    lines += [f"  {line}" for line in found["drift"][:40]]
    if found["counters"]:
        lines.append(f"{'service':<24}{'accepted':>12}{'dropped':>12}  packets")
    for service, verdicts in found["counters"].items():
        accepted, dropped = (verdicts.get(v, {}).get("packets", "-") for v in ("accept", "drop"))
        lines.append(f"{service:<24}{accepted:>12}{dropped:>12}")
    for group, members in found["members"].items():
        lines.append(f"dynamic members of {group}: {len(members)}")
        lines += [f"  {m['address']}" + (f", {m['seconds_left']} s left" if m["seconds_left"] is not None else "") for m in members[:40]]
    return "\n".join(lines)
