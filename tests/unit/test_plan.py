"""What an apply would do, worked out from two rulesets without a kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fwcompiler.backend import Command, Fill
from fwcompiler.plan import MAX_ELEMENTS_SHOWN, Plan, make_plan, set_changes, with_contents
from fwcompiler.proof.access import AccessChange
from fwcompiler.registry import load
from fwcompiler.ruleset import AddressSet, Chain, Final, Goto, Hook, InRanges, InSet, Interface, Match, PortIn, Rule, Ruleset, Unknown

ADMINS = AddressSet("admins.v4", 4, ((10, 19), (30, 30)))
MEMBERS = AddressSet("agents.dynamic.v4", 4, timeout=60, size=9)


def ruleset(*sets: AddressSet) -> Ruleset:
    """An input chain with one service for the first set."""
    service = Chain("service.ssh", (Rule((InSet("source", sets[0].name, 4),), Final.ACCEPT, "ssh"), Rule((), Final.DROP, "ssh")))
    base = Chain(
        "input", (Rule((PortIn("destination", "tcp", (22, 22)),), Goto("service.ssh")), Rule((), Final.DROP, "other")), Hook("input")
    )
    return Ruleset((service, base), sets)


def test_nothing_to_do() -> None:
    """Equal rulesets make a plan without steps, in sync, that changes nobody's access; so does every backend."""
    for name in ("nftables", "iptables-nft", "iptables-legacy"):
        plan = make_plan(load(name), ruleset(ADMINS, MEMBERS), ruleset(ADMINS, MEMBERS))

        assert (plan.in_sync, plan.steps, plan.changes(), plan.access) == (True, (), (), AccessChange((), ()))


def test_from_nothing() -> None:
    """Without anything of ours the plan is the backend's load, and all access is gained."""
    plan = make_plan(load("nftables"), Ruleset(), ruleset(ADMINS))

    assert not plan.in_sync
    assert [(a.to, a.service, a.addresses.v4) for a in plan.access.gained] == [("tcp/22", "ssh", ADMINS.ranges)]
    assert plan.access.lost == ()


def test_contents_differ_entry_by_entry() -> None:
    """A range that grows is taken out as it was and put in as it will be; equal and dynamic sets are not looked at."""
    wider = replace(ADMINS, ranges=((10, 25), (30, 30), (40, 49)))

    (change,) = set_changes(ruleset(ADMINS, MEMBERS), ruleset(wider, replace(MEMBERS, size=3)))

    assert (change.set, change.add, change.remove) == (wider, ((10, 25), (40, 49)), ((10, 19),))


def test_a_set_that_is_new_is_no_change() -> None:
    """A set that only one side has is made or deleted, not changed."""
    other = AddressSet("more.v4", 4, ((1, 2),))

    assert set_changes(ruleset(ADMINS), ruleset(ADMINS, other)) == set_changes(ruleset(ADMINS, other), ruleset(ADMINS)) == ()


@pytest.mark.parametrize("count", [1, MAX_ELEMENTS_SHOWN, MAX_ELEMENTS_SHOWN + 5])
def test_long_element_lists_are_cut(count: int) -> None:
    """Elements are shown as they are sent, but not by the thousand: the rest is counted."""
    plan = Plan(Ruleset(), Ruleset(), (), AccessChange((), ()))
    fill = Fill("nft", "a.v4", 4, tuple((2 * n, 2 * n) for n in range(count)))
    from fwcompiler.backend import Step

    (line,) = replace(plan, steps=(Step(fill),)).changes()

    assert line.startswith("add element a.v4 { 0.0.0.0")
    assert line.count("0.0.0.") == min(count, MAX_ELEMENTS_SHOWN)
    assert ("and 5 more" in line) == (count > MAX_ELEMENTS_SHOWN)


def test_commands_are_shown_by_what_they_send() -> None:
    """A command with a text shows its lines, one without shows its words."""
    from fwcompiler.backend import Step

    steps = (Step(Command(("nft", "-f", "-"), "add table inet fwc\n\nadd chain inet fwc x\n")), Step(Command(("ipset", "destroy", "x"))))

    assert Plan(Ruleset(), Ruleset(), steps, AccessChange((), ())).changes() == (
        "add table inet fwc",
        "add chain inet fwc x",
        "ipset destroy x",
    )


def test_contents_are_given_back() -> None:
    """What a scratch kernel listed gets the contents it was loaded with, by name."""
    listed = ruleset(replace(ADMINS, ranges=()), MEMBERS)

    assert with_contents(listed, ruleset(ADMINS)) == ruleset(ADMINS, MEMBERS)


@pytest.mark.parametrize(
    ("matches", "depends"),
    [
        ((Interface("in", "eth7"),), "the interface"),
        ((Interface("in", "eth0"),), "the interface"),
        ((PortIn("source", "tcp", (53, 53)),), "the source port"),
        ((InRanges("destination", 4, ((0x0A090901, 0x0A090901),)),), "the destination"),
        ((Unknown("mark 7"),), "unknown: mark 7"),
    ],
)
def test_access_that_hangs_on_more_is_perhaps_lost(matches: tuple[Match, ...], depends: str) -> None:
    """A rule among ours that asks more than source and port gave somebody access: it is told, with what it hangs on."""
    wanted = ruleset(ADMINS)
    service, base = wanted.chains
    accept = Rule((*matches, PortIn("destination", "tcp", (23, 23))), Final.ACCEPT)
    live = replace(wanted, chains=(service, replace(base, rules=(accept, *base.rules))))

    access = make_plan(load("nftables"), live, wanted).access

    assert not access.gained
    assert not access.lost
    assert [(a.to, a.depends) for a in access.perhaps_lost] == [("tcp/23", (depends,))]


def test_drops_that_hang_on_more_are_perhaps_gained() -> None:
    """What an unknown rule may take away is perhaps gained when it goes, by the name of its service; what others lose is certain."""
    wanted = ruleset(ADMINS)
    service, base = wanted.chains
    rules = (Rule((Unknown("mark 7"),), Final.DROP), Rule((PortIn("destination", "udp", (9, 9)),), Final.ACCEPT), *base.rules)
    live = replace(wanted, chains=(service, replace(base, rules=rules)))

    access = make_plan(load("nftables"), live, wanted).access

    assert [(a.to, a.service) for a in access.perhaps_gained] == [("tcp/22", "ssh")]
    assert [a.to for a in access.perhaps_lost] == ["udp/9"]


def test_what_is_not_ours_is_noted() -> None:
    """Something in our table that fwc never makes is named with the difference."""
    wanted = ruleset(ADMINS)

    assert make_plan(load("nftables"), replace(wanted, others=("table fwc with flags",)), wanted).notes == (
        "fwc never makes this: table fwc with flags",
    )
