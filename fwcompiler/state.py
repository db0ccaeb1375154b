"""What fwc remembers on a host: generations of applied policies, the trial that is pending, one writer at a time.

A generation is written whole under a temporary name before the kernel is touched, and gets its number by a rename
afterwards, so a full disk stops an apply early and a crash at any point leaves either the old or the new one.

``current`` names the last confirmed generation, the one to boot. A generation on trial has its number already, but
``trial.json`` stands for it; confirming is one rename, and returning is one removal, so neither needs room on the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fwcompiler.addresses import Ranges
from fwcompiler.contents import packed, unpacked
from fwcompiler.diagnostics import HostRefused
from fwcompiler.durable import checksum, made, read, read_texts, sync, write
from fwcompiler.kernel import session
from fwcompiler.records import Found, Generation, Note, Record, Trial

DEFAULT = "/var/lib/fwc"
KEEP = 50
LOCK_WAIT = 30.0
"""Seconds a second writer waits for the first."""
_SUMMED = ("meta.json", "listing.json", "sets.json")
"""What a boot needs of a generation."""
_OWN = ("meta.json", "changes.json", "sums.json", "unsettled", "confirmed", "returned")
"""What a generation does not share with another one that loads the same."""


class StateDir:
    """The state directory. Reading it needs nothing; whoever writes holds the lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def of(cls, path: str | None, netns: str | None) -> StateDir:
        """The directory that was named, or the host's; a network namespace has one of its own."""
        return cls(path or (DEFAULT if netns is None else f"{DEFAULT}/netns/{netns}"))

    @contextmanager
    def lock(self, what: str = "") -> Iterator[None]:
        """Be the only writer for the length of a block; `what` is said to others who wait for too long.

        Raises:
            HostRefused: the directory cannot be written, or another fwc holds the lock for long.
        """
        try:
            self._generations.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            self._wait(descriptor)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {what}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int) -> None:
        deadline = time.monotonic() + LOCK_WAIT
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder, _, what = os.pread(descriptor, 80, 0).decode(errors="replace").strip().partition(" ")
                    at_work = f"process {holder or 'unknown'}{f', fwc {what}' if what else ''}"
                    raise HostRefused(f"another fwc ({at_work}) is at work; nothing was changed") from None
                time.sleep(0.05)

    def holder(self) -> int | None:
        """The process that holds the lock, or None."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            words = os.pread(descriptor, 80, 0).split()
            return int(words[0]) if words and words[0].isdigit() else None
        finally:
            os.close(descriptor)
        return None

    @property
    def _generations(self) -> Path:
        return self.path / "generations"

    def current(self) -> Generation | None:
        """The generation in force, one on trial included, or None."""
        trial = self.trial()
        return self._readable(trial.number if trial else self._confirmed_number())

    def confirmed(self) -> Generation | None:
        """The generation to boot: the last one that is not on trial, or None."""
        return self._readable(self._confirmed_number())

    def _confirmed_number(self) -> int | None:
        try:
            return int((self.path / "current").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def _readable(self, number: int | None) -> Generation | None:
        try:
            return None if number is None else self.generation(number)
        except (OSError, ValueError):
            return None

    def is_removed(self) -> bool:
        """True where `fwc remove` was the last thing that happened."""
        return (self.path / "removed").exists()

    def generation(self, number: int | str) -> Generation:
        """One generation.

        Raises:
            OSError, ValueError: it is not there, or cannot be read.
        """
        try:
            return made(Generation, read(self._generations / str(number) / "meta.json"))
        except ValueError as error:
            raise ValueError(f"generation {number} is not readable: {error}") from error

    def numbers(self) -> list[int]:
        """Numbers of all generations, ascending."""
        try:
            return sorted(int(p.name) for p in self._generations.iterdir() if p.name.isdigit())
        except OSError:
            return []

    def listing(self, number: int | str) -> tuple[str, ...]:
        """What a scratch kernel listed for a generation, for the backend to parse."""
        return read_texts(self._generations / str(number) / "listing.json")

    def contents(self, number: int | str) -> dict[str, Ranges]:
        """Contents of a generation's static sets."""
        data = read(self._generations / str(number) / "sets.json")
        try:
            return {name: unpacked(written) for name, written in data.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"the sets of generation {number} are not readable: {error}") from error

    def list_sizes(self, number: int) -> dict[str, int]:
        """How many addresses each list file had in a generation.

        Raises:
            OSError, ValueError: that cannot be read.
        """
        sizes = read(self._generations / str(number) / "lists.json")
        if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
            raise ValueError(f"the lists of generation {number} are not readable")
        return sizes

    def prepare(self, record: Record) -> Path:
        """Write a generation under a temporary name.

        Raises:
            HostRefused: it cannot be written; the kernel was not touched.
        """
        pending = self._generations / "pending"
        try:
            shutil.rmtree(pending, ignore_errors=True)
            (pending / "rendered").mkdir(parents=True, mode=0o700)
            (pending / "policy").mkdir(mode=0o700)
            for index, (name, text) in enumerate(record.sources.items()):
                write(pending / "policy" / f"{index:03d}-{Path(name).name}", text)
            for name, text in record.rendered.items():
                write(pending / "rendered" / name, text)
            write(pending / "listing.json", json.dumps(list(record.listing)))
            write(pending / "lists.json", json.dumps(dict(record.lists)))
            contents = {name: packed(ranges) for name, ranges in record.ruleset.contents().items()}
            write(pending / "sets.json", json.dumps(contents, separators=(",", ":")))
            generation = self._describe(record)
            write(pending / "changes.json", json.dumps(list(record.note.changes)))
            write(pending / "ssh.json", json.dumps(dict(record.ssh)))
            write(pending / "meta.json", json.dumps(asdict(generation), indent=1))
            self._seal(pending, generation.number)
        except OSError as error:
            shutil.rmtree(pending, ignore_errors=True)
            raise _unwritable(self.path, error) from error
        return pending

    def prepare_again(self, number: int, note: Note) -> Path:
        """Write a recorded generation once more, as the next one.

        Raises:
            HostRefused: it cannot be written; the kernel was not touched.
        """
        pending = self._generations / "pending"
        old = self._generations / str(number)
        try:
            shutil.rmtree(pending, ignore_errors=True)
            pending.mkdir(mode=0o700)
            for path in sorted(old.rglob("*")):
                target = pending / path.relative_to(old)
                if path.is_dir():
                    target.mkdir(mode=0o700)
                elif path.name not in _OWN:
                    write(target, path.read_text(encoding="utf-8"))
            write(pending / "changes.json", json.dumps(list(note.changes)))
            generation = replace(self.generation(number), **self._signature(note))
            write(pending / "meta.json", json.dumps(asdict(generation), indent=1))
            self._seal(pending, generation.number)
        except OSError as error:
            shutil.rmtree(pending, ignore_errors=True)
            raise _unwritable(self.path, error) from error
        return pending

    def _seal(self, pending: Path, number: int) -> None:
        """Checksums of what a boot needs, and what later renames will need no room for."""
        write(pending / "sums.json", json.dumps({name: checksum(pending / name) for name in _SUMMED}))
        write(pending / "unsettled", "")
        write(self.path / "current.new", str(number))

    def _describe(self, record: Record) -> Generation:
        signature = self._signature(record.note)
        return Generation(
            backend=record.backend,
            policy=record.policy,
            name=record.name,
            fingerprint=record.fingerprint(),
            proven=record.proven,
            **signature,
        )

    def _signature(self, note: Note) -> dict[str, Any]:
        """What makes a generation one of its own: number, time, who, from where, and what was said about it."""
        return {
            "number": max([*self.numbers(), 0]) + 1,
            "applied_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "applied_by": session.user(),
            "applied_from": session.peer_text(),
            "reason": note.reason,
            "lockout": note.lockout,
            "trial": note.trial,
            "restores": note.restores,
        }

    def commit(self, pending: Path) -> Generation:
        """Give a prepared generation its number and make it the current one: two renames, which need no room.

        Raises:
            HostRefused: it cannot be done.
        """
        try:
            return self._commit(pending)
        except OSError as error:
            raise HostRefused(f"cannot record the generation in {self.path}: {error.strerror}") from error

    def _commit(self, pending: Path) -> Generation:
        generation = self._number(pending)
        self._make_current("current.new")
        self._settle(generation.number, "confirmed")
        self._clean()
        return generation

    def _number(self, pending: Path) -> Generation:
        generation = made(Generation, read(pending / "meta.json"))
        folder = self._generations / str(generation.number)
        pending.rename(folder)
        sync(self._generations)
        return generation

    def _make_current(self, name: str) -> None:
        before = self._confirmed_number()
        if before is not None:
            self._settle(before, "confirmed")
        (self.path / name).rename(self.path / "current")

    def _settle(self, number: int, how: str) -> Path | None:
        """Say what became of a generation; the file was made beforehand."""
        folder = self._generations / str(number)
        with suppress(OSError):
            return (folder / "unsettled").rename(folder / how)
        return None

    def _clean(self) -> None:
        """Make renames last, and let old generations go: never the one to boot, the one before it, or one on trial."""
        with suppress(OSError):
            (self.path / "removed").unlink(missing_ok=True)
        for folder in (self._generations, self.path):
            sync(folder)
        trial = self.trial()
        keep = {*self.bootable()[:2], *([trial.number] if trial else ())}
        for old in self.numbers()[:-KEEP]:
            if old not in keep:
                shutil.rmtree(self._generations / str(old), ignore_errors=True)

    def point_to(self, number: int) -> None:
        """Make another recorded generation the current one, as far as the directory can be written."""
        with suppress(OSError):
            write(self.path / "current.new", str(number))
            (self.path / "current.new").rename(self.path / "current")
            sync(self.path)

    def bootable(self) -> list[int]:
        """Numbers of generations that were confirmed, or needed no confirmation: the one in force first, then the newest."""
        current = self._confirmed_number()
        found = [n for n in reversed(self.numbers()) if n != current and self.outcome(n) == "confirmed"]
        return found if current is None else [current, *found]

    def outcome(self, number: int) -> str:
        """`confirmed`, `on trial` or `rolled back`. A generation without a trial is confirmed by being recorded."""
        trial = self.trial()
        if trial is not None and trial.number == number:
            return "on trial"
        folder = self._generations / str(number)
        if (folder / "unsettled").exists() or (folder / "returned").exists():
            return "confirmed" if number == self._confirmed_number() else "rolled back"
        return "confirmed"

    def ending(self, number: int) -> str:
        """Why and when a generation was rolled back; the empty string where nothing is known."""
        try:
            return (self._generations / str(number) / "returned").read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def changes(self, number: int) -> tuple[str, ...]:
        """What a generation changed, in the operator's words."""
        try:
            return read_texts(self._generations / str(number) / "changes.json")
        except (OSError, ValueError):
            return ()

    def ssh(self, number: int) -> dict[str, Any]:
        """Who may log in by a generation, and where.

        Raises:
            OSError, ValueError: that is not recorded, or cannot be read.
        """
        found = read(self._generations / str(number) / "ssh.json")
        if not isinstance(found, dict) or not found:
            raise ValueError(f"generation {number} does not say who may log in")
        return found

    def check(self, number: int) -> None:
        """See whether a generation is as it was written.

        Raises:
            OSError, ValueError: a file of it is missing, or holds something else.
        """
        folder = self._generations / str(number)
        self.generation(number)
        if not (folder / "sums.json").exists():
            return  # written before there were checksums
        sums = read(folder / "sums.json")
        for name in _SUMMED:
            if not isinstance(sums, dict) or checksum(folder / name) != sums.get(name):
                raise ValueError(f"its {name} is damaged")

    def trial(self) -> Trial | None:
        """The pending trial, or None; one that was confirmed is over, whether or not its file is gone."""
        try:
            trial = made(Trial, read(self.path / "trial.json"))
        except (OSError, ValueError):
            return None
        return None if trial.number == self._confirmed_number() else trial

    def found(self) -> tuple[Found, ...]:
        """What the kernel held before the pending trial.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        try:
            data = read(self.path / "before.json")
            return tuple(
                Found(
                    each["backend"],
                    each["listing"],
                    {name: tuple((low, high) for low, high in ranges) for name, ranges in each["contents"].items()},
                    {name: [(address, end) for address, end in members] for name, members in each["members"].items()},
                )
                for each in data
            )
        except (AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path}/before.json is not readable: {error}") from error

    def begin_trial(self, pending: Path, trial: Trial, before: Sequence[Found]) -> Generation:
        """Give a prepared generation its number, on trial. From here on it counts as in force, and never boots.

        Raises:
            HostRefused: it cannot be written; nothing was changed.
        """
        try:
            write(self.path / "before.json", json.dumps([asdict(each) for each in before], separators=(",", ":")))
            write(self.path / "trial.new", json.dumps(asdict(trial)))
            generation = self._number(pending)
            (self.path / "current.new").rename(self.path / "trial.current")
            (self.path / "trial.new").rename(self.path / "trial.json")
            sync(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return generation

    def note_trial(self, trial: Trial) -> None:
        """Complete what is written about the pending trial.

        Raises:
            HostRefused: it cannot be written.
        """
        try:
            write(self.path / "trial.new", json.dumps(asdict(trial)))
            (self.path / "trial.new").rename(self.path / "trial.json")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def confirm_trial(self, trial: Trial) -> None:
        """Keep the generation on trial: from here on it is the one to boot.

        Raises:
            HostRefused: it cannot be done.
        """
        try:
            self._make_current("trial.current")
            sync(self.path)
        except OSError as error:
            raise HostRefused(f"cannot record the confirmation in {self.path}: {error.strerror}") from error
        self._settle(trial.number, "confirmed")
        self._drop_trial()
        self._clean()

    def end_trial(self, trial: Trial, why: str) -> None:
        """The generation on trial is no longer in force; history keeps it with the reason.

        Raises:
            HostRefused: it cannot be done.
        """
        self._drop_trial()
        settled = self._settle(trial.number, "returned")
        # A full disk keeps the reason from being written, not the return.
        with suppress(OSError):
            if settled:
                write(settled, f"{why}, {datetime.now(UTC).isoformat(timespec='seconds')}\n")
        with suppress(OSError):
            sync(self.path)

    def _drop_trial(self) -> None:
        try:
            (self.path / "trial.json").unlink(missing_ok=True)
        except OSError as error:
            raise HostRefused(f"cannot end the trial in {self.path}: {error.strerror}") from error
        for name in ("before.json", "trial.current", "trial.new"):
            with suppress(OSError):
                (self.path / name).unlink(missing_ok=True)

    def erase(self, number: int) -> None:
        """Drop a generation that never came into force."""
        shutil.rmtree(self._generations / str(number), ignore_errors=True)

    def interrupted(self) -> Path | None:
        """A generation whose apply did not get to its end, or None."""
        pending = self._generations / "pending"
        return pending if pending.is_dir() else None

    def finish(self) -> None:
        """Complete the record of an apply that was killed between its last two renames. Under the lock.

        A generation that was to go on trial, but whose trial was never written down, did not come into force.
        """
        with suppress(OSError, ValueError):
            number = int((self.path / "current.new").read_text(encoding="ascii"))
            if self.trial() is None and (self._generations / str(number) / "unsettled").exists() and not self.generation(number).trial:
                self._make_current("current.new")
                self._settle(number, "confirmed")
                self._clean()

    def discard(self, pending: Path) -> None:
        """Drop a prepared generation that did not come into force."""
        shutil.rmtree(pending, ignore_errors=True)

    def forget(self) -> None:
        """Nothing of ours is in force any more; the generations stay for the record."""
        with suppress(FileNotFoundError):
            (self.path / "current").rename(self.path / "removed")


def _unwritable(path: Path, error: OSError) -> HostRefused:
    return HostRefused(
        f"cannot write to the state directory {path}: {error.strerror}; nothing was changed",
        hint="run as root, or name another one with --state-dir",
    )
