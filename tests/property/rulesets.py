"""Random small rulesets, of everything that the neutral types can say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from property.bitvectors import OUTS
from property.strategies import HOME, spans

from fwcompiler.addresses import merged
from fwcompiler.ruleset import (
    STATES,
    AddressSet,
    AnyOf,
    Chain,
    Family,
    Final,
    Goto,
    Hook,
    HookName,
    InRanges,
    InSet,
    Interface,
    InterfaceIn,
    Jump,
    Limit,
    Match,
    Opaque,
    PortIn,
    PortsIn,
    ProtocolIn,
    ProtocolIs,
    Rule,
    Ruleset,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Untrack,
    Verdict,
)

VERSIONS = st.sampled_from((4, 6))
SIDES = st.sampled_from(("source", "destination"))
NAMES = st.sampled_from(("lo", "eth0", "eth1", "ppp0"))
PORTS = st.tuples(st.sampled_from((1, 22, 5060, 10000)), st.sampled_from((22, 5060, 20000, 65535))).map(lambda p: (min(p), max(p)))
STATE_SETS = st.sets(st.sampled_from(STATES), min_size=1, max_size=3).map(frozenset)
TYPES = st.sets(st.sampled_from((0, 3, 8, 11, 128, 135, 255)), min_size=1, max_size=3).map(lambda t: tuple(sorted(t)))
PROTOCOLS = st.sampled_from((1, 6, 17, 58, 112))
NEGATED = st.sampled_from((False, False, True))
SETS = ("alpha", "beta", "guests.dynamic")
"""Static sets of either family are `alpha.v4` and so on; the last one is dynamic."""
LIMITS = st.builds(Limit, st.sampled_from((5, 20)), st.just("second"), st.sampled_from((10, 40)))
_FINALS = st.sampled_from((Final.ACCEPT, Final.ACCEPT, Final.DROP, Final.DROP, Final.REJECT, Final.RETURN))


def _ranges(version: int) -> st.SearchStrategy[Any]:
    return st.lists(spans(version), min_size=1, max_size=2).map(merged)


def own_matches(version: int) -> st.SearchStrategy[Match]:
    """A match that fwc writes, mostly of one family."""
    families = st.sampled_from((*[version] * 9, 10 - version))
    return st.one_of(
        st.builds(lambda side, name, v, no: InSet(side, f"{name}.v{v}", v, no), SIDES, st.sampled_from(SETS), families, NEGATED),
        families.flatmap(lambda v: st.builds(InRanges, SIDES, st.just(v), _ranges(v), NEGATED)),
        st.builds(Family, families),
        st.builds(Interface, st.sampled_from(("in", "in", "out")), NAMES, NEGATED),
        st.builds(ProtocolIs, PROTOCOLS, NEGATED),
        st.builds(PortIn, SIDES, st.sampled_from(("tcp", "udp")), PORTS, NEGATED),
        st.builds(StateIn, STATE_SETS, NEGATED),
        st.builds(TypeIn, families, TYPES),
        LIMITS,
    )


def foreign_matches(version: int) -> st.SearchStrategy[Match]:
    """A match that only other people's rules hold."""
    texts = st.sampled_from(("mark == 0x1", "owner"))
    simple = st.one_of(
        st.builds(ProtocolIn, st.sampled_from((((6, 6), (17, 17)), ((0, 5),))), NEGATED),
        st.builds(PortsIn, SIDES, st.sampled_from(((6,), (17,), (6, 17))), PORTS.map(lambda p: (p,)), NEGATED),
        st.builds(InterfaceIn, st.just("in"), st.sampled_from((("eth*",), ("eth0", "ppp0"), ("e*", "lo"))), NEGATED),
        st.builds(InterfaceIn, st.just("out"), st.sampled_from((OUTS[:1], OUTS)), NEGATED),
        st.builds(Opaque, texts, NEGATED),
        st.builds(Opaque, st.just("recent"), NEGATED, st.just(True)),
    )
    plain = own_matches(version).filter(lambda m: not isinstance(m, Interface) or m.way == "in")
    either = st.lists(st.lists(simple | plain, min_size=1, max_size=2).map(tuple), min_size=1, max_size=3).map(tuple)
    return st.one_of(plain, simple, st.builds(AnyOf, either, NEGATED))


@st.composite
def chains(
    draw: Callable[..., Any], bases: list[tuple[str, Hook]], matches: st.SearchStrategy[Match], verdicts: st.SearchStrategy[Verdict]
) -> tuple[Chain, ...]:
    """Base chains, and chains that they and earlier ones lead to."""
    called = [f"chain{n}" for n in range(draw(st.sampled_from((0, 1, 2, 3))))]
    found: list[Chain] = []
    for name, hook in (*bases, *((name, None) for name in called)):
        later = called[called.index(name) + 1 :] if name in called else called
        calls = [st.builds(Jump, st.sampled_from(later)), st.builds(Goto, st.sampled_from(later))] if later else []
        ends = st.one_of(verdicts, *calls)
        rules = draw(st.lists(st.builds(Rule, st.lists(matches, max_size=2).map(tuple), ends), min_size=1 if called else 2, max_size=4))
        found.append(Chain(name, tuple(rules), hook))
    return tuple(found)


def _sets(draw: Callable[..., Any]) -> tuple[AddressSet, ...]:
    found = []
    for version in (4, 6):
        found += [AddressSet(f"{name}.v{version}", version, draw(_ranges(version))) for name in SETS[:-1]]
        found.append(AddressSet(f"{SETS[-1]}.v{version}", version, timeout=3600, size=64))
    return tuple(found)


@st.composite
def own_rulesets(draw: Callable[..., Any], version: int) -> Ruleset:
    """What one table may hold at input, in the matches that fwc writes."""
    bases = [("input", Hook("input", 0, draw(st.sampled_from(("accept", "drop")))))]
    if draw(st.booleans()):
        bases.append(("early", Hook("prerouting", draw(st.sampled_from((-10, 10))), "accept")))
    return Ruleset(draw(chains(bases, own_matches(version), _FINALS | st.none())), _sets(draw))


@st.composite
def host_rulesets(draw: Callable[..., Any], version: int, hook: HookName) -> Ruleset:
    """What a whole host may hold on the way to input or forward: raw, NAT and filter chains, with matches and ends of others."""
    target = st.builds(
        lambda offset, port: Translate("destination", f"to {offset}", version, ((HOME[version] + offset,) * 2,), False, port),
        st.integers(0, 3),
        st.sampled_from((None, (22, 22), (5060, 5060))),
    )
    policy = st.sampled_from(("accept", "accept", "drop"))
    ends = st.one_of(_FINALS, _FINALS, st.none(), st.builds(Undecided, st.just("queue 1")))
    found: list[Chain] = []
    for name, where, verdicts in (
        ("raw", Hook("prerouting", -300, draw(policy)), ends | st.just(Untrack())),
        ("mangle", Hook("prerouting", -150, draw(policy), version=draw(st.sampled_from((None, None, 4, 6)))), ends),
        ("nat", Hook("prerouting", -100, "accept", "nat"), st.one_of(_FINALS.filter(lambda f: f is not Final.REJECT), target)),
        ("filter", Hook(hook, 0, draw(policy)), ends),
        ("other", Hook(hook, 10, draw(policy)), ends),
    ):
        if name == "filter" or draw(st.integers(0, 2)) == 0:
            prefixed = draw(chains([(name, where)], foreign_matches(version), verdicts))
            found += [_named(chain, name) for chain in prefixed]
    return Ruleset(tuple(found), _sets(draw))


def _named(chain: Chain, table: str) -> Chain:
    """The chain with names of its own table."""

    def verdict(old: Verdict) -> Verdict:
        match old:
            case Jump(called):
                return Jump(f"{table}.{called}")
            case Goto(called):
                return Goto(f"{table}.{called}")
        return old

    name = chain.name if chain.hook else f"{table}.{chain.name}"
    return Chain(name, tuple(Rule(r.matches, verdict(r.verdict)) for r in chain.rules), chain.hook)


@st.composite
def edited(draw: Callable[..., Any], ruleset: Ruleset) -> Ruleset:
    """The ruleset with one rule gone, moved, repeated or turned round; often it means the same."""
    called = {r.verdict.chain for c in ruleset.chains for r in c.rules if isinstance(r.verdict, Goto | Jump)}
    alive = [c for c, chain in enumerate(ruleset.chains) if chain.hook or chain.name in called]
    places = [(c, i) for c in alive for i in range(len(ruleset.chains[c].rules))]
    if not places:
        return ruleset
    c, i = draw(st.sampled_from(places))
    chain = ruleset.chains[c]
    rules = list(chain.rules)
    match draw(st.sampled_from(("delete", "repeat", "swap", "turn", "turn", "turn", "shorten"))):
        case "delete":
            del rules[i]
        case "repeat":
            rules.insert(draw(st.integers(0, len(rules))), rules[i])
        case "swap":
            j = draw(st.integers(0, len(rules) - 1))
            rules[i], rules[j] = rules[j], rules[i]
        case "turn" if isinstance(rules[i].verdict, Final):
            rules[i] = Rule(rules[i].matches, Final.DROP if rules[i].verdict is Final.ACCEPT else Final.ACCEPT)
        case _:
            rules[i] = Rule(rules[i].matches[1:], rules[i].verdict)
    changed = Chain(chain.name, tuple(rules), chain.hook)
    return Ruleset((*ruleset.chains[:c], changed, *ruleset.chains[c + 1 :]), ruleset.sets, ruleset.others)
