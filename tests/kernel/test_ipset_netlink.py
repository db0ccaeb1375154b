"""Raw netlink against the kernel's ipsets, with the `ipset` program as the second opinion."""

from __future__ import annotations

import ipaddress
import random
import re
import subprocess
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fwcompiler.addresses import BITS, LAST, Ranges, merged, subtract
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import ipset
from fwcompiler.kernel.netns import scratch

pytestmark = pytest.mark.skipif(subprocess.run(("unshare", "-n", "true"), check=False).returncode != 0, reason="needs root")

FAMILY = {4: "inet", 6: "inet6"}


@pytest.fixture(scope="module", autouse=True)
def namespace() -> Iterator[None]:
    """A fresh network namespace for this file; gone afterwards."""
    with scratch() as fresh, fresh.entered():
        yield


@pytest.fixture(autouse=True)
def clean(namespace: None) -> None:  # noqa: ARG001 - inside the namespace, never outside
    """No set of an earlier test."""
    run("destroy")


def run(*words: str) -> str:
    """Run the `ipset` program; it must not fail."""
    return subprocess.run(("ipset", *words), capture_output=True, text=True, check=True).stdout


def create(name: str, version: int, *more: str) -> None:
    """A set for networks."""
    run("create", name, "hash:net", "family", FAMILY[version], *more)


def shown(name: str) -> Ranges:
    """What the `ipset` program lists, merged."""
    networks = [ipaddress.ip_network(line.split()[2]) for line in run("save", name).splitlines() if line.startswith("add")]
    return merged((int(n[0]), int(n[-1])) for n in networks)


def spans(version: int) -> st.SearchStrategy[Ranges]:
    """Ranges of all sizes, many of them near each other and near the borders of the family."""
    start = st.one_of(st.integers(0, 600), st.integers(LAST[version] - 600, LAST[version]), st.integers(0, LAST[version]))
    length = st.one_of(st.integers(0, 300), st.integers(0, BITS[version] - 4).map(lambda n: 1 << n))
    one = st.tuples(start, length).map(lambda p: (p[0], min(p[0] + p[1], LAST[version])))
    return st.lists(one, max_size=12).map(merged)


@pytest.mark.parametrize("version", [4, 6])
def test_law_of_change(version: int) -> None:
    """For all sets: what is read is what was there, less what was taken out, plus what was put in; ipset shows the same."""

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(spans(version), spans(version), spans(version))
    def law(first: Ranges, add: Ranges, remove: Ranges) -> None:
        create("law", version)
        try:
            ipset.change("law", version, first)
            assert ipset.read("law") == first == shown("law")
            ipset.change("law", version, add, remove)
            assert ipset.read("law") == merged((*subtract(first, remove), *add)) == shown("law")
        finally:
            run("destroy", "law")

    law()


@pytest.mark.parametrize("version", [4, 6])
def test_everyone(version: int) -> None:
    """A whole family, which hash:net cannot hold as /0, is held as its two halves."""
    create("all", version)
    ipset.change("all", version, ((0, LAST[version]),))

    assert ipset.read("all") == ((0, LAST[version]),)
    assert len(re.findall("^add .*/1$", run("save", "all"), re.M)) == 2


def test_part_of_a_prefix() -> None:
    """One address taken out of a stored /24 leaves the other 255, in the fewest prefixes."""
    create("part", 4)
    run("add", "part", "10.0.0.0/24")
    ipset.change("part", 4, (), ((0x0A000005, 0x0A000005),))

    assert ipset.read("part") == ((0x0A000000, 0x0A000004), (0x0A000006, 0x0A0000FF))
    assert run("save", "part").count("\nadd ") == 8


@pytest.mark.parametrize("other", ["10.0.0.0/16", "10.0.0.40", "10.0.0.0/25", "10.0.0.128/25"])
def test_prefix_beside_others_by_hand(other: str) -> None:
    """A /24 that is taken out is out, also where somebody had put in a network around it or a part of it."""
    create("nested", 4)
    run("add", "nested", "10.0.0.0/24")
    run("add", "nested", other)
    whole = ipset.read("nested")
    ipset.change("nested", 4, ((0x0B000000, 0x0B000001),), ((0x0A000000, 0x0A0000FF),))

    assert ipset.read("nested") == (*subtract(whole, ((0x0A000000, 0x0A0000FF),)), (0x0B000000, 0x0B000001))


def test_absent_and_present() -> None:
    """Adding what is there and removing what is not is no error: the content is what was asked for."""
    create("twice", 4)
    for _ in range(2):
        ipset.change("twice", 4, ((16, 31),))
    ipset.change("twice", 4, (), ((64, 64),))

    assert ipset.read("twice") == ((16, 31),)


def test_exceptions_made_by_hand() -> None:
    """A `nomatch` entry is a hole in what is read, as it is for packets, and goes when the set changes."""
    create("holes", 4)
    run("add", "holes", "10.0.0.0/24")
    run("add", "holes", "10.0.0.16/28", "nomatch")
    run("add", "holes", "10.0.0.17")
    whole = (0x0A000000, 0x0A0000FF)

    assert ipset.read("holes") == ((whole[0], 0x0A00000F), (0x0A000011, 0x0A000011), (0x0A000020, whole[1]))
    ipset.change("holes", 4, (whole,), ((1, 1),))
    assert ipset.read("holes") == (whole,) == shown("holes")


@pytest.mark.parametrize("version", [4, 6])
def test_members(version: int) -> None:
    """Members of a dynamic set come with the seconds they have left, those without an end with None."""
    run("create", "dyn", "hash:ip", "family", FAMILY[version], "timeout", "600")
    ipset.add_members("dyn", version, [(9, 100), (7, None), (LAST[version] - 1, 65)])
    run("add", "dyn", "0.0.0.8" if version == 4 else "::8")
    got = dict(ipset.members("dyn"))

    assert sorted(got) == [7, 8, 9, LAST[version] - 1]
    assert got[7] is None
    assert [590 < (got[8] or 0) <= 600, 90 < (got[9] or 0) <= 100, 60 < (got[LAST[version] - 1] or 0) <= 65] == [True] * 3
    ipset.add_members("dyn", version, [(9, 500)])
    assert 490 < (dict(ipset.members("dyn"))[9] or 0) <= 500


@pytest.mark.parametrize("version", [4, 6])
def test_hundred_thousand(version: int) -> None:
    """100,000 networks of one family go in by many to the message and come out again, all of them, within seconds."""
    shift = 8 if version == 4 else 64
    picked = random.Random(version).sample(range(1 << 23), 100_000)
    many = merged((n << shift, (n << shift) + (1 << shift) - 1) for n in picked)
    create("big", version, "hashsize", "65536", "maxelem", "1000000")
    started = time.monotonic()
    ipset.change("big", version, many)
    ipset.change("big", version, ((LAST[version], LAST[version]),), (many[500],))

    assert ipset.read("big") == (*many[:500], *many[501:], (LAST[version], LAST[version]))
    assert time.monotonic() - started < 10
    assert f"Number of entries: {run('save', 'big').count(chr(10) + 'add ')}" in run("list", "-t", "big")


def test_refusals() -> None:
    """A set that is missing, of the other family or full is refused by its name and with the reason."""
    create("four", 4, "maxelem", "2")
    for text, name, version, add in (
        ("`nope`: No such file", "nope", 4, ((1, 1),)),
        ("`four`: it is of the other address family", "four", 6, ((1, 1),)),
        ("`four`: it is full", "four", 4, ((1, 1), (3, 3), (5, 5))),
    ):
        with pytest.raises(HostRefused, match=text):
            ipset.change(name, version, add)
    for reader in (ipset.read, ipset.members):
        with pytest.raises(HostRefused, match="`nope`"):
            reader("nope")


def test_nothing() -> None:
    """An empty set reads as empty, and an empty change asks nothing of the kernel."""
    create("empty", 6)
    ipset.change("empty", 6)

    assert ipset.read("empty") == ()
    assert ipset.members("empty") == ()
