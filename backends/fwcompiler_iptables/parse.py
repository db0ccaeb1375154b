"""Reads what ``iptables-save -c`` and ``ipset list -t`` print back into the neutral ruleset.

Text is cut into arguments the way ``iptables-restore`` cuts it, and each option is read with its own arguments. What the
neutral types cannot hold becomes ``Unknown`` with the text itself, so that nothing is guessed and an undo can write it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, ip_address, ip_network
from itertools import pairwise
from typing import Literal, cast

from fwcompiler.addresses import Range
from fwcompiler.diagnostics import Position
from fwcompiler.ruleset import (
    MOST_SOURCES,
    SECONDS,
    STATES,
    AddressSet,
    Chain,
    Family,
    Final,
    ForHost,
    Goto,
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
    TypeIn,
    Unknown,
    Untrack,
    Verdict,
    masqueraded,
    redirected,
    sent_on,
)
from fwcompiler_iptables.others import Others, after
from fwcompiler_iptables.render import PROTOCOL_NUMBER, REJECT_WITH, SET_PREFIX, neutral_set, quote, twin_name
from fwcompiler_iptables.tables import BUILT_IN, CHAIN_PREFIX, ahead_text, hook_of, joined, neutral_chain, split

ALONE = "a table that holds nothing else"
"""Marks, as the origin of our jump, that nothing in the family's table is anybody else's. No part of equality."""

_FINALS = {"ACCEPT": Final.ACCEPT, "DROP": Final.DROP, "RETURN": Final.RETURN}
_UNITS: dict[str, Literal["second", "minute", "hour", "day"]] = {"sec": "second", "min": "minute", "hour": "hour", "day": "day"}
_DEFAULT_BURST = 5  # iptables-extensions(8), limit: not printed when it is the default
PROTOCOL_NAMES = {
    **PROTOCOL_NUMBER,
    **{"icmp": 1, "igmp": 2, "ipencap": 4, "st": 5, "egp": 8, "igp": 9, "dccp": 33, "ipv6": 41, "rsvp": 46, "gre": 47},
    **{"esp": 50, "ah": 51, "icmpv6": 58, "ipv6-icmp": 58, "eigrp": 88, "ospf": 89, "ospfigp": 89, "ipip": 94, "etherip": 97},
    **{"encap": 98, "pim": 103, "ipcomp": 108, "vrrp": 112, "l2tp": 115, "sctp": 132, "mobility-header": 135, "udplite": 136},
}
"""Names that ``iptables-save`` takes from its own table or from /etc/protocols; other hosts print the number."""
TYPE_NAMES: dict[int, dict[str, int]] = {
    4: {
        **{"echo-reply": 0, "pong": 0, "destination-unreachable": 3, "source-quench": 4, "redirect": 5, "echo-request": 8, "ping": 8},
        **{"router-advertisement": 9, "router-solicitation": 10, "time-exceeded": 11, "ttl-exceeded": 11, "parameter-problem": 12},
        **{"timestamp-request": 13, "timestamp-reply": 14, "address-mask-request": 17, "address-mask-reply": 18},
    },
    6: {
        **{"destination-unreachable": 1, "packet-too-big": 2, "time-exceeded": 3, "ttl-exceeded": 3, "parameter-problem": 4},
        **{"echo-request": 128, "ping": 128, "echo-reply": 129, "pong": 129, "router-solicitation": 133, "router-advertisement": 134},
        **{"neighbour-solicitation": 135, "neighbor-solicitation": 135, "neighbour-advertisement": 136, "neighbor-advertisement": 136},
        **{"redirect": 137},
    },
}
"""icmp and icmp6 in iptables-extensions(8). ``iptables-save`` prints numbers; names are for text from elsewhere."""


@dataclass
class _Table:
    """One table of one family, as printed: our chains, the lines in them, and what of the rest concerns us."""

    version: int
    name: str
    chains: list[str] = field(default_factory=list)
    lines: list[tuple[str, tuple[int, int], list[str]]] = field(default_factory=list)
    alone: bool = True
    others: Others = field(default_factory=Others)


def parse_listing(saves: Sequence[str], sets: str) -> Ruleset:
    """The ruleset behind the outputs of ``iptables-save -c`` for IPv4 and IPv6 and of ``ipset list -t``.

    A chain's rules are those of IPv4, then those of IPv6, each naming its family. Built-in chains hold only their jumps to
    chains of ours: who else is in there, and what their policies say, is none of our business. Sets that fwc would not have
    made are named in ``others``.
    """
    found = [table for version, save in zip((4, 6), saves, strict=True) for table in _read_tables(save, version)]
    matched = {token for table in found for _, _, tokens in table.lines for token in after(tokens, "--match-set")}
    known, others = _read_sets(sets, matched)
    rules: dict[str, list[Rule]] = {neutral_chain(name, table.name): [] for table in found for name in table.chains}
    for table in found:
        for name, count, tokens in table.lines:
            rule = _Reader(table.version, table.name, known).rule(tokens, count)
            if hook_of(table.name, name):
                rule = replace(rule, origin=Position(ALONE, table.version) if table.alone else None)
                rules.setdefault(joined(table.name, name), []).append(rule)
            else:
                rules.setdefault(neutral_chain(name, table.name), []).append(rule)
    sets_of_ours = tuple(sorted(known.values(), key=lambda s: s.name))
    ahead = (text for table in found for text in _ahead(table))
    return Ruleset(tuple(_chains(rules)), sets_of_ours, (*sorted(others), *ahead))


def _chains(rules: Mapping[str, Sequence[Rule]]) -> Iterator[Chain]:
    hooks = {name: hook_of(*split(name)) for name in rules}
    for name in sorted(rules, key=lambda n: (hooks[n] is None, n)):
        yield Chain(name, tuple(rules[name]), hooks[name])


def _ahead(table: _Table) -> Iterator[str]:
    """What of others stands before our calls and lets packets pass them, in words."""
    for chain in dict.fromkeys(name for name, _, _ in table.lines if hook_of(table.name, name)):
        texts = table.others.passing(chain)
        if texts:
            more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
            yield ahead_text(table.name, chain, table.version, f"-A {chain} {texts[0]}{more}")


def _read_tables(save: str, version: int) -> Iterator[_Table]:
    """The tables that have a chain of ours or a rule that leads to one."""
    table = _Table(version, "")
    for line in save.splitlines():
        if line.startswith("*"):
            table = _Table(version, line[1:].strip())
        elif line == "COMMIT":
            if table.name in BUILT_IN and (table.chains or table.lines):
                yield table
        elif line.startswith(":"):
            chain, policy = line[1:].split()[:2]
            if chain.startswith(CHAIN_PREFIX):
                table.chains.append(chain)
            elif not hook_of(table.name, chain) or policy != "ACCEPT":
                table.alone = False
                table.others.chains.add(chain)
        elif match := re.match(r"(?:\[(\d+):(\d+)\] )?-A (\S+) ?(.*)", line):
            _read_line(table, match)


def _read_line(table: _Table, match: re.Match[str]) -> None:
    chain, tokens = match[3], tokenize(match[4])
    called = any(name == chain for name, _, _ in table.lines)
    if chain.startswith(CHAIN_PREFIX) or (hook_of(table.name, chain) and _leads_to_us(tokens)):
        table.lines.append((chain, (int(match[1] or 0), int(match[2] or 0)), tokens))
    else:
        table.alone = False
        table.others.add(chain, match[4], tokens, behind=called)


def _leads_to_us(tokens: Sequence[str]) -> bool:
    return any(target.startswith(CHAIN_PREFIX) for option in ("-j", "-g") for target in after(tokens, option))


def tokenize(text: str) -> list[str]:
    """Cut a line into arguments: blanks part, double quotes hold together, a backslash inside them escapes.

    The rules are those of ``add_param_to_argv`` (iptables/xshared.c).
    """
    tokens: list[str] = []
    current: list[str] | None = None
    quoted = escaped = False
    for char in text:
        if escaped:
            cast(list[str], current).append(char)
            escaped = False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            quoted, current = not quoted, current if current is not None else []
        elif char in " \t\n" and not quoted:
            if current is not None:
                tokens.append("".join(current))
            current = None
        else:
            current = [] if current is None else current
            current.append(char)
    return tokens if current is None else [*tokens, "".join(current)]


def _read_sets(text: str, matched: set[str]) -> tuple[dict[str, AddressSet], list[str]]:
    """Our sets by the names they have in the kernel, and the others that carry our prefix.

    Both variants see the same sets: one that is in use, but not by this variant's rules, is the other one's business.
    Where both twins of a set are there, a crash left one behind: the one that rules match is the set. Where the rules of one table
    match one and those of another table the other, the second is a set of its own, which nobody wants any more.
    """
    found: dict[str, AddressSet] = {}
    others: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        fields = dict(line.split(": ", 1) for line in block.strip().splitlines() if ": " in line)
        kernel = fields.get("Name", "")
        if kernel.startswith(SET_PREFIX) and (kernel in matched or fields.get("References", "0") == "0"):
            each = _read_set(kernel, fields.get("Type", ""), fields.get("Header", ""))
            if each:
                found[kernel] = each
            else:
                others.append(f"set {kernel}")
    for kernel in sorted(found, key=lambda k: (k in matched, not found[k].slot)):
        if [each.name for each in found.values()].count(found[kernel].name) > 1:
            if kernel in matched:
                found[kernel] = replace(found[kernel], name=twin_name(found[kernel].name))
                continue
            others.append(f"set {kernel}")
            del found[kernel]
    return found, others


def _read_set(kernel: str, kind: str, header: str) -> AddressSet | None:
    """The set, where its type and parameters are such as fwc gives to a set of this name."""
    name = neutral_set(kernel)
    words = header.split()
    values = dict(pairwise(words))
    if not name or values.get("family") != ("inet" if name[1] == 4 else "inet6"):
        return None
    if {"netmask", "counters", "comment", "skbinfo", "forceadd", "bitmask"} & set(words):
        return None
    if kind == "hash:net" and "timeout" not in values:
        return AddressSet(name[0], name[1], slot=name[2], kernel=kernel)
    if kind == "hash:ip" and "timeout" in values:
        return AddressSet(name[0], name[1], timeout=int(values["timeout"]), size=int(values["maxelem"]), slot=name[2], kernel=kernel)
    return None


class _NotModelled(Exception):
    """An option outside the neutral types; caught where its text becomes `Unknown`."""


class _Reader:
    """Reads the arguments of one rule."""

    def __init__(self, version: int, table: str, sets: Mapping[str, AddressSet]) -> None:
        self.version = version
        self.table = table
        self.sets = sets
        self.matches: list[Match] = []
        self.protocol: ProtocolIs | None = None
        self.verdict: Verdict = None
        self.service = ""
        self.log_prefix = ""

    def rule(self, tokens: Sequence[str], count: tuple[int, int]) -> Rule:
        """The rule, naming its family. One that cannot be followed to its end is `Unknown` as a whole."""
        try:
            for part in _parts(tokens):
                self._part(part)
        except _NotModelled:
            return Rule((Family(self.version), Unknown(_text(tokens))), count=count)
        matches = self._with_protocol()
        if not any(isinstance(m, InSet | InRanges | TypeIn | OverLimit) for m in matches):
            matches.insert(0, Family(self.version))
        return Rule(tuple(matches), self.verdict, self.service, self.log_prefix, count=count)

    def _with_protocol(self) -> list[Match]:
        """The protocol stays where no other match says it: a negated port does not."""
        if not self.protocol or any(self._implies(m, self.protocol) for m in self.matches):
            return list(self.matches)
        return [self.protocol, *self.matches]

    def _implies(self, match: Match, protocol: ProtocolIs) -> bool:
        match match:
            case PortIn(_, _, _, negated):
                return not negated
            case TypeIn(version, _):
                return protocol == ProtocolIs(1 if version == 4 else 58)
            case _:
                return match == protocol

    def _part(self, part: Sequence[str]) -> None:
        negated = part[0] == "!"
        option, *values = part[1:] if negated else part
        try:
            if option == "-m":
                self._module(values[0], values[1:])
            elif option in ("-j", "-g"):
                self._target(option, values[0], values[1:])
            else:
                self._plain(option, values[0] if values else "", negated)
        except (_NotModelled, ValueError, IndexError, KeyError):
            self.matches.append(Unknown(_text(part)))

    def _plain(self, option: str, value: str, negated: bool) -> None:
        if option in ("-s", "-d"):
            side: Side = "source" if option == "-s" else "destination"
            self.matches.append(InRanges(side, self.version, (self._span(value),), negated))
        elif option in ("-i", "-o") and not value.endswith("+"):
            self.matches.append(Interface("in" if option == "-i" else "out", value, negated))
        elif option == "-p":
            number = int(value) if value.isdigit() else PROTOCOL_NAMES[value]
            self.protocol = ProtocolIs(number, negated)
        else:
            raise _NotModelled

    def _span(self, value: str) -> Range:
        """``a/length``, ``a/mask`` or ``a-b``; a mask with gaps is no range."""
        if "-" in value:
            low, high = (ip_address(end) for end in value.split("-"))
        else:
            network = ip_network(value)
            low, high = network[0], network[-1]
        if low.version != self.version:
            raise _NotModelled
        return int(low), int(high)

    def _module(self, name: str, values: Sequence[str]) -> None:
        options = list(_options(values))
        if name == "comment" and len(values) == 2 and values[0] == "--comment" and not self.service:
            self.service = values[1]
        elif name in PROTOCOL_NUMBER:
            self._ports(name, options)
        elif name == "multiport":
            raise _NotModelled
        else:
            self.matches.append(self._single(name, options))

    def _ports(self, protocol: str, options: Sequence[tuple[bool, str, tuple[str, ...]]]) -> None:
        for negated, option, values in options:
            if option in ("--sport", "--dport") and len(values) == 1:
                low, _, high = values[0].partition(":")
                span = (int(low or 0), int(high or 65535) if ":" in values[0] else int(low))
                self.matches.append(PortIn("source" if option == "--sport" else "destination", protocol, span, negated))
            else:
                self.matches.append(Unknown(_text(["-m", protocol, *(["!"] if negated else []), option, *values])))

    def _single(self, name: str, options: Sequence[tuple[bool, str, tuple[str, ...]]]) -> Match:
        if name == "hashlimit":
            return self._over({option: values for _, option, values in options}, any(n for n, _, _ in options))
        if name == "limit":
            return self._limit({option: values for _, option, values in options}, any(n for n, _, _ in options))
        (negated, option, values), *more = options
        if more:
            raise _NotModelled
        match name, option, values:
            case "set", "--match-set", (kernel, ("src" | "dst") as way):
                each = self.sets[kernel]
                if each.version == self.version:
                    return InSet("source" if way == "src" else "destination", each.name, each.version, negated)
            case "conntrack", "--ctstate", (("DNAT" | "SNAT") as bit,):
                return Rewritten("destination" if bit == "DNAT" else "source", negated)
            case ("conntrack", "--ctstate", (states,)) | ("state", "--state", (states,)):
                names = cast(frozenset[State], frozenset(states.lower().split(",")))
                if names <= set(STATES):
                    return StateIn(names, negated)
            case "addrtype", "--dst-type", ("LOCAL",) if not negated:
                return ForHost()
            case "iprange", ("--src-range" | "--dst-range"), (text,):
                return InRanges("source" if option[2] == "s" else "destination", self.version, (self._span(text),), negated)
            case ("icmp", "--icmp-type", (kind,)) | ("icmp6", "--icmpv6-type", (kind,)) if not negated:
                return self._type(name, kind)
        raise _NotModelled

    def _type(self, module: str, kind: str) -> Match:
        """`any`, and its number 255, is every type: nothing more than the protocol."""
        version = 4 if module == "icmp" else 6
        if kind in ("any", "255") and version == 4:
            return ProtocolIs(1)
        number = TYPE_NAMES[version][kind] if kind in TYPE_NAMES[version] else int(kind)
        if version != self.version:
            raise _NotModelled
        return TypeIn(version, (number,))

    def _limit(self, options: Mapping[str, tuple[str, ...]], negated: bool) -> Limit:
        if negated or options.keys() - {"--limit", "--limit-burst"}:
            raise _NotModelled
        rate, _, per = options["--limit"][0].partition("/")
        burst = options.get("--limit-burst", (str(_DEFAULT_BURST),))[0]
        return Limit(int(rate), _UNITS[per], int(burst))

    def _over(self, options: Mapping[str, tuple[str, ...]], negated: bool) -> OverLimit:
        """The figures are in the name as well, as they were meant: the extension prints 600 a minute as 10 a second."""
        (name,) = options["--hashlimit-name"]
        match = re.fullmatch(r"(\S+)\.([0-9]+)-(second|minute|hour|day)-([0-9]+)", name)
        if match is None or negated or not int(match[2]):
            raise _NotModelled
        limit = OverLimit(self.version, match[1], int(match[2]), cast(Period, match[3]), int(match[4]))
        rate, _, per = options["--hashlimit-above"][0].partition("/")
        # The extension keeps the time between two packets in microseconds (xt_hashlimit, XT_HASHLIMIT_SCALE_v2).
        between = SECONDS[limit.per] * 1_000_000 // limit.rate
        expected = {
            "--hashlimit-above": (f"{rate}/{per}",),
            "--hashlimit-burst": (str(limit.burst),),
            "--hashlimit-mode": ("srcip",),
            "--hashlimit-name": (name,),
            "--hashlimit-htable-max": (str(MOST_SOURCES),),
            "--hashlimit-htable-expire": (str(limit.keep * 1000),),
        }
        # Not printed where they are the defaults: a burst of 5, and the unit of the rate as the time to keep.
        usual = {"--hashlimit-burst": ("5",), "--hashlimit-htable-expire": (str(SECONDS[_UNITS[per]] * 1000),)}
        if {**usual, **options} != expected or SECONDS[_UNITS[per]] * 1_000_000 // int(rate) != between:
            raise _NotModelled
        return limit

    def _target(self, option: str, name: str, rest: Sequence[str]) -> None:
        if name.startswith(CHAIN_PREFIX) and not rest:
            chain = neutral_chain(name, self.table)
            self.verdict = Goto(chain) if option == "-g" else Jump(chain)
        elif option == "-g":
            raise _NotModelled
        elif name in _FINALS and not rest:
            self.verdict = _FINALS[name]
        elif (name, *rest) in (("NOTRACK",), ("CT", "--notrack")):
            self.verdict = Untrack()
        elif name == "DSCP" and len(rest) == 2 and rest[0] == "--set-dscp":
            self.verdict = SetDscp(int(rest[1], 16))
        elif name in ("DNAT", "MASQUERADE", "REDIRECT"):
            self.verdict = self._translation(name, rest)
        elif name == "REJECT":
            self.verdict = Final.REJECT
            if list(rest) != ["--reject-with", REJECT_WITH[self.version]]:
                self.matches.append(Unknown(_text(rest)))
        elif name == "LOG" and len(rest) == 2 and rest[0] == "--log-prefix":
            self.log_prefix = rest[1]
        else:
            raise _NotModelled

    def _translation(self, name: str, rest: Sequence[str]) -> Verdict:
        """The forms that fwc writes, and no others."""
        match name, *rest:
            case "DNAT", "--to-destination", text if self.version == 4:
                return sent_on(int(IPv4Address(text)))
            case "REDIRECT", "--to-ports", text if text.isdigit():
                return redirected(int(text))
            case ("MASQUERADE",) if self.version == 4:
                return masqueraded()
            case "MASQUERADE", "--to-ports", text if self.version == 4:
                low, _, high = text.partition("-")
                return masqueraded((int(low), int(high or low)))
        raise _NotModelled


def _text(tokens: Sequence[str]) -> str:
    return " ".join(quote(token) for token in tokens)


_ARGUMENTS = {"-s": 1, "-d": 1, "-i": 1, "-o": 1, "-p": 1, "-f": 0}


def _parts(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Cut arguments into options: ``! -s ADDR``, ``-m MODULE`` with all that follows it, ``-j TARGET`` with the rest.

    ``iptables-save`` prints them in this order. A comment's text is skipped unread: it may look like an option.
    """
    place = 0
    while place < len(tokens):
        start = place
        place += tokens[place] == "!"
        option = tokens[place] if place < len(tokens) else ""
        if option in ("-j", "-g"):
            yield list(tokens[start:])
            return
        if option == "-m":
            place += 2
            while place < len(tokens) and tokens[place] not in ("-m", "-j", "-g"):
                place += 2 if tokens[place] == "--comment" else 1
        elif option in _ARGUMENTS:
            place += 1 + _ARGUMENTS[option]
        else:
            raise _NotModelled
        if place > len(tokens):
            raise _NotModelled
        yield list(tokens[start:place])


def _options(tokens: Sequence[str]) -> Iterator[tuple[bool, str, tuple[str, ...]]]:
    """A module's options: negated, name, values."""
    place = 0
    while place < len(tokens):
        negated = tokens[place] == "!"
        place += negated
        end = place + 1
        while end < len(tokens) and tokens[end] != "!" and not tokens[end].startswith("--"):
            end += 1
        if place < len(tokens):
            yield negated, tokens[place], tuple(tokens[place + 1 : end])
        place = end
