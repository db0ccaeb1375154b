"""Chooses the backend where the command line leaves it open: what is in force, else what the host uses."""

from __future__ import annotations

from fwcompiler.backend import Backend
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import netns, runner
from fwcompiler.registry import installed, load
from fwcompiler.state import StateDir

ORDER = ("nftables", "iptables-nft", "iptables-legacy")


def choose_backend(name: str | None, namespace: netns.Namespace, state: StateDir) -> Backend:
    """The backend by name; `iptables` is the variant the host uses, None what is in force or can be used.

    Raises:
        UsageError: there is no such backend.
        HostRefused: none of them has its programs here.
    """
    if name == "iptables":
        return load(_iptables_variant(namespace))
    if name is not None:
        return load(name)
    current = state.current()
    known = installed()
    if current is not None and current.backend in known:
        return load(current.backend)
    for candidate in (*(n for n in ORDER if n in known), *(n for n in known if n not in ORDER)):
        backend = load(candidate)
        if all(runner.find(p) for p in backend.programs):
            return backend
    raise HostRefused("neither nftables nor iptables is installed; nothing was changed", hint="install nftables with apt, dnf or zypper")


def _iptables_variant(namespace: netns.Namespace) -> str:
    """The variant that holds rules; with none or both, the one that the plain name `iptables` stands for."""
    with namespace.entered():
        legacy, nft = runner.iptables_rules("legacy"), runner.iptables_rules("nft")
    if legacy != nft:
        return "iptables-legacy" if legacy else "iptables-nft"
    return runner.iptables_default()
