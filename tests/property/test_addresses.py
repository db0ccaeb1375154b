"""Laws of address sets and of their texts."""

from __future__ import annotations

import ipaddress
import json

from hypothesis import given
from hypothesis import strategies as st
from property.strategies import LAW, address_sets, spans, values

from fwcompiler.addresses import (
    BITS,
    EVERYONE,
    LAST,
    NOBODY,
    AddressError,
    Addresses,
    Entry,
    Range,
    address_text,
    covers,
    includes,
    intersect,
    is_merged,
    merged,
    parse_address,
    parse_entry,
    parse_plain,
    prefixes,
    range_text,
    subtract,
)
from fwcompiler.contents import difference, packed, unpacked
from fwcompiler.proof.classes import classes_of


def read(text: str) -> Entry | str:
    """The entry that a text stands for, or the code of its refusal."""
    try:
        return parse_entry(text, ("everyone", "loopback", "multicast"))
    except AddressError as error:
        return error.code


A = address_sets()
NEVER = ("address-unspecified", "address-mapped")
"""Kinds that no `allow` lets pass."""
both_families = st.sampled_from((4, 6))


@LAW
@given(A, A, A)
def test_union_and_intersection_are_an_algebra(a: Addresses, b: Addresses, c: Addresses) -> None:
    """Commutative, associative, idempotent, absorbing, distributive; nobody and everyone are the neutral elements."""
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert a | a == a & a == a == a | NOBODY == a & EVERYONE
    assert a | (a & b) == a & (a | b) == a
    assert a & (b | c) == (a & b) | (a & c)
    assert a | EVERYONE == EVERYONE
    assert a & NOBODY == NOBODY


@LAW
@given(A, A)
def test_difference(a: Addresses, b: Addresses) -> None:
    """What is taken away is gone, what is left was there, and De Morgan holds with everyone as the whole."""
    assert (a - b) & b == NOBODY
    assert (a - b) | (a & b) == a
    assert a - b == a & (EVERYONE - b)
    assert EVERYONE - (EVERYONE - a) == a
    assert EVERYONE - (a | b) == (EVERYONE - a) & (EVERYONE - b)
    assert EVERYONE - (a & b) == (EVERYONE - a) | (EVERYONE - b)


@LAW
@given(A, A)
def test_results_are_canonical(a: Addresses, b: Addresses) -> None:
    """Every result is merged, so that equal sets are equal values; sizes add up."""
    for each in (a, a | b, a & b, a - b):
        assert is_merged(each.v4)
        assert is_merged(each.v6)
        assert bool(each) == (each.size > 0)
    assert (a | b).size + (a & b).size == a.size + b.size


@LAW
@given(A, A, both_families, st.data())
def test_membership(a: Addresses, b: Addresses, version: int, data: st.DataObject) -> None:
    """An address is in a result exactly where logic says so, at borders above all."""
    borders = [e for s in (a, b) for low, high in s.family(version) for e in (low - 1, low, high, high + 1) if 0 <= e <= LAST[version]]
    key = version, data.draw(st.sampled_from(borders) if borders else values(version))

    assert (key in a | b) == (key in a or key in b)
    assert (key in a & b) == (key in a and key in b)
    assert (key in a - b) == (key in a and key not in b)


@LAW
@given(both_families, st.data())
def test_merging(version: int, data: st.DataObject) -> None:
    """Merging keeps exactly the addresses, whatever the order and however often."""
    ranges = data.draw(st.lists(spans(version), max_size=8))
    probe = data.draw(values(version))

    once = merged(ranges)

    assert merged(once) == once == merged(reversed(ranges))
    assert covers(once, probe) == any(low <= probe <= high for low, high in ranges)


@LAW
@given(both_families, st.data())
def test_prefixes_cover_exactly_with_the_fewest(version: int, data: st.DataObject) -> None:
    """The prefixes of a range are those of the standard library, which are known to be the fewest."""
    low, high = data.draw(spans(version))
    kind = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address

    found = list(prefixes(version, ((low, high),)))

    known = list(ipaddress.summarize_address_range(kind(low), kind(high)))
    assert found == [(int(n.network_address), n.prefixlen) for n in known]
    assert merged((n, n + (1 << (BITS[version] - length)) - 1) for n, length in found) == ((low, high),)


@LAW
@given(both_families, st.data())
def test_texts_read_back(version: int, data: st.DataObject) -> None:
    """An address and a range print as text that reads as the same, and as the standard library prints it."""
    low, high = data.draw(spans(version))
    text = address_text(version, low)

    assert parse_address(text) == (version, low)
    assert text == str(ipaddress.IPv4Address(low) if version == 4 else ipaddress.IPv6Address(low))
    entry = read(range_text(version, (low, high)))
    assert entry in NEVER or entry == Entry(version, (low, high))


@LAW
@given(A)
def test_a_set_reads_back_from_its_texts(a: Addresses) -> None:
    """`texts` is the canonical form: one text a range, and together they are the set."""
    found = [read(text) for text in a.texts()]

    assert len(found) == len(a)
    spans_read: dict[int, list[Range]] = {4: [], 6: []}
    for text, entry in zip(a.texts(), found, strict=True):
        if isinstance(entry, str):
            assert entry in NEVER, text
            return
        spans_read[entry.version].append(entry.span)
    assert Addresses.of(spans_read[4], spans_read[6]) == a


octets = st.integers(0, 260).map(str) | st.sampled_from(("00", "01", "0x1", "", "1 ", "٣"))
plain_like = st.builds(
    lambda parts, length: ".".join(parts) + length,
    st.lists(octets, min_size=3, max_size=5),
    st.sampled_from(("", "/", "/0", "/7", "/8", "/08", "/24", "/31", "/32", "/33", "/255.255.255.0", " ", "/24 ")),
)


@LAW
@given(plain_like | st.text("0123456789./ -", max_size=20))
def test_quick_reading_agrees(text: str) -> None:
    """Where the quick reader of list files answers, the careful one gives the same answer, without a refusal or a warning."""
    span = parse_plain(text)

    if span is not None:
        entry = parse_entry(text)
        assert (entry.version, entry.span, entry.masked) == (4, span, "")


@LAW
@given(st.text(max_size=40) | plain_like | st.text("0123456789abcdef:.-/xX*%", max_size=45))
def test_reading_never_breaks(text: str) -> None:
    """Any text at all is either a range inside its family or refused with a known code."""
    entry = read(text)

    if isinstance(entry, str):
        assert entry.startswith(("address", "range-order"))
    else:
        low, high = entry.span
        assert 0 <= low <= high <= LAST[entry.version]


few_and_many = st.tuples(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 300)), max_size=4),
    st.integers(1, 12),
    st.integers(0, 9),
    st.integers(0, 400),
)


@LAW
@given(few_and_many)
def test_few_ranges_and_many(drawn: tuple[list[tuple[int, int]], int, int, int]) -> None:
    """A few ranges beside hundreds are searched for instead of walked past: what comes out is what counting every address gives."""
    stretches, gap, width, count = drawn
    few = merged((low, low + length) for low, length in stretches)
    many = merged((n * (gap + width + 1), n * (gap + width + 1) + width) for n in range(count))
    a, b = ({address for low, high in ranges for address in range(low, high + 1)} for ranges in (few, many))

    def ranges_of(addresses: set[int]) -> tuple[Range, ...]:
        return merged((address, address) for address in addresses)

    assert intersect(few, many) == intersect(many, few) == ranges_of(a & b)
    assert (subtract(few, many), subtract(many, few)) == (ranges_of(a - b), ranges_of(b - a))
    assert (includes(few, many), includes(many, few)) == (b <= a, a <= b)


@LAW
@given(st.lists(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 50)), max_size=3), max_size=4), st.integers(0, 3000))
def test_classes_of_one_large_set(stretches: list[list[tuple[int, int]]], count: int) -> None:
    """However large one set is, two numbers are of one class exactly where every set treats them alike."""
    large = merged((3 * n, 3 * n) for n in range(count))
    sets = [merged((low, low + length) for low, length in each) for each in stretches] + [large]

    found = classes_of(9999, sets)

    expected: dict[int, list[Range]] = {}
    for number in range(10_000):
        signature = sum(1 << i for i, ranges in enumerate(sets) if covers(ranges, number))
        expected.setdefault(signature, []).append((number, number))
    classes = dict(zip(found.signatures, found, strict=True))
    assert classes == {signature: merged(numbers) for signature, numbers in expected.items()}


@LAW
@given(A, A)
def test_change_of_contents(a: Addresses, b: Addresses) -> None:
    """What a content loses and gains on the way to another are whole entries, in order."""
    for version in BITS:
        before, after = a.family(version), b.family(version)
        remove, add = difference(before, after)
        assert (set(remove), set(add)) == (set(before) - set(after), set(after) - set(before))
        assert (list(remove), list(add)) == (sorted(remove), sorted(add))


@LAW
@given(A)
def test_packed(a: Addresses) -> None:
    """What is written down about a content is that content when it is read, also by way of JSON."""
    for version in BITS:
        assert unpacked(json.loads(json.dumps(packed(a.family(version))))) == a.family(version)


@LAW
@given(
    st.lists(st.tuples(st.integers(0, LAST[4] >> 4), st.integers(0, 40)), max_size=8), st.integers(1001, 1400), st.sampled_from((2, 3, 7))
)
def test_large_contents(drawn: list[tuple[int, int]], count: int, step: int) -> None:
    """Where there are many ranges faster ways are taken; they lead to the same."""
    many = [(n * step, n * step + 1) for n in range(count)]
    extra = [(low, low + length) for low, length in drawn]
    before, after = merged(many), merged([*reversed(many), *extra])

    joined: list[Range] = []
    for low, high in sorted([*many, *extra]):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    assert after == tuple(joined)
    remove, add = difference(before, after)
    assert (set(remove), set(add)) == (set(before) - set(after), set(after) - set(before))
    assert unpacked(packed(after)) == after
