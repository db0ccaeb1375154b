"""Laws of neutral rulesets: what is rendered, loaded and listed means the same; differences are none exactly where two are equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from cli.harness import BACKENDS
from foreign.comparing import differences as ends_apart
from foreign.comparing import rewritings
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from property.rulesets import VERSIONS, edited, own_rulesets, whole_tables
from property.strategies import DEAR_LAW, LAW, documents, resolved, reworded

from fwcompiler.kernel import netns, runner
from fwcompiler.lower import lower
from fwcompiler.plan import make_plan, with_contents
from fwcompiler.proof.access import compare
from fwcompiler.proof.describe import box_text
from fwcompiler.proof.host import of_host
from fwcompiler.proof.prove import FAMILIES, Box, Difference, differ
from fwcompiler.proof.space import INTERFACE, STATE, Condition
from fwcompiler.registry import load
from fwcompiler.ruleset import Chain, Final, InSet, Interface, Jump, Limit, OverLimit, Rule, Ruleset, SetDscp

ROUND_TRIPS = settings(LAW, max_examples=60, phases=(Phase.explicit, Phase.generate))


def differences(first: Ruleset, second: Ruleset, within: Sequence[Condition] = ()) -> dict[int, Difference]:
    """Where two rulesets differ at input, by family."""
    found = {v: differ(of_host(first, v), of_host(second, v), v, within) for v in FAMILIES}
    return {version: each for version, each in found.items() if each}


@pytest.mark.parametrize("name", BACKENDS)
def test_rules_come_back_from_the_kernel_as_they_were(kernel_allowed: bool, name: str) -> None:
    """Any ruleset that a backend does not refuse is taken by the kernel, and what is listed and read means the same for all packets.

    What was read comes back as the very same when it is loaded once more: the kernel is the normal form.
    """
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    backend = load(name)
    runner.require(backend.programs)
    tried = {"refused": 0, "loaded": 0}

    def through_kernel(ruleset: Ruleset) -> Ruleset:
        with netns.scratch() as scratch, scratch.entered():
            listing = runner.try_out(backend.load(ruleset), backend.listing())
        return with_contents(backend.parse(listing), ruleset)

    @ROUND_TRIPS
    @given(VERSIONS.flatmap(lambda v: st.one_of(own_rulesets(v), *[whole_tables(v)] * 3)))
    def law(ruleset: Ruleset) -> None:
        ruleset = replace(ruleset, chains=tuple(replace(c, rules=tuple(_fitting(r, c) for r in c.rules)) for c in ruleset.chains))
        if backend.refuse(ruleset):
            tried["refused"] += 1
            return
        tried["loaded"] += 1
        held = through_kernel(ruleset)
        assert held.others == ()
        found = everywhere(ruleset, held)
        assert not found, (found, ruleset, held)
        again = through_kernel(held)
        assert again == held
        assert make_plan(backend, held, again).in_sync

    law()
    assert tried["loaded"] > 20, tried


def everywhere(first: Ruleset, second: Ruleset) -> list[Any]:
    """Where two rulesets differ on any way of a packet: its end, its new addresses, its marks."""
    one, other = (_showing_marks(each) for each in (first, second))
    ends = [each for version in FAMILIES for hook in ("input", "forward", "output") for each in ends_apart(one, other, version, hook)]
    return ends + [each for version in FAMILIES for each in rewritings(one, other, version, "postrouting")]


def _showing_marks(ruleset: Ruleset) -> Ruleset:
    """The ruleset with an end in place of each mark: comparisons do not look at what no later rule asks."""

    def shown(rule: Rule) -> Rule:
        end = Final.REJECT if rule.verdict == SetDscp(46) else Final.DROP
        return replace(rule, verdict=end) if isinstance(rule.verdict, SetDscp) else rule

    return replace(ruleset, chains=tuple(replace(c, rules=tuple(shown(r) for r in c.rules)) for c in ruleset.chains))


def _fitting(rule: Rule, chain: Chain) -> Rule:
    """A rule without a verdict logs; where only input is asked, an output interface, which no packet has, becomes an input interface."""
    matches = rule.matches
    if chain.name.startswith(("input", "early", "chain")):
        matches = tuple(replace(m, way="in") if isinstance(m, Interface) else m for m in matches)
    return replace(rule, matches=matches, log_prefix="" if rule.verdict else "fwc drop: ")


@DEAR_LAW
@given(VERSIONS, st.data())
def test_differences_are_none_exactly_where_rules_are_equal(version: int, data: st.DataObject) -> None:
    """A ruleset does not differ from itself, nor from itself with rules behind the last or repeated; seen from the other side a
    difference has the same packets with verdicts the other way round.
    """
    first = data.draw(own_rulesets(version))
    second = data.draw(st.one_of(edited(first), own_rulesets(version)))

    assert differences(first, first) == {}
    assert differences(first, _repeating(first)) == {}
    forth, back = differences(first, second), differences(second, first)
    assert forth.keys() == back.keys()
    for family, one in forth.items():
        other = back[family]
        assert _turned(one) == {_key(other, box.masks, box.first, box.second) for box in other.boxes} or one.more


def _turned(difference: Difference) -> set[Any]:
    return {_key(difference, box.masks, box.second, box.first) for box in difference.boxes}


def _key(difference: Difference, masks: Any, first: int, second: int) -> Any:
    """A box in words that do not depend on how its space numbers classes and atoms."""
    return box_text(difference.space, Box(masks, first, second)), first, second


def _repeating(ruleset: Ruleset) -> Ruleset:
    """Every rule twice, but for those that count packets: what the first does not end, the second does not either."""
    chains = []
    for chain in ruleset.chains:
        twice = [r for rule in chain.rules for r in ([rule] if _counts(rule) else [rule, rule])]
        chains.append(replace(chain, rules=tuple(twice)))
    return replace(ruleset, chains=tuple(chains))


def _counts(rule: Rule) -> bool:
    return isinstance(rule.verdict, Jump) or any(isinstance(m, Limit) for m in rule.matches)


@DEAR_LAW
@given(VERSIONS, st.data())
def test_access_gained_and_lost(version: int, data: st.DataObject) -> None:
    """What one way gains the other way loses, whatever the rules; equal rulesets gain and lose nothing."""
    first = data.draw(own_rulesets(version, certain=True))
    second = data.draw(st.one_of(edited(first), own_rulesets(version, certain=True)))

    forth, back = compare(first, second), compare(second, first)

    assert (forth.gained, forth.lost) == (back.lost, back.gained)
    assert not compare(first, first)
    if forth.gained or forth.lost:
        assert differences(first, second)


def test_diffs_of_policies_are_empty_exactly_where_new_connections_are_equal() -> None:
    """What one way gains the other way loses. Nothing is gained or lost exactly where the prover finds no new connection that
    differs; limits and dynamic members, which access does not tell, may differ beside.
    """
    seen = Counter[str]()

    @DEAR_LAW
    @given(documents(), st.data())
    def law(one: dict[str, Any], data: st.DataObject) -> None:
        a, b = (lower(resolved(each)) for each in (one, data.draw(st.one_of(documents(), reworded(one, shorter=True)))))
        forth, back = compare(a, b), compare(b, a)
        assert (forth.gained, forth.lost) == (back.lost, back.gained)
        assert not compare(a, a)
        proven_equal = not differences(a, b, NEW)
        if forth.gained or forth.lost:
            assert not proven_equal
        elif _is_certain(a) and _is_certain(b):
            assert proven_equal
        seen["unequal" if forth else "equal" if proven_equal else "uncertain"] += 1

    law()
    assert min(seen["equal"], seen["unequal"]) > 10, seen


NEW = (Condition(STATE, frozenset(("new",))), Condition(INTERFACE, frozenset(("lo",)), negated=True))
"""Packets that open a connection from outside."""


def _is_certain(ruleset: Ruleset) -> bool:
    matches = [m for c in ruleset.chains for r in c.rules for m in r.matches]
    return not any(isinstance(m, Limit | OverLimit) or (isinstance(m, InSet) and "dynamic" in m.set) for m in matches)


@DEAR_LAW
@given(documents(), st.data())
def test_other_words_change_nothing(one: dict[str, Any], data: st.DataObject) -> None:
    """A policy in another order, with its addresses spelled otherwise, is the same for all packets: there is no difference to tell."""
    a, b = (lower(resolved(each)) for each in (one, data.draw(reworded(one))))

    assert not compare(a, b)
    assert differences(a, b) == {}
