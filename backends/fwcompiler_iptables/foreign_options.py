"""Cuts the arguments of an iptables rule into options by what they belong to: the packet, a match module, the target.

Old and hand-written forms are understood: ``-s ! ADDR``, long options, a protocol's options without ``-m``, options of a
match behind the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Option = tuple[bool, str, tuple[str, ...]]
"""negated, name, values"""

PLAIN = {
    **{"--source": "-s", "--src": "-s", "-s": "-s", "--destination": "-d", "--dst": "-d", "-d": "-d"},
    **{"--protocol": "-p", "--proto": "-p", "-p": "-p", "--in-interface": "-i", "-i": "-i", "--out-interface": "-o", "-o": "-o"},
    **{"--fragment": "-f", "-f": "-f", "--match": "-m", "-m": "-m", "--jump": "-j", "-j": "-j", "--goto": "-g", "-g": "-g"},
    **{"--set-counters": "-c", "-c": "-c", "-4": "-4", "--ipv4": "-4", "-6": "-6", "--ipv6": "-6"},
}
_ARGUMENTS = {"-s": 1, "-d": 1, "-p": 1, "-i": 1, "-o": 1, "-f": 0, "-m": 1, "-j": 1, "-g": 1, "-c": 2, "-4": 0, "-6": 0}
_TEXTS = ("--comment", "--log-prefix", "--nflog-prefix", "--ulog-prefix", "--string", "--hex-string", "--name", "--u32", "--helper")
"""Options whose one argument may look like an option."""
PROTOCOL_OPTIONS = (
    *("--dport", "--sport", "--destination-port", "--source-port", "--tcp-flags", "--syn", "--tcp-option"),
    *("--icmp-type", "--icmpv6-type", "--chunk-types", "--dccp-types", "--dccp-option"),
)
_PROTOCOL_MODULES = ("tcp", "udp", "sctp", "dccp", "udplite", "icmp", "icmp6", "icmpv6", "multiport", "mp")
_MODULE_OF = {"--state": "state", "--ctstate": "conntrack", "--dports": "multiport", "--sports": "multiport", "--ports": "multiport"}


class Unreadable(Exception):
    """A rule whose arguments do not fit together."""


@dataclass
class Group:
    """A match module or a target, with its options in order."""

    name: str
    options: list[Option] = field(default_factory=list)

    def text(self) -> str:
        """The whole group in a canonical form: the name, then each option."""
        return " ".join([self.name, *(f"{'! ' if no else ''}{name} {' '.join(values)}".rstrip() for no, name, values in self.options)])


@dataclass
class Spec:
    """A rule's arguments, sorted by what they belong to."""

    plain: list[Option] = field(default_factory=list)
    modules: list[Group] = field(default_factory=list)
    target: Group | None = None
    goto: bool = False

    @property
    def protocol(self) -> str:
        """The word behind ``-p``, or the empty string."""
        return next((values[0].lower() for no, name, values in self.plain if name == "-p" and not no), "")


def read_spec(tokens: Sequence[str]) -> Spec:
    """Sort a rule's arguments.

    Raises:
        Unreadable: an option lacks its argument, or a word stands where none belongs.
    """
    spec, group, place = Spec(), None, 0
    while place < len(tokens):
        negated = tokens[place] == "!"
        place += negated
        if place >= len(tokens) or not tokens[place].startswith("-"):
            raise Unreadable(f"`{tokens[min(place, len(tokens) - 1)]}` is no option")
        option = tokens[place]
        if "=" in option and option.startswith("--"):
            option, _, value = option.partition("=")
            values, place = [value], place + 1
        else:
            values, place = _values(tokens, place)
        if values[:1] == ["!"] and len(values) > 1:
            negated, values = not negated, values[1:]
        name = PLAIN.get(option, "")
        group = _add_plain(spec, name, negated, values, group) if name else _add(spec, group, (negated, option, tuple(values)))
    return spec


def _values(tokens: Sequence[str], place: int) -> tuple[list[str], int]:
    """An option's values, and where the next option begins."""
    option = tokens[place]
    place += 1
    count = _ARGUMENTS.get(PLAIN.get(option, ""))
    if option in _TEXTS:
        no = option != "--comment" and place < len(tokens) and tokens[place] == "!"
        return list(tokens[place : place + 1 + no]), place + 1 + no
    if count is not None:
        count += count > 0 and tokens[place : place + 1] == ["!"]
        if place + count > len(tokens):
            raise Unreadable(f"`{option}` lacks its argument")
        return list(tokens[place : place + count]), place + count
    end = place
    while end < len(tokens) and not _begins(tokens, end):
        end += 1
    return list(tokens[place:end]), end


def _begins(tokens: Sequence[str], place: int) -> bool:
    """True where an option begins; a negative number is a value, and so is a `!` in front of a value."""
    token = tokens[place]
    if token == "!":
        return place + 1 < len(tokens) and tokens[place + 1].startswith("-")
    return token.startswith("-") and not token[1:2].isdigit() and token != "-"


def _add_plain(spec: Spec, name: str, negated: bool, values: list[str], group: Group | None) -> Group | None:
    if name == "-m":
        spec.modules.append(Group(values[0]))
        return spec.modules[-1]
    if name in ("-j", "-g"):
        spec.target, spec.goto = Group(values[0]), name == "-g"
        return spec.target
    if name not in ("-c", "-4", "-6"):
        spec.plain.append((negated, name, tuple(values)))
    return group


def _add(spec: Spec, group: Group | None, option: Option) -> Group:
    """Give an option to the group it stands in, or to the module that it must mean."""
    name = option[1]
    wanted = spec.protocol if name in PROTOCOL_OPTIONS else _MODULE_OF.get(name, "")
    if name in PROTOCOL_OPTIONS and group is not None and group.name in _PROTOCOL_MODULES:
        wanted = ""
    if group is None or (wanted and group.name != wanted):
        if not wanted:
            raise Unreadable(f"`{name}` belongs to nothing")
        group = Group(wanted)
        spec.modules.append(group)
    group.options.append(option)
    return group
