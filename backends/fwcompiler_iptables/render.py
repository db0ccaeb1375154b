"""Neutral rules as lines for ``iptables-restore``, sets as lines for ``ipset restore``, and the names both have in the kernel.

iptables wraps or reinterprets what it does not understand (``--dport 99999`` becomes 34463, ``-p 0`` means every protocol,
``--icmp-type 255`` means every type), so :func:`refuse` checks every number before a line is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

from fwcompiler.addresses import BITS, LAST, Range, address_text, prefix_count, prefix_text, prefixes
from fwcompiler.diagnostics import Finding, Position
from fwcompiler.ports import port_text
from fwcompiler.ruleset import (
    MOST_SOURCES,
    AddressSet,
    Chain,
    Family,
    Final,
    Foreign,
    ForHost,
    Goto,
    InRanges,
    InSet,
    Interface,
    Jump,
    Limit,
    Match,
    OverLimit,
    PortIn,
    ProtocolIs,
    Rewritten,
    Rule,
    Ruleset,
    SetDscp,
    StateIn,
    Translate,
    TypeIn,
    Undecided,
    Unknown,
    Untrack,
    is_ours,
)
from fwcompiler_iptables.tables import (
    BUILT_IN,
    CHAIN_MAX,
    CHAIN_PREFIX,
    NOTHING,
    Tables,
    chain_name,
    is_built_in,
    open_ends,
    order,
    placement,
    split,
    table_of,
    tables,
)

SET_PREFIX, SET_MAX = "fwc-", 31
"""IPSET_MAXNAMELEN (include/uapi/linux/netfilter/ipset/ip_set.h), without the closing NUL."""
MAXELEM = 1 << 24
"""The most elements a static set may hold: only a limit, it costs no memory."""

PROTOCOL_NUMBER = {"tcp": 6, "udp": 17}
REJECT_WITH = {4: "icmp-admin-prohibited", 6: "icmp6-adm-prohibited"}
"""RFC 1812, section 5.2.7.1, and RFC 4443: a firewall says so, and no server does."""
ICMP = {4: ("icmp", "icmp", "--icmp-type"), 6: ("ipv6-icmp", "icmp6", "--icmpv6-type")}
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_TIMEOUT_MAX = 2147483
"""Seconds (ipset(8), "timeout")."""
_EXTENSION_HEADERS = (43, 44, 51, 60)
"""The kernel looks behind these for the protocol (net/ipv6/netfilter/ip6_tables.c, ``ip6_packet_match``)."""
SLOTS = ("", "b", "c")
"""A set and its twin; the third is for what a crash between two tables leaves: either twin in use by one of them."""
_SET_NAME = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)(\.dynamic)?(?:\.twin)?\.v([46])")
_KERNEL_SET = re.compile(r"fwc-([A-Za-z][A-Za-z0-9_-]*)(~?)([46])([bc]?)")
_PLAIN = re.compile(r"[A-Za-z0-9_./:,+=@-]+")


def is_set_name(name: str) -> bool:
    """True for names that :func:`set_name` can translate."""
    return bool(_SET_NAME.fullmatch(name))


def set_name(name: str, slot: str = "") -> str:
    """``carriers.v4`` is ``fwc-carriers4``, ``agents.dynamic.v6`` is ``fwc-agents~6``; a twin has a ``b`` or a ``c`` behind it."""
    match = _SET_NAME.fullmatch(name)
    assert match, name
    return f"{SET_PREFIX}{match[1]}{'~' if match[2] else ''}{match[3]}{slot}"


def neutral_set(kernel: str) -> tuple[str, int, str] | None:
    """Neutral name, version and slot of a set with this kernel name; None where fwc would never choose it."""
    match = _KERNEL_SET.fullmatch(kernel)
    if not match:
        return None
    return f"{match[1]}{'.dynamic' if match[2] else ''}.v{match[3]}", int(match[3]), match[4]


def twin_name(name: str) -> str:
    """What a reader calls the second of two twins that are both in use: ``carriers.twin.v4``."""
    head, _, version = name.rpartition(".")
    return f"{head}.twin.{version}"


def quote(text: str) -> str:
    """One argument as ``iptables-restore`` reads it (iptables/xshared.c, ``add_param_to_argv``)."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


Option = tuple[int, str]
"""Rank and text; the ranks are the order in which ``iptables-save`` prints."""
_SIDE_RANK = {"source": 0, "destination": 1}
_SHORT = {"source": "src", "destination": "dst"}
_PROTOCOL, _MATCH, _COMMENT, _TARGET, _REST = 4, 5, 6, 7, 8


def specs(rule: Rule, version: int, slots: Mapping[str, str]) -> list[str]:
    """A rule as one or more specifications (what stands behind ``-A CHAIN``), each exact.

    iptables matches one type and one range a rule, so lists of them are unrolled; no packet meets two of the copies.
    A rule that logs and decides becomes two.
    """
    found: list[str] = []
    for choice in product(*(_choices(m) for m in rule.matches)):
        options = _options(choice, version, slots)
        if rule.log_prefix:
            found.append(_text([*options, (_TARGET, f"-j LOG --log-prefix {quote(rule.log_prefix)}")]))
            if rule.verdict is None:
                continue
        comment = [(_COMMENT, f"-m comment --comment {quote(rule.service)}")] if rule.service else []
        found.append(_text([*options, *comment, *_target(rule, version)]))
    return found


def _text(options: Iterable[Option]) -> str:
    return " ".join(text for _, text in sorted(options, key=lambda o: o[0]) if text)


def _choices(match: Match) -> list[Match]:
    match match:
        case TypeIn(version, types):
            return [TypeIn(version, (number,)) for number in types]
        case InRanges(side, version, ranges, False):
            return [InRanges(side, version, (span,)) for span in ranges]
        case _:
            return [match]


def _target(rule: Rule, version: int) -> list[Option]:
    match rule.verdict:
        case None:
            return []
        case Goto(chain):
            return [(_TARGET, f"-g {chain_name(chain)}")]
        case Jump(chain):
            return [(_TARGET, f"-j {chain_name(chain)}")]
        case Final.REJECT if any(isinstance(m, Unknown) and m.text.startswith("--reject-with") for m in rule.matches):
            return [(_TARGET, "-j REJECT")]
        case Final.REJECT:
            return [(_TARGET, f"-j REJECT --reject-with {REJECT_WITH[version]}")]
        case Final():
            return [(_TARGET, f"-j {rule.verdict.name}")]
        case Untrack():
            return [(_TARGET, "-j CT --notrack")]
        case SetDscp(value):
            return [(_TARGET, f"-j DSCP --set-dscp 0x{value:02x}")]
        case Translate(ranges=((low, _),)) if is_ours(rule.verdict):
            return [(_TARGET, f"-j DNAT --to-destination {address_text(4, low)}")]
        case Translate(side="destination", ports=(port, _)) if is_ours(rule.verdict):
            return [(_TARGET, f"-j REDIRECT --to-ports {port}")]
        case Translate(ports=ports) if is_ours(rule.verdict):
            return [(_TARGET, "-j MASQUERADE" + (f" --to-ports {port_text(ports)}" if ports else ""))]
        case Translate() | Undecided():
            raise ValueError(f"cannot render {rule.verdict}")


def _options(matches: Sequence[Match], version: int, slots: Mapping[str, str]) -> list[Option]:
    options: list[Option] = []
    used: set[str] = set()
    protocol = ""
    for match in matches:
        no = "! " if getattr(match, "negated", False) else ""
        match match:
            case InRanges(side, _, ranges, _):
                options += [_range(side, version, span, no, used) for span in ranges]
            case InSet(side, name, _, _):
                kernel = set_name(name, slots.get(name, ""))
                options.append((_MATCH, f"-m set {no}--match-set {kernel} {_SHORT[side]}"))
            case Interface(way, name, _):
                options.append((2 if way == "in" else 3, f"{no}-{way[0]} {name}"))
            case ProtocolIs(number, _):
                protocol = protocol or f"{no}-p {number}"
            case PortIn(side, name, (low, high), _):
                protocol = f"-p {name}"
                span = str(low) if low == high else f"{low}:{high}"
                options.append((_MATCH, f"-m {name} {no}--{side[0]}port {span}"))
            case TypeIn(_, types):
                name, module, option = ICMP[version]
                protocol = f"-p {name}"
                options.append((_MATCH, f"-m {module} {option} {types[0]}"))
            case StateIn() | Rewritten():
                options.append((_MATCH, f"-m conntrack {no}{_conntrack(match)}"))
            case Limit(rate, per, burst):
                options.append((_MATCH, f"-m limit --limit {rate}/{per} --limit-burst {burst}"))
            case OverLimit():
                options.append((_MATCH, _over(match)))
            case ForHost():
                options.append((_MATCH, "-m addrtype --dst-type LOCAL"))
            case Unknown(text):
                options.append((_REST, text))
            case Family():
                pass
            case Foreign():
                raise ValueError(f"cannot render {match}")
    return [*options, (_PROTOCOL, protocol)]


def limit_name(limit: OverLimit) -> str:
    """A table of hashlimit: each family has its own of the same name."""
    return limit.kernel_name.rpartition(".v")[0]


def _over(limit: OverLimit) -> str:
    figures = f"--hashlimit-above {limit.rate}/{limit.per} --hashlimit-burst {limit.burst} --hashlimit-mode srcip"
    table = f"--hashlimit-name {limit_name(limit)} --hashlimit-htable-max {MOST_SOURCES} --hashlimit-htable-expire {limit.keep * 1000}"
    return f"-m hashlimit {figures} {table}"


def _conntrack(match: StateIn | Rewritten) -> str:
    if isinstance(match, StateIn):
        return f"--ctstate {','.join(sorted(match.states)).upper()}"
    return f"--ctstate {'DNAT' if match.side == 'destination' else 'SNAT'}"


def _range(side: str, version: int, span: Range, no: str, used: set[str]) -> Option:
    """``-s`` or ``-d`` where it is one prefix and the option is still free, else the iprange match."""
    cut = list(prefixes(version, (span,)))
    if len(cut) == 1 and side not in used:
        used.add(side)
        network, length = cut[0]
        return _SIDE_RANK[side], f"{no}-{side[0]} {prefix_text(version, network, length)}"
    low, high = (address_text(version, end) for end in span)
    return _MATCH, f"-m iprange {no}--{_SHORT[side]}-range {low}-{high}"


class Lines:
    """Collects the lines of one table's restore text, remembering which policy line each stands for."""

    def __init__(self, table: str) -> None:
        self.texts = [f"*{table}"]
        self.origins: dict[int, Position] = {}

    def add(self, text: str, origin: Position | None = None) -> None:
        """Append one line."""
        self.texts.append(text)
        if origin:
            self.origins[len(self.texts)] = origin

    def rules(self, chain: str, rules: Iterable[Rule], version: int, slots: Mapping[str, str]) -> None:
        """Append a chain's rules. The first line of a rule carries its count: ``[packets:bytes]``, read with ``-c``."""
        for rule in rules:
            count = f"[{rule.count[0]}:{rule.count[1]}] " if any(rule.count) else ""
            for spec in specs(rule, version, slots):
                self.add(f"{count}-A {chain_name(chain)} {spec}".rstrip(), rule.origin)
                count = ""

    def text(self) -> str:
        """The whole table."""
        return "\n".join((*self.texts, "COMMIT", ""))


def family_text(ruleset: Ruleset, version: int) -> str:
    """One family as text for ``iptables-restore --noflush``, table after table."""
    found = tables(ruleset, version) or {"filter": NOTHING}
    return "".join(table_text(table, found[table], version) for table in order(found) if table in found)


def table_text(table: str, found: Tables, version: int) -> str:
    """One table of one family."""
    lines = Lines(table)
    for name in found.chains:
        lines.add(f":{chain_name(name)} - [0:0]")
    for name, rules in found.chains.items():
        lines.rules(name, rules, version, {})
    for built_in, rule in reversed(found.jumps):
        for spec in specs(rule, version, {}):
            lines.add(f"-I {built_in} 1 {spec}")
    return lines.text()


def create_words(each: AddressSet, kernel: str) -> tuple[str, ...]:
    """``create`` and its arguments. The hash starts at the size it will need: growing it while filling costs a quarter more."""
    family = "inet" if each.version == 4 else "inet6"
    if each.dynamic:
        size = 65536 if each.size is None else each.size
        kind = ("hash:ip", "family", family, "hashsize", str(_hashsize(min(size, 65536))))
        return ("create", kernel, *kind, "maxelem", str(size), "timeout", str(each.timeout))
    buckets = _hashsize(prefix_count(each.version, each.ranges))
    return ("create", kernel, "hash:net", "family", family, "hashsize", str(buckets), "maxelem", str(MAXELEM))


def _hashsize(entries: int) -> int:
    """A power of two with one to two elements a bucket, which holds up to 12 (net/netfilter/ipset/ip_set_hash_gen.h)."""
    return max(64, 1 << max(entries // 2 - 1, 0).bit_length())


def networks(each: AddressSet) -> Iterator[str]:
    """Elements as text. hash:net holds no /0 (ipset(8)); two /1 are the same."""
    for span in each.ranges:
        halves = ((0, LAST[each.version] // 2), (LAST[each.version] // 2 + 1, LAST[each.version]))
        for part in halves if span == (0, LAST[each.version]) else (span,):
            yield from (prefix_text(each.version, n, length) for n, length in prefixes(each.version, (part,)))


def member_lines(each: AddressSet, kernel: str) -> Iterator[str]:
    """``add`` lines that give members back the time they had left, which is held in milliseconds; as many as fit."""
    for address, left in each.members[: each.size]:
        seconds = 0 if left is None else max(1, -(-left // 1000))
        yield f"add {kernel} {prefix_text(each.version, address, BITS[each.version])} timeout {seconds}"


def sets_text(ruleset: Ruleset) -> str:
    """All sets with their contents as text for ``ipset restore``."""
    lines: list[str] = []
    for each in sorted(ruleset.sets, key=lambda s: s.name):
        kernel = set_name(each.name)
        lines.append(" ".join(create_words(each, kernel)))
        lines += [f"add {kernel} {text}" for text in networks(each)]
    return "\n".join((*lines, ""))


def refuse(ruleset: Ruleset) -> list[Finding]:
    """What iptables or ipset cannot hold exactly as it was meant, each with its policy line."""
    names = [Finding("name", text, each.origin) for each in ruleset.sets for text in _set_faults(each)]
    chains = [Finding(code, text, _origin(chain)) for chain in ruleset.chains for code, text in _chain_faults(chain)]
    rules = [Finding("value", text, rule.origin) for chain in ruleset.chains for rule in chain.rules for text in _rule_faults(rule)]
    places = [
        Finding("value", text, rule.origin)
        for table, placed in placement(ruleset).items()
        for chain in placed
        for rule in chain.rules
        for text in _place_faults(table, rule)
    ]
    ends = [
        Finding("value", f"iptables cannot drop what `{chain.name}` lets return from `{base.name}`", _origin(chain))
        for base, chain in open_ends(ruleset)
    ]
    return list(dict.fromkeys((*names, *chains, *rules, *places, *ends)))


def _origin(chain: Chain) -> Position | None:
    return next((rule.origin for rule in chain.rules if rule.origin), None)


def _place_faults(table: str, rule: Rule) -> Iterator[str]:
    """What a rule does that its table does not let it do (iptables-extensions(8))."""
    if table == "nat" and rule.verdict is Final.DROP:
        yield "iptables cannot drop in table nat, which sees the first packet of a connection only"
    if table != "filter" and rule.verdict is Final.REJECT:
        yield f"iptables cannot reject in table {table}"
    if table != "nat" and isinstance(rule.verdict, Translate):
        yield f"iptables rewrites addresses and ports in table nat only, not in {table}"
    if table != "mangle" and isinstance(rule.verdict, SetDscp):
        yield f"iptables marks packets in table mangle only, not in {table}"
    if table != "raw" and isinstance(rule.verdict, Untrack):
        yield f"iptables takes packets out of connection tracking in table raw only, not in {table}"


def _set_faults(each: AddressSet) -> Iterator[str]:
    match = _SET_NAME.fullmatch(each.name)
    if not match or int(match[3]) != each.version:
        yield f"ipset cannot hold `{each.name}`: a set is called NAME.v4, NAME.v6 or NAME.dynamic.v4"
    elif len(set_name(each.name, "b")) > SET_MAX:
        yield f"ipset names have at most {SET_MAX} characters, and `{set_name(each.name, 'b')}` has more"
    if each.timeout is not None and not 0 <= each.timeout <= _TIMEOUT_MAX:
        yield f"ipset cannot hold a timeout of {each.timeout} seconds: at most {_TIMEOUT_MAX}"
    if each.size is not None and not 1 <= each.size < 1 << 32:
        yield f"ipset cannot hold {each.size} members"


def _chain_faults(chain: Chain) -> Iterator[tuple[str, str]]:
    hook = chain.hook
    if hook and table_of(hook) is None:
        where = f"hook {hook.name} with priority {hook.priority}" + (f" and type {hook.kind}" if hook.kind != "filter" else "")
        yield "value", f"iptables has no chain at {where}"
        return
    if is_built_in(chain):
        return
    table, name = split(chain.name)
    if name in BUILT_IN[table].values():
        yield "name", f"`{chain.name}` is the name of a built-in chain"
    elif not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) or name.startswith(("s.", "e.", CHAIN_PREFIX)):
        yield "name", f"`{chain.name}` cannot be the name of an iptables chain"
    elif len(chain_name(name)) > CHAIN_MAX:
        yield "name", f"chain names have at most {CHAIN_MAX} characters, and `{chain_name(name)}` has more"
    if hook and hook.kind == "nat" and hook.policy == "drop":
        yield "value", "iptables cannot drop in table nat, which sees the first packet of a connection only"


def _rule_faults(rule: Rule) -> Iterator[str]:
    for match in rule.matches:
        yield from _match_faults(match)
    if isinstance(rule.verdict, Undecided) or (isinstance(rule.verdict, Translate) and not is_ours(rule.verdict)):
        yield f"iptables cannot express {rule.verdict}"
    if len(rule.log_prefix) > 29:
        yield f"a log prefix has at most 29 characters, `{rule.log_prefix}` has more"
    if not (rule.log_prefix + rule.service).isprintable() or len(rule.service) > 255:
        yield "a log prefix or comment holds characters that iptables cannot take"
    required = _protocols(rule)
    if len(required) > 1:
        yield f"iptables matches one protocol a rule, not {' and '.join(sorted(required))}"
    elif any(isinstance(m, PortIn) and m.negated for m in rule.matches) and not any(isinstance(m, ProtocolIs) for m in rule.matches):
        yield "iptables matches a negated port only together with its protocol"
    ways = [m.way for m in rule.matches if isinstance(m, Interface)]
    if len(ways) > len(set(ways)):
        yield "iptables matches one interface a direction in a rule"
    copies = len(list(product(*(_choices(m) for m in rule.matches)))) + bool(rule.log_prefix and rule.verdict is not None)
    if copies > 1 and any(isinstance(m, Limit) for m in rule.matches):
        yield "a limit counts for one iptables rule, and this one becomes several: split it"


def _protocols(rule: Rule) -> set[str]:
    """What the rule's matches ask of the protocol; a rule with more than one answer cannot be written."""
    found: set[str] = set()
    for match in rule.matches:
        match match:
            case ProtocolIs(number, negated):
                found.add(f"{'not ' if negated else ''}{number}")
            case PortIn(_, name, _, _):
                found.add(str(PROTOCOL_NUMBER.get(name, name)))
            case TypeIn(version, _):
                found.add("1" if version == 4 else "58")
            case _:
                pass
    return found


def _match_faults(match: Match) -> Iterator[str]:
    match match:
        case InSet(_, name, version, _):
            if not name.endswith(f".v{version}") or not is_set_name(name):
                yield f"ipset cannot hold a set called `{name}`"
        case Interface(_, name, _):
            # IFNAMSIZ is 16 with its NUL; a `+` at the end is iptables' wildcard, which the neutral rule does not mean.
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:@+-]{0,14}", name) or name.endswith("+"):
                yield f"iptables cannot match an interface called `{name}`"
        case InRanges(_, version, ranges, negated):
            if any(not 0 <= low <= high <= LAST[version] for low, high in ranges):
                yield "an address range is outside its family"
            if negated and ranges == ((0, LAST[version]),):
                yield "iptables cannot ask for an address outside of all addresses"
        case StateIn(states, _):
            if not states:
                yield "iptables cannot match an empty list of states"
        case OverLimit(_, name, rate, _, burst):
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) or not 0 < rate <= 10_000 or not 0 < burst <= 10_000:
                yield f"iptables cannot count a limit of {rate}, {burst} at once, as `{name}`"
        case ForHost() | Rewritten():
            pass
        case Unknown(text):
            yield f"iptables cannot express {text}"
        case Foreign():
            yield f"iptables cannot express {match}"
        case _:
            yield from _number_faults(match)


def _number_faults(match: ProtocolIs | PortIn | TypeIn | Limit | Family) -> Iterator[str]:
    match match:
        case ProtocolIs(number, _):
            if not 0 < number < 256:
                yield f"iptables cannot match protocol {number} (0 would mean every protocol)"
            elif number in _EXTENSION_HEADERS:
                yield f"ip6tables never sees protocol {number}: it is an IPv6 extension header"
        case PortIn(_, protocol, (low, high), _):
            if protocol not in PROTOCOL_NUMBER or not 0 <= low <= high <= 65535:
                yield f"iptables cannot match ports {low}-{high} of {protocol}"
        case TypeIn(_, types):
            yield from (
                f"iptables cannot match ICMP type {number} (255 would mean every type)" for number in types if not 0 <= number < 255
            )
        case Limit():
            yield from _limit_faults(match)
        case Family():
            pass


def _limit_faults(limit: Limit) -> Iterator[str]:
    """The kernel keeps a rate as an interval in units of 0.1 ms (net/netfilter/xt_limit.c, XT_LIMIT_SCALE)."""
    length = 10_000 * _SECONDS[limit.per]
    interval = length // limit.rate if limit.rate > 0 else 0
    if not interval or abs(length / interval - limit.rate) > limit.rate / 100:
        yield f"iptables cannot hold a limit of {limit.rate}/{limit.per} to within one per cent"
    elif not 1 <= limit.burst <= 10_000 or interval * limit.burst >= 1 << 32:
        yield f"iptables cannot hold a limit of {limit.rate}/{limit.per} with a burst of {limit.burst}"
