"""Policies and facts for the pure checks, from texts."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fwcompiler.addresses import parse_address
from fwcompiler.asterisk import Disk, read_configuration
from fwcompiler.audit.facts import ASTERISK_FILES, Facts, OwnAddress
from fwcompiler.audit.findings import Issue
from fwcompiler.kernel.sockets import Listener, Process
from fwcompiler.pipeline import Compiled, compile_policy

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
HEAD = """version: 1
groups:
  carriers: [198.51.100.16/28, "2001:db8:51::/48"]
  agents: {members: [203.0.113.0/24], dynamic: {}}
  cluster: [10.20.0.0/24]
  admins: [192.0.2.10]
  bad: [198.51.100.20, 203.0.113.7, 8.8.8.8]
"""
POLICY = f"""{HEAD}services:
  sip: {{from: [carriers, agents, cluster]}}
  rtp: {{from: anywhere, ports: 10000-14999}}
  https: {{from: anywhere}}
  wss: {{from: [cluster, admins]}}
  ssh: {{from: [admins]}}
"""


def compiled(folder: Path, text: str = POLICY) -> Compiled:
    """A policy from its text."""
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return compile_policy(str(path))


def facts(folder: Path, files: dict[str, str] | None = None, addresses: Iterable[str] = (), **more: Any) -> Facts:
    """Facts with Asterisk's files by name (`rtp` for rtp.conf) and the host's addresses."""
    home = folder / "asterisk"
    home.mkdir(exist_ok=True)
    for name, text in (files or {}).items():
        (home / f"{name}.conf").write_text(text, encoding="utf-8")
    asterisk = {name: c for name in ASTERISK_FILES if (c := read_configuration(str(home / name), str(home), Disk())) is not None}
    own = tuple(OwnAddress(*parse_address(a), "eth0", wide=True) for a in addresses) or None
    return Facts(
        **{"name": "dialer1.example.net", "now": NOW, "asterisk_folder": str(home), "asterisk": asterisk, "addresses": own, **more}
    )


def listener(text: str, name: str = "") -> Listener:
    """`tcp/0.0.0.0/443` as a listening socket, of a program if it is named."""
    protocol, host, port = text.split("/")
    version, address = parse_address(host)
    processes = (Process(1, name, None),) if name else ()
    return Listener("tcp" if protocol == "tcp" else "udp", version, address, int(port), processes=processes)


def said(issues: Iterable[Issue]) -> list[tuple[str, str, int]]:
    """Code, severity and line of each finding; 0 where it has none."""
    return [(i.code, i.severity, i.at.line if i.at else 0) for i in issues]
