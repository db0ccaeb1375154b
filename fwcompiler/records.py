"""What is recorded about an apply: values only, written and read by `fwcompiler.state`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fwcompiler.addresses import Ranges
from fwcompiler.contents import packed
from fwcompiler.ruleset import Ruleset


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
    reason: str = ""
    lockout: str = ""
    trial: float = 0
    restores: int | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """What somebody says about an apply, and what it changes, in the operator's words.

    `lockout`: who was locked out on purpose. `trial`: seconds it was on trial for, 0 for none. `restores`: the
    generation that it is a return to.
    """

    reason: str = ""
    lockout: str = ""
    trial: float = 0
    restores: int | None = None
    changes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """A generation in force that returns by itself unless it is confirmed.

    `deadline` is by the clock that counts since boot, suspended time included (clock_gettime(2), CLOCK_BOOTTIME), and
    so holds for one boot only. `applier`: the connection it was applied over, see `fwcompiler.kernel.session`.
    """

    number: int
    previous: int | None
    deadline: float
    boot: str
    applier: str
    unit: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What one backend held of ours before a trial: its listing, its static contents, and until when members stay.

    `members`: by set, address and the end of its time by the clock of :class:`Trial`; None: it stays.
    """

    backend: str
    listing: Sequence[str]
    contents: Mapping[str, Ranges]
    members: Mapping[str, Sequence[tuple[int, float | None]]]


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that goes into a generation. `rendered` holds the rules, `ruleset` the contents of the sets.

    `ssh`: who may log in and where, for the rules that a host boots with when no generation can be read.
    """

    backend: str
    policy: str
    name: str
    sources: Mapping[str, str]
    rendered: Mapping[str, str]
    listing: Sequence[str]
    ruleset: Ruleset
    lists: Mapping[str, int]
    proven: bool = True
    note: Note = Note()
    ssh: Mapping[str, object] = field(default_factory=dict)

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
    return hashlib.sha256(str(packed(ranges)).encode()).hexdigest()
