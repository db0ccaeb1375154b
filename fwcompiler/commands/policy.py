"""Commands about a policy alone: check, compile, test, and the schemas of what fwc reads and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwcompiler.commands.app import (
    NoProof,
    Options,
    PolicyFile,
    all_findings,
    app,
    chosen_backend,
    compiled_hosts,
    compiled_policy,
    print_json,
    proof_wanted,
    write_files,
)
from fwcompiler.diagnostics import EXIT_DIFFERS, EXIT_OK, Failure, Finding, Unavailable, UsageError


@app.command()
def check(context: typer.Context, policy: PolicyFile, no_proof: NoProof = False) -> int:
    """Check a policy: load, resolve, run its tests, try the rules in a scratch namespace."""
    from fwcompiler.pipeline import normal_form, render
    from fwcompiler.report import finding_json, good_text

    options: Options = context.obj
    left_out: list[str] = []
    findings: tuple[Finding, ...] = ()
    try:
        hosts = compiled_hosts(policy, options)
        findings = tuple(all_findings(hosts))
        backend = chosen_backend(options)
        proof = proof_wanted(no_proof)
        for compiled in hosts:
            try:
                normal_form(compiled, backend, proof=proof)
            except Unavailable as refused:
                render(compiled, backend)
                left_out = [f"not tried in a kernel: {refused.message}"]
    except Failure as failure:
        if options.json:
            print_json({"ok": False, "findings": [finding_json(f) for f in failure.findings], "left_out": left_out})
        raise
    if options.json:
        print_json({"ok": True, "findings": [finding_json(f) for f in findings], "left_out": left_out})
    elif not options.quiet:
        proven = "accepted by the kernel in a scratch namespace" + ("" if no_proof else ", proven for all packets")
        tried = proven if not left_out else left_out[0]
        print(f"{policy}: good for {backend.name}{good_text([c.resolved for c in hosts])}; {tried}")
    return EXIT_OK


@app.command(name="compile")
def compile_(
    context: typer.Context,
    policy: PolicyFile,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Write the files there.")] = None,
    every: Annotated[bool, typer.Option("--all", help="For every host of the policy, each in a folder of its own below DIR.")] = False,
) -> int:
    """Print the ruleset that would be loaded, and beside it what belongs into dialers' rtp.conf and into the web server's files."""
    from fwcompiler.pipeline import render
    from fwcompiler.webserver import left_to_web_server, redirect_files

    options: Options = context.obj
    if every and output is None and not options.json:
        raise UsageError("--all writes the files of several hosts", hint="say where: -o DIR")
    if every and options.host:
        raise UsageError("--all means every host", hint="leave --host or --all out")
    hosts = compiled_hosts(policy, options) if every else (compiled_policy(policy, options),)
    backend = chosen_backend(options)
    files: dict[str, str] = {}
    notes: dict[str, str] = {}
    for compiled in hosts:
        place = f"{compiled.resolved.host.name}/" if every and compiled.resolved.host else ""
        plan = compiled.resolved.plan
        beside = plan.rtp_confs(compiled.resolved.host) if plan else {}
        beside |= redirect_files() if left_to_web_server(compiled.resolved) else {}
        notes |= {place + name: text for name, text in beside.items()}
        files |= {place + name: text for name, text in render(compiled, backend).files.items()}
    if output is not None:
        write_files(Path(output), files | notes)
    if options.json:
        print_json({"backend": backend.name, "files": files | notes})
    elif output is None:
        print(_as_comments(notes), end="")
        for name, text in files.items():
            print(f"# {name}\n{text}" if len(files) > 1 else text, end="")
    elif not options.quiet:
        print("\n".join(f"{output}/{name}" for name in files | notes))
    return EXIT_OK


def _as_comments(notes: dict[str, str]) -> str:
    """Files for others as comments, so that what is printed can still be loaded."""
    return "".join(f"# {line}".rstrip() + "\n" for name, text in notes.items() for line in (f"{name}:", *text.splitlines()))


@app.command()
def test(context: typer.Context, policy: PolicyFile) -> int:
    """Run the policy's own tests, every address and port of each."""
    from fwcompiler.report import tests_json, tests_text
    from fwcompiler.testing import results_of_hosts

    options: Options = context.obj
    found = results_of_hosts([c.resolved for c in compiled_hosts(policy, options, tests=False)])
    if options.json:
        print_json(tests_json(found))
    elif not options.quiet or any(wrong for _, wrong in found):
        print(tests_text(found))
    return EXIT_DIFFERS if any(wrong for _, wrong in found) else EXIT_OK


@app.command()
def schema(
    name: Annotated[str, typer.Argument(help="policy, or one of the JSON shapes: check, diff, status, explain, …")] = "policy",
) -> int:
    """Print a JSON Schema, by default that of the policy language."""
    from fwcompiler.schemas import SCHEMAS

    if name not in SCHEMAS:
        raise UsageError(f"there is no schema `{name}`", hint=f"there are: {', '.join(SCHEMAS)}")
    print_json(SCHEMAS[name]())
    return EXIT_OK
