"""The record of what was applied: written whole or not at all, by one writer at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fwcompiler import state as module
from fwcompiler.diagnostics import HostRefused
from fwcompiler.ruleset import AddressSet, Ruleset
from fwcompiler.state import Record, StateDir

RULES = Ruleset(sets=(AddressSet("a.v4", 4, ((1, 9), (20, 30))), AddressSet("a.dynamic.v4", 4, timeout=60, size=9)))
RECORD = Record(
    "nftables", "/etc/fwc/p.yaml", "dialer", {"/etc/fwc/p.yaml": "version: 1\n"}, {"fwc.nft": "table\n"}, ("{}",), RULES, {"a:/l": 9}
)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """A state directory that does not exist yet."""
    return StateDir(tmp_path / "var" / "fwc")


def applied(state: StateDir, record: Record = RECORD) -> int:
    """Prepare and commit a record; its number."""
    with state.lock():
        return state.commit(state.prepare(record)).number


def test_nothing_yet(state: StateDir) -> None:
    """A directory that is not there has no generation, and asking does not make it."""
    assert (state.current(), state.numbers(), state.path.exists()) == (None, [], False)


def test_a_generation_reads_back(state: StateDir) -> None:
    """Numbers count up; the current generation, its listing, set contents and list sizes are what was written."""
    assert [applied(state), applied(state)] == [1, 2]

    current = state.current()
    assert current is not None
    assert (current.number, current.backend, current.policy, current.fingerprint) == (
        2,
        "nftables",
        "/etc/fwc/p.yaml",
        RECORD.fingerprint(),
    )
    assert state.listing(2) == ("{}",)
    assert state.contents(2) == {"a.v4": ((1, 9), (20, 30))}
    assert state.list_sizes(2) == {"a:/l": 9}
    assert (state.path / "generations" / "2" / "rendered" / "fwc.nft").read_text(encoding="utf-8") == "table\n"


def test_discarded(state: StateDir) -> None:
    """What was prepared and did not come into force leaves nothing behind, and its number is used again."""
    with state.lock():
        state.discard(state.prepare(RECORD))

    assert (state.current(), state.numbers()) == (None, [])
    assert applied(state) == 1


def test_a_crash_before_the_commit(state: StateDir) -> None:
    """A generation left half written by a crash is swept away by the next one."""
    applied(state)
    with state.lock():
        state.prepare(RECORD)

    assert state.numbers() == [1]
    assert applied(state) == 2


def test_forgotten(state: StateDir) -> None:
    """After a removal nothing is in force; the record stays, and numbers go on."""
    applied(state)

    state.forget()
    state.forget()

    assert (state.current(), state.numbers(), applied(state)) == (None, [1], 2)


def test_old_generations_go(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the newest are kept."""
    monkeypatch.setattr(module, "KEEP", 3)

    for _ in range(5):
        applied(state)

    assert state.numbers() == [3, 4, 5]


@pytest.mark.parametrize("name", ["meta.json", "listing.json", "sets.json", "lists.json"])
def test_files_are_json(state: StateDir, name: str) -> None:
    """Other programs can read the record."""
    applied(state)

    assert json.loads((state.path / "generations" / "1" / name).read_text(encoding="utf-8"))


def test_fingerprint() -> None:
    """The same for the same rules from another policy file; another one for other rules, contents or backends."""
    same = replace(RECORD, policy="/elsewhere.yaml", name="x", sources={}, listing=("other",))
    others = [
        replace(RECORD, backend="iptables-nft"),
        replace(RECORD, rendered={"fwc.nft": "table 2\n"}),
        replace(RECORD, ruleset=Ruleset(sets=(AddressSet("a.v4", 4, ((1, 9),)),))),
    ]

    assert same.fingerprint() == RECORD.fingerprint()
    assert len({r.fingerprint() for r in (RECORD, *others)}) == 4


def test_lock_names_its_holder(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second writer gives up after a while, naming the first; afterwards the lock is free."""
    monkeypatch.setattr(module, "LOCK_WAIT", 0.05)

    with state.lock(), pytest.raises(HostRefused, match=r"another fwc \(process \d+\) is at work"), state.lock():
        pass
    with state.lock():
        pass


def test_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    """A path below a file is refused in words."""
    (tmp_path / "file").touch()

    with pytest.raises(HostRefused, match="cannot write to the state directory"), StateDir(tmp_path / "file" / "x").lock():
        pass
