"""What fwc remembers of dynamic members: who was let into which group, by whom, why, and until when.

The record is a journal, ``members.log`` in the state directory: one line for each thing that happened, only ever added to,
so that it is the audit trail as well. A line that says what is wanted (`allow`, `revoke`) is written and synced before the
kernel is asked; `done` or `refused` follows. After a crash in between the journal ends with a wish, and the next writer
carries it out (:func:`unfinished`, `fwcompiler.dynamic.heal`). A torn last line is a wish that nobody was told of.

To give members back to a ruleset that is about to be loaded (at boot, on the way back to an older generation)::

    wanted = with_members(wanted, Journal(state.path).standing(now), now)

puts them into the ruleset's dynamic sets with the time they have left, and both backends load them in the transaction
that makes the sets. Members of sets that a kernel holds already stay there: a plan never touches those.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from fwcompiler.addresses import AddressError, parse_address
from fwcompiler.diagnostics import HostRefused
from fwcompiler.durable import made, parsed
from fwcompiler.ruleset import AddressSet, Ruleset

NAME = "members.log"
KEEP = 5_000
"""Events that stay when the journal is rewritten, besides those of members that still stand."""
REWRITE = 2 << 20
"""Bytes at which the journal is rewritten: about twice as many events as are kept."""
_TAIL = 1 << 16

Kind = Literal["allow", "revoke", "done", "refused", "expire"]
KINDS = get_args(Kind)
Key = tuple[str, int, int]
"""Group, address family, address."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the journal. Times are seconds since the epoch; `until` is None for a member that stays.

    `by` and `peer` say who asked, and from which address. `expire` is never written: it follows from `until`.
    """

    at: float
    do: Kind
    group: str
    address: str
    until: float | None = None
    by: str = ""
    peer: str = ""
    reason: str = ""

    @property
    def key(self) -> Key:
        """What the event is about."""
        return (self.group, *parse_address(self.address))


@dataclass(frozen=True, slots=True)
class Book:
    """What a journal adds up to."""

    events: tuple[Event, ...]
    allowed: Mapping[Key, Event]
    unfinished: tuple[Event, ...]

    def standing(self, now: float) -> tuple[Event, ...]:
        """The members that should be in the kernel's sets: allowed, not revoked, not expired."""
        return tuple(e for e in self.allowed.values() if e.until is None or e.until > now)


def add_up(events: Iterable[Event]) -> Book:
    """Replay a journal. A wish that the kernel refused counts for nothing; one without an answer counts as granted."""
    known = tuple(events)
    settled: dict[Key, Event] = {}
    wishes: dict[Key, Event] = {}
    for event in known:
        key = event.key
        if event.do in ("allow", "revoke"):
            _settle(settled, key, wishes.pop(key, None))
            wishes[key] = event
        elif event.do == "done":
            _settle(settled, key, wishes.pop(key, None))
        else:
            wishes.pop(key, None)
    unfinished = tuple(wishes.values())
    for key, wish in wishes.items():
        _settle(settled, key, wish)
    return Book(known, settled, unfinished)


def _settle(settled: dict[Key, Event], key: Key, wish: Event | None) -> None:
    if wish is not None:
        settled.pop(key, None)
        if wish.do == "allow":
            settled[key] = wish


def history(book: Book, now: float) -> list[Event]:
    """What happened, oldest first: members that came, went, and whose time ran out. Refused wishes are left out."""
    told: list[Event] = []
    open_: dict[Key, Event] = {}
    wishes: dict[Key, Event] = {}

    def tell(wish: Event | None) -> None:
        if wish is not None:
            told.extend(_expired(open_.pop(wish.key, None), wish.at))
            told.append(wish)
            if wish.do == "allow":
                open_[wish.key] = wish

    for event in book.events:
        pending = wishes.pop(event.key, None)
        if event.do != "refused":
            tell(pending)
        if event.do in ("allow", "revoke"):
            wishes[event.key] = event
    for wish in wishes.values():
        tell(wish)
    for last in open_.values():
        told.extend(_expired(last, now))
    return sorted(told, key=lambda e: e.at)


def _expired(allowed: Event | None, now: float) -> Iterator[Event]:
    if allowed is not None and allowed.until is not None and allowed.until <= now:
        yield replace(allowed, at=allowed.until, do="expire")


def milliseconds_left(event: Event, now: float) -> int | None:
    """The time a member has left; never more than it was given, should the clock be behind. None: it stays."""
    if event.until is None:
        return None
    return max(1, int(1000 * min(event.until - now, event.until - event.at)))


def group_of(each: AddressSet) -> str:
    """The group whose members a set holds."""
    return each.name.partition(".")[0]


def dynamic_set(ruleset: Ruleset, group: str, version: int) -> AddressSet | None:
    """The set that holds a group's dynamic members of one family; None where the ruleset has none."""
    return next((s for s in ruleset.sets if s.dynamic and s.version == version and group_of(s) == group), None)


def with_members(ruleset: Ruleset, standing: Sequence[Event], now: float) -> Ruleset:
    """The ruleset, its dynamic sets holding the recorded members with the time they have left.

    Those that would not fit into a set are left out, the ones with the least time first. Groups that the ruleset does
    not have, or that are not dynamic in it, get nothing: their members stay in the record until they expire.
    """
    by_set: dict[tuple[str, int], list[tuple[int, int | None]]] = {}
    for event in standing:
        group, version, address = event.key
        by_set.setdefault((group, version), []).append((address, milliseconds_left(event, now)))

    def given(each: AddressSet) -> AddressSet:
        found = by_set.get((group_of(each), each.version)) if each.dynamic else None
        if not found:
            return each
        longest = sorted(found, key=lambda m: (m[1] is not None, -(m[1] or 0)))[: each.size]
        return replace(each, members=tuple(sorted(longest, key=lambda m: m[0])))

    return replace(ruleset, sets=tuple(map(given, ruleset.sets)))


class Journal:
    """The journal's file. Reading needs nothing; whoever adds holds the state directory's lock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def read(self) -> Book:
        """Everything that happened.

        Raises:
            HostRefused: the file is there and cannot be read.
        """
        return add_up(_events(self._bytes(0)))

    def standing(self, now: float) -> tuple[Event, ...]:
        """The members that should be in the kernel's sets."""
        return self.read().standing(now)

    def unfinished(self) -> tuple[Event, ...]:
        """Wishes that were not carried out when a writer died; they are the last lines there are, so only those are read."""
        return add_up(_events(self._bytes(_TAIL))).unfinished

    def add(self, *events: Event, sync: bool = True) -> None:
        """Write events at the end.

        Raises:
            HostRefused: there is no room, or the file cannot be written; it is as it was before.
        """
        data = "".join(f"{_line(e)}\n" for e in events).encode()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                _append(descriptor, data, sync)
            finally:
                os.close(descriptor)
        except OSError as error:
            hint = "run as root, or name another state directory with --state-dir"
            raise HostRefused(f"cannot write to {self.path}: {error.strerror}; nothing was changed", hint=hint) from error

    def settle(self, wish: Event, answer: Literal["done", "refused"]) -> None:
        """Write the answer behind a wish, as far as the disk lets us: what is lost is done again, with no harm."""
        with suppress(HostRefused):
            self.add(_answer(wish, answer), sync=False)

    def trim(self) -> None:
        """Rewrite a journal that has grown long, keeping the newest events and every member that stands."""
        with suppress(OSError):
            if self.path.stat().st_size < REWRITE:
                return
            book = self.read()
            newest = book.events[-KEEP:]
            kept = {id(e) for e in newest}
            old = [e for e in book.standing(time.time()) if id(e) not in kept]
            # An old member's own line may be followed by nothing that names it: without `done` it would be a wish.
            settled = [line for e in old for line in (e, _answer(e, "done"))]
            fresh = self.path.with_suffix(".new")
            with fresh.open("w", encoding="utf-8") as stream:
                stream.writelines(f"{_line(e)}\n" for e in (*settled, *newest))
                stream.flush()
                os.fsync(stream.fileno())
            fresh.rename(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _bytes(self, tail: int) -> bytes:
        """The file, or about its last `tail` bytes, from the beginning of a line on."""
        try:
            with self.path.open("rb") as stream:
                if tail and os.fstat(stream.fileno()).st_size > tail:
                    stream.seek(-tail, os.SEEK_END)
                    stream.readline()
                return stream.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise HostRefused(f"cannot read {self.path}: {error.strerror}", hint="run as root") from error


def _append(descriptor: int, data: bytes, sync: bool) -> None:
    """Add to a file, behind a line that a crash may have torn; all of it or nothing."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data
    try:
        written = os.write(descriptor, data)
        if written < len(data):
            os.write(descriptor, data[written:])
        if sync:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _answer(wish: Event, answer: Literal["done", "refused"]) -> Event:
    return Event(wish.at, answer, wish.group, wish.address)


def _line(event: Event) -> str:
    short = {name: value for name, value in asdict(event).items() if value not in ("", None)}
    return json.dumps(short, separators=(",", ":"))


def _events(data: bytes) -> Iterator[Event]:
    """The events of a journal; lines that are none are passed over, as a crash may leave one."""
    for line in data.splitlines():
        try:
            event = made(Event, parsed(line))
            _ = event.key
        except (ValueError, AddressError):
            continue
        if event.do in KINDS:
            yield event
