"""Asks a host's rules, whoever wrote them, about one packet: yes, no or may.

The packet is followed as the kernel would, through every base chain on its way and behind every rewriting. What the packet
does not tell is tried both ways, all combinations of it at once, in one decision diagram; where every combination ends the
same, the answer is certain. Otherwise it is ``may``, and says what it depends on.

The packet is a whole one (no fragment). A new TCP packet is a SYN. `destination` None is an address of the host, no
broadcast and no loopback address.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast, get_args

from fwcompiler.addresses import LAST, LOOPBACK, MULTICAST, Ranges, covers, intersect, merged, subtract
from fwcompiler.foreign import BROADCAST, FRAGMENT, LOCAL
from fwcompiler.proof import depart
from fwcompiler.proof.arrive import World, told
from fwcompiler.proof.compose import rewritten_side
from fwcompiler.proof.conditions import fits
from fwcompiler.proof.diagram import ACCEPT, DROP, ELSEWHERE, REJECT, RETURN, VERDICTS, Diagrams, StepsExceeded
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.host import UNTRACKED, WAYS, Masks, Stage, stages
from fwcompiler.proof.rewrite import choice, graft, reachable, relabel
from fwcompiler.proof.space import DESTINATION, FIRST_ATOM, INTERFACE, NAMES, PORT, PROTOCOL, SOURCE, SOURCE_PORT, STATE, TYPE, Condition
from fwcompiler.ruleset import HookName, Rule, Ruleset, Side, Translate, is_ours

Word = Literal["accept", "drop", "reject", "redirect", "may"]
Hook = Literal["input", "forward", "output"]
SPARE = 300
"""Atoms kept for what is not known of rewritten packets."""
_GO_ON, _DONE = -11, -12
_FLAGS = re.compile(r"tcp flags & 0x([0-9a-f]+) == 0x([0-9a-f]+)")
_SYN = 0x02
_OUT = "out interface is "


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rule that decides the packet, or may. `rule` is None for a base chain's policy."""

    chain: str
    rule: Rule | None
    verdict: str
    certain: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of a packet. `possible`: every end it may have. `depends`: what decides that the packet does not tell."""

    verdict: Word
    possible: frozenset[str]
    depends: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()


_REWRITTEN: Mapping[str, Side] = {rewritten_side(side): side for side in get_args(Side)}


@dataclass(frozen=True, slots=True)
class _Seen:
    """A packet on its way: what is known of it. `unknown` fields were rewritten to one of several values, `sides` were translated."""

    packet: Packet
    hook: Hook
    out: str = ""
    unknown: frozenset[int] = frozenset()
    by: str = ""
    sides: frozenset[str] = frozenset()


def ask(ruleset: Ruleset, packet: Packet, hook: Hook = "input", out: str = "", world: World | None = None) -> Answer:
    """What the whole host does with one packet that arrives for it, passes through it (`out`: where to) or leaves it.

    For one that leaves, `packet.interface` is the output interface. ``world``: what is known of the host beside its rules; the packet
    is a usual one then, and one that is accepted with another destination or port ends in `redirect`.
    """
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(max(before, 20_000))
        asking = _Asking(ruleset, packet.version, [*((out,) if out else ())], world)
        return asking.answer(_Seen(packet, hook, out))
    except (StepsExceeded, RecursionError):
        return Answer("may", frozenset(("accept", "drop", "reject")), ("more than can be followed",))
    finally:
        sys.setrecursionlimit(before)


@dataclass
class _Atoms:
    """Numbers of atoms, given out as they are met."""

    numbers: dict[str, int] = field(default_factory=dict)
    most: int = 0

    def number(self, text: str) -> int:
        """The field of an atom.

        Raises:
            StepsExceeded: there are too many.
        """
        found = self.numbers.setdefault(text, FIRST_ATOM + len(self.numbers))
        if len(self.numbers) > self.most:
            raise StepsExceeded
        return found


class _Asking:
    def __init__(self, ruleset: Ruleset, version: int, outs: Sequence[str], world: World | None) -> None:
        from fwcompiler.proof.conditions import ordered
        from fwcompiler.proof.conditions import outs as outs_of

        self._ruleset, self._world = ruleset, world
        ways = WAYS if world is None else {**WAYS, "output": depart.WAY}
        self._ways = {hook: stages(ruleset, version, way, ordered((*outs_of(ruleset), *outs))) for hook, way in ways.items()}
        names = {c.atom for way in self._ways.values() for s in way for c in s.conditions() if c.atom}
        self._atoms = _Atoms(most=len(names) + SPARE)
        self._diagrams = Diagrams({FIRST_ATOM + i: 3 for i in range(len(names) + SPARE)})
        self._memo: dict[tuple[int, _Seen], int] = {}
        self.candidates: dict[tuple[str, int], Candidate] = {}

    def answer(self, seen: _Seen) -> Answer:
        root = self._from(0, seen)
        terminals, fields = reachable(self._diagrams, root)
        names = {number: text for text, number in self._atoms.numbers.items()}
        possible = frozenset(VERDICTS[t] for t in terminals)
        depends = tuple(sorted(names[number] for number in fields))
        verdict = cast(Word, min(possible)) if len(possible) == 1 else "may"
        return Answer(verdict, possible, depends, tuple(self.candidates.values()))

    def _from(self, number: int, seen: _Seen) -> int:
        """The diagram over atoms from one stage on; it ends in verdicts."""
        way = self._ways[seen.hook]
        if number == len(way):
            return ACCEPT
        key = (number, seen)
        if key not in self._memo:
            self._memo[key] = self._stage(number, way[number], seen)
        return self._memo[key]

    def _stage(self, number: int, stage: Stage, seen: _Seen) -> int:
        diagrams = self._diagrams

        def masks(conditions: Sequence[Condition]) -> Mapping[int, int] | None:
            return self._masks(conditions, seen)

        self._note(stage, seen, last=number + 1 == len(self._ways[seen.hook]))
        root = relabel(diagrams, stage.root(diagrams, masks), {ACCEPT: _GO_ON})
        terminals, _ = reachable(diagrams, root)
        rest = self._from(number + 1, seen) if _GO_ON in terminals else DROP
        if stage.untracks:
            rest = self._untracked(number, stage, seen, masks, rest)
        for terminal, translation in stage.translations.items():
            if terminal in terminals:
                after = self._rewritten(number, stage, seen, translation)
                root = graft(diagrams, root, terminal, _marked(diagrams, after))
        return _done(diagrams, graft(diagrams, root, _GO_ON, _marked(diagrams, rest)))

    def _untracked(self, number: int, stage: Stage, seen: _Seen, masks: Masks, rest: int) -> int:
        """The rest of the way, where a rule of this stage takes the packet out of connection tracking an untracked one's."""
        diagrams = self._diagrams
        ends = dict.fromkeys((ACCEPT, DROP, REJECT, *stage.translations), _GO_ON)
        where = relabel(diagrams, stage.untracked(diagrams, masks), ends)
        if UNTRACKED not in reachable(diagrams, where)[0]:
            return rest
        behind = self._from(number + 1, replace(seen, packet=replace(seen.packet, state="untracked")))
        either = graft(diagrams, where, _GO_ON, _marked(diagrams, rest))
        return _done(diagrams, graft(diagrams, either, UNTRACKED, _marked(diagrams, behind)))

    def _rewritten(self, number: int, stage: Stage, seen: _Seen, translation: Translate) -> int:
        """What happens behind a translation. A new destination may be the host's own, or lie behind it."""
        way = self._ways[seen.hook]
        while number + 1 < len(way) and way[number + 1].nat and way[number + 1].hook == stage.hook:
            number += 1
        after = _rewrite(seen, translation, stage.hook)
        if stage.hook != "prerouting" or translation.side == "source":
            rest = self._from(number + 1, after)
            away = self._world is not None and stage.hook == "output" and translation.side == "destination"
            return relabel(self._diagrams, rest, {ACCEPT: ELSEWHERE}) if away else rest
        if not translation.here and not translation.ranges:
            return self._moved(self._from(number + 1, after), translation)
        inside = self._moved(self._from(number + 1, replace(after, hook="input", out="")), translation)
        own = self._world.own_of(seen.packet.version) if self._world else ()
        if translation.here or (own and not subtract(translation.ranges, own)):
            return inside
        out = self._world.out_to(seen.packet.version, translation.ranges) if self._world else ""
        through = self._from(number + 1, replace(after, hook="forward", out=seen.out if seen.hook == "forward" else out))
        if self._world:
            through = relabel(self._diagrams, through, {ACCEPT: ELSEWHERE})
        if own and not intersect(translation.ranges, own):
            return through
        local = self._atoms.number(f"the new destination is the host's own, after {translation.text}")
        return choice(self._diagrams, local, 2, inside, through)

    def _moved(self, node: int, translation: Translate) -> int:
        """The end of a packet that stays on the host; at another port it does not reach what it was sent to."""
        elsewhere = self._world is not None and translation.ports is not None and not is_ours(translation)
        return relabel(self._diagrams, node, {ACCEPT: ELSEWHERE}) if elsewhere else node

    def _masks(self, conditions: Iterable[Condition], seen: _Seen) -> Mapping[int, int] | None:
        """The atoms that conditions ask about; None where the packet does not fit."""
        found: dict[int, int] = {}
        for condition in conditions:
            truth = self._fact(condition.atom, seen) if condition.atom else _holds(condition, seen)
            if truth is None:
                number = self._atoms.number(condition.atom or _unknown_text(condition, seen))
                found[number] = found.get(number, 3) & (1 if condition.negated else 2)
            elif truth == condition.negated:
                return None
        return found if all(found.values()) else None

    def _fact(self, atom: str, seen: _Seen) -> bool | None:
        """What the question says about an atom, or what is taken for granted."""
        fact = _fact(atom, seen)
        if fact is not None or self._world is None:
            return fact
        if atom == LOCAL and seen.hook == "output" and DESTINATION not in seen.unknown and seen.packet.destination is not None:
            own = self._world.own_of(seen.packet.version)
            return covers(own, seen.packet.destination) if own else None
        if atom.startswith("destination type ") and (seen.hook != "input" or DESTINATION in seen.unknown):
            return None
        if atom in _REWRITTEN:
            return False  # later packets go where the first one went, and were translated here if that one was
        known = depart.told(atom) if seen.packet.leaving else told(atom)
        if isinstance(known, Condition):
            return _holds(known, seen)
        return known

    def _note(self, stage: Stage, seen: _Seen, *, last: bool) -> None:
        """Collect the rules that may decide, in order, up to the first that does for certain."""
        rules = {c.name: c.rules for c in self._ruleset.chains}

        def visit(name: str, sure: bool) -> bool:
            """True where the packet certainly does not come out of the chain again."""
            for line in stage.chains[name]:
                masks = self._masks(line.conditions, seen)
                if masks is None or line.verdict == UNTRACKED:
                    continue
                certain = sure and not masks
                if line.chain:
                    if visit(line.chain, certain) or (line.goto and not masks):
                        return certain
                elif line.number >= 0 and line.verdict != RETURN:
                    verdict = VERDICTS.get(line.verdict) or "rewrite"
                    key = (name, line.number)
                    self.candidates.setdefault(key, Candidate(name, rules[name][line.number], verdict, certain))
                if not line.chain and not masks:
                    return line.verdict != RETURN
            return False

        if not visit(stage.base, True) and (last or stage.policy != ACCEPT):
            self.candidates.setdefault((stage.base, -1), Candidate(stage.base, None, VERDICTS[stage.policy], True))


def _marked(diagrams: Diagrams, node: int) -> int:
    return relabel(diagrams, node, {ACCEPT: _DONE})


def _done(diagrams: Diagrams, node: int) -> int:
    return relabel(diagrams, node, {_DONE: ACCEPT})


def _holds(condition: Condition, seen: _Seen) -> bool | None:
    """Whether a field of the packet lies in a condition's values, its negation left aside; None: nobody knows."""
    packet, number, values = seen.packet, condition.field, condition.values
    if number in seen.unknown:
        return None
    if isinstance(values, frozenset):
        return packet.state in values if number == STATE else any(fits(name, packet.interface) for name in values)
    if (number == DESTINATION and packet.destination is None) or (number == SOURCE and packet.leaving and not packet.source):
        return _own(packet.version, values)
    value = {
        PROTOCOL: packet.protocol,
        PORT: packet.port,
        SOURCE_PORT: packet.source_port,
        TYPE: packet.icmp_type,
        SOURCE: packet.source,
        DESTINATION: packet.destination or 0,
    }[number]
    return covers(values, value)


def _own(version: int, ranges: Ranges) -> bool | None:
    """Whether an address of the host, which one is not said, lies in the ranges."""
    others = merged((LOOPBACK[version], MULTICAST[version], *(((0, 0), (LAST[4], LAST[4])) if version == 4 else ((0, 0),))))
    usual = subtract(((0, LAST[version]),), others)
    inside = intersect(ranges, usual)
    return False if not inside else True if inside == usual else None


def _unknown_text(condition: Condition, seen: _Seen) -> str:
    which = f"{NAMES[condition.field]}{f' after {seen.by}' if seen.by else ''}"
    return f"{which} is one of {condition.values!s}"[:400]


def _fact(atom: str, seen: _Seen) -> bool | None:
    """What the question itself says about an atom."""
    packet, hook = seen.packet, seen.hook
    if atom == FRAGMENT:
        return False
    if atom in _REWRITTEN:
        return True if _REWRITTEN[atom] in seen.sides else None if packet.state in ("established", "related") else False
    if atom.startswith(_OUT):
        return fits(atom.removeprefix(_OUT), seen.out) if hook == "forward" and seen.out else None
    flags = _FLAGS.fullmatch(atom)
    if flags and packet.protocol == 6 and packet.state == "new":
        return _SYN & int(flags[1], 16) == int(flags[2], 16)
    if atom in (LOCAL, BROADCAST) and hook == "input" and DESTINATION not in seen.unknown:
        return _kind(atom, packet)
    return None


def _kind(atom: str, packet: Packet) -> bool | None:
    if packet.destination is None:
        return atom == LOCAL
    if covers((MULTICAST[packet.version],), packet.destination):
        return False
    return atom == LOCAL if covers((LOOPBACK[packet.version],), packet.destination) else None


def _rewrite(seen: _Seen, translation: Translate, hook: HookName) -> _Seen:
    """The packet behind a translation."""
    packet, unknown = seen.packet, set(seen.unknown)
    address, port = (SOURCE, SOURCE_PORT) if translation.side == "source" else (DESTINATION, PORT)
    if translation.ports:
        unknown.add(port)
        if translation.ports[0] == translation.ports[1]:
            unknown.discard(port)
            new = translation.ports[0]
            packet = replace(packet, source_port=new) if port == SOURCE_PORT else replace(packet, port=new)
    if translation.ranges:
        unknown.add(address)
        (low, high), *more = translation.ranges
        if low == high and not more:
            unknown.discard(address)
            packet = replace(packet, source=low) if address == SOURCE else replace(packet, destination=low)
    elif translation.side == "source":
        unknown.add(SOURCE)
    elif translation.here:
        unknown.discard(DESTINATION)
        own = hook == "output" or packet.interface == "lo"
        loopback = LOOPBACK[packet.version]
        packet = replace(packet, destination=loopback[0] + (packet.version == 4) if own else None)
    if hook == "output" and translation.side == "destination":
        unknown.add(INTERFACE)
    return replace(seen, packet=packet, unknown=frozenset(unknown), by=translation.text, sides=seen.sides | {translation.side})
