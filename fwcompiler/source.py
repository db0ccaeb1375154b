"""Reads YAML into plain data and remembers where every key and value stands.

YAML 1.2 scalars (`true`, `false`, `null`, decimal numbers); what YAML 1.1 would read differently (`yes`, `on`,
`010`, `22:22`) is an error, because an operator cannot know which of the two a tool follows. The document is built from
libyaml's event stream without recursion, so neither deep nesting nor alias bombs can exhaust anything.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fwcompiler.diagnostics import Position, Report

MAX_BYTES = 32 << 20
MAX_DEPTH = 32
MAX_ALIASED = 100_000

Key = str | int
KeyPath = tuple[Key, ...]

_NOT_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that YAML does not allow (YAML 1.2.2, section 5.1)."""
LINE_END = re.compile("\r\n|\r|\n")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]+$")
_OCTAL = re.compile(r"[-+]?0[0-9]+$")
_SEXAGESIMAL = re.compile(r"[0-9]{1,5}(:[0-5]?[0-9]){1,5}$")
_WORDS: dict[str, Any] = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = frozenset(("null", "Null", "NULL", "~", ""))
_YAML11 = frozenset(("yes", "no", "on", "off", "y", "n"))


@dataclass
class Document:
    """One YAML file: ``data`` of dicts, lists, strings, numbers; positions by path of keys and indices.

    ``texts``: by file, what was read, which is not what stands there later.
    """

    file: str
    data: Any = None
    values: dict[KeyPath, Position] = field(default_factory=dict)
    keys: dict[KeyPath, Position] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def locate(self, path: KeyPath, *, key: bool = False) -> Position:
        """Place of a value, or of its key; parts of the path that the file does not have are passed over."""
        known: KeyPath = ()
        for part in path:
            if (*known, part) in self.values:
                known = (*known, part)
        places = self.keys if key and known in self.keys else self.values
        return places.get(known) or Position(self.file, 1, 1)


def read_file(path: str, report: Report, at: Position | None = None, *, limit: int = MAX_BYTES) -> str | None:
    """Text of a file, or None after an error was reported at ``at``."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode) and not Path(path).is_dir():
            raise OSError(0, "not a regular file")
        with Path(path).open("rb") as stream:
            raw = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        hint = "paths are relative to the file that names them" if at else ""
        report.error("file-missing", f"cannot read `{path}`: {reason}", at, hint)
        return None
    if len(raw) > limit:
        report.error("file-size", f"`{path}` is larger than {limit >> 20} MiB", at)
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        report.error("yaml" if at is None else "file-format", f"`{path}` is not UTF-8 text", Position(path, line))
        return None


def read_document(path: str, report: Report, at: Position | None = None) -> Document | None:
    """Parse one YAML file; None after errors were reported."""
    text = read_file(path, report, at)
    return None if text is None else parse_document(path, text, report)


def parse_document(file: str, text: str, report: Report) -> Document | None:
    """Parse YAML text that came from ``file``; None after errors were reported."""
    before = len(report.findings)
    builder = _Builder(file, report)
    builder.document.texts[file] = text
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            builder.take(event)
            if builder.stopped:
                break
    except yaml.MarkedYAMLError as error:
        unclosed = "quoted scalar" in (error.context or "")
        mark = error.context_mark if unclosed and error.context_mark else error.problem_mark or error.context_mark
        at = Position(file, mark.line + 1, mark.column + 1) if mark else Position(file, 1)
        problem = "this quote is not closed" if unclosed and "end of stream" in (error.problem or "") else error.problem or "not YAML"
        report.error("yaml", problem, at, _yaml_hint(problem, text, at))
    except (yaml.YAMLError, ValueError) as error:
        odd = _NOT_TEXT.search(text)
        line = text.count("\n", 0, odd.start()) + 1 if odd else 1
        column = odd.start() - text.rfind("\n", 0, odd.start()) if odd else 1
        report.error("yaml", str(error).splitlines()[0], Position(file, line, column), "policy files are plain UTF-8 text")
    if len(report.findings) > before and report.failed:
        return None
    return builder.document


def _yaml_hint(problem: str, text: str, at: Position) -> str:
    lines = text.split("\n")
    line = lines[at.line - 1] if at.line <= len(lines) else ""
    if "\t" in line[: at.column] or "\\t" in problem or "tab" in problem:
        return "YAML indents with spaces, not with tabs"
    if re.search(r"[\[,]\s*::", line):
        return 'an address that starts with a colon needs quotes inside brackets: ["::1"]'
    if re.search(r"[:\[,-]\s*[@`%]", line):
        return "text that starts with @, ` or % needs quotes"
    if re.search("expected (',' or|<block end>|key|node content)|did not find expected|mapping values", problem):
        return "look for a missing comma, bracket or colon, or for uneven indentation, here or on the line above"
    return ""


@dataclass
class _Frame:
    """A mapping or sequence that is still open."""

    path: KeyPath
    value: dict[str, Any] | list[Any]
    key: str | None = None
    anchor: str | None = None
    count: int = 1


class _Builder:
    """Builds a document from events, one open frame per level."""

    def __init__(self, file: str, report: Report) -> None:
        self.document = Document(file)
        self.stopped = False
        self._report = report
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._aliased = 0
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    self._stop("one file holds one policy, this is a second document", event)
            case yaml.AliasEvent():
                self._alias(event)
            case yaml.ScalarEvent():
                self._scalar(event)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._open(event)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._close()
            case _:
                pass

    def _at(self, event: yaml.Event) -> Position:
        mark = event.start_mark
        return Position(self.document.file, mark.line + 1, mark.column + 1) if mark else Position(self.document.file, 1)

    def _stop(self, message: str, event: yaml.Event, hint: str = "") -> None:
        self._report.error("yaml", message, self._at(event), hint)
        self.stopped = True

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        if len(self._stack) >= MAX_DEPTH:
            return self._stop(f"nested deeper than {MAX_DEPTH} levels", event)
        if event.tag not in (None, "!"):
            return self._stop(f"the tag {event.tag} has no meaning in a policy", event)
        if self._stack and isinstance(self._stack[-1].value, dict) and self._stack[-1].key is None:
            return self._stop("a key must be plain text", event)
        path = self._place(event)
        value: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        self._stack.append(_Frame(path, value, anchor=event.anchor))
        return None

    def _close(self) -> None:
        frame = self._stack.pop()
        if frame.anchor:
            self._anchors[frame.anchor] = (frame.value, frame.count)
        self._store(frame.value, frame.count)

    def _alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self._anchors:
            return self._stop(f"`*{event.anchor}` refers to an anchor that is not complete here", event)
        value, count = self._anchors[event.anchor]
        self._aliased += count
        if self._aliased > MAX_ALIASED:
            return self._stop("aliases that unfold to more than 100,000 values", event, "use a group or an include instead")
        self._place(event)
        self._store(value, count)
        return None

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        frame = self._stack[-1] if self._stack else None
        if frame and isinstance(frame.value, dict) and frame.key is None:
            return self._new_key(frame, event)
        if event.tag not in (None, "!"):
            return self._stop(f"the tag {event.tag} has no meaning in a policy", event)
        value = event.value if event.style else self._resolve(event)
        self._place(event)
        if event.anchor:
            self._anchors[event.anchor] = (value, 1)
        self._store(value, 1)
        return None

    def _new_key(self, frame: _Frame, event: yaml.ScalarEvent) -> None:
        key = event.value
        path = (*frame.path, key)
        if path in self.document.keys:
            first = self.document.keys[path]
            self._report.error("duplicate-key", f"`{key}` is already given in line {first.line}", self._at(event), "keep one of them")
            # What hangs below the second one is not a duplicate by itself.
            key = f"{key} (again)"
        else:
            self.document.keys[path] = self._at(event)
        frame.key = key

    def _resolve(self, event: yaml.ScalarEvent) -> Any:
        """A plain scalar's value (YAML 1.2 core schema, less its octal and hexadecimal forms)."""
        text: str = event.value
        if text in _WORDS:
            return _WORDS[text]
        if text in _NULLS:
            return None
        if _INT.match(text) and len(text) < 20:
            return int(text)
        if _FLOAT.match(text):
            return float(text)
        if text.lower() in _YAML11:
            self._trap(event, f"`{text}` is a truth value to some YAML readers and text to others", 'write true, false or "' + text + '"')
        elif _OCTAL.match(text):
            self._trap(event, f"`{text}` is octal to some YAML readers and decimal to others", "write it without leading zeros")
        elif _SEXAGESIMAL.match(text):
            self._trap(
                event, f"`{text}` is a number in base 60 to some YAML readers", "a port range is written 10000-20000; quote other text"
            )
        return text

    def _trap(self, event: yaml.ScalarEvent, message: str, hint: str) -> None:
        self._report.error("yaml-scalar", message, self._at(event), hint)

    def _place(self, event: yaml.Event) -> KeyPath:
        """Path of the value that starts here; its position is remembered."""
        path: KeyPath = ()
        if self._stack:
            frame = self._stack[-1]
            path = (*frame.path, frame.key if isinstance(frame.value, dict) else len(frame.value))  # type: ignore[arg-type]
        self.document.values.setdefault(path, self._at(event))
        return path

    def _store(self, value: Any, count: int) -> None:
        if not self._stack:
            self.document.data = value
            return
        frame = self._stack[-1]
        frame.count += count
        if isinstance(frame.value, list):
            frame.value.append(value)
        elif frame.key is not None:
            frame.value.setdefault(frame.key, value)
            frame.key = None


def list_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a list file without comments (``#`` or ``;``), blanks and carriage returns."""
    for number, line in enumerate(LINE_END.split(text), 1):
        stripped = line.strip()
        if not stripped or stripped[0] in "#;":
            continue
        if "#" in stripped or ";" in stripped:
            stripped = re.split("[#;]", stripped, maxsplit=1)[0].rstrip()
        yield number, stripped
