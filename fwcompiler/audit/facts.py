"""What the audit knows about a host. Every part may be missing; `left_out` then says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from fwcompiler.addresses import Addresses, Range, Ranges
from fwcompiler.asterisk import Configuration
from fwcompiler.diagnostics import Finding

if TYPE_CHECKING:
    from fwcompiler.kernel.hostfacts import Routing
    from fwcompiler.kernel.sockets import Listener

ASTERISK_FILES = ("rtp.conf", "http.conf", "sip.conf", "pjsip.conf", "manager.conf")


@dataclass(frozen=True, slots=True)
class OwnAddress:
    """An address of one of the host's interfaces."""

    version: int
    address: int
    interface: str
    wide: bool
    """Reachable from elsewhere: of global scope, not the loopback interface's and not link-local."""


@dataclass(frozen=True, slots=True)
class Conntrack:
    """The connection table: entries now, room, and seconds that an unanswered UDP entry stays."""

    count: int
    room: int
    udp_timeout: int


@dataclass(frozen=True, slots=True)
class Helper:
    """The kernel's SIP helper: loaded, given to every packet to 5060 by itself, or by the rules named here."""

    loaded: bool
    automatic: bool
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Served:
    """What a TLS port shows: the chain as DER, leaf first; `distrust` is why this host does not trust it, or empty.

    `error`: it was not possible to talk TLS there.
    """

    port: int
    where: str
    chain: tuple[bytes, ...] = ()
    distrust: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What plain HTTP says: every hop with its status and where it leads. `error`: nothing could be asked."""

    port: int
    where: str
    hops: tuple[tuple[str, int, str], ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Published:
    """A port that a rule of others hands on to another address, past the host's own input rules."""

    protocol: str
    span: Range
    to: str
    by: str


@dataclass(frozen=True, slots=True)
class Changed:
    """What a rule of others changes about packets, in words with the rule. `opens`: it lets in what this policy keeps out, for certain;
    `ports`: which of its ports it hands on to another address then.
    """

    text: str
    opens: bool = False
    ports: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """What packet filters hold besides ours."""

    legacy: int = 0
    """Rules of iptables-legacy, both families."""
    nft: int = 0
    """Rules of iptables-nft and tables of nftables."""
    published: tuple[Published, ...] = ()
    meddling: tuple[Changed, ...] = ()


@dataclass(frozen=True, slots=True)
class Drift:
    """The live rules against the policy's: what an apply would change."""

    loaded: bool
    in_sync: bool
    changes: tuple[str, ...] = ()
    access: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CertificateFile:
    """A certificate file that a configuration names; `error`: it cannot be read."""

    path: str
    named_by: str
    port: int = 0
    content: bytes = b""
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """All of it. None: not known, and `left_out` says why."""

    name: str = ""
    now: datetime = field(default_factory=lambda: datetime.fromtimestamp(0))
    asterisk_folder: str = ""
    asterisk: Mapping[str, Configuration] = field(default_factory=dict)
    asterisk_unread: frozenset[str] = frozenset()
    """Files of Asterisk's that are there and could not be read."""
    addresses: tuple[OwnAddress, ...] | None = None
    listeners: tuple[Listener, ...] | None = None
    local_ports: Range | None = None
    conntrack: Conntrack | None = None
    helper: Helper | None = None
    served: tuple[Served, ...] | None = None
    certificate_files: tuple[CertificateFile, ...] = ()
    answers: tuple[Answer, ...] | None = None
    rules: Rules | None = None
    drift: Drift | None = None
    routing: Routing | None = None
    """Of an edge only."""
    locked_out: tuple[Finding, ...] | None = None
    """Who is logged in by SSH and could not log in again, each with the policy's line."""
    resolved_names: Mapping[str, Addresses] = field(default_factory=dict)
    members: Mapping[str, Addresses] = field(default_factory=dict)
    """Members of dynamic groups at present."""
    left_out: tuple[str, ...] = ()

    def own(self, version: int) -> Ranges:
        """The host's addresses of one family that others can reach."""
        return tuple((a.address, a.address) for a in self.addresses or () if a.wide and a.version == version)


Severity = Literal["note", "warning", "error"]
