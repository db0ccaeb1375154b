"""Compares what fwc read on a legacy host with what python-iptables reads there. Pure.

The two readings share nothing but the neutral types: ours comes from the text of ``iptables-save``, through the
backend; the other one from the kernel's own structures, through libiptc, as `fwcompiler.kernel.second_reading` prints
them. Names that rules have in the kernel are translated here a second time, by hand:

- chain ``FWC-s.NAME`` is ``service.NAME``, ``FWC-e.NAME`` is ``early.NAME``, any other ``FWC-NAME`` is ``NAME``;
- a chain of another table than ``filter`` is ``TABLE/CHAIN``;
- set ``fwc-NAME4`` is ``NAME.v4``, ``fwc-NAME~4`` is ``NAME.dynamic.v4``; a ``b`` behind it tells a twin apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, Literal, cast, get_args

from fwcompiler.addresses import LAST, Range, range_text
from fwcompiler.ports import PROTOCOLS, WITH_PORTS, port_text
from fwcompiler.ruleset import (
    MOST_SOURCES,
    SECONDS,
    STATES,
    Chain,
    Family,
    Final,
    Foreign,
    ForHost,
    Goto,
    Hook,
    HookName,
    InRanges,
    InSet,
    Interface,
    Jump,
    Limit,
    Match,
    OverLimit,
    Period,
    PortIn,
    ProtocolIs,
    Rewritten,
    Rule,
    Ruleset,
    SetDscp,
    Side,
    State,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Unknown,
    Untrack,
    Verdict,
    masqueraded,
    redirected,
    sent_on,
)

_ADDRESS = re.compile(r"[0-9]+(\.[0-9]+){3}")
READER = "python-iptables"
FAMILIES = (4, 6)

_HOOKS: dict[str, tuple[HookName, int]] = {
    "PREROUTING": ("prerouting", -100),
    "INPUT": ("input", 100),
    "FORWARD": ("forward", 0),
    "OUTPUT": ("output", -100),
    "POSTROUTING": ("postrouting", 100),
}
"""By built-in chain: its hook, and the priority that table nat has there."""
_PRIORITIES = {"filter": 0, "mangle": -150, "raw": -300}
_STANDARD: dict[str, Verdict] = {"ACCEPT": Final.ACCEPT, "DROP": Final.DROP, "RETURN": Final.RETURN, "": None, "standard": None}
_ICMP = {4: 1, 6: 58}
_PERIODS: tuple[Literal["second", "minute", "hour", "day"], ...] = ("second", "minute", "hour", "day")
_BURST = 5  # xt_limit's default
_SIDES: dict[str, Side] = {"s": "source", "d": "destination"}

Parameters = Mapping[str, Sequence[str]]


def read(text: str) -> Ruleset:
    """The ruleset behind the child's JSON: our chains, and the rules of built-in chains that lead to them, without sets.

    Every rule names its family, and its protocol where it has one. Nothing is left out: what has no neutral form is `Unknown`.

    Raises:
        ValueError: the text is not what the child prints.
    """
    chains: dict[str, list[Rule]] = {}
    try:
        tables = {version: json.loads(text)[str(version)] for version in FAMILIES}
        for version, table in tables.items():
            for name, rules in table.items():
                chains.setdefault(name, []).extend(_rule(each, version) for each in rules)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{READER} printed something else than rules: {error!r}") from error
    return Ruleset(tuple(_chain(name, tuple(rules)) for name, rules in chains.items()))


def _chain(kernel: str, rules: tuple[Rule, ...]) -> Chain:
    table, _, chain = kernel.rpartition("/")
    rules = tuple(replace(r, verdict=_in_table(r.verdict, table)) for r in rules) if table else rules
    if chain in _HOOKS:
        hook, nat = _HOOKS[chain]
        if table == "nat":
            return Chain(kernel, rules, Hook(hook, nat, "accept", "nat"))
        kind: Literal["filter", "route"] = "route" if (table, hook) == ("mangle", "output") else "filter"
        return Chain(kernel, rules, Hook(hook, _PRIORITIES[table or "filter"], "accept", kind))
    return Chain(_joined(table, _chain_name(chain)), rules)


def _in_table(verdict: Verdict, table: str) -> Verdict:
    """A call leads to a chain of its own table."""
    return replace(verdict, chain=_joined(table, verdict.chain)) if isinstance(verdict, Goto | Jump) else verdict


def _joined(table: str, chain: str) -> str:
    return f"{table}/{chain}" if table else chain


def _chain_name(kernel: str) -> str:
    """A name that fwc would never choose stays as it is."""
    _, _, name = kernel.partition("FWC-")
    long = {"s.": "service.", "e.": "early."}.get(name[:2])
    if long:
        return long + name[2:]
    return kernel if not name or name in _HOOKS or name.startswith(("service.", "early.", "FWC-")) else name


def _set_name(kernel: str) -> tuple[str, int] | None:
    """Neutral name and family, or None for a set that is not ours."""
    name = kernel.removesuffix("b") if kernel[-2:] in ("4b", "6b") else kernel
    if not name.startswith("fwc-") or name[-1] not in "46":
        return None
    stem, version = name[4:-1], name[-1]
    return f"{stem.removesuffix('~')}{'.dynamic' if stem.endswith('~') else ''}.v{version}", int(version)


def _rule(raw: Mapping[str, Any], version: int) -> Rule:
    if "unreadable" in raw:
        return Rule((Family(version), Unknown(raw["unreadable"])))
    matches = [Family(version), *_head(raw, version)]
    service = ""
    for name, parameters in raw["matches"]:
        if name == "comment" and not service:
            service = parameters["comment"][0]
        else:
            matches += _matches(name, parameters, version)
    verdict, log_prefix, rest = _verdict(raw, version)
    return Rule((*matches, *rest), verdict, service, log_prefix)


def _head(raw: Mapping[str, Any], version: int) -> Iterator[Match]:
    """What stands in the rule itself, without an extension."""
    for side in get_args(Side):
        text, negated = _negation(raw[side])
        span = _network(text, version)
        if span is None:
            yield Unknown(f"{side} {text}")
        elif span != (0, LAST[version]) or negated:
            yield InRanges(side, version, (span,), negated)
    for way in ("in", "out"):
        text, negated = _negation(raw[way])
        if text:
            yield Unknown(f"{way} {raw[way]}") if text.endswith("+") else Interface(cast(Literal["in"], way), text, negated)
    number, negated = _negation(raw["protocol"])
    if number != "0":
        yield ProtocolIs(int(number), negated)
    if raw["fragment"]:
        yield Unknown("fragment")


def _negation(text: str) -> tuple[str, bool]:
    return text.removeprefix("!"), text.startswith("!")


def _network(text: str, version: int) -> Range | None:
    """First and last address of ``a.b.c.d/m.m.m.m`` or ``a::b/length``; None for a mask with gaps."""
    address, _, mask = text.partition("/")
    hosts = LAST[version] ^ int(ip_address(mask)) if version == 4 else LAST[version] >> int(mask)
    if hosts & (hosts + 1):
        return None
    low = int(ip_address(address)) & ~hosts
    return low, low | hosts


def _translation(target: str, options: Mapping[str, Sequence[str]]) -> Translate | None:
    """NAT in the forms that fwc writes; None for every other target."""
    match target, {name: list(values) for name, values in options.items()}:
        case "REDIRECT", {"to-ports": [port]} if port.isdigit() and len(options) == 1:
            return redirected(int(port))
        case "DNAT", {"to-destination": [address]} if _ADDRESS.fullmatch(address) and len(options) == 1:
            return sent_on(int(ip_address(address)))
        case "MASQUERADE", {"to-ports": [ports]} if len(options) == 1:
            low, _, high = ports.partition("-")
            return masqueraded((int(low), int(high or low)))
        case "MASQUERADE", _ if not options:
            return masqueraded()
    return None


def _verdict(raw: Mapping[str, Any], version: int) -> tuple[Verdict, str, list[Match]]:
    """Verdict, log prefix, and what of the target has no neutral form."""
    target, options = raw["target"], raw["options"]
    if (target, list(options)) in (("CT", ["notrack"]), ("NOTRACK", [])):
        return Untrack(), "", []
    if target.startswith("FWC-"):
        return (Goto if raw["goto"] else Jump)(_chain_name(target)), "", []
    if target in _STANDARD and not options and not raw["goto"]:
        return _STANDARD[target], "", []
    if target == "LOG" and list(options) == ["log-prefix"] and options["log-prefix"]:
        return None, options["log-prefix"][0], []
    if target == "DSCP" and list(options) == ["set-dscp"]:
        return SetDscp(int(options["set-dscp"][0], 16)), "", []
    translation = _translation(target, options)
    if translation is not None:
        return translation, "", []
    if target == "REJECT":
        usual = options == {"reject-with": ["icmp-admin-prohibited" if version == 4 else "icmp6-adm-prohibited"]}
        return Final.REJECT, "", [] if usual else [Unknown(f"REJECT {options}")]
    return None, "", [Unknown(f"{'goto' if raw['goto'] else 'target'} {target} {options}")]


def _matches(module: str, parameters: Parameters, version: int) -> Iterator[Match]:
    """An extension's options as matches; `limit` has two options for one match."""
    if module in ("limit", "hashlimit"):
        yield _limit(parameters) if module == "limit" else _by_source(parameters, version)
        return
    for option, values in parameters.items():
        negated = values[:1] == ["!"]
        found = _match(module, option, list(values[negated:]), negated, version)
        yield Unknown(f"{module} {option} {' '.join(values)}") if found is None else found
    if not parameters and module not in WITH_PORTS:
        yield Unknown(module)


def _limit(parameters: Parameters) -> Match:
    match dict(parameters):
        case {"limit": [text], **rest} if set(rest) <= {"limit-burst"}:
            rate, _, unit = str(text).partition("/")
            per = next((p for p in _PERIODS if unit and p.startswith(unit)), None)
            if per and rate.isdigit():
                return Limit(int(rate), per, int(parameters.get("limit-burst", (str(_BURST),))[0]))
    return Unknown(f"limit {dict(parameters)}")


def _by_source(parameters: Parameters, version: int) -> Match:
    """A limit by source; its name holds the figures that fwc meant, the rate is as the extension prints it."""
    options = {name: " ".join(values) for name, values in parameters.items()}
    name = re.fullmatch(r"(\S+)\.([0-9]+)-(second|minute|hour|day)-([0-9]+)", options.get("hashlimit-name", ""))
    if name:
        found = OverLimit(version, name[1], int(name[2]), cast(Period, name[3]), int(name[4]))
        rate, _, unit = options.pop("hashlimit-above", "").partition("/")
        per = next((p for p in _PERIODS if unit and p.startswith(unit)), None)
        expected = {
            "hashlimit-burst": str(found.burst),
            "hashlimit-mode": "srcip",
            "hashlimit-name": options["hashlimit-name"],
            "hashlimit-htable-max": str(MOST_SOURCES),
            "hashlimit-htable-expire": str(found.keep * 1000),
        }
        # Not printed where they are the defaults: a burst of 5, and the unit of the rate as the time to keep.
        usual = {"hashlimit-burst": str(_BURST), "hashlimit-htable-expire": str(SECONDS[per] * 1000 if per else 0)}
        if per and rate.isdigit() and SECONDS[per] * found.rate == SECONDS[found.per] * int(rate) and {**usual, **options} == expected:
            return found
    return Unknown(f"hashlimit {options}")


def _match(module: str, option: str, values: list[str], negated: bool, version: int) -> Match | None:
    match module, option, values:
        case (("tcp" | "udp"), ("sport" | "dport"), [text]):
            first, _, last = text.partition(":")
            return PortIn(_SIDES[option[0]], module, (int(first), int(last or first)), negated)
        case "set", "match-set", [kernel, ("src" | "dst") as way] if (found := _set_name(kernel)) and found[1] == version:
            return InSet(_SIDES[way[0]], found[0], version, negated)
        case (("conntrack" | "state"), ("ctstate" | "state"), [text]):
            if text in ("DNAT", "SNAT"):
                return Rewritten("destination" if text == "DNAT" else "source", negated)
            states = cast(frozenset[State], frozenset(text.lower().split(",")))
            return StateIn(states, negated) if states <= set(STATES) else None
        case "addrtype", "dst-type", ["LOCAL"] if not negated:
            return ForHost()
        case "iprange", ("src-range" | "dst-range"), [text]:
            low, high = (int(ip_address(end)) for end in text.split("-"))
            return InRanges(_SIDES[option[0]], version, ((low, high),), negated)
        case (("icmp" | "icmp6"), ("icmp-type" | "icmpv6-type"), ["any"]) if not negated:
            return ProtocolIs(_ICMP[version])
        case (("icmp" | "icmp6"), ("icmp-type" | "icmpv6-type"), [text]) if not negated and text.isdigit():
            return TypeIn(version, (int(text),))
    return None


def compare(ours: Ruleset, theirs: Ruleset) -> str | None:
    """The first difference in one sentence, or None where the readings agree.

    Where ours says `Unknown`, it claims nothing that the other reading could contradict; nor does the other one where it misses a target
    (python-iptables has no REDIRECT for IPv6): `unread` counts those. Sets are not compared, only their names in rules.
    """
    mine, other = ({chain.name: chain for chain in each.chains} for each in (ours, theirs))
    for name in sorted({*mine, *other}):
        for reader, missing in (("fwc", name not in mine), (READER, name not in other)):
            if missing:
                return f"chain {name}: {reader} does not see it"
        for version in FAMILIES:
            found = _compare_rules(*([r for r in side[name].rules if r.version == version] for side in (mine, other)))
            if found:
                return f"chain {name}, IPv{version}, {found}"
    return None


def _compare_rules(mine: Sequence[Rule], other: Sequence[Rule]) -> str | None:
    for number, (one, two) in enumerate(zip(mine, other, strict=False), 1):
        if not _unread(two) and not any(isinstance(m, Unknown) for m in one.matches) and _meaning(one) != _meaning(two):
            return f"rule {number}: fwc reads `{rule_text(one)}`, {READER} reads `{rule_text(two)}`"
    if len(mine) == len(other):
        return None
    longer, reader = (mine, READER) if len(mine) > len(other) else (other, "fwc")
    number = min(len(mine), len(other))
    return f"rule {number + 1}: {reader} does not see `{rule_text(longer[number])}`"


def unread(theirs: Ruleset) -> int:
    """How many rules the other reading could not read because it misses their target."""
    return sum(_unread(rule) for chain in theirs.chains for rule in chain.rules)


def _unread(rule: Rule) -> bool:
    return any(isinstance(m, Unknown) and m.text.startswith("XTablesError: can't find target") for m in rule.matches)


def _meaning(rule: Rule) -> tuple[object, ...]:
    """A rule with everything said that its matches imply: families and protocols in any order, the rest as it is tested."""
    implied: set[Match] = set()
    tested: list[Match] = []
    for match in rule.matches:
        match match:
            case Family() | ProtocolIs():
                implied.add(match)
                continue
            case PortIn(_, protocol, _, False):
                implied.add(ProtocolIs(PROTOCOLS[protocol]))
            case TypeIn(version, _):
                implied |= {Family(version), ProtocolIs(_ICMP[version])}
            case InSet() | InRanges():
                implied.add(Family(match.version))
            case _:
                pass
        tested.append(match)
    return frozenset(implied), tuple(tested), rule.verdict, rule.service, rule.log_prefix


def rule_text(rule: Rule) -> str:
    """A rule in one line, for people; what is implied is left out."""
    tests = [text for match in rule.matches if (text := _match_text(match))]
    does = [f"log {rule.log_prefix!r}"] if rule.log_prefix else []
    match rule.verdict:
        case Final():
            does.append(rule.verdict.value)
        case Goto(chain):
            does.append(f"goto {chain}")
        case Jump(chain):
            does.append(f"jump {chain}")
        case Translate() | Untrack() | SetDscp() | Undecided():
            does.append(str(rule.verdict))
        case None:
            does = does or ["only count"]
    label = f" (counted as {rule.service})" if rule.service else ""
    return f"{', '.join(tests) or 'every packet'}: {', '.join(does)}{label}"


def _match_text(match: Match) -> str:
    no = "not " if getattr(match, "negated", False) else ""
    match match:
        case InSet(side, name):
            return f"{side} {no}in set {name}"
        case InRanges(side, version, ranges):
            return f"{side} {no}in {' '.join(range_text(version, each) for each in ranges)}"
        case Interface(way, name):
            return f"{way}put interface {no}{name}"
        case ProtocolIs(number):
            return f"protocol {no}{number}"
        case PortIn(side, protocol, span):
            return f"{protocol} {side} port {no}{port_text(span)}"
        case StateIn(states):
            return f"state {no}{'/'.join(sorted(states))}"
        case TypeIn(version, types):
            return f"{'icmp' if version == 4 else 'icmpv6'} type {'/'.join(map(str, types))}"
        case Limit(rate, per, burst):
            return f"at most {rate} a {per}, burst {burst}"
        case OverLimit(_, name, rate, per, burst):
            return f"source over {rate} a {per}, burst {burst}, counted as {name}"
        case ForHost():
            return "for this host"
        case Rewritten(side):
            return f"{side} {no}rewritten"
        case Unknown(text):
            return f"something unknown ({text})"
        case Foreign():
            return str(match)
        case Family():
            return ""
