"""z3 is asked what the prover is asked: are two rulesets equal for all packets, and do the packets of a difference end as it says?

Every field is a bit-vector, what no field shows a free boolean. The formulas are written apart from the prover
(`property.bitvectors`), so a mistake has to be made twice to go unseen.
"""

from __future__ import annotations

from typing import Any

import pytest
import z3
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from property.bitvectors import OUTS, VERDICTS, Fields, fate, inside
from property.rulesets import VERSIONS, edited, host_rulesets, own_rulesets
from property.strategies import LAW

from fwcompiler.proof.compose import Program
from fwcompiler.proof.host import of_host
from fwcompiler.proof.prove import Difference, differ
from fwcompiler.ruleset import HookName, Ruleset

SOLVER_LAW = settings(LAW, max_examples=60, phases=(Phase.explicit, Phase.generate))
"""Failures are told as they are found: making them smaller would ask z3 for minutes."""
HOST_LAW = settings(SOLVER_LAW, max_examples=30)


def impossible(*formulas: Any) -> bool:
    """True where z3 finds no packet for which all formulas hold."""
    solver = z3.Solver()
    solver.add(*formulas)
    answer = solver.check()
    assert answer != z3.unknown
    return bool(answer == z3.unsat)


def judge(difference: Difference | None, packet: Fields, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Hold an answer of the prover against the formulas."""
    differing = z3.Or([z3.And(first[word], z3.Not(second[word])) for word in VERDICTS])
    if difference is None:
        assert impossible(packet.possible(), differing), "proven equal, but z3 knows a packet"
        return
    boxes = []
    for box in difference.boxes:
        here = inside(difference.space, box, packet)
        boxes.append(here)
        wanted, found = box.verdicts
        assert wanted != found
        assert not impossible(packet.possible(), here), "a box without packets"
        assert impossible(packet.possible(), here, z3.Not(z3.And(first[wanted], second[found]))), "a packet in a box ends otherwise"
    outside = impossible(packet.possible(), differing, z3.Not(z3.Or(boxes)))
    assert outside != difference.more, "all differences are told, or it is said that there are more"


def compare(first: Program, second: Program, rulesets: tuple[Ruleset, Ruleset], version: int, hook: str) -> bool:
    """Ask both, and return whether the rulesets are equal."""
    packet = Fields.any(version)
    difference = differ(first, second, version)
    judge(difference, packet, *(fate(each, packet, hook) for each in rulesets))
    return difference is None


def test_our_own_rules() -> None:
    """Rulesets in fwc's own words at input: chains that jump, go and return, negations, states, ICMP types, limits, dynamic sets."""
    equal = {True: 0, False: 0}

    @SOLVER_LAW
    @given(VERSIONS, st.data())
    def law(version: int, data: st.DataObject) -> None:
        first = data.draw(own_rulesets(version))
        for second in (data.draw(edited(first)), data.draw(own_rulesets(version))):
            programs = (of_host(each, version) for each in (first, second))
            equal[compare(*programs, (first, second), version, "input")] += 1

    law()
    assert min(equal.values()) > 10, equal


@pytest.mark.parametrize("hook", ["input", "forward"])
def test_whole_hosts(hook: HookName) -> None:
    """Rulesets of anybody on the way to a hook: raw, NAT and several filter chains, rewritten destinations, tests by name."""
    equal = {True: 0, False: 0}

    @HOST_LAW
    @given(VERSIONS, st.data())
    def law(version: int, data: st.DataObject) -> None:
        first = data.draw(host_rulesets(version, hook))
        for second in (data.draw(edited(first)), data.draw(host_rulesets(version, hook))):
            programs = (of_host(each, version, hook, OUTS) for each in (first, second))
            equal[compare(*programs, (first, second), version, hook)] += 1

    law()
    assert min(equal.values()) > 5, equal


def test_the_second_opinion_can_disagree() -> None:
    """A box that is a little too large, or an equality that is none, is noticed."""
    from property.strategies import HOME

    from fwcompiler.ruleset import Chain, Final, Hook, InRanges, PortIn, Rule

    def ruleset(last: int) -> Ruleset:
        rule = Rule((InRanges("source", 4, ((HOME[4], HOME[4] + last),)), PortIn("destination", "udp", (5060, 5060))), Final.ACCEPT)
        return Ruleset((Chain("input", (rule,), Hook("input")),))

    first, second, packet = ruleset(7), ruleset(8), Fields.any(4)
    fates = [fate(each, packet, "input") for each in (first, second)]
    difference = differ(of_host(first, 4), of_host(second, 4), 4)
    assert difference is not None
    judge(difference, packet, *fates)

    with pytest.raises(AssertionError, match="proven equal"):
        judge(None, packet, *fates)
    (box,) = difference.boxes
    larger = Difference(difference.space, (type(box)({k: m for k, m in box.masks.items() if k != 3}, box.first, box.second),), False)
    with pytest.raises(AssertionError, match="ends otherwise"):
        judge(larger, packet, *fates)
