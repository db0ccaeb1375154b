"""A host to try commands on: a network namespace, a state directory, and `fwc` run in this process or as a program.

`Host.fwc` calls `fwcompiler.cli.run` here, which is what the program does and ten times as fast; `Host.program` starts the
real one, for what only a process can show: signals, closed pipes, other users. `Host.kernel` reads what the kernel holds.
"""

from __future__ import annotations

import gc
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import kernelspace

from fwcompiler.cli import run

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "schemas"
BACKENDS = ("nftables", "iptables-nft", "iptables-legacy")
FWC = str(Path(sys.executable).with_name("fwc"))
PROGRAM_TIMEOUT = 60

POLICY = """version: 1
groups:
  carriers: [198.51.100.16/28, 2001:db8:51::/48]
  agents:
    members: [203.0.113.0/24]
    dynamic: {timeout: 12h, max: 4096}
  admins: [192.0.2.10, 2001:db8:ad::10]
services:
  sip: {from: [carriers, agents]}
  rtp: {from: anywhere}
  ssh: {from: [admins]}
"""


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


@dataclass
class Host:
    """Somewhere to act: `fwc` and `program` put its namespace, state directory and backend in front of the arguments."""

    folder: Path
    netns: str
    backend: str = "nftables"
    state: Path = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.folder / "state"

    @property
    def common(self) -> tuple[str, ...]:
        """The common options that name this host."""
        return ("--netns", self.netns, "--state-dir", str(self.state), "--backend", self.backend)

    def write(self, text: str = POLICY, name: str = "policy.yaml") -> str:
        """Write a file beside the policy; returns its path."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def fwc(self, *arguments: str, stdin: io.StringIO | None = None) -> Ran:
        """Run a command in this process."""
        return fwc(*self.common, *arguments, stdin=stdin)

    def program(self, *arguments: str, **keywords: Any) -> Ran:
        """Run a command as a program of its own."""
        return program(*self.common, *arguments, **keywords)

    def apply(self, text: str = POLICY, *, code: int = 0) -> Ran:
        """Apply a policy without being asked, and expect this exit code."""
        ran = self.fwc("apply", self.write(text), "--yes")
        assert ran.code == code, ran
        return ran

    def in_sync(self, text: str | None = None) -> bool:
        """True where `status`, and with a policy `diff` too, find nothing to do."""
        found = bool(self.fwc("status", "--json").json["in_sync"])
        return found and (text is None or self.fwc("diff", self.write(text)).code == 0)

    def run(self, *argv: str, stdin: str = "") -> str:
        """Run any program in the namespace."""
        return kernelspace.in_named(self.netns, *argv, stdin=stdin)

    def iptables(self, *arguments: str, version: int = 4) -> str:
        """Run the iptables of this host's backend."""
        family = "ip" if version == 4 else "ip6"
        return self.run(f"{family}tables-{self.backend.removeprefix('iptables-')}", "-w", "5", *arguments)

    def ours(self) -> str:
        """What the kernel holds of fwc, counters and times left out: equal texts are equal firewalls."""
        if self.backend == "nftables":
            present = "table inet fwc" in self.run("nft", "list", "tables")
            return plain(self.run("nft", "list", "table", "inet", "fwc")) if present else ""
        variant = self.backend.removeprefix("iptables-")
        saves = [self.run(f"{family}tables-{variant}-save", "-t", "filter") for family in ("ip", "ip6")]
        rules = [line for save in saves for line in plain(save).splitlines() if "FWC-" in line]
        sets = [line for line in self.run("ipset", "save").splitlines() if " fwc-" in line]
        return "\n".join((*rules, *sorted(re.sub(r" (hashsize|initval|timeout|bucketsize) \S+", "", s) for s in sets)))

    def set_names(self) -> list[str]:
        """Names of all sets of fwc, twins that a crash left behind among them."""
        if self.backend == "nftables":
            return re.findall(r"^\tset (\S+) ", self.ours(), re.M)
        return [name for name in self.run("ipset", "list", "-n").split() if name.startswith("fwc-")]

    def twins(self) -> list[str]:
        """Sets that are there under both of their names."""
        base = [re.sub(r"\.b$|(?<=[46])b$", "", name) for name in self.set_names()]
        return sorted({name for name in base if base.count(name) > 1})


def fwc(*arguments: str, stdin: io.StringIO | None = None) -> Ran:
    """Run one command line in this process, its three streams being texts."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = stdin or io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = run(list(arguments))
    finally:
        sys.stdin = before
        gc.enable()
    return Ran(code, out.getvalue(), err.getvalue())


def program(*arguments: str, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Ran:
    """Run `fwc` as a program; `prefix` is what starts it (`setpriv …`), `env` is laid over the environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FWC_STATE_DIR", "NO_COLOR", "SSH_CONNECTION")}
    done = subprocess.run(
        [*prefix, FWC, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PROGRAM_TIMEOUT,
        env={**environment, **(env or {})},
        cwd=cwd,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


FAULT = """
import importlib, os, signal, sys
place, when = sys.argv[1:3]
module, _, name = place.rpartition(":")
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
real = getattr(owner, name)
def die(*a, **k):
    if when == "after":
        real(*a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, die)
from fwcompiler.cli import run
sys.exit(run(sys.argv[3:]))
"""


def killed_at(host: Host, place: str, when: str, *arguments: str, env: Mapping[str, str] | None = None) -> int:
    """Run a command as a program that is killed before or after a function of fwc's, `module:name`; returns how it ended."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FWC_STATE_DIR", "NO_COLOR", "SSH_CONNECTION")}
    argv = [sys.executable, "-c", FAULT, place, when, *host.common, *arguments]
    return subprocess.run(argv, env={**environment, **(env or {})}, stdin=subprocess.DEVNULL, check=False).returncode


def valid(name: str, value: Any) -> Any:
    """The value, after the schema in `schemas/` accepted it."""
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(value)
    return value


def plain(listing: str) -> str:
    """A listing without what changes by itself: counters, times left, comments, and where iptables-save was run."""
    text = re.sub(r"packets \d+ bytes \d+", "packets 0 bytes 0", listing)
    text = re.sub(r"\[\d+:\d+\]", "[0:0]", text)
    text = re.sub(r"expires \w+", "expires 0s", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def wrapper(folder: Path, name: str, script: str) -> Path:
    """A program that stands in front of the real one on PATH; `$REAL` in the script is the real one. Returns its folder."""
    real = next(p for d in ("/usr/sbin", "/sbin", "/usr/bin", "/bin") if os.access(p := f"{d}/{name}", os.X_OK))
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\nREAL={real}\nHERE={folder}\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return folder
