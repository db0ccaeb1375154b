"""The program's entry: the fast path for `--version`, common options in any place, and exit codes.

Commands themselves are in `fwcompiler.commands`; this module imports them, and everything heavy, only when one is called.
"""

from __future__ import annotations

import gc
import io
import os
import sys

from fwcompiler import __version__

WITH_VALUE = ("--backend", "--host", "--netns", "--state-dir")
EXIT_USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell shows for a program that SIGPIPE ended; the command did not get to its end."""
FLAGS = ("--json", "--no-color", "-q", "--quiet", "-v", "--verbose")


def main() -> None:
    """`fwc`: run and leave with the contract's exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    if arguments == ["--version"]:
        print(f"fwc {__version__}")
        return 0
    # Nothing here lives long enough for cycles to matter, and collecting over 100,000 addresses takes time.
    gc.disable()
    # Nobody's pydantic plugin has a say in what a policy means, and looking for them takes time.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(common_first(arguments or ["--help"]))
        if code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        return _flushed(code if arguments else EXIT_USAGE)
    except BrokenPipeError:
        return _flushed(BROKEN_PIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _flushed(code: int) -> int:
    """What was done was done, also where nobody reads to the end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def common_first(arguments: list[str]) -> list[str]:
    """Common options may stand anywhere; here they are moved in front of the command."""
    common: list[str] = []
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += [word, *queue]
            break
        if word in WITH_VALUE:
            common += [word, *queue[:1]]
            del queue[:1]
        elif word in FLAGS or word.startswith(tuple(f"{o}=" for o in WITH_VALUE)):
            common.append(word)
        else:
            rest.append(word)
    return [*common, *rest]


def plain(arguments: list[str]) -> tuple[dict[str, str], list[str]] | None:
    """Common options, flags with an empty value, and what follows them; None where there are others in front of the command."""
    found: dict[str, str] = {}
    words = list(arguments)
    while words and words[0].startswith("-"):
        name, equals, value = words.pop(0).partition("=")
        if name in WITH_VALUE and (equals or words):
            found[name] = value if equals else words.pop(0)
        elif name in FLAGS and not equals:
            found[name] = ""
        else:
            return None
    return found, words


def member_words(words: list[str]) -> tuple[str, str, str, str | None, str] | None:
    """`allow GROUP ADDR [--for TIME] [--reason TEXT]` or `revoke GROUP ADDR` as command, group, address, time, reason.

    None for any other command line, mistakes included: typer has the words for those.
    """
    takes = ("--for", "--reason") if words[:1] == ["allow"] else ()
    options: dict[str, str] = {}
    given: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            given.append(word)
        elif name in takes and (equals or queue):
            options[name] = value if equals else queue.pop(0)
        else:
            return None
    if len(given) != 3 or given[0] not in ("allow", "revoke"):
        return None
    command, group, address = given
    return command, group, address, options.get("--for"), options.get("--reason", "")


def _command(arguments: list[str]) -> int:
    """Run a command. A host waits for `restore` at boot and an agent for `allow`: they go without typer and pydantic, which take
    longer to import than it takes to run.
    """
    options, words = plain(arguments) or ({}, [])
    members = member_words(words)
    if words == ["restore"] or members:
        from fwcompiler.state import StateDir

        netns = options.get("--netns")
        state = StateDir.of(options.get("--state-dir") or os.environ.get("FWC_STATE_DIR"), netns)
        as_json, quiet = "--json" in options, "-q" in options or "--quiet" in options
        if members:
            from fwcompiler.membership import run as change_member

            return change_member(*members, state, netns, options.get("--backend"), as_json=as_json, quiet=quiet)
        from fwcompiler.restore import run as restore

        return restore(state, netns, as_json=as_json, quiet=quiet)
    from fwcompiler.commands import registered

    result = registered(*words[:1])(args=arguments, prog_name="fwc", standalone_mode=False)
    return result if isinstance(result, int) else 0


def _dispatch(arguments: list[str]) -> int:
    from fwcompiler.diagnostics import Failure, format_findings

    try:
        return _command(arguments)
    except SystemExit as ended:
        # typer ends so, with 1, when nobody reads its output any more; commands of ours return.
        raise BrokenPipeError from ended
    except Failure as failure:
        color = "--no-color" not in arguments and not os.environ.get("NO_COLOR") and sys.stderr.isatty()
        quiet = "-q" in arguments or "--quiet" in arguments
        findings = [f for f in failure.findings if f.is_error or not quiet]
        if findings:
            print(format_findings(findings, color=color), file=sys.stderr)
        if failure.message:
            print(f"error: {failure.message}", file=sys.stderr)
        if failure.hint:
            print(f"  hint: {failure.hint}", file=sys.stderr)
        return failure.exit_code
    except Exception as error:
        return _usage(error)


def _usage(error: Exception) -> int:
    """Typer's own complaints about a command line; anything else is our bug and shows as one."""
    code = getattr(error, "exit_code", None)
    show = getattr(error, "format_message", None)
    if code is None:
        raise error
    if show is not None:
        print(f"error: {show()}", file=sys.stderr)
        print("  hint: `fwc --help` lists the commands, `fwc COMMAND --help` its options", file=sys.stderr)
    return int(code)
