"""Words of iptables rules as numbers: protocols, ports, ranges, ICMP types with their codes."""

from __future__ import annotations

from ipaddress import ip_address

from fwcompiler.addresses import Range, Ranges
from fwcompiler_iptables.parse import PROTOCOL_NAMES, TYPE_NAMES

_SERVICES = {
    **{"ftp-data": 20, "ftp": 21, "ssh": 22, "telnet": 23, "smtp": 25, "domain": 53, "bootps": 67, "bootpc": 68, "tftp": 69},
    **{"http": 80, "www": 80, "kerberos": 88, "pop3": 110, "sunrpc": 111, "auth": 113, "ntp": 123, "netbios-ns": 137},
    **{"netbios-dgm": 138, "netbios-ssn": 139, "imap2": 143, "imap": 143, "snmp": 161, "snmp-trap": 162, "bgp": 179, "ldap": 389},
    **{"https": 443, "microsoft-ds": 445, "submission": 587, "ldaps": 636, "rsync": 873, "imaps": 993, "pop3s": 995},
    **{"openvpn": 1194, "mysql": 3306, "sip": 5060, "sip-tls": 5061, "postgresql": 5432, "mdns": 5353, "isakmp": 500},
    **{"syslog": 514, "printer": 515, "ipp": 631, "nfs": 2049, "svn": 3690, "rdp": 3389, "webcache": 8080, "http-alt": 8080},
}
"""Names of ports that hand-written rules use (IANA service names)."""
_TYPES = {
    4: {**TYPE_NAMES[4], "info-request": 15, "info-reply": 16, "information-request": 15, "information-reply": 16},
    6: {**TYPE_NAMES[6], "mld-listener-query": 130, "mld-listener-report": 131, "mld-listener-done": 132},
}
_CODES = {
    4: {
        **{"network-unreachable": (3, 0), "host-unreachable": (3, 1), "protocol-unreachable": (3, 2), "port-unreachable": (3, 3)},
        **{"fragmentation-needed": (3, 4), "source-route-failed": (3, 5), "network-unknown": (3, 6), "host-unknown": (3, 7)},
        **{"network-prohibited": (3, 9), "host-prohibited": (3, 10), "TOS-network-unreachable": (3, 11)},
        **{"TOS-host-unreachable": (3, 12), "communication-prohibited": (3, 13), "host-precedence-violation": (3, 14)},
        **{"precedence-cutoff": (3, 15), "network-redirect": (5, 0), "host-redirect": (5, 1), "TOS-network-redirect": (5, 2)},
        **{"TOS-host-redirect": (5, 3), "ttl-zero-during-transit": (11, 0), "ttl-zero-during-reassembly": (11, 1)},
        **{"ip-header-bad": (12, 0), "required-option-missing": (12, 1)},
    },
    6: {
        **{"no-route": (1, 0), "communication-prohibited": (1, 1), "beyond-scope": (1, 2), "address-unreachable": (1, 3)},
        **{"port-unreachable": (1, 4), "failed-policy": (1, 5), "reject-route": (1, 6), "ttl-zero-during-transit": (3, 0)},
        **{"ttl-zero-during-reassembly": (3, 1), "bad-header": (4, 0), "unknown-header-type": (4, 1), "unknown-option": (4, 2)},
    },
}
"""Names of types with a code (libipt_icmp.c, libip6t_icmp6.c)."""


class NotModelled(Exception):
    """Options outside what the reader of a module knows; the module becomes a test by name."""


def protocol_number(text: str) -> int:
    """A protocol by name or number."""
    return int(text, 0) if text[:1].isdigit() else PROTOCOL_NAMES[text.lower()]


def port_spans(text: str) -> Ranges:
    """``22``, ``1000:2000``, ``:1023``, ``1024:``, or a name of either; iptables swaps ends in the wrong order."""
    low, colon, high = text.partition(":")
    first = _port(low) if low else 0
    last = (_port(high) if high else 65535) if colon else first
    return ((min(first, last), max(first, last)),)


def _port(text: str) -> int:
    if text in _SERVICES:
        return _SERVICES[text]
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError(f"port {value} is outside 0 to 65535")
    return value


def span_of(text: str, version: int) -> Range:
    """``a-b`` or a single address."""
    low, _, high = text.partition("-")
    ends = [ip_address(low), ip_address(high or low)]
    if any(end.version != version for end in ends) or int(ends[0]) > int(ends[1]):
        raise ValueError(f"`{text}` is no range of IPv{version}")
    return int(ends[0]), int(ends[1])


def icmp_type(version: int, text: str) -> tuple[int, Range | None] | None:
    """Type, and codes where it names some; None: every type."""
    if text in ("any", "255", "255/0:255", "255/255"):
        return None
    if text in _CODES[version]:
        kind, code = _CODES[version][text]
        return kind, (code, code)
    if text in _TYPES[version]:
        return _TYPES[version][text], None
    kind_text, slash, code_text = text.partition("/")
    kind = _TYPES[version].get(kind_text, -1)
    kind = kind if kind >= 0 else int(kind_text)
    if not 0 <= kind <= 255:
        raise ValueError(f"ICMP type {kind}")
    low, colon, high = code_text.partition(":")
    return kind, (int(low), int(high if colon else low)) if slash else None
