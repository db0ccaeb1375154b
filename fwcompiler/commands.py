"""The commands of `fwc`, each from its arguments to what it prints and its exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwcompiler import __version__
from fwcompiler.diagnostics import EXIT_DIFFERS, EXIT_OK, Failure, Finding, Unavailable, UsageError, format_findings

if TYPE_CHECKING:
    from fwcompiler.backend import Backend
    from fwcompiler.kernel.netns import Namespace
    from fwcompiler.pipeline import Compiled, Host
    from fwcompiler.plan import Plan
    from fwcompiler.shapes import BackendShape
    from fwcompiler.state import StateDir

app = typer.Typer(
    name="fwc",
    help="The firewall compiler for VoIP dialer hosts. Common options may stand before or after a command's arguments.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

PolicyFile = Annotated[str, typer.Argument(metavar="POLICY", help="The policy file.")]


@dataclass(frozen=True)
class Options:
    """The common options."""

    backend: str | None = None
    netns: str | None = None
    state_dir: str | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True

    @property
    def color_out(self) -> bool:
        """True where standard output shows colors."""
        return self.color and sys.stdout.isatty()


def _show_version(value: bool) -> None:
    if value:
        print(f"fwc {__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    backend: Annotated[
        str | None, typer.Option(help="nftables, iptables-nft, iptables-legacy, or iptables: the variant the host uses.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Name of the host to compile for, in a policy for several.")] = None,
    netns: Annotated[str | None, typer.Option(help="Act in this network namespace (ip netns).")] = None,
    state_dir: Annotated[str | None, typer.Option(envvar="FWC_STATE_DIR", help="State directory; default /var/lib/fwc.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, nothing summarised.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colors; so does the variable NO_COLOR.")] = False,
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Common options."""
    if host is not None:
        raise UsageError("this version compiles policies for one host; they name no hosts", hint="leave --host out")
    color = not no_color and not os.environ.get("NO_COLOR")
    context.obj = Options(backend, netns, state_dir, as_json, quiet, verbose, color)


NoProof = Annotated[bool, typer.Option("--no-proof", help="Leave the proof out; said loudly and recorded.")]


@app.command()
def check(context: typer.Context, policy: PolicyFile, no_proof: NoProof = False) -> int:
    """Check a policy: load, resolve, run its tests, try the rules in a scratch namespace."""
    from fwcompiler.pipeline import normal_form, render
    from fwcompiler.report import finding_json

    options: Options = context.obj
    left_out: list[str] = []
    findings: tuple[Finding, ...] = ()
    try:
        compiled = _compile(policy, options)
        findings = compiled.findings
        backend = _backend(options)
        try:
            normal_form(compiled, backend, proof=_proof(no_proof))
        except Unavailable as refused:
            render(compiled, backend)
            left_out.append(f"not tried in a kernel: {refused.message}")
    except Failure as failure:
        if options.json:
            _print_json({"ok": False, "findings": [finding_json(f) for f in failure.findings], "left_out": left_out})
        raise
    if options.json:
        _print_json({"ok": True, "findings": [finding_json(f) for f in findings], "left_out": left_out})
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
    compiled = _compile(policy, options)
    backend = _backend(options)
    rendered = render(compiled, backend)
    if output is not None:
        _write_files(Path(output), rendered.files)
    if options.json:
        _print_json({"backend": backend.name, "files": dict(rendered.files)})
    elif output is None:
        for name, text in rendered.files.items():
            print(f"# {name}\n{text}" if len(rendered.files) > 1 else text, end="")
    elif not options.quiet:
        print("\n".join(f"{output}/{name}" for name in rendered.files))
    return EXIT_OK


@app.command()
def diff(
    context: typer.Context,
    policy: PolicyFile,
    against: Annotated[str, typer.Option(help="What to compare with: `live`, `applied`, or the file of another policy.")] = "live",
    no_proof: NoProof = False,
) -> int:
    """Show what an apply would change: access gained and lost, then the kernel changes."""
    from fwcompiler.pipeline import compare_with, plan

    options: Options = context.obj
    compiled = _compile(policy, options)
    with _host(options) as host:
        proof = _proof(no_proof)
        planned = plan(compiled, host, proof=proof)[0] if against == "live" else compare_with(compiled, host, against, proof=proof)
    if against != "live" and planned.in_sync and not options.json:
        print(f"no difference to {against}")
        return EXIT_OK
    _show_plan(planned, compiled, options)
    return EXIT_OK if planned.in_sync else EXIT_DIFFERS


@app.command()
def apply(
    context: typer.Context,
    policy: PolicyFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    no_proof: NoProof = False,
) -> int:
    """Put a policy into force: check, try, show the difference, commit in one transaction, read back."""
    from fwcompiler import apply as stage
    from fwcompiler.pipeline import plan

    options: Options = context.obj
    compiled = _compile(policy, options)
    proof = _proof(no_proof)
    with _host(options) as host:
        if dry_run:
            planned, _ = plan(compiled, host, proof=proof)
            _show_plan(planned, compiled, options)
            return EXIT_OK if planned.in_sync else EXIT_DIFFERS
        _must_ask(yes)
        with host.state.lock():
            planned, wanted = plan(compiled, host, proof=proof)
            if not planned.in_sync:
                if not options.json:
                    _show_plan(planned, compiled, options)
                _ask(yes, "apply this?")
            applied = stage.apply(compiled, planned, wanted, host, proof=proof)
    if options.json:
        from fwcompiler.report import diff_json

        _print_json({**diff_json(planned), "applied": applied.changed, "generation": applied.generation.number})
    elif not options.quiet:
        what = "applied" if applied.changed else "in sync"
        print(f"{what}: generation {applied.generation.number} ({host.backend.name})")
    return EXIT_OK


def _proof(no_proof: bool) -> bool:
    if no_proof:
        print("warning: --no-proof: nobody shows that these rules mean what the policy says", file=sys.stderr)
    return not no_proof


def _must_ask(yes: bool) -> None:
    if not yes and not sys.stdin.isatty():
        raise UsageError("nobody to ask: standard input is no terminal; nothing was changed", hint="say --yes")


def _ask(yes: bool, question: str) -> None:
    if yes:
        return
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("not confirmed; nothing was changed")


@app.command()
def status(context: typer.Context) -> int:
    """Tell whether the host still holds what was applied, and what passed through it."""
    from fwcompiler.status import read_status, status_text

    options: Options = context.obj
    with _host(options) as host:
        found = read_status(host)
    if options.json:
        _print_json(found)
    else:
        print(status_text(found, color=options.color_out))
    return EXIT_OK


@app.command()
def explain(
    context: typer.Context,
    source: Annotated[str, typer.Option("--from", metavar="ADDR", help="Source address.")],
    to: Annotated[str, typer.Option("--to", help="Protocol and port: udp/5060.")],
    to_addr: Annotated[str | None, typer.Option("--to-addr", metavar="ADDR", help="Destination; default: an address of this host.")] = None,
    interface: Annotated[str, typer.Option("--in", metavar="NAME", help="Input interface.")] = "eth0",
    state: Annotated[str, typer.Option(help="new, established, related, invalid or untracked.")] = "new",
    live: Annotated[bool, typer.Option("--live", help="Ask the loaded ruleset, and say where it and the policy part.")] = False,
    listing: Annotated[
        str | None, typer.Option(metavar="FILE", help="Ask a saved `nft -j list ruleset` or `iptables-save`, whoever wrote it.")
    ] = None,
    policy: Annotated[str | None, typer.Argument(metavar="POLICY", help="The policy file; none with --listing.")] = None,
) -> int:
    """Say what happens to one packet, and why, with the policy line."""
    from fwcompiler.explain import explain_listing, explain_live, packet_from
    from fwcompiler.proof.meaning import explain as decide
    from fwcompiler.report import explain_json

    options: Options = context.obj
    packet = packet_from(source, to, to_addr, interface, state)
    if listing is not None:
        if policy is not None or live:
            raise UsageError("--listing asks a file and nothing else", hint="leave the policy and --live out")
        asked = explain_listing(listing, packet)
        if options.json:
            _print_json(asked.as_json())
        else:
            print(asked.text())
        return EXIT_OK
    if policy is None:
        raise UsageError("Missing argument 'POLICY'.", hint="or ask a saved listing with --listing FILE")
    explanation = decide(_compile(policy, options).resolved, packet)
    traced = None
    if live:
        with _host(options) as host:
            traced = explain_live(host, packet, explanation)
    if options.json:
        _print_json(traced.as_json() if traced else explain_json(explanation))
        return EXIT_OK
    print("\n".join(explanation.steps))
    if explanation.at:
        print(format_findings([Finding("value", "decided here", explanation.at, severity="note")]).replace("note[value]: ", ""))
    if traced:
        print(traced.text())
    return EXIT_OK


@app.command()
def verify(
    context: typer.Context,
    policy: PolicyFile,
    full: Annotated[bool, typer.Option("--full", help="Read every set whole, whatever its size.")] = False,
) -> int:
    """Prove that the live rules mean what the policy says; with `--backend all`, that all backends would load the same."""
    from fwcompiler.report import verify_json, verify_text
    from fwcompiler.verify import verify_backends, verify_live

    options: Options = context.obj
    compiled = _compile(policy, options)
    if options.backend == "all":
        verified = verify_backends(compiled)
    else:
        with _host(options) as host:
            verified = verify_live(compiled, host, full=full)
    if options.json:
        _print_json(verify_json(verified.equal, verified.compared, verified.problems, verified.counter_examples, verified.sampled))
    elif not options.quiet or not verified.equal:
        print(verify_text(verified.equal, verified.compared, verified.problems, verified.counter_examples, verified.sampled))
    return EXIT_OK if verified.equal else EXIT_DIFFERS


@app.command()
def test(context: typer.Context, policy: PolicyFile) -> int:
    """Run the policy's own tests, every address and port of each."""
    from fwcompiler.report import tests_json, tests_text
    from fwcompiler.testing import results

    options: Options = context.obj
    found = list(results(_compile(policy, options, tests=False).resolved))
    if options.json:
        _print_json(tests_json(found))
    elif not options.quiet or any(wrong for _, wrong in found):
        print(tests_text(found))
    return EXIT_DIFFERS if any(wrong for _, wrong in found) else EXIT_OK


@app.command()
def lab(context: typer.Context, policy: PolicyFile) -> int:
    """Try a policy with real packets in a throw-away network of namespaces."""
    from fwcompiler.lab import lab_text, run_lab

    options: Options = context.obj
    result = run_lab(_compile(policy, options), _backend(options))
    if options.json:
        _print_json(result.as_json())
    else:
        print(lab_text(result, color=options.color_out))
    return EXIT_OK if result.agrees else EXIT_DIFFERS


@app.command()
def remove(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Take out everything that is fwc's, and nothing else."""
    from fwcompiler import apply as stage
    from fwcompiler.kernel.runner import find
    from fwcompiler.registry import installed, load

    options: Options = context.obj
    names = [_backend(options).name] if options.backend else list(installed())
    state = _state(options)
    current = state.current()
    in_force = {current.backend} if current else set()
    backends = [b for b in map(load, names) if options.backend or b.name in in_force or all(find(p) for p in b.programs)]
    _must_ask(yes)
    with _target(options) as namespace, state.lock():
        _ask(yes, "take out all rules of fwc? what they protect is open then")
        removed = list(stage.remove(backends, namespace, state))
    if options.json:
        _print_json({"removed": removed})
    elif not options.quiet:
        print(f"removed: {', '.join(removed)}" if removed else "there was nothing of fwc")
    return EXIT_OK


@app.command()
def backends(context: typer.Context) -> int:
    """List the installed backends, where they come from, and whether their programs are here."""
    from fwcompiler.kernel.runner import find
    from fwcompiler.registry import installed, load, origin

    options: Options = context.obj
    rows: list[BackendShape] = []
    for name, point in installed().items():
        try:
            missing = [p for p in load(name).programs if find(p) is None]
            rows.append({"name": name, "from": origin(point), "usable": not missing, "missing": missing, "error": None})
        except UsageError as broken:
            rows.append({"name": name, "from": origin(point), "usable": False, "missing": [], "error": broken.message})
    if options.json:
        _print_json({"backends": rows})
        return EXIT_OK
    from fwcompiler.tables import table_text

    states = ["usable" if r["usable"] else r["error"] or f"missing: {', '.join(r['missing'])}" for r in rows]
    lines = [(r["name"], state, r["from"]) for r, state in zip(rows, states, strict=True)]
    print(table_text(("backend", "state", "from"), lines, color=options.color_out))
    return EXIT_OK


@app.command()
def schema(
    name: Annotated[str, typer.Argument(help="policy, or one of the JSON shapes: check, diff, status, explain, …")] = "policy",
) -> int:
    """Print a JSON Schema, by default that of the policy language."""
    from fwcompiler.schemas import SCHEMAS

    if name not in SCHEMAS:
        raise UsageError(f"there is no schema `{name}`", hint=f"there are: {', '.join(SCHEMAS)}")
    _print_json(SCHEMAS[name]())
    return EXIT_OK


def _compile(path: str, options: Options, *, tests: bool = True) -> Compiled:
    from fwcompiler.pipeline import compile_policy

    compiled = compile_policy(path, tests=tests)
    if compiled.findings and not options.quiet:
        color = options.color and sys.stderr.isatty()
        print(format_findings(compiled.findings, color=color), file=sys.stderr)
    return compiled


def _backend(options: Options) -> Backend:
    with _host(options) as host:
        return host.backend


@contextmanager
def _host(options: Options) -> Iterator[Host]:
    from fwcompiler.choose import choose_backend
    from fwcompiler.pipeline import Host

    with _target(options) as namespace:
        state = _state(options)
        yield Host(choose_backend(options.backend, namespace, state), namespace, state)


@contextmanager
def _target(options: Options) -> Iterator[Namespace]:
    from fwcompiler.pipeline import target

    with target(options.netns) as namespace:
        yield namespace


def _state(options: Options) -> StateDir:
    from fwcompiler.state import DEFAULT, StateDir

    if options.state_dir:
        return StateDir(options.state_dir)
    return StateDir(DEFAULT if options.netns is None else f"{DEFAULT}/netns/{options.netns}")


def _show_plan(planned: Plan, compiled: Compiled, options: Options) -> None:
    from fwcompiler.report import diff_json, diff_text

    if options.json:
        _print_json(diff_json(planned))
    elif not options.quiet:
        print(diff_text(planned, compiled.resolved, color=options.color_out, whole=options.verbose))


def _write_files(folder: Path, files: Any) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
