"""Commands about a policy alone: check, compile, test, and the schemas of what fwc reads and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwcompiler.commands.app import (
    NoProof,
    Options,
    PolicyFile,
    app,
    chosen_backend,
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
    from fwcompiler.report import finding_json

    options: Options = context.obj
    left_out: list[str] = []
    findings: tuple[Finding, ...] = ()
    try:
        compiled = compiled_policy(policy, options)
        findings = compiled.findings
        backend = chosen_backend(options)
        try:
            normal_form(compiled, backend, proof=proof_wanted(no_proof))
        except Unavailable as refused:
            render(compiled, backend)
            left_out.append(f"not tried in a kernel: {refused.message}")
    except Failure as failure:
        if options.json:
            print_json({"ok": False, "findings": [finding_json(f) for f in failure.findings], "left_out": left_out})
        raise
    if options.json:
        print_json({"ok": True, "findings": [finding_json(f) for f in findings], "left_out": left_out})
    elif not options.quiet:
        proven = "accepted by the kernel in a scratch namespace" + ("" if no_proof else ", proven for all packets")
        tried = proven if not left_out else left_out[0]
        counts = f"{len(compiled.resolved.services)} services, {len(compiled.resolved.groups)} groups, {len(compiled.resolved.tests)} tests"
        print(f"{policy}: good for {backend.name}: {counts}; {tried}")
    return EXIT_OK


@app.command(name="compile")
def compile_(
    context: typer.Context,
    policy: PolicyFile,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Write the files there.")] = None,
) -> int:
    """Print the ruleset that would be loaded."""
    from fwcompiler.pipeline import render

    options: Options = context.obj
    compiled = compiled_policy(policy, options)
    backend = chosen_backend(options)
    rendered = render(compiled, backend)
    if output is not None:
        write_files(Path(output), rendered.files)
    if options.json:
        print_json({"backend": backend.name, "files": dict(rendered.files)})
    elif output is None:
        for name, text in rendered.files.items():
            print(f"# {name}\n{text}" if len(rendered.files) > 1 else text, end="")
    elif not options.quiet:
        print("\n".join(f"{output}/{name}" for name in rendered.files))
    return EXIT_OK


@app.command()
def test(context: typer.Context, policy: PolicyFile) -> int:
    """Run the policy's own tests, every address and port of each."""
    from fwcompiler.report import tests_json, tests_text
    from fwcompiler.testing import results

    options: Options = context.obj
    found = list(results(compiled_policy(policy, options, tests=False).resolved))
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
