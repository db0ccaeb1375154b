"""Gathers the facts. What this user may not see, or the host does not have, is left out and said."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fwcompiler.addresses import NOBODY, Addresses, Ranges, address_text, merged, parse_address
from fwcompiler.asterisk import FOLDER, Configuration, Disk, TooLarge, read_configuration
from fwcompiler.audit.agreement import TLS_PORT, http_binds
from fwcompiler.audit.exposure import beyond
from fwcompiler.audit.facts import (
    ASTERISK_FILES,
    Answer,
    CertificateFile,
    Changed,
    Conntrack,
    Drift,
    Facts,
    Helper,
    OwnAddress,
    Published,
    Rules,
    Served,
)
from fwcompiler.audit.published import published
from fwcompiler.audit.signalling import sip_names
from fwcompiler.backend import Saved
from fwcompiler.diagnostics import Failure, Finding, PolicyRejected, UsageError
from fwcompiler.guard import SSH, Visitor, judge, ssh_ports, visitors
from fwcompiler.kernel import hostfacts, sockets, web
from fwcompiler.kernel.netns import Namespace
from fwcompiler.neighbours import ON_THE_WAY, Meddling, meddling, read_host
from fwcompiler.pipeline import Compiled, Host, plan
from fwcompiler.plan import Plan
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.diagram import StepsExceeded
from fwcompiler.registry import load
from fwcompiler.report import access_lines, sending_lines
from fwcompiler.ruleset import Ruleset

if TYPE_CHECKING:
    from fwcompiler.kernel.sockets import Listener

T = TypeVar("T")
TLS_SERVICES = ("https", "wss")
_RIGHTS = "this needs root, or the group asterisk"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line says about gathering."""

    asterisk: str | None = None
    name: str | None = None
    authority: str | None = None
    resolve: bool = False
    ancestors: bool = True
    """Look for SSH_CONNECTION also where only the calling processes have it."""


def gather(compiled: Compiled, host: Host | None, wishes: Wishes, left_out: Sequence[str] = ()) -> Facts:
    """All facts about the host. `host` is None where no backend can be used, and `left_out` says why.

    Raises:
        UsageError: a folder or file of the wishes is not there.
        PolicyRejected: the backend cannot express the policy, or a list of it has shrunk.
    """
    return _Gatherer(compiled, host, wishes, left_out).facts()


class _Gatherer:
    """Collects facts one by one, and what is missing."""

    def __init__(self, compiled: Compiled, host: Host | None, wishes: Wishes, left_out: Sequence[str]) -> None:
        self.left_out = list(left_out)
        self._compiled, self._host, self._wishes = compiled, host, wishes
        self._policy = compiled.resolved
        self._name = wishes.name or hostfacts.host_name()

    def facts(self) -> Facts:
        """Everything; the live rules last, since trying rules out without root leaves the host's network."""
        folder, asterisk, unread = self._asterisk()
        if self._wishes.authority is not None:
            web.require_authority(self._wishes.authority)
        namespace = self._host.namespace if self._host else Namespace()
        with namespace.entered():
            addresses = self._try("this host's addresses", hostfacts.addresses)
            listeners = self._try("listening sockets", sockets.listeners)
            served = tuple(self._served(listeners, asterisk))
            answers = tuple(self._answers(listeners))
            names = sip_names(asterisk) if self._wishes.resolve else []
            resolved = {name: _addresses(web.addresses_of(name)) for name in names}
            filters = self._try("other packet filters", hostfacts.filters)
            conntrack, helper = self._conntrack(), self._helper(filters)
            local_ports = hostfacts.local_ports()
            routing = self._routing()
        everybody = self._try("who is logged in", lambda: visitors(ssh_ports(self._policy), namespace, ancestors=self._wishes.ancestors))
        own = tuple(OwnAddress(a.version, a.address, a.name, a.wide) for a in addresses) if addresses is not None else None
        planned = self._plan()
        live = planned.live if planned else None
        return Facts(
            name=self._name,
            now=datetime.now(UTC),
            asterisk_folder=folder,
            asterisk=asterisk,
            asterisk_unread=unread,
            addresses=own,
            listeners=listeners,
            local_ports=local_ports,
            routing=routing,
            conntrack=conntrack,
            helper=helper,
            served=served,
            certificate_files=tuple(self._certificate_files(asterisk, folder)),
            answers=answers,
            rules=self._rules(filters, own, live) if filters else None,
            drift=self._drift(planned) if planned else None,
            locked_out=self._locked_out(everybody, planned) if everybody is not None else None,
            resolved_names={name: found for name, found in resolved.items() if found},
            members=_members(live),
            left_out=tuple(self.left_out),
        )

    def _try(self, what: str, ask: Callable[[], T]) -> T | None:
        """An answer, or None and a line about what is missing."""
        try:
            return ask()
        except (UsageError, PolicyRejected):
            raise
        except Failure as failure:
            hint = f" ({failure.hint})" if failure.hint else ""
            self.left_out.append(f"{what}: {failure.message or failure}{hint}")
            return None

    def _asterisk(self) -> tuple[str, dict[str, Configuration], frozenset[str]]:
        """The folder, what was read of its files, and which of them are there and could not be."""
        folder = self._wishes.asterisk or FOLDER
        if not Path(folder).is_dir():
            if self._wishes.asterisk:
                raise UsageError(f"there is no folder `{folder}`", hint="--asterisk-dir names the folder of rtp.conf and its likes")
            self.left_out.append(f"agreement with Asterisk: there is no folder {folder} (--asterisk-dir names another)")
            return folder, {}, frozenset()
        if not os.access(folder, os.R_OK | os.X_OK):
            self.left_out.append(f"agreement with Asterisk: {folder} cannot be looked into ({_RIGHTS})")
            return folder, {}, frozenset()
        found: dict[str, Configuration] = {}
        unread: set[str] = set()
        for name in ASTERISK_FILES:
            path = f"{folder.rstrip('/')}/{name}"
            try:
                configuration = read_configuration(path, folder, Disk())
            except TooLarge as error:
                unread.add(name)
                self.left_out.append(f"agreement with Asterisk: {path} is {error}")
                continue
            if configuration is not None:
                found[name] = configuration
            elif os.path.lexists(path):
                unread.add(name)
                reason = hostfacts.content(path)
                why = f": {reason}" if isinstance(reason, str) and "permission" not in reason else f" ({_RIGHTS})"
                self.left_out.append(f"agreement with Asterisk: {path} cannot be read{why}")
        if not found and not any(folder in line for line in self.left_out):
            self.left_out.append(f"agreement with Asterisk: {folder} holds none of {', '.join(ASTERISK_FILES)}")
        return folder, found, frozenset(unread)

    def _ports_of(self, names: Sequence[str], usual: Sequence[int]) -> list[int]:
        named = [low for s in self._policy.services if s.name in names for p in s.ports if p.protocol == "tcp" for low, _ in p.ranges]
        return list(dict.fromkeys((*named, *usual)))

    def _where(self, listeners: Sequence[Listener] | None, port: int) -> str | None:
        """An address of this host under which a port can be asked; None where nothing listens."""
        if listeners is None:
            return "127.0.0.1"
        found = [each for each in listeners if each.protocol == "tcp" and each.port == port]
        if not found:
            return None
        best = next((each for each in found if beyond(each)), found[0])
        if best.address:
            return address_text(best.version, best.address)
        return "127.0.0.1" if 4 in best.versions else "::1"

    def _served(self, listeners: Sequence[Listener] | None, asterisk: dict[str, Configuration]) -> Iterator[Served]:
        tls = http_binds(asterisk["http.conf"])[1] if "http.conf" in asterisk else None
        usual = (443, TLS_PORT) if listeners is not None else ()
        for port in self._ports_of(TLS_SERVICES, (*usual, *((tls.port,) if tls else ()))):
            where = self._where(listeners, port)
            if where is None:
                continue
            authority = self._wishes.authority
            ask = partial(web.certificate_chain, where, port, self._name, authority)
            answer = self._try(f"the certificate on tcp/{port}", ask)
            if answer is not None:
                yield Served(port, where, *answer)

    def _answers(self, listeners: Sequence[Listener] | None) -> Iterator[Answer]:
        if not any(s.name == "http" for s in self._policy.services):
            return
        asked = [s.heard_ports()[:1] if s.options.responder else s.ports for s in self._policy.services if s.name == "http"]
        for port in dict.fromkeys(low for ports in asked for p in ports for low, _ in p.ranges if p.protocol == "tcp"):
            where = self._where(listeners, port)
            if where is None:
                continue
            hops, error = web.http_hops(where, port, self._name)
            if error:
                self.left_out.append(f"the redirect on tcp/{port}: {error}")
            yield Answer(port, where, hops, error)

    def _certificate_files(self, asterisk: dict[str, Configuration], folder: str) -> Iterator[CertificateFile]:
        """The file that http.conf names for its TLS port."""
        if "http.conf" not in asterisk:
            return
        _, tls, setting = http_binds(asterisk["http.conf"])
        if tls is None or setting is None:
            return
        path = setting.value if setting.value.startswith("/") else f"{folder}/{setting.value}"
        content = hostfacts.content(path)
        if isinstance(content, bytes):
            yield CertificateFile(path, str(setting.at), tls.port, content)
        elif "permission" in content:
            self.left_out.append(f"the certificate file {path}: {content} (this needs root)")
        else:
            yield CertificateFile(path, str(setting.at), tls.port, error=content)

    def _routing(self) -> hostfacts.Routing | None:
        edge = self._policy.edge
        if edge is None:
            return None
        versions = [v for v in (4, 6) if any(w == v for f in edge.forwards for w, _ in f.host.addresses)]
        return hostfacts.routing((edge.wan, edge.lan), versions)

    def _conntrack(self) -> Conntrack | None:
        room, count = hostfacts.number("netfilter/nf_conntrack_max"), hostfacts.number("netfilter/nf_conntrack_count")
        if room is None or count is None:
            self.left_out.append("room in the connection table: the kernel does not track connections, or does not say")
            return None
        return Conntrack(count, room, hostfacts.number("netfilter/nf_conntrack_udp_timeout") or 30)

    def _helper(self, filters: hostfacts.Filters | None) -> Helper:
        automatic = hostfacts.number("netfilter/nf_conntrack_helper") == 1
        return Helper(hostfacts.module_loaded("nf_conntrack_sip"), automatic, filters.sip_helpers() if filters else ())

    def _rules(self, filters: hostfacts.Filters, own: Sequence[OwnAddress] | None, live: Ruleset | None) -> Rules:
        mine: dict[int, Ranges] = {v: merged((a.address, a.address) for a in own or () if a.version == v) for v in (4, 6)}
        found = [p for source, ruleset in _rulesets(filters) for p in published(ruleset, mine, source)]
        unique = {(p.protocol, p.span, p.to): p for p in reversed(found)}
        handed_on = tuple(reversed(unique.values()))
        return Rules(filters.legacy_rules(), filters.nft_rules(), handed_on, self._meddling(live, handed_on))

    def _meddling(self, live: Ruleset | None, handed_on: Sequence[Published]) -> tuple[Changed, ...]:
        """What rules of others change about packets, one example a rule and direction; published ports are told by themselves.

        What hands packets on by a map is seen here only: the listing that published ports are read from has no contents.
        """
        host = self._host
        if live is None or host is None:
            return ()
        whole = self._try("rules of others", lambda: read_host(host, live))
        if whole:
            passing = (ON_THE_WAY,) if self._policy.edge and not whole.alone_on_the_way else ()
            self.left_out += [*(f"rules of others: {what}" for what in whole.unread), *passing]
        try:
            found = meddling(whole) if whole else ()
            changes = ((each.by, _changed(each)) for each in reversed(found) if not _is_told(each, handed_on))
            return tuple({(by, each.opens): each for by, each in changes}.values())
        except StepsExceeded:
            self.left_out.append("rules of others: they are more than can be decided")
            return ()

    def _plan(self) -> Plan | None:
        host = self._host
        return self._try("drift", lambda: plan(self._compiled, host)[0]) if host is not None else None

    def _drift(self, planned: Plan) -> Drift:
        more, less = sending_lines(planned.sending, self._policy, "+", "-")
        access = [
            *access_lines(planned.access.gained, self._policy, "+", "would reach"),
            *access_lines(planned.access.lost, self._policy, "-", "would no longer reach", planned.live),
            *more,
            *less,
        ]
        return Drift(bool(planned.live), planned.in_sync, planned.changes(), tuple(access))

    def _locked_out(self, everybody: Sequence[Visitor], planned: Plan | None) -> tuple[Finding, ...]:
        """Who could not log in again; without the live rules, by the policy alone."""
        if planned is not None:
            return judge(everybody, planned.wanted, planned.live, self._compiled).locked_out
        coming = [g for s in self._policy.services if s.name == SSH for g in s.groups or () if self._policy.groups[g].dynamic]
        if coming:
            self.left_out.append(f"lock-out: who is in {', '.join(coming)} at present is not known without the live rules")
            return ()
        return judge(everybody, self._compiled.ruleset, Ruleset(), self._compiled).locked_out


def _changed(found: Meddling) -> Changed:
    opens = found.certain and not found.packet.leaving and found.ours in ("drop", "reject") and found.host in ("accept", "redirect")
    protocol = next((name for name in ("tcp", "udp") if PROTOCOLS[name] == found.packet.protocol), "")
    ports = f"{protocol}/{found.packet.port}" if opens and found.host == "redirect" and protocol else ""
    return Changed(str(found), opens, ports)


def _is_told(found: Meddling, handed_on: Sequence[Published]) -> bool:
    """True where a packet is handed on by a port that is known to be published."""
    protocol, port = found.packet.protocol, found.packet.port
    return (
        found.host == "redirect"
        and not found.packet.leaving
        and any(PROTOCOLS[each.protocol] == protocol and each.span[0] <= port <= each.span[1] for each in handed_on)
    )


def _rulesets(filters: hostfacts.Filters) -> Iterator[tuple[str, Ruleset]]:
    """Whatever can be read of the listings; nobody else's rules stop an audit."""
    with suppress(ValueError, LookupError, UsageError):
        if filters.nft:
            yield "nftables", load("nftables").foreign([Saved("nft", filters.nft)], Ruleset())
    for version, variant, text in filters.saves:
        with suppress(ValueError, LookupError, UsageError):
            program = f"{'ip6' if version == 6 else 'ip'}tables-{variant}"
            yield program, load(f"iptables-{variant}").foreign([Saved(program, text)], Ruleset())


def _addresses(found: Sequence[tuple[int, str]]) -> Addresses:
    parsed = [parse_address(text.partition("%")[0]) for _, text in found]
    return Addresses.of(((a, a) for v, a in parsed if v == 4), ((a, a) for v, a in parsed if v == 6))


def _members(live: Ruleset | None) -> dict[str, Addresses]:
    found: dict[str, Addresses] = {}
    for each in live.sets if live else ():
        if each.dynamic:
            spans = [(a, a) for a, _ in each.members]
            added = Addresses.of(spans if each.version == 4 else [], spans if each.version == 6 else [])
            group = each.name.partition(".")[0]
            found[group] = found.get(group, NOBODY) | added
    return found
