"""Keeps people from locking themselves out: whoever is logged in has to be able to log in anew under the wanted rules.

Asked are the policy's meaning and the rules themselves. Members of dynamic groups count as long as they are members.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from fwcompiler.addresses import LOOPBACK, Addresses, Ranges, address_text, covers
from fwcompiler.diagnostics import Finding, HostRefused, Position
from fwcompiler.kernel import session, sockets
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.trace import trace
from fwcompiler.ruleset import Ruleset

if TYPE_CHECKING:
    from fwcompiler.kernel.netns import Namespace
    from fwcompiler.pipeline import Compiled
    from fwcompiler.resolved import Resolved

SSH = "ssh"
STANDARD = ((22, 22),)
MAX_PORTS = 64
"""Ports of the ssh service that are asked about; nobody has more servers."""
MAX_SHOWN = 4
OVERRIDE = "if that is meant, --allow-lockout overrides; a console should be at hand"


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who is logged in: from which address, to which TCP port, since when as far as that is known.

    `guessing`: connected, but certainly not logged in yet, over any of his connections. On the internet these are mostly strangers.
    """

    version: int
    address: int
    port: int
    since: float | None = None
    yours: bool = False
    local: bool = False
    guessing: bool = False

    def __str__(self) -> str:
        return address_text(self.version, self.address)

    def words(self) -> str:
        """`your SSH connection`, `logged in since 14:02`."""
        when = datetime.fromtimestamp(self.since).astimezone().isoformat(sep=" ", timespec="minutes")[:16] if self.since else ""
        connected = f"connected to tcp/{self.port}" + (f" since {when}" if when else "")
        return f"your own SSH connection, {connected}" if self.yours else connected


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who would be locked out, each with the line to change, and what else is worth knowing."""

    locked_out: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    who: tuple[str, ...] = ()


def ssh_ports(policy: Resolved | None) -> Ranges:
    """TCP ports of the policy's ssh service; 22 where it has none."""
    services = policy.services if policy else ()
    found = tuple(span for s in services if s.name == SSH for p in s.ports if p.protocol == "tcp" for span in p.ranges)
    return found or STANDARD


def who_may_log_in(policy: Resolved) -> dict[str, object]:
    """Ports and sources of ssh, for the rules that a host boots with when no generation can be read."""
    groups: list[str] = list(policy.trust)
    anywhere = False
    for service in policy.services:
        if service.name == SSH:
            anywhere = anywhere or service.groups is None
            groups += service.groups or ()
    addresses = policy.addresses(dict.fromkeys(groups))
    dynamic = [name for name in dict.fromkeys(groups) if policy.groups[name].dynamic]
    return {
        "ports": ssh_ports(policy),
        "anywhere": anywhere,
        "v4": addresses.family(4),
        "v6": addresses.family(6),
        "dynamic": dynamic,
    }


def visitors(policy_ports: Ranges, namespace: Namespace, *, ancestors: bool) -> tuple[Visitor, ...]:
    """Everybody who is logged in: the client of SSH_CONNECTION, and the peers of established connections to its port, to ssh's, and to
    those on which an SSH server listens.

    `ancestors`: look for SSH_CONNECTION also where the calling processes still have it.

    Raises:
        HostRefused: the kernel does not say who is connected.
    """
    mine = session.ssh_connection(ancestors=ancestors)
    ports = {port for low, high in policy_ports for port in range(low, min(high, low + MAX_PORTS) + 1)}
    found: dict[tuple[int, int, int], Visitor] = {}
    if mine:
        ports.add(mine.server_port)
        who = mine.client_address()
        if who:
            version, address = who
            found[version, address, mine.server_port] = Visitor(
                version, address, mine.server_port, yours=True, local=mine.client == mine.server
            )
    with namespace.entered():
        peers = sockets.peers(ports | sockets.ports_of(sockets.SSH_SERVERS))
    for peer in peers:
        key = (peer.version, peer.address, peer.local_port)
        known = found.get(key)
        since = min((t for t in (peer.since, known.since if known else None) if t), default=None)
        here = (peer.version, peer.address) == (peer.version, peer.local)
        guessing = peer.logging_in and (known is None or known.guessing)
        found[key] = Visitor(*key, since, bool(known and known.yours), here, guessing)
    return tuple(found.values())


def judge(everybody: Iterable[Visitor], wanted: Ruleset, live: Ruleset, compiled: Compiled | None) -> Verdict:
    """Let everybody knock anew, at the policy's meaning and at the wanted rules. Pure.

    Without a policy, as for a recorded generation, only the rules are asked.
    """
    members = {s.name: s.members for s in live.sets if s.dynamic}
    rules = replace(wanted, sets=tuple(replace(s, members=members.get(s.name, ())) if s.dynamic else s for s in wanted.sets))
    locked: list[Finding] = []
    notes: list[Finding] = []
    who: list[str] = []
    guessing: list[Visitor] = []
    for visitor in everybody:
        packet = _knock(visitor)
        if packet.interface == "lo":
            continue
        reason, at, member = _meaning(packet, compiled, members) if compiled else ("", None, "")
        if not reason:
            reason = _rules(packet, rules)
        if reason and visitor.guessing:
            guessing.append(visitor)
        elif reason:
            message = f"{visitor} could not log in any more: {reason} ({visitor.words()})"
            hint = _remedy(visitor, packet, compiled.resolved, compiled.document.texts) if compiled else OVERRIDE
            locked.append(Finding("lock-out", message, at, hint))
            who.append(str(visitor))
        elif member:
            notes.append(Finding("lock-out", f"{visitor} ({visitor.words()}) may log in {member}", at, severity="warning"))
    if guessing:
        notes.append(_strangers(guessing))
    return Verdict(tuple(locked), tuple(notes), tuple(who))


def _strangers(guessing: Sequence[Visitor]) -> Finding:
    """Whoever only tries to log in keeps nobody from changing the rules: on the internet somebody always does."""
    shown = ", ".join(f"{visitor} (tcp/{visitor.port})" for visitor in guessing[:MAX_SHOWN])
    more = f" and {len(guessing) - MAX_SHOWN} more" if len(guessing) > MAX_SHOWN else ""
    message = f"trying to log in, and could not try again: {shown}{more}; they count as strangers, since nobody is logged in from there"
    return Finding("lock-out", message, severity="warning")


def refuse(verdict: Verdict) -> None:
    """Stop where somebody would be locked out.

    Raises:
        HostRefused: naming everybody.
    """
    if verdict.locked_out:
        count = len(verdict.who)
        people = f"{verdict.who[0]} would be locked out" if count == 1 else f"{count} who are logged in would be locked out"
        raise HostRefused(f"{people}; nothing was changed", verdict.locked_out, hint=OVERRIDE)


def _knock(visitor: Visitor) -> Packet:
    """The first packet of a new connection."""
    loopback = covers((LOOPBACK[visitor.version],), visitor.address)
    interface = "lo" if loopback or visitor.local else "eth0"
    return Packet(visitor.version, visitor.address, PROTOCOLS["tcp"], visitor.port, interface=interface)


def _meaning(
    packet: Packet, compiled: Compiled, members: Mapping[str, tuple[tuple[int, int | None], ...]]
) -> tuple[str, Position | None, str]:
    """Why the policy keeps a packet out (empty: it does not), where it says so, and how it gets in if only as a member."""
    from fwcompiler.proof.meaning import explain

    policy = compiled.resolved
    now = explain(_with_members(policy, members), packet)
    if now.verdict != "accept":
        at = now.at or compiled.document.locate(("services",), key=True)
        return now.reason, at, ""
    alone = explain(policy, packet)
    if alone.verdict == "accept":
        return "", None, ""
    for name, ms in _memberships(packet, members):
        time = f", for {ms // 60000} min more" if ms is not None else ""
        return "", alone.at, f"only as a member of {name}{time}"
    return "", alone.at, "only as a member of a group"


def _with_members(policy: Resolved, members: Mapping[str, tuple[tuple[int, int | None], ...]]) -> Resolved:
    """The policy as if its dynamic members of this moment stood in it."""
    groups = dict(policy.groups)
    for name, group in policy.groups.items():
        if group.dynamic:
            now = {v: ((a, a) for a, _ in members.get(f"{name}.dynamic.v{v}", ())) for v in (4, 6)}
            groups[name] = replace(group, addresses=group.addresses | Addresses.of(now[4], now[6]))
    return replace(policy, groups=groups)


def _memberships(packet: Packet, members: Mapping[str, tuple[tuple[int, int | None], ...]]) -> Iterator[tuple[str, int | None]]:
    for name, each in members.items():
        if name.endswith(f".v{packet.version}"):
            yield from ((name.partition(".")[0], ms) for address, ms in each if address == packet.source)


def _rules(packet: Packet, rules: Ruleset) -> str:
    """Why the rules keep a packet out; the empty string where they do not."""
    decided = trace(rules, packet)
    if decided.verdict == "accept":
        return ""
    return f"{decided.service or 'the rules'} would drop it" + (f" (chain {decided.chain})" if decided.chain else "")


def _remedy(visitor: Visitor, packet: Packet, policy: Resolved, texts: Mapping[str, str]) -> str:
    """The line that would let somebody in again."""
    address = f'"{visitor}"' if str(visitor).endswith(":") else str(visitor)
    service = next((s for s in policy.services if s.name == SSH), None)
    if service is None:
        return f"add to `services`: `ssh: {{from: [admins]}}`, and to `groups`: `admins: [{address}]`"
    if not any(p.protocol == "tcp" and covers(p.ranges, packet.port) for p in service.ports):
        ports = ", ".join((*service.port_texts(), f"tcp/{packet.port}"))
        return f"the server is at tcp/{packet.port}: write `ports: [{ports}]` at `ssh` ({service.at})"
    if not service.groups:
        return f"the address is blocked: name a group with {address} in `except` of `block`"
    blocked = policy.block is not None and (packet.version, packet.source) in policy.addresses(policy.block.groups)
    groups = [g for g in service.groups if not blocked or (policy.block and g in policy.block.excepted)]
    if not groups:
        return f"the address is blocked: name one of {', '.join(service.groups)} in `except` of `block`, with {address} in it"
    return _new_entry(next((g for g in groups if policy.groups[g].inline), groups[0]), address, policy, texts)


def _new_entry(name: str, address: str, policy: Resolved, texts: Mapping[str, str]) -> str:
    """The changed line where the group's addresses stand in one, else the new line, as it has to be written."""
    group = policy.groups[name]
    if not group.inline:
        return f"add `- {address}` to the members of `{name}` ({group.at})"
    at = group.inline[-1][3]
    lines = texts.get(at.file, "").splitlines()
    line = lines[at.line - 1] if 0 < at.line <= len(lines) else ""
    if line.lstrip().startswith("- "):
        return f"add below {at.file}:{at.line}: `{line[: len(line) - len(line.lstrip())]}- {address}`"
    end = line.find("]", at.column - 1)
    if end < 0:
        return f"add `{address}` to the members of `{name}` ({at})"
    return f"change {at.file}:{at.line} to: `{line[:end].rstrip()}, {address}{line[end:].rstrip()}`"
