"""The journal of dynamic members: what it adds up to, whatever a crash left of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fwcompiler import members
from fwcompiler.addresses import parse_address
from fwcompiler.members import Event, Journal, add_up, history, milliseconds_left, with_members
from fwcompiler.ruleset import AddressSet, Ruleset

ONE, TWO = "192.0.2.1", "2001:db8::2"
START = 1_000_000.0


def event(do: members.Kind, at: float = START, address: str = ONE, lasting: float | None = None, group: str = "agents") -> Event:
    """A line of the journal."""
    return Event(at, do, group, address, at + (lasting or 100) if do == "allow" else None)


def addresses(events: tuple[Event, ...]) -> list[str]:
    """Whom events are about."""
    return [e.address for e in events]


def test_allowed_until_it_expires() -> None:
    """A member stands from its `allow` to the moment that it names."""
    book = add_up([event("allow"), event("done")])

    assert [addresses(book.standing(START + t)) for t in (0, 99.9, 100)] == [[ONE], [ONE], []]


def test_unfinished_wishes() -> None:
    """A wish without an answer counts as granted, and is still to be carried out."""
    book = add_up([event("allow"), event("done"), event("revoke", START + 1), event("allow", START + 2, TWO)])

    assert addresses(book.standing(START + 3)) == [TWO]
    assert [(e.do, e.address) for e in book.unfinished] == [("revoke", ONE), ("allow", TWO)]


def test_refused_wishes() -> None:
    """What the kernel refused counts for nothing: the member has the time it had before."""
    book = add_up([event("allow"), event("done"), event("allow", START + 5, lasting=900), event("refused", START + 5)])

    assert [e.until for e in book.standing(START + 6)] == [START + 100]
    assert book.unfinished == ()


def test_history() -> None:
    """The history tells who came, went, and whose time ran out, in order, and nothing that was refused."""
    told = history(
        add_up(
            [
                event("allow", START, ONE, 10),
                event("done"),
                event("allow", START + 20, ONE, 100),
                event("done"),
                event("allow", START + 21, TWO, 100),
                event("refused", START + 21, TWO),
                event("revoke", START + 30),
                event("done", START + 30),
            ]
        ),
        START + 500,
    )

    assert [(e.at - START, e.do) for e in told] == [(0, "allow"), (10, "expire"), (20, "allow"), (30, "revoke")]


def test_clock_behind() -> None:
    """A clock that is behind after a reboot gives nobody more time than he was given."""
    assert milliseconds_left(event("allow", lasting=60), START - 1_000_000) == 60_000
    assert milliseconds_left(event("allow", lasting=60), START + 45) == 15_000


def test_given_back() -> None:
    """Recorded members go into the dynamic sets of their group and family with the time they have left, the longest if room is short."""
    ruleset = Ruleset(
        sets=(
            AddressSet("agents.v4", 4, ((1, 2),)),
            AddressSet("agents.dynamic.v4", 4, timeout=60, size=1),
            AddressSet("agents.dynamic.v6", 6, timeout=60, size=5),
        )
    )
    standing = (
        event("allow", lasting=50),
        event("allow", address="192.0.2.9", lasting=90),
        event("allow", address=TWO),
        event("allow", group="x"),
    )

    given = {s.name: s.members for s in with_members(ruleset, standing, START).sets}

    assert given == {
        "agents.v4": (),
        "agents.dynamic.v4": ((parse_address("192.0.2.9")[1], 90_000),),
        "agents.dynamic.v6": ((parse_address(TWO)[1], 100_000),),
    }


@pytest.mark.parametrize(
    "torn", [b'{"at":1,"do":"all', b"\xff\xfe", b"[]\n", b'{"at":2}\n', b'{"at":1,"do":"allow","group":"a","address":"x"}\n']
)
def test_torn_line(tmp_path: Path, torn: bytes) -> None:
    """A line that a crash tore is passed over, and what is written next does not suffer from it."""
    journal = Journal(tmp_path)
    journal.add(event("allow"))
    with journal.path.open("ab") as stream:
        stream.write(torn)

    journal.add(event("allow", START + 1, TWO))

    assert addresses(journal.read().standing(START + 2)) == [ONE, TWO]


def test_unfinished_is_read_from_the_end(tmp_path: Path) -> None:
    """However long the journal is, what a dead writer left undone is found at its end."""
    journal = Journal(tmp_path)
    for n in range(2000):
        journal.add(event("allow", START + n), replace(event("done"), at=START + n), sync=False)
    journal.add(event("revoke", START + 3000))

    assert [(e.do, e.at) for e in journal.unfinished()] == [("revoke", START + 3000)]


def test_trimmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that grew long is cut to its newest events; members that stand and wishes that are open stay."""
    monkeypatch.setattr(members, "REWRITE", 10_000)
    monkeypatch.setattr(members, "KEEP", 20)
    journal = Journal(tmp_path)
    journal.add(event("allow", START, TWO, 4e9), event("done", START, TWO))
    for n in range(200):
        journal.add(event("allow", START + n), event("done", START + n), sync=False)
    journal.add(event("revoke", START + 300))
    before = journal.path.stat().st_size

    journal.trim()

    book = journal.read()
    assert journal.path.stat().st_size < before / 4
    assert (addresses(book.standing(START)), addresses(book.unfinished)) == ([TWO], [ONE])


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a line does not fit, the journal is as it was before, and the caller is told that nothing was changed."""
    journal = Journal(tmp_path)
    journal.add(event("allow"))
    before = journal.path.read_bytes()
    monkeypatch.setattr(members.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(members.HostRefused, match="No space left on device; nothing was changed"):
        journal.add(event("allow", START + 1, TWO))

    assert journal.path.read_bytes() == before
