"""Starts something that outlives fwc: a process in a session of its own, or a transient unit of systemd."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from fwcompiler.backend import Command
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import runner

SYSTEMD = "/run/systemd/system"
"""Exists where systemd is in charge (sd_booted(3))."""
READY = b"ready\n"
READY_WITHIN = 20.0
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def systemd_runs() -> bool:
    """True where systemd can keep something for us."""
    return Path(SYSTEMD).is_dir() and runner.find("systemd-run") is not None


def run(command: Command) -> None:
    """Run one command of systemd's.

    Raises:
        HostRefused: it failed.
    """
    runner.run(command)


def start(argv: Sequence[str]) -> int:
    """Start a program in a session of its own that ignores hang-ups, Ctrl-C and the polite kill; returns its process id.

    It has to write `READY` on its standard output once nothing can keep it from its work.

    Raises:
        HostRefused: it did not start, or did not get ready in time; then it is gone.
    """
    # What is ignored stays ignored over exec (signal(7)), so there is no moment at which the child is not protected.
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            preexec_fn=_ignore_signals,  # noqa: PLW1509 - this process has one thread
        )
    except OSError as error:
        raise HostRefused(f"cannot start {argv[0]}: {error.strerror}") from error
    assert child.stdout is not None
    with child.stdout:
        said = b""
        deadline = time.monotonic() + READY_WITHIN
        while not said.endswith(READY):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0] or not (part := os.read(child.stdout.fileno(), 64)):
                child.kill()
                child.wait()
                raise HostRefused("the process that would bring the old rules back did not get ready")
            said += part
    # It is nobody's to wait for.
    child.returncode = 0
    return child.pid


def _ignore_signals() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
