"""Who is connected to this host, and what listens on it, by the kernel's socket diagnostics (sock_diag(7)).

Sockets are those of the network namespace that the calling thread is in. pyroute2 is imported by the first question,
since that takes a tenth of a second.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, Literal

from fwcompiler.diagnostics import Unavailable

ESTABLISHED, CLOSE, LISTEN = 1, 7, 10
"""States of a socket (include/net/tcp_states.h); a UDP socket that is not connected is in CLOSE."""
FAMILIES = (socket.AF_INET, socket.AF_INET6)

SSH_SERVERS = frozenset(("sshd", "sshd-session", "sshd-auth", "dropbear"))
_LOGGING_IN = re.compile(r"sshd(-session|-auth)?: (.* )?\[(net|accepted)\]")
"""What OpenSSH calls its process for the network, or for what was just accepted, until somebody has logged in (sshd.c, setproctitle)."""
_SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Process:
    """A process that holds a socket; `started` in seconds since the epoch, None where that cannot be told.

    `title`: its command line, which some servers rewrite to say what they are doing.
    """

    pid: int
    name: str
    started: float | None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of an established connection to a local TCP port; an IPv4 peer of an IPv6 socket counts as IPv4.

    `local`: our own address of the connection.
    `processes`: those that hold our end, the oldest first; none where another user's may not be seen.
    """

    version: int
    address: int
    port: int
    local_port: int
    local: int = 0
    processes: tuple[Process, ...] = ()

    @property
    def logging_in(self) -> bool:
        """True where it is certain that nobody has logged in over it yet: an SSH server says so of the process that it has for that."""
        return any(p.name in SSH_SERVERS and _LOGGING_IN.fullmatch(p.title) for p in self.processes)

    @property
    def since(self) -> float | None:
        """When the oldest process that holds the connection was started: servers such as sshd have one for each."""
        return self.processes[0].started if self.processes else None


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that takes connections (TCP) or datagrams from anybody (UDP).

    `version`: 4 or 6; an IPv6 socket on address 0 that is not `v6only` serves IPv4 as well.
    `address`: 0 for every address of the host.
    """

    protocol: Literal["tcp", "udp"]
    version: int
    address: int
    port: int
    v6only: bool = False
    uid: int = 0
    processes: tuple[Process, ...] = ()

    @property
    def versions(self) -> tuple[int, ...]:
        """The address families that the socket serves."""
        return (4, 6) if self.version == 6 and not self.address and not self.v6only else (self.version,)


def peers(ports: Iterable[int]) -> tuple[Peer, ...]:
    """Peers of established TCP connections to these local ports, ascending.

    Raises:
        Unavailable: the kernel has no socket diagnostics, or does not answer.
    """
    found = [m for port in sorted(set(ports)) for m in _ask(socket.IPPROTO_TCP, ESTABLISHED, port)]
    holders = _holders({m["idiag_inode"] for m in found})
    unsorted = (_peer(m, holders.get(m["idiag_inode"], ())) for m in found)
    return tuple(sorted(unsorted, key=lambda p: (p.version, p.address, p.port, p.local_port)))


def ports_of(programs: Collection[str]) -> frozenset[int]:
    """Local TCP ports on which one of these programs listens, as far as this user may look.

    Raises:
        Unavailable: the kernel has no socket diagnostics, or does not answer.
    """
    found = list(_ask(socket.IPPROTO_TCP, LISTEN))
    holders = _holders({m["idiag_inode"] for m in found})
    return frozenset(m["idiag_sport"] for m in found if any(p.name in programs for p in holders.get(m["idiag_inode"], ())))


def listeners() -> tuple[Listener, ...]:
    """Everything that listens, by protocol and port.

    Raises:
        Unavailable: the kernel has no socket diagnostics, or does not answer.
    """
    tcp = list(_ask(socket.IPPROTO_TCP, LISTEN))
    udp = [m for m in _ask(socket.IPPROTO_UDP, CLOSE) if m["idiag_sport"]]
    holders = _holders({m["idiag_inode"] for m in (*tcp, *udp)})
    found = [_listener("tcp", m, holders) for m in tcp] + [_listener("udp", m, holders) for m in udp]
    return tuple(sorted(found, key=lambda s: (s.protocol, s.port, s.version, s.address)))


def _ask(protocol: int, state: int, port: int = 0) -> Iterator[Any]:
    """pyroute2's messages about the sockets of one protocol in one state, both families."""
    from pyroute2.netlink.diag import DiagSocket
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with DiagSocket() as channel:
            channel.bind()
            for family in FAMILIES:
                yield from channel.get_sock_stats(family=family, states=1 << state, protocol=protocol, sport=port)
    except (NetlinkError, OSError) as error:
        said = os.strerror(error.code) if isinstance(error, NetlinkError) else error.strerror
        raise Unavailable(
            f"the kernel does not say which sockets there are: {said}", hint="it needs the modules tcp_diag and udp_diag"
        ) from error


def _address(text: str) -> tuple[int, int]:
    """Family and number of an address; an IPv4 address in IPv6's clothes is one of IPv4."""
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.version, int(address)


def _peer(message: Any, processes: tuple[Process, ...]) -> Peer:
    version, address = _address(message["idiag_dst"])
    return Peer(version, address, message["idiag_dport"], message["idiag_sport"], _address(message["idiag_src"])[1], processes)


def _listener(protocol: Literal["tcp", "udp"], message: Any, holders: Mapping[int, tuple[Process, ...]]) -> Listener:
    version, address = _address(message["idiag_src"])
    v6only = bool(message.get_attr("INET_DIAG_SKV6ONLY"))
    processes = holders.get(message["idiag_inode"], ())
    return Listener(protocol, version, address, message["idiag_sport"], v6only, message["idiag_uid"], processes)


def _holders(inodes: set[int]) -> dict[int, tuple[Process, ...]]:
    """The processes that have each socket open, as far as this user may look (proc(5), /proc/pid/fd)."""
    found: dict[int, list[Process]] = {}
    for folder in Path("/proc").iterdir() if inodes else ():
        if not folder.name.isdigit():
            continue
        held = _sockets_of(folder) & inodes
        if held:
            process = _process(folder)
            for inode in held:
                found.setdefault(inode, []).append(process)
    return {inode: tuple(sorted(each, key=lambda p: (p.started or 0, p.pid))) for inode, each in found.items()}


def _sockets_of(folder: Path) -> set[int]:
    held: set[int] = set()
    # Processes end while we look, and other users' are none of our business.
    with suppress(OSError), os.scandir(folder / "fd") as entries:
        for entry in entries:
            with suppress(OSError):
                match = _SOCKET.match(os.readlink(entry.path))  # noqa: PTH115 - a Path for every descriptor of the host costs more
                if match:
                    held.add(int(match[1]))
    return held


def _process(folder: Path) -> Process:
    name, started = "?", None
    with suppress(OSError, ValueError, IndexError):
        text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        name = text[text.index("(") + 1 : text.rindex(")")]
        started = _boot_time() + int(text[text.rindex(")") + 2 :].split()[19]) / os.sysconf("SC_CLK_TCK")
    title = ""
    with suppress(OSError):
        title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(int(folder.name), name, started, title)


def _boot_time() -> float:
    """When this machine was started, in seconds since the epoch (proc(5), /proc/stat)."""
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    raise ValueError("/proc/stat has no btime")
