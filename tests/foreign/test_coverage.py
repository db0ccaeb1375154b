"""The corpus as a whole: every file can be asked about, and most rules are understood."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kernelspace
import pytest
from foreign import corpus

from fwcompiler.diagnostics import UsageError
from fwcompiler.explain import explain_listing
from fwcompiler.proof.fields import Packet

ROOT = Path(__file__).resolve().parents[2]
GOALS = {"iptables-save": 90.0, "nft": 80.0}
"""Per cent of the rules that are exact or named."""
PACKETS = (Packet(4, 0xC6336401, 17, 5060), Packet(6, 0x20010DB8 << 96, 6, 22))

pytestmark = pytest.mark.skipif(not corpus.present(), reason="the corpus is not here")


def test_no_file_breaks_a_question() -> None:
    """Whatever file of the corpus is taken for a listing, the answer is one, or a refusal in words."""
    answered = Counter[str]()
    for path in sorted(corpus.CORPUS.rglob("*")):
        if path.is_file():
            for packet in PACKETS:
                try:
                    asked = explain_listing([str(path)], packet)
                except UsageError:
                    answered["refused"] += 1
                    continue
                assert asked.text()
                assert asked.answer.verdict == "may" or asked.answer.possible == {asked.answer.verdict}
                answered[asked.answer.verdict] += 1
    assert set(answered) == {"accept", "drop", "reject", "may", "refused"}
    assert answered["may"] < answered["accept"] + answered["drop"]


def test_the_table_of_coverage_is_current_and_reaches_its_goals() -> None:
    """The script prints what the docs keep, and over all folders the goals are reached.

    Which of nft's files load depends on its version, so of that half only the goal is compared.
    """
    if not kernelspace.allowed():
        pytest.skip("needs the right to make network namespaces (root)")

    environment = {**os.environ, "PYTHON": sys.executable}
    printed = subprocess.run(
        ["sh", str(ROOT / "scripts" / "coverage-table")], capture_output=True, text=True, check=True, env=environment
    ).stdout

    kept = (ROOT / "docs" / "coverage.md").read_text()
    assert printed.split("\n## nft ")[0] == kept.split("\n## nft ")[0], "run scripts/coverage-table --write"
    assert printed.split("\n## What")[1] == kept.split("\n## What")[1]
    for name, goal in GOALS.items():
        section = printed.split(f"\n## {name} ")[1].split("\n## ")[0]
        row = re.search(r"\| \*\*all\*\* \|.*\| (\S+) % \| (\S+) % \| (\S+) % \|", section)
        assert row
        assert float(row[1]) + float(row[2]) >= goal, name
