"""Servers that draw out what they say: the audit ends all the same."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fwcompiler.kernel import web

PIECES = 100


@contextmanager
def dripping(text: bytes) -> Iterator[tuple[int, list[int]]]:
    """A server that says one byte after the other: its port, and how many bytes each connection was sent."""
    sent: list[int] = []
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)

        def serve() -> None:
            while not ended.is_set():
                try:
                    channel, _ = listener.accept()
                except TimeoutError:
                    continue
                with channel:
                    sent.append(0)
                    try:
                        while sent[-1] < PIECES and not ended.wait(0.05):
                            channel.sendall(text[sent[-1] % len(text) :][:1])
                            sent[-1] += 1
                    except OSError:
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], sent
        finally:
            ended.set()
            thread.join()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of it than in earnest."""
    monkeypatch.setattr(web, "WHOLE", 0.4)


def test_plain_http() -> None:
    """A head that never ends is cut off, and what came of it by then is no redirect."""
    with dripping(b"HTTP/1.1 301 Moved\r\nX: " + b"x" * PIECES) as (port, sent):
        hops, error = web.http_hops("127.0.0.1", port, "dialer1.example.net")

    assert (hops, bool(error)) == ((), True)
    assert 0 < max(sent) < PIECES


def test_tls() -> None:
    """So is a handshake."""
    # The head of a handshake record, which promises more than will come (RFC 8446, 5.1).
    with dripping(b"\x16\x03\x03\x02\x00" + b"\x02" * PIECES) as (port, sent):
        chain, distrust, error = web.certificate_chain("127.0.0.1", port, "dialer1.example.net")

    assert (chain, distrust, bool(error)) == ((), "", True)
    assert 0 < max(sent) < PIECES
