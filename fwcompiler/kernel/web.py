"""Asks this host's own web ports: the certificate that a TLS port shows, and where plain HTTP leads.

Only addresses that the caller names are asked, in the network namespace that the calling thread is in. Names are never looked
up: the host's name is only said in the request.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from fwcompiler.diagnostics import Unavailable, UsageError

TIMEOUT = 5.0
"""Seconds for each wait."""
WHOLE = 10.0
"""Seconds for a connection: a server that says one byte now and then would keep us for hours."""
MOST_HOPS = 6


def addresses_of(name: str) -> list[tuple[int, str]]:
    """What the resolver says about a name: (version, address)."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    versions = {socket.AF_INET: 4, socket.AF_INET6: 6}
    return sorted({(versions[family], str(to[0])) for family, _, _, _, to in found if family in versions})


def require_authority(path: str) -> None:
    """Check that a file holds certificates.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        reason = "it holds no certificate" if isinstance(error, ssl.SSLError) else _words(error).lower()
        raise UsageError(f"cannot use `{path}`: {reason}", hint="--ca names a certificate authority's PEM file") from error


def certificate_chain(address: str, port: int, name: str, authority: str | None = None) -> tuple[tuple[bytes, ...], str, str]:
    """The chain that a TLS port shows as DER, why this host does not trust it, and what went wrong talking TLS.

    `authority`: a PEM file of a certificate authority to trust beside the system's. Names are not compared here.

    Raises:
        Unavailable: nothing could be asked there.
    """
    try:
        socket.create_connection((address, port), timeout=TIMEOUT).close()
    except OSError as error:
        raise Unavailable(f"cannot connect to {address} port {port}: {_words(error)}") from error
    try:
        chain = _chain(address, port, name)
    except (OSError, ValueError) as error:
        return (), "", _words(error)
    try:
        _shake(address, port, name, authority)
    except ssl.SSLCertVerificationError as error:
        return chain, error.verify_message, ""
    except (OSError, ValueError) as error:
        return chain, _words(error), ""
    return chain, "", ""


def _words(error: Exception) -> str:
    """What went wrong, in words of ours where the other end chose the text."""
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:.0f} seconds"
    if isinstance(error, http.client.HTTPException):
        return "what answers does not talk HTTP"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS failed").lower().replace("_", " ")
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _chain(address: str, port: int, name: str) -> tuple[bytes, ...]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # What an old server shows is what is asked here, not whether it should talk like that.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with _connection(address, port) as plain, context.wrap_socket(plain, server_hostname=name) as channel:
        whole: Callable[[], list[bytes]] | None = getattr(channel, "get_unverified_chain", None)  # Python 3.13
        leaf = channel.getpeercert(binary_form=True)
        return tuple(whole()) if whole is not None else (leaf,) if leaf else ()


def _shake(address: str, port: int, name: str, authority: str | None) -> None:
    """A handshake that ends with an error where the chain is not trusted."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    if authority:
        context.load_verify_locations(authority)
    with _connection(address, port) as plain, context.wrap_socket(plain, server_hostname=name):
        pass


@contextmanager
def _connection(address: str, port: int) -> Iterator[socket.socket]:
    """A connection that ends after `WHOLE` seconds, wherever the talk is by then. TLS takes over the socket, so a second one ends it."""
    with socket.create_connection((address, port), timeout=TIMEOUT) as made, made.dup() as same:

        def end() -> None:
            with suppress(OSError):
                same.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(WHOLE, end)
        timer.daemon = True
        timer.start()
        try:
            yield made
        finally:
            timer.cancel()


def http_hops(address: str, port: int, name: str) -> tuple[tuple[tuple[str, int, str], ...], str]:
    """Follow plain HTTP from `/` as long as it stays with this host: (address asked for, status, where it leads), and what went wrong."""
    hops: list[tuple[str, int, str]] = []
    path, host = "/", name
    for _ in range(MOST_HOPS):
        url = f"http://{host}{path}"
        try:
            status, target = _get(address, port, host, path)
        except (OSError, http.client.HTTPException, ValueError) as error:
            return tuple(hops), "" if hops else _words(error)
        hops.append((url, status, target))
        following = _here(target, port) if 300 <= status < 400 else None
        if following is None:
            break
        host, path = following[0] or host, following[1]
    return tuple(hops), ""


def _here(target: str, port: int) -> tuple[str, str] | None:
    """Host and path of a target in plain HTTP on the same port; None where it leads elsewhere, or is no URL."""
    try:
        parts = urlsplit(target)
        if not target or parts.scheme not in ("", "http") or (parts.port or 80) != port:
            return None
        return parts.hostname or "", (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    except ValueError:
        return None


def _get(address: str, port: int, host: str, path: str) -> tuple[int, str]:
    with _connection(address, port) as made:
        connection = http.client.HTTPConnection(address, port)
        connection.sock = made
        connection.putrequest("GET", path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", host)
        connection.putheader("User-Agent", "fwc-audit")
        connection.putheader("Connection", "close")
        connection.endheaders()
        with connection.getresponse() as answer:
            return answer.status, answer.getheader("Location") or ""
