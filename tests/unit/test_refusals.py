"""What a backend cannot hold exactly it says before anything is loaded."""

from __future__ import annotations

import pytest

from fwcompiler.addresses import LAST
from fwcompiler.registry import load
from fwcompiler.ruleset import (
    Chain,
    Family,
    Final,
    Goto,
    Hook,
    InRanges,
    Jump,
    PortIn,
    ProtocolIs,
    Rule,
    Ruleset,
    TypeIn,
    Verdict,
    redirected,
    sent_on,
)

TCP, UDP = PortIn("destination", "tcp", (22, 22)), PortIn("destination", "udp", (22, 22))


def closed(*rules: Rule, called: tuple[Rule, ...] = ()) -> Ruleset:
    """A base chain whose policy is to drop, and a chain that it may call."""
    return Ruleset((Chain("input", rules, Hook("input", 0, "drop")), Chain("called", called)))


@pytest.mark.parametrize(
    ("rules", "called"),
    [
        ((Rule((TCP,), Final.RETURN),), ()),
        ((Rule((TCP,), Goto("called")),), ()),
        ((Rule((TCP,), Goto("called")),), (Rule((UDP,), Final.DROP),)),
        ((Rule((TCP,), Goto("called")),), (Rule((UDP,), Final.RETURN), Rule((), Final.DROP))),
    ],
)
def test_iptables_has_no_way_back_past_a_closing_policy(rules: tuple[Rule, ...], called: tuple[Rule, ...]) -> None:
    """Our base chain is called by the built-in one, so what returns from it would go on there and be accepted: refused."""
    (finding,) = load("iptables-nft").refuse(closed(*rules, called=called))

    assert "lets return from `input`" in finding.message
    assert not load("nftables").refuse(closed(*rules, called=called))


@pytest.mark.parametrize("verdict", [Jump("called"), Goto("called")])
def test_what_comes_to_an_end_is_taken(verdict: Verdict) -> None:
    """A chain that decides everything may be gone to, and one that is jumped to may return."""
    called = (Rule((UDP,), Final.RETURN),) if isinstance(verdict, Jump) else (Rule((UDP,), Final.ACCEPT), Rule((), Final.DROP))

    assert not load("iptables-nft").refuse(closed(Rule((TCP,), verdict), called=called))


def test_a_jump_at_the_end_does_not_close_a_chain() -> None:
    """Behind a last rule that jumps for every packet, iptables' chain still drops what comes back."""
    text = load("iptables-nft").render(closed(Rule((), Jump("called")))).files

    assert all(each.index("-j FWC-called") < each.index("-A FWC-input -j DROP") for name, each in text.items() if "FWC-input" in each)
    assert sum("-A FWC-input -j DROP" in each for each in text.values()) == 2


@pytest.mark.parametrize(
    "matches",
    [
        (TCP, UDP),
        (TypeIn(6, (135,)), TCP),
        (ProtocolIs(17), TCP),
        (InRanges("source", 4, ((1, 2),)), InRanges("source", 6, ((1, 2),))),
    ],
)
def test_nftables_refuses_what_nft_would(matches: tuple[PortIn | TypeIn | ProtocolIs | InRanges, ...]) -> None:
    """A rule that asks for two protocols or two families never holds; nft does not load it, so it is refused by name."""
    (finding,) = load("nftables").refuse(closed(Rule(matches, Final.ACCEPT)))

    assert finding.message.startswith("nftables cannot express")


def test_chains_that_nothing_leads_to_find_what_they_call() -> None:
    """A chain that is called from table raw, and by one that nobody calls, exists in both tables."""
    early = Chain("early", (Rule((), Jump("called")),), Hook("prerouting", -300, "accept"))
    ruleset = Ruleset((early, Chain("called", ()), Chain("dead", (Rule((TCP,), Jump("called")),))))

    texts = load("iptables-nft").render(ruleset).files
    filters = [text.partition("*filter")[2] for text in texts.values() if "FWC-dead" in text]

    assert len(filters) == 2
    assert all(":FWC-called " in text and "-j FWC-called" in text for text in filters)


@pytest.mark.parametrize(
    "rule",
    [Rule((TCP,), redirected(22)), Rule((Family(4), TCP), sent_on(1)), Rule((InRanges("source", 4, ((0, LAST[4]),), True),), Final.ACCEPT)],
)
def test_iptables_refuses_what_its_kernel_part_would(rule: Rule) -> None:
    """Addresses are rewritten in table nat only, and nothing lies outside of all addresses: the kernel says `Invalid argument`."""
    (finding,) = load("iptables-legacy").refuse(closed(rule))

    assert "in table nat only" in finding.message or "all addresses" in finding.message
