"""Addresses in every form people write them, and which forms are refused with what advice."""

from __future__ import annotations

import pytest

from fwcompiler.addresses import (
    EVERYONE,
    LAST,
    NOBODY,
    AddressError,
    Addresses,
    address_text,
    merged,
    parse_entry,
    parse_plain,
    prefixes,
    range_text,
    subtract,
)

V6 = 0x20010DB8 << 96


@pytest.mark.parametrize(
    ("text", "version", "low", "high", "masked"),
    [
        ("192.0.2.1", 4, 0xC0000201, 0xC0000201, ""),
        ("192.0.2.0/24", 4, 0xC0000200, 0xC00002FF, ""),
        ("192.0.2.77/24", 4, 0xC0000200, 0xC00002FF, "192.0.2.0/24"),
        ("192.0.2.1/32", 4, 0xC0000201, 0xC0000201, ""),
        ("192.0.2.1-192.0.2.9", 4, 0xC0000201, 0xC0000209, ""),
        ("192.0.2.1 - 192.0.2.9", 4, 0xC0000201, 0xC0000209, ""),
        ("192.0.2.7-192.0.2.7", 4, 0xC0000207, 0xC0000207, ""),
        ("192.0.2.x", 4, 0xC0000200, 0xC00002FF, ""),
        ("192.0.*.*", 4, 0xC0000000, 0xC000FFFF, ""),
        ("2001:db8::1", 6, V6 + 1, V6 + 1, ""),
        ("2001:DB8:0:0::/32", 6, V6, V6 + (1 << 96) - 1, ""),
        ("2001:db8::5/64", 6, V6, V6 + (1 << 64) - 1, "2001:db8::/64"),
        ("2001:db8::1-2001:db8::ff", 6, V6 + 1, V6 + 255, ""),
        ("0.0.0.1", 4, 1, 1, ""),
        ("255.255.255.255", 4, LAST[4], LAST[4], ""),
    ],
)
def test_forms(text: str, version: int, low: int, high: int, masked: str) -> None:
    """Every documented form reads as its range; host bits are masked and said."""
    entry = parse_entry(text)

    assert (entry.version, entry.span, entry.masked) == (version, (low, high), masked)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "address"),
        ("192.0.2", "address"),
        ("192.0.2.256", "address"),
        ("192.0.2.01", "address"),
        ("192.0.2.1.1", "address"),
        ("192.0.2.0/33", "address"),
        ("192.0.2.0/-1", "address"),
        ("192.0.2.0/024", "address"),
        ("192.0.2.0/255.255.255.0", "address"),
        ("192.0.2.0/", "address"),
        ("/24", "address"),
        ("192.x.2.1", "address"),
        ("x.x.x.x", "address"),
        ("1:2:3", "address"),
        ("fe80::1%eth0", "address"),
        ("2001:db8::/129", "address"),
        ("any", "address"),
        ("sip.example.com", "address-name"),
        ("192.0.2.9-192.0.2.1", "range-order"),
        ("192.0.2.1-2001:db8::1", "address-family"),
        ("192.0.2.1-5", "address"),
        ("::ffff:192.0.2.1", "address-mapped"),
        ("0.0.0.0/0", "address-everyone"),
        ("::/0", "address-everyone"),
        ("0.0.0.0-255.255.255.255", "address-everyone"),
        ("0.0.0.0", "address-unspecified"),
        ("::", "address-unspecified"),
        ("127.0.0.1", "address-loopback"),
        ("::1", "address-loopback"),
        ("126.0.0.0/7", "address-loopback"),
        ("224.0.0.1", "address-multicast"),
        ("ff02::1", "address-multicast"),
        ("128.0.0.0/1", "address-multicast"),
    ],
)
def test_refused(text: str, code: str) -> None:
    """What is no address, or of a kind that is hardly meant, is refused with the code that says which."""
    with pytest.raises(AddressError) as caught:
        parse_entry(text)

    assert caught.value.code == code


@pytest.mark.parametrize(
    ("text", "kind"),
    [("0.0.0.0/0", "everyone"), ("::/0", "everyone"), ("127.0.0.1", "loopback"), ("::1", "loopback"), ("ff02::1", "multicast")],
)
def test_allowed_on_purpose(text: str, kind: str) -> None:
    """An entry that says so may be of a kind that is refused otherwise; only of that kind."""
    assert parse_entry(text, (kind,)).span
    with pytest.raises(AddressError):
        parse_entry(text, {"everyone", "loopback", "multicast"} - {kind})


@pytest.mark.parametrize("text", ["10.0.0.1/24", "0.0.0.0/8", "127.0.0.1", "224.0.0.1", "10.0.0.0/7", "10.0.0.1/", "10.0.0", "10.0.0.1 "])
def test_quick_reader_leaves_the_rest(text: str) -> None:
    """Whatever needs a warning or a refusal is not answered quickly."""
    assert parse_plain(text) is None


def test_merging() -> None:
    """Ranges that overlap or touch become one, also at the ends of the family."""
    assert merged([(5, 9), (1, 3), (4, 4), (20, 30), (25, 26)]) == ((1, 9), (20, 30))
    assert merged([(0, 0), (1, LAST[6])]) == ((0, LAST[6]),)
    assert merged([]) == ()


def test_subtraction_cuts_holes() -> None:
    """Several holes in one range, and one hole over several ranges."""
    assert subtract(((0, 99),), ((0, 9), (20, 29), (99, 200))) == ((10, 19), (30, 98))
    assert subtract(((0, 9), (20, 29)), ((5, 24),)) == ((0, 4), (25, 29))


def test_canonical_texts() -> None:
    """IPv4 first, ranges as prefixes where they are some, IPv6 as RFC 5952 has it."""
    assert Addresses.of([(1 << 24, (1 << 24) + 2)], [(V6, V6 + 65535)]).texts() == ("1.0.0.0-1.0.0.2", "2001:db8::/112")
    assert range_text(4, (0, LAST[4])) == "0.0.0.0/0"
    assert address_text(6, 0x2001_0DB8_0000_0000_0001_0000_0000_0001) == "2001:db8::1:0:0:1"


def test_the_whole_family_is_one_prefix() -> None:
    """Cutting a whole family into prefixes takes one step, not for ever."""
    assert list(prefixes(4, ((0, LAST[4]),))) == [(0, 0)]
    assert list(prefixes(6, ((1, LAST[6]),)))[-1] == (1 << 127, 1)


def test_sizes() -> None:
    """`len` counts ranges, `size` counts addresses; nobody is false."""
    assert (len(EVERYONE), EVERYONE.size) == (2, (1 << 32) + (1 << 128))
    assert (bool(NOBODY), bool(EVERYONE), (4, 7) in EVERYONE, (6, 7) in NOBODY) == (False, True, True, False)
