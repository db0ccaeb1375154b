"""What a host may send: the entries of `egress`, their names resolved to ports and addresses of others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fwcompiler.addresses import NOBODY, Addresses
from fwcompiler.catalogue import ASKED, CATALOGUE, End
from fwcompiler.diagnostics import Position, Report, did_you_mean
from fwcompiler.policy import EgressEntry, EgressForm
from fwcompiler.ports import PortError, Ports, joined, parse_ports, parse_service_ports
from fwcompiler.source import Document, KeyPath

PING = ("icmp", "icmpv6")
LABEL = "egress"
"""Begins the names under which outgoing packets are counted: `egress.sip`."""


@dataclass(frozen=True, slots=True)
class Outlet:
    """One entry: packets to one of the ports `there`, or from one of the ports `here`, that go to one of the groups.

    ``groups`` is None for anywhere. ``multicast``: addresses that the service is spoken at besides.
    """

    name: str
    there: tuple[Ports, ...]
    here: tuple[Ports, ...]
    groups: tuple[str, ...] | None
    at: Position
    multicast: Addresses = NOBODY

    @property
    def label(self) -> str:
        """`egress.sip`, `egress.tcp-8443`: what it is counted under."""
        return f"{LABEL}.{self.name.replace('/', '-')}"


@dataclass(frozen=True, slots=True)
class ResolvedEgress:
    """All entries for one host; what none of them names is rejected."""

    outlets: tuple[Outlet, ...]
    at: Position

    def groups(self) -> tuple[str, ...]:
        """The groups that entries name, each once."""
        return tuple(dict.fromkeys(g for each in self.outlets for g in each.groups or ()))


@dataclass(frozen=True)
class Known:
    """Ports by name: those that the policy's services have on any host, and on the one it is resolved for."""

    anywhere: Mapping[str, tuple[Ports, ...]] = field(default_factory=dict)
    here: Mapping[str, tuple[Ports, ...]] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """All names that an entry may begin with."""
        return tuple(dict.fromkeys((*self.anywhere, *CATALOGUE, *ASKED)))

    def standard(self, name: str) -> tuple[Ports, ...] | None:
        """The ports of a name: the policy's, or else the catalogue's; None where it is none."""
        if name in self.anywhere:
            return self.anywhere[name]
        return CATALOGUE[name].ports if name in CATALOGUE else ASKED[name][0] if name in ASKED else None


class EgressReader:
    """Reads the entries of `egress`."""

    def __init__(self, document: Document, report: Report, known: Known) -> None:
        self._document, self._report, self._known = document, report, known

    def ports(self, name: str, form: EgressForm, path: KeyPath) -> tuple[tuple[Ports, ...], tuple[Ports, ...]] | None:
        """The ports there and here that an entry is about; None after an error was reported."""
        end: End = CATALOGUE[name].end if name in CATALOGUE else "there"
        found = self._named(name, path)
        own = form.ports if isinstance(form, EgressEntry) else None
        if found is None:
            return None
        if own is not None and end == "here":
            at = self._document.locate((*path, "ports"), key=True)
            hint = "other ports of this host's are said at the service"
            self._report.error("value", f"`{name}` is told by this host's own port: the other side's may be any", at, hint)
            return None
        there = self._own(own, found, path) if own is not None else found
        here = self._known.here.get(name, found)
        return (() if end == "here" else there), (here if end != "there" else ())

    def _named(self, name: str, path: KeyPath) -> tuple[Ports, ...] | None:
        found = self._known.standard(name)
        if found is not None:
            return found
        at = self._document.locate(path, key=True)
        try:
            return (parse_ports(name),)
        except PortError as error:
            hint = did_you_mean(name, self._known.names()) or "a service, `web`, `mail`, or a port: `- tcp/8443: crm`"
            wrong = error.message if "/" in name else f"`{name}` is neither a service nor a port"
            self._report.error("port" if "/" in name else "service-ports", wrong, at, error.hint if "/" in name else hint)
            return None

    def _own(self, items: str | int | list[str | int], standard: tuple[Ports, ...], path: KeyPath) -> tuple[Ports, ...]:
        """`ports` of an entry, in the forms that services have."""
        found: list[Ports] = []
        for i, item in enumerate(items if isinstance(items, list) else [items]):
            try:
                found += parse_service_ports(str(item), standard)
            except PortError as error:
                at = self._document.locate((*path, "ports", i) if isinstance(items, list) else (*path, "ports"))
                self._report.error(error.code, error.message, at, error.hint)
        return joined(found)


def entries(forms: Iterable[Mapping[str, EgressForm]]) -> Iterator[tuple[KeyPath, str, EgressForm]]:
    """Every entry with its place and the name that it begins with."""
    for i, each in enumerate(forms):
        for name, form in each.items():
            yield ("egress", i, name), name, form


def destinations(form: EgressForm) -> tuple[str | list[str], KeyPath]:
    """What an entry says of where to, and the place of that below the entry's."""
    return (form.to, ("to",)) if isinstance(form, EgressEntry) else (form, ())
