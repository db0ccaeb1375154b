"""Rejected policies: every file in `rejected/`, with the exact words on standard error and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases.loader import all_rejected, load_case, update_case

from fwcompiler import cli


@pytest.mark.parametrize("path", all_rejected(), ids=lambda path: path.stem)
def test_rejected(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], update_cases: bool
) -> None:
    """A wrong policy is refused with its place, its line, a caret and a hint; nothing is printed as if it were good."""
    case = load_case(path)
    folder = tmp_path / "case"
    folder.mkdir()
    case.write_inputs(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FWC_STATE_DIR", str(tmp_path / "state"))

    code = cli.run(case.command())
    out, err = capsys.readouterr()

    assert out == ""
    assert "Traceback" not in err
    if update_cases:
        update_case(path, {"exit": f"{code}\n", "stderr": err})
        return
    assert {"exit", "stderr"} <= set(case.sections), f"{path.name} has no expectations: run pytest tests/cases --update-cases"
    assert case.sections["stderr"].splitlines() == err.splitlines()
    assert case.sections["exit"].strip() == str(code)
