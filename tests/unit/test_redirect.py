"""What the responder answers, request by request, without a socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwcompiler.redirect import MAX_HEAD, Answer, Challenge, Site, answer, challenge_answer, challenge_request, head_of

ANY = Site()


def get(target: str, host: str = "dialer1.example.com", method: str = "GET", site: Site = ANY) -> Answer | Challenge:
    """The answer to a plain request."""
    return answer(f"{method} {target} HTTP/1.1\r\nHost: {host}".encode("latin-1"), site)


@pytest.mark.parametrize(
    ("method", "status"), [("GET", 301), ("HEAD", 301), ("POST", 308), ("PUT", 308), ("DELETE", 308), ("OPTIONS", 308)]
)
def test_only_get_and_head_may_change_the_method(method: str, status: int) -> None:
    """GET and HEAD get 301; everything else 308, which keeps method and body."""
    assert get("/agc/vicidial.php?a=1&b=%20", method=method) == Answer(status, "https://dialer1.example.com/agc/vicidial.php?a=1&b=%20")


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("dialer1", "dialer1"),
        ("Dialer1.Example.COM", "dialer1.example.com"),
        ("dialer1.example.com:80", "dialer1.example.com"),
        ("dialer1.example.com:", "dialer1.example.com"),
        ("192.0.2.7:8080", "192.0.2.7"),
        ("[2001:db8::7]", "[2001:db8::7]"),
        ("[2001:db8::7]:80", "[2001:db8::7]"),
        ("dialer_1.example.com.", "dialer_1.example.com."),
    ],
)
def test_the_port_of_plain_http_goes(host: str, named: str) -> None:
    """The answer names the host that was asked for, without the port that was plain HTTP's."""
    assert get("/", host) == Answer(301, f"https://{named}/")


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a b",
        "a/b",
        "user@evil.example",
        "a.example@evil.example",
        "evil.example#",
        "evil.example?x",
        "a\\b",
        "a..b",
        "-a",
        "a:b",
        "a:80:80",
        "[::1",
        "[:::::]",
        "[1.2.3.4]",
        "[12345::]",
        "::1",
        "a" * 64 + ".example",
        ".".join(["a" * 60] * 5),
        "a.example,b.example",
        "%0d%0a",
        "a\tb",
        "\xe4.example",
        "a:\u00b2",
    ],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    """A Host that is no name and no address is never copied into a Location."""
    assert get("/", host) == Answer(400)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET / HTTP/1.1",
        b"GET /\r\nHost: a",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded: b",
        b"GET / HTTP/1.1\r\nHost : a",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: b\nLocation: c",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: b\0c",
        b"GET  / HTTP/1.1\r\nHost: a",
        b"GET / HTTP/1.1 \r\nHost: a",
        b"GET /a b HTTP/1.1\r\nHost: a",
        b"GET * HTTP/1.1\r\nHost: a",
        b"OPTIONS * HTTP/1.1\r\nHost: a",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: a",
        b"GET https://evil.example/ HTTP/1.1\r\nHost: a",
        b"GET /\xff HTTP/1.1\r\nHost: a",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
)
def test_what_is_no_request_is_refused(head: bytes) -> None:
    """Anything that RFC 9112 does not call a request for us gets 400."""
    assert answer(head, ANY) == Answer(400)


def test_other_versions() -> None:
    """HTTP/1.0 may leave Host out, which helps only where one name is known; HTTP/2 without TLS is refused."""
    assert answer(b"GET /x HTTP/1.0", ANY) == Answer(400)
    assert answer(b"GET /x HTTP/1.0", Site(("a.example",))) == Answer(301, "https://a.example/x")
    assert answer(b"PRI * HTTP/2.0", ANY) == Answer(505)


def test_nobody_is_sent_elsewhere() -> None:
    """A path that looks like another host stays a path behind ours; a whole URI names its own host."""
    assert get("//evil.example/x") == Answer(301, "https://dialer1.example.com//evil.example/x")
    assert get("http://b.example/x?y", "a.example") == Answer(301, "https://b.example/x?y")
    assert get("http://b.example?y", "a.example") == Answer(301, "https://b.example/?y")
    assert get("http://x@evil.example/", "a.example") == Answer(400)


def test_only_known_names() -> None:
    """With names given, requests for others are misdirected: 421."""
    site = Site(("dialer1.example.com", "*.agents.example"), 8443)

    assert get("/", site=site) == Answer(301, "https://dialer1.example.com:8443/")
    assert get("/", "DIALER1.example.com.", site=site) == Answer(301, "https://dialer1.example.com.:8443/")
    assert get("/", "a.agents.example", site=site) == Answer(301, "https://a.agents.example:8443/")
    for other in ("agents.example", "a.b.agents.example", "evil.example", "dialer1.example.com.evil.example"):
        assert get("/", other, site=site) == Answer(421)


def test_challenges() -> None:
    """An ACME token is handed on; what only looks like one is not there; a POST to it is redirected like any other."""
    assert get("/.well-known/acme-challenge/a-B_9") == Challenge("a-B_9", "dialer1.example.com")
    assert get("/.well-known/acme-challenge/a", method="HEAD") == Challenge("a", "dialer1.example.com", head_only=True)
    for other in ("", "../../etc/passwd", "a/b", "%2e%2e", "a?b", "a" * 257):
        assert get(f"/.well-known/acme-challenge/{other}") == Answer(404)
    posted = get("/.well-known/acme-challenge/a", method="POST")
    assert isinstance(posted, Answer)
    assert posted.status == 308


def test_challenge_is_passed_on() -> None:
    """The web server is asked for the same token and host; only a 200 with its body comes back."""
    assert challenge_request(Challenge("tok", "a.example")) == (
        b"GET /.well-known/acme-challenge/tok HTTP/1.0\r\nHost: a.example\r\nConnection: close\r\n\r\n"
    )
    assert challenge_answer(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef", head_only=False) == Answer(200, body=b"abc")
    assert challenge_answer(b"HTTP/1.0 200 OK\r\n\r\nabc", head_only=False) == Answer(200, body=b"abc")
    assert challenge_answer(b"HTTP/1.1 301 Moved\r\nLocation: https://evil.example\r\n\r\n", head_only=False) == Answer(404)
    assert challenge_answer(b"rubbish", head_only=False) == Answer(502)


def test_encoded() -> None:
    """An answer has a length and closes the connection; to HEAD it has no body."""
    assert Answer(301, "https://a/").encode() == (
        b"HTTP/1.1 301 Moved Permanently\r\nContent-Length: 0\r\nConnection: close\r\nLocation: https://a/\r\n\r\n"
    )
    assert Answer(200, body=b"x").encode().endswith(b"\r\n\r\nx")
    assert b"Content-Length: 1" in Answer(200, body=b"x", head_only=True).encode()
    assert Answer(200, body=b"x", head_only=True).encode().endswith(b"\r\n\r\n")


def test_head_of() -> None:
    """The head is there once its empty line is; blank lines in front do not count."""
    assert head_of(b"GET / HTTP/1.1\r\nHost: a\r\n") is None
    assert head_of(b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nbody\r\n\r\n") == b"GET / HTTP/1.1\r\nHost: a"
    assert head_of(b"GET / HTTP/1.0\n\n") == b"GET / HTTP/1.0"


@given(st.binary(max_size=MAX_HEAD))
def test_any_bytes_get_an_answer(data: bytes) -> None:
    """Whatever arrives, there is an answer, and no byte of it ends a header line early."""
    found = answer(data, ANY)

    if isinstance(found, Answer):
        assert found.encode().count(b"\r\n\r\n") == 1
        assert "\n" not in found.location


@given(st.text(alphabet=st.characters(max_codepoint=255), max_size=60), st.text(alphabet=st.characters(max_codepoint=255), max_size=60))
def test_a_location_is_the_host_that_was_asked_for(target: str, host: str) -> None:
    """Whatever target and Host say, a redirect goes to the host the request itself is for."""
    found = get("/" + target, host)

    if isinstance(found, Answer) and found.location:
        asked = host.strip(" \t").lower()
        named = found.location.removeprefix("https://").partition("/")[0]
        assert asked in (named, f"{named}:") or asked.rpartition(":")[0] == named
