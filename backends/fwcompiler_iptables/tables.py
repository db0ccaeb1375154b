"""Which of iptables' tables a chain belongs to, and the names that chains have there.

A chain's hook decides: kind nat is table ``nat``, priority -300 ``raw``, -150 ``mangle``, else it is ``filter``. A chain without
a hook is wanted in every table from which it is reached, and iptables has it there once each. In the neutral ruleset that is
read back, a chain of another table than ``filter`` is called ``TABLE/NAME``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fwcompiler.ruleset import (
    AHEAD,
    Chain,
    Family,
    Final,
    Goto,
    Hook,
    HookKind,
    HookName,
    InRanges,
    InSet,
    Jump,
    OverLimit,
    Rule,
    Ruleset,
    TypeIn,
)

BUILT_IN: Mapping[str, Mapping[HookName, str]] = {
    "filter": {"input": "INPUT", "forward": "FORWARD", "output": "OUTPUT"},
    "nat": {"prerouting": "PREROUTING", "input": "INPUT", "output": "OUTPUT", "postrouting": "POSTROUTING"},
    "mangle": {
        "prerouting": "PREROUTING",
        "input": "INPUT",
        "forward": "FORWARD",
        "output": "OUTPUT",
        "postrouting": "POSTROUTING",
    },
    "raw": {"prerouting": "PREROUTING", "output": "OUTPUT"},
}
"""Built-in chains by table and hook (iptables(8)), tables in the order in which they are changed.

Each table is one transaction. ``filter`` comes first, because what it drops no other table lets through; a table that goes
altogether goes before it (:func:`order`), so that no moment is more open than what was and what will be.
"""
PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0}
"""include/uapi/linux/netfilter_ipv4.h; those of ``nat`` depend on the hook."""
NAT_PRIORITIES: Mapping[HookName, int] = {"prerouting": -100, "output": -100, "input": 100, "postrouting": 100}
CHAIN_PREFIX = "FWC-"
CHAIN_MAX = 28
"""XT_EXTENSION_MAXNAMELEN (include/uapi/linux/netfilter/x_tables.h), without the closing NUL."""
_BUILT_IN_NAMES = frozenset(chain for hooks in BUILT_IN.values() for chain in hooks.values())


def hook_of(table: str, built_in: str) -> Hook | None:
    """Where a built-in chain hangs; None for a chain that is none."""
    for name, chain in BUILT_IN.get(table, {}).items():
        if chain == built_in:
            priority = NAT_PRIORITIES[name] if table == "nat" else PRIORITIES[table]
            kind: HookKind = "nat" if table == "nat" else "route" if (table, name) == ("mangle", "output") else "filter"
            return Hook(name, priority, "accept", kind)
    return None


def table_of(hook: Hook) -> str | None:
    """The table that has a built-in chain exactly there; None where iptables has none."""
    for table, chains in BUILT_IN.items():
        found = hook_of(table, chains[hook.name]) if hook.name in chains else None
        if found and (found.priority, found.kind) == (hook.priority, hook.kind):
            return table
    return None


def split(name: str) -> tuple[str, str]:
    """Table and chain of a neutral name: ``raw/early`` and, without a table, ``filter``."""
    table, slash, chain = name.partition("/")
    return (table, chain) if slash and table in BUILT_IN else ("filter", name)


def joined(table: str, chain: str) -> str:
    """The inverse of :func:`split`."""
    return chain if table == "filter" else f"{table}/{chain}"


_SHORT = {"service.": "s.", "early.": "e.", "guard.": "g."}


def chain_name(name: str) -> str:
    """``service.sip`` is ``FWC-s.sip``, in whatever table: the longest service name still fits into 28 characters."""
    name = split(name)[1]
    if name.startswith(CHAIN_PREFIX):
        return name
    long = next((long for long in _SHORT if name.startswith(long)), "")
    return CHAIN_PREFIX + _SHORT.get(long, "") + name.removeprefix(long)


def neutral_chain(kernel: str, table: str = "filter") -> str:
    """The inverse of :func:`chain_name`. A chain that fwc would never write keeps its kernel name."""
    name = kernel.removeprefix(CHAIN_PREFIX)
    for long, short in _SHORT.items():
        if name.startswith(short):
            return joined(table, long + name.removeprefix(short))
    if not name or "/" in name or name.startswith((CHAIN_PREFIX, *_SHORT)) or name in _BUILT_IN_NAMES:
        return joined(table, kernel)
    return joined(table, name)


def is_built_in(chain: Chain) -> bool:
    """True for a built-in chain as a reader found it: it has the kernel's name for its hook."""
    table, name = split(chain.name)
    return chain.hook is not None and hook_of(table, name) == replace(chain.hook, policy="accept")


@dataclass(frozen=True, slots=True)
class Tables:
    """One table of one family: rules of built-in chains that lead to ours, and our chains by neutral name without table.

    `behind`: built-in chains in which rules of others stand before those.
    """

    jumps: tuple[tuple[str, Rule], ...]
    chains: Mapping[str, tuple[Rule, ...]]
    behind: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.jumps or self.chains)


NOTHING = Tables((), {})


def tables(ruleset: Ruleset, version: int) -> dict[str, Tables]:
    """The part of a ruleset that each table of one family holds; tables with nothing are left out.

    A base chain of the compiler becomes a chain of ours and a jump to it; a built-in chain that a reader found is
    there as it is. Where a base chain's policy says drop, so does its last rule: a chain of ours has no policy.
    """
    placed = {
        table: replace(_table(chains, version), behind=_behind(ruleset.others, table, version))
        for table, chains in placement(ruleset).items()
    }
    return {table: each for table, each in placed.items() if each}


def ahead_text(table: str, chain: str, version: int, rules: str = "") -> str:
    """What is said where rules of others stand before our call: `ahead of ours: IPv4, filter INPUT: -A INPUT -s … -j ACCEPT`."""
    return f"{AHEAD}IPv{version}, {table} {chain}: {rules}"


def _behind(others: Sequence[str], table: str, version: int) -> frozenset[str]:
    chains = BUILT_IN[table].values()
    return frozenset(c for c in chains if any(what.startswith(ahead_text(table, c, version)) for what in others))


def _table(chains: Sequence[Chain], version: int) -> Tables:
    jumps: list[tuple[str, Rule]] = []
    ours: dict[str, tuple[Rule, ...]] = {}
    for chain in sorted(chains, key=lambda c: c.name):
        if chain.hook and chain.hook.version not in (None, version):
            continue
        name = split(chain.name)[1]
        rules = tuple(_local(r) for r in chain.rules if _concerns(r, version))
        if chain.hook and is_built_in(chain):
            jumps += [(name, rule) for rule in rules]
            continue
        if chain.hook:
            jumps.append((_built_in(chain.hook), Rule((Family(version),), Jump(name))))
            if chain.hook.policy == "drop" and not _is_closed(rules):
                rules += (Rule((Family(version),), Final.DROP),)
        ours[name] = rules
    return Tables(tuple(jumps), ours)


def placement(ruleset: Ruleset) -> dict[str, list[Chain]]:
    """The chains of each table. What no base chain leads to is in ``filter``, where it does nothing, with what it calls."""
    known = {c.name: c for c in ruleset.chains}
    placed = {table: _with_called([c for c in ruleset.chains if _home(c) == table], known) for table in BUILT_IN}
    found = {c.name for chains in placed.values() for c in chains}
    placed["filter"] = _with_called([*placed["filter"], *(c for c in ruleset.chains if c.name not in found)], known)
    return placed


def _with_called(chains: list[Chain], known: Mapping[str, Chain]) -> list[Chain]:
    """The chains and all that they lead to, as far as no other table is its home."""
    here = list(chains)
    names = {c.name for c in here}
    for chain in here:
        called = (r.verdict.chain for r in chain.rules if isinstance(r.verdict, Goto | Jump))
        new = [known[n] for n in called if n in known and n not in names and _home(known[n]) is None]
        here += dict.fromkeys(new)
        names |= {c.name for c in new}
    return here


def _home(chain: Chain) -> str | None:
    """The table that a chain is bound to: by its name or by its hook; None where that is for others to say."""
    table, name = split(chain.name)
    if name != chain.name:
        return table
    return table_of(chain.hook) or "filter" if chain.hook else None


def _built_in(hook: Hook) -> str:
    table = table_of(hook)
    return BUILT_IN[table][hook.name] if table else hook.name.upper()


def _local(rule: Rule) -> Rule:
    """The rule with its call as its own table says it."""
    if isinstance(rule.verdict, Goto | Jump) and split(rule.verdict.chain)[1] != rule.verdict.chain:
        return replace(rule, verdict=replace(rule.verdict, chain=split(rule.verdict.chain)[1]))
    return rule


def _concerns(rule: Rule, version: int) -> bool:
    return all(m.version == version for m in rule.matches if isinstance(m, InSet | InRanges | Family | TypeIn | OverLimit))


def _is_closed(rules: Sequence[Rule]) -> bool:
    """True where no packet comes to the end; a jump may come back, and `return` leaves by the end."""
    if not rules or [m for m in rules[-1].matches if not isinstance(m, Family)]:
        return False
    verdict = rules[-1].verdict
    return isinstance(verdict, Goto) or (isinstance(verdict, Final) and verdict is not Final.RETURN)


def open_ends(ruleset: Ruleset) -> Iterator[tuple[Chain, Chain]]:
    """Base chains that are to drop what is left, each with a chain by which packets would leave it undecided all the same.

    Our base chain is one that the built-in chain jumps to. A `return` in it, or in what it goes to without coming back, leads
    past the rule that stands for its policy.
    """
    known = {c.name: c for c in ruleset.chains}
    for base in ruleset.chains:
        if base.hook is None or base.hook.policy != "drop" or is_built_in(base):
            continue
        reached = [base]
        for chain in reached:
            called = (r.verdict.chain for r in chain.rules if isinstance(r.verdict, Goto))
            reached += dict.fromkeys(known[n] for n in called if n in known and known[n] not in reached)
            ends = (_is_closed([r for r in chain.rules if _concerns(r, version)]) for version in (4, 6))
            if any(r.verdict is Final.RETURN for r in chain.rules) or (chain is not base and not all(ends)):
                yield base, chain


def order(aims: Mapping[str, Tables]) -> Iterator[str]:
    """Tables in the order in which one family is changed: what goes altogether first, then ``filter``, then the others."""
    yield from (table for table in reversed(tuple(BUILT_IN)) if table not in aims)
    yield from (table for table in BUILT_IN if table in aims)
