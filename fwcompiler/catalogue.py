"""The services a dialer host offers: their standard ports, who may use them by nature, and one sentence each.

Classes: `public` may be open to anywhere; `restricted` is for named groups (signalling, control ports); `cluster`
is for the hosts of one installation among themselves; `admin` is for administrators; `loopback` should not leave
the host at all. Only `public` services accept `from: anywhere` without a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fwcompiler.addresses import NOBODY, Addresses
from fwcompiler.ports import Ports

Class = Literal["public", "restricted", "cluster", "admin", "loopback"]
End = Literal["there", "here", "either"]
Role = Literal["edge", "dialer", "web", "database", "archive", "all-in-one"]
"""What a host is for. `all-in-one` plays every role but that of the edge; so does the host of a policy without `hosts`."""


@dataclass(frozen=True, slots=True)
class Service:
    """One catalogue entry.

    `asks`: the host also asks others *from* this port, so replies arrive on it and its source test has to stand
    after the established rule. `roles`: the hosts that offer it where a policy names several (empty: every host).
    `end`: whose port tells that a packet which this host sends belongs to it: the receiver's, this host's own (media goes
    to whatever port the other side named), or either (signalling between equals: a phone behind NAT has any port).
    `multicast`: addresses that it is spoken at, besides those of its peers.
    """

    name: str
    ports: tuple[Ports, ...]
    kind: Class
    about: str
    asks: bool = False
    roles: tuple[Role, ...] = ()
    end: End = "there"
    multicast: Addresses = NOBODY


_DIALER: tuple[Role, ...] = ("dialer",)
_WEB: tuple[Role, ...] = ("web", "dialer")
"""Dialers have web pages too: the phones' settings, recordings, the certificate's renewal."""
_DATABASE: tuple[Role, ...] = ("database",)
_ARCHIVE: tuple[Role, ...] = ("archive",)


def _udp(first: int, last: int | None = None) -> Ports:
    return Ports("udp", ((first, last or first),))


def _tcp(first: int, last: int | None = None) -> Ports:
    return Ports("tcp", ((first, last or first),))


_SERVICES = (
    Service(
        "sip",
        (_udp(5060),),
        "restricted",
        "SIP signalling over UDP: carriers, agents' phones, peer dialers (RFC 3261).",
        roles=_DIALER,
        end="either",
    ),
    Service("sip-tcp", (_tcp(5060),), "restricted", "SIP signalling over TCP (RFC 3261).", roles=_DIALER),
    Service("sips", (_tcp(5061),), "restricted", "SIP over TLS (RFC 3261).", roles=_DIALER),
    Service(
        "rtp",
        (_udp(10000, 20000),),
        "public",
        "The calls' audio; carriers send it from addresses they do not list (RFC 3550).",
        roles=_DIALER,
        end="here",
    ),
    Service(
        "udptl",
        (_udp(4000, 4999),),
        "public",
        "T.38 fax media, Asterisk's udptl.conf range, which holds iax2's 4569: give one of them other ports.",
        roles=_DIALER,
        end="here",
    ),
    Service("http", (_tcp(80),), "public", "Plain HTTP; ends at HTTPS through a redirect.", roles=_WEB),
    Service("https", (_tcp(443),), "public", "The agents' and managers' web interface.", roles=_WEB),
    Service(
        "wss", (_tcp(8089),), "restricted", "WebRTC phones: Asterisk's secure WebSocket, which is also its control port.", roles=_DIALER
    ),
    Service("ssh", (_tcp(22),), "admin", "Remote login of administrators."),
    Service("iax2", (_udp(4569),), "restricted", "IAX2 trunks between Asterisk hosts (RFC 5456).", roles=_DIALER, end="either"),
    Service("ami", (_tcp(5038),), "cluster", "Asterisk manager interface: whoever reaches it can place calls.", roles=_DIALER),
    Service("fastagi", (_tcp(4577),), "cluster", "VICIdial's FastAGI server, asked by the cluster's dialers.", roles=_DIALER),
    Service("mariadb", (_tcp(3306),), "cluster", "The cluster's database.", roles=_DATABASE),
    Service("ntp", (_udp(123),), "cluster", "Time, served to the cluster; the host asks its own servers from the same port.", asks=True),
    Service(
        "dns", (_tcp(53), _udp(53)), "cluster", "A name server for the cluster; some resolvers ask others from the same port.", asks=True
    ),
    Service(
        "vrrp",
        (Ports("vrrp"),),
        "cluster",
        "Failover of a shared address between hosts, as keepalived does it (RFC 5798).",
        multicast=Addresses.of([(0xE0000012, 0xE0000012)], [((0xFF02 << 112) + 0x12, (0xFF02 << 112) + 0x12)]),
    ),
    Service("dynportal", (_tcp(446),), "public", "ViciBox's portal where agents log in to have their address allowed.", roles=_WEB),
    Service("node-exporter", (_tcp(9100),), "cluster", "Prometheus' host metrics."),
    Service("asterisk-http", (_tcp(8088),), "loopback", "Asterisk's plain HTTP server: ARI and unencrypted WebSocket.", roles=_DIALER),
    Service("webmin", (_tcp(10000),), "admin", "Webmin's web interface."),
    Service("snmp", (_udp(161),), "cluster", "Network monitoring (RFC 3411)."),
    Service("rsync", (_tcp(873),), "cluster", "Copies of recordings to the archive host.", roles=_ARCHIVE),
    Service("ftp", (_tcp(21),), "cluster", "VICIdial's transfer of recordings to the archive host.", roles=_ARCHIVE),
    Service("dhcpv6-client", (_udp(546),), "restricted", "Answers of the network's DHCPv6 server, from its link-local address (RFC 8415)."),
    Service("stun", (_udp(3478),), "public", "STUN and TURN for WebRTC phones (RFC 8489).", roles=_DIALER),
)

CATALOGUE: dict[str, Service] = {s.name: s for s in _SERVICES}
ASKED: dict[str, tuple[tuple[Ports, ...], str]] = {
    "web": ((_tcp(80), _tcp(443)), "Web servers: updates, a CRM, certificates."),
    "mail": ((_tcp(25), _tcp(465), _tcp(587)), "Mail servers: voicemail and reports (RFC 5321, RFC 8314, RFC 6409)."),
}
"""What a host asks of others and is no service of a dialer: names for `egress` only."""
RESPONDER_PORT = 8880
"""Where `fwc responder` listens: what arrives for port 80 is redirected there, and nothing else reaches it."""
