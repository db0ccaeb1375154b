"""Laws of neutral rulesets: what is rendered, loaded and listed means the same; differences are none exactly where two are equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cli.harness import BACKENDS
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from property.rulesets import VERSIONS, edited, own_rulesets
from property.strategies import LAW, documents, resolved

from fwcompiler.kernel import netns, runner
from fwcompiler.lower import lower
from fwcompiler.plan import make_plan, with_contents
from fwcompiler.proof.access import compare
from fwcompiler.proof.describe import box_text
from fwcompiler.proof.host import of_host
from fwcompiler.proof.prove import FAMILIES, Box, Difference, differ
from fwcompiler.registry import load
from fwcompiler.ruleset import InSet, Interface, Jump, Limit, Rule, Ruleset

ROUND_TRIPS = settings(LAW, max_examples=60, phases=(Phase.explicit, Phase.generate))


def differences(first: Ruleset, second: Ruleset) -> dict[int, Difference]:
    """Where two rulesets differ at input, by family."""
    found = {v: differ(of_host(first, v), of_host(second, v), v) for v in FAMILIES}
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
    @given(VERSIONS.flatmap(own_rulesets))
    def law(ruleset: Ruleset) -> None:
        ruleset = replace(ruleset, chains=tuple(replace(c, rules=tuple(_logging(r) for r in c.rules)) for c in ruleset.chains))
        if backend.refuse(ruleset):
            tried["refused"] += 1
            return
        tried["loaded"] += 1
        held = through_kernel(ruleset)
        assert held.others == ()
        found = differences(ruleset, held)
        assert not found, (found, ruleset, held)
        again = through_kernel(held)
        assert again == held
        assert make_plan(backend, held, again).in_sync

    law()
    assert tried["loaded"] > 10, tried


def _logging(rule: Rule) -> Rule:
    """A rule without a verdict logs, and an output interface, which no packet has here, becomes an input interface."""
    matches = tuple(replace(m, way="in") if isinstance(m, Interface) else m for m in rule.matches)
    return replace(rule, matches=matches, log_prefix="" if rule.verdict else "fwc drop: ")


@LAW
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


@LAW
@given(VERSIONS, st.data())
def test_access_gained_and_lost(version: int, data: st.DataObject) -> None:
    """What one way gains the other way loses, whatever the rules; equal rulesets gain and lose nothing."""
    first = data.draw(own_rulesets(version).filter(_is_certain))
    second = data.draw(st.one_of(edited(first), own_rulesets(version)).filter(_is_certain))

    forth, back = compare(first, second), compare(second, first)

    assert (forth.gained, forth.lost) == (back.lost, back.gained)
    assert not compare(first, first)
    if not differences(first, second):
        assert not forth.gained
        assert not forth.lost


def _is_certain(ruleset: Ruleset) -> bool:
    """Limits and dynamic members are told elsewhere."""
    matches = [m for c in ruleset.chains for r in c.rules for m in r.matches]
    return not any(isinstance(m, Limit) or (isinstance(m, InSet) and "dynamic" in m.set) for m in matches)


@LAW
@given(documents(), documents())
def test_diffs_of_policies_are_empty_where_the_proof_says_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two policies that are proven equal gain and lose nothing; where new connections gain or lose, the proof knows a difference."""
    a, b = lower(resolved(one)), lower(resolved(other))
    change = compare(a, b)

    if change.gained or change.lost:
        assert differences(a, b)
    if not differences(a, b):
        assert (change.gained, change.lost) == ((), ())
