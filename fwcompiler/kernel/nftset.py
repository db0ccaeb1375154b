"""The content of nftables sets, read and changed over netlink.

nft 1.0.6 reads a whole set before it changes one element of it; these functions do not. They work in the network
namespace of the calling thread, on sets of table ``inet fwc`` that exist already (`nft -f` makes them), and what they
write is what nft writes, element by element, so that either may go on where the other stopped.

Numbers and layouts: ``include/uapi/linux/netfilter/nf_tables.h``; behaviour: ``net/netfilter/nft_set_rbtree.c``.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fwcompiler.addresses import BITS, LAST, Ranges, address_text, intersect, merged, range_text, subtract
from fwcompiler.contents import difference
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import netlink
from fwcompiler.kernel.netlink import Batch, Channel, NetlinkError, StaleGeneration, Unacknowledged
from fwcompiler.kernel.nftelements import Element, interval_end, interval_lists, intervals, key_of, member, parse, single

__all__ = [
    "Change",
    "StaleGeneration",
    "add_member",
    "add_members",
    "change",
    "change_many",
    "delta",
    "generation",
    "holds_as_many",
    "lookup",
    "lookups",
    "members",
    "read",
    "remove_member",
    "replace",
]

TABLE = "fwc"

Change = tuple[str, int, Ranges, Ranges]
"""Set name, version, ranges to add, ranges to remove."""

Member = tuple[int, int | None]
"""An address and the milliseconds it has left; None: it stays."""

_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_INET = 1  # NFPROTO_INET
_NEWSETELEM, _GETSETELEM, _DELSETELEM = 12, 13, 14
_GETSET, _GETGEN = 10, 16
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3  # enum nft_set_elem_list_attributes
_SET_TABLE, _SET_NAME, _SET_COUNT = 1, 2, 20  # enum nft_set_attributes; the last since Linux 6.17
_GEN_ID = 1  # enum nft_gen_attributes

_TRIES = 10  # transactions of others that may come in between
_QUESTIONS = 32  # look-ups per message: their answers, 4 KiB of memory each, fit the smallest receive buffer


class _Set(NamedTuple):
    """Where a set is, and of which family its addresses are."""

    name: str
    version: int
    table: str

    @property
    def head(self) -> bytes:
        """The attributes that every message about its elements begins with."""
        return netlink.string(_LIST_TABLE, self.table) + netlink.string(_LIST_SET, self.name)

    def __str__(self) -> str:
        return f"set `{self.name}` of table inet {self.table}"


def delta(old: Ranges, new: Ranges) -> tuple[Ranges, Ranges]:
    """What to add and what to remove so that a set goes from `old` to `new`, in whole intervals.

    The kernel knows whole intervals only: one that grows or shrinks is removed as it was and added as it will be.
    """
    remove, add = difference(old, new)
    return add, remove


def change(name: str, version: int, add: Ranges, remove: Ranges, *, generation: int | None = None, table: str = TABLE) -> None:
    """Take the addresses `remove` out of an interval set and put `add` in, as one transaction.

    Fast where both are whole intervals, as :func:`delta` makes them; otherwise the set is read first. With
    `generation` nothing happens if the ruleset has changed since.

    Raises:
        StaleGeneration: it has.
        HostRefused: no such set, addresses to remove that are not in it or to add that are; nothing was changed.
    """
    change_many([(name, version, add, remove)], generation=generation, table=table)


def change_many(changes: Iterable[Change], *, generation: int | None = None, table: str = TABLE) -> None:
    """:func:`change` for several sets, all of it in one transaction."""
    wanted = list(changes)
    with Channel() as channel:
        for _ in range(_TRIES):
            present = _generation(channel)
            if generation not in (None, present):
                break
            try:
                _carry_out(channel, wanted, present, table)
            except Unacknowledged:
                raise  # it may have been carried out: doing it again is not for us to decide
            except HostRefused:
                # What was found out about the set holds for the generation it was read in, so all else waits.
                if _generation(channel) == present:
                    raise
            else:
                return
    raise StaleGeneration(errno.ERESTART, "the ruleset was changed by someone else in the meantime; nothing was changed")


def replace(name: str, version: int, ranges: Ranges, *, generation: int | None = None, table: str = TABLE) -> None:
    """Make an interval set hold exactly `ranges`, whatever it holds now, as one transaction."""
    where = _Set(name, version, table)
    work = _Transaction(generation)
    work.flush(where)
    work.add(where, ranges, null=True)
    with Channel() as channel:
        work.commit(channel)


def read(name: str, version: int, *, table: str = TABLE) -> Ranges:
    """The ranges of an interval set, merged. The kernel's time for it grows with the square of their number."""
    with Channel() as channel:
        return merged(intervals(_dump(channel, _Set(name, version, table)), LAST[version]))


def lookup(name: str, version: int, address: int, *, table: str = TABLE) -> bool:
    """True when the set holds the address; takes microseconds however large the set is."""
    return lookups(name, version, (address,), table=table)[0]


def lookups(name: str, version: int, addresses: Iterable[int], *, table: str = TABLE) -> list[bool]:
    """:func:`lookup` for each of several addresses, one question at a time: asked together, one that is missing ends the answers."""
    where = _Set(name, version, table)
    with Channel() as channel:
        return [_holds(channel, where, address) for address in addresses]


def _holds(channel: Channel, where: _Set, address: int) -> bool:
    try:
        channel.ask(_kind(_GETSETELEM), _INET, where.head, netlink.nested(_LIST_ELEMENTS, single(where.version, address)))
    except NetlinkError as error:
        if error.errno == errno.ENOENT and _exists(channel, where):
            return False
        raise _explain(error, where, "read") from error
    return True


def holds_as_many(name: str, version: int, ranges: Ranges, *, table: str = TABLE) -> bool:
    """False when an interval set is known to have more or fewer intervals than `ranges`; older kernels do not tell how many it has.

    Half of its elements are counted, and an interval up to the last address has no end that would be one.
    """
    where = _Set(name, version, table)
    with Channel() as channel:
        try:
            answers = channel.ask(_kind(_GETSET), _INET, netlink.string(_SET_TABLE, table), netlink.string(_SET_NAME, name))
        except NetlinkError as error:
            raise _explain(error, where, "read") from error
    found = [
        int(struct.unpack_from(">I", data, start)[0])
        for data in answers
        for kind, start, _ in netlink.attributes(data, netlink.HEADER)
        if kind == _SET_COUNT
    ]
    unended = bool(ranges) and ranges[-1][1] == LAST[version]
    return all(count in range(len(ranges) - unended, len(ranges) + 1) for count in found)


def members(name: str, version: int, *, table: str = TABLE) -> tuple[Member, ...]:
    """The addresses in a dynamic set and the milliseconds each has left, ascending."""
    with Channel() as channel:
        return tuple(sorted((e.key, e.expires) for e in _dump(channel, _Set(name, version, table))))


def add_member(name: str, version: int, address: int, timeout_ms: int | None = None, *, table: str = TABLE) -> None:
    """Put an address into a dynamic set for that long, counted from now also if it is in already.

    Raises:
        HostRefused: no such set, or the set is full.
    """
    add_members(name, version, [(address, timeout_ms)], table=table)


def add_members(name: str, version: int, entries: Iterable[Member], *, table: str = TABLE) -> None:
    """:func:`add_member` for many, as one transaction. None: the set's own timeout; who has no time left stays out."""
    where, work = _Set(name, version, table), _Transaction()
    # A timeout of zero would mean the opposite: for ever.
    unique = [(address, timeout) for address, timeout in dict(entries).items() if timeout is None or timeout > 0]
    for start in range(0, len(unique), 1000):
        part = unique[start : start + 1000]
        fresh = b"".join(member(version, address, timeout) for address, timeout in part)
        keys = b"".join(member(version, address, None) for address, _ in part)
        # Adding what is there keeps its old deadline, removing what is not there fails: add, remove, add does
        # the right thing for both, on every kernel, and no packet sees the set without the member.
        work.put(_NEWSETELEM, netlink.NLM_F_CREATE, where, fresh)
        work.put(_DELSETELEM, 0, where, keys)
        work.put(_NEWSETELEM, netlink.NLM_F_CREATE, where, fresh)
    with Channel() as channel:
        work.commit(channel)


def remove_member(name: str, version: int, address: int, *, table: str = TABLE) -> bool:
    """Take an address out of a dynamic set; False when it was not in it (any more)."""
    where, work = _Set(name, version, table), _Transaction()
    work.put(_DELSETELEM, 0, where, member(version, address, None))
    with Channel() as channel:
        try:
            work.commit(channel)
        except ElementRefused:
            if not _exists(channel, where):
                raise
            return False
    return True


def generation() -> int:
    """The number the kernel gives the present ruleset; every transaction in this namespace raises it."""
    with Channel() as channel:
        return _generation(channel)


def _generation(channel: Channel) -> int:
    for data in channel.ask(_kind(_GETGEN), 0):
        for kind, start, _ in netlink.attributes(data, netlink.HEADER):
            if kind == _GEN_ID:
                return int(struct.unpack_from(">I", data, start)[0])
    raise HostRefused("the kernel does not tell its ruleset generation")


def _carry_out(channel: Channel, changes: list[Change], generation: int, table: str) -> None:
    """At once where the changes fit the sets as they are, else after reading the sets."""
    if all(_fits(channel, change, table) for change in changes):
        try:
            _transaction(changes, generation, table).commit(channel)
            return
        except ElementRefused:
            pass  # the kernel only names the first border in its way
    exact = [_exact(channel, change, table) for change in changes]
    _transaction(exact, generation, table).commit(channel)


def _transaction(changes: list[Change], generation: int, table: str) -> _Transaction:
    work = _Transaction(generation)
    for name, version, add, remove in changes:
        where = _Set(name, version, table)
        work.remove(where, remove)
        # nft puts the null element in front of the first interval of an empty set, and only there. A set that
        # something is removed from is not empty; for the rest the kernel ignores a null element it has already.
        work.add(where, add, null=not remove)
    return work


def _fits(channel: Channel, change: Change, table: str) -> bool:
    """True when the kernel can be trusted with the change as it is.

    It compares borders. Where nothing more is compared, removing a-d from a-b, c-d leaves b and c behind, and c then
    reaches to the last address there is; 6.18.44 refuses that, but takes an interval without an end over others, and
    others over it.
    """
    name, version, add, remove = change
    where, last = _Set(name, version, table), LAST[version]
    freed_from = remove[-1][0] if remove and remove[-1][1] == last else last + 1
    if add and add[-1][1] == last and add[-1][0] < freed_from:
        return False
    if add and freed_from > last:
        tail = _starts(channel, where, ((last, last),))
        if tail and add[-1][1] >= tail[0]:
            return False
    return all(
        _starts(channel, where, part) == [low for low, _ in part]
        for part in (remove[i : i + _QUESTIONS] for i in range(0, len(remove), _QUESTIONS))
    )


def _starts(channel: Channel, where: _Set, ranges: Ranges) -> list[int]:
    """Where the set's intervals begin that hold the last addresses of `ranges`; empty where one is in none."""
    width = BITS[where.version] // 8
    keys = b"".join([single(where.version, high) for _, high in ranges])
    try:
        answers = channel.ask(_kind(_GETSETELEM), _INET, where.head, netlink.nested(_LIST_ELEMENTS, keys))
    except NetlinkError:
        return []
    plain = netlink.HEADER + len(where.head) + 4 + len(keys) // len(ranges)
    return [
        # A bare key is the last thing in its message.
        int.from_bytes(a[-width:], "big") if len(a) == plain else next(_elements(where.version, a)).key
        for a in answers
    ]


def _exact(channel: Channel, change: Change, table: str) -> Change:
    """The same change in terms of the intervals that the set is made of at present."""
    name, version, add, remove = change
    where = _Set(name, version, table)
    present = intervals(_dump(channel, where), LAST[version])
    old = merged(present)
    missing, rest = subtract(remove, old), subtract(old, remove)
    clash = intersect(rest, add)
    if missing or clash:
        what = f"{range_text(version, missing[0])} is not in it" if missing else f"{range_text(version, clash[0])} is in it already"
        raise HostRefused(f"cannot change {where}: {what}; nothing was changed")
    return (name, version, *delta(present, merged((*rest, *add))))


class ElementRefused(HostRefused):
    """An element to remove that is not there, or one to add that overlaps another."""


class _Transaction:
    """A batch, and for each of its messages the set it is about, so that a refusal can be put into words."""

    def __init__(self, generation: int | None = None) -> None:
        self.batch = Batch(_SUBSYSTEM, _INET, generation)
        self.about: list[_Set | None] = [None]

    def put(self, operation: int, flags: int, where: _Set, elements: bytes) -> None:
        """Add or remove a list of elements."""
        self.batch.add(operation, flags, where.head, netlink.nested(_LIST_ELEMENTS, elements))
        self.about.append(where)

    def add(self, where: _Set, ranges: Ranges, *, null: bool) -> None:
        """Add intervals; `null`: with the null element where nft would have it."""
        if null and ranges and ranges[0][0] > 0:
            self.put(_NEWSETELEM, netlink.NLM_F_CREATE, where, interval_end(where.version, 0))
        for elements in interval_lists(where.version, ranges):
            # Without EXCL an interval that begins and ends where others do is taken for known, and left out.
            self.put(_NEWSETELEM, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL, where, elements)

    def remove(self, where: _Set, ranges: Ranges) -> None:
        """Remove intervals."""
        for elements in interval_lists(where.version, ranges):
            self.put(_DELSETELEM, 0, where, elements)

    def flush(self, where: _Set) -> None:
        """Remove everything."""
        self.batch.add(_DELSETELEM, 0, where.head)
        self.about.append(where)

    def commit(self, channel: Channel) -> None:
        """Send it, unless it is empty."""
        if self.batch.last == 0:
            return
        try:
            channel.transact(self.batch)
        except (StaleGeneration, Unacknowledged):
            raise
        except NetlinkError as error:
            raise _explain(error, self.about[error.sequence], "change", self.batch.messages[error.sequence]) from error


def _explain(error: NetlinkError, where: _Set | None, verb: str, message: bytes = b"") -> HostRefused:
    """A refusal in words: the set, the element where the kernel names one, its own reason."""
    outcome = "; nothing was changed" if verb == "change" else ""
    if where is None:
        return HostRefused(f"cannot {verb} sets: {error.reason}{outcome}", hint=error.hint)
    elements = netlink.HEADER + len(where.head) + 4
    if error.errno == errno.ENOENT and error.offset is not None and error.offset < elements:
        return HostRefused(f"there is no {where}{outcome}", hint="load the ruleset that defines it first")
    key = None
    if error.offset is not None and elements <= error.offset < len(message):
        key = key_of(where.version, message, error.offset)
    place = "" if key is None else f" at {address_text(where.version, key)}"
    reason = "the set is full" if error.errno == errno.ENFILE else error.reason
    kind = ElementRefused if error.errno in (errno.ENOENT, errno.EEXIST) else HostRefused
    return kind(f"cannot {verb} {where}{place}: {reason}{outcome}", hint=error.hint)


def _dump(channel: Channel, where: _Set) -> list[Element]:
    try:
        answers = channel.dump(_kind(_GETSETELEM), _INET, where.head)
    except NetlinkError as error:
        raise _explain(error, where, "read") from error
    return [element for data in answers for element in _elements(where.version, data)]


def _elements(version: int, data: bytes) -> Iterator[Element]:
    for kind, start, end in netlink.attributes(data, netlink.HEADER):
        if kind == _LIST_ELEMENTS:
            yield from parse(version, data, start, end)


def _exists(channel: Channel, where: _Set) -> bool:
    try:
        channel.ask(_kind(_GETSET), _INET, netlink.string(_SET_TABLE, where.table), netlink.string(_SET_NAME, where.name))
    except NetlinkError:
        return False
    return True


def _kind(operation: int) -> int:
    return _SUBSYSTEM << 8 | operation
