"""Network namespaces: a scratch one to try rules in, and the one that `--netns` names.

A namespace belongs to the calling thread; entering one affects this thread and the programs it starts
(setns(2), unshare(2), ip-netns(8)). CPython 3.11 has no wrapper for either call, hence ctypes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fwcompiler.diagnostics import Unavailable, UsageError

CLONE_NEWNET = 0x40000000
CLONE_NEWUSER = 0x10000000
NETNS_DIR = "/run/netns"

_HERE = "/proc/thread-self/ns/net"


class Namespace:
    """A network namespace held open by a file descriptor. Without one, entering it changes nothing."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside for the length of a block."""
        if self._descriptor is None:
            yield
            return
        home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self._descriptor)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)

    def close(self) -> None:
        """Let go of it; a scratch namespace ends with this."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def named(name: str) -> Namespace:
    """The namespace that `ip netns` calls by this name.

    Raises:
        UsageError: there is none, or the name is no file name.
    """
    if not name or "/" in name or name in (".", ".."):
        raise UsageError(f"`{name}` cannot be the name of a network namespace")
    try:
        return Namespace(os.open(f"{NETNS_DIR}/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise UsageError(f"there is no network namespace `{name}`: {error.strerror}", hint="`ip netns list` shows them") from error


@contextmanager
def scratch() -> Iterator[Namespace]:
    """A fresh namespace that is gone afterwards.

    Without the right to make one (CAP_SYS_ADMIN), this process moves into a user namespace of its own, for good:
    enough to ask the kernel about rules, and it never had the right to touch the host's.

    Raises:
        HostRefused: neither is possible here.
    """
    home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _unshare(CLONE_NEWNET):
            _own_user_namespace()
            yield Namespace()
            return
        try:
            namespace = Namespace(os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC))
        finally:
            _setns(home)
        try:
            yield namespace
        finally:
            namespace.close()
    finally:
        os.close(home)


_moved = False


def _own_user_namespace() -> None:
    global _moved  # noqa: PLW0603 - a process can do this once, and it holds for all of it
    if _moved:
        return
    user, group = os.geteuid(), os.getegid()
    if not _unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise Unavailable(
            "this user may not make a network namespace to try the rules in",
            hint="run as root, or allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1)",
        )
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as stream:  # noqa: PTH123 - procfs wants one write
            stream.write(text)
    _moved = True


def require_host() -> None:
    """Check that this process still sees the host's network.

    Raises:
        HostRefused: it gave that up for a scratch namespace of its own.
    """
    if _moved:
        raise Unavailable("this process has left the host's network to try rules out", hint="this needs root")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _unshare(flags: int) -> bool:
    return bool(_libc().unshare(flags) == 0)


def _setns(descriptor: int) -> None:
    if _libc().setns(descriptor, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise Unavailable(f"cannot enter the network namespace: {os.strerror(code)}", hint="this needs root")
