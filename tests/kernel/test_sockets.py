"""Socket diagnostics: real sockets in a namespace of their own, found with their peers and their processes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address

import kernelspace
import pytest
from kernelspace import Space

from fwcompiler.kernel import sockets


@contextmanager
def connected(family: int, at: str, port: int, towards: str) -> Iterator[tuple[int, int]]:
    """A listening socket at an address, and a connection to it; the ports of both ends of the connection."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind((at, port))
        server.listen()
        client = stack.enter_context(socket.create_connection((towards, port)))
        stack.enter_context(server.accept()[0])
        yield port, client.getsockname()[1]


@pytest.mark.parametrize(
    ("family", "at", "towards"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::", "::1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
    ],
    ids=["IPv4", "IPv6", "IPv4 to an IPv6 socket"],
)
def test_peers(space: Space, family: int, at: str, towards: str) -> None:
    """The peer of an established connection is found with its family, its port, and the process that holds our end."""
    space.run("ip", "link", "set", "lo", "up")
    with space.entered(), connected(family, at, 2222, towards) as (port, mine), connected(socket.AF_INET, "127.0.0.1", 2223, "127.0.0.1"):
        found = sockets.peers([port])

        other = ip_address(towards)
        assert [(p.version, p.address, p.port, p.local_port) for p in found] == [(other.version, int(other), mine, port)]
        assert [p.pid for p in found[0].processes] == [os.getpid()]
        assert found[0].since is not None
        assert found[0].since <= time.time() + 1

    with space.entered():
        assert sockets.peers([port]) == ()


def test_peers_of_another_namespace_are_not_seen(space: Space) -> None:
    """A connection in one namespace is no connection of another one."""
    space.run("ip", "link", "set", "lo", "up")
    with space.entered(), connected(socket.AF_INET, "127.0.0.1", 2224, "127.0.0.1"):
        assert len(sockets.peers([2224])) == 1

        with kernelspace.namespace() as other, other.entered():
            assert sockets.peers([2224]) == ()


def test_listeners(space: Space) -> None:
    """TCP and UDP sockets that anybody can reach are listed with address, families and process; connected ones are not."""
    space.run("ip", "link", "set", "lo", "up")
    with space.entered(), ExitStack() as stack:
        stack.enter_context(connected(socket.AF_INET6, "::", 5061, "::1"))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 5060))
        only = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        only.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        only.bind(("::", 10000))
        asking = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        asking.connect(("127.0.0.1", 9))

        found = sockets.listeners()

    assert [(s.protocol, s.port, s.version, s.address, s.versions) for s in found] == [
        ("tcp", 5061, 6, 0, (4, 6)),
        ("udp", 5060, 4, 0x7F000001, (4,)),
        ("udp", 10000, 6, 0, (6,)),
    ]
    assert {p.pid for s in found for p in s.processes} == {os.getpid()}
