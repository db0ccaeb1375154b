"""YAML as the policy language reads it: positions of everything, and no value that two readers would take differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fwcompiler.diagnostics import Position, Report
from fwcompiler.source import Document, list_lines, parse_document, read_file


def read(text: str) -> tuple[Document | None, Report]:
    """Parse text as the file p.yaml."""
    report = Report()
    return parse_document("p.yaml", text, report), report


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("5060", 5060), ("-7", -7), ("0", 0),
        ("1.5", 1.5), ("text", "text"), ('"no"', "no"), ("'010'", "010"), ("1e3", "1e3"), ("0x1F", "0x1F"), ("0o17", "0o17"),
        ("192.0.2.1", "192.0.2.1"), ("10000-20000", "10000-20000"), ("2001:db8::1", "2001:db8::1"), ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"), (".inf", ".inf"), ("=", "="), ('"22:22"', "22:22"), ("truely", "truely"),
    ],
)  # fmt: skip
def test_scalars(scalar: str, value: Any) -> None:
    """Plain scalars follow YAML 1.2; quoted ones are text."""
    document, report = read(f"a: {scalar}\n")

    assert (report.findings, document.data if document else None) == ([], {"a": value})


@pytest.mark.parametrize("scalar", ["yes", "No", "ON", "off", "y", "N", "010", "-007", "22:22", "1:30:00"])
def test_traps(scalar: str) -> None:
    """What YAML 1.1 and 1.2 read differently is an error at its place, with advice."""
    document, report = read(f"a:\n  b: {scalar}\n")

    assert document is None
    assert [(f.code, f.at, bool(f.hint)) for f in report.findings] == [("yaml-scalar", Position("p.yaml", 2, 6), True)]


@pytest.mark.parametrize(
    ("text", "line", "column", "code"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, 1, "duplicate-key"),
        ("a:\n  b: 1\n  b: 1\n", 3, 3, "duplicate-key"),
        ("a: [1\nb: 2\n", 2, 1, "yaml"),
        ("a:\n\tb: 1\n", 2, 1, "yaml"),
        ("a: !!python/object:os.system x\n", 1, 4, "yaml"),
        ("a: !ours x\n", 1, 4, "yaml"),
        ("a: *nothing\n", 1, 4, "yaml"),
        ("a: &x [*x]\n", 1, 8, "yaml"),
        ("? [a]\n: 1\n", 1, 3, "yaml"),
        ("a: 1\n---\nb: 2\n", 2, 1, "yaml"),
        ("a: " + "[" * 40 + "]" * 40 + "\n", 1, 35, "yaml"),
        ("a: [::1]\n", 1, 5, "yaml"),
        ("a: \x01\n", 1, 1, "yaml"),
    ],
)
def test_refused(text: str, line: int, column: int, code: str) -> None:
    """Duplicate keys, tags, broken anchors, tabs, a second document and deep nesting are refused at their place."""
    document, report = read(text)

    assert document is None
    assert (report.findings[0].code, report.findings[0].at and report.findings[0].at.line) == (code, line)
    assert code != "duplicate-key" or report.findings[0].at == Position("p.yaml", line, column)


def test_alias_bomb() -> None:
    """Nine levels of nine aliases end at once."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]

    document, report = read("\n".join(lines) + "\n")

    assert document is None
    assert "100,000" in report.findings[0].message


def test_aliases_are_their_anchor() -> None:
    """An anchor that is complete may be used again."""
    document, _ = read("a: &x [1, 2]\nb: *x\n")

    assert document is not None
    assert document.data == {"a": [1, 2], "b": [1, 2]}


def test_positions() -> None:
    """Every value and every key is found where an editor shows it; what a path does not have is passed over."""
    document, _ = read("groups:\n  carriers:\n    - 192.0.2.1   # one\n    - {file: a.txt}\nname: x\n")
    assert document is not None

    assert document.locate(("groups", "carriers", 0)) == Position("p.yaml", 3, 7)
    assert document.locate(("groups", "carriers", 1, "file")) == Position("p.yaml", 4, 14)
    assert document.locate(("groups", "carriers", 1, "file"), key=True) == Position("p.yaml", 4, 8)
    assert document.locate(("groups", "carriers"), key=True) == Position("p.yaml", 2, 3)
    assert document.locate(("groups", "list", "carriers", "text", 0)) == Position("p.yaml", 3, 7)
    assert document.locate(("nothing",)) == Position("p.yaml", 1, 1)


def test_list_lines() -> None:
    """Comments of both kinds, carriage returns, blanks and empty lines are no content; numbers are the file's."""
    text = "# head\r\n192.0.2.1\r\n\r\n  192.0.2.2  ; office\n;x\n192.0.2.3# y\n"

    assert list(list_lines(text)) == [(2, "192.0.2.1"), (4, "192.0.2.2"), (6, "192.0.2.3")]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"ok\nb\xe4d\n"])
def test_bytes_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    """A file that is not UTF-8 is refused with the line of the first bad byte."""
    path = tmp_path / "x"
    path.write_bytes(content)
    report = Report()

    assert read_file(str(path), report) is None
    assert report.findings[0].at == Position(str(path), content.count(b"\n", 0, content.find(b"\xe4") + 1 or 1) + 1)


def test_byte_order_mark_and_limit(tmp_path: Path) -> None:
    """A byte order mark is no content; a file over the limit is not read."""
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfabc")
    report = Report()

    assert read_file(str(path), report) == "abc"
    assert read_file(str(path), report, limit=5) is None
    assert report.findings[0].code == "file-size"
