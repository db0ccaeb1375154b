"""nft's JSON listing (libnftables-json(5)) -> neutral ruleset.

Everything that `render` writes is read back; whatever else stands in our table becomes `Unknown` or is named in
`Ruleset.others`, never guessed. nft leaves out of its listing what a match implies: `tcp dport` says tcp by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast, get_args

from fwcompiler.addresses import LAST, Range, merged, parse_address
from fwcompiler.ruleset import (
    MOST_SOURCES,
    STATES,
    AddressSet,
    Chain,
    Family,
    Final,
    ForHost,
    Goto,
    Hook,
    HookKind,
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
    StateIn,
    TypeIn,
    Unknown,
    Untrack,
    Verdict,
    masqueraded,
    redirected,
    sent_on,
)
from fwcompiler_nftables.foreign_values import PROTOCOL_NAMES

Json = Any

STRAY = "stray set "
"""Begins the name of a twin that nothing refers to, left behind by a run that was killed."""
_SET_KEYS = {
    "interval": {"family", "name", "table", "type", "handle", "flags", "elem"},
    "timeout": {"family", "name", "table", "type", "handle", "flags", "elem", "timeout", "size"},
}
"""What a listing says of a set as fwc makes it; one with anything more is somebody else's."""
FAMILY, NAME = "inet", "fwc"
_LIMIT_NAME = re.compile(r"limit\.(\S+)\.([0-9]+)-(second|minute|hour|day)-([0-9]+)\.v([46])")
_SLOT = re.compile(r"^(.*\.v[46])\.(b)$")

# Names that nft 1.0 prints for ICMP types (nft describe "icmp type"; RFC 792, RFC 4443, RFC 4861, RFC 3810).
ICMP_TYPES = {
    4: {
        "echo-reply": 0,
        "destination-unreachable": 3,
        "source-quench": 4,
        "redirect": 5,
        "echo-request": 8,
        "router-advertisement": 9,
        "router-solicitation": 10,
        "time-exceeded": 11,
        "parameter-problem": 12,
        "timestamp-request": 13,
        "timestamp-reply": 14,
        "info-request": 15,
        "info-reply": 16,
        "address-mask-request": 17,
        "address-mask-reply": 18,
    },
    6: {
        "destination-unreachable": 1,
        "packet-too-big": 2,
        "time-exceeded": 3,
        "parameter-problem": 4,
        "echo-request": 128,
        "echo-reply": 129,
        "mld-listener-query": 130,
        "mld-listener-report": 131,
        "mld-listener-done": 132,
        "mld-listener-reduction": 132,
        "nd-router-solicit": 133,
        "nd-router-advert": 134,
        "nd-neighbor-solicit": 135,
        "nd-neighbor-advert": 136,
        "nd-redirect": 137,
        "router-renumbering": 138,
        "ind-neighbor-solicit": 141,
        "ind-neighbor-advert": 142,
        "mld2-listener-report": 143,
    },
}


DSCP_NAMES = {
    **{f"cs{i}": i * 8 for i in range(8)},
    **{f"af{i}{j}": i * 8 + j * 2 for i in range(1, 5) for j in range(1, 4)},
    **{"be": 0, "ef": 46, "va": 44, "lephb": 1},
}
"""nft describe "ip dscp"."""


class _NotModelled(Exception):
    """An expression outside the neutral types; caught where it becomes `Unknown`."""


def parse_listing(text: str) -> Ruleset:
    """The table from `nft -j -t list table inet fwc`; empty text means that there is no table."""
    objects = _objects(text)
    rules: dict[str, list[Rule]] = {}
    for item in objects:
        if "rule" in item:
            rules.setdefault(item["rule"]["chain"], []).extend(_rules(item["rule"]))
    chains = tuple(
        Chain(item["chain"]["name"], tuple(rules.get(item["chain"]["name"], ())), _hook(item["chain"]))
        for item in objects
        if "chain" in item
    )
    sets, twins = _one_of_twins([s for item in objects if "set" in item and (s := _set(item["set"]))], text)
    counters = {item["counter"]["name"] for item in objects if "counter" in item}
    ruleset = Ruleset(chains, tuple(sorted(sets, key=lambda s: s.name)))
    counting = {item["set"]["name"] for item in objects if "set" in item and _limit_set(item["set"])}
    twins += [f"{STRAY}{name}" for name in sorted(counting - {f"limit.{name}" for name in ruleset.limits()})]
    unused = [f"counter {name}" for name in sorted(counters - set(ruleset.counters()))]
    flags = [
        f"table {item['table']['name']} with flags"
        for item in _listed(text)
        if "flags" in item.get("table", {}) and _is_ours(item["table"])
    ]
    others = [f"{kind} {value['name']}" for item in objects for kind, value in item.items() if _is_other(kind, value)]
    return Ruleset(ruleset.chains, ruleset.sets, (*flags, *others, *twins, *unused))


def _one_of_twins(sets: list[AddressSet], text: str) -> tuple[list[AddressSet], list[str]]:
    """Where a set is there under both slots, a crash left one behind: the one that rules name is the set."""
    found: dict[str, AddressSet] = {}
    strays: list[str] = []
    for each in sorted(sets, key=lambda s: (f'"@{s.kernel_name}"' in text, not s.slot)):
        if each.name in found:
            strays.append(f"{STRAY}{found[each.name].kernel_name}")
        found[each.name] = each
    return list(found.values()), strays


def read_counters(text: str) -> Mapping[str, tuple[int, int]]:
    """Packets and bytes of the named counters in a listing."""
    objects = _objects(text)
    found = (item["counter"] for item in objects if "counter" in item)
    return {c["name"]: (c["packets"], c["bytes"]) for c in found}


def _objects(text: str) -> list[Json]:
    """What a listing says of our table; one of the whole family has other tables in it."""
    return [
        {kind: value}
        for item in _listed(text)
        for kind, value in item.items()
        if kind not in ("metainfo", "table") and value.get("table") == NAME and value.get("family") == FAMILY
    ]


def _listed(text: str) -> list[Json]:
    return list(json.loads(text)["nftables"]) if text.strip() else []


def _is_ours(table: Json) -> bool:
    return bool(table.get("name") == NAME and table.get("family") == FAMILY)


def _is_other(kind: str, value: Json) -> bool:
    if kind == "chain":
        return value.get("type", "filter") not in get_args(HookKind)
    if kind in ("rule", "counter") or (kind == "set" and _limit_set(value)):
        return False
    return kind != "set" or _set(value) is None


def _hook(chain: Json) -> Hook | None:
    if "hook" not in chain:
        return None
    return Hook(chain["hook"], chain.get("prio", 0), chain.get("policy", "accept"), chain.get("type", "filter"))


def _set(item: Json) -> AddressSet | None:
    """An address set of the form that fwc writes, else None."""
    if _limit_set(item):
        return None
    flags = item.get("flags", [])
    flags = [flags] if isinstance(flags, str) else flags
    version = {"ipv4_addr": 4, "ipv6_addr": 6}.get(item["type"]) if isinstance(item["type"], str) else None
    if version is None or flags not in (["interval"], ["timeout"]) or set(item) - _SET_KEYS[flags[0]]:
        return None
    slot = _SLOT.match(item["name"])
    name, suffix = (slot[1], slot[2]) if slot else (item["name"], "")
    timeout = item.get("timeout", 0) if flags == ["timeout"] else None
    return AddressSet(name, version, timeout=timeout, size=item.get("size") if timeout is not None else None, slot=suffix)


def _limit_set(item: Json) -> OverLimit | None:
    """The limit whose name and form a set has, else None. nft does not say in JSON that a set is dynamic."""
    limit = _named_limit(item["name"])
    if limit is None or item["type"] != f"ipv{limit.version}_addr" or set(item) - _SET_KEYS["timeout"]:
        return None
    form = (item.get("flags"), item.get("size"), item.get("timeout"))
    return limit if form in ((flags, MOST_SOURCES, limit.keep) for flags in (["timeout"], ["dynamic", "timeout"])) else None


def _named_limit(name: str) -> OverLimit | None:
    match = _LIMIT_NAME.fullmatch(name)
    if match is None or not int(match[2]):
        return None
    return OverLimit(int(match[5]), match[1], int(match[2]), cast(Period, match[3]), int(match[4]))


def _rules(rule: Json) -> Iterator[Rule]:
    """A verdict map becomes one rule a port again; every other rule is one rule."""
    expressions = rule.get("expr", [])
    expanded = _verdict_map(expressions)
    if expanded is not None and "comment" not in rule:
        yield from expanded
    else:
        yield _rule(expressions, rule.get("comment", ""))


def _verdict_map(expressions: list[Json]) -> list[Rule] | None:
    if len(expressions) != 1 or not isinstance(expressions[0], dict) or "vmap" not in expressions[0]:
        return None
    vmap = expressions[0]["vmap"]
    try:
        left, pairs = vmap["key"], vmap["data"]["set"]
        rules = [Rule((_match({"op": "==", "left": left, "right": value}),), _verdict(data)) for value, data in pairs]
    except (_NotModelled, KeyError, TypeError, ValueError):
        return None
    return rules if all(r.verdict is not None for r in rules) else None


def _rule(expressions: list[Json], comment: str) -> Rule:
    matches: list[Match] = []
    counter, log, verdict, ended = "", "", None, False
    for expression in expressions:
        kind, value = next(iter(expression.items())) if isinstance(expression, dict) else ("", expression)
        if ended:
            matches.append(Unknown(f"after the verdict: {_text(expression)}"))
        elif kind == "counter":
            counter = value if isinstance(value, str) else "(anonymous)"
        elif kind == "log":
            log = _log(value)
        else:
            try:
                verdict = _verdict(expression)
            except _NotModelled:
                matches.append(_match_or_unknown(kind, value, expression))
            ended = verdict is not None
    implied = _implied_family(expressions[-1]) if verdict is not None else None
    if implied and not any(isinstance(m, Family) for m in matches):
        matches.insert(0, implied)
    named = isinstance(verdict, Final) and counter == f"{comment}.{verdict.value}"
    return Rule(tuple(matches), verdict, comment if named else f"{comment}?" if comment or counter else "", log)


def _implied_family(expression: Json) -> Family | None:
    """The family that a rule is for by its end alone: nft leaves the test for it out of its listing."""
    match expression:
        case {"mangle": {"key": {"payload": {"protocol": "ip" | "ip6" as protocol}}}}:
            return Family(4 if protocol == "ip" else 6)
        case {"reject": {"type": "icmp" | "icmpv6" as kind}}:
            return Family(4 if kind == "icmp" else 6)
    return None


def _log(value: Json) -> str:
    plain = isinstance(value, dict) and set(value) == {"prefix", "level"} and value["level"] == "info"
    return str(value["prefix"]) if plain else f"(other) {_text(value)}"


def _match_or_unknown(kind: str, value: Json, expression: Json) -> Match:
    try:
        if kind == "match":
            return _match(value)
        if kind == "limit":
            return _limit(value)
        if kind == "set":
            return _over_limit(value)
    except (_NotModelled, KeyError, TypeError, ValueError):
        pass
    return Unknown(_text(expression))


def _text(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


def _verdict(expression: Json) -> Verdict:
    if not isinstance(expression, dict):
        raise _NotModelled
    match next(iter(expression.items())):
        case ("accept" | "drop" | "return" as word, _):
            return Final(word)
        case ("reject", {"type": "icmpx" | "icmp" | "icmpv6", "expr": "admin-prohibited"}):
            return Final.REJECT
        case ("notrack", _):
            return Untrack()
        case ("mangle", {"key": {"payload": {"protocol": "ip" | "ip6", "field": "dscp"}}, "value": value}):
            return SetDscp(_dscp(value))
        case ("goto", {"target": str(chain)}):
            return Goto(chain)
        case ("jump", {"target": str(chain)}):
            return Jump(chain)
        case ("dnat", {"family": "ip", "addr": str(text), **rest}) if not rest:
            version, address = parse_address(text)
            if version == 4:
                return sent_on(address)
        case ("redirect", {"port": int(port), **rest}) if not rest:
            return redirected(port)
        case ("masquerade", None):
            return masqueraded()
        case ("masquerade", {"port": port, **rest}) if not rest:
            return masqueraded(_span(port))
    raise _NotModelled


def _dscp(value: Json) -> int:
    if isinstance(value, int):
        return value
    if value in DSCP_NAMES:
        return DSCP_NAMES[value]
    raise _NotModelled


def _limit(value: Json) -> Limit:
    known = {"rate", "per", "burst", "rate_unit", "burst_unit", "inv"}
    if not isinstance(value, dict):
        raise _NotModelled  # one of the table's named limits
    if value.get("inv") or set(value) - known or value.get("rate_unit", "packets") != "packets":
        raise _NotModelled
    if value["per"] not in ("second", "minute", "hour", "day"):
        raise _NotModelled
    return Limit(value["rate"], value["per"], value.get("burst", 5))


def _over_limit(value: Json) -> OverLimit:
    """`update @NAME { ip saddr limit rate over … }`, where the figures are those of the name."""
    limit = _named_limit(value["set"].removeprefix("@"))
    if limit is None or set(value) != {"op", "elem", "set", "stmt"} or value["op"] != "update":
        raise _NotModelled
    (statement,) = value["stmt"]
    source = {"payload": {"protocol": "ip" if limit.version == 4 else "ip6", "field": "saddr"}}
    counted = {"rate": limit.rate, "per": limit.per, "burst": limit.burst, "inv": True}
    if value["elem"] != source or statement.keys() != {"limit"} or {"burst": 5, **statement["limit"]} != counted:
        raise _NotModelled
    return limit


def _match(value: Json) -> Match:
    operator, left, right = value["op"], value["left"], value["right"]
    if operator not in ("==", "!=", "in", "!"):
        raise _NotModelled
    negated = operator in ("!=", "!")
    match left:
        case {"payload": {"protocol": "ip" | "ip6" as family, "field": "saddr" | "daddr" as field}}:
            return _address(4 if family == "ip" else 6, "source" if field == "saddr" else "destination", right, negated)
        case {"payload": {"protocol": "tcp" | "udp" as protocol, "field": "sport" | "dport" as field}}:
            return PortIn("source" if field == "sport" else "destination", protocol, _span(right), negated)
        case {"payload": {"protocol": "icmp" | "icmpv6" as protocol, "field": "type"}} if not negated:
            return _types(4 if protocol == "icmp" else 6, right)
        case {"meta": {"key": "iif" | "iifname" | "oif" | "oifname" as key}} if isinstance(right, str) and "*" not in right:
            return Interface("in" if key.startswith("i") else "out", right, negated)
        case {"meta": {"key": "nfproto"}} if right in ("ipv4", "ipv6") and not negated:
            return Family(4 if right == "ipv4" else 6)
        case {"meta": {"key": "l4proto"}}:
            return ProtocolIs(_protocol(right), negated)
        case {"ct": {"key": "state"}}:
            return _states(right, negated)
        case {"fib": {"result": "type", "flags": ["daddr"]}} if right == "local" and not negated:
            return ForHost()
        case {"ct": {"key": "status"}} if right in ("dnat", "snat") and operator in ("in", "!"):
            return Rewritten("destination" if right == "dnat" else "source", negated)
    raise _NotModelled


def _address(version: int, side: Any, right: Json, negated: bool) -> Match:
    if isinstance(right, str) and right.startswith("@"):
        slot = _SLOT.match(right[1:])
        return InSet(side, slot[1] if slot else right[1:], version, negated)
    items = right["set"] if isinstance(right, dict) and "set" in right else [right]
    return InRanges(side, version, merged(_range(version, item) for item in items), negated)


def _range(version: int, item: Json) -> Range:
    match item:
        case str():
            found, value = parse_address(item)
            if found == version:
                return value, value
        case {"prefix": {"addr": str(text), "len": int(length)}}:
            found, value = parse_address(text)
            if found == version:
                return value, value | (LAST[version] >> length)
        case {"range": [str(low), str(high)]}:
            (a, first), (b, last) = parse_address(low), parse_address(high)
            if a == b == version:
                return first, last
    raise _NotModelled


def _span(right: Json) -> Range:
    match right:
        case int():
            return right, right
        case {"range": [int(low), int(high)]}:
            return low, high
    raise _NotModelled


def _items(right: Json) -> Iterable[Json]:
    return right["set"] if isinstance(right, dict) and "set" in right else [right]


def _types(version: int, right: Json) -> TypeIn:
    names = ICMP_TYPES[version]

    def number(item: Json) -> int:
        if isinstance(item, int):
            return item
        if isinstance(item, str) and item in names:
            return names[item]
        raise _NotModelled

    found: set[int] = set()
    for item in _items(right):
        if isinstance(item, dict) and "range" in item:
            low, high = item["range"]
            found.update(range(number(low), number(high) + 1))
        else:
            found.add(number(item))
    return TypeIn(version, tuple(sorted(found)))


def _protocol(right: Json) -> int:
    if isinstance(right, int):
        return right
    if right in PROTOCOL_NAMES:
        return PROTOCOL_NAMES[right]
    raise _NotModelled


def _states(right: Json, negated: bool) -> StateIn:
    if negated and isinstance(right, list):
        raise _NotModelled  # compares with the bits of all of them at once
    items = right if isinstance(right, list) else list(_items(right))
    if not all(item in STATES for item in items):
        raise _NotModelled
    return StateIn(frozenset(items), negated)
