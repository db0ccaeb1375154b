"""What is taken for granted of a packet that somebody sends to this host, where rules ask what no field shows.

The packet is whole, for an address of the host, and comes from elsewhere. A TCP packet that opens a connection is a SYN,
a later one an ACK. Limits are not exhausted. Whatever else a rule asks stays open.
"""

from __future__ import annotations

import re

from fwcompiler.foreign import BROADCAST, FRAGMENT, LOCAL
from fwcompiler.proof.space import STATE, Condition
from fwcompiler.ruleset import STATES, State

FLAGS = re.compile(r"tcp flags & 0x([0-9a-f]+) == 0x([0-9a-f]+)")
SYN, ACK = 0x02, 0x10
LATER: tuple[State, ...] = ("established", "related")
_NUMBERED = re.compile(r" \(\d+\)$")
_WITHIN = re.compile(r"limit \d|hashlimit .*(--hashlimit-upto|--hashlimit )|connlimit .*--connlimit-upto|recent .*--set\b")
_BEYOND = re.compile(r"hashlimit .*--hashlimit-above|connlimit .*--connlimit-above|recent .*--hitcount")
_NFT = re.compile(r"(limit|quota|ct count|connlimit) \{")


def usual(atom: str) -> Condition | bool | None:
    """Whether a test holds for the usual packet, or for which states of its connection; None: it may or may not."""
    text = _NUMBERED.sub("", atom)
    if text in (FRAGMENT, BROADCAST, "source type local", "source type broadcast", "destination type unicast"):
        return False
    if text == LOCAL:
        return True
    flags = FLAGS.fullmatch(text)
    if flags:
        mask, value = (int(number, 16) for number in flags.groups())
        holding = frozenset(s for s in STATES if ((ACK if s in LATER else SYN) & mask) == value)
        return Condition(STATE, holding)
    return limited(text)


def limited(text: str) -> bool | None:
    """Whether a test of a limit holds while the limit is not exhausted; None: the test is none of a limit."""
    if "! --" in text:
        return None
    if _NFT.match(text):
        return '"inv": true' not in text
    return False if _BEYOND.match(text) else True if _WITHIN.match(text) else None
