"""What a service may say beyond who reaches it: limits by source, media past connection tracking, DSCP marks, a redirect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fwcompiler.diagnostics import Position, Report, did_you_mean
from fwcompiler.ports import WITH_PORTS, Ports
from fwcompiler.ruleset import Period

if TYPE_CHECKING:
    # The resolved options are read where no policy is, as at boot.
    from fwcompiler.policy import ServiceEntry
    from fwcompiler.source import Document, KeyPath

ANYWHERE = "anywhere"
NEVER_LIMITED = re.compile(r"carrier|peer|trunk|cluster", re.I)
"""Names of groups whose calls a limit would cut: those in front of and beside a dialer send for hundreds of callers."""
MOST = 10_000
"""Packets in a period and at once that both kernels' limits hold (net/netfilter/nft_limit.c, xt_hashlimit.c)."""
DSCP = {
    **{f"cs{i}": i * 8 for i in range(8)},
    **{f"af{i}{j}": i * 8 + j * 2 for i in range(1, 5) for j in range(1, 4)},
    **{"ef": 46, "va": 44, "le": 1},
}
"""RFC 2474, RFC 2597, RFC 3246, RFC 5865, RFC 8622."""
_PERIODS: dict[str, Period] = {"s": "second", "m": "minute", "h": "hour"}
_RATE = re.compile(r"([0-9]+)/([smh])[a-z]*(?: burst ([0-9]+))?")


@dataclass(frozen=True, slots=True)
class ResolvedLimit:
    """What each source of one group may send to a service: packets, or with TCP new connections.

    The group `anywhere` stands for all sources that no service names.
    """

    group: str
    rate: int
    per: Period
    burst: int
    at: Position

    def __str__(self) -> str:
        return f"{self.rate} a {self.per}, {self.burst} at once"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one service.

    `bypass`: its packets are not tracked. `dscp`: what this host sends from its ports is marked so. `responder`: the port
    of this host that new connections are redirected to, but those of the groups in `plain`.
    """

    limits: tuple[ResolvedLimit, ...] = ()
    bypass: bool = False
    dscp: int | None = None
    responder: int | None = None
    plain: tuple[str, ...] = ()

    def limit(self, group: str) -> ResolvedLimit | None:
        """The limit of a group's sources."""
        return next((each for each in self.limits if each.group == group), None)


NO_OPTIONS = Options()


class OptionsReader:
    """Reads the options of every service of a policy. `spared`: groups that no limit may touch, each with the reason."""

    def __init__(self, document: Document, report: Report, spared: Mapping[str, str]) -> None:
        self._document, self._report, self._spared = document, report, spared

    def read(self, name: str, entry: ServiceEntry, ports: Sequence[Ports], groups: Sequence[str] | None) -> Options:
        """The options of one service; what is wrong with them is reported."""
        path: KeyPath = ("services", name)
        limits = tuple(self._limits(entry.limit or {}, (*path, "limit"), ports, groups))
        return Options(limits, self._bypass(entry, path, ports), self._dscp(entry, path, ports))

    def _limits(
        self, entries: Mapping[str, str], path: KeyPath, ports: Sequence[Ports], groups: Sequence[str] | None
    ) -> Iterator[ResolvedLimit]:
        if entries and _one_protocol(ports) is None:
            at = self._document.locate(path, key=True)
            hint = "with UDP a limit counts packets, with TCP new connections: make two services of it"
            self._report.error("limit", "a limit belongs to a service whose ports are all of one protocol, tcp or udp", at, hint)
            return
        for group, text in entries.items():
            at = self._document.locate((*path, group), key=True)
            if self._may_be_limited(group, groups, at):
                rate, per, burst = _figures(text)
                fault = _rate_fault(rate, per, burst)
                if fault:
                    self._report.error("limit", f"`{text}` {fault}", self._document.locate((*path, group)))
                yield ResolvedLimit(group, rate, per, burst, at)

    def _may_be_limited(self, group: str, groups: Sequence[str] | None, at: Position) -> bool:
        known = [ANYWHERE] if groups is None else list(groups)
        reason = self._spared.get(group) or (f"its name says so: {_LIKE}" if NEVER_LIMITED.search(group) else "")
        if group not in known:
            hint = did_you_mean(group, known) or f"limits are for {', '.join(known)} here"
            self._report.error("limit", f"this service is not open to `{group}`", at, hint)
        elif reason:
            hint = "carriers, peers and the cluster send for many callers; limit the groups of single phones"
            self._report.error("limit", f"`{group}` is never limited: {reason}", at, hint)
        return group in known and not reason

    def _bypass(self, entry: ServiceEntry, path: KeyPath, ports: Sequence[Ports]) -> bool:
        """Media only: what a host answers to others' packets needs tracking, and so does all that an edge rewrites."""
        if entry.conntrack == "bypass" and (path[-1] != "rtp" or _one_protocol(ports) != "udp"):
            at = self._document.locate((*path, "conntrack"))
            hint = "other services need their connections tracked"
            self._report.error("value", "`conntrack: bypass` belongs to the UDP service `rtp` only", at, hint)
        return entry.conntrack == "bypass"

    def _dscp(self, entry: ServiceEntry, path: KeyPath, ports: Sequence[Ports]) -> int | None:
        if entry.dscp is None:
            return None
        at = self._document.locate((*path, "dscp"))
        value = entry.dscp if isinstance(entry.dscp, int) else DSCP.get(entry.dscp.lower())
        if value is None:
            hint = did_you_mean(str(entry.dscp).lower(), DSCP) or "ef for audio, cs3 for signalling (RFC 4594), or a number from 0 to 63"
            self._report.error("value", f"`{entry.dscp}` is no DSCP class", at, hint)
        if not all(p.ranges for p in ports):
            self._report.error("value", "a mark needs ports to tell the service's packets by", at)
        return value


def refuse_bypass(forwarded: Iterable[Options], document: Document, report: Report) -> None:
    """An edge rewrites the media it forwards, and only what is tracked can be rewritten."""
    if any(each.bypass for each in forwarded):
        at = document.locate(("services", "rtp", "conntrack"))
        report.error("value", "media that an edge forwards cannot go past its connection tracking", at, "conntrack: track")


_LIKE = "carrier, peer, trunk and cluster are names of those who send for many"


def _figures(text: str) -> tuple[int, Period, int]:
    """`50/s burst 200`; without a burst, as many at once as in one period. The form was checked by the model."""
    match = _RATE.fullmatch(text)
    assert match, text
    return int(match[1]), _PERIODS[match[2]], int(match[3] or match[1])


def _rate_fault(rate: int, per: Period, burst: int) -> str:
    if not rate or not burst:
        return "lets nothing through"
    if rate > MOST or burst > MOST:
        return f"is beyond what a kernel counts: at most {MOST} in a period and {MOST} at once"
    if per == "second" and rate > 1000 and 1_000_000 % rate:
        # hashlimit keeps the time between two packets in microseconds.
        return "cannot be held exactly: beyond 1000 a second, write a divisor of 1,000,000"
    return ""


def _one_protocol(ports: Sequence[Ports]) -> str | None:
    names = {p.protocol for p in ports}
    return names.pop() if len(names) == 1 and names <= set(WITH_PORTS) else None
