"""Commands about the boot of a host: restore, install-boot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwcompiler.commands.app import Options, app, print_json, state_dir
from fwcompiler.diagnostics import EXIT_OK, UsageError


@app.command()
def restore(context: typer.Context) -> int:
    """Load the last confirmed generation, offline; if it cannot, the minimal rules, and fail loudly."""
    from fwcompiler.restore import run

    options: Options = context.obj
    return run(state_dir(options), options.netns, as_json=options.json, quiet=options.quiet)


@app.command(name="install-boot")
def install_boot(
    context: typer.Context,
    remove: Annotated[bool, typer.Option("--remove", help="Take the unit away again.")] = False,
    root: Annotated[str, typer.Option("--root", metavar="DIR", help="Where the file system to install into begins.")] = "/",
) -> int:
    """Let systemd run `fwc restore` at boot, before the network comes up."""
    from fwcompiler.boot import install, uninstall

    options: Options = context.obj
    if options.netns is not None:
        raise UsageError("a network namespace is not there at boot", hint="leave --netns out")
    state = state_dir(options)
    paths = [str(path) for path in (uninstall(Path(root)) if remove else install(Path(root), state.path.absolute()))]
    if options.json:
        print_json({"removed" if remove else "installed": paths})
    elif not options.quiet:
        print("\n".join(f"{'removed' if remove else 'installed'}: {path}" for path in paths) or "there was none")
        if not remove and not state.bootable():
            print("note: nothing was applied yet, so there is nothing to restore but minimal rules: `fwc apply` a policy")
    return EXIT_OK
