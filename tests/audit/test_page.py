"""The page and SARIF as texts: everything escaped, nothing loaded from elsewhere, ports to scale."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from audit.facts import HEAD, POLICY, compiled, facts

from fwcompiler.audit.audit import Audit, audit
from fwcompiler.audit.drawing import Bar, Lane
from fwcompiler.audit.facts import Drift
from fwcompiler.audit.page import page
from fwcompiler.audit.sarif import sarif
from fwcompiler.audit.svg import drawing
from fwcompiler.audit.text import audit_text

EVIL = """[general]
[<img src=x onerror=alert(1)>"'`&]
host=8.8.8.8
[esc\x1b[31m]
host=9.9.9.9
"""
VOID = ("meta",)


class Checker(HTMLParser):
    """Collects the elements of a page, and what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One more element."""
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that is closed at once."""
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """The end of the innermost element."""
        assert self.open.pop() == tag


@pytest.fixture
def evil(tmp_path: Path) -> Audit:
    """An audit full of text that means something to browsers and terminals."""
    text = HEAD.replace("version: 1", 'version: 1\nname: "<script>alert(1)</script>"')
    text += 'services:\n  sip: {from: [carriers]}\n  iax2: {from: anywhere, expose: "</style><b onclick=x>&"}\n'
    drift = Drift(True, False, ("add rule <i>", *(f"line {n}" for n in range(60))), ("+ <u>",))
    return audit(compiled(tmp_path, text), facts(tmp_path, {"sip": EVIL}, drift=drift, left_out=("a <b> thing \x1b[31m",)))


def test_everything_is_escaped(evil: Audit) -> None:
    """Names out of policies and configuration files are text on the page, never elements or attributes."""
    checker = Checker()
    checker.feed(page(evil))

    assert checker.open == []
    tags = {tag for tag, _ in checker.seen}
    assert not tags & {"script", "img", "b onclick", "u", "i-", "iframe", "link", "object"}
    attributes = {name for _, attrs in checker.seen for name in attrs}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "action")}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page(evil)
    assert "&lt;img src=x onerror=alert(1)&gt;" in page(evil)


def test_nothing_is_loaded_from_elsewhere(evil: Audit) -> None:
    """No address of anything else is in the page, and its own policy forbids to load it."""
    text = page(evil)

    assert not re.search(r"(?i)@import|url\(|<link|<base", text)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text


def test_the_terminal_is_not_steered(evil: Audit) -> None:
    """Escape sequences in names are printed as question marks."""
    assert "\x1b" not in audit_text(evil, color=False, whole=True)
    assert "esc?[31m" in audit_text(evil, color=False, whole=True)


def test_long_drift_is_cut(evil: Audit) -> None:
    """A page for people shows the beginning of long lists and says how much there is."""
    assert "and 21 more lines" in page(evil)
    assert "line 59" not in page(evil)


def test_an_audit_without_findings(tmp_path: Path) -> None:
    """A good host's page says so, and leaves out what nothing is known about."""
    good = re.sub("  bad: .*\n", "", POLICY)
    text = page(audit(compiled(tmp_path, good), facts(tmp_path, drift=Drift(True, True))))

    assert "In order. Nothing was found." in text
    assert "The kernel holds exactly this policy." in text
    assert "Not looked at" not in text


def test_ports_are_to_scale() -> None:
    """Twice as many ports are twice as wide, bars begin where their first port is, and labels do not overlap."""
    small, large = Bar("a", (10000, 14999), "public"), Bar("b", (20000, 29999), "local")
    text = drawing((Lane("x", (small, large)),))
    bars = [(float(x), float(w)) for x, w in re.findall(r'<rect class="\w+" x="([\d.]+)" y="\d+" width="([\d.]+)"', text)]

    (x1, w1), (x2, w2) = bars
    assert abs(w2 - 2 * w1) < 0.2
    assert abs((x2 - x1) - 2 * w1) < 0.2


def test_labels_do_not_overlap() -> None:
    """Many services on low ports: each has its label, side by side, on as many lines as it takes, inside the drawing."""
    bars = tuple(Bar(f"service-{n}", (n, n), "restricted", f"tcp/{n}") for n in range(22, 9000, 300))
    text = drawing((Lane("x", bars),))
    labels = [(float(x), float(y), t) for x, y, t in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">(service[^<]+)</text>', text)]

    assert len(labels) == len(bars)
    for line in {y for _, y, _ in labels}:
        row = sorted((x, x + 6 * len(t)) for x, y, t in labels if y == line)
        assert all(before[1] < after[0] for before, after in pairwise(row))
        assert row[-1][1] <= 1080


def test_sarif_of_paths_with_blanks(tmp_path: Path) -> None:
    """Paths become URI references: blanks and umlauts are encoded, absolute ones are file URIs."""
    found = audit(compiled(tmp_path, POLICY), facts(tmp_path, drift=Drift(False, False)))
    uris = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in sarif(found)["runs"][0]["results"]]

    assert uris
    assert {uri.partition("/policy")[0] for uri in uris} == {tmp_path.as_uri()}
