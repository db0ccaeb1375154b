"""Lets dynamic members in and out while the host runs: one element of one set, never the rules.

Who asks learns what it means: the rules in force are read, every set is asked about this one address, and the access it
gains or loses is worked out from that, as `diff` does for a policy. No set is listed, so the time it takes does not depend
on their sizes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fwcompiler import connections
from fwcompiler.addresses import AddressError, Ranges, address_text, parse_entry
from fwcompiler.backend import SetKind
from fwcompiler.diagnostics import HostRefused, UsageError, did_you_mean
from fwcompiler.durations import seconds
from fwcompiler.kernel import netns, runner, session
from fwcompiler.members import Book, Event, Journal, Key, dynamic_set, group_of, milliseconds_left
from fwcompiler.proof.access import AccessChange, compare
from fwcompiler.proof.sending import NO_CHANGE, SendingChange, compare_sending
from fwcompiler.ruleset import AddressSet, Final, InSet, Rule, Ruleset

if TYPE_CHECKING:
    from fwcompiler.kernel.session import Connection
    from fwcompiler.pipeline import Host

LONGEST: Mapping[SetKind, int] = {"nft": 365 * 86400, "ipset": 2_147_483}
"""Seconds a member can be given. nftables: as long as a policy may say; ipset: ``IPSET_MAX_TIMEOUT`` (ip_set.h), almost 25 days."""
REASON_LENGTH = 200

_HINTS = {
    "address-loopback": "a member is the address of another machine",
    "address-multicast": "a member is the address of one machine",
    "address-everyone": "a member is one address; what is open to everybody says `from: anywhere` in the policy",
    "address-unspecified": "write the address that was meant",
}


@dataclass(frozen=True, slots=True)
class MemberChange:
    """What became of a wish: the event recorded, the access that new connections gained and lost, and what else there is to say.

    `sending`: what this host may now send to the address, or not any more.
    """

    event: Event
    access: AccessChange
    notes: tuple[str, ...] = ()
    sending: SendingChange = NO_CHANGE


@dataclass(frozen=True, slots=True)
class Row:
    """One dynamic member. `left`: milliseconds, None for good; `loaded`: the kernel has it; `event`: how it came, where recorded."""

    group: str
    version: int
    address: int
    left: int | None
    loaded: bool
    event: Event | None


def allow(host: Host, group: str, text: str, length: str | None = None, reason: str = "") -> MemberChange:
    """Let an address into a dynamic group, for `length` or the group's own timeout, counted from now also if it is in already.

    Raises:
        UsageError: no such group, not a dynamic one, no single address of another machine, no sensible length.
        HostRefused: no policy is in force, the address is blocked, the set is full, the state directory cannot be written.
    """
    kind = host.backend.set_kind
    version, address = single_address(text)
    reason = _reason(reason)
    lasting = None if length is None else _length(length, kind)
    with _writing(host, "allow") as (live, journal):
        killed = _killed_apply(host)
        target = _target(live, group, version, host)
        lasting = lasting or min(target.timeout or 1, LONGEST[kind])
        before = _seen(kind, live, version, address)
        after = _given(before, target, ((address, address),))
        _refuse_blocked(after, target, address)
        wish = _wish("allow", group, version, address, lasting, reason)
        journal.add(wish)
        _grant(kind, target, wish, journal)
    static = any(s.ranges and s.name == f"{group}.v{version}" for s in after.sets)
    notes = (f"the policy has {wish.address} in {group} already: it stays in also when this time is over",) if static else ()
    access = compare(before, after)
    sending = compare_sending(before, after)
    return MemberChange(wish, access, (*notes, *killed, *_ended(access, sending, before, after, host)), sending)


def revoke(host: Host, group: str, text: str, mine: Connection | None = None) -> MemberChange:
    """Take an address out of a dynamic group. `mine`: the SSH connection that must not lose its way back, if there is one.

    Raises:
        UsageError: no such group, not a dynamic one, not a single address.
        HostRefused: it is not in it, it is where we are logged in from, the kernel refuses, or the state directory cannot be written.
    """
    kind = host.backend.set_kind
    version, address = single_address(text)
    with _writing(host, "revoke") as (live, journal):
        killed = _killed_apply(host)
        recorded = (group, version, address) in journal.read().allowed
        target = dynamic_set(live, group, version) if recorded else _target(live, group, version, host)
        before = _seen(kind, live, version, address)
        if not recorded and not _holds(before, target):
            static = any(s.ranges and s.name == f"{group}.v{version}" for s in before.sets)
            hint = "the policy has it in the group: take it out there and apply" if static else f"`fwc members {group}` lists them"
            raise HostRefused(f"{address_text(version, address)} is not a dynamic member of {group}; nothing was changed", hint=hint)
        after = before if target is None else _given(before, target, ())
        access = compare(before, after)
        _refuse_own(access, mine, (version, address))
        wish = _wish("revoke", group, version, address)
        journal.add(wish)
        _withdraw(kind, target, wish, journal)
    sending = compare_sending(before, after)
    return MemberChange(wish, access, (*killed, *_ended(access, sending, before, after, host)), sending)


def _refuse_own(access: AccessChange, mine: Connection | None, address: tuple[int, int]) -> None:
    """Nobody is to take himself out of what he is logged in by."""
    if mine is None or mine.client_address() != address:
        return
    for lost in access.lost:
        protocol, _, span = lost.to.partition("/")
        low, _, high = span.partition("-")
        if protocol == "tcp" and int(low) <= mine.server_port <= int(high or low):
            raise HostRefused(
                f"you are logged in from {address_text(*address)}, and could not log in any more; nothing was changed",
                hint="if that is meant, --allow-lockout overrides; a console should be at hand",
            )


def _killed_apply(host: Host) -> tuple[str, ...]:
    """What to say where an apply did not get to its end; the lock is ours, so none is at work."""
    if host.state.interrupted() is None or host.state.trial() is not None:
        return ()
    return ("an apply was killed before its end: `fwc status` tells what is in force, `fwc apply` puts it right",)


def _ended(access: AccessChange, sending: SendingChange, before: Ruleset, after: Ruleset, host: Host) -> tuple[str, ...]:
    """End the connections that the address could not open any more, and this host's own to it; what could not be done, in words."""
    failed = [connections.end(access.lost, host.namespace)]
    if sending.lost:
        failed.append(connections.end_sent(before, after, host.namespace))
    return tuple(filter(None, failed))


def reconcile(host: Host, live: Ruleset) -> tuple[str, ...]:
    """Put recorded members that the kernel misses into its sets, after an apply; the caller holds the lock.

    Members that nobody recorded are left alone, and so are records for groups that the rules do not have. Returns what
    could not be done, in words.
    """
    journal = Journal(host.state.path)
    present = {(group_of(s), s.version, a) for s in live.sets if s.dynamic for a, _ in s.members}
    failed: list[str] = []
    with host.namespace.entered():
        _heal(host.backend.set_kind, live, journal)
        for event in journal.standing(time.time()):
            group, version, _ = event.key
            target = dynamic_set(live, group, version)
            if target is not None and event.key not in present:
                try:
                    _grant(host.backend.set_kind, target, event, journal)
                except HostRefused as refused:
                    failed.append(refused.message)
    return tuple(failed)


def rows(live: Ruleset, book: Book, now: float) -> list[Row]:
    """All dynamic members, by group and address: those in the kernel's sets, and those that are recorded and missing there."""
    found: dict[Key, Row] = {}
    for each in live.sets:
        if each.dynamic:
            for address, left in each.members:
                key = (group_of(each), each.version, address)
                found[key] = Row(*key, left, True, book.allowed.get(key))
    for event in book.standing(now):
        found.setdefault(event.key, Row(*event.key, milliseconds_left(event, now), False, event))
    return [found[key] for key in sorted(found)]


def known_group(live: Ruleset, group: str, host: Host) -> None:
    """Check that a group is one of those with room for dynamic members.

    Raises:
        UsageError: it is not, or there is none of that name.
        HostRefused: no policy is in force.
    """
    if not live.chains:
        current = host.state.current()
        what = f"generation {current.number} is recorded, but its rules are not loaded" if current else "no policy is in force"
        raise HostRefused(f"{what} ({host.backend.name}); nothing was changed", hint="`fwc apply POLICY` first")
    groups = {group_of(s): s.dynamic for s in sorted(live.sets, key=lambda s: s.dynamic)}
    if groups.get(group):
        return
    if group in groups and group != "block":
        hint = "give it `dynamic: {timeout: 12h}` in the policy and apply, or add the address to its members there"
        raise UsageError(f"group `{group}` takes no dynamic members", hint=hint)
    dynamic = [name for name, is_dynamic in groups.items() if is_dynamic]
    listed = f"groups with dynamic members: {', '.join(dynamic)}" if dynamic else "no group in force has dynamic members"
    raise UsageError(f"no group `{group}` is in force", hint=did_you_mean(group, groups) or listed)


def single_address(text: str) -> tuple[int, int]:
    """The one address that a text stands for; /32 and /128 are single addresses, too.

    Raises:
        UsageError: it is none, more than one, or nobody's.
    """
    try:
        entry = parse_entry(text.strip())
    except AddressError as error:
        raise UsageError(error.message, hint=_HINTS.get(error.code, error.hint)) from error
    if entry.span[0] != entry.span[1]:
        hint = "a network belongs into the policy: add it to the group's members and apply"
        raise UsageError(f"`{text}` is more than one address, and dynamic members are single ones", hint=hint)
    return entry.version, entry.span[0]


def _length(text: str, kind: SetKind) -> int:
    value = seconds(text)
    if value is None:
        raise UsageError(f"`{text}` is not a duration", hint="write 90s, 30m, 12h or 7d")
    if not 1 <= value <= LONGEST[kind]:
        longest = LONGEST[kind] // 86400
        hint = "who stays longer belongs into the policy"
        raise UsageError(f"a member is let in for at least one second and at most {longest} days, not for {text}", hint=hint)
    return value


def _reason(text: str) -> str:
    if len(text) > REASON_LENGTH or not all(c.isprintable() for c in text):
        raise UsageError(f"a reason is one line of at most {REASON_LENGTH} characters")
    return text


def _wish(do: str, group: str, version: int, address: int, lasting: int | None = None, reason: str = "") -> Event:
    now = round(time.time(), 3)
    until = None if lasting is None else now + lasting
    kind: Literal["allow", "revoke"] = "allow" if do == "allow" else "revoke"
    return Event(now, kind, group, address_text(version, address), until, session.user(), session.peer_text(), reason)


@contextmanager
def _writing(host: Host, what: str) -> Iterator[tuple[Ruleset, Journal]]:
    """The only writer, in the host's network, with the rules in force and what an earlier writer left undone carried out."""
    runner.require(host.backend.programs)
    netns.require_host()
    with host.state.lock(what), host.namespace.entered():
        journal = Journal(host.state.path)
        live = host.backend.parse(runner.outputs(host.backend.listing(big=True)))
        _heal(host.backend.set_kind, live, journal)
        journal.trim()
        yield live, journal


def _heal(kind: SetKind, live: Ruleset, journal: Journal) -> None:
    """Carry out what was recorded and maybe not done, because its writer died in between."""
    for wish in journal.unfinished():
        group, version, _ = wish.key
        target = dynamic_set(live, group, version)
        if wish.do == "revoke":
            _withdraw(kind, target, wish, journal)
        elif target is None or (wish.until is not None and wish.until <= time.time()):
            journal.settle(wish, "done")
        else:
            try:
                _grant(kind, target, wish, journal)
            except HostRefused:  # it is full: settled as refused, and nobody waits for the answer any more
                continue


def _grant(kind: SetKind, target: AddressSet, wish: Event, journal: Journal) -> None:
    """Put a recorded member into its set, for the time that it has left."""
    _, version, address = wish.key
    left = milliseconds_left(wish, time.time())
    try:
        runner.put_members(kind, target.kernel_name, version, [(address, left)])
    except HostRefused as refused:
        journal.settle(wish, "refused")
        if "full" in refused.message:
            full = f"{wish.group} is full: it holds {target.size} dynamic members over IPv{version}; {wish.address} was not let in"
            raise HostRefused(full, hint="`fwc revoke` some, or raise `max` in the policy and apply") from refused
        raise
    journal.settle(wish, "done")


def _withdraw(kind: SetKind, target: AddressSet | None, wish: Event, journal: Journal) -> None:
    """Take a member out of its set, where the rules have one."""
    _, version, address = wish.key
    if target is not None:
        try:
            runner.take_member(kind, target.kernel_name, version, address)
        except HostRefused:
            journal.settle(wish, "refused")
            raise
    journal.settle(wish, "done")


def _target(live: Ruleset, group: str, version: int, host: Host) -> AddressSet:
    known_group(live, group, host)
    target = dynamic_set(live, group, version)
    if target is None:
        raise HostRefused(f"the rules in force have no set for IPv{version} members of {group}; nothing was changed", hint="`fwc status`")
    return target


def _seen(kind: SetKind, live: Ruleset, version: int, address: int) -> Ruleset:
    """The rules in force, every set cut down to one address: it holds it, or nothing."""

    def cut(each: AddressSet) -> AddressSet:
        inside = each.version == version and runner.holds(kind, each.kernel_name, version, address)
        return replace(each, ranges=((address, address),) if inside else ())

    return replace(live, sets=tuple(map(cut, live.sets)))


def _given(seen: Ruleset, target: AddressSet, ranges: Ranges) -> Ruleset:
    return replace(seen, sets=tuple(replace(s, ranges=ranges) if s.name == target.name else s for s in seen.sets))


def _holds(seen: Ruleset, target: AddressSet | None) -> bool:
    return target is not None and any(s.name == target.name and s.ranges for s in seen.sets)


def _refuse_blocked(after: Ruleset, target: AddressSet, address: int) -> None:
    """Letting in somebody who stays blocked would look like help and be none."""
    holding = {s.name for s in after.sets if s.ranges}
    for rule in (r for c in after.chains for r in c.rules):
        if rule.service == "block" and rule.verdict is Final.DROP and _concerns(rule, target, holding):
            group = group_of(target)
            raise HostRefused(
                f"{address_text(target.version, address)} is blocked, and members of {group} are not excepted; nothing was changed",
                hint=f"name {group} in `block: {{except: …}}`, or take the address out of the block list, and apply",
            )


def _concerns(rule: Rule, target: AddressSet, holding: set[str]) -> bool:
    """True where a block rule meets the address, and not because of this very group: a group may exist to block."""
    tests: Sequence[InSet] = [m for m in rule.matches if isinstance(m, InSet) and m.version == target.version]
    if len(tests) < len(rule.matches) or not tests or any(m.set == target.name and not m.negated for m in tests):
        return False
    return all((m.set in holding) != m.negated for m in tests)
