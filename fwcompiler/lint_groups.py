"""Groups that a list names in vain, and where in the policy they are named."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from typing import Any

from fwcompiler.diagnostics import Position, Report
from fwcompiler.resolved import Resolved
from fwcompiler.source import Document, KeyPath


def covered_groups(policy: Resolved, names: Iterable[str], what: str, report: Report, document: Document, path: KeyPath) -> None:
    """A group that another one of the same list covers adds nothing, unless it has members at run time. ``path``: the list's."""
    for inner, outer in permutations(names, 2):
        small, large = policy.groups[inner], policy.groups[outer]
        if small.dynamic or not small.addresses or small.addresses - large.addresses:
            continue
        if small.addresses == large.addresses and inner > outer and not large.dynamic:
            continue
        report.warn("covered", f"`{inner}` adds nothing to {what}: all of it is in `{outer}`", entry_at(document, path, inner))


def entry_at(document: Document, path: KeyPath, name: str) -> Position:
    """Where a list names something; the list's own place where that is not known, and its key's where there is no list."""
    value: Any = document.data
    for part in path:
        value = value.get(part) if isinstance(value, dict) else value[part] if isinstance(value, list) and isinstance(part, int) else None
    if isinstance(value, list):
        for i, each in enumerate(value):
            if str(each) == name and (*path, i) in document.values:
                return document.values[*path, i]
    return document.locate(path, key=not isinstance(value, list))
