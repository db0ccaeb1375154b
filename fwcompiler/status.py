"""Compares a host with what was last applied to it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from fwcompiler.addresses import address_text
from fwcompiler.backend import Backend
from fwcompiler.kernel import runner
from fwcompiler.pipeline import Host, observe
from fwcompiler.plan import make_plan, with_contents
from fwcompiler.report import counters_json
from fwcompiler.ruleset import AddressSet, Ruleset
from fwcompiler.state import StateDir

if TYPE_CHECKING:
    from fwcompiler.shapes import GenerationShape, MemberShape, StatusShape


def read_status(host: Host) -> StatusShape:
    """The shape of `status --json`: in sync or drifted (and what), generation, counters, dynamic members."""
    backend, state = host.backend, host.state
    live = observe(host)
    with host.namespace.entered():
        counters = backend.counters(runner.outputs(backend.listing()))
    wanted = _applied(backend, state)
    plan = make_plan(backend, live, wanted) if wanted else None
    unrecorded = ["rules of fwc are loaded, but no generation is recorded"] if live else []
    current = state.current()
    return {
        "backend": backend.name,
        "in_sync": plan.in_sync if plan else not live,
        "drift": list(plan.changes()) if plan else unrecorded,
        "generation": None if current is None else cast("GenerationShape", asdict(current)),
        "counters": counters_json(counters),
        "members": _members(live),
        "second_reading": None,
    }


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


def _members(live: Ruleset) -> dict[str, list[MemberShape]]:
    members: dict[str, list[MemberShape]] = {}
    for each in live.sets:
        if each.dynamic:
            group = each.name.partition(".")[0]
            rows: list[MemberShape] = [
                {"address": address_text(each.version, a), "seconds_left": None if ms is None else ms // 1000} for a, ms in each.members
            ]
            members.setdefault(group, []).extend(rows)
    return members


def status_text(found: StatusShape) -> str:
    """`status` for people."""
    generation = found["generation"]
    lines = []
    if generation:
        lines.append(
            f"generation {generation['number']} of {generation['policy']}, applied {generation['applied_at']} by {generation['applied_by']}"
        )
    else:
        lines.append("no policy is in force")
    lines.append(f"backend {found['backend']}: {'in sync' if found['in_sync'] else 'drifted'}")
    if found["drift"]:
        lines.append("an apply of the same policy would send")
        lines += [f"  {line}" for line in found["drift"][:40]]
    if found["counters"]:
        lines.append(f"{'service':<24}{'accepted':>12}{'dropped':>12}  packets")
    for service, verdicts in found["counters"].items():
        accepted, dropped = (verdicts[v]["packets"] if v in verdicts else "-" for v in ("accept", "drop"))
        lines.append(f"{service:<24}{accepted:>12}{dropped:>12}")
    for group, members in found["members"].items():
        lines.append(f"dynamic members of {group}: {len(members)}")
        lines += [f"  {m['address']}" + (f", {m['seconds_left']} s left" if m["seconds_left"] is not None else "") for m in members[:40]]
    return "\n".join(lines)
