"""The commands of `fwc`. Each is registered by importing its module; who runs one command imports no more than that."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

MODULES = {
    "audit": ("audit",),
    "boot": ("restore", "install-boot"),
    "change": ("diff", "apply", "remove"),
    "generations": ("confirm", "rollback", "history"),
    "look": ("status", "explain", "verify", "lab", "backends"),
    "members": ("allow", "revoke", "members"),
    "policy": ("check", "compile", "test", "schema"),
    "serve": ("responder",),
}
"""Which module registers which commands."""


def registered(command: str = "") -> typer.Typer:
    """The program with the commands of one module, or with all where none is named, or none of ours."""
    for name in [name for name, commands in MODULES.items() if command in commands] or MODULES:
        import_module(f"{__name__}.{name}")
    from fwcompiler.commands.app import app

    return app
