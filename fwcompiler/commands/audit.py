"""The audit: a host against its policy, for administrators, programs and managers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from fwcompiler.commands.app import Options, PolicyFile, app, chosen_host, compiled_policy, print_json
from fwcompiler.diagnostics import EXIT_DIFFERS, EXIT_OK, Failure, UsageError


@app.command()
def audit(
    context: typer.Context,
    policy: PolicyFile,
    asterisk_dir: Annotated[
        str | None, typer.Option("--asterisk-dir", metavar="DIR", help="Asterisk's configuration; default /etc/asterisk.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What others call this host, for certificates and the redirect.")] = None,
    ca: Annotated[str | None, typer.Option("--ca", metavar="FILE", help="Trust this certificate authority (PEM) as well.")] = None,
    resolve: Annotated[bool, typer.Option("--resolve", help="Look up names of SIP peers; without it, nothing is looked up.")] = False,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page for people as well.")] = None,
    sarif: Annotated[bool, typer.Option("--sarif", help="SARIF 2.1.0 on standard output, for code scanning.")] = False,
    fail_on: Annotated[
        Literal["note", "warning", "error", "never"], typer.Option("--fail-on", help="Exit with 1 when a finding is this bad, or worse.")
    ] = "error",
) -> int:
    """Compare this host with a policy: drift, sockets, certificates, redirect, Asterisk's files and more; nothing is changed."""
    from fwcompiler.audit.audit import audit as run_audit
    from fwcompiler.audit.audit import audit_json
    from fwcompiler.audit.gather import Wishes, gather
    from fwcompiler.audit.text import audit_text

    options: Options = context.obj
    if sarif and options.json:
        raise UsageError("--sarif and --json both write to standard output", hint="choose one of them")
    compiled = compiled_policy(policy, replace(options, quiet=True))
    wishes = Wishes(asterisk_dir, name, ca, resolve, ancestors=options.netns is None)
    try:
        with chosen_host(options) as host:
            facts = gather(compiled, host, wishes)
    except UsageError:
        raise
    except Failure as failure:
        if failure.findings:
            raise
        facts = gather(compiled, None, wishes, [f"live rules: {failure.message}"])
    found = run_audit(compiled, facts)
    if html is not None:
        from fwcompiler.audit.page import page

        _write(html, page(found))
    if sarif:
        from fwcompiler.audit.sarif import sarif as as_sarif

        print_json(as_sarif(found))
    elif options.json:
        print_json(audit_json(found, fail_on))
    elif not options.quiet or found.fails(fail_on):
        print(audit_text(found, color=options.color_out, whole=options.verbose))
    return EXIT_DIFFERS if found.fails(fail_on) else EXIT_OK


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
