"""Files that are there after a crash, or not at all; and what they hold, read with the suspicion that a damaged disk deserves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
LATEST = 253_402_300_799
"""The last second that has a date (datetime.MAXYEAR)."""
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": (str,),
    "bool": (bool,),
}


def write(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it (fsync(2)).

    Raises:
        OSError: no room, no right, no such folder.
    """
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync(folder: Path) -> None:
    """Make renames in a directory last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """What tells a file that is as it was written from a damaged one."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parsed(text: str | bytes) -> Any:
    """A text as JSON.

    Raises:
        ValueError: it is none, or nested deeper than anything fwc writes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read(path: Path) -> Any:
    """A file of JSON.

    Raises:
        OSError, ValueError: it is not there, or holds something else.
    """
    return parsed(path.read_bytes())


def read_texts(path: Path) -> tuple[str, ...]:
    """A file that holds a list of texts.

    Raises:
        OSError, ValueError: it is not there, or holds something else.
    """
    found = read(path)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{path.name} is no list of texts")
    return tuple(found)


def made(kind: Callable[..., T], data: object) -> T:
    """A dataclass of plain values out of what JSON said.

    Raises:
        ValueError: a field is missing or unknown, or holds a value of another type, or a number that no clock shows.
    """
    if not isinstance(data, dict):
        raise ValueError("it holds no fields")
    try:
        value = kind(**data)
    except TypeError as error:
        raise ValueError(str(error).rpartition("() ")[2]) from error
    for name, types in _fields(kind):
        each = getattr(value, name)
        wrong = isinstance(each, bool) and bool not in types
        if wrong or not isinstance(each, types) or (isinstance(each, float) and not (isfinite(each) and 0 <= each <= LATEST)):
            raise ValueError(f"its {name} is no such thing: {str(each)[:40]}")
    return value


@cache
def _fields(kind: Any) -> tuple[tuple[str, tuple[type, ...]], ...]:
    return tuple((f.name, _TYPES.get(str(f.type), (object,))) for f in fields(kind))
