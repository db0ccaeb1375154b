"""What dynamic members gain and lose, and that ICMP is told for its own family only."""

from __future__ import annotations

from fwcompiler.proof.access import compare
from fwcompiler.proof.memberaccess import MemberAccess, compare_members
from fwcompiler.ruleset import AddressSet, Chain, Final, Hook, InSet, PortIn, Rule, Ruleset

MEMBERS = AddressSet("agents.dynamic.v4", 4, timeout=60, size=10)
BLOCKED = AddressSet("blocked.v4", 4, ((0, 1 << 30),))
WSS = PortIn("destination", "tcp", (8089, 8089))


def rules(*each: Rule, policy: str = "drop") -> Ruleset:
    """A ruleset of one base chain."""
    hook = Hook("input", 0, "drop" if policy == "drop" else "accept")
    return Ruleset((Chain("input", each, hook),), (MEMBERS, BLOCKED))


MEMBER = Rule((InSet("source", "agents.dynamic.v4", 4), WSS), Final.ACCEPT, "wss")
ANYBODY = Rule((WSS,), Final.ACCEPT, "wss")


def test_members_gain_and_lose() -> None:
    """A group without any written address still gains what its members will have, and loses it the other way."""
    access = (MemberAccess("agents", "tcp/8089", "wss"),)

    assert compare_members(rules(), rules(MEMBER)) == (access, ())
    assert compare_members(rules(MEMBER), rules()) == ((), access)
    assert compare_members(rules(MEMBER), rules(MEMBER)) == ((), ())


def test_what_everybody_gains_is_not_the_members() -> None:
    """Where everybody gains, members gain nothing beyond; where they had it already, neither."""
    assert compare_members(rules(), rules(ANYBODY)) == ((), ())
    assert compare_members(rules(MEMBER), rules(ANYBODY)) == ((), ())


def test_a_blocked_member_gains_nothing() -> None:
    """A rule in front that drops members is seen."""
    block = Rule((InSet("source", "agents.dynamic.v4", 4),), Final.DROP, "block")

    assert compare_members(rules(), rules(block, MEMBER)) == ((), ())


def test_icmp_is_of_its_family() -> None:
    """Nobody opens ICMPv6 over IPv4: an address that is trusted wholly is not said to."""
    trusted = Rule((InSet("source", "blocked.v4", 4),), Final.ACCEPT, "trust")

    assert {a.to for a in compare(rules(), rules(trusted)).gained} == {
        "icmp/echo-request",
        "other-protocols",
        "tcp/0-65535",
        "udp/0-65535",
    }
