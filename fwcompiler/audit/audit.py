"""The audit as a whole: all checks on all facts, and the JSON of the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fwcompiler.audit import certificates
from fwcompiler.audit.agreement import agreement
from fwcompiler.audit.drawing import Lane, port_plan
from fwcompiler.audit.exposure import Matrix, exposure, matrix
from fwcompiler.audit.facts import Facts, Severity
from fwcompiler.audit.findings import SEVERITIES, Issue, in_order, of_policy
from fwcompiler.audit.host import host
from fwcompiler.audit.signalling import signalling
from fwcompiler.diagnostics import Position

if TYPE_CHECKING:
    from fwcompiler.pipeline import Compiled
    from fwcompiler.shapes import AuditShape, CertificateShape, IssueShape


@dataclass(frozen=True)
class Audit:
    """What was found, and what a reader needs beside it."""

    path: str
    name: str
    host: str
    """The host of a policy for several that this is about; empty otherwise."""
    facts: Facts
    issues: tuple[Issue, ...]
    matrix: Matrix
    plan: tuple[Lane, ...]
    certificates: tuple[certificates.Shown, ...]
    left_out: tuple[str, ...]

    def count(self, severity: Severity) -> int:
        """How many findings of one severity there are."""
        return sum(i.severity == severity for i in self.issues)

    def fails(self, at_least: str) -> bool:
        """True where a finding is as bad as that, or worse; `never`: whatever was found."""
        return at_least in SEVERITIES and any(i.at_least(at_least) for i in self.issues)


def audit(compiled: Compiled, facts: Facts) -> Audit:
    """Run every check."""
    policy = compiled.resolved
    left_out = list(facts.left_out)
    if (facts.served or facts.certificate_files) and not certificates.available():
        left_out.append("certificates: they are read with the extra `audit` (pip install 'fwcompiler[audit]')")
    if facts.served and "." not in facts.name:
        left_out.append(f"names in certificates: this host is called `{facts.name}`, without a domain (`--name` says what others call it)")
    return Audit(
        compiled.path,
        policy.name,
        policy.host.name if policy.host else "",
        facts,
        in_order(_issues(compiled, facts)),
        matrix(policy),
        port_plan(policy, facts),
        certificates.shown(facts),
        tuple(left_out),
    )


def _issues(compiled: Compiled, facts: Facts) -> Iterator[Issue]:
    policy, where = compiled.resolved, Position(compiled.path, 1)
    yield from (of_policy(finding) for finding in compiled.findings)
    yield from host(policy, facts, where)
    yield from exposure(policy, facts)
    yield from certificates.certificates(facts)
    yield from agreement(policy, facts)
    yield from signalling(policy, facts)


def issue_json(issue: Issue) -> IssueShape:
    """One finding for `audit --json`."""
    return {
        "code": issue.code,
        "severity": issue.severity,
        "message": issue.message,
        "at": str(issue.at) if issue.at else None,
        "place": issue.place,
        "remedy": issue.remedy,
    }


def audit_json(found: Audit, fail_on: str) -> AuditShape:
    """The shape of `audit --json`."""
    shown: list[CertificateShape] = [
        {
            "place": each.place,
            "subject": each.certificate.subject,
            "issuer": each.certificate.issuer,
            "names": list(each.certificate.names),
            "not_after": each.certificate.not_after.isoformat(),
            "days_left": each.certificate.days_left(found.facts.now),
            "key": each.certificate.key,
        }
        for each in found.certificates
    ]
    drift = found.facts.drift
    return {
        "policy": found.path,
        "name": found.name,
        "host": found.host or found.facts.name,
        "at": found.facts.now.isoformat(timespec="seconds"),
        "ok": not found.fails(fail_on),
        "counts": {"error": found.count("error"), "warning": found.count("warning"), "note": found.count("note")},
        "findings": [issue_json(issue) for issue in found.issues],
        "exposure": [
            {"who": row.who, "size": row.size, "reaches": dict(zip((c.label for c in found.matrix.columns), row.cells, strict=True))}
            for row in found.matrix.rows
        ],
        "ports": [
            {"lane": lane.title, "label": bar.label, "first": bar.span[0], "last": bar.span[1], "kind": bar.kind}
            for lane in found.plan
            for bar in lane.bars
        ],
        "certificates": shown,
        "in_sync": drift.in_sync if drift else None,
        "drift": list(drift.changes) if drift else [],
        "left_out": list(found.left_out),
    }
