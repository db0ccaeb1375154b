"""Port 80 with `redirect: responder`: real connections, on every backend, to a responder and a web server that really run."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from livehost import FAMILY, HOST, PEERS, USABLE, Host, listed, live_host

from fwcompiler.addresses import address_text
from fwcompiler.registry import load

FWC = str(Path(sys.executable).with_name("fwc"))
POLICY = f"""groups:
  cluster: [{listed("one")}]
  bad: [{listed("two")}]
block: {{from: [bad]}}
services:
  http: {{from: anywhere, redirect: responder, plain: [cluster]}}
  https: {{from: anywhere}}
"""
REQUEST = b"GET /agc/ HTTP/1.1\r\nHost: dialer1.example.com\r\nConnection: close\r\n\r\n"


@pytest.fixture(params=USABLE)
def host(request: pytest.FixtureRequest, tmp_path: Path, kernel_allowed: bool) -> Iterator[Host]:
    """A host without any rules yet, for each backend whose programs are here."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    with live_host(load(request.param), tmp_path) as made:
        yield made


@contextmanager
def running(host: Host, argv: Sequence[str], port: int, version: int) -> Iterator[None]:
    """A server on the host, ready at its port."""
    with host.net.host.entered():
        process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 20
            while not _open(host, "host", version, port, 1):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield
        finally:
            process.kill()
            process.wait()


def _open(host: Host, who: str, version: int, port: int, wait: float) -> socket.socket | None:
    """A connection to a port of the host, or None where nobody lets it in."""
    made = host.socket(who, version, socket.SOCK_STREAM)
    made.settimeout(wait)
    try:
        made.connect((address_text(version, HOST[version]), port))
    except OSError:
        return None
    return made


def asked(host: Host, who: str, version: int, port: int, wait: float = 5) -> bytes:
    """What comes back for a request; nothing where there is no connection."""
    made = _open(host, who, version, port, wait)
    if made is None:
        return b""
    made.settimeout(5)
    made.sendall(REQUEST)
    received = b""
    while part := made.recv(65536):
        received += part
    return received


@pytest.mark.parametrize("version", [4, 6])
def test_who_gets_where(host: Host, version: int, tmp_path: Path) -> None:
    """A stranger is redirected, the cluster gets the page, a blocked source and the responder's own port get nothing."""
    (tmp_path / "agc").mkdir()
    (tmp_path / "agc" / "index.html").write_text("the page")
    host.apply(POLICY)
    bind = "0.0.0.0" if FAMILY[version] == socket.AF_INET else "::"
    web = (sys.executable, "-m", "http.server", "--bind", bind, "--directory", str(tmp_path), "80")

    with running(host, web, 80, version), running(host, (FWC, "responder"), 8880, version):
        stranger, cluster = (asked(host, who, version, 80) for who in ("stranger", "one"))
        directly = [asked(host, who, version, 8880, 0.7) for who in PEERS]
        blocked = asked(host, "two", version, 80, 0.7)

    assert stranger.startswith(b"HTTP/1.1 301 Moved Permanently\r\n")
    assert b"Location: https://dialer1.example.com/agc/\r\n" in stranger
    assert cluster.endswith(b"the page")
    assert directly == [b"", b"", b""]
    assert blocked == b""


def test_a_running_download_goes_on(host: Host) -> None:
    """A connection to the web server that is open when the responder comes into force is not cut off, nor redirected."""
    plain = POLICY.replace(", redirect: responder, plain: [cluster]", "")
    host.apply(plain)
    flow = host.tcp("stranger", 4, 80)
    flow.client.send(b"first")
    assert flow.arrives(b"first")

    host.apply(POLICY)
    flow.client.send(b"second")

    assert flow.arrives(b"second")
