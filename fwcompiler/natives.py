"""Rules that were made with nft in a table of iptables-nft's: its save program leaves out of a rule what it does not know.

`ip saddr { 192.0.2.1 } drop` is printed as ``-j DROP``, `ip saddr >= 192.0.2.1` as ``-s 192.0.2.1``, and the verdicts of a map not at
all (iptables 1.8.9, ``nft_parse_lookup`` and ``nft_parse_cmp`` in iptables/nft-shared.c). nft prints them whole, so both are read.
"""

from __future__ import annotations

import json
import re
from typing import Any

Json = Any

_LINE = re.compile(r"(\[\d+:\d+\] )?-A (\S+)")
_INCOMPATIBLE = re.compile(r"(?m)^# Table `(\S+)' is incompatible")
_PLAIN = ("xt", "counter", "log", "accept", "drop", "return", "jump", "goto", "reject", "notrack", "masquerade", "redirect", "dnat", "snat")
_FIELDS = ("saddr", "daddr", "protocol", "nexthdr", "sport", "dport", "type", "code", "flags", "frag-off")
_PORTS = ("sport", "dport")


def marked(save: str, listing: str) -> str:
    """A save of one family, where each rule that may mean something else has its text by nft instead, as a match nobody knows.

    ``listing`` is that family's `nft -j list ruleset`; empty where it could not be asked, and then all is believed.
    """
    rules = _rules(listing)
    if not any(text for texts in rules.values() for text in texts):
        return save
    table, seen = "", dict[tuple[str, str], int]()
    lines: list[str] = []
    for line in save.split("\n"):
        table = line[1:].strip() if line.startswith("*") else table
        found = _LINE.match(line)
        if found:
            key = (table, found[2])
            texts, number = rules.get(key, []), seen.get(key, 0)
            seen[key] = number + 1
            text = texts[number] if number < len(texts) else ""
            quoted = text.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'{found[1] or ""}-A {found[2]} -m nft --rule "{quoted}" -j NFT' if text else line)
        else:
            lines.append(line)
    return "\n".join(lines)


def unprinted(save: str) -> str:
    """The first table that the save program did not print, because rules in it were made with nft; empty: none."""
    found = _INCOMPATIBLE.search(save)
    return found[1] if found else ""


def _rules(listing: str) -> dict[tuple[str, str], list[str]]:
    """By table and chain, for every rule in its order: its text where iptables may print it otherwise, else nothing."""
    try:
        items = json.loads(listing)["nftables"] if listing.strip() else []
    except (ValueError, KeyError):
        return {}
    found: dict[tuple[str, str], list[str]] = {}
    for item in items:
        rule = item.get("rule")
        if rule:
            expressions = rule.get("expr", [])
            text = "" if all(map(_believed, expressions)) else json.dumps(expressions, sort_keys=True)
            found.setdefault((rule["table"], rule["chain"]), []).append(text)
    return found


def _believed(expression: Json) -> bool:
    """True for what iptables-nft itself makes, as far as its save program reads it back."""
    if not isinstance(expression, dict):
        return False
    kind, value = next(iter(expression.items()))
    if kind == "limit":
        return isinstance(value, dict)
    return kind in _PLAIN if kind != "match" else value["op"] in ("==", "!=", "in", "!") and _is_read(value["left"], value["right"])


def _is_read(left: Json, right: Json) -> bool:
    match left:
        case {"&": [inner, _]}:
            return _is_read(inner, right)
        case {"payload": {"field": name}}:
            ported = name in _PORTS and isinstance(right, dict) and "range" in right
            return name in _FIELDS and (ported or _is_single(right))
        case {"meta": _}:
            return _is_single(right)
    return False


def _is_single(right: Json) -> bool:
    """One value: no set, no map, and no range, which iptables has for ports only."""
    return not (isinstance(right, dict) and not right.keys() <= {"prefix", "|"}) and not (isinstance(right, str) and right.startswith("@"))
