"""Random small rulesets, of everything that the neutral types can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, Literal

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
    ForHost,
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
    OverLimit,
    PortIn,
    PortsIn,
    ProtocolIn,
    ProtocolIs,
    Rewritten,
    Rule,
    Ruleset,
    SetDscp,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Untrack,
    Verdict,
    masqueraded,
    redirected,
    sent_on,
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
_OWN_ENDS = _FINALS | st.none()
_EARLY_ENDS = st.sampled_from((Final.ACCEPT, Final.DROP, Final.RETURN, Untrack(), None))
_NAT_ENDS = st.sampled_from((Final.ACCEPT, Final.RETURN))
_ENDS = st.one_of(_FINALS, _FINALS, st.none(), st.builds(Undecided, st.just("queue 1")))
_RAW_ENDS = _ENDS | st.just(Untrack())


@cache
def _ranges(version: int) -> st.SearchStrategy[Any]:
    return st.lists(spans(version), min_size=1, max_size=2).map(merged)


@cache
def own_matches(version: int, *, certain: bool = False) -> st.SearchStrategy[Match]:
    """A match that fwc writes, mostly of one family; a `certain` one shows in every packet."""
    sets, counting = (SETS[:-1], []) if certain else (SETS, [LIMITS])
    families = st.sampled_from((*[version] * 9, 10 - version))
    return st.one_of(
        st.builds(lambda side, name, v, no: InSet(side, f"{name}.v{v}", v, no), SIDES, st.sampled_from(sets), families, NEGATED),
        families.flatmap(lambda v: st.builds(InRanges, SIDES, st.just(v), _ranges(v), NEGATED)),
        st.builds(Family, families),
        st.builds(Interface, st.sampled_from(("in", "in", "out")), NAMES, NEGATED),
        st.builds(ProtocolIs, PROTOCOLS, NEGATED),
        st.builds(PortIn, SIDES, st.sampled_from(("tcp", "udp")), PORTS, NEGATED),
        st.builds(StateIn, STATE_SETS, NEGATED),
        st.builds(TypeIn, families, TYPES),
        *counting,
    )


@cache
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


Tests = st.SearchStrategy[tuple[Match, ...]]
"""Everything one rule asks."""


@cache
def few(matches: st.SearchStrategy[Match]) -> Tests:
    """Up to two matches."""
    return st.lists(matches, max_size=2).map(tuple)


@st.composite
def chains(
    draw: Callable[..., Any], bases: list[tuple[str, Hook]], tests: Tests, verdicts: st.SearchStrategy[Verdict]
) -> tuple[Chain, ...]:
    """Base chains, and chains that they and earlier ones lead to."""
    called = [f"chain{n}" for n in range(draw(st.sampled_from((0, 1, 2, 3))))]
    found: list[Chain] = []
    for name, hook in (*bases, *((name, None) for name in called)):
        later = called[called.index(name) + 1 :] if name in called else called
        found.append(Chain(name, draw(_rules(tests, verdicts, tuple(later), 1 if called else 2)), hook))
    return tuple(found)


@cache
def _rules(tests: Tests, verdicts: st.SearchStrategy[Verdict], later: tuple[str, ...], least: int) -> st.SearchStrategy[tuple[Rule, ...]]:
    """The rules of one chain, which may call later ones. Made once: strategies cost more to make than to draw from."""
    calls = [st.builds(Jump, st.sampled_from(later)), st.builds(Goto, st.sampled_from(later))] if later else []
    rule = st.builds(Rule, tests, st.one_of(verdicts, *calls))
    return st.lists(rule, min_size=least, max_size=4).map(tuple)


def _sets(draw: Callable[..., Any]) -> tuple[AddressSet, ...]:
    found = []
    for version in (4, 6):
        found += [AddressSet(f"{name}.v{version}", version, draw(_ranges(version))) for name in SETS[:-1]]
        found.append(AddressSet(f"{SETS[-1]}.v{version}", version, timeout=3600, size=64))
    return tuple(found)


@st.composite
def own_rulesets(draw: Callable[..., Any], version: int, *, certain: bool = False) -> Ruleset:
    """What one table may hold at input, in the matches that fwc writes."""
    bases = [("input", Hook("input", 0, draw(st.sampled_from(("accept", "drop")))))]
    if draw(st.booleans()):
        bases.append(("early", Hook("prerouting", draw(st.sampled_from((-10, 10))), "accept")))
    return Ruleset(draw(chains(bases, few(own_matches(version, certain=certain)), _OWN_ENDS)), _sets(draw))


@st.composite
def host_rulesets(draw: Callable[..., Any], version: int, hook: HookName) -> Ruleset:
    """What a whole host may hold on the way to input or forward: raw, NAT and filter chains, with matches and ends of others."""
    policy = st.sampled_from(("accept", "accept", "drop"))
    found: list[Chain] = []
    for name, where, verdicts in (
        ("raw", Hook("prerouting", -300, draw(policy)), _RAW_ENDS),
        ("mangle", Hook("prerouting", -150, draw(policy), version=draw(st.sampled_from((None, None, 4, 6)))), _ENDS),
        ("nat", Hook("prerouting", -100, "accept", "nat"), _rewriting(version)),
        ("filter", Hook(hook, 0, draw(policy)), _ENDS),
        ("other", Hook(hook, 10, draw(policy)), _ENDS),
    ):
        if name == "filter" or draw(st.integers(0, 2)) == 0:
            prefixed = draw(chains([(name, where)], few(foreign_matches(version)), verdicts))
            found += [_named(chain, name) for chain in prefixed]
    return Ruleset(tuple(found), _sets(draw))


@cache
def _rewriting(version: int) -> st.SearchStrategy[Verdict]:
    """Ends in a nat chain of others."""
    target = st.builds(
        lambda offset, port: Translate("destination", f"to {offset}", version, ((HOME[version] + offset,) * 2,), False, port),
        st.integers(0, 3),
        st.sampled_from((None, (22, 22), (5060, 5060))),
    )
    return st.one_of(_FINALS.filter(lambda f: f is not Final.REJECT), target)


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


@cache
def kept_tests(version: int, ways: tuple[Literal["in", "out"], ...]) -> Tests:
    """What one rule of ours may ask at a hook that knows these interfaces: all backends can mostly write it."""
    limits = (OverLimit(version, "ssh.admins", 5, "second", 20), OverLimit(version, "sip.agents", 50, "minute", 99))
    ports = st.sampled_from(("tcp", "udp")).flatmap(
        lambda p: st.lists(st.builds(PortIn, SIDES, st.just(p), PORTS), min_size=1, max_size=2, unique_by=lambda m: m.side).map(tuple)
    )
    outside = st.builds(lambda side, span: (ProtocolIs(17), PortIn(side, "udp", span, True)), SIDES, PORTS)
    types = st.sampled_from((0, 3, 8, 128, 135)).map(lambda number: TypeIn(version, (number,)))
    of_family: Any = st.builds(lambda side, name, no: InSet(side, f"{name}.v{version}", version, no), SIDES, st.sampled_from(SETS), NEGATED)
    parts = (
        of_family | st.just(Family(version)),
        st.builds(InRanges, SIDES, st.just(version), _ranges(version), NEGATED),
        st.builds(Interface, st.sampled_from(ways), NAMES, NEGATED),
        st.one_of(ports, ports, outside, types, st.builds(ProtocolIs, st.sampled_from((6, 17, 47, 112)), NEGATED)),
        st.builds(StateIn, STATE_SETS, NEGATED),
        st.sampled_from((ForHost(), Rewritten("destination"), Rewritten("destination", True), Rewritten("source"))),
        LIMITS | st.sampled_from(limits),
    )
    chosen = st.lists(st.sampled_from(range(len(parts))), max_size=3, unique=True).map(sorted)
    return chosen.flatmap(lambda numbers: st.tuples(*(parts[n] for n in numbers))).map(_flat)


def _flat(parts: tuple[Match | tuple[Match, ...], ...]) -> tuple[Match, ...]:
    return tuple(m for part in parts for m in (part if isinstance(part, tuple) else (part,)))


_SENT_ON = st.builds(sent_on, st.integers(HOME[4], HOME[4] + 3))
_TABLES: tuple[tuple[str, Hook, tuple[Literal["in", "out"], ...], st.SearchStrategy[Any]], ...] = (
    ("early", Hook("prerouting", -300, "accept"), ("in",), _EARLY_ENDS),
    ("untracked", Hook("output", -300, "accept"), ("out",), _EARLY_ENDS),
    ("marks", Hook("output", -150, "accept", "route"), ("out",), st.builds(SetDscp, st.sampled_from((0, 46)))),
    ("arriving", Hook("prerouting", -100, "accept", "nat"), ("in",), st.one_of(_NAT_ENDS, _SENT_ON, st.builds(redirected, st.just(22)))),
    ("forward", Hook("forward"), ("in", "out"), _OWN_ENDS),
    (
        "leaving",
        Hook("postrouting", 100, "accept", "nat"),
        ("out",),
        _NAT_ENDS | st.sampled_from((masqueraded(), masqueraded((61000, 65000)))),
    ),
    ("input", Hook("input"), ("in",), _OWN_ENDS),
)
"""Everywhere that the compiler has chains, and how their rules end."""


@st.composite
def whole_tables(draw: Callable[..., Any], version: int) -> Ruleset:
    """What our tables may hold on all of a packet's ways, those through an edge included."""
    found: list[Chain] = []
    for name, hook, ways, verdicts in draw(st.lists(st.sampled_from(_TABLES), min_size=1, max_size=3, unique_by=lambda each: each[0])):
        policy = draw(st.sampled_from(("accept", "accept", "drop"))) if hook.priority == 0 else "accept"
        for chain in _alive(draw(chains([(name, replace(hook, policy=policy))], kept_tests(version, ways), verdicts))):
            named = _named(chain, name)
            found.append(replace(named, rules=tuple(_complete(rule, version) for rule in named.rules)))
    return Ruleset(tuple(found), _sets(draw))


def _alive(chains: tuple[Chain, ...]) -> list[Chain]:
    """The first chain and those that it leads to."""
    found, names = list(chains[:1]), {c.name: c for c in chains}
    for chain in found:
        called = (names[r.verdict.chain] for r in chain.rules if isinstance(r.verdict, Goto | Jump))
        found += dict.fromkeys(c for c in called if c not in found)
    return found


def _complete(rule: Rule, version: int) -> Rule:
    """The rule with what its end needs: a mark a family, a translation a protocol as well; where others are asked, it accepts."""
    if isinstance(rule.verdict, SetDscp) and rule.version is None:
        return replace(rule, matches=(Family(version), *rule.matches))
    if not isinstance(rule.verdict, Translate):
        return rule
    asked = [m for m in rule.matches if isinstance(m, ProtocolIs | PortIn | TypeIn)]
    of_another = rule.version is not None and rule.verdict.version not in (None, rule.version)
    if of_another or not all(isinstance(m, PortIn) for m in asked):
        return replace(rule, verdict=Final.ACCEPT)
    family = (Family(4),) if rule.verdict.version and rule.version is None else ()
    return replace(rule, matches=(*family, *rule.matches, *(() if asked else (PortIn("destination", "udp", (5060, 5061)),))))


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
