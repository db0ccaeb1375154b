"""Reads Asterisk's configuration files as Asterisk's own parser does, each value with its file and line.

The rules are those of Asterisk's `main/config.c`: templates, `(+)`, `+=`, `=>`, nested block comments, `#include` with
patterns, relative to the configuration folder. `#exec` is never run. What makes Asterisk refuse a file is a note here,
because the rest can still be compared. Pure but for the reader it is given.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from fwcompiler.diagnostics import Position
from fwcompiler.ports import LAST
from fwcompiler.source import LINE_END

FOLDER = "/etc/asterisk"
MAX_INCLUDES = 10
"""How deep includes go (main/config.c, MAX_INCLUDE_LEVEL)."""
MAX_FILES = 1000
"""How many files one configuration may read: files that include each other by pattern would never end."""
MAX_BYTES = 8 << 20
RTP_FIRST, RTP_LAST, RTP_LOWEST = 5000, 31000, 1024
"""The ports Asterisk takes where rtp.conf does not say, and the lowest it accepts (res_rtp_asterisk.c)."""

_TRUE = ("yes", "true", "y", "t", "1", "on")


class TooLarge(Exception):
    """A file holds more than `MAX_BYTES`."""

    def __init__(self) -> None:
        super().__init__(f"larger than {MAX_BYTES >> 20} MiB")


class Reader(Protocol):
    """Where files come from."""

    def match(self, pattern: str) -> Sequence[str]:
        """Paths of the files that a path or a shell pattern means, sorted; also of those that may be there and cannot be seen."""

    def text(self, path: str) -> str | None:
        """Text of a file; None where it cannot be read.

        Raises:
            TooLarge: it is not read in part, since what is missing would be taken for what is not set.
        """


class Disk:
    """Files as they are."""

    def match(self, pattern: str) -> Sequence[str]:
        """Paths of regular files; a pattern itself where its folder cannot be listed."""
        if not has_magic(pattern):
            return [pattern] if _may_be_file(pattern) else []
        found = [path for path in sorted(glob(pattern)) if _may_be_file(path)]  # noqa: PTH207 - patterns may be absolute
        return found or ([pattern] if _is_hidden(pattern) else [])

    def text(self, path: str) -> str | None:
        """Text of a regular file, bytes that are no UTF-8 replaced. Nobody waits for what a pipe may say."""
        try:
            if not stat.S_ISREG(Path(path).stat().st_mode):
                return None
            with Path(path).open("rb") as stream:
                raw = stream.read(MAX_BYTES + 1)
        except (OSError, ValueError):  # ValueError: a NUL byte in the path
            return None
        if len(raw) > MAX_BYTES:
            raise TooLarge
        return raw.decode("utf-8-sig", errors="replace")


def _may_be_file(path: str) -> bool:
    """True for a regular file, and where this user may not see what there is."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError as error:
        return error.errno == errno.EACCES
    except ValueError:
        return False


def _is_hidden(pattern: str) -> bool:
    """True where the folder that a pattern looks into is there and this user may not list it."""
    folder = Path(pattern).parent
    while has_magic(str(folder)):
        folder = folder.parent
    try:
        os.scandir(folder).close()
    except OSError as error:
        return error.errno == errno.EACCES
    except ValueError:
        return False
    return False


@dataclass(frozen=True, slots=True)
class Setting:
    """`name = value` at its place."""

    name: str
    value: str
    at: Position

    @property
    def on(self) -> bool:
        """The value as Asterisk reads a truth value (`ast_true`)."""
        return self.value.lower() in _TRUE


@dataclass(slots=True)
class Section:
    """`[name]`; inherited settings stand before its own. Two sections may have one name."""

    name: str
    at: Position
    template: bool = False
    settings: list[Setting] = field(default_factory=list)

    def all(self, *names: str) -> list[Setting]:
        """Every setting of these names, in order."""
        return [s for s in self.settings if s.name.lower() in names]

    def last(self, *names: str) -> Setting | None:
        """The setting that counts where later ones override earlier ones: nearly everywhere in Asterisk."""
        return next(reversed(self.all(*names)), None)

    def first(self, name: str) -> Setting | None:
        """The setting that counts where Asterisk asks for one by name (`ast_variable_retrieve`): rtp.conf."""
        return next(iter(self.all(name)), None)


@dataclass(frozen=True, slots=True)
class Note:
    """Something about a file that its settings do not show. `refused`: Asterisk does not load the file."""

    message: str
    at: Position
    refused: bool = False


@dataclass(slots=True)
class Configuration:
    """A file with all that it includes."""

    file: str
    sections: list[Section] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def visible(self) -> Iterator[Section]:
        """Sections that are no templates."""
        return (s for s in self.sections if not s.template)

    def section(self, name: str) -> Section | None:
        """The first section of a name that is no template."""
        return next((s for s in self.visible() if s.name.lower() == name.lower()), None)

    def of_type(self, kind: str) -> list[Section]:
        """Sections with `type=kind`, as pjsip.conf has them."""
        return [s for s in self.visible() if (t := s.last("type")) is not None and t.value.lower() == kind]


def read_configuration(path: str, folder: str, reader: Reader) -> Configuration | None:
    """A file with its includes, which are relative to `folder`; None where it cannot be read.

    Raises:
        TooLarge: the file itself is. An include that is gets a note.
    """
    text = reader.text(path)
    if text is None:
        return None
    parser = _Parser(path, folder, reader)
    parser.file(path, text, 1)
    return parser.configuration


class _Refused(Exception):
    """Asterisk stops reading here."""


class _Parser:
    def __init__(self, path: str, folder: str, reader: Reader) -> None:
        self.configuration = Configuration(path)
        self._folder, self._reader = folder, reader
        self._files = 1

    def file(self, path: str, text: str, level: int) -> None:
        """Read one file. Settings before its first header belong to the section that was opened last, as in Asterisk."""
        sections = self.configuration.sections
        current = sections[-1] if sections else None
        lines = _Lines(text)
        for number, column, line in lines:
            at = Position(path, number, column)
            try:
                if line[0] == "[":
                    current = self._header(line, at)
                elif line[0] == "#":
                    self._directive(line, at, level)
                else:
                    self._setting(line, at, current)
            except _Refused as refused:
                self._refuse(str(refused), at)
        if lines.opened:
            self._note(path, lines.opened, "a block comment that starts here is never closed")

    def _refuse(self, message: str, at: Position) -> None:
        """Asterisk stops at the first thing that it refuses; here the rest is read all the same."""
        if not any(note.refused for note in self.configuration.notes):
            self.configuration.notes.append(Note(f"{message}: Asterisk does not load this file", at, refused=True))

    def _note(self, path: str, number: int, message: str) -> None:
        self.configuration.notes.append(Note(message, Position(path, number)))

    def _header(self, line: str, at: Position) -> Section:
        """`[name]`, `[name](!)`, `[name](+)`, `[name](a,b)` and mixtures."""
        name, closed, rest = line[1:].partition("]")
        if not closed:
            raise _Refused("no closing `]`")
        section = Section(name, at)
        options: list[str] = []
        if rest.startswith("("):
            inner, closed, _ = rest[1:].partition(")")
            if not closed:
                raise _Refused("no closing `)`")
            options = [o.strip() for o in inner.split(",")]
        appended = next((o for o in options if o == "+" or o.startswith("+")), None)
        if appended is not None:
            section = self._known(name, "added to")
        for option in options:
            if option == "!":
                section.template = True
            elif option and not option.startswith("+") and "=" not in option:
                section.settings += self._known(option, "inherited from").settings
        if appended is None:
            self.configuration.sections.append(section)
        return section

    def _known(self, name: str, what: str) -> Section:
        found = next((s for s in reversed(self.configuration.sections) if s.name.lower() == name.lower()), None)
        if found is None:
            raise _Refused(f"there is no section `{name}` that could be {what}")
        return found

    def _directive(self, line: str, at: Position, level: int) -> None:
        word, *rest = line[1:].split(maxsplit=1)
        name = _unquoted(rest[0].strip()) if rest else ""
        match word.lower():
            case "include" | "tryinclude" if name:
                self._include(name, at, level, optional=word.lower() == "tryinclude")
            case "exec":
                self._note(at.file, at.line, f"`#exec {name}` is not run: what it would add is not looked at")
            case _:
                self._note(at.file, at.line, f"`#{word}` is nothing that Asterisk knows" if name else f"`#{word}` names no file")

    def _include(self, name: str, at: Position, level: int, *, optional: bool) -> None:
        if level >= MAX_INCLUDES:
            raise _Refused(f"includes go deeper than {MAX_INCLUDES} levels")
        if self._files > MAX_FILES:
            raise _Refused(f"more than {MAX_FILES} files are included")
        pattern = name if name.startswith("/") else f"{self._folder}/{name}"
        paths = [path for each in _braced(pattern) for path in self._reader.match(each)]
        if not paths and not optional:
            raise _Refused(f"`#include {name}`: there is no such file")
        self._files += len(paths)
        for path in paths:
            try:
                text = self._reader.text(path)
            except TooLarge as error:
                self._note(at.file, at.line, f"{path} is included and is {error}: what it adds is not looked at")
                continue
            if text is None:
                self._note(at.file, at.line, f"{path} is included and cannot be read here: what it adds is not looked at")
            else:
                self.file(path, text, level + 1)

    def _setting(self, line: str, at: Position, current: Section | None) -> None:
        if current is None:
            raise _Refused("a setting before the first `[section]`")
        escaped = line[0] == "\\"
        line = line[escaped:]
        name, equals, value = line.partition("=")
        if not equals:
            self._note(at.file, at.line, "no `=` in this line: Asterisk passes over it")
            return
        if name.endswith("+") and len(name) > 1:
            name, value = name[:-1].strip(), value.strip()
            before = next((i for i in range(len(current.settings) - 1, -1, -1) if current.settings[i].name == name), None)
            if before is not None:
                current.settings[before] = Setting(name, current.settings[before].value + value, at)
                return
        else:
            name, value = name.strip(), value.removeprefix(">").strip()
        if name:
            current.settings.append(Setting(name, value, at))


def _braced(pattern: str) -> list[str]:
    """The patterns that one with `{a,b}` stands for, in order: Asterisk's includes go through glob(3) with GLOB_BRACE.

    As there, a brace that is never closed is no brace, and neither is anything behind it.
    """
    found: list[str] = []
    left = [pattern]
    for _ in range(MAX_FILES):
        if not left:
            return found
        each = left.pop()
        borders = _first_brace(each)
        if borders is None:
            found.append(each)
        else:
            before, behind = each[: borders[0]], each[borders[-1] + 1 :]
            left += reversed([f"{before}{each[low + 1 : high]}{behind}" for low, high in pairwise(borders)])
    if left:
        raise _Refused(f"a pattern stands for more than {MAX_FILES} others")
    return found


def _first_brace(pattern: str) -> list[int] | None:
    """Where the first brace opens, its alternatives part, and it closes."""
    borders: list[int] = []
    depth = i = 0
    while i < len(pattern):
        letter = pattern[i]
        if letter == "\\":
            i += 1
        elif letter == "{":
            depth += 1
            borders += [i] if depth == 1 else []
        elif depth == 1 and letter in ",}":
            borders.append(i)
            if letter == "}":
                return borders
        elif letter == "}" and depth:
            depth -= 1
        i += 1
    return None


def _unquoted(text: str) -> str:
    closing = {'"': '"', "<": ">"}.get(text[:1])
    return text[1:-1] if closing and len(text) > 1 and text.endswith(closing) else text


class _Lines:
    """The lines of a file without comments: number, column and text of those that say something.

    `;` starts a comment, `\\;` is a semicolon, `;--` and `--;` enclose a block and nest; `;---` is an ordinary comment.
    """

    def __init__(self, text: str) -> None:
        self.opened = 0
        self._depth = 0
        self._text = text

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        for number, raw in enumerate(LINE_END.split(self._text), 1):
            before = self._depth
            line = self._kept(raw)
            if self._depth > before and not before:
                self.opened = number
            elif not self._depth:
                self.opened = 0
            if line.strip():
                yield number, len(raw) - len(raw.lstrip()) + 1, line.strip()

    def _kept(self, raw: str) -> str:
        """What of one line is outside of comments."""
        kept: list[str] = []
        start: int | None = None if self._depth else 0
        search = 0
        while (i := raw.find(";", search)) >= 0:
            before, search = search, i + 1
            if i > before and raw[i - 1] == "\\":
                if start is not None:
                    kept.append(raw[start : i - 1])
                    start = i
            elif raw[i + 1 : i + 3] == "--" and raw[i + 3 : i + 4] != "-":
                if start is not None:
                    kept.append(raw[start:i])
                    start = None
                self._depth += 1
                search = i + 3
            elif self._depth and i >= before + 2 and raw[i - 2 : i] == "--":
                self._depth -= 1
                start = start if self._depth else i + 1
            elif not self._depth:
                kept.append(raw[start:i])
                return "".join(kept)
        return "".join(kept) if start is None else "".join((*kept, raw[start:]))


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a value is not what its author meant. `code` is one of `diagnostics.CODES`."""

    code: str
    message: str
    at: Position
    hint: str


@dataclass(frozen=True, slots=True)
class RtpPorts:
    """The ports that Asterisk takes for audio, whatever is wrong with what rtp.conf says about them."""

    first: int
    last: int
    at: Position
    problems: tuple[Problem, ...] = ()


def rtp_ports(configuration: Configuration) -> RtpPorts:
    """`rtpstart` and `rtpend` of rtp.conf, as Asterisk reads them: out of bounds is moved to the border, and where the
    end does not lie behind the start both defaults are taken (res_rtp_asterisk.c, rtp_reload).
    """
    general = configuration.section("general")
    at = general.at if general else Position(configuration.file, 1)
    start = general.first("rtpstart") if general else None
    end = general.first("rtpend") if general else None
    problems: list[Problem] = []
    first = _rtp_port("rtpstart", start, RTP_FIRST, at, problems)
    last = _rtp_port("rtpend", end, RTP_LAST, at, problems)
    if first >= last:
        hint = f"write the lower port first: Asterisk takes {RTP_FIRST}-{RTP_LAST} otherwise"
        problems.append(Problem("range-order", f"`rtpend` ({last}) does not lie behind `rtpstart` ({first})", end.at if end else at, hint))
        first, last = RTP_FIRST, RTP_LAST
    return RtpPorts(first, last, start.at if start else at, tuple(problems))


def _rtp_port(name: str, setting: Setting | None, default: int, at: Position, problems: list[Problem]) -> int:
    if setting is None:
        problems.append(Problem("required", f"`{name}` is not set", at, f"set it: Asterisk takes {default} otherwise"))
        return default
    digits = re.match(r"[+-]?[0-9]{1,9}", setting.value)
    value = int(digits[0]) if digits else 0
    if digits is None or digits[0] != setting.value:
        problems.append(Problem("port", f"`{setting.value[:40]}` is not a port", setting.at, f"{name}=10000"))
    elif not RTP_LOWEST <= value <= LAST:
        problems.append(
            Problem(
                "port-bounds",
                f"`{name}` ({value}) is outside {RTP_LOWEST} to {LAST}",
                setting.at,
                "choose one inside: Asterisk moves it there without a word",
            )
        )
    return max(RTP_LOWEST, min(value, LAST))
