"""What to run to load, read, change and remove table ``inet fwc``. Everything here returns data.

Rules travel as nft text, in one transaction. Sets of more than `INLINE` entries are filled through netlink (`Fill`),
because nft reads a whole set before it changes one element of it. A rule that changes together with such a set is
pointed at a twin, filled beforehand under the other slot name, so that both change in the same instant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fwcompiler.backend import Command, Fill, Rendered, Saved, SetChange, Step
from fwcompiler.diagnostics import Finding, Position
from fwcompiler.ports import PROTOCOLS
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Foreign,
    InRanges,
    InSet,
    OverLimit,
    PortIn,
    ProtocolIs,
    Rule,
    Ruleset,
    Translate,
    TypeIn,
    Undecided,
    Unknown,
    is_ours,
)
from fwcompiler_nftables.parse import STRAY, parse_listing, read_counters
from fwcompiler_nftables.render import TABLE, Line, elements, hook_spec, limit_spec, limits, member_text, rule_lines, set_spec, table_text
from fwcompiler_nftables.saved import read_foreign, read_own

INLINE = 500
"""Entries up to which a set's content is written into the transaction's text."""

_ICMP = {4: "icmp", 6: "icmpv6"}
_DELETE_TABLE = Command(("nft", "-f", "-"), f"add table {TABLE}\ndelete table {TABLE}\n")


@dataclass(frozen=True, slots=True)
class Nftables:
    """The backend; its methods are those of `fwcompiler.backend.Backend`."""

    name: str = "nftables"
    set_kind: Literal["nft"] = "nft"
    programs: tuple[str, ...] = ("nft",)

    def refuse(self, ruleset: Ruleset) -> Sequence[Finding]:
        """nftables expresses all of the neutral ruleset but what nobody understood."""
        return [
            Finding("value", f"nftables cannot express {text}", rule.origin)
            for chain in ruleset.chains
            for rule in chain.rules
            for text in _faults(rule)
        ]

    def render(self, ruleset: Ruleset) -> Rendered:
        """One file, loadable with `nft -f`."""
        return Rendered({"fwc.nft": table_text(ruleset)})

    def load(self, ruleset: Ruleset) -> Sequence[Step]:
        """One transaction; where sets are big, the sets go first: without a chain they touch no packet."""
        return self.update(Ruleset(), ruleset, ())

    def listing(self, *, big: bool = False) -> Sequence[Command]:
        """Terse: a set's content is read through netlink. `missing_ok`: no table is an answer.

        nft 1.0.6 fetches every element before it lists one table, terse or not; only a listing of the family does
        without. That one may stumble over other people's newer rules, hence `otherwise`.
        """
        table = Command(("nft", "-j", "-t", "list", "table", *TABLE.split()), missing_ok=True)
        return (Command(("nft", "-j", "-t", "list", "ruleset", "inet"), otherwise=table) if big else table,)

    def parse(self, outputs: Sequence[str]) -> Ruleset:
        """See `fwcompiler_nftables.parse`."""
        return parse_listing(outputs[0])

    def counters(self, outputs: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        """The named counters of the table."""
        return read_counters(outputs[0])

    def foreign(self, saved: Sequence[Saved], ours: Ruleset | None = None) -> Ruleset:
        """See `fwcompiler_nftables.saved`."""
        return read_foreign(saved, ours)

    def own(self, saved: Sequence[Saved]) -> Ruleset:
        """See `fwcompiler_nftables.saved`."""
        return read_own(saved)

    def update(self, live: Ruleset, wanted: Ruleset, changes: Sequence[SetChange]) -> Sequence[Step]:
        """Only what differs; see the module's head for how rules and contents change together."""
        return _Update(live, wanted, changes).steps()

    def remove(self, live: Ruleset) -> Sequence[Step]:
        """The table and everything in it."""
        return (Step(_DELETE_TABLE),) if live else ()


class _Update:
    """One update being worked out: which chains and sets differ, and the text that changes them."""

    def __init__(self, live: Ruleset, wanted: Ruleset, changes: Sequence[SetChange]) -> None:
        self.live, self.wanted, self.changes = live, wanted, changes
        self.old_chains = {c.name: c for c in live.chains}
        self.old_sets = {s.name: s for s in live.sets}
        self.new_sets = [s for s in wanted.sets if s.name not in self.old_sets]
        self.remade = [s for s in wanted.sets if s.name in self.old_sets and s.dynamic and _spec(s) != _spec(self.old_sets[s.name])]
        self.gone_sets = [s for s in live.sets if s.name not in {w.name for w in wanted.sets}]
        self.changed = [c for c in wanted.chains if self.old_chains.get(c.name) != c]
        self.gone_chains = [c for c in live.chains if c.name not in {w.name for w in wanted.chains}]

    def steps(self) -> Sequence[Step]:
        if self._is_foreign():
            return (Step(self._anew()),)
        strays = [what.removeprefix(STRAY) for what in self.live.others]
        first = (Step(_delete_sets(strays)),) if strays else ()
        return (*first, *(self._restructured() if self._structure_changes() else self._content_only()))

    def _is_foreign(self) -> bool:
        """True where our table holds what fwc never makes, or a set of ours is of another kind."""
        changed = (s for s in self.wanted.sets if s.name in self.old_sets and s.dynamic != self.old_sets[s.name].dynamic)
        return any(not what.startswith(STRAY) for what in self.live.others) or any(changed)

    def _restructured(self) -> Iterable[Step]:
        """Sets that need it beforehand, the rules in one transaction, and what nobody uses any more afterwards.

        Old sets go in a transaction of their own: packets may still be on their way through the old rules.
        """
        twins = [self._twin(s) for s in (*(c.set for c in self.changes if self._is_big(c)), *self.remade)]
        beforehand = [*(s for s in self.new_sets if len(s.ranges) > INLINE), *twins]
        if beforehand:
            undo = _delete_sets([s.kernel_name for s in beforehand]) if self.live else _DELETE_TABLE
            yield Step(_script(((f"add table {TABLE}", None), *self._made(beforehand))), (undo,))
            yield from (Step(Fill("nft", s.kernel_name, s.version, s.ranges)) for s in beforehand if s.ranges)
        yield Step(_script(self._transaction(beforehand, twins)))
        gone = [s.kernel_name for s in (*self.gone_sets, *(self.old_sets[s.name] for s in twins))]
        gone += [name for name, _ in limits(self.live) if name not in dict(limits(self.wanted))]
        if gone:
            yield Step(_delete_sets(gone))

    def _structure_changes(self) -> bool:
        return bool(self.new_sets or self.remade or self.gone_sets or self.changed or self.gone_chains or not self.live.chains)

    def _anew(self) -> Command:
        """What somebody put into our table can hang together in any way: the table is replaced whole, in one transaction.

        Dynamic members stay with the time they have left; counters start again.
        """
        sets = (replace(s, slot="", kernel="") for s in self.wanted.sets)
        text = table_text(replace(self.wanted, sets=tuple(sets)))
        return Command(("nft", "-f", "-"), f"add table {TABLE}\ndelete table {TABLE}\n{text}")

    def _content_only(self) -> Sequence[Step]:
        """Sets keep their names: consecutive fills of one kind are one transaction."""
        return [Step(Fill("nft", self.old_sets[c.set.name].kernel_name, c.set.version, c.add, c.remove)) for c in self.changes]

    def _is_big(self, change: SetChange) -> bool:
        """True where nft would have to read a large set to change it."""
        return len(change.set.ranges) > INLINE or len(change.add) + len(change.remove) > INLINE

    def _twin(self, wanted: AddressSet) -> AddressSet:
        old = self.old_sets[wanted.name]
        return replace(wanted, slot="" if old.slot else "b", kernel="")

    def _made(self, sets: Iterable[AddressSet]) -> Iterable[Line]:
        """Sets without their content, dynamic ones with their members."""
        for each in sets:
            yield self._set_line(each), each.origin
            yield from self._member_line(each)

    def _member_line(self, each: AddressSet) -> Iterable[Line]:
        if each.members:
            texts = ", ".join(member_text(each, address, left) for address, left in each.members[: each.size])
            yield f"add element {TABLE} {each.kernel_name} {{ {texts} }}", each.origin

    def _set_line(self, each: AddressSet, *, content: bool = False) -> str:
        inline = f" elements = {elements(each.version, each.ranges)};" if content and each.ranges else ""
        return f"add set {TABLE} {each.kernel_name} {{ {'; '.join(set_spec(each))};{inline} }}"

    def _transaction(self, beforehand: list[AddressSet], twins: list[AddressSet]) -> Iterable[Line]:
        """Everything but big contents: first what goes, then what comes, so that each line finds what it names."""
        flipped = {s.name for s in twins}
        names = {s.name: s.kernel_name for s in (*self.wanted.sets, *self.live.sets, *twins)}
        touched = [c for c in self.wanted.chains if c in self.changed or _uses(c, flipped)]
        moved = [c for c in touched if c.name in self.old_chains and self.old_chains[c.name].hook != c.hook]
        yield f"add table {TABLE}", None
        yield from self._gone(touched, moved)
        for name in self.wanted.counters():
            if name not in self.live.counters():
                yield f"add counter {TABLE} {name}", None
        for each in self.new_sets:
            if each not in beforehand:
                yield self._set_line(each, content=True), each.origin
                yield from self._member_line(each)
        for name, limit in limits(self.wanted):
            if name not in dict(limits(self.live)):
                yield f"add set {TABLE} {name} {{ {'; '.join(limit_spec(limit))}; }}", None
        yield from self._new_chains(touched, moved, names)
        yield from self._small_contents(flipped)

    def _gone(self, touched: list[Chain], moved: list[Chain]) -> Iterable[Line]:
        for chain in (*self.gone_chains, *touched):
            if chain.name in self.old_chains:
                yield f"flush chain {TABLE} {chain.name}", None
        for chain in (*self.gone_chains, *moved):
            yield f"delete chain {TABLE} {chain.name}", None
        for name in self.live.counters():
            if name not in self.wanted.counters():
                yield f"delete counter {TABLE} {name}", None

    def _new_chains(self, touched: list[Chain], moved: list[Chain], names: Mapping[str, str]) -> Iterable[Line]:
        """All chains before any rule, since rules name chains; the base chain gets its rules like the others."""
        for chain in touched:
            if chain.name not in self.old_chains or chain in moved:
                spec = f" {{ {hook_spec(chain.hook)} }}" if chain.hook else ""
                yield f"add chain {TABLE} {chain.name}{spec}", None
        for chain in touched:
            for text, origin in rule_lines(chain, names):
                yield f"add rule {TABLE} {chain.name} {text}", origin

    def _small_contents(self, flipped: set[str]) -> Iterable[Line]:
        for change in self.changes:
            if change.set.name in flipped:
                continue
            name = self.old_sets[change.set.name].kernel_name
            for verb, ranges in (("delete", change.remove), ("add", change.add)):
                if ranges:
                    yield f"{verb} element {TABLE} {name} {elements(change.set.version, ranges)}", change.set.origin


def _spec(each: AddressSet) -> tuple[object, ...]:
    return each.version, each.timeout, each.size


def _uses(chain: Chain, sets: set[str]) -> bool:
    return any(isinstance(m, InSet) and m.set in sets for rule in chain.rules for m in rule.matches)


def _delete_sets(names: Iterable[str]) -> Command:
    return _script((f"delete set {TABLE} {name}", None) for name in names)


def _script(lines: Iterable[Line]) -> Command:
    """Lines for `nft -f -`, each with the policy line that a refusal of it points to."""
    texts: list[str] = []
    origins: dict[int, Position] = {}
    for text, origin in lines:
        texts.append(text)
        if origin:
            origins[len(texts)] = origin
    return Command(("nft", "-f", "-"), "\n".join((*texts, "")), origins=origins)


def _faults(rule: Rule) -> Iterable[str]:
    """What of a rule fwc only reads: matches that nobody understood, matches and verdicts of other people's rulesets."""
    yield from (match.text for match in rule.matches if isinstance(match, Unknown))
    yield from (str(match) for match in rule.matches if isinstance(match, Foreign))
    if isinstance(rule.verdict, Undecided) or (isinstance(rule.verdict, Translate) and not is_ours(rule.verdict)):
        yield str(rule.verdict)
    protocols = {m.protocol if isinstance(m, PortIn) else _ICMP[m.version] for m in rule.matches if isinstance(m, PortIn | TypeIn)}
    numbers = {m.number for m in rule.matches if isinstance(m, ProtocolIs) and not m.negated}
    if len(protocols) > 1 or (protocols and numbers - {PROTOCOLS[p] for p in protocols}):
        yield f"ports or types of several protocols in one rule: {', '.join(sorted(protocols | set(map(str, numbers))))}"
    if len({m.version for m in rule.matches if isinstance(m, InSet | InRanges | Family | TypeIn | OverLimit)}) > 1:
        yield "both address families in one rule"
