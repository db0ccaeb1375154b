"""Finds backends through the entry point group ``fwcompiler.backends``; listing them imports none of them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from fwcompiler.backend import Backend
from fwcompiler.diagnostics import UsageError, did_you_mean

GROUP = "fwcompiler.backends"


def installed() -> dict[str, EntryPoint]:
    """All installed backends by name.

    Raises:
        UsageError: two distributions offer the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        other = found.get(point.name)
        if other and other.value != point.value:
            raise UsageError(f"two backends are called `{point.name}`: {origin(other)} and {origin(point)}", hint="uninstall one of them")
        found[point.name] = point
    return found


def origin(point: EntryPoint) -> str:
    """Which distribution brought an entry point: name and version."""
    return f"{point.value} ({point.dist.name} {point.dist.version})" if point.dist else point.value


def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UsageError: unknown, or its package cannot be imported; a broken one breaks only itself.
    """
    found = installed()
    if name not in found:
        raise UsageError(f"there is no backend `{name}`", hint=did_you_mean(name, found) or f"installed: {', '.join(found)}")
    try:
        backend = found[name].load()
    except Exception as error:
        raise UsageError(f"backend `{name}` cannot be loaded from {origin(found[name])}: {error}") from error
    if not isinstance(backend, Backend):
        raise UsageError(f"backend `{name}` from {origin(found[name])} does not have the shape of fwcompiler.backend.Backend")
    return backend
