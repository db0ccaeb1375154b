"""Ports that rules of others hand on to another address, found in any listing that the readers of foreign rules understand."""

from __future__ import annotations

from collections.abc import Iterator

from fwcompiler.addresses import LOOPBACK, Range, Ranges, address_text, subtract
from fwcompiler.audit.facts import Published
from fwcompiler.ports import FIRST, LAST
from fwcompiler.ruleset import Chain, Goto, InRanges, Jump, Match, PortIn, PortsIn, ProtocolIn, ProtocolIs, Ruleset, Translate

_NAMES = {6: "tcp", 17: "udp"}
_EVERY: Range = (FIRST, LAST)
MAX_DEPTH = 16


def published(ruleset: Ruleset, own: dict[int, Ranges], source: str) -> Iterator[Published]:
    """Destination NAT of new connections to addresses that are not the host's own (`own`, by family)."""
    chains = {c.name: c for c in ruleset.chains}
    for chain in ruleset.chains:
        if chain.hook is not None and chain.hook.kind == "nat" and chain.hook.name == "prerouting":
            yield from _walk(chain, chains, (), own, source, 0)


def _walk(
    chain: Chain, chains: dict[str, Chain], before: tuple[Match, ...], own: dict[int, Ranges], source: str, depth: int
) -> Iterator[Published]:
    if depth > MAX_DEPTH:
        return
    for rule in chain.rules:
        matches = (*before, *rule.matches)
        if isinstance(rule.verdict, Jump | Goto) and rule.verdict.chain in chains:
            yield from _walk(chains[rule.verdict.chain], chains, matches, own, source, depth + 1)
        elif isinstance(rule.verdict, Translate) and rule.verdict.side == "destination" and not rule.verdict.here:
            yield from _handed_on(rule.verdict, matches, own, f"{source} {chain.name.rpartition(':')[2]}")


def _handed_on(to: Translate, matches: tuple[Match, ...], own: dict[int, Ranges], by: str) -> Iterator[Published]:
    elsewhere = [(v, r) for v in (4, 6) if to.version in (v, None) for r in subtract(_of(to, v), own.get(v, ()))]
    if not elsewhere or any(_loopback_only(m) for m in matches):
        return
    version, (low, _) = elsewhere[0]
    text = address_text(version, low) + (f":{to.ports[0]}" if to.ports else "")
    for protocol, span in _ports(matches):
        yield Published(protocol, span, text, by)


def _of(to: Translate, version: int) -> Ranges:
    return to.ranges if to.version == version or (to.version is None and version == 4) else ()


def _loopback_only(match: Match) -> bool:
    """Published on 127.0.0.1: nobody outside reaches it."""
    if not isinstance(match, InRanges) or match.side != "destination" or match.negated:
        return False
    low, high = LOOPBACK[match.version]
    return all(low <= a and b <= high for a, b in match.ranges)


def _ports(matches: tuple[Match, ...]) -> Iterator[tuple[str, Range]]:
    protocols: list[str] = []
    spans: list[Range] = []
    for match in matches:
        if isinstance(match, PortIn) and match.side == "destination" and not match.negated:
            protocols, spans = [match.protocol], [match.span]
        elif isinstance(match, PortsIn) and match.side == "destination" and not match.negated:
            protocols, spans = [_NAMES[n] for n in match.protocols if n in _NAMES], list(match.spans)
        elif isinstance(match, ProtocolIs) and not match.negated and match.number in _NAMES:
            protocols = protocols or [_NAMES[match.number]]
        elif isinstance(match, ProtocolIn) and not match.negated:
            protocols = protocols or [name for n, name in _NAMES.items() if any(a <= n <= b for a, b in match.spans)]
    for protocol in protocols or ["tcp", "udp"]:
        for span in spans or [_EVERY]:
            yield protocol, span
