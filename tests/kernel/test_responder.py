"""The responder as a process in a namespace of its own, asked over real connections."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import kernelspace
import pytest

from fwcompiler.kernel.responder import MOST_ASKED

FWC = str(Path(sys.executable).with_name("fwc"))
PORT = 8880
REQUEST = b"GET /x HTTP/1.1\r\nHost: dialer1.example.com\r\n\r\n"


@pytest.fixture
def inside(space: kernelspace.Space) -> Iterator[kernelspace.Space]:
    """This thread inside a namespace whose loopback interface is up."""
    space.run("ip", "link", "set", "lo", "up")
    with space.entered():
        yield space


@contextmanager
def running(*arguments: str, argv: tuple[str, ...] = (FWC,), port: int = PORT) -> Iterator[subprocess.Popen[bytes]]:
    """A responder that listens; it is ended with SIGTERM, which it has to take as its end."""
    process = subprocess.Popen([*argv, "responder", *arguments])
    try:
        _wait(lambda: _connects(port))
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def _wait(ready: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "not ready in time"
        time.sleep(0.02)


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def ask(request: bytes = REQUEST, address: str = "127.0.0.1", port: int = PORT) -> bytes:
    """What comes back for these bytes, read to the end."""
    with socket.create_connection((address, port), 10) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


@pytest.mark.usefixtures("inside")
def test_redirects_in_both_families() -> None:
    """A request over IPv4 or IPv6 gets its redirect, and the connection ends."""
    with running("--name", "dialer1.example.com"):
        for address in ("127.0.0.1", "::1"):
            assert ask(address=address) == (
                b"HTTP/1.1 301 Moved Permanently\r\nContent-Length: 0\r\nConnection: close\r\n"
                b"Location: https://dialer1.example.com/x\r\n\r\n"
            )
        assert ask(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n").startswith(b"HTTP/1.1 421 ")


@pytest.mark.usefixtures("inside")
def test_a_large_post_gets_its_answer() -> None:
    """A body that nobody reads does not reset the connection before the answer has arrived."""
    body = b"x" * 3_000_000
    head = b"POST /agc/api.php HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n" % len(body)

    with running():
        found = ask(head + body)

    assert found.startswith(b"HTTP/1.1 308 Permanent Redirect\r\n")
    assert b"Location: https://a.example/agc/api.php\r\n" in found


@pytest.mark.usefixtures("inside")
def test_idle_connections_do_not_keep_others_out() -> None:
    """With thousands of connections that say nothing, or one byte now and then, everybody else is served."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5000
    if hard != resource.RLIM_INFINITY and hard < wanted + 200:
        pytest.skip("this user may not open thousands of files")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + 200, hard))
    try:
        with running() as process, ExitStack() as held:
            for i in range(wanted):
                idle = held.enter_context(socket.create_connection(("127.0.0.1", PORT), 10))
                if i % 2:
                    idle.sendall(b"GET /")
                if i % 1000 == 0:
                    assert ask().startswith(b"HTTP/1.1 301 ")
            assert ask().startswith(b"HTTP/1.1 301 ")
            assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 4300
            resident = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()).group(1))  # type: ignore[union-attr]
            assert resident < 150_000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("inside")
def test_many_wait_to_be_taken_in() -> None:
    """A burst that comes while the responder has no time is kept for it, as long as the kernel's own limit allows."""
    with running() as process, ExitStack() as held:
        process.send_signal(signal.SIGSTOP)
        try:
            for _ in range(400):
                held.enter_context(socket.create_connection(("127.0.0.1", PORT), 2))
        finally:
            process.send_signal(signal.SIGCONT)
        assert ask().startswith(b"HTTP/1.1 301 ")


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("sent", [b"A" * 100_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, b"\0" * 9000])
def test_endless_heads_are_refused(sent: bytes) -> None:
    """A head that does not end is answered with 431, not kept."""
    with running():
        assert ask(sent).startswith(b"HTTP/1.1 431 ")
        assert ask().startswith(b"HTTP/1.1 301 ")


@pytest.mark.usefixtures("inside")
def test_rubbish_is_survived() -> None:
    """TLS on the wrong port, bare line breaks and connections that are reset leave it serving."""
    with running():
        for sent in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"\n\n\n\nGET\n\n", b"GET / HTTP/9.9\r\n\r\n"):
            assert ask(sent).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 505 "))
        for _ in range(50):
            reset = socket.create_connection(("127.0.0.1", PORT))
            reset.sendall(b"GET / HT")
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            reset.close()
        assert ask().startswith(b"HTTP/1.1 301 ")


@pytest.mark.usefixtures("inside")
def test_challenges_from_a_webroot(tmp_path: Path) -> None:
    """A token's file arrives; links, folders and pipes in its place are not there."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "webroot" / ".well-known" / "acme-challenge"
    folder.mkdir(parents=True)
    (folder / "token-1").write_text("token-1.thumbprint")
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")

    with running("--acme-webroot", str(tmp_path / "webroot"), "--user", "root"):
        found = ask(b"GET /.well-known/acme-challenge/token-1 HTTP/1.1\r\nHost: a.example\r\n\r\n")
        others = [
            ask(b"GET /.well-known/acme-challenge/%s HTTP/1.1\r\nHost: a\r\n\r\n" % name) for name in (b"link", b"folder", b"pipe", b"no")
        ]

    assert found.endswith(b"\r\n\r\ntoken-1.thumbprint")
    assert all(other.startswith(b"HTTP/1.1 404 ") for other in others)


@pytest.mark.usefixtures("inside")
def test_challenges_from_the_web_server(tmp_path: Path) -> None:
    """A token is asked for at the web server; where that is down, the authority is told so."""
    folder = tmp_path / ".well-known" / "acme-challenge"
    folder.mkdir(parents=True)
    (folder / "token-1").write_text("token-1.thumbprint")
    wanted = b"GET /.well-known/acme-challenge/token-1 HTTP/1.1\r\nHost: a.example\r\n\r\n"

    with running("--acme-server", "127.0.0.1:8081"):
        assert ask(wanted).startswith(b"HTTP/1.1 502 ")
        argv = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(tmp_path), "8081"]
        server = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        try:
            _wait(lambda: _connects(8081))
            assert ask(wanted).endswith(b"\r\n\r\ntoken-1.thumbprint")
            assert ask(wanted.replace(b"token-1", b"token-2")).startswith(b"HTTP/1.1 404 ")
        finally:
            server.kill()
            server.wait()


@pytest.mark.usefixtures("inside")
def test_clients_that_do_not_wait_for_their_answer(capfd: pytest.CaptureFixture[str]) -> None:
    """Who asks and is gone leaves nothing behind, in the log as little as in memory."""
    with running() as process:
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", PORT), 10) as asking:
                asking.sendall(b"GET /.well-known/acme-challenge/token HTTP/1.1\r\nHost: a\r\n\r\n")
        assert ask().startswith(b"HTTP/1.1 301 ")
        _wait(lambda: len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 20)

    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("inside")
def test_the_web_server_is_not_flooded_with_challenges() -> None:
    """However many ask for tokens: the web server, which says nothing here, is asked for a few at once, and others get their answer."""
    with ExitStack() as held:
        silent = held.enter_context(socket.create_server(("127.0.0.1", 8081), backlog=512))
        held.enter_context(running("--acme-server", "127.0.0.1:8081"))
        for _ in range(200):
            asking = held.enter_context(socket.create_connection(("127.0.0.1", PORT), 10))
            asking.sendall(b"GET /.well-known/acme-challenge/token HTTP/1.1\r\nHost: a\r\n\r\n")
        assert ask().startswith(b"HTTP/1.1 301 ")
        silent.settimeout(0.5)
        came = 0
        with suppress(TimeoutError):
            while True:
                held.enter_context(silent.accept()[0])
                came += 1

    assert 0 < came <= MOST_ASKED


@pytest.mark.usefixtures("inside")
def test_started_by_systemd(tmp_path: Path) -> None:
    """A socket that is passed as systemd passes it is served, on its own port and as the user that was given."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        textwrap.dedent("""
        import os, socket, sys
        each = socket.create_server(("", 8001))
        os.dup2(each.fileno(), 3)
        os.set_inheritable(3, True)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        os.execv(sys.argv[1], sys.argv[1:])
        """)
    )

    with running(argv=(sys.executable, str(launcher), FWC), port=8001) as process:
        assert ask(port=8001).startswith(b"HTTP/1.1 301 ")
        assert not _connects(PORT)
        _wait(lambda: Path(f"/proc/{process.pid}").stat().st_uid != 0)


@pytest.mark.usefixtures("inside")
def test_two_on_one_port() -> None:
    """A second responder says that the port is taken and ends with 4."""
    with running():
        second = subprocess.run([FWC, "responder"], capture_output=True, text=True, check=False)

    assert second.returncode == 4
    assert "cannot listen on port 8880" in second.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--acme-webroot", "/", "--acme-server", "127.0.0.1:80"),
        ("--acme-webroot", "/nonexistent"),
        ("--acme-server", "localhost:80"),
        ("--acme-server", "127.0.0.1:0"),
        ("--listen", "70000"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...]) -> None:
    """What cannot be meant is a usage error, before anything listens."""
    done = subprocess.run([FWC, "responder", *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
