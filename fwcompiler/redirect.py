"""What the responder answers to a request on port 80: where HTTP ends and HTTPS begins. Pure: bytes in, an answer out.

A request is read as RFC 9112 has it, and only its head. GET and HEAD are answered with 301, everything else with 308,
which keeps the method and the body (RFC 9110, 15.4.2 and 15.4.9). The answer names the host that was asked for, never
another one, and only if it looks like a host: so nobody can be sent elsewhere by way of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fwcompiler.addresses import AddressError, parse_address

MAX_HEAD = 8192
"""Bytes that a request's head may have; browsers send less than 2,000."""
ACME_PATH = "/.well-known/acme-challenge/"
"""Where a certificate authority looks for its token (RFC 8555, 8.3)."""

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) (\S{1,8000}) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]{2,45}\]")
_TARGET = re.compile(r"/[!-\"$-;=?-\[\]_a-z~|{}^\\`]*")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,256}")

_REASONS = {
    200: "OK",
    301: "Moved Permanently",
    308: "Permanent Redirect",
    400: "Bad Request",
    404: "Not Found",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    502: "Bad Gateway",
    505: "HTTP Version Not Supported",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response. `location` only where it redirects."""

    status: int
    location: str = ""
    body: bytes = b""
    head_only: bool = False

    def encode(self) -> bytes:
        """The response as bytes; the connection ends with it."""
        lines = [f"HTTP/1.1 {self.status} {_REASONS[self.status]}", f"Content-Length: {len(self.body)}", "Connection: close"]
        if self.location:
            lines.append(f"Location: {self.location}")
        if self.body:
            lines += ["Content-Type: text/plain; charset=utf-8", "X-Content-Type-Options: nosniff"]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        return head if self.head_only else head + self.body


@dataclass(frozen=True, slots=True)
class Challenge:
    """A certificate authority asks for a token: whoever holds it answers. `host` as the request names it."""

    token: str
    host: str
    head_only: bool = False


@dataclass(frozen=True, slots=True)
class Site:
    """What is redirected: `names` that are served (none: whatever looks like a host), and the port that HTTPS is on.

    A name that begins with ``*.`` stands for every name one label below it.
    """

    names: tuple[str, ...] = ()
    https_port: int = 443

    def serves(self, host: str) -> bool:
        """True where requests for that host are redirected."""
        if not self.names:
            return True
        name = host.lower().rstrip(".")
        above = f"*.{name.partition('.')[2]}"
        return any(known.lower() in (name, above) for known in self.names)


def head_of(data: bytes | bytearray) -> bytes | None:
    """The head of a request without its last line break, or None while it is not all there.

    Blank lines before it are skipped (RFC 9112, 2.2). A line break may be a bare LF there, but not inside a field.
    """
    start = 0
    while data[start : start + 1] in (b"\r", b"\n"):
        start += 1
    ends = [at for at in (data.find(b"\r\n\r\n", start), data.find(b"\n\n", start)) if at >= 0]
    return bytes(data[start : min(ends)]) if ends else None


def answer(head: bytes, site: Site) -> Answer | Challenge:
    """What a request with this head gets."""
    lines = head.split(b"\r\n") if b"\r\n" in head else head.split(b"\n")
    line = _REQUEST_LINE.fullmatch(lines[0])
    if line is None:
        return Answer(505 if re.search(rb" HTTP/[2-9](\.\d)?$", lines[0]) else 400)
    method, target, minor = line[1].decode(), line[2].decode("latin-1"), line[3]
    hosts = _hosts(lines[1:])
    if hosts is None or len(hosts) > 1 or (minor == b"1" and not hosts):
        return Answer(400)
    authority, path = _split(target, hosts[0] if hosts else "")
    host = _host(authority) if authority else (site.names[0] if site.names and not site.names[0].startswith("*") else None)
    if host is None or path is None:
        return Answer(400)
    if not site.serves(host):
        return Answer(421)
    head_only = method == "HEAD"
    if path.startswith(ACME_PATH) and method in ("GET", "HEAD"):
        token = path.removeprefix(ACME_PATH)
        return Challenge(token, host, head_only) if _TOKEN.fullmatch(token) else Answer(404)
    port = "" if site.https_port == 443 else f":{site.https_port}"
    return Answer(301 if method in ("GET", "HEAD") else 308, f"https://{host}{port}{path}")


def _hosts(lines: list[bytes]) -> list[str] | None:
    """Values of all Host fields; None where a line is no field (obsolete folding among them: RFC 9112, 5.2)."""
    found: list[str] = []
    for each in lines:
        match = _FIELD.fullmatch(each)
        if match is None:
            return None
        if match[1].lower() == b"host":
            found.append(match[2].decode("latin-1"))
    return found


def _split(target: str, host: str) -> tuple[str, str | None]:
    """Authority and path of a request target, which may be a whole URI (RFC 9112, 3.2.2); None: not what we answer."""
    if target[:7].lower() == "http://":
        host, slash, rest = target[7:].partition("/")
        host, question, query = host.partition("?")
        target = f"/{rest}" if slash else f"/{question}{query}"
    return host, target if _TARGET.fullmatch(target) else None


def _host(authority: str) -> str | None:
    """The host of `host:port`, lower case; None where it is none. The port is that of plain HTTP, so it goes."""
    name, colon, port = authority.rpartition(":") if not authority.endswith("]") else (authority, "", "")
    if not colon:
        name = authority
    elif port and not (port.isascii() and port.isdigit() and len(port) <= 5):
        return None
    if len(name) > 253 or not (_NAME.fullmatch(name) or _is_ipv6(name)):
        return None
    return name.lower()


def _is_ipv6(name: str) -> bool:
    """True for an address of IPv6 in brackets, without a zone (RFC 3986, 3.2.2)."""
    if not _IPV6.fullmatch(name):
        return False
    try:
        return parse_address(name[1:-1])[0] == 6
    except AddressError:
        return False


def challenge_file(token: str) -> str:
    """The file's name below a webroot."""
    return f"{ACME_PATH[1:]}{token}"


def challenge_request(challenge: Challenge) -> bytes:
    """The request that passes a challenge on to the web server."""
    return f"GET {ACME_PATH}{challenge.token} HTTP/1.0\r\nHost: {challenge.host}\r\nConnection: close\r\n\r\n".encode("latin-1")


def challenge_answer(response: bytes, *, head_only: bool) -> Answer:
    """The web server's answer to a challenge, cut down to what an authority needs: its status and its body."""
    head, _, body = response.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", head)
    if status is None:
        return Answer(502, head_only=head_only)
    if status[1] != b"200":
        return Answer(404, head_only=head_only)
    length = re.search(rb"(?im)^content-length:[ \t]*(\d{1,6})[ \t]*\r?$", head)
    return Answer(200, body=body[: int(length[1])] if length else body, head_only=head_only)
