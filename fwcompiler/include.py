"""Merges the files that a policy includes into one document, with every position kept.

One rule: the file that includes wins over what it includes. Groups, services and hosts are taken whole, by name; so
are `block`, `trust`, `edge`, `egress` and `name`. `tests` add up. Two included files that say different things about the same entry,
without the including file settling it, are a conflict that names both places.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fwcompiler.diagnostics import Position, Report
from fwcompiler.source import Document, KeyPath, read_document

_BY_NAME = ("groups", "services", "hosts")


def load_merged(path: str, report: Report) -> Document | None:
    """Read a policy file and everything it includes; None after errors were reported."""
    return _load(path, report, None, ())


def _load(path: str, report: Report, at: Position | None, above: tuple[str, ...]) -> Document | None:
    identity = os.path.realpath(path)
    if identity in above:
        report.error("include-cycle", f"`{path}` includes itself", at, "take out one of the includes on the way")
        return None
    document = read_document(path, report, at)
    if document is None or not isinstance(document.data, dict):
        return document
    included = [_load(p, report, where, (*above, identity)) for p, where in _includes(document)]
    if not included:
        return document
    base = Document(document.file, {})
    for other in included:
        if other is not None and isinstance(other.data, dict):
            _add(base, other, document, report)
        elif other is not None:
            report.error("type", "an included file must be a mapping", other.locate(()))
    return _over(base, document)


def _includes(document: Document) -> list[tuple[str, Position]]:
    """Paths named by `include`, relative to this file; wrong types are left to the model to report."""
    names = document.data.get("include")
    if not isinstance(names, list):
        return []
    folder = Path(document.file).parent
    return [
        (os.path.normpath(folder / name), document.locate(("include", i))) for i, name in enumerate(names) if isinstance(name, str) and name
    ]


def _paths(document: Document) -> list[KeyPath]:
    """The units that are merged: `groups.NAME`, `services.NAME`, `hosts.NAME`, any other key."""
    paths: list[KeyPath] = []
    for key, value in document.data.items():
        if key in _BY_NAME and isinstance(value, dict):
            paths.extend((key, name) for name in value)
        elif key not in ("include", "tests"):
            paths.append((key,))
    return paths


def _get(document: Document, path: KeyPath) -> Any:
    value = document.data
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _add(base: Document, other: Document, settling: Document, report: Report) -> None:
    """Put an included document beside the ones before it."""
    base.texts.update(other.texts)
    for path in _paths(other):
        present = _get(base, path)
        if present is not None and not _same(base, other, path) and _get(settling, path) is None:
            first = base.locate(path, key=True)
            report.error(
                "include-conflict",
                f"`{'.'.join(map(str, path))}` is defined differently in {first}",
                other.locate(path, key=True),
                f"define it in {settling.file}, which wins over both",
            )
        _put(base, other, path)
    _append_tests(base, other)


def _same(first: Document, second: Document, path: KeyPath) -> bool:
    """Two definitions are the same if they say the same; a list file of one folder is not that of another."""
    one, two = _get(first, path), _get(second, path)
    folders = {os.path.realpath(Path(d.locate(path).file).parent) for d in (first, second)}
    return bool(one == two) and (len(folders) == 1 or not _names_file(one))


def _names_file(value: Any) -> bool:
    if isinstance(value, dict):
        return "file" in value or any(_names_file(v) for v in value.values())
    return isinstance(value, list) and any(_names_file(v) for v in value)


def _over(base: Document, top: Document) -> Document:
    """The including document laid over what it includes."""
    merged = Document(top.file, dict(base.data), dict(base.values), dict(base.keys))
    merged.values[()] = top.locate(())
    merged.texts = {**base.texts, **top.texts}
    for path in _paths(top):
        _put(merged, top, path)
    if "include" in top.data:
        _put(merged, top, ("include",))
    _append_tests(merged, top)
    return merged


def _put(target: Document, source: Document, path: KeyPath) -> None:
    """Copy one unit with its positions, replacing what was there."""
    for places in (target.values, target.keys):
        for known in [p for p in places if p[: len(path)] == path]:
            del places[known]
    if len(path) == 2:
        holder = target.data.get(path[0])
        target.data[path[0]] = {**(holder if isinstance(holder, dict) else {}), path[1]: _get(source, path)}
        target.values.setdefault(path[:1], source.locate(path[:1]))
        target.keys.setdefault(path[:1], source.locate(path[:1], key=True))
    else:
        target.data[path[0]] = source.data[path[0]]
    _copy_places(target, source, path, path)


def _append_tests(target: Document, source: Document) -> None:
    if "tests" not in source.data:
        return
    tests = source.data["tests"]
    present = target.data.get("tests")
    if not isinstance(tests, list) or not isinstance(present, list):
        if tests is not None or present is None:
            _put(target, source, ("tests",))
        return
    target.data["tests"] = present + tests
    for i in range(len(tests)):
        _copy_places(target, source, ("tests", i), ("tests", len(present) + i))


def _copy_places(target: Document, source: Document, path: KeyPath, to: KeyPath) -> None:
    size = len(path)
    for mine, theirs in ((target.values, source.values), (target.keys, source.keys)):
        mine.update({to + p[size:]: at for p, at in theirs.items() if p[:size] == path})
