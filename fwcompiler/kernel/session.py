"""Over which connection somebody works, and the clock that says how long this machine has been up.

`sudo` drops SSH_CONNECTION (sshd(8)) from the environment; the shell that it was called from still has it.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SSH = "SSH_CONNECTION"
_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Connection:
    """An SSH connection as its server saw it: the addresses as texts."""

    client: str
    client_port: int
    server: str
    server_port: int

    def client_address(self) -> tuple[int, int] | None:
        """Family and number of the client's address; an IPv4 address in IPv6's clothes (RFC 4291, 2.5.5.2) is one of IPv4.

        None where it is no address: some servers that are reached through a proxy know none.
        """
        from ipaddress import IPv6Address, ip_address

        try:
            address = ip_address(self.client)
        except ValueError:
            return None
        plain = (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address
        return plain.version, int(plain)


def ssh_connection(*, ancestors: bool = True) -> Connection | None:
    """The SSH connection that this process was started over, or None.

    `ancestors`: also look for it in the environment of the processes that this one descends from, as far as they may be read.
    """
    texts = [os.environ.get(SSH, ""), *(_inherited() if ancestors else ())]
    return next((found for text in texts if (found := _parse(text))), None)


def user() -> str:
    """Who works here: whoever called `sudo`, the user of the login, or the owner of this process; its number where it has no name."""
    if os.environ.get("SUDO_USER"):
        return os.environ["SUDO_USER"]
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())


def _parse(text: str) -> Connection | None:
    words = text.split()
    if len(words) != 4 or not (words[1].isdecimal() and words[3].isdecimal()):
        return None
    client, server = (word.partition("%")[0] for word in (words[0], words[2]))
    return Connection(client, int(words[1]), server, int(words[3]))


def _inherited() -> Iterator[str]:
    pid = os.getppid()
    for _ in range(_DEPTH):
        if pid <= 1:
            return
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        for entry in environment.split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == SSH.encode():
                yield value.decode(errors="replace")
        pid = int(stat[stat.rindex(")") + 2 :].split()[1])


def peer_text() -> str:
    """The address that this process is worked from, or the empty string."""
    connection = ssh_connection()
    return connection.client if connection else ""


def identity() -> str:
    """What tells one connection from another: the two ends of an SSH connection, or else the session at a terminal (setsid(2))."""
    connection = ssh_connection()
    if connection:
        return f"ssh {connection.client} {connection.client_port} {connection.server} {connection.server_port}"
    leader = os.getsid(0)
    started = ""
    with suppress(OSError, ValueError, IndexError):
        stat = Path(f"/proc/{leader}/stat").read_text(encoding="utf-8", errors="replace")
        started = stat[stat.rindex(")") + 2 :].split()[19]
    return f"session {leader} {started}"


def boot_id() -> str:
    """Another text after every boot (random(4))."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def uptime() -> float:
    """Seconds since this machine was started; goes on while it is suspended, and nobody can set it (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
