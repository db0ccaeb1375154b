"""Hears who changes table ``inet fwc``, and keeps programs that respect the xtables lock away.

`nft` sends its transactions without a generation id, so the kernel does not refuse one that was planned on rules which
have changed since. The rules are compared right before the commit; what happens between that look and the commit is heard
here: the kernel tells every transaction, what it touched and who sent it (``NFNLGRP_NFTABLES``; ``NFT_MSG_NEWGEN`` ends
each). Numbers: ``include/uapi/linux/netfilter/nf_tables.h``; behaviour: ``nf_tables_commit`` in ``nf_tables_api.c``.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import netlink, nftset
from fwcompiler.kernel.netlink import HEADER, Channel, NetlinkError

_GROUP = 7  # NFNLGRP_NFTABLES
_SUBSYSTEM, _NEWGEN = 10, 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN
_TABLE = 1  # the table's name is attribute 1 of chains, rules, sets, elements, objects, and of the table itself
_PID, _NAME = 2, 3  # NFTA_GEN_PROC_PID, NFTA_GEN_PROC_NAME
_INET = 1  # NFPROTO_INET
XTABLES_LOCK = "/run/xtables.lock"
LOCK_VARIABLE = "XTABLES_LOCKFILE"
LOCK_WAIT = 5.0


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction that touched our table, and who sent it."""

    process: str


class Watch:
    """Transactions on our table from the moment it is made; it hears the namespace of the calling thread.

    `missed`: somebody's transaction came while it was not listening, so that nobody can tell whose it was and what it touched.
    """

    def __init__(self, channel: Channel) -> None:
        self.missed = False
        self._channel = channel
        channel.join(_GROUP)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Hear nothing for the length of a block, which makes one transaction.

        While anybody listens the kernel writes a message for every element of a set: 100,000 networks then take 2.3 s instead of
        0.25 s. That nobody else came in between is seen by the number of the ruleset, which every transaction raises by one.
        """
        self._channel.leave(_GROUP)
        before = nftset.generation()
        try:
            yield
        finally:
            self.missed = self.missed or nftset.generation() > before + 1
            self._channel.join(_GROUP)

    def heard(self) -> list[Transaction] | None:
        """Transactions on our table since the last call; None where there were more messages than room for them."""
        found: list[Transaction] = []
        touched = False
        try:
            for reply in self._channel.events():
                if reply.kind >> 8 != _SUBSYSTEM:
                    continue
                if reply.kind & 0xFF != _NEWGEN:
                    touched = touched or _is_ours(reply.data)
                    continue
                if touched:
                    found.append(Transaction(_process(reply.data)))
                touched = False
        except NetlinkError:
            return None
        return found


@contextmanager
def watching() -> Iterator[Watch | None]:
    """Listen for the length of a block; None where the kernel does not let us, which then decides nothing."""
    try:
        channel = Channel()
    except HostRefused:
        yield None
        return
    with channel:
        watch = None
        with suppress(HostRefused):
            watch = Watch(channel)
        yield watch


def _is_ours(data: bytes) -> bool:
    if data[16] != _INET:
        return False
    return any(kind == _TABLE and data[low:high] == b"fwc\0" for kind, low, high in netlink.attributes(data, HEADER))


def _process(data: bytes) -> str:
    """`nft, process 4711`."""
    pid, name = "", ""
    for kind, low, high in netlink.attributes(data, HEADER):
        if kind == _PID:
            pid = str(int.from_bytes(data[low:high], "big"))
        elif kind == _NAME:
            name = data[low:high].rstrip(b"\0").decode("utf-8", "replace")
    return f"{name}, process {pid}"


@contextmanager
def xtables_locked() -> Iterator[Mapping[str, str]]:
    """Hold the lock that iptables-legacy takes for every change; yields what a program has to be told so that it works all the same.

    The program is pointed to a lock file of its own (``XTABLES_LOCKFILE``, iptables 1.8.5), which nobody else knows.

    Raises:
        HostRefused: somebody holds the lock for long.
    """
    path = os.environ.get(LOCK_VARIABLE, XTABLES_LOCK)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield {}  # no place for a lock: then nobody has one
        return
    own = os.memfd_create("fwc-xtables-lock")
    try:
        _wait(lock, path)
        yield {LOCK_VARIABLE: f"/proc/{os.getpid()}/fd/{own}"}
    finally:
        os.close(own)
        os.close(lock)


def _wait(lock: int, path: str) -> None:
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise HostRefused(f"another program holds {path}; nothing was changed", hint="`fuser -v` shows which") from None
            time.sleep(0.02)
