"""Compares what two rulesets do, in tests: what the product tells by `differ`, and which pairs of ends there are at all."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from fwcompiler.proof.compose import Program
from fwcompiler.proof.conditions import ordered, outs
from fwcompiler.proof.describe import box_text
from fwcompiler.proof.diagram import ACCEPT, VERDICTS, Diagrams, StepsExceeded
from fwcompiler.proof.host import Stage, of_host, place_in, stages
from fwcompiler.proof.prove import ORDERS, TRIES, Box, differ
from fwcompiler.proof.rewrite import graft, relabel
from fwcompiler.proof.space import FIRST_ATOM, STATE, Space, make_space
from fwcompiler.ruleset import STATES, Final, HookName, Rule, Ruleset, State, Unknown

DEEP = 100_000
"""Stack frames for diagrams with thousands of atoms."""
_PLACE: Mapping[HookName, HookName] = {"postrouting": "forward"}
"""Where packets at a hook are met, so that they have both interfaces."""


def differences(first: Ruleset, second: Ruleset, version: int, hook: str) -> list[tuple[str, str, str]]:
    """Where two hosts part on the way to a hook: packets, and the two verdicts."""
    names = ordered((*outs(first), *outs(second)))
    found = differ(of_host(first, version, hook, names), of_host(second, version, hook, names), version)
    return [(box_text(found.space, box), *box.verdicts) for box in found.boxes] if found else []


def ends(first: Program, second: Program, version: int, states: Collection[State] = STATES) -> Mapping[tuple[str, str], str]:
    """Every pair of verdicts that some packet in one of the states gets, for some value of every atom, with such packets.

    Raises:
        StepsExceeded: beyond what can be decided.
    """
    space = make_space(version, [*first.conditions(), *second.conditions()])
    allowed = sum(1 << i for i, name in enumerate(STATES) if name in states)
    with _deep():
        diagrams, one, other = _built(first, second, space)
        ways = _pairs(diagrams, one, other, diagrams.levels[STATE], allowed)
    return {(VERDICTS[a], VERDICTS[b]): box_text(space, Box(way, a, b)) for (a, b), way in ways.items()}


def rewritings(first: Ruleset, second: Ruleset, version: int, hook: HookName) -> list[tuple[str, str, str]]:
    """Where the nat chains of a hook rewrite packets differently: packets, and what either does with them.

    At postrouting, packets that were forwarded: since Linux 5.7 they still have their input interface there.
    """
    names = ordered((*outs(first), *outs(second)))
    sides = [stages(_nat_only(each, hook), version, (_PLACE.get(hook, hook),), names) for each in (first, second)]
    space = make_space(version, [c for side in sides for stage in side for c in stage.conditions()])
    atoms = range(FIRST_ATOM, FIRST_ATOM + len(space.atoms))
    diagrams = Diagrams({number: space.everything(number) for number in (*ORDERS[0], *atoms)})
    known: dict[str, int] = {}
    with _deep():
        roots = [_rewriting(side, diagrams, space, known) for side in sides]
        found = _pairs(diagrams, roots[0], roots[1])
    texts = {**VERDICTS, **{number: text for text, number in known.items()}}
    return [(box_text(space, Box(way, a, b)), texts[a], texts[b]) for (a, b), way in found.items() if a != b]


def _nat_only(ruleset: Ruleset, hook: HookName) -> Ruleset:
    """The ruleset with no base chains but those of kind nat at a hook; every packet is taken for the first of its connection."""
    chains = (
        replace(c, hook=replace(c.hook, name=_PLACE.get(hook, hook), kind="filter"))
        if c.hook and (c.hook.name, c.hook.kind) == (hook, "nat")
        else replace(c, hook=None)
        for c in ruleset.chains
    )
    return replace(ruleset, chains=tuple(chains))


def _rewriting(side: Sequence[Stage], diagrams: Diagrams, space: Space, known: dict[str, int]) -> int:
    """The diagram of nat chains, one after the other; equal translations end in equal terminals."""
    result = ACCEPT
    for stage in reversed(side):
        terminals = {
            terminal: known.setdefault(str(replace(t, text="", version=None)), -100 - len(known))
            for terminal, t in stage.translations.items()
        }
        root = relabel(diagrams, stage.root(diagrams, place_in(space)), terminals)
        result = graft(diagrams, root, ACCEPT, result)
    return result


def _pairs(diagrams: Diagrams, first: int, second: int, level: int = -1, allowed: int = 0) -> dict[tuple[int, int], dict[int, int]]:
    """Every pair of ends of two diagrams, with a way to it; on one level only the allowed classes."""
    ways: dict[tuple[int, int], dict[int, int]] = {}
    seen: set[tuple[int, int]] = set()

    def visit(a: int, b: int, way: dict[int, int]) -> None:
        if a < 0 and b < 0:
            ways.setdefault((a, b), way)
        elif (a, b) not in seen:
            seen.add((a, b))
            here = min(diagrams.level(a), diagrams.level(b))
            for mask, x, y in diagrams.pairs(a, b):
                kept = mask & allowed if here == level else mask
                if kept:
                    visit(x, y, {**way, diagrams.fields[here]: kept})

    visit(first, second, {})
    return ways


def _built(first: Program, second: Program, space: Space) -> tuple[Diagrams, int, int]:
    atoms = range(FIRST_ATOM, FIRST_ATOM + len(space.atoms))
    for order in ORDERS:
        diagrams = Diagrams({number: space.everything(number) for number in (*order, *atoms)}, 2 * TRIES[-1])
        try:
            return diagrams, first.diagram(diagrams, space), second.diagram(diagrams, space)
        except StepsExceeded:
            continue
    raise StepsExceeded


@contextmanager
def _deep() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(DEEP)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def only(ruleset: Ruleset, base: str) -> Ruleset:
    """The ruleset with no base chain but one."""
    return replace(ruleset, chains=tuple(c if c.name == base else replace(c, hook=None) for c in ruleset.chains))


def behind(ruleset: Ruleset, rules: Sequence[Rule], hook: HookName) -> Ruleset:
    """The ruleset with rules before all others at a hook: what they decide is left out of a comparison."""
    chains = (replace(c, rules=(*rules, *c.rules)) if c.hook and c.hook.name == hook else c for c in ruleset.chains)
    return replace(ruleset, chains=tuple(chains))


def deciding(ruleset: Ruleset) -> Ruleset:
    """The ruleset with rules that only count or log dropping instead: then their tests take part in a comparison."""
    chains = []
    for chain in ruleset.chains:
        rules = (
            replace(r, verdict=Final.DROP) if r.verdict is None and not any(isinstance(m, Unknown) for m in r.matches) else r
            for r in chain.rules
        )
        chains.append(replace(chain, rules=tuple(rules)))
    return replace(ruleset, chains=tuple(chains))
