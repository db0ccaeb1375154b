"""The iptables backends: one for each variant of the programs, both with ipset."""

from __future__ import annotations

from typing import Literal

from fwcompiler_iptables.commands import Iptables


def _backend(variant: Literal["nft", "legacy"]) -> Iptables:
    programs = tuple(f"{ip}tables-{variant}-{verb}" for ip in ("ip", "ip6") for verb in ("restore", "save"))
    return Iptables(variant, f"iptables-{variant}", (*programs, "ipset"))


nft = _backend("nft")
legacy = _backend("legacy")
