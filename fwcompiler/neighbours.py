"""The whole host: our rules and everybody else's, and what the others change about packets that are sent to it, or that it sends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from fwcompiler import firewalls
from fwcompiler.backend import Saved
from fwcompiler.foreign import at_present, together
from fwcompiler.kernel import everyone, routes
from fwcompiler.pipeline import Host
from fwcompiler.proof.arrive import World, arrivals
from fwcompiler.proof.ask import Answer, Candidate, ask
from fwcompiler.proof.conditions import ordered, outs
from fwcompiler.proof.depart import WAY, departures, usual_leaving
from fwcompiler.proof.describe import box_text, example, rule_text
from fwcompiler.proof.diagram import StepsExceeded
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.host import THROUGH, HostProgram
from fwcompiler.proof.prove import FAMILIES, differ
from fwcompiler.proof.space import DESTINATION, FIRST_ATOM, SOURCE, Space
from fwcompiler.registry import load
from fwcompiler.ruleset import AHEAD, Goto, HookName, Jump, Ruleset

TABLE, PREFIX = "inet fwc", "FWC-"
"""What is ours, by its name in nftables and by the first letters of chains in iptables."""

ON_THE_WAY = "rules of others that meet what hosts behind this edge send, or get at their own addresses"
"""What is not composed with ours. What is sent to the edge itself is, wherever it goes on to."""
SENDING = "egress"
"""Begins the name that rules about what this host sends count under."""

End = Literal["accept", "drop", "reject", "redirect"]
VERBS: Mapping[End, str] = {"accept": "accepts", "drop": "drops", "reject": "rejects", "redirect": "redirects"}


@dataclass(frozen=True, slots=True)
class Meddling:
    """Packets that our rules alone would treat otherwise than the whole host does, one of them, and the rule that decides.

    `certain` is False where it depends on something that nobody can tell.
    """

    packets: str
    packet: Packet
    ours: End
    host: End
    by: str
    certain: bool

    def __str__(self) -> str:
        return f"{self.packets}: fwc {VERBS[self.ours]} them, but the host {self.does}: {self.by}"

    @property
    def does(self) -> str:
        """What the host does, as a verb."""
        return f"{VERBS[self.host]} them" if self.certain else f"perhaps {VERBS[self.host]} them"


@dataclass(frozen=True)
class WholeHost:
    """Everybody's rules as they are now. `unread`: what of them could not be looked at. `ours`: without anybody else's.

    `beside`: other firewalls by name, and rules that our programs do not show, in words.
    """

    ours: Ruleset
    rules: Ruleset
    world: World
    unread: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    texts: Mapping[tuple[str, int], tuple[str, str]] = field(default_factory=dict)
    """By file and line of a rule's origin: where it stands, and its text as its program prints it."""

    @property
    def alone(self) -> bool:
        """True where nobody else's rules can change anything."""
        names = {c.name for c in self.ours.chains}
        return not any(c.rules or (c.hook and c.hook.policy == "drop") for c in self.rules.chains if c.name not in names)

    @property
    def alone_on_the_way(self) -> bool:
        """True where packets that are sent on meet nobody else's rules; a call of ours is not somebody else's."""
        return self._alone_at(THROUGH)

    @property
    def alone_in_sending(self) -> bool:
        """True where nobody else's rules meet what this host sends, or ours do not restrict that."""
        restricted = any(r.service.startswith(SENDING) for c in self.ours.chains for r in c.rules)
        return not restricted or self._alone_at(WAY)

    def _alone_at(self, hooks: Sequence[HookName]) -> bool:
        own = {c.name: c.rules for c in self.ours.chains}
        bases = [c for c in self.rules.chains if c.hook and c.hook.name in hooks and own.get(c.name) != c.rules]
        theirs = (r for c in bases for r in c.rules if not (isinstance(r.verdict, Goto | Jump) and r.verdict.chain in own))
        return not any(theirs) and not any(c.hook and c.hook.policy == "drop" for c in bases)

    def ask(self, packet: Packet) -> Answer:
        """What becomes of a packet that is sent to the host, or that it sends: from its one address, where it has one."""
        own = self.world.destinations(packet.version)
        if packet.leaving and not packet.source and len(own) == 1 and own[0][0] == own[0][1]:
            packet = replace(packet, source=own[0][0])
        return ask(at_present(self.rules), packet, "output" if packet.leaving else "input", world=self.world)

    def is_ours(self, candidate: Candidate) -> bool:
        """True for a rule of fwc's, and for the call that leads to ours."""
        return any(c.name == candidate.chain for c in self.ours.chains)

    def text(self, candidate: Candidate) -> str:
        """Where a rule stands and what it says, as its own program prints it."""
        where = place_text(candidate.chain)
        if candidate.rule is None:
            return f"{where}: the policy of the chain, {candidate.verdict}"
        at = candidate.rule.origin
        known = self.texts.get((at.file, at.line)) if at else None
        return f"{known[0] if known else where}: {known[1] if known else rule_text(candidate.rule)}"


def place_text(name: str) -> str:
    """A chain's name in words: ``inet/f2b-table/f2b-chain`` is ``table inet f2b-table, chain f2b-chain``."""
    label, _, plain = name.rpartition(":")
    *table, chain = plain.split("/")
    where = f"table {' '.join(table)}, chain {chain}" if table else f"chain {chain}"
    return f"{label} {where}" if label else where


def read_host(host: Host, ours: Ruleset) -> WholeHost:
    """Everybody's rules in a host's namespace, with `ours` in their place among them.

    Raises:
        HostRefused: this user may not ask.
    """
    nftables = host.backend.set_kind == "nft"
    with host.namespace.entered():
        found = everyone.read_everyone(TABLE if nftables else "", PREFIX)
        own = {version: routes.own_addresses(version) for version in FAMILIES}
        texts = dict(_texts(found))
    unread = list(found.unread)
    rules = ours if nftables else Ruleset()
    for backend, saved in (("nftables", found.nft), *((f"iptables-{v}", s) for v, s in found.iptables.items())):
        if not saved:
            continue
        mine = ours if backend == host.backend.name and not nftables else None
        try:
            theirs = load(backend).foreign(saved, mine)
        except ValueError as error:
            unread.append(f"{backend}: {error}")
            continue
        theirs = at_present(theirs, but=frozenset(s.name for s in ours.sets) if mine else frozenset())
        rules = together(rules, theirs, f"{backend}:")
        unread += [f"{backend}: {what}" for what in theirs.others if not what.startswith(AHEAD)]
    if not nftables and not any(c in rules.chains for c in ours.chains):
        rules = together(ours, rules)
    named = (*firewalls.named(found.nft, found.iptables), *firewalls.beside(host.backend.name, found.nft, found.iptables, PREFIX))
    return WholeHost(ours, rules, World(own, Router(host)), tuple(unread), named, texts)


def notes(host: Host, ours: Ruleset) -> Iterator[str]:
    """What others have to do with what becomes of packets here: other firewalls, the rules that decide before or after ours, and what
    could not be looked at. Nothing where nothing of ours is loaded: then there is nothing that could be changed.
    """
    if not ours:
        return
    whole = read_host(host, ours)
    yield from whole.beside
    try:
        yield from map(str, meddling(whole))
    except StepsExceeded:
        yield "rules of others are loaded, more than can be decided"
    yield from (f"not looked at: {what}" for what in whole.unread)


@dataclass(frozen=True)
class Router:
    """Asks the host's routing, once for an address."""

    host: Host
    known: dict[tuple[int, int], str] = field(default_factory=dict)

    def __call__(self, version: int, address: int) -> str:
        """The interface towards an address."""
        key = (version, address)
        if key not in self.known:
            with self.host.namespace.entered():
                self.known[key] = routes.out_interface(version, address)
        return self.known[key]


def _texts(found: everyone.Everyone) -> Iterator[tuple[tuple[str, int], tuple[str, str]]]:
    """Every rule of others by its origin. What nft prints is asked chain by chain."""
    for variant, saved in found.iptables.items():
        for each in saved:
            table = ""
            for number, line in enumerate(each.text.splitlines(), 1):
                table = line[1:].strip() if line.startswith("*") else table
                if line.startswith("-A "):
                    yield (each.file, number), (f"{each.file}, table {table}" if variant == "legacy" else each.file, line)
    for each in found.nft:
        yield from _nft_texts(each)


def _nft_texts(saved: Saved) -> Iterator[tuple[tuple[str, int], tuple[str, str]]]:
    printed: dict[str, dict[int, str]] = {}
    rules = [item["rule"] for item in json.loads(saved.text)["nftables"] if "rule" in item]
    for number, rule in enumerate(rules, 1):
        table, chain = f"{rule['family']} {rule['table']}", rule["chain"]
        if chain not in printed:
            printed[chain] = everyone.rule_texts(table, chain)
        text = printed[chain].get(rule["handle"])
        if text:
            yield (saved.file, number), (f"table {table}, chain {chain}", text)


def meddling(host: WholeHost) -> tuple[Meddling, ...]:
    """What everybody else's rules change about packets that are sent to the host, and where `egress` restricts it, about those that it
    sends; nothing: proven for all usual packets.

    Raises:
        StepsExceeded: the rules are beyond what can be decided.
    """
    return () if host.alone else tuple(_meddling(host))


def _meddling(host: WholeHost) -> Iterator[Meddling]:
    """One for each rule, and end of packets, that makes a difference; what comes in before what leaves, new connections before others."""
    ways = (False,) if host.alone_in_sending else (False, True)
    boxes = (each for leaving in ways for version in FAMILIES for each in _boxes(host, version, leaving=leaving))
    found = sorted(boxes, key=lambda m: (m.packet.leaving, m.packet.state != "new"))
    shown: set[tuple[str, int, bool]] = set()
    for each in found:
        key = (each.by, each.packet.version, each.packet.leaving)
        if each.packet.state == "new" or key not in shown:
            yield each
        shown.add(key)


def _boxes(host: WholeHost, version: int, *, leaving: bool) -> Iterator[Meddling]:
    usual = usual_leaving(host.world, version) if leaving else host.world.usual(version)
    difference = differ(*_programs(host, version, leaving=leaving), version, within=usual)
    if difference is None:
        return
    space = difference.space
    free = dict(map(space.place, usual))
    for box in difference.boxes:
        shown = replace(box, masks=_shown(space, box.masks, free, DESTINATION if leaving else SOURCE))
        any_source = replace(box, masks={n: m for n, m in box.masks.items() if n != SOURCE or m != free[SOURCE]}) if leaving else box
        packet = example(space, any_source, leaving=leaving)
        by = decider(host, packet, box.verdicts[1])
        certain = not any(number >= FIRST_ATOM for number in box.masks)
        ours_says, host_says = cast("tuple[End, End]", box.verdicts)
        yield Meddling(box_text(space, shown, leaving=leaving), packet, ours_says, host_says, by, certain)


def _programs(host: WholeHost, version: int, *, leaving: bool) -> tuple[HostProgram, HostProgram]:
    """Our rules alone, and everybody's."""
    if leaving:
        return departures(host.ours, version, host.world), departures(host.rules, version, host.world)
    names = ordered((*outs(host.ours), *outs(host.rules)))
    return arrivals(host.ours, version, host.world, names), arrivals(host.rules, version, host.world, names)


def _shown(space: Space, masks: Mapping[int, int], usual: Mapping[int, int], other_end: int) -> dict[int, int]:
    """The masks of a box less what goes without saying; addresses that are not asked about, loopback ones for two, may fill a gap."""
    shown = {n: m for n, m in masks.items() if m != usual.get(n)}
    if other_end in shown:
        wide = shown[other_end] | space.everything(other_end) & ~usual[other_end]
        if len(space.ranges(other_end, wide)) < len(space.ranges(other_end, shown[other_end])):
            shown[other_end] = wide
    return shown


def decider(host: WholeHost, packet: Packet, verdict: str) -> str:
    """The rule of somebody else's that gives a packet this end, in words."""
    found = deciding(host, host.ask(packet), verdict) or deciding(host, _without_ours(host).ask(packet), verdict)
    return host.text(found) if found else "a rule of others"


def _without_ours(host: WholeHost) -> WholeHost:
    """The host as if our chains held nothing: a packet that stands for members of the moment may end in them, and theirs would not."""
    ours = {c.name for c in host.ours.chains}
    chains = (replace(c, rules=(), hook=c.hook and replace(c.hook, policy="accept")) if c.name in ours else c for c in host.rules.chains)
    return replace(host, rules=replace(host.rules, chains=tuple(chains)))


def deciding(host: WholeHost, answer: Answer, verdict: str) -> Candidate | None:
    """The candidate that an end comes from: the first certain one, else the first that may; a new destination before all."""
    ends = ("drop", "reject") if verdict in ("drop", "reject") else (verdict if verdict == "accept" else "rewrite",)
    theirs = [c for c in answer.candidates if c.verdict in ends and not host.is_ours(c)]
    moved = [c for c in answer.candidates if c.verdict == "rewrite" and not host.is_ours(c)]
    chosen = sorted(theirs, key=lambda c: not c.certain) or moved
    return chosen[0] if chosen else None
