"""The command that serves: `responder`, which ends plain HTTP at HTTPS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwcompiler.catalogue import RESPONDER_PORT
from fwcompiler.commands.app import app
from fwcompiler.diagnostics import EXIT_OK, UsageError


@app.command()
def responder(
    listen: Annotated[
        int, typer.Option(min=1, max=65535, help="Port to listen on, where systemd does not pass a socket.")
    ] = RESPONDER_PORT,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="HOST", help="Redirect requests for this host only; may be repeated; *.example.com."),
    ] = None,
    https_port: Annotated[int, typer.Option(min=1, max=65535, help="Port that HTTPS is on.")] = 443,
    acme_webroot: Annotated[Path | None, typer.Option(metavar="DIR", help="Serve ACME http-01 challenges from this webroot.")] = None,
    acme_server: Annotated[
        str | None, typer.Option(metavar="ADDR:PORT", help="Pass ACME http-01 challenges on to this web server, as 127.0.0.1:80.")
    ] = None,
    user: Annotated[str, typer.Option(help="Go on as this user when started as root.")] = "nobody",
) -> int:
    """Answer plain HTTP with a redirect to HTTPS: what `redirect: responder` sends port 80 to."""
    from fwcompiler.kernel.responder import Responder, give_up_root, inherited, serve
    from fwcompiler.kernel.responder import listen as listening
    from fwcompiler.redirect import Site

    if acme_webroot is not None and acme_server is not None:
        raise UsageError("challenges come from a webroot or from a web server, not from both")
    if acme_webroot is not None and not acme_webroot.is_dir():
        raise UsageError(f"`{acme_webroot}` is no folder")
    server = None if acme_server is None else _address(acme_server)
    sockets = inherited() or listening(listen)
    give_up_root(user)
    serve(sockets, Responder(Site(tuple(name or ()), https_port), acme_webroot, server))
    return EXIT_OK


def _address(text: str) -> tuple[str, int]:
    """`127.0.0.1:80` or `[::1]:80`.

    Raises:
        UsageError: it is neither.
    """
    from fwcompiler.addresses import AddressError, parse_address

    host, _, port = text.rpartition(":")
    try:
        parse_address(host.removeprefix("[").removesuffix("]"))
    except AddressError as error:
        raise UsageError(f"`{text}` is no address and port", hint="write 127.0.0.1:80 or [::1]:80") from error
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UsageError(f"`{text}` is no address and port", hint="write 127.0.0.1:80 or [::1]:80")
    return host.removeprefix("[").removesuffix("]"), int(port)
