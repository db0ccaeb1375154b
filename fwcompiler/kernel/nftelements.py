"""How nf_tables writes set elements: intervals and members as bytes, and bytes back as values. Pure.

An interval is two elements, its start and, flagged INTERVAL_END, the address behind its last one. Where there is no
such address the end is left out and nft marks the start as open in its own user data. In front of the first interval
of a set stands an end at zero, the null element, unless that interval starts at zero.
(``include/uapi/linux/netfilter/nf_tables.h``; nft's ``src/interval.c``, ``set_to_intervals``.)
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fwcompiler.addresses import BITS, LAST, Range, Ranges
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel.netlink import ATTRIBUTE_MAX, NLA_TYPE_MASK, attribute, attributes, nested

_ELEMENT = 1  # NFTA_LIST_ELEM
_KEY, _FLAGS, _TIMEOUT, _EXPIRATION, _USERDATA = 1, 3, 4, 5, 6  # enum nft_set_elem_attributes
_VALUE = 1  # NFTA_DATA_VALUE
_INTERVAL_END = 1  # NFT_SET_ELEM_INTERVAL_END
_OPEN = struct.pack("=BBI", 1, 4, 1)  # libnftnl: NFTNL_UDATA_SET_ELEM_FLAGS, SET_ELEM_F_INTERVAL_OPEN

_WORD = 4
_KEY_AT = 12  # a start element: three attribute headers, then the address
_END_KEY_AT = 20  # an end element: the flags attribute stands in front


class Element(NamedTuple):
    """One element as the kernel lists it. `expires`: milliseconds left, where it has a timeout."""

    key: int
    end: bool
    expires: int | None = None


def single(version: int, address: int) -> bytes:
    """The element of one address: an interval's start, a member, or a key to look up."""
    return _element(_key(version, address))


def member(version: int, address: int, timeout_ms: int | None) -> bytes:
    """The element of an address in a dynamic set."""
    timeout = b"" if timeout_ms is None else attribute(_TIMEOUT, struct.pack(">Q", timeout_ms))
    return _element(timeout, _key(version, address))


def interval_end(version: int, address: int) -> bytes:
    """The element behind an interval; at zero, the null element."""
    return _element(attribute(_FLAGS, struct.pack(">I", _INTERVAL_END)), _key(version, address))


def interval_lists(version: int, ranges: Ranges) -> Iterator[bytes]:
    """The elements of merged ranges, in lists that each fit one attribute."""
    # An open interval comes last in its list: kernels that check for overlaps take "no end follows" from that.
    is_open = bool(ranges) and ranges[-1][1] == LAST[version]
    closed = ranges[:-1] if is_open else ranges
    last = _element(_key(version, ranges[-1][0]), attribute(_USERDATA, _OPEN)) if is_open else b""
    pair = single(version, 0) + interval_end(version, 0)
    body = memoryview(_pairs(version, closed, pair))
    # Both halves of an interval in one list, because newer kernels match an end with the start in front of it.
    step = (ATTRIBUTE_MAX - len(last)) // len(pair) * len(pair)
    for start in range(0, len(body), step):
        yield b"".join((body[start : start + step], last if start + step >= len(body) else b""))
    if last and not body:
        yield last


def _pairs(version: int, ranges: Ranges, pair: bytes) -> bytearray:
    """All closed intervals in a row: a template repeated, then every word of every address in one strided copy each."""
    data = bytearray(pair) * len(ranges)
    words = memoryview(data).cast("I")
    stride, width = len(pair) // _WORD, BITS[version] // 8 // _WORD
    lows = _packed(version, [low for low, _ in ranges])
    ends = _packed(version, [high + 1 for _, high in ranges])
    start_at = _KEY_AT // _WORD
    end_at = (len(single(version, 0)) + _END_KEY_AT) // _WORD
    for word in range(width):
        words[start_at + word :: stride] = lows[word::width]
        words[end_at + word :: stride] = ends[word::width]
    return data


def _packed(version: int, values: list[int]) -> memoryview:
    """Addresses in network order, seen as machine words."""
    if version == 4:
        words = array("I", values)  # a third of the time of struct.pack
        if sys.byteorder == "little":
            words.byteswap()
        return memoryview(words)
    return memoryview(b"".join([v.to_bytes(16, "big") for v in values])).cast("I")


def _element(*parts: bytes) -> bytes:
    return nested(_ELEMENT, *parts)


def _key(version: int, address: int) -> bytes:
    return nested(_KEY, attribute(_VALUE, address.to_bytes(BITS[version] // 8, "big")))


def parse(version: int, data: bytes, start: int, end: int) -> Iterator[Element]:
    """The elements in the list `data[start:end]`.

    Raises:
        HostRefused: a key is not an address of this version.
    """
    width = BITS[version] // 8
    plain = _KEY_AT + width
    from_bytes, unpack = int.from_bytes, struct.Struct("=HxxH").unpack_from
    while start < end:
        length, key_length = unpack(data, start)
        if length == plain and key_length == plain - 4:
            # Half of a large set are bare keys: two thirds of the time is saved by not walking them.
            yield Element(from_bytes(data[start + _KEY_AT : start + plain], "big"), False)
        else:
            yield _parse_element(width, data, start + 4, start + length)
        start += (length + 3) & ~3


def _parse_element(width: int, data: bytes, start: int, end: int) -> Element:
    key, flags, expires = None, 0, None
    for kind, low, high in attributes(data, start, end):
        if kind == _KEY and high - low == 4 + width:
            key = int.from_bytes(data[low + 4 : high], "big")
        elif kind == _FLAGS:
            flags = int.from_bytes(data[low:high], "big")
        elif kind == _EXPIRATION:
            expires = int.from_bytes(data[low:high], "big")
    if key is None:
        raise HostRefused(f"a set that should hold IPv{4 if width == 4 else 6} addresses holds something else")
    return Element(key, bool(flags & _INTERVAL_END), expires)


def key_of(version: int, message: bytes, offset: int) -> int | None:
    """The address of the element that starts at `offset` of a message; None where something else does."""
    length, kind = struct.unpack_from("=HH", message, offset)
    if kind & NLA_TYPE_MASK != _ELEMENT:
        return None
    try:
        return _parse_element(BITS[version] // 8, message, offset + 4, offset + length).key
    except HostRefused:
        return None


def intervals(elements: Iterable[Element], last: int) -> Ranges:
    """The intervals that elements in any order stand for, ascending, as they are: touching ones are not joined."""
    # At one address an end belongs to the interval below, a start to the one above: so the end sorts first.
    marks = sorted([e.key * 2 + (not e.end) for e in elements])
    ranges: list[Range] = []
    low: int | None = None
    for mark in marks:
        if mark & 1:
            low = mark >> 1 if low is None else low
        elif low is not None:
            ranges.append((low, (mark >> 1) - 1))
            low = None
    if low is not None:
        ranges.append((low, last))
    return tuple(ranges)
