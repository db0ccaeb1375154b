"""Commands about dynamic members: allow, revoke, members."""

from __future__ import annotations

from typing import Annotated

import typer

from fwcompiler.commands.app import Options, app, chosen_host, print_json, state_dir
from fwcompiler.diagnostics import EXIT_OK

GroupName = Annotated[str, typer.Argument(metavar="GROUP", help="A group that the policy calls dynamic.")]
Address = Annotated[str, typer.Argument(metavar="ADDR", help="One address, IPv4 or IPv6.")]


@app.command()
def allow(
    context: typer.Context,
    group: GroupName,
    address: Address,
    length: Annotated[str | None, typer.Option("--for", metavar="TIME", help="90s, 30m, 12h, 7d; default: as the policy says.")] = None,
    reason: Annotated[str, typer.Option(help="Why; it is recorded.")] = "",
) -> int:
    """Let an address into a dynamic group, at once; for one that is in already the time starts anew."""
    return _run("allow", group, address, length, reason, context.obj)


@app.command()
def revoke(
    context: typer.Context,
    group: GroupName,
    address: Address,
    allow_lockout: Annotated[bool, typer.Option("--allow-lockout", help="Also the address that you are logged in from.")] = False,
) -> int:
    """Take an address out of a dynamic group, at once."""
    return _run("revoke", group, address, None, "", context.obj, lockout=allow_lockout)


def _run(command: str, group: str, address: str, length: str | None, reason: str, options: Options, *, lockout: bool = False) -> int:
    """What `fwc` does without this module where a command line is as expected (`fwcompiler.cli`)."""
    from fwcompiler.membership import run

    state = state_dir(options)
    where = (state, options.netns, options.backend)
    return run(command, group, address, length, reason, *where, as_json=options.json, quiet=options.quiet, lockout=lockout)


@app.command()
def members(
    context: typer.Context,
    group: Annotated[str | None, typer.Argument(metavar="GROUP", help="Only this group's.")] = None,
    history: Annotated[bool, typer.Option("--history", help="Who was let in and taken out, when and by whom.")] = False,
) -> int:
    """List dynamic members: how long they stay, who let them in, and why."""
    from fwcompiler import membership

    options: Options = context.obj
    with chosen_host(options) as host:
        if history:
            told = membership.read_history(host, group)
            if options.json:
                print_json(membership.history_json(told))
            else:
                print(membership.history_text(told, color=options.color_out))
            return EXIT_OK
        found = membership.read_members(host, group)
    if options.json:
        print_json({"members": found})
    else:
        print(membership.members_text(found, color=options.color_out))
    return EXIT_OK
