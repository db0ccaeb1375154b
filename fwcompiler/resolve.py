"""Turns a policy's names and texts into addresses and ports, and checks what only the whole can tell.

Everything later stages need is in :class:`Resolved`; it refers to the policy by position only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import date
from itertools import combinations
from pathlib import Path

from fwcompiler.addresses import EVERYONE, LOOPBACK, NOBODY, AddressError, Addresses, parse_entry
from fwcompiler.asterisk import MAX_BYTES, Disk, Problem, read_configuration, rtp_ports
from fwcompiler.catalogue import CATALOGUE, RESPONDER_PORT, Class
from fwcompiler.diagnostics import Position, Report, did_you_mean
from fwcompiler.durations import seconds
from fwcompiler.edge import RTP, read_plan, resolved_edge
from fwcompiler.egress import EgressReader, Known, Outlet, ResolvedEgress, destinations, entries
from fwcompiler.fleet import CLUSTER, ROLES, ResolvedHost, cluster_entries, offers, read_hosts
from fwcompiler.lists import AddressList, read_list
from fwcompiler.options import OptionsReader, refuse_bypass
from fwcompiler.policy import AddressEntry, EgressEntry, EgressForm, Group, ListFile, Member, Policy, PolicyTest, ServiceEntry
from fwcompiler.ports import PortError, Ports, joined, overlap, parse_ports, parse_service_ports
from fwcompiler.resolved import Resolved, ResolvedBlock, ResolvedGroup, ResolvedTest
from fwcompiler.ruleset import BUILT_IN
from fwcompiler.service import ResolvedService
from fwcompiler.source import Document, KeyPath, read_file

RESERVED = BUILT_IN | {
    "anywhere",
    "input",
    "forward",
    "output",
    "prerouting",
    "postrouting",
    "edge",
    "behind",
    "early",
    "marks",
    "untracked",
}
"""Names fwc gives to its own chains, sets and counters."""


def resolve(policy: Policy, document: Document, report: Report, *, today: date, host: str | None = None) -> Resolved:
    """Resolve a validated policy; errors and warnings go to the report, the caller stops on errors.

    ``today`` decides about list lines that expire; ``host`` is the one to resolve for, where the policy names hosts.
    """
    stage = _Stage(policy, document, report, today)
    groups = {name: stage.group(name, form) for name, form in policy.groups.items()}
    groups |= stage.generated_groups()
    everything = tuple(s for name, entry in policy.services.items() if (s := stage.service(name, entry)))
    reader = OptionsReader(document, report, _never_limited(policy, everything))
    everything = tuple(replace(s, options=reader.read(s.name, policy.services[s.name], s.ports, s.groups)) for s in everything)
    everything = tuple(stage.with_responder(s, everything) for s in everything)
    here = stage.hosts.get(host or "")
    services = stage.services_of(here, everything)
    plan = stage.plan
    _warn_of_closed_https(policy, (services, here) if plan is None else (everything, None), document, report)
    edge = resolved_edge(plan, everything, stage.has, stage.hosts.values(), report) if plan else None
    ours = edge if plan and here is plan.host else None
    if ours:
        refuse_responder(services, document, report)
        refuse_bypass([f.service.options for f in ours.forwards], document, report)
    _refuse_overlaps((*services, *(f.service for f in ours.forwards)) if ours else services, report)
    trust = stage.known_groups(policy.trust, ("trust",))
    block = stage.block(everything)
    tests = tuple(t for i, test in enumerate(policy.tests) if (t := stage.test(test, ("tests", i), groups, everything, here)))
    at = document.locate(("trust",), key=True) if trust else None
    named = tuple(dict.fromkeys(g for s in everything for g in (*(s.groups or ()), *s.options.plain)))
    egress = stage.egress(everything, services, here)
    return Resolved(policy.name, groups, services, trust, at, block, tests, here, ours, plan, named, egress)


class _Stage:
    """The inputs every part of the stage needs."""

    def __init__(self, policy: Policy, document: Document, report: Report, today: date) -> None:
        self.policy, self.document, self.report, self.today = policy, document, report, today
        self.hosts = read_hosts(policy, document, report)
        self.plan = read_plan(policy, self.hosts, document, report)
        self.names = {*policy.groups, *([CLUSTER] if self.hosts else [])}

    def generated_groups(self) -> dict[str, ResolvedGroup]:
        """The group of all hosts, unless the policy has its own of that name."""
        if not self.hosts or CLUSTER in self.policy.groups:
            return {}
        entries = tuple(cluster_entries(self.hosts))
        addresses = Addresses.of(((a, b) for v, a, b, _ in entries if v == 4), ((a, b) for v, a, b, _ in entries if v == 6))
        return {CLUSTER: ResolvedGroup(CLUSTER, addresses, self.document.locate(("hosts",), key=True), inline=entries, generated=True)}

    def has(self, host: ResolvedHost | None, service: str) -> bool:
        """True where a host has a service."""
        on = self.policy.services[service].on
        return offers(host, service, [on] if isinstance(on, str) else on)

    def services_of(self, host: ResolvedHost | None, everything: tuple[ResolvedService, ...]) -> tuple[ResolvedService, ...]:
        """The services of one host, media on its own ports."""
        mine = [s for s in everything if self.has(host, s.name)]
        span = (self.plan.chunk(host.name) if self.plan else None) or host.rtp if host else None
        media = (Ports("udp", (span,)),) if span else ()
        return tuple(replace(s, ports=media) if s.name == RTP and media else s for s in mine)

    def group(self, name: str, form: list[Member] | Group) -> ResolvedGroup:
        """One group; a broken one comes back empty, its errors reported."""
        path: KeyPath = ("groups", name)
        at = self.document.locate(path, key=True)
        self._check_name(name, at)
        group = form if isinstance(form, Group) else Group(members=form)
        errors = sum(f.is_error for f in self.report.findings)
        lists: list[AddressList] = []
        inline: list[tuple[int, int, int, Position]] = []
        for i, member in enumerate(group.members):
            where = self._member_at(path, i)
            if isinstance(member, ListFile):
                found = read_list(member, where, self.today, self.report)
                lists.extend([found] if found else [])
            else:
                self._inline(member, where, inline)
        addresses = Addresses.of(((a, b) for v, a, b, _ in inline if v == 4), ((a, b) for v, a, b, _ in inline if v == 6))
        for each in lists:
            addresses = addresses | each.addresses
        failed = sum(f.is_error for f in self.report.findings) > errors
        if not addresses and not group.dynamic and not failed:
            self.report.error("empty-group", f"group `{name}` has no address", at, "an empty group is never read as everyone")
        self._refuse_everyone(name, group, addresses, at)
        timeout = self._timeout(group, path)
        size = group.dynamic.max if group.dynamic else None
        return ResolvedGroup(name, addresses, at, tuple(lists), tuple(inline), timeout, size)

    def _refuse_everyone(self, name: str, group: Group, addresses: Addresses, at: Position) -> None:
        """Entries that are fine one by one can be everyone together."""
        allowed = any("everyone" in m.allow for m in group.members if not isinstance(m, str))
        for version in (4, 6):
            if addresses.family(version) == EVERYONE.family(version) and not allowed:
                hint = "write `from: anywhere` at the service if it is public, or say `allow: [everyone]` at an entry"
                self.report.error("address-everyone", f"together, the entries of `{name}` are every IPv{version} address", at, hint)

    def _member_at(self, path: KeyPath, index: int) -> Position:
        for candidate in ((*path, "members", index), (*path, index)):
            if candidate in self.document.values:
                return self.document.values[candidate]
        return self.document.locate(path)

    def _timeout(self, group: Group, path: KeyPath) -> int | None:
        if group.dynamic is None:
            return None
        value = seconds(group.dynamic.timeout) or 0
        if not 1 <= value <= 365 * 86400:
            at = self.document.locate((*path, "dynamic", "timeout"))
            self.report.error("value", "a timeout lies between one second and one year", at)
        return value

    def _inline(self, member: str | AddressEntry, at: Position, out: list[tuple[int, int, int, Position]]) -> None:
        text, allow = (member.address, tuple(member.allow)) if isinstance(member, AddressEntry) else (member, ())
        if text in self.names:
            self.report.error("address-name", f"`{text}` is a group, and groups hold addresses only", at, "name both groups at the service")
            return
        try:
            entry = parse_entry(text.strip(), allow)
        except AddressError as error:
            hint = error.hint
            if error.code == "address-everyone" and isinstance(member, str):
                hint = f'write `from: anywhere` at the service, or {{address: "{text}", allow: [everyone]}} if it is meant'
            elif error.code in ("address-loopback", "address-multicast") and isinstance(member, str):
                hint = f'write {{address: "{text}", allow: [{error.code.removeprefix("address-")}]}} if it is meant'
            self.report.error(error.code, error.message, at, hint)
            return
        if entry.masked:
            self.report.warn("host-bits", f"`{text}` has host bits set, read as {entry.masked}", at)
        out.append((entry.version, *entry.span, at))

    def _check_name(self, name: str, at: Position) -> None:
        if name in RESERVED:
            self.report.error("name", f"`{name}` is a name that fwc uses itself", at, "choose another one")

    def known_groups(self, names: Iterable[str], path: KeyPath, alone: str = "from: anywhere") -> tuple[str, ...]:
        """The names that are groups; others are reported at their place."""
        good: list[str] = []
        for i, name in enumerate(names):
            at = self.document.locate((*path, i))
            if name in good:
                self.report.warn("covered", f"`{name}` is named twice", at, "one of them can go")
            elif name in self.names:
                good.append(name)
            elif name == "anywhere":
                self.report.error("group-unknown", "`anywhere` stands alone: it cannot be one of several groups", at, alone)
            else:
                hint = did_you_mean(name, self.names) or (
                    "addresses are listed in a group, and the group is named here" if any(c in name for c in ".:/") else ""
                )
                self.report.error("group-unknown", f"there is no group `{name}`", at, hint)
        return tuple(good)

    def service(self, name: str, entry: ServiceEntry) -> ResolvedService | None:
        """One service, or None where it is closed or broken."""
        path: KeyPath = ("services", name)
        at = self.document.locate(path, key=True)
        self._check_name(name, at)
        known = CATALOGUE.get(name)
        errors = len(self.report.findings)
        ports = self._ports(entry, path, name)
        self._check_places(entry, path)
        groups = None if isinstance(entry.from_, str) else self.known_groups(entry.from_, (*path, "from"))
        kind: Class = known.kind if known else "public" if groups is None else "restricted"
        if groups is None and kind == "public" and (known is None or entry.ports is not None):
            kind = self._kind_of_ports(ports)
        if groups is None and kind != "public" and not entry.expose:
            where = self.document.locate((*path, "from"))
            hint = 'name the groups that need it; `expose: "reason"` overrides this and shows in every check'
            self.report.error("anywhere", f"`{name}` is {_CLASS_WORDS[kind]}, it cannot be open to anywhere", where, hint)
        if entry.expose and (groups is not None or kind == "public"):
            self.report.warn("value", f"`expose` changes nothing at `{name}`", self.document.locate((*path, "expose"), key=True))
        if self._is_closed(name, entry, path) or not ports or any(f.is_error for f in self.report.findings[errors:]):
            return None
        early = groups is not None and not (known and known.asks)
        return ResolvedService(name, ports, kind, groups, at, early, entry.expose or "")

    def _check_places(self, entry: ServiceEntry | EgressEntry, path: KeyPath) -> None:
        """`on` names roles and hosts."""
        for i, place in enumerate([entry.on] if isinstance(entry.on, str) else entry.on or ()):
            if place not in ROLES and place not in self.hosts:
                at = self.document.locate((*path, "on") if isinstance(entry.on, str) else (*path, "on", i))
                hint = did_you_mean(place, (*ROLES, *self.hosts)) or f"roles: {', '.join(ROLES)}"
                self.report.error("host-unknown", f"`{place}` is neither a role nor a host", at, hint)

    def _kind_of_ports(self, ports: tuple[Ports, ...]) -> Class:
        """What a port is for does not change with the name it is given: 5038 stays the manager interface."""
        hidden = (s.kind for s in CATALOGUE.values() if s.kind != "public" and any(overlap(a, b) for a in s.ports for b in ports))
        return next(hidden, "public")

    def _is_closed(self, name: str, entry: ServiceEntry, path: KeyPath) -> bool:
        if entry.redirect is None:
            return False
        at = self.document.locate((*path, "redirect"))
        if name != "http":
            self.report.error("value", "`redirect` belongs to the service `http` only", at)
        return entry.redirect == "closed"

    def with_responder(self, service: ResolvedService, everything: tuple[ResolvedService, ...]) -> ResolvedService:
        """The service with the port that its new connections are redirected to, if they are."""
        entry = self.policy.services[service.name]
        path: KeyPath = ("services", service.name)
        if entry.redirect != "responder":
            for key in ("plain", "responder_port"):
                if getattr(entry, key) is not None:
                    at = self.document.locate((*path, key), key=True)
                    self.report.error("value", f"`{key}` belongs to `redirect: responder`", at, "say that as well, or leave this out")
            return service
        at = self.document.locate((*path, "redirect"))
        port = entry.responder_port or RESPONDER_PORT
        hint = "say which port with `responder_port`, and start `fwc responder --listen` with the same"
        for other in everything:
            if any(overlap(each, Ports("tcp", ((port, port),))) for each in other.ports):
                self.report.error("duplicate-service", f"the responder's port {port} is one of `{other.name}`'s ({other.at})", at, hint)
        if any(each.protocol != "tcp" or not each.ranges for each in service.ports):
            self.report.error("value", "only TCP connections can be redirected to the responder", at)
        plain = self.known_groups(entry.plain or (), (*path, "plain"))
        for i, name in enumerate(entry.plain or ()):
            if service.groups is not None and name in plain and name not in service.groups:
                where = self.document.locate((*path, "plain", i))
                self.report.error("value", f"`{service.name}` is not open to `{name}`", where, "name it in `from` as well")
        return replace(service, options=replace(service.options, responder=port, plain=plain))

    def _ports(self, entry: ServiceEntry, path: KeyPath, name: str) -> tuple[Ports, ...]:
        known = CATALOGUE.get(name)
        if entry.rtp_conf is not None:
            return self._rtp_conf(entry, entry.rtp_conf, path, name)
        if entry.ports is None:
            if known is None:
                hint = did_you_mean(name, CATALOGUE) or "ports: [tcp/9100] makes it a service of your own"
                self.report.error("service-ports", f"`{name}` is not in the catalogue and names no ports", self._key(path), hint)
                return ()
            return known.ports
        items = entry.ports if isinstance(entry.ports, list) else [entry.ports]
        found: list[Ports] = []
        for i, item in enumerate(items):
            at = self.document.locate((*path, "ports", i) if isinstance(entry.ports, list) else (*path, "ports"))
            try:
                found.extend(parse_service_ports(str(item), known.ports if known else ()))
            except PortError as error:
                self.report.error(error.code, error.message, at, error.hint)
        return joined(found)

    def _rtp_conf(self, entry: ServiceEntry, file: str, path: KeyPath, name: str) -> tuple[Ports, ...]:
        """The ports that an rtp.conf gives to Asterisk; what Asterisk would put right by itself is an error here."""
        at = self.document.locate((*path, "rtp_conf"))
        key = self.document.locate((*path, "rtp_conf"), key=True)
        if name != "rtp":
            self.report.error("value", "`rtp_conf` belongs to the service `rtp` only", key)
            return ()
        if entry.ports is not None:
            self.report.error("value", "`rtp` has both `ports` and `rtp_conf`", key, "keep one of them")
            return ()
        where = str(Path(at.file).parent / file)
        if read_file(where, self.report, at, limit=MAX_BYTES) is None:
            return ()
        configuration = read_configuration(where, str(Path(where).parent), Disk())
        assert configuration is not None
        refused = [Problem("file-format", note.message, note.at, "") for note in configuration.notes if note.refused]
        found = rtp_ports(configuration)
        for problem in refused or found.problems:
            self.report.error(problem.code, problem.message, problem.at, problem.hint)
        for note in configuration.notes:
            if not note.refused:
                self.report.warn("file-format", note.message, note.at)
        return (Ports("udp", ((found.first, found.last),)),)

    def _key(self, path: KeyPath) -> Position:
        return self.document.locate(path, key=True)

    def egress(
        self, everything: tuple[ResolvedService, ...], services: tuple[ResolvedService, ...], here: ResolvedHost | None
    ) -> ResolvedEgress | None:
        """What this host may send, or None where the policy does not restrict it."""
        if self.policy.egress is None:
            return None
        known = Known({s.name: s.ports for s in everything}, {s.name: s.ports for s in services})
        reader = EgressReader(self.document, self.report, known)
        found = [self._outlet(reader, name, form, path, here) for path, name, form in entries(self.policy.egress)]
        return ResolvedEgress(tuple(each for each in found if each), self._key(("egress",)))

    def _outlet(self, reader: EgressReader, name: str, form: EgressForm, path: KeyPath, here: ResolvedHost | None) -> Outlet | None:
        """One entry, or None where it is broken, or for other hosts."""
        ports = reader.ports(name, form, path)
        where, below = destinations(form)
        groups = (
            None
            if where == "anywhere"
            else self.known_groups([where] if isinstance(where, str) else where, (*path, *below), f"{name}: anywhere")
        )
        on = form.on if isinstance(form, EgressEntry) else None
        if isinstance(form, EgressEntry):
            self._check_places(form, path)
        if ports is None or groups == () or (on is not None and not offers(here, name, [on] if isinstance(on, str) else on)):
            return None
        multicast = CATALOGUE[name].multicast if name in CATALOGUE and groups is not None else NOBODY
        return Outlet(name, *ports, groups, self._key(path), multicast)

    def block(self, services: tuple[ResolvedService, ...]) -> ResolvedBlock | None:
        """The block list with its exceptions: by default every group that a service names."""
        block = self.policy.block
        if block is None:
            return None
        names = self.known_groups(block.from_, ("block", "from"))
        if block.except_ is not None:
            excepted = self.known_groups(block.except_, ("block", "except"))
        else:
            excepted = tuple(dict.fromkeys(g for s in services for g in s.groups or ()))
        return ResolvedBlock(names, excepted, self._key(("block",)))

    def test(
        self,
        test: PolicyTest,
        path: KeyPath,
        groups: Mapping[str, ResolvedGroup],
        everything: tuple[ResolvedService, ...],
        here: ResolvedHost | None,
    ) -> ResolvedTest | None:
        """One expectation, or None after an error, or where it is about other hosts."""
        found = self._read_test(test, path, groups)
        if found is None or (test.host and test.host not in self.hosts):
            if test.host and test.host not in self.hosts:
                at = self.document.locate((*path, "host"))
                self.report.error("host-unknown", f"there is no host `{test.host}`", at, did_you_mean(test.host, self.hosts))
            return None
        if here is None or test.host:
            return found if here is None or test.host == here.name else None
        if found.leaving:
            return found
        where = [h for h in self.hosts.values() if self._answers(h, found.ports, everything)]
        return found if test.expect == "drop" or here in where or not where else None

    def _answers(self, host: ResolvedHost, to: Ports, everything: tuple[ResolvedService, ...]) -> bool:
        """True where an expectation to be let in says something about a host: it has a service there, or forwards it."""
        services = self.services_of(host, everything)
        if self.plan and host is self.plan.host:
            edge = resolved_edge(self.plan, everything, self.has, self.hosts.values(), Report())
            services = (*services, *(f.service for f in edge.forwards))
        return to.protocol in ("icmp", "icmpv6") or any(overlap(p, to) for s in services for p in s.ports)

    def _read_test(self, test: PolicyTest, path: KeyPath, groups: Mapping[str, ResolvedGroup]) -> ResolvedTest | None:
        key = self._about(test, path)
        said = test.from_ if key == "from" else test.egress
        if said is None:
            return None
        sources = [said] if isinstance(said, str) else said
        addresses = NOBODY
        try:
            for source in sources:
                addresses = addresses | self._test_source(source, groups)
            ports = parse_ports(test.to)
        except AddressError as error:
            self.report.error(error.code, error.message, self.document.locate((*path, key)), error.hint)
            return None
        except PortError as error:
            self.report.error(error.code, error.message, self.document.locate((*path, "to")), error.hint)
            return None
        if not addresses and not self.report.failed:
            self.report.error("policy-test", f"`{', '.join(sources)}` has no fixed address to test", self.document.locate((*path, key)))
        at, leaving = self.document.locate(path), key == "egress"
        return ResolvedTest(", ".join(sources), addresses, ports, test.expect, test.state, at, leaving, test.from_port or 0)

    def _about(self, test: PolicyTest, path: KeyPath) -> str:
        """The key that says which packets a test is about, with what does not go with it."""
        at = self.document.locate(path)
        if test.from_ is None and test.egress is None:
            self.report.error("required", "`from` is missing", at, "say `from:` or, for what this host sends, `egress:`")
        elif test.from_ is not None and test.egress is not None:
            self.report.error("value", "a test is about packets that come in, or about some that go out", at, "make two tests of it")
        refused = "drop" if test.from_ is not None else "reject"
        if test.expect not in ("accept", refused):
            hint = f"what comes in is dropped, what this host sends is rejected: `expect: {refused}`"
            self.report.error("value", f"`{test.expect}` is not what becomes of these", self.document.locate((*path, "expect")), hint)
        if test.from_port is not None and test.egress is None:
            self.report.error("value", "`from_port` belongs to `egress`", self.document.locate((*path, "from_port"), key=True))
        return "egress" if test.from_ is None else "from"

    def _test_source(self, source: str, groups: Mapping[str, ResolvedGroup]) -> Addresses:
        if source == "anywhere":
            return EVERYONE - Addresses((LOOPBACK[4],), (LOOPBACK[6],))
        if source in groups:
            return groups[source].addresses
        try:
            entry = parse_entry(source, ("everyone", "loopback", "multicast"))
        except AddressError as error:
            hint = did_you_mean(source, groups)
            raise AddressError(error.code, f"`{source}` is neither a group nor an address", hint or error.hint) from None
        return Addresses.of(*(([entry.span], []) if entry.version == 4 else ([], [entry.span])))


_CLASS_WORDS: dict[Class, str] = {
    "public": "public",
    "restricted": "a restricted service",
    "cluster": "for the cluster only",
    "admin": "for administrators only",
    "loopback": "for the host itself only",
}


def _never_limited(policy: Policy, services: tuple[ResolvedService, ...]) -> dict[str, str]:
    """Groups that no limit may touch, each with the reason."""
    cluster = {g: f"`{s.name}` makes it the cluster's" for s in services if s.kind == "cluster" for g in s.groups or ()}
    return {**cluster, **dict.fromkeys(policy.trust, "`trust` accepts all of its packets")}


def refuse_responder(services: Iterable[ResolvedService], document: Document, report: Report) -> None:
    """What an edge redirects is what it forwards."""
    if any(s.options.responder for s in services):
        at = document.locate(("services", "http", "redirect"))
        report.error("value", "an edge has no responder of its own", at, "forward `http` to a web host, and let the responder run there")


def _warn_of_closed_https(
    policy: Policy, offered: tuple[tuple[ResolvedService, ...], ResolvedHost | None], document: Document, report: Report
) -> None:
    """A redirect leads to tcp/443 of the same name. ``offered``: the services behind that name, and of which host they are, if of one."""
    services, host = offered
    entry = policy.services.get("http")
    if entry is None or entry.redirect not in ("responder", "web-server") or all(s.name != "http" for s in services):
        return
    if not any(overlap(each, Ports("tcp", ((443, 443),))) for s in services for each in s.ports):
        message = f"HTTP is redirected to HTTPS, and no service{f' of `{host.name}`' if host else ''} is on tcp/443, which is closed"
        hint = "https: {from: anywhere} beside it, or redirect: closed"
        report.warn("https-closed", message, document.locate(("services", "http", "redirect")), hint)


def _refuse_overlaps(services: tuple[ResolvedService, ...], report: Report) -> None:
    for first, second in combinations(services, 2):
        if first.name == second.name:  # chunks: the edge's plan has looked at them
            continue
        common = [c for a in first.ports for b in second.ports if (c := overlap(a, b))]
        if common:
            texts = ", ".join(t for c in common for t in c.texts())
            report.error(
                "duplicate-service",
                f"`{second.name}` and `{first.name}` ({first.at}) both claim {texts}",
                second.at,
                "a port belongs to one service: change `ports` of one of them",
            )
