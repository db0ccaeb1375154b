"""What a backend is: pure functions from the neutral ruleset to data, and back.

A backend never runs, opens or asks anything. It says which commands to run (:class:`Command`) and which sets to
fill (:class:`Fill`); `fwcompiler.kernel` does it. Backends are found through the entry point group
``fwcompiler.backends``, each entry naming an instance of a class with this shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from fwcompiler.addresses import Ranges
from fwcompiler.diagnostics import Finding, Position
from fwcompiler.ruleset import AddressSet, Ruleset

SetKind = Literal["nft", "ipset"]


@dataclass(frozen=True, slots=True)
class Command:
    """One program to run.

    `missing_ok`: a failure that only says "there is nothing" is an empty answer. `otherwise`: run that when this
    fails. `may_fail`: whatever goes wrong, also that there is no such program, is an empty answer. `origins`: by line of `stdin`,
    the policy line that a refusal of it points to.
    """

    argv: tuple[str, ...]
    stdin: str = ""
    missing_ok: bool = False
    otherwise: Command | None = None
    may_fail: bool = False
    origins: Mapping[int, Position] = field(default_factory=dict, compare=False, hash=False)


@dataclass(frozen=True, slots=True)
class Fill:
    """Change the content of one existing set in one step: take out `remove`, put in `add` (merged ranges).

    For ``nft`` the set is in table ``inet fwc`` and the step is one transaction.
    """

    kind: SetKind
    set: str
    version: int
    add: Ranges = ()
    remove: Ranges = ()


Do = Command | Fill


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do, all or nothing, and what puts it back should a later step fail."""

    do: Do
    undo: tuple[Do, ...] = ()


@dataclass(frozen=True, slots=True)
class Rendered:
    """A ruleset as files a person could load by hand; `name` -> text, in loading order."""

    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SetChange:
    """How one static set's content has to change."""

    set: AddressSet
    add: Ranges
    remove: Ranges


@dataclass(frozen=True, slots=True)
class Saved:
    """A listing that somebody saved: its text, and the name of the file that positions are told with."""

    file: str
    text: str


@runtime_checkable
class Backend(Protocol):
    """The seam. `name` is what `--backend` takes."""

    name: str
    set_kind: SetKind
    programs: tuple[str, ...]

    def refuse(self, ruleset: Ruleset) -> Sequence[Finding]:
        """What this backend cannot express, each with the policy's line; empty when it can do all of it."""

    def render(self, ruleset: Ruleset) -> Rendered:
        """The whole ruleset as text, set contents included. Same ruleset, same bytes."""

    def load(self, ruleset: Ruleset) -> Sequence[Step]:
        """Steps from nothing of ours to the whole ruleset."""

    def listing(self, *, big: bool = False) -> Sequence[Command]:
        """Commands whose outputs, in this order, `parse` takes. They list what is ours, without set contents.

        `big`: our sets are known to be large, so a way that does not read them is worth its price.
        """

    def parse(self, outputs: Sequence[str]) -> Ruleset:
        """The ruleset a kernel holds; what is not modelled becomes `Unknown`. Static sets come without content.

        An empty ruleset means that nothing of ours is loaded.
        """

    def update(self, live: Ruleset, wanted: Ruleset, changes: Sequence[SetChange]) -> Sequence[Step]:
        """Steps from `live` to `wanted`. Both were read from a kernel; `changes` says how set contents differ.

        A set missing in `live` is not in `changes`: it is created and filled with `ranges` of `wanted`. So is a dynamic set
        that has to be made (anew) filled with `members` of `wanted`, each with the milliseconds it has left.
        Nothing to do: no steps.
        """

    def remove(self, live: Ruleset) -> Sequence[Step]:
        """Steps that take out everything of ours."""

    def foreign(self, saved: Sequence[Saved], ours: Ruleset | None = None) -> Ruleset:
        """Anybody's rules, from listings in this backend's form. Sets come with content, as far as the listings hold it.

        ``ours``: stands for whatever the listings hold of fwc, in the places where that stood; an empty ruleset leaves it out.

        Raises:
            ValueError: a text is no such listing.
        """

    def own(self, saved: Sequence[Saved]) -> Ruleset:
        """The rules of fwc in saved listings, sets with their content and dynamic members; empty where there are none.

        Raises:
            ValueError: a text is no such listing, or holds our rules without the content of their sets.
        """

    def counters(self, outputs: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        """Packets and bytes by counter name, from the outputs of `listing`."""
