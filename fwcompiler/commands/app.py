"""The program's common options, and what the commands share: each goes from its arguments to what it prints and its exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwcompiler import __version__
from fwcompiler.diagnostics import Finding, UsageError, format_findings

if TYPE_CHECKING:
    from fwcompiler.backend import Backend
    from fwcompiler.kernel.netns import Namespace
    from fwcompiler.pipeline import Compiled, Host
    from fwcompiler.plan import Plan
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
    host: str | None = None
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
    host: Annotated[str | None, typer.Option(help="The host to compile for, in a policy for several; default: this machine.")] = None,
    netns: Annotated[str | None, typer.Option(help="Act in this network namespace (ip netns).")] = None,
    state_dir: Annotated[str | None, typer.Option(envvar="FWC_STATE_DIR", help="State directory; default /var/lib/fwc.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, nothing summarised.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colors; so does the variable NO_COLOR.")] = False,
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Common options."""
    color = not no_color and not os.environ.get("NO_COLOR")
    context.obj = Options(backend, host, netns, state_dir, as_json, quiet, verbose, color)


Full = Annotated[bool, typer.Option("--full", help="Read every set whole, whatever its size.")]
NoProof = Annotated[bool, typer.Option("--no-proof", help="Leave the proof out; said loudly and recorded.")]


def proof_wanted(no_proof: bool) -> bool:
    """Whether to prove; leaving it out is said loudly."""
    if no_proof:
        print("warning: --no-proof: nobody shows that these rules mean what the policy says", file=sys.stderr)
    return not no_proof


def must_ask(yes: bool) -> None:
    """Refuse a command that would have nobody to ask.

    Raises:
        UsageError: standard input is no terminal and `--yes` was not said.
    """
    if not yes and not sys.stdin.isatty():
        raise UsageError("nobody to ask: standard input is no terminal; nothing was changed", hint="say --yes")


def ask(yes: bool, question: str) -> None:
    """Ask before a change, unless `yes`.

    Raises:
        UsageError: the answer was no.
    """
    if yes:
        return
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("not confirmed; nothing was changed")


def compiled_policy(path: str, options: Options, *, tests: bool = True) -> Compiled:
    """The policy for one host, its warnings printed."""
    from fwcompiler.pipeline import compile_policy

    compiled = compile_policy(path, host=options.host, tests=tests)
    show_warnings([compiled], options)
    return compiled


def compiled_hosts(path: str, options: Options, *, tests: bool = True) -> tuple[Compiled, ...]:
    """The policy for every host it names, or for the one of the options; its warnings printed, each once."""
    from fwcompiler.pipeline import compile_all, compile_policy

    found = (compile_policy(path, host=options.host, tests=tests),) if options.host else compile_all(path, tests=tests)
    show_warnings(found, options)
    return found


def show_warnings(found: Iterable[Compiled], options: Options) -> None:
    """What compiling had to say, each finding once, in reading order."""
    findings = all_findings(found)
    if findings and not options.quiet:
        print(format_findings(findings, color=options.color and sys.stderr.isatty()), file=sys.stderr)


def all_findings(found: Iterable[Compiled]) -> list[Finding]:
    """The findings of several hosts, each once: most are about the policy, whichever host it is compiled for."""
    return sorted(dict.fromkeys(f for each in found for f in each.findings), key=Finding.sort_key)


def chosen_backend(options: Options) -> Backend:
    """The backend of the options, or of the host."""
    with chosen_host(options) as host:
        return host.backend


@contextmanager
def chosen_host(options: Options, *, full: bool = False) -> Iterator[Host]:
    """Where the options say that a command acts."""
    from fwcompiler.choose import choose_backend
    from fwcompiler.pipeline import Host

    with target_namespace(options) as namespace:
        state = state_dir(options)
        yield Host(choose_backend(options.backend, namespace, state), namespace, state, full)


@contextmanager
def target_namespace(options: Options) -> Iterator[Namespace]:
    """The namespace of the options."""
    from fwcompiler.pipeline import target

    with target(options.netns) as namespace:
        yield namespace


def state_dir(options: Options) -> StateDir:
    """The state directory of the options."""
    from fwcompiler.state import StateDir

    return StateDir.of(options.state_dir, options.netns)


def show_plan(planned: Plan, compiled: Compiled | None, options: Options) -> None:
    """A plan as text or JSON, as the options say."""
    from fwcompiler.report import diff_json, diff_text

    if options.json:
        print_json(diff_json(planned))
    elif not options.quiet:
        print(diff_text(planned, compiled.resolved if compiled else None, color=options.color_out, whole=options.verbose))


def write_files(folder: Path, files: Any) -> None:
    """Write files into a folder.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


def print_json(value: Any) -> None:
    """A value as JSON on standard output."""
    print(json.dumps(value, indent=2))
