"""The audit as SARIF 2.1.0 (OASIS, Static Analysis Results Interchange Format), for code scanning in a policy's repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fwcompiler import __version__
from fwcompiler.audit.findings import meaning

if TYPE_CHECKING:
    from fwcompiler.audit.audit import Audit
    from fwcompiler.audit.findings import Issue
    from fwcompiler.diagnostics import Position

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(found: Audit) -> dict[str, Any]:
    """One run. What has no line of its own is shown at the policy's first line, since viewers pass over results without a place."""
    codes = sorted({issue.code for issue in found.issues})
    rules = [{"id": code, "shortDescription": {"text": meaning(code)}} for code in codes]
    driver = {"name": "fwc", "version": __version__, "rules": rules}
    results = [_result(issue, codes.index(issue.code), found.path) for issue in found.issues]
    invocation = {
        "executionSuccessful": True,
        "startTimeUtc": found.facts.now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "toolExecutionNotifications": [{"level": "note", "message": {"text": f"not looked at: {line}"}} for line in found.left_out],
    }
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "invocations": [invocation], "results": results}],
    }


def _result(issue: Issue, index: int, policy: str) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": _physical(issue.at, policy)}
    if issue.place:
        location["logicalLocations"] = [{"name": issue.place, "kind": "resource"}]
    remedy = f" Remedy: {issue.remedy}" if issue.remedy else ""
    return {
        "ruleId": issue.code,
        "ruleIndex": index,
        "level": issue.severity,
        "message": {"text": issue.message + remedy},
        "locations": [location],
        "partialFingerprints": {"fwcIssue/v1": f"{issue.code}:{issue.where}:{issue.message}"},
    }


def _physical(at: Position | None, policy: str) -> dict[str, Any]:
    file, line, column = (at.file, at.line, at.column) if at else (policy, 1, 1)
    return {"artifactLocation": {"uri": _uri(file)}, "region": {"startLine": max(1, line), "startColumn": max(1, column)}}


def _uri(file: str) -> str:
    """A relative reference, or `file:` where the path is absolute (RFC 8089)."""
    return Path(file).as_uri() if file.startswith("/") else quote(file)
