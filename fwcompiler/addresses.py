"""IPv4 and IPv6 addresses as sets of integer ranges, and every form people write them in.

A range is a pair of integers, both ends included. A :class:`Addresses` value holds both families, each as a
sorted tuple of ranges that neither overlap nor touch, so equal sets are equal values.
"""

from __future__ import annotations

import ipaddress
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import merge
from itertools import chain, pairwise
from operator import gt, itemgetter

Range = tuple[int, int]
Ranges = tuple[Range, ...]

MANY = 1000
"""Ranges from which on it pays to look for the faster way."""
SEARCH = 32
"""How many ranges are passed over in the time of one binary search."""

BITS = {4: 32, 6: 128}
LAST = {4: (1 << 32) - 1, 6: (1 << 128) - 1}

LOOPBACK: dict[int, Range] = {4: (0x7F000000, 0x7FFFFFFF), 6: (1, 1)}
MULTICAST: dict[int, Range] = {4: (0xE0000000, 0xEFFFFFFF), 6: (0xFF << 120, LAST[6])}
_low, _high = itemgetter(0), itemgetter(1)
_MAPPED: Range = (0xFFFF << 32, (0xFFFF << 32) | LAST[4])
_OCTETS = {str(n): n for n in range(256)}
_SPECIAL = frozenset(("0", "127", *(str(n) for n in range(224, 240))))
"""First octets of addresses that nobody sends from: unspecified, loopback, multicast."""


class Merged(tuple[Range, ...]):
    """Ranges that are known to be merged, so that nobody looks again. They remember what is asked for often: a set may have a million."""

    _hash: int
    _words: bytes

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()
            return self._hash

    @property
    def words(self) -> bytes:
        """Both ends of all ranges, each as a word of 32 bits in network order; IPv4 only.

        Raises:
            OverflowError: an address does not fit.
        """
        try:
            return self._words
        except AttributeError:
            self._words = _network_order(array("I", chain.from_iterable(self))).tobytes()
            return self._words

    @classmethod
    def of_words(cls, words: bytes) -> Merged:
        """What :attr:`words` came from.

        Raises:
            ValueError: these are no pairs of words, or not those of merged ranges.
        """
        numbers = array("I")
        numbers.frombytes(words)
        ends = iter(_network_order(numbers))
        made = cls(zip(ends, ends, strict=True))
        if not _are_merged(made):
            raise ValueError("ranges that overlap or are out of order")
        made._words = words
        return made


def _network_order(words: array[int]) -> array[int]:
    if sys.byteorder == "little":
        words.byteswap()
    return words


def merged(ranges: Iterable[Range]) -> Ranges:
    """Sort ranges and join those that overlap or touch."""
    if isinstance(ranges, Merged):
        return ranges
    given = list(ranges)
    ordered = _sorted_v4(given) if len(given) > MANY and max(map(_high, given)) <= LAST[4] else sorted(given)
    if _are_merged(ordered):
        return Merged(ordered)
    out: list[Range] = []
    first, last = -1, -2
    for low, high in ordered:
        if low <= last + 1:
            last = max(last, high)
        else:
            if last >= 0:
                out.append((first, last))
            first, last = low, high
    if last >= 0:
        out.append((first, last))
    return Merged(out)


def _sorted_v4(ranges: list[Range]) -> list[Range]:
    """Sorted by way of one number for each range: three times as fast, and what is made anew lies in memory in the order it is read in."""
    return [(both >> 32, both & 0xFFFFFFFF) for both in sorted([low << 32 | high for low, high in ranges])]


def intersect(a: Ranges, b: Ranges) -> Ranges:
    """What lies in both; linear in the number of ranges, or two searches for each where one has few."""
    if len(a) > len(b):
        a, b = b, a
    if len(a) * SEARCH < len(b):
        return Merged(span for low, high in a for span in _clipped(b, low, high))
    if a == b:
        return a
    out: list[Range] = []
    i = j = 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if low <= high:
            out.append((low, high))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return Merged(out)


def subtract(a: Ranges, b: Ranges) -> Ranges:
    """What lies in ``a`` and not in ``b``; linear in the number of ranges, or two searches for each where one has few."""
    if not b or not a:
        return a
    if a == b:
        return ()
    if len(a) * SEARCH < len(b):
        return Merged(gap for low, high in a for gap in _gaps(_clipped(b, low, high), low, high))
    if len(b) * SEARCH < len(a):
        return Merged(span for low, high in _gaps(b, 0, a[-1][1]) for span in _clipped(a, low, high))
    out: list[Range] = []
    j = 0
    for first, last in a:
        low = first
        while j < len(b) and b[j][1] < low:
            j += 1
        k = j
        while k < len(b) and b[k][0] <= last:
            if b[k][0] > low:
                out.append((low, b[k][0] - 1))
            low = max(low, b[k][1] + 1)
            k += 1
        if low <= last:
            out.append((low, last))
    return Merged(out)


def _clipped(ranges: Ranges, low: int, high: int) -> Sequence[Range]:
    """What of the ranges lies between two addresses, both included."""
    start = bisect_left(ranges, low, key=_high)
    end = bisect_right(ranges, high, lo=start, key=_low)
    part = list(ranges[start:end])
    if part:
        part[0] = (max(low, part[0][0]), part[0][1])
        part[-1] = (part[-1][0], min(high, part[-1][1]))
    return part


def _gaps(ranges: Sequence[Range], low: int, high: int) -> list[Range]:
    """What lies between two addresses and in none of the ranges, which are merged; those beyond `high` leave nothing."""
    if not ranges:
        return [(low, high)]
    inner = [(before[1] + 1, after[0] - 1) for before, after in pairwise(ranges)]
    ends = [(low, ranges[0][0] - 1), *inner, (ranges[-1][1] + 1, high)]
    return [span for span in ends if span[0] <= span[1]]


def includes(a: Ranges, b: Ranges) -> bool:
    """True where all of ``b`` lies in ``a``; a search for each range of ``b`` up to the first that does not."""
    return a == b or all((at := bisect_right(a, low, key=_low)) > 0 and a[at - 1][1] >= high for low, high in b)


def overlap(a: Ranges, b: Ranges) -> bool:
    """True where some address lies in both; a search in ``b`` for each range of ``a`` up to the first that has one."""
    return any((at := bisect_left(b, low, key=_high)) < len(b) and b[at][0] <= high for low, high in a)


@dataclass(frozen=True, slots=True)
class Addresses:
    """A set of addresses of both families. Build it with :meth:`of`; the fields are kept merged."""

    v4: Ranges = ()
    v6: Ranges = ()

    @classmethod
    def of(cls, v4: Iterable[Range] = (), v6: Iterable[Range] = ()) -> Addresses:
        """The set that covers all given ranges."""
        return cls(merged(v4), merged(v6))

    def family(self, version: int) -> Ranges:
        """The ranges of one family, 4 or 6."""
        return self.v4 if version == 4 else self.v6

    def only(self, version: int) -> Addresses:
        """The part of one family."""
        return Addresses(self.v4) if version == 4 else Addresses((), self.v6)

    def __or__(self, other: Addresses) -> Addresses:
        return Addresses(_union(self.v4, other.v4), _union(self.v6, other.v6))

    def __and__(self, other: Addresses) -> Addresses:
        return Addresses(intersect(self.v4, other.v4), intersect(self.v6, other.v6))

    def __sub__(self, other: Addresses) -> Addresses:
        return Addresses(subtract(self.v4, other.v4), subtract(self.v6, other.v6))

    def __bool__(self) -> bool:
        return bool(self.v4 or self.v6)

    def includes(self, other: Addresses) -> bool:
        """True where all of the other set is in this one."""
        return includes(self.v4, other.v4) and includes(self.v6, other.v6)

    def __contains__(self, address: tuple[int, int]) -> bool:
        """``(version, integer) in addresses``."""
        version, value = address
        return covers(self.family(version), value)

    def __len__(self) -> int:
        """Number of ranges, not of addresses."""
        return len(self.v4) + len(self.v6)

    @property
    def size(self) -> int:
        """Number of single addresses."""
        return sum(b - a + 1 for a, b in self.v4) + sum(b - a + 1 for a, b in self.v6)

    def texts(self) -> tuple[str, ...]:
        """Every range as prefix or ``a-b``, IPv4 first: the canonical form."""
        return tuple(range_text(v, r) for v in (4, 6) for r in self.family(v))


EVERYONE = Addresses(((0, LAST[4]),), ((0, LAST[6]),))
NOBODY = Addresses()


def _union(a: Ranges, b: Ranges) -> Ranges:
    if not a or not b:
        return a or b
    return merged(merge(a, b))


def covers(ranges: Ranges, value: int) -> bool:
    """True when one of the ranges holds the integer; binary search."""
    low, high = 0, len(ranges)
    while low < high:
        middle = (low + high) // 2
        if ranges[middle][1] < value:
            low = middle + 1
        else:
            high = middle
    return low < len(ranges) and ranges[low][0] <= value


def prefixes(version: int, ranges: Iterable[Range]) -> Iterator[tuple[int, int]]:
    """Cut ranges into ``(network, prefix length)``, the fewest possible (RFC 4632)."""
    bits = BITS[version]
    for low, high in ranges:
        start = low
        while start <= high:
            free = (start & -start).bit_length() - 1 if start else bits
            fit = (high - start + 1).bit_length() - 1
            step = min(free, fit)
            yield start, bits - step
            start += 1 << step


@lru_cache(maxsize=4)
def prefix_count(version: int, ranges: Ranges) -> int:
    """How many prefixes :func:`prefixes` cuts ranges into; in large lists nearly all are one already."""
    several = [(low, high) for low, high in ranges if (both := low ^ high) & both + 1 or low & both]
    return len(ranges) - len(several) + sum(1 for _ in prefixes(version, several))


def address_text(version: int, value: int) -> str:
    """One address in its canonical form (IPv6: RFC 5952)."""
    if version == 4:
        return f"{value >> 24}.{value >> 16 & 255}.{value >> 8 & 255}.{value & 255}"
    return str(ipaddress.IPv6Address(value))


def prefix_text(version: int, network: int, length: int) -> str:
    """``network/length``, without the length where it is a single address."""
    text = address_text(version, network)
    return text if length == BITS[version] else f"{text}/{length}"


def range_text(version: int, span: Range) -> str:
    """A range as one prefix where it is one, else as ``a-b``."""
    low, high = span
    size = high - low + 1
    if size & (size - 1) == 0 and low & (size - 1) == 0:
        return prefix_text(version, low, BITS[version] - size.bit_length() + 1)
    return f"{address_text(version, low)}-{address_text(version, high)}"


class AddressError(ValueError):
    """Text that is no usable address. ``code`` is one of ``diagnostics.CODES``."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


@dataclass(frozen=True, slots=True)
class Entry:
    """One parsed entry: a range of one family. ``masked`` names the prefix it became where host bits were set."""

    version: int
    span: Range
    masked: str = ""


def parse_entry(text: str, allow: Iterable[str] = ()) -> Entry:
    """Read an address, prefix, range ``a-b`` or wildcard ``a.b.c.x``.

    ``allow`` may hold ``everyone``, ``loopback``, ``multicast``: kinds of entries that are refused otherwise.

    Raises:
        AddressError: the text is none of these, or a kind that is refused.
    """
    entry = _parse_any(text)
    version, (low, high) = entry.version, entry.span
    if (low, high) == (0, LAST[version]):
        if "everyone" not in allow:
            raise AddressError(
                "address-everyone",
                f"`{text}` is every address there is",
                "write `from: anywhere` at the service if it is public, or say `allow: [everyone]` at this entry",
            )
        return entry
    if low == high == 0:
        raise AddressError("address-unspecified", f"`{text}` is nobody's address", "take it out, or write the address that was meant")
    for kind, spans in (("loopback", LOOPBACK), ("multicast", MULTICAST)):
        if low <= spans[version][1] and high >= spans[version][0] and kind not in allow:
            raise AddressError(
                f"address-{kind}", f"`{text}` covers {kind} addresses", f"say `allow: [{kind}]` at this entry if it is meant"
            )
    if version == 6 and low <= _MAPPED[1] and high >= _MAPPED[0] and high - low < 1 << 120:
        raise AddressError("address-mapped", f"`{text}` holds IPv4 addresses in IPv6 clothes", "write them as IPv4")
    return entry


def _ends() -> Iterator[tuple[str, tuple[int, int]]]:
    """What may stand behind the third dot: by text, the octet and the mask of the bits that have to be clear."""
    yield from ((text, (octet, 0)) for text, octet in _OCTETS.items())
    for length in range(8, 33):
        size = 1 << (32 - length)
        yield from ((f"{octet}/{length}", (octet, size - 1)) for octet in range(0, 256, min(size, 256)))


_FIRST = {text: n << 24 for text, n in _OCTETS.items() if text not in _SPECIAL}
_SECOND = {text: n << 16 for text, n in _OCTETS.items()}
_THIRD = {text: n << 8 for text, n in _OCTETS.items()}
_LAST_PART = dict(_ends())


def parse_plain(text: str) -> Range | None:
    """The range of an ordinary IPv4 address or prefix, or None for everything that `parse_entry` has to look at.

    List files hold 100,000 of these and little else, and this is four times as fast.
    """
    try:
        a, b, c, rest = text.split(".")
        octet, mask = _LAST_PART[rest]
        low = _FIRST[a] | _SECOND[b] | _THIRD[c] | octet
    except (ValueError, KeyError):
        return None
    return None if low & mask else (low, low | mask)


def _parse_any(text: str) -> Entry:
    if "-" in text:
        return _parse_range(text)
    if "/" in text:
        return _parse_prefix(text)
    if text[-1:] in "xX*" and text.count(".") == 3:
        return _parse_wildcard(text)
    version, value = parse_address(text)
    return Entry(version, (value, value))


def parse_address(text: str) -> tuple[int, int]:
    """One address as ``(version, integer)``.

    Raises:
        AddressError: not an address. Leading zeros are refused, programs disagree whether they mean octal.
    """
    try:
        a, b, c, d = text.split(".")
        return 4, _OCTETS[a] << 24 | _OCTETS[b] << 16 | _OCTETS[c] << 8 | _OCTETS[d]
    except (ValueError, KeyError):
        pass
    if ":" in text and "%" not in text and len(text) < 50:
        try:
            return 6, int(ipaddress.IPv6Address(text))
        except ValueError:
            pass
    raise _no_address(text)


def _no_address(text: str) -> AddressError:
    shown = text if len(text) <= 60 else text[:57] + "..."
    if "-" in text and text.partition("-")[0].strip().count(".") == 3 and text.partition("-")[0].replace(".", "").strip().isdigit():
        return AddressError("address", f"`{shown}` is not a range", "write both ends whole: 192.0.2.1-192.0.2.9")
    if text.count(".") == 3 and set(text.lower()) <= set("0123456789.x*") and set(text.lower()) & set("x*"):
        return AddressError("address", f"`{shown}` has its wildcard in the wrong place", "write a.b.c.x or a.b.x.x")
    if text.count(":") == 1 and text.count(".") == 3:
        return AddressError("address", f"`{shown}` names a port", "write the address alone")
    if "%" in text:
        return AddressError("address", f"`{shown}` names an interface", "write the address without `%`")
    if text.lower() in ("any", "all", "anywhere", "everyone", "*"):
        return AddressError("address", f"`{shown}` is not an address", "write `from: anywhere` at the service")
    if not text.replace(".", "").isdigit() and "." in text and text.replace(".", "").replace("-", "").isalnum():
        return AddressError(
            "address-name", f"`{shown}` is a name, not an address", "names are not looked up: write the addresses it stands for"
        )
    if text.count(".") == 3 and text.replace(".", "").isdigit():
        return AddressError("address", f"`{shown}` is not an IPv4 address", "each part is 0 to 255, without leading zeros")
    return AddressError("address", f"`{shown}` is not an address", "write 192.0.2.1, 192.0.2.0/24, 192.0.2.1-192.0.2.9 or 2001:db8::/32")


def _parse_prefix(text: str) -> Entry:
    address, _, length_text = text.partition("/")
    version, value = parse_address(address)
    bits = BITS[version]
    length = int(length_text) if length_text.isascii() and length_text.isdigit() and len(length_text) <= 3 else -1
    if not 0 <= length <= bits or (len(length_text) > 1 and length_text[0] == "0"):
        raise AddressError("address", f"`{text[:60]}` has no valid prefix length", f"write /0 to /{bits}, not a netmask")
    size = 1 << (bits - length)
    low = value & -size
    entry = (low, low + size - 1)
    return Entry(version, entry, prefix_text(version, low, length) if low != value else "")


def _parse_range(text: str) -> Entry:
    left, _, right = text.partition("-")
    try:
        (va, low), (vb, high) = parse_address(left.strip()), parse_address(right.strip())
    except AddressError:
        raise _no_address(text) from None
    if va != vb:
        raise AddressError("address-family", f"`{text}` starts in one family and ends in the other")
    if high < low:
        raise AddressError(
            "range-order", f"range ends ({right.strip()}) before it starts ({left.strip()})", "write the lower address first"
        )
    return Entry(va, (low, high))


def _parse_wildcard(text: str) -> Entry:
    parts = text.split(".")
    fixed = [p for p in parts if p not in ("x", "X", "*")]
    if parts[: len(fixed)] != fixed or not fixed:
        raise AddressError("address", f"`{text}` has its wildcard in the wrong place", "write a.b.c.x or a.b.x.x")
    length = 8 * len(fixed)
    return _parse_prefix(".".join(fixed + ["0"] * (4 - len(fixed))) + f"/{length}")


def is_merged(ranges: Sequence[Range]) -> bool:
    """True for ranges in canonical form: ascending, apart by at least one address."""
    return isinstance(ranges, Merged) or _are_merged(ranges)


def _are_merged(ranges: Sequence[Range]) -> bool:
    lows = [low for low, _ in ranges]
    behind = [high + 1 for _, high in ranges]
    # One call for all of it: a set has 100,000 of them.
    return all(map(gt, behind, lows)) and all(map(gt, lows[1:], behind))
