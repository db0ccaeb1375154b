"""The audit for a terminal: findings with their remedy, then what was looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fwcompiler.audit.findings import SEVERITIES
from fwcompiler.tables import table_text

if TYPE_CHECKING:
    from fwcompiler.audit.audit import Audit
    from fwcompiler.audit.findings import Issue

_TINTS = {"error": "\033[31m", "warning": "\033[33m", "note": "\033[36m"}
_CELLS = {"all": "yes", "some": "some", "none": "-"}


def audit_text(found: Audit, *, color: bool, whole: bool) -> str:
    """Everything as text; `whole`: the matrix and the certificates also where nothing is wrong with them."""
    lines = [line for issue in found.issues for line in _issue(issue, color)]
    if whole:
        lines += ["", _matrix(found, color)]
        if found.certificates:
            lines += ["", _certificates(found, color)]
    if found.left_out:
        lines += [*([""] if lines else []), "not looked at"]
        lines += [f"  {_printable(line)}" for line in found.left_out]
    counts = [f"{found.count(s)} {s}{'' if found.count(s) == 1 else 's'}" for s in reversed(SEVERITIES)]
    lines += [*([""] if lines else []), f"{found.path}: {', '.join(counts)}" if found.issues else f"{found.path}: nothing found"]
    return "\n".join(lines)


def _issue(issue: Issue, color: bool) -> Iterator[str]:
    bold, tint, off = ("\033[1m", _TINTS[issue.severity], "\033[0m") if color else ("", "", "")
    where = f"{bold}{_printable(issue.where)}:{off} " if issue.where else ""
    yield f"{where}{tint}{issue.severity}[{issue.code}]{off}: {_printable(issue.message)}"
    if issue.remedy:
        yield f"  remedy: {_printable(issue.remedy)}"


def _printable(text: str) -> str:
    """Names out of other people's files do not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _matrix(found: Audit, color: bool) -> str:
    heading = ("who", *(c.label for c in found.matrix.columns))
    return table_text(heading, [(row.who, *(_CELLS[c] for c in row.cells)) for row in found.matrix.rows], color=color)


def _certificates(found: Audit, color: bool) -> str:
    rows = [
        (s.place, ", ".join(s.certificate.names[:3]) or s.certificate.subject, str(s.certificate.days_left(found.facts.now)))
        for s in found.certificates
    ]
    return table_text(("certificate", "names", "days left"), rows, right=(2,), color=color)
