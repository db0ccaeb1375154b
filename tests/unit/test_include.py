"""Included files: the one that includes wins, and those that contradict each other are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwcompiler.diagnostics import Report
from fwcompiler.include import load_merged
from fwcompiler.source import Document

BASE = """version: 1
groups: {admins: [192.0.2.1], agents: [192.0.2.2]}
services: {ssh: {from: [admins]}}
tests: [{from: admins, to: tcp/22, expect: accept}]
"""


def merge(folder: Path, **files: str) -> tuple[Document | None, Report]:
    """Write files and merge what `top` includes."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    report = Report()
    return load_merged(str(folder / "top.yaml"), report), report


def test_the_including_file_wins(tmp_path: Path) -> None:
    """Groups and services are taken whole by name, tests add up, and every value keeps the place it came from."""
    top = "include: [base.yaml]\nname: dialer1\ngroups: {admins: [192.0.2.9]}\ntests: [{from: agents, to: tcp/22, expect: drop}]\n"

    document, report = merge(tmp_path, base=BASE, top=top)

    assert document is not None
    assert report.findings == []
    assert document.data["groups"] == {"admins": ["192.0.2.9"], "agents": ["192.0.2.2"]}
    assert document.data["services"] == {"ssh": {"from": ["admins"]}}
    assert [t["from"] for t in document.data["tests"]] == ["admins", "agents"]
    places = {path: (Path(at.file).name, at.line) for path, at in document.values.items()}
    assert places["groups", "admins", 0] == ("top.yaml", 3)
    assert places["groups", "agents", 0] == ("base.yaml", 2)
    assert places["tests", 0, "from"] == ("base.yaml", 4)
    assert places["tests", 1, "from"] == ("top.yaml", 4)
    assert places["version",] == ("base.yaml", 1)


def test_two_files_that_contradict(tmp_path: Path) -> None:
    """Two included files with different content under one name are a conflict that names both places."""
    other = BASE.replace("192.0.2.1", "192.0.2.7")

    _, report = merge(tmp_path, base=BASE, other=other, top="include: [base.yaml, other.yaml]\n")

    (finding,) = report.findings
    assert (finding.code, finding.at and finding.at.file) == ("include-conflict", str(tmp_path / "other.yaml"))
    assert f"`groups.admins` is defined differently in {tmp_path / 'base.yaml'}:2:" in finding.message


def test_the_including_file_settles_it(tmp_path: Path) -> None:
    """A conflict that the including file defines itself is none; nor is the same content twice."""
    other = BASE.replace("192.0.2.1", "192.0.2.7")

    settled, report = merge(tmp_path, base=BASE, other=other, top="include: [base.yaml, other.yaml]\ngroups: {admins: [192.0.2.8]}\n")
    same, second = merge(tmp_path, base=BASE, other=BASE, top="include: [base.yaml, other.yaml]\n")

    assert (report.findings, second.findings) == ([], [])
    assert settled is not None
    assert settled.data["groups"]["admins"] == ["192.0.2.8"]
    assert same is not None


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"top": "include: [top.yaml]\n"}, "include-cycle"),
        ({"top": "include: [a.yaml]\n", "a": "include: [b.yaml]\n", "b": "include: [./a.yaml]\n"}, "include-cycle"),
        ({"top": "include: [nowhere.yaml]\n"}, "file-missing"),
        ({"top": "include: [a.yaml]\n", "a": "- 1\n"}, "type"),
        ({"top": "include: [a.yaml]\n", "a": "a: [\n"}, "yaml"),
    ],
)
def test_refused(tmp_path: Path, files: dict[str, str], code: str) -> None:
    """A file that includes itself, also on the way round, one that is missing, and one that is no mapping are refused."""
    _, report = merge(tmp_path, **files)

    assert code in [f.code for f in report.findings]


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    """An include in a subfolder includes its own neighbours; one file may be reached twice."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("include: [b.yaml]\n", encoding="utf-8")
    (tmp_path / "sub" / "b.yaml").write_text(BASE, encoding="utf-8")

    document, report = merge(tmp_path, top="include: [sub/a.yaml, sub/b.yaml]\n")

    assert document is not None
    assert (report.findings, set(document.data["groups"])) == ([], {"admins", "agents"})
