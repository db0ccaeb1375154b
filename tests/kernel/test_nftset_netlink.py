"""Raw netlink against the kernel's nftables sets, with the `nft` program as the second opinion."""

from __future__ import annotations

import errno
import ipaddress
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fwcompiler.addresses import BITS, LAST, Ranges, covers, intersect, merged, subtract
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import netlink, nftset
from fwcompiler.kernel.netns import scratch
from fwcompiler.kernel.nftelements import Element, intervals

pytestmark = pytest.mark.skipif(subprocess.run(("unshare", "-n", "true"), check=False).returncode != 0, reason="needs root")

SET = {4: "v4", 6: "v6"}
DEFINITION = """\
table inet fwc
delete table inet fwc
table inet fwc {
    set v4 { type ipv4_addr; flags interval; }
    set v6 { type ipv6_addr; flags interval; }
    set other { type ipv4_addr; flags interval; }
    set d4 { type ipv4_addr; flags timeout; timeout 1h; size 4; }
    set d6 { type ipv6_addr; flags timeout; timeout 1h; }
}
"""
laws = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

BORDERS: dict[int, list[str]] = {
    4: [
        "10.0.0.0/24 | 192.0.2.1 | 0.0.0.0 | 255.255.255.255 | 0.0.0.0-255.255.255.255 | 0.0.0.1-255.255.255.254",
        "0.0.0.0/8, 255.255.255.0/24 | 0.0.0.0-10.1.2.3, 11.0.0.0-255.255.255.255 | 10.0.0.0/25, 10.0.0.129-10.0.0.200, 10.0.0.202",
    ],
    6: [
        "2001:db8::/32 | :: | ::1 | ::/1 | 8000::/1 | ::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff | 2001:db8::-2001:db8::5, 2001:db8::7, fe80::/10",
    ],
}
CASES = [(version, tuple(case.split(", "))) for version, rows in BORDERS.items() for row in rows for case in row.split(" | ")]


@pytest.fixture(scope="module", autouse=True)
def namespace() -> Iterator[None]:
    """A fresh network namespace for this file; gone afterwards."""
    with scratch() as fresh, fresh.entered():
        yield


@pytest.fixture(autouse=True)
def clean(namespace: None) -> None:  # noqa: ARG001 - inside the namespace, never outside
    """Empty sets for every test."""
    define()


def define() -> None:
    """Table `inet fwc` with empty sets, whatever was there."""
    nft("-f", "-", text=DEFINITION)


def nft(*words: str, text: str = "") -> str:
    """Run the `nft` program; it must not fail."""
    done = subprocess.run(("nft", *words), input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fill(name: str, texts: tuple[str, ...]) -> None:
    """Let nft add elements."""
    nft("-f", "-", text=f"add element inet fwc {name} {{ {', '.join(texts)} }}\n")


def dumped(name: str) -> str:
    """The set's elements as the kernel has them, ends and user data included."""
    return nft("--debug=netlink", "list", "set", "inet", "fwc", name)


def listed(name: str) -> Ranges:
    """What `nft -j` lists, interval by interval."""
    items: list[dict[str, Any]] = json.loads(nft("-j", "list", "set", "inet", "fwc", name))["nftables"]
    [found] = [item["set"] for item in items if "set" in item]
    return tuple(sorted(_span(entry) for entry in found.get("elem", [])))


def _span(entry: Any) -> tuple[int, int]:
    if isinstance(entry, str):
        return (number(entry), number(entry))
    if "range" in entry:
        return (number(entry["range"][0]), number(entry["range"][1]))
    network = ipaddress.ip_network(f"{entry['prefix']['addr']}/{entry['prefix']['len']}")
    return (int(network[0]), int(network[-1]))


def number(text: str) -> int:
    """An address as an integer."""
    return int(ipaddress.ip_address(text))


def spans(*texts: str) -> Ranges:
    """Ranges of texts such as `10.0.0.0/24`, `::1` and `a-b`."""
    out = []
    for text in texts:
        if "-" in text:
            low, high = text.split("-")
            out.append((number(low), number(high)))
        else:
            network = ipaddress.ip_network(text)
            out.append((int(network[0]), int(network[-1])))
    return merged(out)


def random_spans(version: int) -> st.SearchStrategy[Ranges]:
    """Ranges of all sizes, many of them near each other and near the borders of the family."""
    last = LAST[version]
    start = st.one_of(st.integers(0, 60), st.integers(last - 60, last), st.integers(0, last))
    length = st.one_of(st.integers(0, 30), st.integers(0, BITS[version] - 4).map(lambda n: 1 << n))
    one = st.tuples(start, length).map(lambda p: (p[0], min(p[0] + p[1], last)))
    return st.lists(one, max_size=12).map(merged)


def many(count: int, seed: int = 1) -> Ranges:
    """That many IPv4 ranges that neither overlap nor touch."""
    rnd = random.Random(seed)
    return tuple((n * 16, n * 16 + rnd.randrange(9)) for n in sorted(rnd.sample(range(1, 1 << 27), count)))


@pytest.mark.parametrize(("version", "texts"), CASES)
def test_same_as_nft(version: int, texts: tuple[str, ...]) -> None:
    """A set filled by netlink holds the same elements, ends and user data as one that `nft -f` filled."""
    fill(SET[version], texts)
    expected = dumped(SET[version])
    define()

    nftset.change(SET[version], version, spans(*texts), ())

    assert expected == dumped(SET[version])
    assert spans(*texts) == nftset.read(SET[version], version)


@pytest.mark.parametrize(("version", "texts"), CASES)
def test_nft_goes_on(version: int, texts: tuple[str, ...]) -> None:
    """What netlink added nft can delete and add again, and the other way round."""
    name = SET[version]
    nftset.change(name, version, spans(*texts), ())

    nft("delete", "element", "inet", "fwc", name, f"{{ {texts[-1]} }}")
    assert spans(*texts[:-1]) == nftset.read(name, version)
    fill(name, texts[-1:])
    nftset.change(name, version, (), spans(*texts))

    assert () == nftset.read(name, version) == listed(name)


@pytest.mark.parametrize("version", [4, 6])
def test_law_of_read(version: int) -> None:
    """For all sets: what was put in is what is read, and what nft lists."""

    @laws
    @given(random_spans(version))
    def law(ranges: Ranges) -> None:
        define()
        nftset.change(SET[version], version, ranges, ())

        assert ranges == nftset.read(SET[version], version) == listed(SET[version])

    law()


@pytest.mark.parametrize("version", [4, 6])
def test_law_of_delta(version: int) -> None:
    """For all pairs of sets: the delta of whole intervals takes the kernel from the one to exactly the other."""

    @laws
    @given(st.lists(random_spans(version), min_size=2, max_size=6))
    def law(states: list[Ranges]) -> None:
        nftset.replace(SET[version], version, states[0])
        for old, new in pairwise(states):
            add, remove = nftset.delta(old, new)
            nftset.change(SET[version], version, add, remove)

            assert new == nftset.read(SET[version], version)

    law()


@pytest.mark.parametrize("version", [4, 6])
def test_law_of_change(version: int) -> None:
    """For all sets and changes, whole intervals or not: done exactly, or refused with nothing changed."""

    @laws
    @given(random_spans(version), random_spans(version), random_spans(version), st.booleans())
    def law(old: Ranges, add: Ranges, remove: Ranges, inside: bool) -> None:
        name = SET[version]
        remove = intersect(remove, old) if inside else remove
        rest = subtract(old, remove)
        nftset.replace(name, version, old)
        before = nftset.generation()
        if subtract(remove, old) or intersect(rest, add):
            with pytest.raises(HostRefused, match="nothing was changed"):
                nftset.change(name, version, add, remove)
            assert (old, before) == (nftset.read(name, version), nftset.generation())
        else:
            nftset.change(name, version, add, remove)
            assert merged((*rest, *add)) == nftset.read(name, version)

    law()


@pytest.mark.parametrize("version", [4, 6])
def test_law_of_lookup(version: int) -> None:
    """For all sets: a look-up at and next to every border agrees with the ranges."""

    @laws
    @given(random_spans(version))
    def law(ranges: Ranges) -> None:
        nftset.replace(SET[version], version, ranges)
        near = {0, LAST[version], *(x for low, high in ranges for x in (low - 1, low, high, high + 1))}
        for address in sorted(x for x in near if 0 <= x <= LAST[version]):
            assert covers(ranges, address) == nftset.lookup(SET[version], version, address)

    law()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("10.0.0.0/24",), ("10.0.0.0/23",)),
        (("10.0.0.0/23",), ("10.0.0.0/25",)),
        (("10.0.0.0-10.0.0.9",), ("10.0.0.1-10.0.0.10",)),
        (("10.0.0.1-10.0.0.10",), ("10.0.0.0-10.0.0.9",)),
        (("10.0.0.0/24",), ("10.0.1.0/24",)),
        (("10.0.0.0/25", "10.0.1.0/24"), ("10.0.0.0/23",)),
        (("10.0.0.0/23",), ("10.0.0.0/25", "10.0.1.0/24")),
        (("224.0.0.0/3",), ("224.0.0.0-255.255.255.254",)),
        (("224.0.0.0-255.255.255.254",), ("224.0.0.0/3",)),
        (("240.0.0.0/4",), ("224.0.0.0/3",)),
        (("224.0.0.0/3",), ("240.0.0.0/4",)),
        (("0.0.0.0/0",), ("0.0.0.0/1",)),
        (("0.0.0.0/8",), ("0.0.0.1-0.255.255.255",)),
        (("0.0.0.1-0.255.255.255",), ("0.0.0.0/8",)),
    ],
)
def test_growing_and_shrinking(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    """Intervals that grow, shrink, move, split, join or gain an end are replaced within one transaction."""
    nftset.change("v4", 4, spans(*old), ())
    before = nftset.generation()

    nftset.change("v4", 4, *nftset.delta(spans(*old), spans(*new)), generation=before)

    assert spans(*new) == nftset.read("v4", 4) == listed("v4")
    assert before + 1 == nftset.generation()


def test_touching_intervals_of_others() -> None:
    """Removing what reads as one range but is several intervals leaves nothing behind, least of all an open start."""
    fill("v4", ("10.0.0.0/25", "10.0.0.128/25", "10.0.1.0/24"))
    assert spans("10.0.0.0/23") == nftset.read("v4", 4)

    nftset.change("v4", 4, spans("10.0.0.0/24"), spans("10.0.0.0/23"))

    assert spans("10.0.0.0/24") == nftset.read("v4", 4) == listed("v4")


@pytest.mark.parametrize(
    ("old", "add", "remove", "reason"),
    [
        (("10.0.0.0/24",), (), ("10.0.0.0/23",), "10.0.1.0/24 is not in it"),
        (("10.0.0.0/24", "10.0.2.0/24"), (), ("10.0.0.0-10.0.2.255",), "10.0.1.0/24 is not in it"),
        (("10.0.0.0/24",), (), ("10.0.0.0-255.255.255.255",), "10.0.1.0-255.255.255.255 is not in it"),
        (("10.0.0.0/24",), ("10.0.0.0/24",), (), "10.0.0.0/24 is in it already"),
        (("10.0.0.0/24", "10.0.2.0/24"), ("10.0.0.0-10.0.2.255",), (), "10.0.0.0/24 is in it already"),
        (("10.0.0.0/24",), ("0.0.0.0/0",), (), "10.0.0.0/24 is in it already"),
        (("224.0.0.0/3",), ("10.0.0.0-255.255.255.254",), (), "224.0.0.0-255.255.255.254 is in it already"),
    ],
)
def test_bad_change(old: tuple[str, ...], add: tuple[str, ...], remove: tuple[str, ...], reason: str) -> None:
    """A change that does not fit the set is refused with the addresses in question, also where the kernel would take it."""
    nftset.change("v4", 4, spans(*old), ())
    before = dumped("v4")

    with pytest.raises(HostRefused) as caught:
        nftset.change("v4", 4, spans(*add), spans(*remove))

    assert f"cannot change set `v4` of table inet fwc: {reason}; nothing was changed" == caught.value.message
    assert before == dumped("v4")


def test_many_sets_at_once() -> None:
    """Several sets change in one transaction, or none does."""
    before = nftset.generation()
    nftset.change_many([("v4", 4, spans("10.0.0.0/8"), ()), ("v6", 6, spans("2001:db8::/32"), ()), ("other", 4, (), ())])
    assert before + 1 == nftset.generation()

    with pytest.raises(HostRefused, match=r"set `v6`.*2001:db9::/32 is not in it"):
        nftset.change_many([("v4", 4, spans("11.1.0.0/16"), ()), ("v6", 6, (), spans("2001:db9::/32"))])

    assert (spans("10.0.0.0/8"), spans("2001:db8::/32")) == (nftset.read("v4", 4), nftset.read("v6", 6))


def test_replace() -> None:
    """A replaced set holds the new ranges alone, whatever it held, after one transaction."""
    fill("v4", ("10.0.0.0/25", "10.0.0.128/25", "0.0.0.0"))
    before = nftset.generation()

    nftset.replace("v4", 4, spans("10.0.0.0/26", "224.0.0.0/3"))

    assert spans("10.0.0.0/26", "224.0.0.0/3") == nftset.read("v4", 4) == listed("v4")
    assert before + 1 == nftset.generation()


def test_stale_generation() -> None:
    """A guarded change is refused once somebody else changed the ruleset, and nothing changes."""
    seen = nftset.generation()
    fill("other", ("192.0.2.1",))

    calls: tuple[Callable[[], None], ...] = (
        lambda: nftset.change("v4", 4, spans("10.0.0.0/8"), (), generation=seen),
        lambda: nftset.change("v4", 4, (), (), generation=seen),
        lambda: nftset.replace("v4", 4, spans("10.0.0.0/8"), generation=seen),
    )
    for call in calls:
        with pytest.raises(nftset.StaleGeneration, match="changed by someone else"):
            call()

    assert nftset.read("v4", 4) == ()
    nftset.change("v4", 4, spans("10.0.0.0/8"), (), generation=nftset.generation())
    assert spans("10.0.0.0/8") == nftset.read("v4", 4)


def test_kernel_refuses_stale_batch() -> None:
    """The kernel itself refuses a batch with an old generation: the guard holds to the last moment."""
    batch = netlink.Batch(10, 1, nftset.generation() - 1)
    batch.add(14, 0, netlink.string(1, "fwc"), netlink.string(2, "v4"))

    with netlink.Channel() as channel, pytest.raises(netlink.StaleGeneration) as caught:
        channel.transact(batch)

    assert caught.value.errno == errno.ERESTART


def test_others_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a guard of the caller's, a change that collides with another transaction is done again."""
    original, left = nftset._fits, [1, 2]

    def interrupting(*arguments: Any) -> bool:
        if left:
            fill("other", (f"192.0.2.{left.pop()}",))
        return original(*arguments)

    monkeypatch.setattr(nftset, "_fits", interrupting)
    nftset.change("v4", 4, spans("10.0.0.0/8"), ())

    assert ([], spans("10.0.0.0/8")) == (left, nftset.read("v4", 4))


def test_missing_set() -> None:
    """A set that is not there is named as such by every function."""
    one = spans("192.0.2.1")
    calls: tuple[Callable[[], object], ...] = (
        lambda: nftset.change("nope", 4, one, ()),
        lambda: nftset.change("nope", 4, (), one),
        lambda: nftset.replace("nope", 4, one),
        lambda: nftset.read("nope", 4),
        lambda: nftset.lookup("nope", 4, 1),
        lambda: nftset.members("nope", 4),
        lambda: nftset.add_member("nope", 4, 1, 1000),
        lambda: nftset.remove_member("nope", 4, 1),
    )
    for call in calls:
        with pytest.raises(HostRefused, match="there is no set `nope` of table inet fwc"):
            call()
    with pytest.raises(HostRefused, match="there is no set `v4` of table inet elsewhere"):
        nftset.read("v4", 4, table="elsewhere")


def test_wrong_family() -> None:
    """Addresses of the other family are refused with the kernel's reason, and never misread."""
    with pytest.raises(HostRefused, match=r"set `v6` of table inet fwc.*Invalid argument \(EINVAL\); nothing was changed"):
        nftset.change("v6", 4, spans("192.0.2.1"), ())
    nftset.change("v4", 4, spans("192.0.2.1"), ())
    with pytest.raises(HostRefused, match="should hold IPv6"):
        nftset.read("v4", 6)


def test_hundred_thousand() -> None:
    """100,000 intervals go in and change by hundreds as one transaction each, in well under the time nft takes."""
    ranges, extra = many(100_000), tuple((low + 12, low + 12) for low, _ in many(100_000)[::1000])
    began = time.monotonic()
    nftset.change("v4", 4, ranges, ())
    nftset.change("v4", 4, extra, ranges[:5000])
    took = time.monotonic() - began

    assert merged((*ranges[5000:], *extra)) == nftset.read("v4", 4)
    assert nftset.lookup("v4", 4, extra[50][0])
    assert not nftset.lookup("v4", 4, ranges[4999][0])
    assert took < 5


def test_members() -> None:
    """Members are listed with the time they have left; permanent sets have none."""
    nftset.add_member("d4", 4, number("192.0.2.2"), 60_000)
    nftset.add_member("d4", 4, number("192.0.2.1"))
    nftset.add_member("d6", 6, number("2001:db8::1"), 5_000)

    [(first, default), (second, minute)] = nftset.members("d4", 4)
    [(third, short)] = nftset.members("d6", 6)

    assert [str(ipaddress.ip_address(a)) for a in (first, second, third)] == ["192.0.2.1", "192.0.2.2", "2001:db8::1"]
    assert 3_590_000 < (default or 0) <= 3_600_000
    assert 50_000 < (minute or 0) <= 60_000
    assert 0 < (short or 0) <= 5_000


def test_member_is_refreshed() -> None:
    """Adding a member again gives it the new time, longer or shorter, also in a set that is full."""
    nftset.add_members("d4", 4, [(n, 60_000) for n in range(1, 5)])

    nftset.add_member("d4", 4, 1, 600_000)
    nftset.add_member("d4", 4, 2, 9_000)

    left = {address: expires or 0 for address, expires in nftset.members("d4", 4)}
    assert 500_000 < left[1] <= 600_000
    assert left[2] <= 9_000
    assert 50_000 < left[3] <= 60_000


def test_full_set() -> None:
    """One member too many is refused, with nothing changed."""
    nftset.add_members("d4", 4, [(n, 60_000) for n in range(1, 4)])

    with pytest.raises(HostRefused, match=r"set `d4`.*the set is full; nothing was changed"):
        nftset.add_members("d4", 4, [(8, 1000), (9, 1000)])

    assert [address for address, _ in nftset.members("d4", 4)] == [1, 2, 3]


def test_member_is_removed() -> None:
    """Removing says whether the address was a member."""
    nftset.add_member("d4", 4, 7, 60_000)

    assert nftset.lookup("d4", 4, 7)
    assert nftset.remove_member("d4", 4, 7)
    assert not nftset.remove_member("d4", 4, 7)
    assert not nftset.lookup("d4", 4, 7)


def test_member_expires() -> None:
    """A member is gone when its time is over, and can come back."""
    nftset.add_member("d4", 4, 7, 100)
    time.sleep(0.2)

    assert nftset.members("d4", 4) == ()
    nftset.add_member("d4", 4, 7, 60_000)
    assert nftset.lookup("d4", 4, 7)


def test_member_without_time_left() -> None:
    """A time that is over does not make a permanent member."""
    nftset.add_members("d4", 4, [(7, 0), (8, -5), (9, 60_000)])

    assert [address for address, _ in nftset.members("d4", 4)] == [9]


def test_lost_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction whose answer got lost is reported as such, and not tried a second time."""
    monkeypatch.setattr(netlink.Channel, "_queued", lambda _: iter(()))

    with pytest.raises(netlink.Unacknowledged):
        nftset.change("v4", 4, spans("10.0.0.0/8"), ())

    assert nftset.read("v4", 4) == spans("10.0.0.0/8")


def test_many_members() -> None:
    """Thousands of members are put back as one transaction."""
    before = nftset.generation()
    nftset.add_members("d6", 6, [(n, 60_000) for n in range(4096)])

    assert list(range(4096)) == [address for address, _ in nftset.members("d6", 6)]
    assert before + 1 == nftset.generation()


def test_elements_in_any_order() -> None:
    """Kernels list elements ascending or descending; touching intervals stay apart, the null element is no interval."""
    elements = [Element(0, True), Element(1, False), Element(5, True), Element(5, False), Element(9, True), Element(200, False)]

    for order in (elements, elements[::-1]):
        assert intervals(order, 255) == ((1, 4), (5, 8), (200, 255))
