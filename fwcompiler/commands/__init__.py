"""The commands of `fwc`: importing this package registers all of them."""

from fwcompiler.commands import (
    change,
    look,
    members,
    policy,
    serve,
)
from fwcompiler.commands.app import app

__all__ = [
    "app",
    "change",
    "look",
    "members",
    "policy",
    "serve",
]
