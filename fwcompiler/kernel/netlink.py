"""Netfilter's netlink: messages, attributes, transactions and the kernel's errors, with the standard library alone.

Knows nothing of tables or sets. Layouts and numbers are those of ``include/uapi/linux/netlink.h`` and
``include/uapi/linux/netfilter/nfnetlink.h``. A :class:`Channel` speaks to the network namespace that the calling
thread is in when it is opened, and stays there.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from fwcompiler.diagnostics import HostRefused

Bytes = bytes | bytearray | memoryview

NETLINK_NETFILTER = 12
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_DROP_MEMBERSHIP = 2
NETLINK_CAP_ACK = 10  # an error carries the header of the message it is about, not all of its 64 KiB
NETLINK_EXT_ACK = 11  # ... and the kernel's text and the place in the message
SO_SNDBUFFORCE = 32  # asm-generic/socket.h; these two are missing from the socket module
SO_RCVBUFFORCE = 33

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
NLMSGERR_ATTR_OFFS = 2

NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
ATTRIBUTE_MAX = 0xFFFF - 4
"""Bytes an attribute can hold: its length is 16 bits and counts the four bytes of its header."""

NFNL_MSG_BATCH_BEGIN = 16
NFNL_MSG_BATCH_END = 17
NFNL_BATCH_GENID = 1

HEADER = 20
"""Bytes in front of a message's attributes: ``struct nlmsghdr`` (16) and ``struct nfgenmsg`` (4)."""

_RECEIVE = 8 << 20  # room for one error for each message of the largest batch
_DATAGRAM = 1 << 17  # the kernel fills dumps with up to 32 KiB; acknowledgements are smaller
_TIMEOUT = struct.pack("@ll", 60, 0)  # struct timeval; the kernel answers at once, but nobody should hang on it for ever
_DUMP_TRIES = 10

_MESSAGE = struct.Struct("=IHHIIBB")
_ATTRIBUTE = struct.Struct("=HH")


class NetlinkError(HostRefused):
    """The kernel's refusal of one message: ``sequence`` says which, ``offset`` the attribute in it it was about."""

    def __init__(self, number: int, text: str = "", sequence: int = 0, offset: int | None = None, hint: str = "") -> None:
        self.errno, self.text, self.sequence, self.offset = number, text, sequence, offset
        super().__init__(self.reason, hint=hint)

    @property
    def reason(self) -> str:
        """The errno in words and by name, then what the kernel added to it."""
        name = errno.errorcode.get(self.errno, str(self.errno))
        return f"{os.strerror(self.errno)} ({name})" + (f": {self.text}" if self.text else "")


class StaleGeneration(NetlinkError):
    """The ruleset changed since its generation was read, so the guarded transaction was not carried out."""


class Unacknowledged(NetlinkError):
    """The kernel's answer got lost: the transaction may have been carried out, or not."""


class Reply(NamedTuple):
    """One received message: its attributes lie in ``data`` from ``HEADER`` on."""

    kind: int
    flags: int
    sequence: int
    data: bytes


def attribute(kind: int, payload: Bytes) -> bytes:
    """One attribute, padded to a multiple of four."""
    return b"".join((_ATTRIBUTE.pack(4 + len(payload), kind), payload, bytes(-len(payload) % 4)))


def nested(kind: int, *parts: Bytes) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


def string(kind: int, value: str) -> bytes:
    """A text attribute; the kernel wants the closing zero."""
    return attribute(kind, value.encode() + b"\0")


def attributes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Walk the attributes in ``data[start:end]``: type without flags, and where the payload begins and ends."""
    stop = len(data) if end is None else end
    while start + 4 <= stop:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4:
            return
        yield kind & NLA_TYPE_MASK, start + 4, start + length
        start += (length + 3) & ~3


def message(kind: int, flags: int, sequence: int, family: int, resource: int, *parts: Bytes) -> bytes:
    """A netfilter message; ``kind`` is subsystem and operation as in ``NFNL_SUBSYS_ID``. ``resource`` is big-endian."""
    length = HEADER + sum(map(len, parts))
    head = _MESSAGE.pack(length, kind, flags | NLM_F_REQUEST, sequence, 0, family, 0) + resource.to_bytes(2, "big")
    return b"".join((head, *parts))


class Batch:
    """Messages of one subsystem that are carried out as one transaction, or not at all.

    With ``generation`` the kernel refuses it once another transaction came in between.
    """

    def __init__(self, subsystem: int, family: int, generation: int | None = None) -> None:
        self.subsystem, self.family, self.generation = subsystem, family, generation
        guard = b"" if generation is None else attribute(NFNL_BATCH_GENID, struct.pack(">I", generation))
        # Without the flag on the first message kernels keep quiet about a stale generation.
        self.messages = [message(NFNL_MSG_BATCH_BEGIN, NLM_F_ACK, 0, socket.AF_UNSPEC, subsystem, guard)]

    def add(self, operation: int, flags: int, *parts: Bytes) -> int:
        """Append a message and return its sequence number, which errors refer to."""
        sequence = len(self.messages)
        self.messages.append(message(self.subsystem << 8 | operation, flags, sequence, self.family, 0, *parts))
        return sequence

    @property
    def last(self) -> int:
        """Sequence number of the last message that does something."""
        return len(self.messages) - 1

    def encoded(self) -> bytes:
        """The bytes to send: one acknowledgement is asked for at each end, a thousand would flood the socket."""
        final = bytearray(self.messages[-1])
        final[6] |= NLM_F_ACK
        end = message(NFNL_MSG_BATCH_END, 0, len(self.messages), socket.AF_UNSPEC, self.subsystem)
        return b"".join((*self.messages[:-1], final, end))


class Channel:
    """An open netfilter socket; use it as a context manager."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        except OSError as error:
            raise _from_os(error) from error
        # Not settimeout(): with it Python waits even where MSG_DONTWAIT says not to.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._grow(SO_RCVBUFFORCE, socket.SO_RCVBUF, _RECEIVE)
        self._buffer = bytearray(_DATAGRAM)
        self._sequence = 0
        self._interrupted = False

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def transact(self, batch: Batch) -> None:
        """Carry out a batch, or change nothing.

        Raises:
            StaleGeneration: the batch's generation is no longer the present one.
            NetlinkError: the first refusal, in the order of the messages.
        """
        data = batch.encoded()
        self._grow(SO_SNDBUFFORCE, socket.SO_SNDBUF, len(data) + 4096)
        self._send(data)
        # The kernel works inside send(): whatever it has to say is queued by now.
        verdicts = [(reply.sequence, _error(reply)) for reply in self._queued() if reply.kind == NLMSG_ERROR]
        errors = [error for _, error in verdicts if error]
        if errors:
            first = min(errors, key=lambda e: e.sequence)
            if batch.generation is not None and first.errno == errno.ERESTART:
                raise StaleGeneration(first.errno, "the ruleset was changed by someone else in the meantime")
            raise first
        if (batch.last, None) not in verdicts:
            raise Unacknowledged(errno.ENODATA, "the kernel did not say what became of the transaction", batch.last)

    def ask(self, kind: int, family: int, *parts: Bytes) -> list[bytes]:
        """One question, all of its answers.

        Raises:
            NetlinkError: the kernel refused it.
        """
        self._sequence += 1
        self._send(message(kind, NLM_F_ACK, self._sequence, family, 0, *parts))
        return list(self._answers())

    def ask_each(self, kind: int, family: int, parts: Sequence[bytes], flags: int = 0) -> list[NetlinkError | None]:
        """Independent requests in one send, one for each of `parts`; for each what the kernel refused it with, or None.

        Raises:
            NetlinkError: an answer got lost.
        """
        first = self._sequence + 1
        self._sequence += len(parts)
        self._send(b"".join(message(kind, flags | NLM_F_ACK, first + n, family, 0, part) for n, part in enumerate(parts)))
        answers = {reply.sequence: _error(reply) for reply in self._queued() if reply.kind == NLMSG_ERROR}
        if not all(first + n in answers for n in range(len(parts))):
            raise Unacknowledged(errno.ENODATA, "the kernel did not answer every request")
        return [answers[first + n] for n in range(len(parts))]

    def join(self, group: int) -> None:
        """Hear what the kernel tells a multicast group.

        Raises:
            NetlinkError: it does not let us.
        """
        try:
            if self._socket.getsockname()[0] == 0:
                self._socket.bind((0, 0))  # what has no address joins, and hears nothing
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except OSError as error:
            raise _from_os(error) from error

    def leave(self, group: int) -> None:
        """Hear no more of what the kernel tells a multicast group.

        Raises:
            NetlinkError: it does not let us.
        """
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, group)
        except OSError as error:
            raise _from_os(error) from error

    def events(self) -> Iterator[Reply]:
        """What was heard so far.

        Raises:
            NetlinkError: there was more than the socket has room for, and some of it is lost.
        """
        try:
            while True:
                yield from self._receive(socket.MSG_DONTWAIT)
        except NetlinkError as error:
            if error.errno != errno.EAGAIN:
                raise

    def dump(self, kind: int, family: int, *parts: Bytes) -> list[bytes]:
        """All entries of a listing, taken anew when the ruleset changed half-way.

        Raises:
            NetlinkError: the kernel refused it, or the ruleset did not hold still.
        """
        for _ in range(_DUMP_TRIES):
            self._sequence += 1
            self._interrupted = False
            self._send(message(kind, NLM_F_DUMP, self._sequence, family, 0, *parts))
            answers = list(self._answers())
            if not self._interrupted:
                return answers
        raise NetlinkError(errno.EINTR, f"the ruleset changed during each of {_DUMP_TRIES} readings")

    def _answers(self) -> Iterator[bytes]:
        while True:
            for reply in self._receive():
                if reply.sequence != self._sequence:
                    continue
                if reply.flags & NLM_F_DUMP_INTR and reply.kind != NLMSG_ERROR:
                    self._interrupted = True
                if reply.kind in (NLMSG_ERROR, NLMSG_DONE):
                    error = _error(reply)
                    if error:
                        raise error
                    return
                yield reply.data

    def _queued(self) -> Iterator[Reply]:
        while True:
            try:
                yield from self._receive(socket.MSG_DONTWAIT)
            except NetlinkError as error:
                if error.errno == errno.EAGAIN:
                    return
                if error.errno != errno.ENOBUFS:  # more answers than room: the first ones are still there
                    raise

    def _receive(self, flags: int = 0) -> list[Reply]:
        try:
            size = self._socket.recv_into(self._buffer, 0, flags)
        except OSError as error:
            raise _from_os(error) from error
        return list(_messages(bytes(memoryview(self._buffer)[:size])))

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, (0, 0))
        except OSError as error:
            raise _from_os(error) from error

    def _grow(self, force: int, plain: int, size: int) -> None:
        """Make room in a socket buffer; beyond the system's limit only root of the first user namespace may."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, plain, size)


def _messages(data: bytes) -> Iterator[Reply]:
    start = 0
    while start + 16 <= len(data):
        length, kind, flags, sequence = struct.unpack_from("=IHHI", data, start)
        if length < 16:
            return
        yield Reply(kind, flags, sequence, data[start : start + length])
        start += (length + 3) & ~3


def _error(reply: Reply) -> NetlinkError | None:
    """What an acknowledgement (``struct nlmsgerr``) or the end of a dump says; None: all is well."""
    number = -int(struct.unpack_from("=i", reply.data, 16)[0]) if len(reply.data) >= 20 else 0
    if number == 0:
        return None
    text, offset, start = "", None, 20
    if reply.kind == NLMSG_ERROR:
        # The message it is about follows: its header only, or all of it.
        original = struct.unpack_from("=I", reply.data, 20)[0]
        start += 16 if reply.flags & NLM_F_CAPPED else (original + 3) & ~3
    if reply.flags & NLM_F_ACK_TLVS:
        for kind, low, high in attributes(reply.data, start):
            if kind == NLMSGERR_ATTR_MSG:
                text = reply.data[low:high].rstrip(b"\0").decode("utf-8", "replace")
            elif kind == NLMSGERR_ATTR_OFFS:
                offset = int(struct.unpack_from("=I", reply.data, low)[0])
    return NetlinkError(number, text, reply.sequence, offset)


def _from_os(error: OSError) -> NetlinkError:
    number = error.errno or errno.EIO
    hint = ""
    if number == errno.EMSGSIZE:
        hint = "a transaction of this size needs root outside of user namespaces, or a larger net.core.wmem_max"
    return NetlinkError(number, hint=hint)
