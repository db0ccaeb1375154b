"""The hosts of a policy: which of them it is compiled for, what each of them is, and the group that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fwcompiler.addresses import AddressError, Addresses, address_text, parse_entry
from fwcompiler.catalogue import CATALOGUE, Role
from fwcompiler.diagnostics import Position, Report, UsageError, did_you_mean
from fwcompiler.policy import HostEntry, Policy
from fwcompiler.ports import PortError, parse_port_range
from fwcompiler.source import Document, KeyPath

CLUSTER = "cluster"
"""The group of all hosts. A policy that defines a group of this name means its own."""
ROLES: tuple[Role, ...] = ("edge", "dialer", "web", "database", "archive", "all-in-one")
PORTS = (1024, 65535)
"""Where a dialer's media ports may lie: below are the ports of other services (RFC 6335)."""

_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,14}")
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ResolvedHost:
    """One host: its addresses as (family, number) in the policy's order, each with its line; interfaces of an edge."""

    name: str
    roles: tuple[Role, ...]
    addresses: tuple[tuple[int, int], ...]
    at: Position
    places: tuple[Position, ...] = ()
    rtp: Span | None = None
    wan: str = ""
    lan: str = ""

    def plays(self, role: str) -> bool:
        """True where it has the role; `all-in-one` stands for all but the edge's."""
        return role in self.roles or ("all-in-one" in self.roles and role != "edge")

    def all(self) -> Addresses:
        """All of its addresses."""
        return Addresses.of(((a, a) for v, a in self.addresses if v == 4), ((a, a) for v, a in self.addresses if v == 6))

    def first(self, version: int) -> int | None:
        """Its first address of a family."""
        return next((a for v, a in self.addresses if v == version), None)


def pick_host(names: Iterable[str], asked: str | None, machine: str) -> str | None:
    """The host to compile for: the one asked for, or else the one that this machine is. None: the policy names no hosts.

    A host is known by its name, or by the first label of it or of the machine's ("dialer1" is "dialer1.example.net").

    Raises:
        UsageError: it is none of them, or could be several.
    """
    known = list(names)
    if not known:
        if asked is not None:
            raise UsageError("this policy is for one host: it has no `hosts`", hint="leave --host out")
        return None
    wanted = (machine if asked is None else asked).rstrip(".").lower()
    exact = [name for name in known if name == asked] or [name for name in known if name.lower() == wanted]
    short = [name for name in known if _label(name) == _label(wanted) and ("." not in wanted or "." not in name)]
    found = exact or short
    if len(found) == 1:
        return found[0]
    listed = f"hosts of this policy: {', '.join(known)}"
    if len(found) > 1:
        raise UsageError(f"`{wanted}` could be {' or '.join(found)}", hint=f"say which: --host {found[0]}")
    if asked is not None:
        raise UsageError(f"this policy has no host `{asked}`", hint=did_you_mean(asked, known) or listed)
    raise UsageError(f"this machine is called `{machine}`, which is none of the policy's hosts", hint=f"say --host NAME; {listed}")


def _label(name: str) -> str:
    return name.lower().partition(".")[0]


def read_hosts(policy: Policy, document: Document, report: Report) -> dict[str, ResolvedHost]:
    """All hosts of a policy; what is wrong with one is reported at its place."""
    hosts = {name: _host(name, entry, document, report) for name, entry in policy.hosts.items()}
    _check_names(hosts, report)
    owners: dict[tuple[int, int], ResolvedHost] = {}
    for host in hosts.values():
        for address, at in zip(host.addresses, host.places, strict=True):
            other = owners.setdefault(address, host)
            if other is host:
                continue
            message = f"{address_text(*address)} is an address of `{other.name}` too ({other.at})"
            if host.plays("dialer") and other.plays("dialer"):
                report.error("host-address", message, at, "every dialer has addresses of its own")
            else:
                report.warn("host-address", message, at, "fine for an address that moves between hosts")
    _compare_own_cluster(policy, hosts, document, report)
    return hosts


def _check_names(hosts: Mapping[str, ResolvedHost], report: Report) -> None:
    """Names of hosts are the same in capitals and small letters (RFC 4343)."""
    known: dict[str, ResolvedHost] = {}
    for host in hosts.values():
        other = known.setdefault(host.name.lower(), host)
        if other is not host:
            report.error("name", f"`{host.name}` and `{other.name}` ({other.at}) are one name", host.at, "every host has a name of its own")


def _host(name: str, entry: HostEntry, document: Document, report: Report) -> ResolvedHost:
    path: KeyPath = ("hosts", name)
    roles: tuple[Role, ...] = tuple(dict.fromkeys([entry.role] if isinstance(entry.role, str) else entry.role))
    addresses: list[tuple[int, int]] = []
    places: list[Position] = []
    for i, text in enumerate(entry.addresses):
        at = document.locate((*path, "addresses", i))
        found = _address(text, at, report)
        if found and found not in addresses:
            addresses.append(found)
            places.append(at)
    at = document.locate(path, key=True)
    host = ResolvedHost(
        name, roles, tuple(addresses), at, tuple(places), _rtp(entry, path, document, report), entry.wan or "", entry.lan or ""
    )
    for key in ("wan", "lan"):
        _check_interface(host, key, document, report)
    if host.wan and host.wan == host.lan:
        hint = "an interface to the internet, and one to the dialers"
        report.error("interface", f"`wan` and `lan` of `{name}` are both {host.wan}", document.locate((*path, "lan")), hint)
    if entry.rtp is not None and not host.plays("dialer"):
        report.error("host-role", f"`{name}` is no dialer, and only dialers have media ports", document.locate((*path, "rtp"), key=True))
    return host


def _address(text: str, at: Position, report: Report) -> tuple[int, int] | None:
    try:
        entry = parse_entry(text.strip())
    except AddressError as error:
        hint = "" if error.code in ("address-loopback", "address-multicast", "address-everyone") else error.hint
        report.error(error.code, error.message, at, hint or "a host has the addresses that others reach it by")
        return None
    if entry.span[0] != entry.span[1]:
        report.error("host-address", f"`{text}` is more than one address", at, "a host has single addresses: 10.20.0.11")
        return None
    return entry.version, entry.span[0]


def _rtp(entry: HostEntry, path: KeyPath, document: Document, report: Report) -> Span | None:
    if entry.rtp is None:
        return None
    at = document.locate((*path, "rtp"))
    try:
        span = parse_port_range(entry.rtp.removeprefix("udp/"))
    except PortError as error:
        report.error(error.code, error.message, at, error.hint)
        return None
    if span[0] < PORTS[0]:
        report.error("chunk-bounds", f"media ports {span[0]}-{span[1]} are not all within {PORTS[0]} to {PORTS[1]}", at)
        return None
    return span


def _check_interface(host: ResolvedHost, key: str, document: Document, report: Report) -> None:
    name: str = getattr(host, key)
    if not name:
        return
    at = document.locate(("hosts", host.name, key))
    if "edge" not in host.roles:
        report.error("host-role", f"`{key}` belongs to an edge, and `{host.name}` is none", at, "role: edge")
    elif not _INTERFACE.fullmatch(name) or name == "lo":
        report.error("interface", f"`{name}` cannot be the {key} interface", at, "a name as `ip link` shows it: eth0")


def cluster_entries(hosts: Mapping[str, ResolvedHost]) -> Iterator[tuple[int, int, int, Position]]:
    """The members of the generated group: every address of every host, the one compiled for included."""
    for host in hosts.values():
        for (version, address), at in zip(host.addresses, host.places, strict=True):
            yield version, address, address, at


def _compare_own_cluster(policy: Policy, hosts: Mapping[str, ResolvedHost], document: Document, report: Report) -> None:
    """A group of the policy's own takes the place of the generated one; a host forgotten there deserves a word."""
    own = policy.groups.get(CLUSTER)
    if own is None or not hosts:
        return
    members = own if isinstance(own, list) else own.members
    if not all(isinstance(m, str) for m in members):
        return
    spans = []
    for text in members:
        try:
            entry = parse_entry(str(text).strip(), ("everyone", "loopback", "multicast"))
        except AddressError:
            return
        spans.append((entry.version, *entry.span))
    for host in hosts.values():
        if host.addresses and not any(v == w and low <= a <= high for v, a in host.addresses for w, low, high in spans):
            at = document.locate(("groups", CLUSTER), key=True)
            hint = "leave the group out: fwc makes one of all hosts"
            report.warn("host-unknown", f"no address of the host `{host.name}` is in the group `{CLUSTER}`", at, hint)


def offers(host: ResolvedHost | None, service: str, on: Iterable[str] | None) -> bool:
    """True where a host has a service: by `on`, by the catalogue's roles, or because it is a service of one's own.

    None stands for the host of a policy without `hosts`, which is all in one.
    """
    if on is not None:
        places = tuple(on)
        return any(p != "edge" for p in places) if host is None else host.name in places or any(host.plays(p) for p in places)
    known = CATALOGUE.get(service)
    if host is None or known is None or not known.roles:
        return True
    return any(host.plays(role) for role in known.roles)
