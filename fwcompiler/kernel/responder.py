"""Serves `fwcompiler.redirect`: many connections, one request each, nothing kept, nothing trusted.

A connection has `DEADLINE` seconds from its first moment to the end of its request, whatever it sends meanwhile. When
as many are open as may be, the one that has waited longest goes, so that a flood of idle ones only hurries itself.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import resource
import signal
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fwcompiler.diagnostics import HostRefused
from fwcompiler.redirect import MAX_HEAD, Answer, Challenge, Site, answer, challenge_answer, challenge_file, challenge_request, head_of

DEADLINE = 10.0
LINGER = 2.0
"""Seconds in which the rest of a request is read and thrown away, so that the answer is not lost to a reset (RFC 9112, 9.6)."""
MAX_OPEN = 4096
MAX_TOKEN = 16_384
"""Bytes of a challenge's content that are passed on; a key authorization has about 90."""
UPSTREAM_TIMEOUT = 5.0
MOST_ASKED = 32
"""Challenges that the web server is asked for at once: it is not to be flooded by way of us, and every one takes a descriptor."""
BACKLOG = 1024
"""Connections that may wait to be taken in."""
_LISTEN_FDS_START = 3  # sd_listen_fds(3)
_SPARE_DESCRIPTORS = 128
"""asyncio takes in up to 100 connections before it looks at one of them."""


@dataclass
class Responder:
    """One running responder: what it redirects, who answers challenges, and the connections that are open."""

    site: Site
    webroot: Path | None = None
    web_server: tuple[str, int] | None = None
    max_open: int = MAX_OPEN
    waiting: dict[_Connection, None] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    asked: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_ASKED))

    def opened(self, connection: _Connection) -> None:
        """Make room for a connection: the oldest goes where there is none."""
        while len(self.waiting) >= self.max_open:
            next(iter(self.waiting)).abort()
        self.waiting[connection] = None

    async def challenge(self, asked: Challenge) -> Answer:
        """What the webroot or the web server has for a token; 404 where there is neither."""
        if self.webroot is not None:
            body = _read_token(self.webroot, asked.token)
            return Answer(404) if body is None else Answer(200, body=body, head_only=asked.head_only)
        if self.web_server is None:
            return Answer(404)
        try:
            async with asyncio.timeout(UPSTREAM_TIMEOUT), self.asked:
                return challenge_answer(await _ask(self.web_server, challenge_request(asked)), head_only=asked.head_only)
        except (OSError, TimeoutError):
            return Answer(502, head_only=asked.head_only)


async def _ask(server: tuple[str, int], request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(request)
        received = bytearray()
        while len(received) < MAX_TOKEN and (part := await reader.read(MAX_TOKEN - len(received))):
            received += part
        return bytes(received)
    finally:
        writer.close()


def _read_token(webroot: Path, token: str) -> bytes | None:
    """A token's file, if it is a plain file: no link leads out of the webroot, no pipe stops us."""
    path = webroot / challenge_file(token)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not path.parent.resolve().is_relative_to(webroot.resolve()):
            return None
        return os.read(descriptor, MAX_TOKEN)
    except OSError:
        return None
    finally:
        os.close(descriptor)


class _Connection(asyncio.Protocol):
    """One connection, one request."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder
        self._received = bytearray()
        self._answered = False
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._responder.opened(self)
        self._timer = asyncio.get_running_loop().call_later(DEADLINE, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self._responder.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None

    def abort(self) -> None:
        """End the connection at once."""
        self._responder.waiting.pop(self, None)
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answered:
            return None
        self._received += data
        head = head_of(self._received)
        if head is None or len(head) > MAX_HEAD:
            if len(self._received) > MAX_HEAD:
                self._reply(Answer(431))
            return None
        found = answer(head, self._responder.site)
        if isinstance(found, Answer):
            return self._reply(found)
        self._answered = True
        task = asyncio.get_running_loop().create_task(self._pass_on(found))
        self._responder.tasks.add(task)
        task.add_done_callback(self._responder.tasks.discard)
        return None

    async def _pass_on(self, asked: Challenge) -> None:
        self._reply(await self._responder.challenge(asked))

    def eof_received(self) -> bool:
        """A client that has said all it will may still wait for its answer."""
        return self._answered

    def _reply(self, found: Answer) -> None:
        self._answered, self._received = True, bytearray()
        if self._transport is None:
            return
        self._transport.write(found.encode())
        with suppress(OSError):  # the client has gone meanwhile
            self._transport.write_eof()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(LINGER, self.abort)


def inherited() -> list[socket.socket]:
    """Sockets that systemd opened for us (sd_listen_fds(3)); none where it did not start us.

    Raises:
        HostRefused: what it passed is no listening TCP socket.
    """
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    found = []
    for number in range(_LISTEN_FDS_START, _LISTEN_FDS_START + count):
        os.set_inheritable(number, False)
        each = socket.socket(fileno=number)
        if each.type != socket.SOCK_STREAM or not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise HostRefused(f"descriptor {number} is no listening TCP socket", hint="the unit needs ListenStream=")
        found.append(each)
    return found


def listen(port: int) -> list[socket.socket]:
    """Listening sockets on all addresses of this host: one for both families, or for IPv4 alone where there is no IPv6.

    Raises:
        HostRefused: the port cannot be had.
    """
    try:
        if socket.has_dualstack_ipv6():
            return [socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)]
        return [socket.create_server(("", port), backlog=BACKLOG)]
    except OSError as error:
        raise HostRefused(f"cannot listen on port {port}: {error.strerror}", hint="is another responder running?") from error


def give_up_root(user: str = "nobody") -> None:
    """Go on as an ordinary user, where we are root.

    Raises:
        HostRefused: there is no such user.
    """
    if os.geteuid() != 0:
        return
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise HostRefused(f"there is no user `{user}` to run as", hint="--user names one") from None
    os.setgroups([])
    os.setgid(entry.pw_gid if entry.pw_gid else grp.getgrnam("nogroup").gr_gid)
    os.setuid(entry.pw_uid)


def serve(sockets: list[socket.socket], responder: Responder) -> None:
    """Answer until SIGTERM or SIGINT."""
    responder.max_open = min(responder.max_open, _descriptors() - _SPARE_DESCRIPTORS)
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(sockets, responder))


def _descriptors() -> int:
    """How many files this process may have open, after asking for all it can get."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN + 2 * _SPARE_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN + 2 * _SPARE_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


async def _serve(sockets: list[socket.socket], responder: Responder) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    servers = [await loop.create_server(lambda: _Connection(responder), sock=each) for each in sockets]
    for each in sockets:
        each.listen(BACKLOG)  # create_server has set it to 100
    await ended.wait()
    for server in servers:
        server.close()
    for connection in list(responder.waiting):
        connection.abort()
