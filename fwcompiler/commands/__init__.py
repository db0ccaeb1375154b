"""The commands of `fwc`: importing this package registers all of them."""

from fwcompiler.commands import (
    audit,
    boot,
    change,
    generations,
    look,
    members,
    policy,
    serve,
)
from fwcompiler.commands.app import app

__all__ = [
    "app",
    "audit",
    "boot",
    "change",
    "generations",
    "look",
    "members",
    "policy",
    "serve",
]
