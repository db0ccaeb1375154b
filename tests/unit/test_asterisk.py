"""Asterisk's configuration files, read as Asterisk reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from fwcompiler.asterisk import MAX_BYTES, Configuration, Disk, Section, TooLarge, read_configuration, rtp_ports
from fwcompiler.diagnostics import PolicyRejected
from fwcompiler.pipeline import compile_policy

EXAMPLES = Path(__file__).resolve().parents[1] / "audit" / "asterisk"


class Texts:
    """Files in memory: path -> text."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def match(self, pattern: str) -> Sequence[str]:
        """Paths that a shell pattern means."""
        return sorted(path for path in self._texts if fnmatchcase(path, pattern))

    def text(self, path: str) -> str | None:
        """Text of a file."""
        return self._texts.get(path)


def read(text: str, **more: str) -> Configuration:
    """A configuration from its text; other files of the folder by name, `_` for a dot."""
    texts = {"/a/x.conf": text, **{f"/a/{name.replace('_', '.')}": body for name, body in more.items()}}
    found = read_configuration("/a/x.conf", "/a", Texts(texts))
    assert found is not None
    return found


def values(section: Section | None) -> list[tuple[str, str]]:
    """Names and values of a section."""
    assert section is not None
    return [(s.name, s.value) for s in section.settings]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("a=1", "1"),
        ("a => 1", "1"),
        ("  a =   1 2  ", "1 2"),
        ("a=1 ; comment", "1"),
        (r"a=x\;y", "x;y"),
        ("a=1;--gone--;2", "12"),
        ("a=1;--gone", "1"),
        ("a=1;--- an ordinary comment", "1"),
        ("a=b=c", "b=c"),
        ("A=1", "1"),
        ("a=", ""),
    ],
)
def test_a_setting(line: str, value: str) -> None:
    """`=` and `=>`, comments of both kinds, escaped semicolons; names compare without case."""
    section = read(f"[s]\n{line}\n").section("S")

    assert section is not None
    assert [s.value for s in section.all("a")] == [value]


def test_block_comments_nest_and_span_lines() -> None:
    """What stands between `;--` and the matching `--;` is gone, also where another pair is inside."""
    found = read("[s]\na=1\n;-- b=2\n;-- c=3 --;\nd=4\n--; e=5\nf=6\n")

    assert values(found.section("s")) == [("a", "1"), ("e", "5"), ("f", "6")]
    assert found.notes == []


def test_an_open_block_comment_is_noted_where_it_starts() -> None:
    """The rest of the file is a comment, and somebody should know."""
    found = read("[s]\na=1\n;-- b=2\nc=3\n")

    assert values(found.section("s")) == [("a", "1")]
    assert [(n.at.line, n.refused) for n in found.notes] == [(3, False)]


def test_templates_are_inherited_and_do_not_show() -> None:
    """Inherited settings come first, so that later ones override them; templates are no sections of their own."""
    found = read("[t](!)\na=1\n[u](!,t)\nb=2\n[v](u)\na=3\n[w](t, v)\n")

    assert [s.name for s in found.visible()] == ["v", "w"]
    assert values(found.section("v")) == [("a", "1"), ("b", "2"), ("a", "3")]
    assert values(found.section("w")) == [("a", "1"), ("a", "1"), ("b", "2"), ("a", "3")]
    section = found.section("v")
    assert section is not None
    assert section.last("a") == section.settings[2]
    assert section.first("a") == section.settings[0]


def test_adding_to_a_section() -> None:
    """`[x](+)` goes on with the section, `+=` with the value."""
    found = read("[x]\na=1\n[y]\nb=2\n[x](+)\nc=3\na+=0\nd += 9\n")

    assert values(found.section("x")) == [("a", "10"), ("c", "3"), ("d", "9")]


def test_sections_of_one_name_stay_apart() -> None:
    """pjsip.conf has an endpoint, an aor and an auth under one name; a type may come from a template."""
    found = read("[o](!)\ntype=aor\n[a]\ntype=endpoint\n[a](o)\ncontact=sip:192.0.2.1\n")

    assert [values(s) for s in found.of_type("aor")] == [[("type", "aor"), ("contact", "sip:192.0.2.1")]]
    assert len(found.of_type("endpoint")) == 1


def test_includes_are_relative_to_the_folder_and_take_patterns() -> None:
    """Included settings belong to the section that is open; places name the included file."""
    found = read('[s]\n#include "inc*.conf"\n#tryinclude <nothing.conf>\nb=2\n', inc1_conf="a=1\n[t]\nc=3\n", inc2_conf="d=4\n")

    assert values(found.section("s")) == [("a", "1"), ("b", "2")]
    assert values(found.section("t")) == [("c", "3"), ("d", "4")]
    section = found.section("s")
    assert section is not None
    assert str(section.settings[0].at) == "/a/inc1.conf:1:1"
    assert found.notes == []


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{a,b}.conf", "ab"),
        ("{b,a}.conf", "ba"),
        ("{a}.conf", "a"),
        ("{[a-b],c}.conf", "abc"),
        ("{a,{b,c}}.con{f,g}", "abc"),
        ("{c,}a.conf", "a"),
        ("*{.conf,.none}", "abcx"),
    ],
)
def test_braces_in_includes(pattern: str, names: str) -> None:
    """`{a,b}` stands for both, one after the other, as glob(3) with GLOB_BRACE has it."""
    texts = {f"/a/{name}.conf": f"{name}=1\n" for name in "abc"} | {"/a/x.conf": "x=1\n", "/b/y.conf": f"[s]\n#include {pattern}\n"}
    found = read_configuration("/b/y.conf", "/a", Texts(texts))

    assert found is not None
    assert (found.notes, "".join(name for name, _ in values(found.section("s")))) == ([], names)


@pytest.mark.parametrize("pattern", ["{a,b.conf", "a},b.conf", "\\{a,b\\}.conf", "{a,b}" * 400, "{" * 3000, "{a," * 2000 + "}" * 2000])
def test_braces_that_lead_nowhere(pattern: str) -> None:
    """Open and escaped braces are no braces, and nobody waits for patterns that stand for millions."""
    found = read(f"[s]\n#include {pattern}\n", a_conf="a=1\n", b_conf="b=1\n")

    assert [(n.at.line, n.refused) for n in found.notes] == [(2, True)]


def test_files_that_are_too_large(tmp_path: Path) -> None:
    """A file is read whole or not at all: settings behind a cut would be taken for not set."""
    large = tmp_path / "large.conf"
    large.write_bytes(b";" + b"\n" * (MAX_BYTES - 6) + b"[s]\n\n")
    assert Disk().text(str(large)) is not None

    large.write_bytes(b"\n" * MAX_BYTES + b"[s]\na=1\n")
    with pytest.raises(TooLarge, match="larger than 8 MiB"):
        read_configuration(str(large), str(tmp_path), Disk())
    (tmp_path / "x.conf").write_text("[s]\n#include large.conf\n", encoding="utf-8")
    found = read_configuration(str(tmp_path / "x.conf"), str(tmp_path), Disk())
    assert found is not None
    assert [(n.at.line, n.refused, "larger than 8 MiB" in n.message) for n in found.notes] == [(2, False, True)]


def test_a_policy_that_names_one_too_large(tmp_path: Path) -> None:
    """That is what is said, and nothing about ports that are not set."""
    (tmp_path / "rtp.conf").write_bytes(b"[general]\n" + b"\n" * MAX_BYTES + b"rtpstart=10000\nrtpend=20000\n")
    (tmp_path / "policy.yaml").write_text("version: 1\nservices: {rtp: {from: anywhere, rtp_conf: rtp.conf}}\n", encoding="utf-8")
    with pytest.raises(PolicyRejected) as rejected:
        compile_policy(str(tmp_path / "policy.yaml"))

    assert [f.code for f in rejected.value.findings] == ["file-size"]


def test_includes_that_this_user_may_not_read() -> None:
    """What cannot be read is said at the line that includes it; Asterisk, which may read it, is not said to refuse the file."""

    class Closed(Texts):
        """Files that are there and cannot be read."""

        def match(self, pattern: str) -> Sequence[str]:
            """Whatever is asked for."""
            return [pattern]

    found = read_configuration("/a/x.conf", "/a", Closed({"/a/x.conf": "[s]\na=1\n#include secret.conf\nb=2\n"}))

    assert found is not None
    assert values(found.section("s")) == [("a", "1"), ("b", "2")]
    assert [(n.at.line, n.refused, "/a/secret.conf" in n.message) for n in found.notes] == [(3, False, True)]


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    """Names too long for a path, folders, pipes, links in a circle and bytes that no path has are no files, and stop nobody."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    names = ("x" * 6000, "y" * 6000 + "*", "a\0b", "a\0*", "folder", "circle", "pipe", "[[[*")
    for name in names:
        (tmp_path / "x.conf").write_text(f"[s]\n#include {name}\na=1\n", encoding="utf-8")
        found = read_configuration(str(tmp_path / "x.conf"), str(tmp_path), Disk())
        assert found is not None
        assert [(n.at.line, n.refused) for n in found.notes] == [(2, True)], name
        assert values(found.section("s")) == [("a", "1")]
    assert all(Disk().text(str(tmp_path / name)) is None for name in ("folder", "circle", "pipe", "a\0b"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[s\na=1\n", 1),
        ("[s](t\n", 1),
        ("[s](t)\n", 1),
        ("[s](+)\n", 1),
        ("a=1\n[s]\n", 1),
        ("[s]\n#include gone.conf\n", 2),
        ("[s]\n#include x.conf\n", 2),
    ],
)
def test_what_asterisk_refuses(text: str, line: int) -> None:
    """A file that Asterisk does not load is noted at the line that stops it, and read on."""
    found = read(text)

    assert [n.at.line for n in found.notes if n.refused][:1] == [line]


@pytest.mark.parametrize("text", ["[s]\n#exec /bin/true\n", "[s]\n#include\n", "[s]\n#define x\n", "[s]\nword\n"])
def test_what_is_passed_over(text: str) -> None:
    """`#exec` is never run; what Asterisk passes over is noted as well."""
    assert [(n.at.line, n.refused) for n in read(text).notes] == [(2, False)]


def test_nothing_there() -> None:
    """A file that cannot be read is no configuration, not an empty one."""
    assert read_configuration("/a/x.conf", "/a", Texts({})) is None


@pytest.mark.parametrize(
    ("text", "ports", "codes"),
    [
        ("rtpstart=10000\nrtpend=14999", (10000, 14999), []),
        ("rtpstart=10000", (10000, 31000), ["required"]),
        ("", (5000, 31000), ["required", "required"]),
        ("rtpstart=20000\nrtpend=10000", (5000, 31000), ["range-order"]),
        ("rtpstart=80\nrtpend=70000", (1024, 65535), ["port-bounds", "port-bounds"]),
        ("rtpstart=10000x\nrtpend=20000", (10000, 20000), ["port"]),
        ("rtpstart=10000\nrtpstart=12000\nrtpend=20000", (10000, 20000), []),
    ],
)
def test_rtp_ports(text: str, ports: tuple[int, int], codes: list[str]) -> None:
    """The ports that Asterisk takes, and what is wrong with what the file says."""
    found = rtp_ports(read(f"[general]\n{text}\n"))

    assert (found.first, found.last) == ports
    assert [p.code for p in found.problems] == codes


@pytest.mark.parametrize(
    ("name", "ports"),
    [
        ("rtp-dialer1.conf", (10000, 14999)),
        ("rtp-dialer2.conf", (15000, 19999)),
        ("rtp-dialer3.conf", (20000, 24999)),
        ("rtp-wrong-default.conf", (10000, 20000)),
    ],
)
def test_examples_of_three_dialers(name: str, ports: tuple[int, int]) -> None:
    """The rtp.conf of three dialers behind one firewall, and one that kept the defaults."""
    found = read_configuration(str(EXAMPLES / name), str(EXAMPLES), Disk())

    assert found is not None
    taken = rtp_ports(found)
    assert ((taken.first, taken.last), taken.problems) == (ports, ())
