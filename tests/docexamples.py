"""Runs the examples of a Markdown page and says what the page would look like with what really happened.

Two kinds of fenced blocks are alive; they are carried out in the order of the page, in one empty folder:

- ``file=NAME`` behind the language (```` ```yaml file=policy.yaml ````): the block's text is written to that file.
- ``console``: lines that begin with ``$ `` are given to a shell, what stands below each is what a terminal shows.
  A line ``[...]`` stands for any number of lines. Who is asked ``[y/N]`` answers y.

Everything runs on a terminal inside a network namespace. What differs from run to run is written in a fixed way: times,
durations, the folder (``/etc/fwc`` in the docs). ``ssh HOST COMMAND`` runs the command here, so that pages about several
hosts can be run on one.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ELISION = "[...]"
FOLDER = "/etc/fwc"
QUESTION = "[y/N] "
SSH = f"""#!/bin/sh
shift
exec sh -c "$(printf %s "$*" | sed s,{FOLDER}/,,g)"
"""

_FENCE = re.compile(r"^(?P<indent> *)`{3}(?P<info>[^`]*)$")
_CHANGING = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"), "2026-01-31T02:00:00+00:00"),
    (re.compile(r"\bin \d+\.\d s\b"), "in 0.4 s"),
    (re.compile(r"\bin (59\d|600) s\b"), "in 600 s"),
)


@dataclass(frozen=True)
class Block:
    """One fenced block: what stands behind its fence, its body without the indentation, its first line in the page."""

    info: str
    body: str
    line: int
    indent: str = ""

    def indented(self, body: str) -> str:
        """Another body as it stands in the page."""
        return "".join(f"{self.indent}{line}" if line.strip() else line for line in body.splitlines(keepends=True))

    @property
    def language(self) -> str:
        """The first word behind the fence."""
        return self.info.split()[0] if self.info.split() else ""

    @property
    def file(self) -> str | None:
        """The file that the block is, if it is one."""
        return next((word.removeprefix("file=") for word in self.info.split() if word.startswith("file=")), None)


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    return [part for part in _parts(page) if isinstance(part, Block)]


def _parts(page: str) -> Iterator[str | Block]:
    """A page cut into its lines outside of blocks, fences included, and its blocks."""
    lines = page.splitlines(keepends=True)
    start: int | None = None
    info = indent = ""
    for number, line in enumerate(lines):
        match = _FENCE.match(line.rstrip("\n"))
        if match is None:
            if start is None:
                yield line
        elif start is None:
            start, info, indent = number + 1, match["info"].strip(), match["indent"]
            yield line
        else:
            yield Block(info, "".join(each.removeprefix(indent) for each in lines[start:number]), start + 1, indent)
            yield line
            start = None


def commands(body: str) -> list[tuple[str, str]]:
    """The commands of a console block with what is said to be their output; a backslash continues a command."""
    found: list[tuple[list[str], list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif found and not found[-1][1] and found[-1][0][-1].endswith("\\"):
            found[-1][0].append(line)
        else:
            assert found, f"a console block begins with a command, not with {line!r}"
            found[-1][1].append(line)
    return [("\n".join(command), "".join(f"{line}\n" for line in output)) for command, output in found]


def run_page(page: str, folder: Path, namespace: str) -> str:
    """The page with the real output of its commands; where the page's own is right, it is kept."""
    shell = Shell(folder, namespace)
    return "".join(part if isinstance(part, str) else part.indented(_carried_out(part, shell)) for part in _parts(page))


def _carried_out(block: Block, shell: Shell) -> str:
    if block.file is not None:
        path = shell.work / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.body, encoding="utf-8")
    if block.language != "console":
        return block.body
    out: list[str] = []
    for command, expected in commands(block.body):
        real = shell.run(command)
        out.append(f"$ {command}\n{expected if says(expected, real) else elided(expected, real)}")
    return "".join(out)


def elided(expected: str, real: str) -> str:
    """New output shortened where the old one was: as many lines before and behind the elision."""
    old, new = expected.splitlines(keepends=True), real.splitlines(keepends=True)
    if old.count(f"{ELISION}\n") != 1:
        return real
    head = old.index(f"{ELISION}\n")
    tail = len(old) - head - 1
    return real if len(new) <= len(old) else "".join((*new[:head], f"{ELISION}\n", *(new[-tail:] if tail else [])))


def says(expected: str, real: str) -> bool:
    """True when the output is the expected one, any lines standing for an elision."""
    parts = [re.escape(line + "\n") if line != ELISION else "(?:.*\n)*" for line in expected.splitlines()]
    return re.fullmatch("".join(parts), real) is not None


class Shell:
    """A shell session: one folder, one namespace, `$?` kept from command to command."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self.work, self.namespace, self.code = folder / "fwc", namespace, 0
        programs = folder / "bin"
        programs.mkdir()
        self.work.mkdir()
        (programs / "ssh").write_text(SSH, encoding="ascii")
        (programs / "ssh").chmod(0o755)
        self.environment: Mapping[str, str] = {
            "PATH": os.pathsep.join((str(programs), str(Path(sys.executable).parent), "/usr/sbin", "/usr/bin", "/sbin", "/bin")),
            "HOME": str(folder),
            "USER": "admin",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "LC_ALL": "C.UTF-8",
            "FWC_STATE_DIR": str(folder / "state"),
        }

    def run(self, command: str) -> str:
        """Run one command on a terminal; returns what the terminal shows."""
        master, slave = pty.openpty()
        script = f"(exit {self.code}); {command}"
        try:
            with subprocess.Popen(
                ("ip", "netns", "exec", self.namespace, "sh", "-c", script),
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=self.work,
                env=dict(self.environment),
            ) as process:
                os.close(slave)
                shown = _watch(master)
            self.code = process.returncode
        finally:
            os.close(master)
        return self._steady(shown)

    def _steady(self, shown: str) -> str:
        shown = shown.replace(str(self.work), FOLDER)
        for pattern, text in _CHANGING:
            shown = pattern.sub(text, shown)
        return shown if not shown or shown.endswith("\n") else f"{shown}\n"


def _watch(master: int) -> str:
    """Read a terminal until nobody holds its other end, and answer questions."""
    shown, answered = b"", 0
    while True:
        try:
            more = os.read(master, 65536)
        except OSError:  # EIO: the last one let go of it
            more = b""
        if not more:
            return shown.decode().replace("\r\n", "\n")
        shown += more
        if shown.count(QUESTION.encode()) > answered:
            answered += 1
            os.write(master, b"y\n")
