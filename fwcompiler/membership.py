"""What is printed about dynamic members: of a change, of all of them, and of what happened."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fwcompiler.addresses import address_text
from fwcompiler.diagnostics import EXIT_OK
from fwcompiler.durations import duration_text
from fwcompiler.dynamic import MemberChange, Row, known_group, rows
from fwcompiler.kernel import netns as namespaces
from fwcompiler.kernel import runner, session
from fwcompiler.members import Event, Journal, group_of, history
from fwcompiler.proof.access import Access

if TYPE_CHECKING:
    from fwcompiler.pipeline import Host
    from fwcompiler.shapes import AccessShape, MemberChangeShape, MemberEventShape, MemberShape, MembersHistoryShape
    from fwcompiler.state import StateDir


def run(
    command: str,
    group: str,
    address: str,
    length: str | None,
    reason: str,
    state: StateDir,
    netns: str | None,
    backend: str | None,
    *,
    as_json: bool,
    quiet: bool,
    lockout: bool = False,
) -> int:
    """`allow` and `revoke`; returns the exit code. `lockout`: take out also the address that we are logged in from.

    Raises:
        Failure: as `dynamic.allow` and `dynamic.revoke`.
    """
    from fwcompiler import dynamic
    from fwcompiler.choose import choose_backend
    from fwcompiler.pipeline import Host, target

    with target(netns) as namespace:
        host = Host(choose_backend(backend, namespace, state), namespace, state)
        if command == "allow":
            change = dynamic.allow(host, group, address, length, reason)
        else:
            mine = None if lockout else session.ssh_connection(ancestors=netns is None)
            change = dynamic.revoke(host, group, address, mine)
    if as_json:
        print(json.dumps(change_json(change), indent=2))
    elif not quiet:
        print(change_text(change))
    return EXIT_OK


def change_json(change: MemberChange) -> MemberChangeShape:
    """The shape of `allow --json` and `revoke --json`."""
    event = change.event
    return {
        "do": event.do,
        "group": event.group,
        "address": event.address,
        "until": moment(event.until),
        "gained": [_access(a) for a in change.access.gained],
        "lost": [_access(a) for a in change.access.lost],
        "egress": {
            "gained": [s.as_json() for s in change.sending.gained],
            "lost": [s.as_json() for s in change.sending.lost],
            "dynamic": [],
        },
        "notes": list(change.notes),
    }


def change_text(change: MemberChange) -> str:
    """`203.0.113.9 is in agents for 12h: it may now reach sip udp/5060`."""
    event = change.event
    if event.do == "allow":
        head = f"{event.address} is in {event.group} for {duration_text(round((event.until or event.at) - event.at))}"
    else:
        head = f"{event.address} is no longer in {event.group}"
    parts = [
        f"it may {verb} reach {', '.join(_reached(found))}"
        for verb, found in (("now", change.access.gained), ("no longer", change.access.lost))
        if found
    ]
    parts += [
        f"this host may {verb} reach it: {', '.join(_reached(s.as_access() for s in found if not s.from_port)) or 'from its own ports'}"
        for verb, found in (("now", change.sending.gained), ("no longer", change.sending.lost))
        if found
    ]
    return "\n".join((f"{head}{': ' if parts else ''}{'; '.join(parts)}", *(f"note: {note}" for note in change.notes)))


def _access(access: Access) -> AccessShape:
    return {"from": access.sources(), "to": access.to, "service": access.service}


def _reached(found: Iterable[Access]) -> Iterator[str]:
    """Services with their ports; a trusted group reaches nearly all there is, which is said in three words."""
    named: dict[str, list[str]] = {}
    unnamed = False
    for access in found:
        if access.service:
            named.setdefault(access.service, []).append(access.to)
        else:
            unnamed = True
    yield from (f"{service} {', '.join(ports)}" for service, ports in named.items())
    if unnamed:
        yield "everything else on this host"


def read_members(host: Host, group: str | None) -> dict[str, list[MemberShape]]:
    """All dynamic members by group, those groups included that have none; one group's where it is named.

    Raises:
        UsageError: that group is not dynamic.
        HostRefused: the kernel or the record cannot be read.
    """
    runner.require(host.backend.programs)
    namespaces.require_host()
    kind = host.backend.set_kind
    with host.namespace.entered():
        live = host.backend.parse(runner.outputs(host.backend.listing(big=True)))
        if group is not None:
            known_group(live, group, host)
        sets = [replace(s, members=runner.read_members(kind, s.kernel_name, s.version)) for s in live.sets if s.dynamic]
    found: dict[str, list[MemberShape]] = {group_of(s): [] for s in sets}
    for row in rows(replace(live, sets=tuple(sets)), Journal(host.state.path).read(), time.time()):
        found.setdefault(row.group, []).append(member_json(row))
    return found if group is None else {group: found.get(group, [])}


def member_json(row: Row) -> MemberShape:
    """One member, as `members --json` and `status --json` show it."""
    event = row.event
    return {
        "address": address_text(row.version, row.address),
        "seconds_left": None if row.left is None else -(-row.left // 1000),
        "since": moment(event.at) if event else None,
        "by": event.by if event else None,
        "peer": event.peer if event else None,
        "reason": event.reason if event else None,
        "recorded": event is not None,
        "loaded": row.loaded,
    }


def members_text(found: dict[str, list[MemberShape]], *, color: bool = False) -> str:
    """`members` for people."""
    from fwcompiler.tables import table_text

    lines = [
        (group, m["address"], _left(m), _who(m["by"], m["peer"]), m["reason"] or "", _remark(m)) for group, ms in found.items() for m in ms
    ]
    if not lines:
        return f"no dynamic members in {', '.join(found)}" if found else "no group in force has dynamic members"
    heading = ("group", "address", "left", "let in by", "reason", "")
    return table_text(heading, lines, color=color)


def _left(member: MemberShape) -> str:
    return "for good" if member["seconds_left"] is None else duration_text(member["seconds_left"])


def _who(by: str | None, peer: str | None) -> str:
    return f"{by} from {peer}" if by and peer else by or "-"


def _remark(member: MemberShape) -> str:
    if not member["recorded"]:
        return "not recorded: added by hand"
    return "" if member["loaded"] else "not loaded: the next apply puts it in"


def member_lines(members: Sequence[MemberShape], most: int) -> Iterator[str]:
    """Members one a line, for `status`."""
    for m in members[:most]:
        left = "" if m["seconds_left"] is None else f", {m['seconds_left']} s left"
        who = f", by {_who(m['by'], m['peer'])}" if m["recorded"] else ""
        why = f": {m['reason']}" if m["reason"] else ""
        remark = f" ({_remark(m)})" if _remark(m) else ""
        yield f"  {m['address']}{left}{who}{why}{remark}"
    if len(members) > most:
        yield f"  and {len(members) - most} more: `fwc members`"


def read_history(host: Host, group: str | None) -> list[Event]:
    """What happened to dynamic members, oldest first, as far as the journal goes back."""
    told = history(Journal(host.state.path).read(), time.time())
    return [e for e in told if group in (None, e.group)]


def history_json(told: Sequence[Event]) -> MembersHistoryShape:
    """The shape of `members --history --json`."""
    return {"history": [_event_json(e) for e in told]}


def _event_json(event: Event) -> MemberEventShape:
    return {
        "at": moment(event.at) or "",
        "do": event.do,
        "group": event.group,
        "address": event.address,
        "until": moment(event.until),
        "by": event.by,
        "peer": event.peer,
        "reason": event.reason,
    }


def history_text(told: Sequence[Event], *, color: bool = False) -> str:
    """`members --history` for people."""
    from fwcompiler.tables import table_text

    if not told:
        return "nothing is recorded"
    lines = [
        (moment(e.at) or "", e.do, e.group, e.address, moment(e.until) or "", _who(e.by, e.peer) if e.do != "expire" else "", e.reason)
        for e in told
    ]
    return table_text(("at", "what", "group", "address", "until", "by", "reason"), lines, color=color)


def moment(at: float | None) -> str | None:
    """A time in UTC, ISO 8601, to the second."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
