"""The pages that people read: their examples run, their links lead somewhere, and they leave no command out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import docexamples
import kernelspace
import pytest
import typer

from fwcompiler.commands import registered

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
WRITTEN = [p for p in PAGES if "reference/" not in p and p != "docs/errors.md"]
EXAMPLES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs" / "examples").glob("*.yaml"))

NOT_RUN = (r"sh scripts/(demo|test)( .*)?", r"(python3 -m venv|/opt/fwc/bin/pip install|ln -s /opt/fwc/bin/fwc) [\w./ \[\]'-]+")
"""What a `sh` block may hold, since a test cannot run it: the two scripts, and how to install."""

SPECIAL = ("0.0.0.0/8", "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/4")
DOCUMENTATION = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")
NOBODY = [ip_network(n) for n in (*SPECIAL, *DOCUMENTATION)]


def read(page: str) -> str:
    """The text of a page, by its path below the project."""
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [p for p in WRITTEN if any(b.language == "console" for b in docexamples.blocks(read(p)))])
def test_examples_do_what_the_page_says(page: str, tmp_path: Path, netns: str, update_docs: bool) -> None:
    """Every command on a page gives exactly the output that stands below it, when run in order on a fresh host."""
    text = read(page)
    kernelspace.in_named(netns, "ip", "link", "set", "lo", "up")
    real = docexamples.run_page(text, tmp_path, netns)
    if update_docs:
        (ROOT / page).write_text(real, encoding="utf-8")
    else:
        assert real == text, "`pytest tests/project --update-docs` writes the real output"


@pytest.mark.parametrize("page", WRITTEN)
def test_no_shell_example_escapes_the_test(page: str) -> None:
    """A block of shell that is not run holds nothing but the scripts and the installation."""
    for block in docexamples.blocks(read(page)):
        if block.language in ("sh", "bash", "shell") and block.file is None:
            odd = [line for line in block.body.splitlines() if not any(re.fullmatch(p, line) for p in NOT_RUN)]
            assert odd == [], f"{page}:{block.line}: make it a console block, so that it is run"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link names a file that exists, and a heading that the file has."""
    outside = re.sub(r"```.*?```", "", read(page), flags=re.S)
    broken = [target for target in re.findall(r"\]\(([^)\s]+)\)", outside) if not _leads_somewhere(page, target)]
    assert broken == []


def _leads_somewhere(page: str, target: str) -> bool:
    if re.match(r"[a-z]+:", target):
        return True
    name, _, heading = target.partition("#")
    file = (ROOT / page).parent / name if name else ROOT / page
    if not file.exists():
        return False
    return not heading or heading in {_anchor(line) for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")}


def _anchor(heading: str) -> str:
    """A heading as Markdown renderers name it."""
    return re.sub(r"[^\w -]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")


def _command_names() -> list[str]:
    return sorted(typer.main.get_command(registered()).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", _command_names())
def test_every_command_is_shown_at_work(name: str) -> None:
    """Each command that exists is run in an example of at least one page."""
    shown = "\n".join(b.body for p in WRITTEN for b in docexamples.blocks(read(p)) if b.language == "console")
    assert re.search(rf"\bfwc {name}\b", shown)


@pytest.mark.parametrize("page", WRITTEN)
def test_addresses_are_nobodys(page: str) -> None:
    """Examples use private and documentation addresses only, so that nobody pastes a stranger into a firewall."""
    assert [a for a in _addresses(read(page)) if not any(a in network for network in NOBODY)] == []


def _addresses(text: str) -> Iterator[object]:
    for found in re.findall(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)", text):
        try:
            yield ip_address(found)
        except ValueError:
            continue


@pytest.mark.parametrize("policy", EXAMPLES)
def test_example_policies_are_good(policy: str, tmp_path: Path, netns: str) -> None:
    """Every policy in docs/examples is accepted without a warning, by the kernel as well."""
    shell = docexamples.Shell(tmp_path, netns)
    said = shell.run(f"fwc check {ROOT / policy}")
    assert shell.code == 0, said
    assert "warning" not in said


def test_an_elision_stands_for_lines_and_nothing_less() -> None:
    """`[...]` covers whole lines, none included; all other text has to be the same."""
    assert docexamples.says("a\n[...]\nz\n", "a\nb\nc\nz\n")
    assert docexamples.says("a\n[...]\nz\n", "a\nz\n")
    assert not docexamples.says("a\n[...]\nz\n", "a\nb\n")
    assert not docexamples.says("a\n", "a\nb\n")


def test_a_wrong_output_is_replaced_by_the_real_one(tmp_path: Path, netns: str) -> None:
    """The runner keeps what is right, corrects what is wrong, and remembers files and exit codes between commands."""
    page = "```text file=a/b.txt\nhello\n```\n\n```console\n$ cat a/b.txt\nbye\n$ false\n$ echo $?\n1\n```\n"
    assert docexamples.run_page(page, tmp_path, netns) == page.replace("bye", "hello")
