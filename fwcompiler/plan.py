"""Compares what a kernel holds with what is wanted, and plans the way from one to the other. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fwcompiler.addresses import Ranges, range_text
from fwcompiler.backend import Backend, Command, Fill, SetChange, Step
from fwcompiler.contents import difference
from fwcompiler.ports import WITH_PORTS, Ports
from fwcompiler.proof.access import AccessChange, compare
from fwcompiler.proof.diagram import StepsExceeded
from fwcompiler.proof.memberaccess import MemberAccess, compare_members
from fwcompiler.proof.sending import NO_CHANGE, SendingChange, compare_sending, turned
from fwcompiler.ruleset import AHEAD, AddressSet, Foreign, InRanges, InSet, Interface, Match, PortIn, Ruleset, Translate, Unknown

MAX_ELEMENTS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """The way from `live` to `wanted`: what it means, and what to run. No steps: in sync.

    `replaces` names another backend whose rules are in force and go once these are. `of_others`: `live` is not all that was
    compared; rules that fwc did not write take part, and `access` is about the whole host. `notes`: what to know about it.
    `seen`: the number that the kernel gave the ruleset when `live` was read, where it gives numbers.
    `members_gained`, `members_lost`: what the dynamic members of groups gain and lose, whoever they are. `sending`: what this host
    may send, and may not any more.
    `edited`: what somebody changed in `live` since it was applied, in words (see `fwcompiler.drift`).
    """

    live: Ruleset
    wanted: Ruleset
    steps: tuple[Step, ...]
    access: AccessChange
    replaces: str = ""
    of_others: bool = False
    members_gained: tuple[MemberAccess, ...] = ()
    members_lost: tuple[MemberAccess, ...] = ()
    notes: tuple[str, ...] = ()
    seen: int | None = None
    edited: tuple[str, ...] = ()
    sending: SendingChange = NO_CHANGE

    @property
    def in_sync(self) -> bool:
        """True when the kernel holds exactly what is wanted; beside rules of others, when nobody gains or loses access either."""
        return not self.steps and not self.replaces and not (self.of_others and self.access)

    def changes(self, *, whole: bool = False) -> tuple[str, ...]:
        """The kernel changes, one line each, as they will be sent; long lists of elements are cut unless `whole`."""
        shown = None if whole else MAX_ELEMENTS_SHOWN
        sent = tuple(line for step in self.steps for line in _lines(step.do, shown))
        return (*sent, f"remove the rules of fwc from {self.replaces}") if self.replaces else sent


def make_plan(backend: Backend, live: Ruleset, wanted: Ruleset) -> Plan:
    """Plan the way from `live` to `wanted`; both were read from a kernel, sets with their content.

    Dynamic members stay: those of `wanted` are the recorded ones, which sets that are made anew get beside those in `live`.
    """
    wanted = keeping_members(live, wanted)
    steps = tuple(backend.update(live, wanted, set_changes(live, wanted)) if live else backend.load(wanted))
    access = _access(live, wanted) if steps else AccessChange()
    gained, lost = compare_members(live, wanted) if steps else ((), ())
    sending = compare_sending(live, wanted) if steps else NO_CHANGE
    notes = tuple(f"fwc never makes this: {what}" for what in live.others if not what.startswith(AHEAD))
    return Plan(live, wanted, steps, access, members_gained=gained, members_lost=lost, notes=notes, sending=sending)


def _access(live: Ruleset, wanted: Ruleset) -> AccessChange:
    """What is gained and lost; where somebody changed our rules so that more than source and port decides, also what perhaps is."""
    access = compare(live, wanted)
    if not any(map(_asks_more, _matches(live) - _matches(wanted))):
        return access
    from fwcompiler.proof.reach import compare_hosts

    services = [(a.service, ports) for a in compare(Ruleset(), wanted).gained if a.service and (ports := _ports(a.to))]
    try:
        whole = compare_hosts(live, wanted, services)
    except StepsExceeded:
        return access
    through = any(isinstance(r.verdict, Translate) for ruleset in (live, wanted) for c in ruleset.chains for r in c.rules)
    return replace(access, perhaps_gained=whole.perhaps_gained, perhaps_lost=whole.perhaps_lost) if through else whole


def _matches(ruleset: Ruleset) -> set[Match]:
    """What is asked of packets that come in."""
    sent = {c.name for c in turned(ruleset).chains}
    return {m for c in ruleset.chains if c.name not in sent for r in c.rules for m in r.matches}


def _asks_more(match: Match) -> bool:
    """True for a test of something that `compare` takes as one point."""
    match match:
        case Interface("in", name):
            return name != "lo"
        case PortIn("source") | InRanges("destination") | InSet("destination"):
            return True
    return isinstance(match, Unknown | Foreign)


def _ports(to: str) -> Ports | None:
    """`udp/5060` as ports; None for what has none."""
    protocol, _, numbers = to.partition("/")
    if protocol not in WITH_PORTS:
        return None
    low, _, high = numbers.partition("-")
    return Ports(protocol, ((int(low), int(high or low)),))


def set_changes(live: Ruleset, wanted: Ruleset) -> tuple[SetChange, ...]:
    """How the contents of static sets that exist on both sides differ, entry by entry as kernels store them."""
    return tuple(_set_changes(live, wanted))


def _set_changes(live: Ruleset, wanted: Ruleset) -> Iterator[SetChange]:
    present = {s.name: s for s in live.sets}
    for each in wanted.sets:
        old = present.get(each.name)
        if old is None or each.dynamic or old.dynamic or old.ranges == each.ranges:
            continue
        remove, add = difference(old.ranges, each.ranges)
        yield SetChange(each, add, remove)


def keeping_members(live: Ruleset, wanted: Ruleset) -> Ruleset:
    """`wanted` with the members that both sides know; the time left is the kernel's where it knows one."""
    present = {s.name: s for s in live.sets if s.members}

    def kept(each: AddressSet) -> AddressSet:
        old = present.get(each.name)
        if old is None or not each.dynamic or old.version != each.version:
            return each
        return replace(each, members=tuple(sorted({**dict(each.members), **dict(old.members)}.items())))

    return replace(wanted, sets=tuple(map(kept, wanted.sets)))


def with_contents(listed: Ruleset, lowered: Ruleset) -> Ruleset:
    """What a scratch kernel listed, its static sets given the contents they were loaded with."""
    contents = {s.name: s for s in lowered.sets}
    sets = (replace(s, ranges=contents[s.name].ranges, origin=contents[s.name].origin) if s.name in contents else s for s in listed.sets)
    return replace(listed, sets=tuple(sets))


def with_static(listed: Ruleset, contents: Mapping[str, Ranges]) -> Ruleset:
    """A listing, its static sets given recorded contents by name."""
    return replace(listed, sets=tuple(s if s.dynamic else replace(s, ranges=contents.get(s.name, ())) for s in listed.sets))


def _lines(do: Command | Fill, shown: int | None) -> Iterator[str]:
    match do:
        case Command(argv, stdin):
            body = [line for line in stdin.splitlines() if line.strip()]
            yield from body if body else [" ".join(argv)]
        case Fill(_, name, version, add, remove):
            for verb, ranges in (("delete", remove), ("add", add)):
                if ranges:
                    texts = ", ".join(range_text(version, r) for r in ranges[:shown])
                    more = f", and {len(ranges) - shown} more" if shown is not None and len(ranges) > shown else ""
                    yield f"{verb} element {name} {{ {texts}{more} }}"
