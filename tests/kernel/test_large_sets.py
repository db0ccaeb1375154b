"""What is noticed of edits by hand in sets that are too large to be read at every turn, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.harness import BACKENDS, Host
from kernelspace import in_named

from fwcompiler.addresses import LAST, address_text
from fwcompiler.kernel import ipset, nftset
from fwcompiler.kernel import netns as namespaces
from fwcompiler.kernel.observe import READ_WHOLE, SAMPLES

COUNT = READ_WHOLE + 200
STEP = COUNT // SAMPLES
FIRST = 0x0B000000
FIVE = ((1, 1), (3, 3), (5, 5), (7, 7), (9, 9))
STRANGER = "198.51.100.7"
POLICY = """version: 1
groups:
  carriers: [{file: carriers.txt}]
services:
  sip: {from: [carriers]}
"""


def carrier(n: int) -> str:
    """The address of one carrier; none touches the next."""
    return address_text(4, FIRST + 2 * n)


@pytest.fixture(params=BACKENDS[:2])
def host(request: pytest.FixtureRequest, tmp_path: Path, netns: str) -> Host:
    """A host with more carriers than are read whole, with sets of either kind."""
    made = Host(tmp_path, netns, request.param)
    made.write("\n".join(map(carrier, range(COUNT))), "carriers.txt")
    made.apply(POLICY)
    return made


def edit(host: Host, verb: str, address: str) -> None:
    """Add or delete one element by hand."""
    if host.backend == "nftables":
        host.run("nft", verb, "element", "inet", "fwc", "carriers.v4", f"{{ {address} }}")
    else:
        host.run("ipset", {"add": "add", "delete": "del"}[verb], "fwc-carriers4", address)


def drifted(host: Host, *options: str) -> bool:
    """What `status` says."""
    return not host.fwc("status", "--json", *options).json["in_sync"]


def is_counted(host: Host) -> bool:
    """True where the kernel tells how many entries a set has: of ipsets always, of nftables sets since Linux 6.17."""
    with namespaces.named(host.netns).entered():
        return host.backend != "nftables" or not nftset.holds_as_many("carriers.v4", 4, ())


def test_one_entry_deleted(host: Host) -> None:
    """An entry that somebody took out is missed by its number, far from any sample; an apply puts it back."""
    edit(host, "delete", carrier(STEP + 5))
    if not is_counted(host):
        pytest.skip("this kernel does not count the entries of nftables sets")

    assert drifted(host)
    host.apply(POLICY)
    assert not drifted(host, "--full")


def test_swap_at_a_sample(host: Host) -> None:
    """An entry that somebody exchanged for another is noticed where one of the samples is it."""
    edit(host, "delete", carrier(STEP))
    edit(host, "add", STRANGER)

    assert drifted(host)


def test_swap_between_samples(host: Host) -> None:
    """An exchange beside all samples leaves the number as it was, and is seen only by who reads the set in full."""
    edit(host, "delete", carrier(STEP + 5))
    edit(host, "add", STRANGER)
    policy = host.write(POLICY)

    assert not drifted(host)
    assert drifted(host, "--full")
    assert "carriers.v4" in host.fwc("diff", policy).out.splitlines()[0]
    verified = host.fwc("verify", policy, *(("--full",) if host.backend == "nftables" else ()))
    assert (verified.code, STRANGER in verified.out) == (1, True)
    assert host.fwc("diff", policy, "--full").code == 1
    assert host.fwc("apply", policy, "--yes", "--full").code == 0
    assert not drifted(host, "--full")


@pytest.mark.parametrize("version", [4, 6])
def test_numbers_of_entries(netns: str, version: int) -> None:
    """A set has as many entries as its addresses take, wherever they begin and end; an ipset never passes for another size."""
    last, kind, family = LAST[version], {4: "ipv4_addr", 6: "ipv6_addr"}[version], {4: "inet", 6: "inet6"}[version]
    contents = [(), ((0, 5),), ((3, 3), (8, 23)), ((last - 4, last),), ((0, 0), (7, last)), ((0, last),)]
    in_named(netns, "nft", "add", "table", "inet", "fwc")
    for n, content in enumerate(contents):
        in_named(netns, "nft", f"add set inet fwc s{n} {{ type {kind}; flags interval; }}")
        in_named(netns, "ipset", "create", f"s{n}", "hash:net", "family", family)
        with namespaces.named(netns).entered():
            nftset.change(f"s{n}", version, content, ())
            ipset.change(f"s{n}", version, content)
            assert nftset.holds_as_many(f"s{n}", version, content)
            assert ipset.holds_as_many(f"s{n}", version, content)
            assert not ipset.holds_as_many(f"s{n}", version, FIVE)


def test_status_says_what_was_sampled(host: Host) -> None:
    """`status` names a set that it did not read whole, as `diff` and `verify` do; with --full it did."""
    sampled = [note for note in host.fwc("status", "--json").json["notes"] if "sampled" in note]
    assert sampled == ["sets too big to read were sampled, --full reads them: carriers.v4"]
    assert not [note for note in host.fwc("status", "--json", "--full").json["notes"] if "sampled" in note]
