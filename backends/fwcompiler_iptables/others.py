"""Rules of others beside ours in one table of iptables: which of those before our call let packets pass it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

GOING_ON = frozenset(
    (
        *("DROP", "REJECT", "TARPIT", "LOG", "NFLOG", "ULOG", "AUDIT", "TRACE", "MARK", "CONNMARK", "SECMARK", "CONNSECMARK"),
        *("SET", "TCPMSS", "TOS", "DSCP", "TTL", "HL", "ECN", "CLASSIFY", "CHECKSUM", "RATEEST", "CT", "NOTRACK"),
    )
)
"""Targets that drop a packet, or let it go on to the next rule (iptables-extensions(8))."""


def after(tokens: Sequence[str], option: str) -> Iterator[str]:
    """The arguments that stand behind an option."""
    return (value for name, value in pairwise(tokens) if name == option)


@dataclass
class Others:
    """What others have in one table of one family.

    `rules`: by chain, each rule's text, its arguments, and whether it stands behind our call.
    """

    chains: set[str] = field(default_factory=set)
    rules: dict[str, list[tuple[str, Sequence[str], bool]]] = field(default_factory=dict)

    def add(self, chain: str, text: str, tokens: Sequence[str], *, behind: bool) -> None:
        """One more rule."""
        self.rules.setdefault(chain, []).append((text, tokens, behind))

    def passing(self, built_in: str) -> list[str]:
        """Texts of rules that stand before our call in a built-in chain, and may let a packet through or past it.

        What only drops, as bans do, or only looks, may stay where it is: our rules decide about all the rest.
        """
        return [text for text, tokens, behind in self.rules.get(built_in, ()) if not behind and self._passes(tokens, ())]

    def _passes(self, tokens: Sequence[str], callers: tuple[str, ...]) -> bool:
        """`callers`: the chains that led here. A built-in chain is left for its policy by RETURN, and at the end of what `-g` led to."""
        option, target = next(((o, t) for o in ("-j", "-g") for t in after(tokens, o)), ("", ""))
        if not target or target in GOING_ON or (target == "RETURN" and callers):
            return False
        if target not in self.chains or target in callers or (option == "-g" and not callers):
            return True
        return any(self._passes(rule, (*callers, target)) for _, rule, _ in self.rules.get(target, ()))
