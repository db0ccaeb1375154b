"""What the kernel says about a host beside its rules and sockets: addresses, the connection table, helpers, other packet filters.

Everything is asked in the network namespace that the calling thread is in, and nothing is changed.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fwcompiler.backend import Command
from fwcompiler.diagnostics import HostRefused, Unavailable
from fwcompiler.kernel import runner

_SYSTEM = Path("/proc/sys/net")


@dataclass(frozen=True, slots=True)
class Interface:
    """One address: (version, number), its interface, and whether it is of global scope (rtnetlink(7), RT_SCOPE_UNIVERSE)."""

    version: int
    address: int
    name: str
    wide: bool


def host_name() -> str:
    """The host's name, as it is set; not looked up."""
    return os.uname().nodename


def addresses() -> tuple[Interface, ...]:
    """Addresses of all interfaces, ascending.

    Raises:
        Unavailable: the kernel does not answer.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
            found = [_interface(message, names) for message in route.get_addr()]
    except (NetlinkError, OSError) as error:
        raise Unavailable(f"the kernel does not say which addresses there are: {error}") from error
    return tuple(sorted(found, key=lambda a: (a.version, a.address, a.name)))


def _interface(message: Any, names: dict[int, str]) -> Interface:
    text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    address = ip_address(text)
    wide = message["scope"] == 0 and not address.is_loopback
    return Interface(address.version, int(address), names.get(message["index"], "?"), wide)


def number(name: str) -> int | None:
    """A setting below `/proc/sys/net` as a number; None where the kernel has none or this user may not read it."""
    try:
        return int((_SYSTEM / name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Routing:
    """How a host sends on: in which address families it does not, which of its interfaces are missing, and which look
    whether the answer would go back by them (rp_filter 1, ip-sysctl)."""

    off: tuple[int, ...] = ()
    missing: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()


def routing(interfaces: Sequence[str], versions: Sequence[int]) -> Routing:
    """What keeps packets from being sent on between interfaces, in the families that matter."""
    switches = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}
    off = tuple(v for v in versions if number(switches[v]) == 0)
    missing = tuple(name for name in interfaces if not (_SYSTEM / "ipv4/conf" / name).is_dir())
    everywhere = number("ipv4/conf/all/rp_filter") or 0
    # The larger number of the two holds, and 2 is the loose one.
    strict = tuple(name for name in interfaces if max(everywhere, number(f"ipv4/conf/{name}/rp_filter") or 0) == 1)
    return Routing(off, missing, strict)


def routing_text(found: Routing) -> tuple[str, ...]:
    """Each in a sentence, the worst first."""
    names = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
    return (
        *(f"{names[v]} is 0: this edge sends no IPv{v} packet on" for v in found.off),
        *(f"there is no interface `{name}`: what passes between wan and lan passes elsewhere, past these rules" for name in found.missing),
        *(
            f"rp_filter is strict on {name}: packets whose answer would leave by another interface are dropped unseen"
            for name in found.strict
        ),
    )


def local_ports() -> tuple[int, int] | None:
    """From which ports the host opens its own connections (ip-sysctl, ip_local_port_range)."""
    try:
        low, high = (_SYSTEM / "ipv4/ip_local_port_range").read_text(encoding="ascii").split()
        return int(low), int(high)
    except (OSError, ValueError):
        return None


def module_loaded(name: str) -> bool:
    """True where a kernel module is loaded or built in."""
    return Path("/sys/module", name).is_dir()


@dataclass(frozen=True, slots=True)
class Filters:
    """Listings of everything that filters packets here. `nft` is `nft -j -t list ruleset`; empty where there is no nft.

    `saves`: (family, variant, what iptables-save printed).
    """

    nft: str
    saves: tuple[tuple[int, str, str], ...]

    def legacy_rules(self) -> int:
        """Rules of iptables-legacy, both families."""
        return sum(text.count("\n-A ") for _, variant, text in self.saves if variant == "legacy")

    def nft_rules(self) -> int:
        """Rules of nftables, those of iptables-nft among them."""
        if self.nft:
            return sum("rule" in item for item in json.loads(self.nft).get("nftables", ()))
        return sum(text.count("\n-A ") for _, variant, text in self.saves if variant == "nft")

    def sip_helpers(self) -> tuple[str, ...]:
        """Rules that give packets to the SIP helper, and the tables or programs that hold them."""
        found = [
            f"{'ip6' if version == 6 else 'ip'}tables-{variant}: {line}"
            for version, variant, text in self.saves
            for line in text.splitlines()
            if re.search(r"-j CT .*--helper \"?sip", line)
        ]
        objects = [item["ct helper"] for item in json.loads(self.nft).get("nftables", ()) if "ct helper" in item] if self.nft else []
        found += [f"table {o['family']} {o['table']}: ct helper {o['name']}" for o in objects if o.get("type") == "sip"]
        return tuple(found)


def filters() -> Filters:
    """Everything that filters packets in this namespace.

    Raises:
        Unavailable: this user may not ask.
    """
    nft = _output(lambda: runner.run(Command(("nft", "-j", "-t", "list", "ruleset")))) if runner.find("nft") else ""
    saves = []
    for version, family in ((4, "ip"), (6, "ip6")):
        for variant in ("nft", "legacy"):
            program = f"{family}tables-{variant}-save"
            if runner.find(program):
                saves.append((version, variant, _output(lambda p=program: runner.run(Command((p,), missing_ok=True)))))  # type: ignore[misc]
    return Filters(nft, tuple(saves))


def _output(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except Unavailable:
        raise
    except HostRefused:
        return ""  # an older nft stumbles over newer rules of others; what can be read is read


def content(path: str) -> bytes | str:
    """What a file holds, or in words why it cannot be read."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode) and not Path(path).is_dir():
            return "not a regular file"
        with Path(path).open("rb") as stream:
            return stream.read(1 << 20)
    except OSError as error:
        return (error.strerror or "cannot be read").lower()
    except ValueError:
        return "no path of a file"
