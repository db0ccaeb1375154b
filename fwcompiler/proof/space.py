"""The packet space of one address family, cut into classes: two packets of one class are alike to every rule.

Every field has its classes, numbered from 0; a set of values is a bit mask over them. What cannot be told from a
packet (a limit, a dynamic set, a match nobody modelled) is a field of two classes: 0 it does not hold, 1 it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fwcompiler.addresses import LAST, Ranges, merged
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.classes import Classes, classes_of
from fwcompiler.ruleset import STATES

INTERFACE, STATE, PROTOCOL, PORT, SOURCE_PORT, TYPE, DESTINATION, SOURCE = range(8)
NAMES = ("interface", "state", "protocol", "port", "source port", "ICMP type", "destination", "source")
"""What the fields are called; the order in which diagrams decide them is `prove`'s choice."""
FIRST_ATOM = len(NAMES)

_LAST = {PROTOCOL: 255, PORT: 65535, SOURCE_PORT: 65535, TYPE: 255}
OTHER_INTERFACE = "(other)"

Values = Ranges | frozenset[str]
"""Numbers as merged ranges, or names of interfaces or states."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One field lies in a set of values, or outside. `atom` names a field that a packet does not show."""

    field: int
    values: Values = ()
    negated: bool = False
    atom: str = ""


@dataclass
class Space:
    """Classes of every field, and masks for the values that rules speak of."""

    version: int
    interfaces: tuple[str, ...] = ()
    classes: dict[int, Classes] = field(default_factory=dict)
    masks: dict[tuple[int, Ranges], int] = field(default_factory=dict)
    atoms: dict[str, int] = field(default_factory=dict)

    def count(self, number: int) -> int:
        """How many classes a field has."""
        if number == INTERFACE:
            return len(self.interfaces) + 1
        if number == STATE:
            return len(STATES)
        return len(self.classes[number]) if number < FIRST_ATOM else 2

    def everything(self, number: int) -> int:
        """The mask of all values of a field."""
        return (1 << self.count(number)) - 1

    def place(self, condition: Condition) -> tuple[int, int]:
        """A condition as field number and mask."""
        number = condition.field
        if condition.atom:
            return FIRST_ATOM + self.atoms[condition.atom], 1 if condition.negated else 2
        mask = self._mask(number, condition.values)
        return number, self.everything(number) & ~mask if condition.negated else mask

    def _mask(self, number: int, values: Values) -> int:
        if isinstance(values, frozenset):
            names: Sequence[str] = self.interfaces if number == INTERFACE else STATES
            return sum(1 << i for i, name in enumerate(names) if name in values)
        return self.masks[number, values]

    def ranges(self, number: int, mask: int) -> Ranges:
        """The numbers a mask stands for, as merged ranges."""
        return merged(span for i, part in enumerate(self.classes[number]) if mask >> i & 1 for span in part)

    def names(self, number: int, mask: int) -> tuple[str, ...]:
        """The interfaces or states a mask stands for."""
        known: Sequence[str] = (*self.interfaces, OTHER_INTERFACE) if number == INTERFACE else STATES
        return tuple(name for i, name in enumerate(known) if mask >> i & 1)


def make_space(version: int, conditions: Iterable[Condition]) -> Space:
    """The space in which all given conditions can be placed."""
    interfaces: set[str] = {"lo"}
    values: dict[int, dict[Ranges, None]] = {number: {(): None} for number in _LAST | {DESTINATION: 0, SOURCE: 0}}
    atoms: dict[str, None] = {}
    for condition in conditions:
        if condition.atom:
            atoms[condition.atom] = None
        elif isinstance(condition.values, frozenset):
            if condition.field == INTERFACE:
                interfaces |= condition.values
        else:
            values[condition.field][condition.values] = None
    for number in PROTOCOLS.values():
        values[PROTOCOL][((number, number),)] = None
    space = Space(version, tuple(sorted(interfaces)), atoms={name: i for i, name in enumerate(atoms)})
    for number, sets in values.items():
        last = LAST[version] if number in (DESTINATION, SOURCE) else _LAST[number]
        space.classes[number], masks = cut(last, list(sets))
        space.masks.update({(number, ranges): mask for ranges, mask in masks.items()})
    return space


def cut(last: int, sets: Sequence[Ranges]) -> tuple[Classes, Mapping[Ranges, int]]:
    """Classes of the numbers 0 to ``last`` that every set treats alike, and each set's mask over them."""
    found = classes_of(last, sets)
    masks = dict.fromkeys(sets, 0)
    for number, covering in enumerate(found.signatures):
        left = covering
        while left:
            lowest = left & -left
            masks[sets[lowest.bit_length() - 1]] |= 1 << number
            left ^= lowest
    return found, masks
