"""Throw-away network namespaces for tests: a real kernel, and nothing of the machine's own firewall.

Two kinds. `namespace()` has no name: it is entered in this process, by setns(2), and the kernel takes it away when its
descriptor is closed, even after a crash. `named_namespace()` is one for `fwc --netns` and `ip netns exec`; its name is
unique to this process and it is deleted at the end of the block, with every process in it left to its owner.

A namespace belongs to the calling thread (setns(2)); programs started inside it are in it too.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
PREFIX = "fwctest"

_HERE = "/proc/thread-self/ns/net"
_numbers = itertools.count(1)


class KernelSaysNo(Exception):
    """A program inside a namespace failed; the message holds the command and what it said."""


@dataclass(frozen=True)
class Space:
    """A network namespace held open by a descriptor."""

    descriptor: int

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside for the length of a block; blocks may be nested."""
        home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self.descriptor)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)

    def run(self, *argv: str, stdin: str = "") -> str:
        """Run a program inside and return its output.

        Raises:
            KernelSaysNo: it failed.
        """
        with self.entered():
            return run(argv, stdin)


def allowed() -> bool:
    """True where this process may make network namespaces and change their rules (root, or a container with the rights)."""
    home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc().unshare(CLONE_NEWNET) != 0:
            return False
        _setns(home)
        return True
    finally:
        os.close(home)


@contextmanager
def namespace() -> Iterator[Space]:
    """A fresh namespace without a name, its loopback interface down; gone after the block."""
    home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc().unshare(CLONE_NEWNET), "unshare")
        try:
            space = Space(os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC))
        finally:
            _setns(home)
    finally:
        os.close(home)
    try:
        yield space
    finally:
        os.close(space.descriptor)


@contextmanager
def named_namespace() -> Iterator[str]:
    """The name of a fresh namespace that `ip netns` knows; deleted after the block."""
    name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
    run(("ip", "netns", "add", name))
    try:
        yield name
    finally:
        run(("ip", "netns", "delete", name))


def in_named(name: str, *argv: str, stdin: str = "") -> str:
    """Run a program in a named namespace and return its output.

    Raises:
        KernelSaysNo: it failed.
    """
    return run(("ip", "netns", "exec", name, *argv), stdin)


def named_socket(name: str, address: str, port: int, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
    """A bound socket in a named namespace; it stays there."""
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Space(descriptor).entered():
            made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    finally:
        os.close(descriptor)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    return made


def run(argv: Sequence[str], stdin: str = "") -> str:
    """Run a program where this thread is, and return its output.

    Raises:
        KernelSaysNo: it failed.
    """
    environment = {**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise KernelSaysNo(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _setns(descriptor: int) -> None:
    _check(_libc().setns(descriptor, CLONE_NEWNET), "setns")


def _check(result: int, call: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
