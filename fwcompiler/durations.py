"""Lengths of time as people write them."""

from __future__ import annotations

import re

SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
_PARTS = re.compile(r"([0-9]+)([smhdw])")
_WHOLE = re.compile(r"(?:[0-9]+[smhdw])+")


def seconds(text: str) -> int | None:
    """`90s`, `1h30m`, `7d` in seconds; None where it is no such text."""
    if not _WHOLE.fullmatch(text):
        return None
    return sum(int(n) * SECONDS[unit] for n, unit in _PARTS.findall(text))


def duration_text(length: int) -> str:
    """Seconds in their two largest units: `11h 59m`, `2d`, `45s`."""
    parts: list[str] = []
    for unit in "dhms":
        count, length = divmod(length, SECONDS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"
