"""What to run to load, read, change and remove our chains and sets. Everything here returns data.

Rules travel through ``iptables-restore --noflush``: one transaction a family and table, in which only the chains named are
replaced. Each is a step of its own: one that is refused leaves its table as it was, and the steps before it are undone.
Sets are filled beside and swapped; a set whose rules change in the same update is replaced by its twin, which has the other
slot name, so that rules and content change in one instant. Sets go last, when no rule holds them any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from fwcompiler.addresses import Ranges, merged, prefix_count, subtract
from fwcompiler.backend import Command, Do, Fill, Rendered, Saved, SetChange, SetKind, Step
from fwcompiler.diagnostics import Finding, Unreadable
from fwcompiler.natives import marked, unprinted
from fwcompiler.ruleset import AHEAD, AddressSet, InSet, Rule, Ruleset
from fwcompiler_iptables import render
from fwcompiler_iptables.parse import ALONE, parse_listing
from fwcompiler_iptables.render import SLOTS, Lines, create_words, member_lines, set_name, specs, twin_name
from fwcompiler_iptables.saved import read_foreign, read_own
from fwcompiler_iptables.tables import BUILT_IN, NOTHING, Tables, chain_name, order, tables

VERSIONS = (4, 6)


@dataclass(slots=True)
class Iptables:
    """The backend for one variant of the programs; its methods are those of `fwcompiler.backend.Backend`.

    Removing leaves nothing behind, with one exception: a legacy ``filter`` table, once used, stays registered (empty, policies
    accept) until its kernel module is unloaded, which would be the whole host's business (net/netfilter/x_tables.c).
    """

    variant: Literal["nft", "legacy"]
    name: str
    programs: tuple[str, ...]
    set_kind: SetKind = "ipset"

    def refuse(self, ruleset: Ruleset) -> Sequence[Finding]:
        """See `fwcompiler_iptables.render.refuse`."""
        return render.refuse(ruleset)

    def render(self, ruleset: Ruleset) -> Rendered:
        """For ``ipset restore``, then ``iptables-restore --noflush`` and ``ip6tables-restore --noflush``."""
        rules = {f"fwc.v{version}": render.family_text(ruleset, version) for version in VERSIONS}
        return Rendered({"fwc.ipset": render.sets_text(ruleset), **rules})

    def load(self, ruleset: Ruleset) -> Sequence[Step]:
        """An update from nothing; the jump comes with the rules of its family."""
        return self.update(Ruleset(), ruleset, ())

    def listing(self, *, big: bool = False) -> Sequence[Command]:  # noqa: ARG002 - these never read a set's content
        """Rules of both families, then the heads of all sets; with iptables-nft also what nft prints of both families, where it can.

        No table is named: to the legacy program that would register it where nobody uses it.
        """
        saves = (Command((self._program(version, "save"), "-c")) for version in VERSIONS)
        families = ("ip", "ip6") if self.variant == "nft" else ()
        natives = (Command(("nft", "-j", "-t", "list", "ruleset", family), may_fail=True) for family in families)
        return (*saves, Command(("ipset", "list", "-t"), missing_ok=True), *natives)

    def parse(self, outputs: Sequence[str]) -> Ruleset:
        """See `fwcompiler_iptables.parse`; for what nft prints `fwcompiler.natives`. Records of before have none of it.

        Raises:
            Unreadable: a table that our rules may be in holds rules that iptables-nft-save cannot print.
        """
        found = parse_listing([marked(s, n) for s, n in zip_longest(outputs[:2], outputs[3:], fillvalue="")], outputs[2])
        for family, save in zip(("ip", "ip6"), outputs[:2], strict=True):
            table = unprinted(save)
            if table:
                raise Unreadable(
                    f"iptables-nft-save cannot print the table `{family} {table}`: rules in it were made with nft",
                    hint=f"`nft -a list table {family} {table}` shows them; put them into a table of their own",
                    ours=bool(found.chains),
                )
        return found

    def counters(self, outputs: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        """The rules' own counters, added up by service and verdict over both families."""
        sums: dict[str, tuple[int, int]] = {}
        for chain in self.parse(outputs).chains:
            for rule in chain.rules:
                if rule.counter:
                    packets, octets = sums.get(rule.counter, (0, 0))
                    sums[rule.counter] = packets + rule.count[0], octets + rule.count[1]
        return sums

    def foreign(self, saved: Sequence[Saved], ours: Ruleset | None = None) -> Ruleset:
        """See `fwcompiler_iptables.saved`."""
        return read_foreign(saved, ours)

    def own(self, saved: Sequence[Saved]) -> Ruleset:
        """See `fwcompiler_iptables.saved`."""
        return read_own(saved)

    def update(self, live: Ruleset, wanted: Ruleset, changes: Sequence[SetChange]) -> Sequence[Step]:
        """Only what differs; see the module's head for how rules and contents change together.

        A dynamic set whose timeout or size changes is built anew and gets its members back with the time they have left.
        """
        found = {version: tables(live, version) for version in VERSIONS}
        aims = {version: tables(wanted, version) for version in VERSIONS}
        busy = {version for version in VERSIONS if not _same(found[version], aims[version])}
        sets = _Sets(live, wanted, changes, busy)
        steps = [*sets.before(), *sets.contents()]
        for table in order({**aims[4], **aims[6]}):
            for version in VERSIONS:
                old, new = found[version].get(table, NOTHING), aims[version].get(table, NOTHING)
                steps += self._changed(table, version, (old, sets.slots_before), (new, sets.slots_after))
        return (*steps, *sets.after())

    def remove(self, live: Ruleset) -> Sequence[Step]:
        """Jump, chains and sets; with iptables-nft also a table that holds nothing else, which the program made for us.

        A table that was there before, but without a rule, a chain or a policy other than accept, goes as well:
        it cannot be told from one made for us, and it did nothing.
        """
        slots = {s.name: s.slot for s in live.sets}
        found = {version: tables(live, version) for version in VERSIONS}
        steps: list[Step] = []
        for table in order({}):
            for version in VERSIONS:
                steps += self._changed(table, version, (found[version].get(table, NOTHING), slots), (NOTHING, {}))
        return (*steps, *_Sets(live, Ruleset(), (), set()).after())

    def _changed(self, table: str, version: int, before: _Slotted, after: _Slotted) -> Iterator[Step]:
        """One table of one family. With iptables-nft a table that nobody else uses goes when we do."""
        forth = _delta(table, version, before, after)
        if forth is None:
            return
        old = before[0]
        empty = self.variant == "nft" and not after[0] and any(rule.origin and rule.origin.file == ALONE for _, rule in old.jumps)
        if empty:
            forth = _with_base_chains(table, forth, old)
        back = _delta(table, version, after, before) or Lines(table)
        yield Step(self._restore(version, forth), (self._restore(version, back),))
        if empty:
            yield Step(Command((self._program(version, "restore"), "-w", "5"), f"*{table}\nCOMMIT\n"))

    def _restore(self, version: int, lines: Lines) -> Command:
        return Command((self._program(version, "restore"), "--noflush", "-w", "5", "-c"), lines.text(), origins=lines.origins)

    def _program(self, version: int, verb: str) -> str:
        return f"ip{'6' if version == 6 else ''}tables-{self.variant}-{verb}"


def _same(found: Mapping[str, Tables], aims: Mapping[str, Tables]) -> bool:
    pairs = [(found.get(table, NOTHING), aims.get(table, NOTHING)) for table in BUILT_IN]
    return all(a.chains == b.chains and not _calls(replace(a, behind=b.behind), b) for a, b in pairs)


_Slotted = tuple[Tables, Mapping[str, str]]
"""A table, and the slots in which its sets are."""


def _delta(table: str, version: int, before: _Slotted, after: _Slotted) -> Lines | None:
    """What turns one table of one family from one state to another; None where they are the same.

    Replaced chains are flushed by naming them. A rule that stays keeps its count.
    """
    (old, slots_old), (new, slots_new) = before, after
    moved = {name for name in {*slots_old, *slots_new} if slots_old.get(name) != slots_new.get(name)}
    changed = [name for name, rules in new.chains.items() if old.chains.get(name) != rules or _uses(rules, moved)]
    gone = [name for name in old.chains if name not in new.chains]
    calls = _calls(old, new)
    if not (changed or gone or calls):
        return None
    lines = Lines(table)
    # An empty chain may be missing in this family without the listing showing it: naming it makes it, or changes nothing.
    for name in dict.fromkeys((*changed, *gone, *(n for n in new.chains if not old.chains.get(n)))):
        lines.add(f":{chain_name(name)} - [0:0]")
    for built_in, rule in (jump for jump in old.jumps if jump[0] in calls):
        for spec in specs(rule, version, slots_old):
            lines.add(f"-D {built_in} {spec}")
    for name in changed:
        lines.rules(name, _counted(new.chains[name], old.chains.get(name, ())), version, slots_new)
    for built_in, rule in reversed([jump for jump in new.jumps if jump[0] in calls]):
        for spec in specs(rule, version, slots_new):
            lines.add(f"-I {built_in} 1 {spec}")
    for name in gone:
        lines.add(f"-X {chain_name(name)}")
    return lines


def _calls(old: Tables, new: Tables) -> set[str]:
    """Built-in chains whose calls of ours change, or no longer stand first: all of them go, and come again at the top.

    What is put back later is put first as well: its old place may not be there any more, and first is where it belongs.
    """
    called = {name for name, _ in (*old.jumps, *new.jumps)}
    moved = {name for name in old.behind - new.behind if any(name == n for n, _ in new.jumps)}
    return moved | {name for name in called if [j for j in old.jumps if j[0] == name] != [j for j in new.jumps if j[0] == name]}


def _with_base_chains(table: str, lines: Lines, found: Tables) -> Lines:
    """Take the built-in chains out as well, in the same transaction. The kernel refuses it all if anybody has a rule there.

    Only a chain that exists can be taken out, and ``iptables-nft`` makes it when a rule is put in.
    """
    probe = chain_name(next(iter(found.chains)))
    head, tail = lines.texts[:1], lines.texts[1:]
    declared = [text for text in tail if text.startswith(":")]
    probes = [f"-{verb} {chain} {place}-j {probe}" for chain in BUILT_IN[table].values() for verb, place in (("I", "1 "), ("D", ""))]
    rest = [text for text in tail if not text.startswith(":")]
    lines.texts = [*head, *declared, *probes, *rest, *(f"-X {chain}" for chain in BUILT_IN[table].values())]
    return lines


def _uses(rules: Iterable[Rule], sets: set[str]) -> bool:
    return any(isinstance(m, InSet) and m.set in sets for rule in rules for m in rule.matches)


def _counted(rules: Iterable[Rule], before: Iterable[Rule]) -> Iterator[Rule]:
    """The rules, each with the count of the equal rule that stood in the chain before; equal ones in order."""
    counts: dict[Rule, list[tuple[int, int]]] = {}
    for rule in before:
        counts.setdefault(rule, []).append(rule.count)
    for rule in rules:
        kept = counts.get(rule)
        yield replace(rule, count=kept.pop(0) if kept else rule.count)


class _Sets:
    """How an update changes sets: which are made before the rules, how contents change, which go afterwards."""

    def __init__(self, live: Ruleset, wanted: Ruleset, changes: Sequence[SetChange], busy: set[int]) -> None:
        self.live = {s.name: s for s in live.sets}
        self.wanted = {s.name: s for s in wanted.sets}
        self.changes = {c.set.name: c for c in changes if c.add or c.remove}
        self.strays = [what.removeprefix("set ") for what in live.others if not what.startswith(AHEAD)]
        self.made = [s for s in wanted.sets if s.name not in self.live]
        self.remade = [s for s in wanted.sets if s.name in self.live and _shape(s) != _shape(self.live[s.name])]
        same = [s for s in wanted.sets if s not in self.made and s not in self.remade and s.name in self.changes]
        self.flipped = [self._filled(s) for s in same if s.version in busy]
        quiet = [s for s in same if s.version not in busy]
        self.touched = [s for s in quiet if _is_one(self.changes[s.name])]
        self.swapped = [self._filled(s) for s in quiet if s not in self.touched]
        self.gone = [s for s in live.sets if s.name not in self.wanted]
        self.slots_before = {s.name: s.slot for s in live.sets}
        self.slots_after = {name: slot for name, slot in self.slots_before.items() if name in self.wanted}
        self.slots_after |= {s.name: self._free_slot(s) for s in (*self.made, *self.remade, *self.flipped)}
        new = (*self.made, *self.remade, *self.flipped, *self.swapped)
        self.new = sorted(((set_name(s.name, self._free_slot(s)), s) for s in new), key=lambda n: n[0])
        self.in_the_way = [kernel for kernel, _ in self.new if kernel in self.strays]

    def _filled(self, each: AddressSet) -> AddressSet:
        """The set with its whole new content: what it is replaced by must not lose what the change does not name."""
        change = self.changes[each.name]
        return replace(each, ranges=change.set.ranges or each.ranges)

    def _free_slot(self, each: AddressSet) -> str:
        names = (each.name, twin_name(each.name))
        free = [slot for slot in SLOTS if slot not in {self.live[name].slot for name in names if name in self.live}]
        return next((slot for slot in free if set_name(each.name, slot) not in self.strays), free[0])

    def before(self) -> Iterator[Step]:
        """Sets that the new rules or the swaps need, filled; a stray that has the name of one makes way first."""
        yield from (Step(_destroy(kernel)) for kernel in self.in_the_way)
        for kernel, each in self.new:
            yield Step(Command(("ipset", *create_words(each, kernel))), (_destroy(kernel),))
            if each.dynamic:
                lines = list(member_lines(each, kernel))
                if lines:
                    yield Step(Command(("ipset", "restore"), "\n".join((*lines, ""))))
            elif each.ranges:
                yield Step(Fill("ipset", kernel, each.version, each.ranges))

    def contents(self) -> Iterator[Step]:
        """Contents that change without their rules. One element is one change to the kernel; more go into a twin, swapped in."""
        for each in self.touched:
            change, kernel = self.changes[each.name], self._kernel(each)
            back = Fill("ipset", kernel, each.version, change.remove, change.add)
            yield Step(Fill("ipset", kernel, each.version, change.add, change.remove), (back,))
        for each in self.swapped:
            swap = Command(("ipset", "swap", set_name(each.name, self._free_slot(each)), self._kernel(each)))
            yield Step(swap, (swap,))

    def after(self) -> Iterator[Step]:
        """Sets that nothing uses any more. The undo of each puts it back as far as its content is known."""
        for each in self.swapped:
            yield _gone(replace(each, ranges=self._old_content(each)), set_name(each.name, self._free_slot(each)))
        for each in self.flipped:
            yield _gone(replace(each, ranges=self._old_content(each)), self._kernel(each))
        for each in (*(self.live[s.name] for s in self.remade), *self.gone):
            yield _gone(each, self._kernel(each))
        yield from (Step(_destroy(kernel)) for kernel in self.strays if kernel not in self.in_the_way)

    def _kernel(self, each: AddressSet) -> str:
        return set_name(each.name, self.live[each.name].slot)

    def _old_content(self, each: AddressSet) -> Ranges:
        change = self.changes[each.name]
        return merged((*subtract(each.ranges, change.add), *change.remove))


def _shape(each: AddressSet) -> tuple[int, int | None, int | None]:
    return each.version, each.timeout, each.size


def _is_one(change: SetChange) -> bool:
    """One prefix more or less: the kernel does it in one go (a part of a prefix is replaced by its rest first)."""
    return prefix_count(change.set.version, (*change.add, *change.remove)) == 1


def _destroy(kernel: str) -> Command:
    return Command(("ipset", "destroy", kernel), missing_ok=True)


def _gone(each: AddressSet, kernel: str) -> Step:
    undo: list[Do] = [Command(("ipset", *create_words(each, kernel), "-exist"))]
    members = list(member_lines(each, kernel)) if each.dynamic else []
    if members:
        undo.append(Command(("ipset", "restore", "-exist"), "\n".join((*members, ""))))
    if each.ranges:
        undo.append(Fill("ipset", kernel, each.version, each.ranges))
    return Step(_destroy(kernel), tuple(undo))
