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

from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import netns, runner
from fwcompiler.lower import lower
from fwcompiler.plan import make_plan, with_contents
from fwcompiler.proof.access import compare
from fwcompiler.proof.compose import from_ruleset
from fwcompiler.proof.prove import FAMILIES, Difference, differ
from fwcompiler.registry import load
from fwcompiler.ruleset import Interface, Ruleset

ROUND_TRIPS = settings(LAW, max_examples=60, phases=(Phase.explicit, Phase.generate))


def differences(first: Ruleset, second: Ruleset) -> dict[int, Difference]:
    """Where two rulesets differ at input, by family."""
    found = {v: differ(from_ruleset(first, v), from_ruleset(second, v), v) for v in FAMILIES}
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
        ruleset = replace(ruleset, chains=tuple(replace(c, rules=tuple(r for r in c.rules if not _odd(r))) for c in ruleset.chains))
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
    print(tried)
    assert tried["loaded"] > 10, tried


def _odd(rule: Any) -> bool:
    return any(isinstance(m, Interface) and m.way == "out" for m in rule.matches)
