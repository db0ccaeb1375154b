"""``iptables-save`` of anybody, whole -> neutral ruleset: every table, every chain, also text that no kernel loads today.

Built-in chains become base chains with the kernel's hooks and priorities; names are ``table/CHAIN``. What a match or target
means is told in `foreign_matches` and `foreign_targets`. A line that is no rule we can read is named in `others`; a rule
that we cannot read to its end is `Unknown` as a whole, so that it is never left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fwcompiler.addresses import Ranges
from fwcompiler.diagnostics import Position
from fwcompiler.foreign import settle
from fwcompiler.ruleset import AddressSet, Chain, Hook, HookName, Rule, Ruleset, Unknown
from fwcompiler_iptables.foreign_matches import read_matches
from fwcompiler_iptables.foreign_options import Spec, Unreadable, read_spec
from fwcompiler_iptables.foreign_targets import read_target
from fwcompiler_iptables.parse import tokenize

_HOOKS: Mapping[str, HookName] = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}
_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
"""NF_IP_PRI_* (include/uapi/linux/netfilter_ipv4.h); nat has -100 for destinations and 100 for sources."""
_NAT = {"prerouting": -100, "output": -100, "input": 100, "postrouting": 100}
_RULE = re.compile(r"(?:\[(\d+):(\d+)\]\s*)?(?:-A|--append|-I|--insert)\s+(\S+)\s*(.*)")
_COMMAND = re.compile(r"(?:\S*/)?ip6?tables(?:-legacy|-nft)?\s+(.*)")
_TABLE_OPTION = re.compile(r"(?:^|\s)(?:-t|--table)[ =]+(\w+)")


@dataclass
class _Reading:
    """What has been read so far."""

    version: int
    file: str
    sets: Mapping[str, Ranges]
    chains: dict[str, list[Rule]] = field(default_factory=dict)
    policies: dict[str, Literal["accept", "drop"]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)
    table: str = "filter"


def read_save(text: str, version: int, sets: Mapping[str, Ranges] | None = None, file: str = "") -> Ruleset:
    """The ruleset of one family behind what ``iptables-save`` or ``ip6tables-save`` printed, now or years ago.

    `sets`: the content of ipsets as far as it is known, by name; a set that is not there is a named test. `file` is what
    rules' origins name. Lines of the form ``iptables -A …`` are read as well.
    """
    reading = _Reading(version, file, sets or {})
    for number, line in enumerate(_joined(text), 1):
        _line(reading, line.strip(), number)
    chains = tuple(Chain(name, tuple(rules), _hook(name, reading)) for name, rules in reading.chains.items())
    known = tuple(AddressSet(name, version, ranges) for name, ranges in sorted(reading.sets.items()))
    return settle(Ruleset(chains, known, tuple(reading.others)), frozenset(reading.changed))


def _joined(text: str) -> Iterator[str]:
    """Lines; one that ends in a backslash goes on in the next."""
    before = ""
    for line in text.splitlines():
        if line.endswith("\\"):
            before += line[:-1] + " "
            yield ""
        else:
            yield before + line
            before = ""


def _line(reading: _Reading, line: str, number: int) -> None:
    if not line or line.startswith("#") or line == "COMMIT":
        return
    command = _COMMAND.fullmatch(line)
    if command:
        line = command[1]
        table = _TABLE_OPTION.search(line)
        reading.table = table[1] if table else "filter"
        line = _TABLE_OPTION.sub("", line).strip()
    rule = _RULE.fullmatch(line)
    if line.startswith("*"):
        reading.table = line[1:].split()[0] if line[1:].split() else ""
    elif line.startswith(":") and len(line.split()) >= 2:
        name, policy = line[1:].split()[:2]
        _chain(reading, name, policy)
    elif line.startswith(("-P ", "--policy ")) and len(line.split()) == 3:
        _chain(reading, *line.split()[1:])
    elif line.startswith(("-N ", "--new-chain ")) and len(line.split()) == 2:
        _chain(reading, line.split()[1], "-")
    elif rule:
        _append(reading, rule, number, first="-I" in line.split(rule[3], 1)[0] or "--insert" in line.split(rule[3], 1)[0])
    elif not re.match(r"(-F|-X|-Z|--flush|--delete-chain|--zero)\b", line):
        reading.others.append(f"line {number}: {line}")


def _chain(reading: _Reading, name: str, policy: str) -> None:
    key = f"{reading.table}/{name}"
    reading.chains.setdefault(key, [])
    if policy in ("ACCEPT", "DROP"):
        reading.policies[key] = "accept" if policy == "ACCEPT" else "drop"


def _append(reading: _Reading, found: re.Match[str], number: int, *, first: bool) -> None:
    packets, octets, name, rest = found.groups()
    rules = reading.chains.setdefault(f"{reading.table}/{name}", [])
    place = len(rules)
    if first:
        position, _, after = rest.partition(" ")
        place, rest = (int(position) - 1, after) if position.isdigit() else (0, rest)
    origin = Position(reading.file, number)
    count = (int(packets or 0), int(octets or 0))
    rules.insert(place, _read_rule(reading, rest, origin, count))


def _read_rule(reading: _Reading, text: str, origin: Position, count: tuple[int, int]) -> Rule:
    try:
        spec = read_spec(tokenize(text))
        matches = read_matches(spec, reading.version)
        verdict, more = read_target(spec, reading.version, reading.table, reading.chains)
    except Unreadable as error:
        return Rule((Unknown(f"{text} ({error})"),), origin=origin, count=count)
    reading.changed |= _changed(spec)
    return Rule((*matches, *more), verdict, origin=origin, count=count)


_CHANGES = {
    "MARK": ("mark",),
    "HMARK": ("mark",),
    "IPMARK": ("mark",),
    "CONNMARK": ("mark", "connmark"),
    "TPROXY": ("mark",),
    "DSCP": ("dscp", "tos"),
    "TOS": ("dscp", "tos"),
    "ECN": ("tcp flags", "dscp", "tos", "ecn"),
    "TTL": ("ttl",),
    "HL": ("hoplimit",),
    "SECMARK": ("secmark",),
    "CONNSECMARK": ("secmark",),
    "TCPMSS": ("tcpmss", "meta length"),
    "CT": ("ct",),
    "DNAT": ("ct status",),
    "SNAT": ("ct status",),
    "REDIRECT": ("ct status",),
    "MASQUERADE": ("ct status",),
}
"""By target: the subjects of tests that it changes."""


def _changed(spec: Spec) -> set[str]:
    target = spec.target
    if target is None:
        return set()
    filled = {f"set {values[0]}" for _, name, values in target.options if name in ("--add-set", "--del-set", "--map-set") and values}
    return filled | set(_CHANGES.get(target.name, ()))


def _hook(name: str, reading: _Reading) -> Hook | None:
    table, _, chain = name.partition("/")
    hook = _HOOKS.get(chain)
    policy = reading.policies.get(name, "accept")
    if hook is None:
        return None
    if table == "nat":
        return Hook(hook, _NAT.get(hook, 0), policy, "nat", reading.version)
    if table in _PRIORITIES:
        kind: Literal["filter", "route"] = "route" if (table, hook) == ("mangle", "output") else "filter"
        return Hook(hook, _PRIORITIES[table], policy, kind, reading.version)
    return None
