"""Laws of what proofs are made of: classes of values, and decision diagrams, held against all points of small universes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from property.strategies import LAW

from fwcompiler.addresses import covers, merged
from fwcompiler.proof.diagram import ACCEPT, DROP, NO_CHAIN, REJECT, RETURN, Diagrams, Item, Rules
from fwcompiler.proof.diagram import Builder as PlainBuilder
from fwcompiler.proof.rewrite import MAY, EndsBuilder, assign, choice, graft, graft_all, merge, reachable, relabel
from fwcompiler.proof.space import PORT, Condition, cut, make_space

WIDTHS = {7: 0b111, 2: 0b1111, 9: 0b11}
"""Fields by number, in order of decision, with three, four and two classes."""
Point = tuple[int, ...]
POINTS: list[Point] = list(product(*(range(mask.bit_length()) for mask in WIDTHS.values())))
ENDS = st.sampled_from((ACCEPT, DROP, REJECT))
ranges_of_ports = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda p: (p[0], p[0] + p[1])), max_size=4).map(merged)


@LAW
@given(st.lists(ranges_of_ports, max_size=6), st.integers(60, 70))
def test_classes_are_a_partition(sets: list[tuple[tuple[int, int], ...]], last: int) -> None:
    """Every number is in exactly one class, a set's mask holds exactly the set, and the classes are as few as can be."""
    classes, masks = cut(last, sets)

    for number in range(last + 1):
        (own,) = [i for i, ranges in enumerate(classes) if covers(ranges, number)]
        for each in sets:
            assert bool(masks[each] >> own & 1) == covers(each, number)
    signatures = [tuple(masks[each] >> i & 1 for each in dict.fromkeys(sets)) for i in range(len(classes))]
    assert len(set(signatures)) == len(classes)


@LAW
@given(ranges_of_ports, ranges_of_ports, st.booleans())
def test_a_space_places_conditions(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...], negated: bool) -> None:
    """A condition's mask stands for its values, or for all others where it is negated; union and intersection are those of masks."""
    conditions = [Condition(PORT, one, negated), Condition(PORT, other)]
    space = make_space(4, conditions)
    (_, first), (_, second) = (space.place(c) for c in conditions)

    for number in (*range(60), 65535):
        value = next(1 << i for i, ranges in enumerate(space.classes[PORT]) if covers(ranges, number))
        assert bool(first & value) == (covers(one, number) != negated)
        assert bool(first & second & value) == ((covers(one, number) != negated) and covers(other, number))
    assert space.ranges(PORT, second) == other
    assert space.ranges(PORT, space.everything(PORT)) == ((0, 65535),)


@st.composite
def rules(draw: Callable[..., Any]) -> Rules:
    """Lists of rules that call later ones."""
    count = draw(st.integers(1, 4))

    def items(chain: int) -> st.SearchStrategy[Item]:
        conditions = st.dictionaries(st.sampled_from(sorted(WIDTHS)), st.integers(1, 14), max_size=2).map(_fitting)
        ends = st.builds(Item, conditions, ENDS | st.just(RETURN))
        if chain + 1 == count:
            return ends
        return ends | st.builds(Item, conditions, st.just(RETURN), st.integers(chain + 1, count - 1), st.booleans())

    return Rules([draw(st.lists(items(chain), max_size=4)) for chain in range(count)], draw(st.sampled_from((ACCEPT, DROP))))


def _fitting(conditions: Mapping[int, int]) -> Mapping[int, int]:
    return {number: mask & WIDTHS[number] for number, mask in conditions.items() if mask & WIDTHS[number] not in (0, WIDTHS[number])}


def run(these: Rules, point: Point) -> int:
    """What the rules do with one point, rule by rule."""
    values = dict(zip(WIDTHS, point, strict=True))

    def chain(number: int) -> int:
        for item in these.chains[number]:
            if all(mask >> values[field] & 1 for field, mask in item.conditions.items()):
                if item.chain == NO_CHAIN:
                    return item.verdict
                end = chain(item.chain)
                if end != RETURN or item.goto:
                    return end
        return RETURN

    end = chain(0)
    return these.policy if end == RETURN else end


def at(diagrams: Diagrams, node: int, point: Point) -> int:
    """Where a point ends in a diagram."""
    while node >= 0:
        level, edges = diagrams.nodes[node]
        (node,) = [child for mask, child in edges if mask >> point[level] & 1]
    return node


def built(*these: Rules) -> tuple[Diagrams, list[int]]:
    """All lists of rules in one store."""
    diagrams = Diagrams(WIDTHS)
    return diagrams, [PlainBuilder(diagrams, each).build() for each in these]


@LAW
@given(rules(), rules())
def test_diagrams_do_what_rules_do(first: Rules, second: Rules) -> None:
    """Every point ends as running the rules says; two lists have one root exactly where all points end alike."""
    diagrams, roots = built(first, second)

    for root, these in zip(roots, (first, second), strict=True):
        assert [at(diagrams, root, p) for p in POINTS] == [run(these, p) for p in POINTS]
    assert (roots[0] == roots[1]) == all(run(first, p) == run(second, p) for p in POINTS)
    assert EndsBuilder(diagrams, first).build() == roots[0]
    assert reachable(diagrams, roots[0])[0] == {run(first, p) for p in POINTS}


@LAW
@given(rules(), rules())
def test_two_chains_one_after_the_other(first: Rules, second: Rules) -> None:
    """Where the first accepts, the second decides; anything else the first does is final. Pairs tell every difference."""
    diagrams, (one, other) = built(first, second)

    after = diagrams.both(one, other)

    assert diagrams.both(one, ACCEPT) == one == diagrams.both(ACCEPT, one)
    for p in POINTS:
        assert at(diagrams, after, p) == (run(second, p) if run(first, p) == ACCEPT else run(first, p))
    assert set(_met(diagrams, one, other)) == {(run(first, p), run(second, p)) for p in POINTS}


def _met(diagrams: Diagrams, first: int, second: int) -> Iterator[tuple[int, int]]:
    if first < 0 and second < 0:
        yield first, second
        return
    whole = 0
    for mask, a, b in diagrams.pairs(first, second):
        assert not whole & mask, "pairs overlap"
        whole |= mask
        yield from _met(diagrams, a, b)
    assert whole == diagrams.full[min(diagrams.level(first), diagrams.level(second))]


@LAW
@given(rules(), rules(), st.dictionaries(ENDS, ENDS), st.sampled_from(sorted(WIDTHS)), st.integers(1, 14))
def test_what_is_done_to_diagrams(first: Rules, second: Rules, names: dict[int, int], field: int, bits: int) -> None:
    """Other ends, going on in another diagram, either of two, a new value in a field, one here and another there: point by point."""
    diagrams, (one, other) = built(first, second)
    mask = bits & WIDTHS[field] or 1
    place = list(WIDTHS).index(field)
    renamed, grafted, either = relabel(diagrams, one, names), graft(diagrams, one, DROP, other), merge(diagrams, one, other)
    crossed = graft_all(diagrams, one, {DROP: other, REJECT: renamed})
    assigned, chosen = assign(diagrams, one, field, mask), choice(diagrams, field, mask, one, other)

    for p in POINTS:
        here, there = run(first, p), run(second, p)
        assert at(diagrams, renamed, p) == names.get(here, here)
        assert at(diagrams, grafted, p) == (there if here == DROP else here)
        assert at(diagrams, crossed, p) == {DROP: there, REJECT: names.get(here, here)}.get(here, here)
        assert at(diagrams, either, p) == (here if here == there else MAY)
        assert at(diagrams, chosen, p) == (here if mask >> p[place] & 1 else there)
        after = {run(first, (*p[:place], v, *p[place + 1 :])) for v in range(WIDTHS[field].bit_length()) if mask >> v & 1}
        assert at(diagrams, assigned, p) == (after.pop() if len(after) == 1 else MAY)
