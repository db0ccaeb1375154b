"""The neutral ruleset: what `lower` makes of a policy, and what every backend reads back from a kernel.

Wanted and actual are this one type. Values are immutable and the unions are closed, so a backend that matches
over them is checked by mypy for completeness. A rule is family-explicit: an address match names its family, so
a rule that is missing for IPv6 in a kernel is visible as missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from fwcompiler.addresses import Range, Ranges
from fwcompiler.diagnostics import Position

Side = Literal["source", "destination"]
HookName = Literal["prerouting", "input", "forward", "output", "postrouting"]
HookKind = Literal["filter", "nat", "route"]
State = Literal["new", "established", "related", "invalid", "untracked"]
Period = Literal["second", "minute", "hour", "day"]
SECONDS: dict[Period, int] = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
BUILT_IN = frozenset(("block", "trust", "established", "invalid", "icmp", "loopback", "other", "egress"))
"""Labels of rules that stand for no service of the policy; they are counted all the same."""
STATES: tuple[State, ...] = ("new", "established", "related", "invalid", "untracked")


@dataclass(frozen=True, slots=True)
class InSet:
    """The address lies in a named set; the set has one family, and so has the match."""

    side: Side
    set: str
    version: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class InRanges:
    """The address lies in one of the ranges, written into the rule itself."""

    side: Side
    version: int
    ranges: Ranges
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """The packet is IPv4 or IPv6."""

    version: int


@dataclass(frozen=True, slots=True)
class Interface:
    """Input (or output) interface by name."""

    way: Literal["in", "out"]
    name: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class ProtocolIs:
    """Layer 4 protocol by number (IANA)."""

    number: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class PortIn:
    """The protocol is `tcp` or `udp` and its port lies in the range."""

    side: Side
    protocol: str
    span: Range
    negated: bool = False


@dataclass(frozen=True, slots=True)
class StateIn:
    """Connection tracking state is one of these."""

    states: frozenset[State]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class TypeIn:
    """ICMP (version 4) or ICMPv6 (version 6) type is one of these numbers, ascending."""

    version: int
    types: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `rate` packets per `per` on average, `burst` at once; stateful, shared by all sources."""

    rate: int
    per: Period
    burst: int


@dataclass(frozen=True, slots=True)
class OverLimit:
    """The source has sent more than `rate` packets per `per` (after `burst` at once): counted source by source, under a name.

    The count is part of the rule: its name holds the figures, because kernels keep an old count's figures as long as
    anything uses its name.
    """

    version: int
    name: str
    rate: int
    per: Period
    burst: int

    @property
    def kernel_name(self) -> str:
        """`sip.agents.50-second-200.v4`: where the kernel counts."""
        return f"{self.name}.{self.rate}-{self.per}-{self.burst}.v{self.version}"

    @property
    def keep(self) -> int:
        """Seconds that a source is remembered after its last packet: until its whole burst would be back."""
        return max(60, -(-self.burst * SECONDS[self.per] // self.rate))


MOST_SOURCES = 65536
"""Sources that one limit counts at once (kernels' tables are sized so); see `docs/design.md` for what happens beyond."""


@dataclass(frozen=True, slots=True)
class ForHost:
    """The destination is an address of this host, by its routing table; not multicast or broadcast."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """This side of the connection's first packet was rewritten: `ct status dnat` for the destination, `snat` for the source."""

    side: Side
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Unknown:
    """A match or statement that a reader met and does not model. Never equal to anything fwc writes."""

    text: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """A match that only rulesets of others hold: fwc reads it, compares it, and never writes it."""


@dataclass(frozen=True, slots=True)
class ProtocolIn(Foreign):
    """Layer 4 protocol by number lies in the ranges."""

    spans: Ranges
    negated: bool = False


@dataclass(frozen=True, slots=True)
class PortsIn(Foreign):
    """The protocol is one of these (by number), and its port lies in the ranges (outside where negated)."""

    side: Side
    protocols: tuple[int, ...]
    spans: Ranges
    negated: bool = False


@dataclass(frozen=True, slots=True)
class InterfaceIn(Foreign):
    """Input (or output) interface is one of these; a name that ends with ``*`` stands for all that begin so."""

    way: Literal["in", "out"]
    names: tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Opaque(Foreign):
    """A test that is known by name, but that no field of a packet here shows.

    A pure function of packet, host or clock has the same value wherever the same canonical `text` stands. One that is
    `stateful` (a limit, a counter, a mark that rules change) has a value of its own in every rule.
    """

    text: str
    negated: bool = False
    stateful: bool = False


@dataclass(frozen=True, slots=True)
class AnyOf(Foreign):
    """At least one of the alternatives holds, each all of its matches (where negated: none does)."""

    alternatives: tuple[tuple[Match, ...], ...]
    negated: bool = False


Match = (
    InSet
    | InRanges
    | Family
    | Interface
    | ProtocolIs
    | PortIn
    | StateIn
    | TypeIn
    | Limit
    | OverLimit
    | ForHost
    | Rewritten
    | Unknown
    | Foreign
)


class Final(Enum):
    """Verdicts that end a packet's way through a chain. A rejected packet is answered: administratively prohibited."""

    ACCEPT = "accept"
    DROP = "drop"
    REJECT = "reject"
    RETURN = "return"


@dataclass(frozen=True, slots=True)
class Goto:
    """Continue in another chain and do not come back."""

    chain: str


@dataclass(frozen=True, slots=True)
class Jump:
    """Continue in another chain; at its end, go on here."""

    chain: str


@dataclass(frozen=True, slots=True)
class Translate:
    """Rewrites an address or port and accepts: what runs later sees the packet so.

    `ranges`: the new address is one of these (empty: it stays, or with `here` it becomes one of this host's).
    `ports`: the new port is one of these; None: it stays.
    """

    side: Side
    text: str
    version: int | None = None
    ranges: Ranges = ()
    here: bool = False
    ports: Range | None = None


def sent_on(address: int) -> Translate:
    """The packet goes on to another IPv4 address, its port kept (a range of ports would send all of them to its first)."""
    return Translate("destination", "sent on", 4, ((address, address),))


def masqueraded(ports: Range | None = None) -> Translate:
    """The packet leaves under the IPv4 address of its output interface: from its own port where that is free, or from one of `ports`."""
    return Translate("source", "masqueraded", 4, (), True, ports)


def redirected(port: int) -> Translate:
    """The packet goes to another port of this host, in either family."""
    return Translate("destination", "redirected", None, (), True, (port, port))


def is_ours(translation: Translate) -> bool:
    """True for the forms that fwc writes: `sent_on`, `masqueraded` and `redirected`."""
    ranges, ports = translation.ranges, translation.ports
    if len(ranges) == 1:
        return translation == sent_on(ranges[0][0])
    return translation == masqueraded(ports) or (ports is not None and translation == redirected(ports[0]))


@dataclass(frozen=True, slots=True)
class Untrack:
    """Connection tracking will leave the packet alone, whose state becomes `untracked`; on with the next rule."""


@dataclass(frozen=True, slots=True)
class SetDscp:
    """Writes the packet's DSCP, 0 to 63 (RFC 2474); on with the next rule. The rule's matches fix the family."""

    value: int


@dataclass(frozen=True, slots=True)
class Undecided:
    """A named program or part of the kernel accepts or drops the packet; the rules do not say which."""

    text: str


Verdict = Final | Goto | Jump | Translate | Untrack | SetDscp | Undecided | None
"""None: the rule only counts or logs, the packet goes on to the next rule. `Undecided` stands in rulesets of others only, and
so does `Translate` in any other form than `is_ours` knows."""


@dataclass(frozen=True, slots=True)
class Rule:
    """All matches hold: log if asked, count, then the verdict.

    A rule with a `service` is counted under `service.verdict` ("sip.accept"). `origin` is the policy line the
    rule stands for; it takes no part in equality, so an edit that only moves lines changes nothing.
    """

    matches: tuple[Match, ...] = ()
    verdict: Verdict = None
    service: str = ""
    log_prefix: str = ""
    origin: Position | None = field(default=None, compare=False)
    count: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def counter(self) -> str:
        """Name of the rule's counter, or the empty string."""
        return f"{self.service}.{self.verdict.value}" if self.service and isinstance(self.verdict, Final) else ""

    @property
    def version(self) -> int | None:
        """4 or 6 where a match fixes the family, None where the rule is for both."""
        for match in self.matches:
            if isinstance(match, InSet | InRanges | Family | TypeIn | OverLimit):
                return match.version
        return None


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a base chain hangs in the packet path. `priority` as in nftables; 0 is `filter`.

    A chain of `kind` nat sees the first packet of a connection only. `version`: packets of one family only.
    """

    name: HookName
    priority: int = 0
    policy: Literal["accept", "drop"] = "drop"
    kind: HookKind = "filter"
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """A list of rules; with a `hook`, packets enter it from the kernel."""

    name: str
    rules: tuple[Rule, ...]
    hook: Hook | None = None


@dataclass(frozen=True, slots=True)
class AddressSet:
    """A named set of addresses of one family.

    A static set holds `ranges`. A dynamic set (`timeout` in seconds, `size` members at most) holds single
    addresses that come and go at run time; its content belongs to the host, not to the policy: `members` are
    those a reader found, each with its remaining milliseconds (None: for good).
    `slot` tells twins apart while a set is replaced ("" or "b"); it is the kernel's business only.
    """

    name: str
    version: int
    ranges: Ranges = ()
    timeout: int | None = None
    size: int | None = None
    members: tuple[tuple[int, int | None], ...] = field(default=(), compare=False)
    slot: str = field(default="", compare=False)
    kernel: str = field(default="", compare=False)
    origin: Position | None = field(default=None, compare=False)

    @property
    def dynamic(self) -> bool:
        """True for sets whose members come and go at run time."""
        return self.timeout is not None

    @property
    def kernel_name(self) -> str:
        """The name that the set has in the kernel at present; a reader may have found it under another one."""
        return self.kernel or (f"{self.name}.{self.slot}" if self.slot else self.name)


AHEAD = "ahead of ours: "
"""How an entry of `Ruleset.others` begins that is about rules of others in front of our call."""


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Everything fwc owns on one host: chains in order of definition, sets by name.

    `others` names what a reader found among ours that fwc never writes ("map ports"); an apply takes it out. Where rules of
    somebody else stand before the call that leads to ours, it says so (`AHEAD`); an apply puts our call first again.
    """

    chains: tuple[Chain, ...] = ()
    sets: tuple[AddressSet, ...] = ()
    others: tuple[str, ...] = ()

    def chain(self, name: str) -> Chain:
        """The chain of that name.

        Raises:
            KeyError: there is none.
        """
        for chain in self.chains:
            if chain.name == name:
                return chain
        raise KeyError(name)

    def contents(self) -> dict[str, Ranges]:
        """The contents of its static sets, by name."""
        return {s.name: s.ranges for s in self.sets if not s.dynamic}

    def limits(self) -> dict[str, OverLimit]:
        """The limits by source that its rules ask, by the names under which the kernel counts."""
        matches = (m for c in self.chains for r in c.rules for m in r.matches)
        return {m.kernel_name: m for m in matches if isinstance(m, OverLimit)}

    def counters(self) -> tuple[str, ...]:
        """Names of all counters its rules use, sorted."""
        return tuple(sorted({r.counter for c in self.chains for r in c.rules if r.counter}))

    def __bool__(self) -> bool:
        return bool(self.chains or self.sets or self.others)
