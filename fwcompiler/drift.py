"""What was changed by hand: the rules that a kernel holds against those that were applied last, rule by rule. Pure.

An apply says what it will send; this says what it will undo. Rules are told by their place in the chain, as listings number them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher

from fwcompiler.addresses import Ranges, range_text
from fwcompiler.contents import difference
from fwcompiler.proof.describe import rule_text
from fwcompiler.ruleset import AHEAD, AddressSet, Chain, Hook, Rule, Ruleset

MAX_ELEMENTS = 6


def by_hand(live: Ruleset, applied: Ruleset) -> tuple[str, ...]:
    """Each difference in words; nothing where the kernel holds what was applied. Dynamic members come and go, and are none."""
    if not live:
        return ("nothing of fwc is loaded",) if applied else ()
    return (*_chains(live, applied), *_sets(live, applied), *(_other(what) for what in live.others if what not in applied.others))


def _other(what: str) -> str:
    if what.startswith(AHEAD):
        return f"rules of others were put before ours: {what.removeprefix(AHEAD)}"
    return f"{what}: not of fwc's making"


def _chains(live: Ruleset, applied: Ruleset) -> Iterator[str]:
    before, now = {c.name: c for c in applied.chains}, {c.name: c for c in live.chains}
    for name in dict.fromkeys((*before, *now)):
        if name not in now:
            yield f"chain {name}: gone, with {_count(len(before[name].rules))}"
        elif name not in before:
            yield f"chain {name}: added, with {_count(len(now[name].rules))}"
        else:
            yield from _chain(now[name], before[name])


def _count(rules: int) -> str:
    return "1 rule" if rules == 1 else f"{rules} rules"


def _chain(live: Chain, applied: Chain) -> Iterator[str]:
    if live.hook != applied.hook:
        yield f"chain {live.name}: {_hook(live.hook)}; applied was {_hook(applied.hook)}"
    if live.rules == applied.rules:
        return
    numbers = _numbers((*live.rules, *applied.rules))
    new, old = [numbers[r] for r in live.rules], [numbers[r] for r in applied.rules]
    for what, i, j, m, n in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what != "equal":
            yield from (f"chain {live.name}: gone: {rule_text(rule)}" for rule in applied.rules[i:j])
            yield from (f"chain {live.name}, rule {k}: added: {rule_text(live.rules[k - 1])}" for k in range(m + 1, n + 1))


def _numbers(rules: tuple[Rule, ...]) -> Mapping[Rule, int]:
    """A number for each rule: comparing and hashing rules again and again costs more than all the rest."""
    return {rule: number for number, rule in enumerate(rules)}


def _hook(hook: Hook | None) -> str:
    return f"at hook {hook.name}, priority {hook.priority}, policy {hook.policy}" if hook else "at no hook"


def _sets(live: Ruleset, applied: Ruleset) -> Iterator[str]:
    before, now = {s.name: s for s in applied.sets}, {s.name: s for s in live.sets}
    for name in dict.fromkeys((*before, *now)):
        if name not in now:
            yield f"set {name}: gone"
        elif name not in before:
            yield f"set {name}: added"
        elif _kind(before[name]) != _kind(now[name]):
            yield f"set {name}: {_kind_text(now[name])}; applied was {_kind_text(before[name])}"
        elif not now[name].dynamic:
            removed, added = difference(before[name].ranges, now[name].ranges)
            yield from _elements(name, "added", now[name].version, added)
            yield from _elements(name, "gone", now[name].version, removed)


def _elements(name: str, what: str, version: int, ranges: Ranges) -> Iterator[str]:
    if ranges:
        more = f" and {len(ranges) - MAX_ELEMENTS} more" if len(ranges) > MAX_ELEMENTS else ""
        yield f"set {name}: {what}: {', '.join(range_text(version, r) for r in ranges[:MAX_ELEMENTS])}{more}"


def _kind(each: AddressSet) -> tuple[int, int | None, int | None]:
    return each.version, each.timeout, each.size


def _kind_text(each: AddressSet) -> str:
    return f"up to {each.size} members, {each.timeout} s each" if each.dynamic else f"IPv{each.version} addresses"
