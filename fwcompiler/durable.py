"""Files that are there after a crash, or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


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
