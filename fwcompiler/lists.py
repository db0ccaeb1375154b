"""Reads list files: the forms in which carriers, administrators and black lists hand out addresses.

Plain lists hold one entry a line, with comments, notes and `expires=` dates behind it; CSV and TSV files give a
column, JSON files a path. A line that is no usable address is left out with a warning at its place, or refuses the
policy where the entry says `bad_lines: refuse`; a list without any usable entry is always an error.
"""

from __future__ import annotations

import csv
import io
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from fwcompiler.addresses import AddressError, Addresses, Entry, Range, covers, parse_entry, parse_plain
from fwcompiler.diagnostics import Finding, Position, Report, did_you_mean
from fwcompiler.policy import ListFile
from fwcompiler.source import list_lines, read_file

MAX_LIST_BYTES = 256 << 20
MAX_SHOWN = 20

_SECOND_ADDRESS = re.compile(r"(?<![\w.])(\d{1,3}(\.\d{1,3}){3}|[0-9a-fA-F]{0,4}:[0-9a-fA-F:]*:[0-9a-fA-F:]*)(?![\w.])")
_EXPIRES = re.compile(r"(?:^|\s)expires=(\S+)")


@dataclass(frozen=True, slots=True)
class AddressList:
    """What one list file says: by family its entries as ranges, in the order of the file, and their lines; and the set they make."""

    file: str
    spans: Mapping[int, Sequence[Range]]
    lines: Mapping[int, Sequence[int]]
    addresses: Addresses
    at: Position
    may_shrink: bool = False

    def line_of(self, version: int, address: int) -> int | None:
        """The first line that names an address, or a network that it is in."""
        if not covers(self.addresses.family(version), address):
            return None
        found = (line for (low, high), line in zip(self.spans[version], self.lines[version], strict=True) if low <= address <= high)
        return next(found, None)


def read_list(spec: ListFile, at: Position, today: date, report: Report) -> AddressList | None:
    """Read a list file named at ``at``, relative to the policy file there; None after an error."""
    path = str(Path(at.file).parent / spec.file)
    text = read_file(path, report, at, limit=MAX_LIST_BYTES)
    if text is None:
        return None
    cells = _cells(spec, path, text, at, report)
    if cells is None:
        return None
    reader = _Reader(path, spec, today)
    reader.read(cells)
    reader.hand_over(report)
    if not any(reader.spans.values()):
        if not any(f.is_error for f in reader.findings):
            report.error("empty-list", f"`{spec.file}` has no usable address", at, "an empty list is never read as everyone or as nobody")
        return None
    return AddressList(path, reader.spans, reader.lines, Addresses.of(reader.spans[4], reader.spans[6]), at, "shrink" in spec.allow)


class _Reader:
    """Turns numbered texts into entries, collecting what is wrong with them."""

    def __init__(self, path: str, spec: ListFile, today: date) -> None:
        self.spans: dict[int, list[Range]] = {4: [], 6: []}
        self.lines = {4: array("L"), 6: array("L")}
        self.findings: list[Finding] = []
        self._path, self._today = path, today
        self._allow = tuple(spec.allow)
        self._severity = "error" if spec.bad_lines == "refuse" else "warning"

    def read(self, cells: Iterable[tuple[int, str]]) -> None:
        allow, add, add_line = self._allow, self.spans[4].append, self.lines[4].append
        for number, text in cells:
            plain = parse_plain(text)
            if plain is not None:
                add(plain)
                add_line(number)
                continue
            try:
                entry = parse_entry(text, allow)
            except AddressError as error:
                self._with_note(number, text, error)
                continue
            self._add(entry, number, text)

    def _add(self, entry: Entry, number: int, text: str) -> None:
        self.spans[entry.version].append(entry.span)
        self.lines[entry.version].append(number)
        if entry.masked:
            self._note(number, "host-bits", f"`{text}` has host bits set, read as {entry.masked}", "warning")

    def _with_note(self, number: int, text: str, error: AddressError) -> None:
        """A line that is not an address alone: perhaps an address with a note behind it."""
        address, note = _split_note(text)
        if not note:
            return self._bad(number, error.code, error.message, error.hint)
        try:
            entry = parse_entry(address, self._allow)
        except AddressError as inner:
            return self._bad(number, inner.code, inner.message, inner.hint)
        expires = _EXPIRES.search(note)
        if _SECOND_ADDRESS.search(note):
            return self._bad(number, "address", "more than one address in a line", "write one a line")
        if expires and not self._still_valid(number, expires[1]):
            return None
        return self._add(entry, number, address)

    def _still_valid(self, number: int, text: str) -> bool:
        try:
            day = date.fromisoformat(text)
        except ValueError:
            self._bad(number, "expired", f"`{text}` is not a date", "write expires=2026-12-31")
            return False
        if day < self._today:
            self._note(number, "expired", f"expired on {day}, left out", "warning")
        return day >= self._today

    def _bad(self, number: int, code: str, message: str, hint: str) -> None:
        left_out = ", line left out" if self._severity == "warning" else ""
        if code in ("address-everyone", "address-loopback", "address-multicast"):
            hint = f"if it is meant, say `allow: [{code.removeprefix('address-')}]` where the policy names this list"
        self._note(number, code, message + left_out, self._severity, hint)

    def _note(self, number: int, code: str, message: str, severity: str, hint: str = "") -> None:
        self.findings.append(Finding(code, message, Position(self._path, number), hint, severity))

    def hand_over(self, report: Report) -> None:
        """Pass the findings on, but not thousands of them."""
        report.findings.extend(f for f in self.findings[:MAX_SHOWN] if f not in report.findings)
        rest = self.findings[MAX_SHOWN:]
        if rest:
            worst = next((f for f in rest if f.is_error), rest[0])
            report.findings.append(Finding(worst.code, f"and {len(rest)} more lines like these", worst.at, "", worst.severity))


def _split_note(text: str) -> tuple[str, str]:
    """``203.0.113.1 - 203.0.113.9 office`` -> the address part and the note behind it."""
    words = text.split()
    if len(words) >= 3 and words[1] == "-":
        return "".join(words[:3]), " ".join(words[3:]) or "-"
    return words[0], " ".join(words[1:])


def _cells(spec: ListFile, path: str, text: str, at: Position, report: Report) -> Iterator[tuple[int, str]] | None:
    suffix = Path(path).suffix.lower()
    if spec.path is not None or suffix == ".json":
        return _json_cells(spec, path, text, at, report)
    if spec.column is not None or suffix in (".csv", ".tsv"):
        return _table_cells(spec, path, text, at, report)
    return list_lines(text)


def _table_cells(spec: ListFile, path: str, text: str, at: Position, report: Report) -> Iterator[tuple[int, str]] | None:
    """Cells of one column. Comment lines may stand before the heading, as in files people annotate."""
    lines = text.splitlines()
    skipped = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith(("#", ";"))), len(lines))
    rows = csv.reader(io.StringIO("\n".join(lines[skipped:])), delimiter="\t" if path.lower().endswith(".tsv") else ",")
    heading = [cell.strip() for cell in next(rows, [])]
    if spec.column is None:
        first = next(rows, [])
        likely = next((h for h, cell in zip(heading, first, strict=False) if parse_plain(cell.strip())), "cidr")
        report.error("file-format", f"`{spec.file}` is a table: say which column", at, f"column: {likely}")
        return None
    if spec.column not in heading:
        report.error(
            "file-format",
            f"`{spec.file}` has no column `{spec.column}`",
            at,
            did_you_mean(spec.column, heading) or (f"its columns: {', '.join(heading)[:200]}" if heading else "it has no heading"),
        )
        return None
    index = heading.index(spec.column)
    return ((skipped + rows.line_num, row[index].strip()) for row in rows if len(row) > index and row[index].strip())


def _json_cells(spec: ListFile, path: str, text: str, at: Position, report: Report) -> Iterator[tuple[int, str]] | None:
    """Strings at a path such as ``regions[].signalling[]``; JSON has no lines, the first one that holds the text is named."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        report.error("file-format", f"`{spec.file}` is not JSON: {str(error).splitlines()[0]}", Position(path, getattr(error, "lineno", 1)))
        return None
    if spec.path is None:
        report.error("file-format", f"`{spec.file}` is JSON: say where the addresses are", at, "path: regions[].signalling[]")
        return None
    found = list(_walk(value, [p for p in re.split(r"\.|(?=\[\])", spec.path) if p]))
    if not found:
        report.error("file-format", f"`{spec.file}` has nothing at `{spec.path}`", at)
        return None
    where = _line_finder(text)
    return ((where(str(cell)), str(cell)) for cell in found)


def _walk(value: Any, parts: list[str]) -> Iterator[Any]:
    if not parts:
        yield value
    elif parts[0] == "[]":
        for item in value if isinstance(value, list) else []:
            yield from _walk(item, parts[1:])
    elif isinstance(value, dict) and parts[0] in value:
        yield from _walk(value[parts[0]], parts[1:])


def _line_finder(text: str) -> Any:
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        for quoted in re.findall(r'"([^"]*)"', line):
            lines.setdefault(quoted, number)
    return lambda cell: lines.get(cell, 1)
