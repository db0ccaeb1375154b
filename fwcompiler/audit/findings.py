"""Findings of the audit: a stable code, how bad it is, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fwcompiler import diagnostics
from fwcompiler.audit.facts import Severity
from fwcompiler.diagnostics import Finding, Position

SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")

CODES: dict[str, str] = {
    "ami-bind": "Asterisk's manager interface listens beyond the host itself",
    "ami-permit": "a manager user whose address nothing restricts",
    "ami-secret": "a manager user with a secret from a sample, or one that is easily guessed",
    "asterisk-file": "a configuration file of Asterisk with something that its own parser refuses or passes over",
    "certificate-chain": "a certificate that this host does not trust",
    "certificate-early": "a certificate that is not valid yet",
    "certificate-expired": "a certificate that has expired",
    "certificate-expires": "a certificate that expires soon",
    "certificate-file": "a certificate file that cannot be read or holds no certificate",
    "certificate-key": "a certificate with a key or signature that browsers refuse",
    "certificate-name": "a certificate for other names than the host's",
    "certificate-none": "a TLS port that does not speak TLS",
    "certificate-stale": "a server that shows another certificate than the file it is configured with",
    "conntrack-room": "a connection table that is nearly full, or too small for the audio ports",
    "docker-bypass": "a port that rules of others hand on before the policy is asked",
    "drift": "live rules that differ from the policy",
    "external-address": "an external address in Asterisk's configuration that does not fit the host",
    "forwarding-off": "an edge whose kernel does not send packets on",
    "guests": "Asterisk takes calls from anybody who reaches its SIP port",
    "http-plain": "Asterisk's plain HTTP server listens beyond the host itself",
    "interface-missing": "an interface of an edge that the host does not have",
    "ipv6-parity": "a service that is reachable in one address family only, since its groups have no address of the other",
    "listener": "a socket that listens beyond the host itself and that no service covers",
    "local-nets": "networks that Asterisk would treat as the internet",
    "not-loaded": "no rules of fwc are loaded",
    "peer-missing": "a peer of Asterisk that is in no group of the SIP services",
    "peer-name": "a peer of Asterisk by name, which is not looked up",
    "redirect": "plain HTTP that does not end at HTTPS",
    "rp-filter": "an edge that drops packets whose answer would leave by another interface",
    "rtp-range": "Asterisk's audio ports and the policy's differ",
    "rtp-values": "a value in rtp.conf that Asterisk replaces without a word",
    "rules-before": "rules of others that change what becomes of packets",
    "sip-helper": "the kernel's SIP helper is at work",
    "sip-port": "Asterisk's SIP ports and the policy's differ",
    "strict-rtp": "Asterisk takes audio from any address",
    "two-variants": "rules of iptables-legacy and of nftables at the same time",
    "unheard": "a service that nothing listens for",
    "wss": "Asterisk's TLS port and the policy's `wss` differ",
}
"""Codes of the audit's own findings; those of the policy's warnings are in `diagnostics.CODES`."""


@dataclass(frozen=True, slots=True)
class Issue:
    """One finding. `at` is a line of the policy or of a configuration file; `place` says where in words when there is none."""

    code: str
    severity: Severity
    message: str
    at: Position | None = None
    place: str = ""
    remedy: str = ""

    @property
    def where(self) -> str:
        """The line, or the place in words."""
        return str(self.at) if self.at else self.place

    def at_least(self, severity: Severity) -> bool:
        """True where this is as bad as `severity`, or worse."""
        return SEVERITIES.index(self.severity) >= SEVERITIES.index(severity)


def of_policy(finding: Finding) -> Issue:
    """A warning about the policy as a finding of the audit."""
    severity: Severity = "error" if finding.is_error else "warning"
    return Issue(finding.code, severity, finding.message, finding.at, remedy=finding.hint)


def in_order(issues: Iterable[Issue]) -> tuple[Issue, ...]:
    """The worst first, then by code and place; the same every time, nothing twice."""
    unique = dict.fromkeys(issues)
    return tuple(sorted(unique, key=_key))


def _key(issue: Issue) -> tuple[int, str, Position, str, str]:
    return -SEVERITIES.index(issue.severity), issue.code, issue.at or Position("", 0), issue.place, issue.message


def meaning(code: str) -> str:
    """What a code stands for."""
    return CODES.get(code) or diagnostics.CODES[code]
