"""Findings with positions, and the three ways a run can be refused.

Every stage reports in the same form, the one compilers have taught people to read::

    policy.yaml:7:10: error[range-order]: range ends (9000) before it starts (10000)
      rtp: {ports: 10000-9000}
           ^
      hint: write the lower port first

A stage collects all of its findings in a :class:`Report` and stops once, at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

EXIT_OK = 0
EXIT_DIFFERS = 1
EXIT_USAGE = 2
EXIT_REJECTED = 3
EXIT_REFUSED = 4
EXIT_ROLLED_BACK = 5

CODES: dict[str, str] = {
    "address": "text that is no IPv4 or IPv6 address, prefix or range",
    "address-family": "a range whose ends are of different families",
    "address-mapped": "an IPv4 address written as IPv6 (::ffff:a.b.c.d)",
    "address-name": "a host name where an address is needed",
    "address-everyone": "an entry that covers every address of a family",
    "address-loopback": "an entry that covers loopback addresses",
    "address-multicast": "an entry that covers multicast addresses",
    "address-unspecified": "0.0.0.0 or ::, which is nobody's address",
    "anywhere": "`anywhere` on a service that is never public",
    "chunk-bounds": "media ports outside 1024 to 65535",
    "chunk-fit": "a chunk plan that has no room for all dialers, or nobody to give a chunk to",
    "chunk-odd": "a chunk that begins with an odd port, which is RTCP's",
    "chunk-overlap": "media ports that two dialers behind one address would share",
    "covered": "an entry that others cover, so that it says nothing",
    "duplicate-key": "the same key twice in one mapping",
    "duplicate-service": "two services that claim the same port",
    "egress": "rules for outgoing packets that keep the host from what it needs: names, time, its carriers",
    "empty-group": "a group without a single address",
    "empty-list": "a list file without a single usable address",
    "expired": "a list line whose expiry date has passed",
    "exposed": "a service that is not public and open to anywhere, with the reason the policy gives",
    "file-format": "a list file that cannot be read in the form asked for",
    "file-missing": "a file that is not there or cannot be read",
    "file-size": "a file larger than fwc is willing to read",
    "forward": "a service that cannot be forwarded to where the policy says",
    "group-unknown": "a group that is not defined",
    "group-unused": "a group that nothing names",
    "host-address": "an address that cannot be this host's",
    "host-bits": "a prefix with bits set behind its length",
    "host-role": "a host that is named for what it is not",
    "host-unknown": "a host or role that the policy does not have",
    "https-closed": "a redirect to HTTPS where no service is on its port",
    "include-conflict": "two files that define the same thing differently",
    "include-cycle": "a file that includes itself",
    "interface": "a name that cannot be that of an interface",
    "kernel": "the kernel refused the rules",
    "limit": "a limit by source on a group that is never limited, or with a rate that cannot be held",
    "list-shrink": "a list that lost more than half of its addresses since the last apply",
    "local-ports": "a restricted service on ports from which the host opens its own connections",
    "lock-out": "somebody who is logged in could not log in any more",
    "name": "a name that cannot be used for a set or a chain",
    "not-forwarded": "a service open to anywhere that the edge sends on to nobody",
    "policy-test": "an entry of `tests` that the policy does not meet",
    "port": "text that is no port, range or protocol",
    "port-bounds": "a port outside 1 to 65535",
    "range-order": "a range whose end lies before its start",
    "required": "a key that must be there",
    "service-ports": "a service that is not in the catalogue and names no ports",
    "sip-owner": "5060 without exactly one dialer that it is forwarded to",
    "swallowed": "a group whose addresses are all blocked",
    "type": "a value of the wrong type",
    "unknown-key": "a key that the policy language does not have",
    "value": "a value that is not among the allowed ones",
    "yaml": "text that is not YAML, or YAML that is refused",
    "yaml-scalar": "a YAML 1.1 boolean, octal or sexagesimal that is easily misread",
}


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a file; ``line`` and ``column`` count from 1, as editors do."""

    file: str
    line: int
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth saying, at one place. ``severity`` is ``error`` or ``warning``."""

    code: str
    message: str
    at: Position | None = None
    hint: str = ""
    severity: str = "error"

    @property
    def is_error(self) -> bool:
        """True where the finding stops the run."""
        return self.severity == "error"

    def sort_key(self) -> tuple[str, int, int, str, str]:
        """Files in order, then lines: the order a reader works through them."""
        at = self.at or Position("", 0, 0)
        return (at.file, at.line, at.column, self.code, self.message)


class Failure(Exception):
    """A run that ends early, for a reason the user can act on.

    ``exit_code`` is the contract of the command line: 2 usage, 3 policy rejected, 4 refused by host or kernel.
    """

    exit_code = EXIT_REFUSED

    def __init__(self, message: str = "", findings: Iterable[Finding] = (), hint: str = "") -> None:
        super().__init__(message or "; ".join(f.message for f in findings))
        self.message = message
        self.hint = hint
        self.findings = tuple(findings)


class PolicyRejected(Failure):
    """The policy is wrong; its findings say where. Nothing was changed."""

    exit_code = EXIT_REJECTED


class HostRefused(Failure):
    """The kernel or the host will not do it. Says whether anything was changed."""

    exit_code = EXIT_REFUSED


class Unavailable(HostRefused):
    """The host lacks a program or this user the right: nothing was refused, it could not be asked."""


class Unreadable(HostRefused):
    """Rules cannot be read, since somebody else's among them cannot be printed. `ours`: some of fwc's are known to be there."""

    def __init__(self, message: str, *, hint: str = "", ours: bool) -> None:
        super().__init__(message, hint=hint)
        self.ours = ours


class RolledBack(Failure):
    """Applied, found wanting, and put back as it was."""

    exit_code = EXIT_ROLLED_BACK


class UsageError(Failure):
    """The command line cannot be carried out as written."""

    exit_code = EXIT_USAGE


@dataclass
class Report:
    """Collects the findings of a stage. The only mutable thing the pure stages share."""

    findings: list[Finding] = field(default_factory=list)

    def error(self, code: str, message: str, at: Position | None = None, hint: str = "") -> None:
        """Add an error: the stage goes on, the run will stop at its end."""
        self._add(Finding(code, message, at, hint))

    def warn(self, code: str, message: str, at: Position | None = None, hint: str = "") -> None:
        """Add a warning: worth reading, no reason to stop."""
        self._add(Finding(code, message, at, hint, "warning"))

    def _add(self, finding: Finding) -> None:
        assert finding.code in CODES, finding.code
        if finding not in self.findings:
            self.findings.append(finding)

    @property
    def failed(self) -> bool:
        """True once an error was added."""
        return any(f.is_error for f in self.findings)

    def stop_on_error(self) -> None:
        """End of a stage.

        Raises:
            PolicyRejected: with all findings so far, sorted, when one of them is an error.
        """
        if self.failed:
            raise PolicyRejected(findings=self.sorted())

    def sorted(self) -> tuple[Finding, ...]:
        """All findings in reading order; the same every time."""
        return tuple(sorted(self.findings, key=Finding.sort_key))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word, or the empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def format_findings(findings: Iterable[Finding], *, color: bool = False) -> str:
    """Render findings for a terminal: place, message, source line, caret, hint.

    Source lines are read again from the files; one that is gone is left out.
    """
    lines: dict[str, list[str]] = {}
    return "\n".join(part for f in findings for part in _format(f, lines, color))


def _format(finding: Finding, cache: dict[str, list[str]], color: bool) -> Iterator[str]:
    bold, red, yellow, off = ("\033[1m", "\033[31m", "\033[33m", "\033[0m") if color else ("",) * 4
    tint = red if finding.is_error else yellow
    place = f"{bold}{finding.at}:{off} " if finding.at else ""
    yield f"{place}{tint}{finding.severity}[{finding.code}]{off}: {finding.message}"
    if finding.at:
        yield from _quote(finding.at, cache)
    if finding.hint:
        yield f"  hint: {finding.hint}"


def _quote(at: Position, cache: dict[str, list[str]]) -> Iterator[str]:
    if at.file not in cache:
        try:
            text = Path(at.file).read_bytes().decode("utf-8", errors="replace")
            cache[at.file] = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        except (OSError, ValueError):
            cache[at.file] = []
    lines = cache[at.file]
    if not 0 < at.line <= len(lines):
        return
    line = lines[at.line - 1].rstrip("\r").replace("\t", " ")
    start = max(0, at.column - 60)
    shown = line[start : start + 100]
    if not shown.strip():
        return
    printable = "".join(c if c.isprintable() else "?" for c in shown)
    yield f"  {printable}"
    yield "  " + " " * (at.column - 1 - start) + "^"
