"""What fwc remembers on a host: generations of applied policies, one writer at a time.

A generation is written whole under a temporary name before the kernel is touched, and gets its number by a rename
afterwards, so a full disk stops an apply early and a crash at any point leaves either the old or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fwcompiler.addresses import Ranges
from fwcompiler.diagnostics import HostRefused
from fwcompiler.ruleset import Ruleset

DEFAULT = "/var/lib/fwc"
KEEP = 50
LOCK_WAIT = 30.0
"""Seconds a second writer waits for the first."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One applied policy: which, by whom, when, and a fingerprint of everything it loads."""

    number: int
    backend: str
    policy: str
    name: str
    applied_at: str
    applied_by: str
    applied_from: str
    fingerprint: str
    proven: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that goes into a generation. `rendered` holds the rules, `ruleset` the contents of the sets."""

    backend: str
    policy: str
    name: str
    sources: Mapping[str, str]
    rendered: Mapping[str, str]
    listing: Sequence[str]
    ruleset: Ruleset
    lists: Mapping[str, int]
    proven: bool = True

    def fingerprint(self) -> str:
        """The same for the same backend and rules, whatever the policy's spelling."""
        digest = hashlib.sha256(self.backend.encode())
        for text in self.rendered.values():
            digest.update(hashlib.sha256(text.encode()).digest())
        for each in self.ruleset.sets:
            digest.update(f"{each.name} {hash_ranges(each.ranges)}".encode())
        return digest.hexdigest()


def hash_ranges(ranges: Ranges) -> str:
    """A fingerprint of a set's content."""
    return hashlib.sha256(repr(ranges).encode()).hexdigest()


class StateDir:
    """The state directory. Reading it needs nothing; whoever writes holds the lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer for the length of a block.

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
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
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
                    holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                    raise HostRefused(f"another fwc (process {holder}) is at work; nothing was changed") from None
                time.sleep(0.05)

    @property
    def _generations(self) -> Path:
        return self.path / "generations"

    def current(self) -> Generation | None:
        """The generation in force, or None."""
        try:
            number = int((self.path / "current").read_text(encoding="ascii"))
            return self.generation(number)
        except (OSError, ValueError):
            return None

    def generation(self, number: int) -> Generation:
        """One generation.

        Raises:
            OSError, ValueError: it is not there, or cannot be read.
        """
        data = json.loads((self._generations / str(number) / "meta.json").read_text(encoding="utf-8"))
        try:
            return Generation(**data)
        except TypeError as error:
            raise ValueError(f"generation {number} is not readable: {error}") from error

    def numbers(self) -> list[int]:
        """Numbers of all generations, ascending."""
        try:
            return sorted(int(p.name) for p in self._generations.iterdir() if p.name.isdigit())
        except OSError:
            return []

    def listing(self, number: int) -> tuple[str, ...]:
        """What a scratch kernel listed for a generation, for the backend to parse."""
        return tuple(json.loads((self._generations / str(number) / "listing.json").read_text(encoding="utf-8")))

    def contents(self, number: int) -> dict[str, Ranges]:
        """Contents of a generation's static sets."""
        data = json.loads((self._generations / str(number) / "sets.json").read_text(encoding="utf-8"))
        try:
            return {name: tuple((low, high) for low, high in ranges) for name, ranges in data.items()}
        except (AttributeError, TypeError) as error:
            raise ValueError(f"the sets of generation {number} are not readable: {error}") from error

    def list_sizes(self, number: int) -> dict[str, int]:
        """How many addresses each list file had in a generation."""
        sizes: dict[str, int] = json.loads((self._generations / str(number) / "lists.json").read_text(encoding="utf-8"))
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
                _write(pending / "policy" / f"{index:03d}-{Path(name).name}", text)
            for name, text in record.rendered.items():
                _write(pending / "rendered" / name, text)
            _write(pending / "listing.json", json.dumps(list(record.listing)))
            _write(pending / "lists.json", json.dumps(dict(record.lists)))
            contents = {s.name: s.ranges for s in record.ruleset.sets if not s.dynamic}
            _write(pending / "sets.json", json.dumps(contents, separators=(",", ":")))
            generation = self._describe(record)
            _write(pending / "meta.json", json.dumps(asdict(generation), indent=1))
            _write(self.path / "current.new", str(generation.number))
        except OSError as error:
            shutil.rmtree(pending, ignore_errors=True)
            raise _unwritable(self.path, error) from error
        return pending

    def _describe(self, record: Record) -> Generation:
        number = max([*self.numbers(), 0]) + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        who = os.environ.get("SUDO_USER") or os.environ.get("USER") or str(os.geteuid())
        peer = os.environ.get("SSH_CONNECTION", "").partition(" ")[0]
        return Generation(number, record.backend, record.policy, record.name, now, who, peer, record.fingerprint(), record.proven)

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
        data = json.loads((pending / "meta.json").read_text(encoding="utf-8"))
        generation = Generation(**data)
        pending.rename(self._generations / str(generation.number))
        (self.path / "current.new").rename(self.path / "current")
        for folder in (self._generations, self.path):
            _sync(folder)
        for old in self.numbers()[:-KEEP]:
            shutil.rmtree(self._generations / str(old), ignore_errors=True)
        return generation

    def discard(self, pending: Path) -> None:
        """Drop a prepared generation that did not come into force."""
        shutil.rmtree(pending, ignore_errors=True)

    def forget(self) -> None:
        """Nothing of ours is in force any more; the generations stay for the record."""
        with suppress(FileNotFoundError):
            (self.path / "current").unlink()


def _sync(folder: Path) -> None:
    """Make renames in a directory last (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _unwritable(path: Path, error: OSError) -> HostRefused:
    return HostRefused(
        f"cannot write to the state directory {path}: {error.strerror}; nothing was changed",
        hint="run as root, or name another one with --state-dir",
    )
