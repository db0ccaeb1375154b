"""Reads a legacy host's rules through python-iptables (`iptc`), in a child process of its own.

python-iptables is the optional extra ``fwcompiler[legacy]``. It is asked for nothing but reading, and a child keeps
its crashes, its output on stdout and its warnings away from fwc. What it does by itself and must not do here:

- ``iptc.easy`` and ``Table(autocommit=True)`` commit on every access, even when reading: neither is used.
- A rule that jumps to a chain makes it open every table, which registers nat, mangle, raw and security in the kernel:
  it is told that only those exist which somebody registered, and no other one is opened.
- Reading a rule loads the extensions it uses, and some crash: in built-in chains only the jumps to our chains are read.
- It takes no xtables lock. A listing is one consistent snapshot all the same; who compares it with another one has to
  ask again when the two differ.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TIMEOUT = 15
"""Seconds. The child needs 0.3 for some hundred rules, 2 for 10,000."""
CHAIN_PREFIX = "FWC-"
TABLES = ("filter", "nat", "mangle", "raw")
_NAMES = {4: "/proc/net/ip_tables_names", 6: "/proc/net/ip6_tables_names"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the child said: the rules as JSON text, or why there are none. Neither: python-iptables is not installed."""

    text: str = ""
    reason: str = ""


def ask() -> Answer:
    """Read the tables of both families in the current network namespace. Never raises."""
    if find_spec("iptc") is None:
        return Answer()
    # -P: a file called iptc.py in the current directory is not what we mean.
    argv = (sys.executable, "-P", "-W", "ignore", "-m", __name__)
    try:
        child = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return Answer(reason=f"python-iptables did not answer within {TIMEOUT} seconds")
    except OSError as error:
        return Answer(reason=f"{sys.executable} cannot be started: {error.strerror}")
    return _answer(child.returncode, child.stdout.decode(errors="replace"), child.stderr.decode(errors="replace"))


def _answer(code: int, out: str, err: str) -> Answer:
    if code == 0 and out:
        return Answer() if out == "missing" else Answer(out)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Answer(reason=f"python-iptables crashed ({name})")
    last = next((line.strip() for line in reversed(err.splitlines()) if line.strip()), f"exit code {code} without a word")
    return Answer(reason=f"python-iptables failed: {last[:200]}")


def _child() -> None:
    """Print the rules as JSON: version -> chain -> rules, where chains of other tables than ``filter`` are ``TABLE/CHAIN``;
    "missing" without python-iptables.

    stdout is kept for the answer: iptc and the extensions print where they like. The process ends without running
    iptc's destructors.
    """
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        text = json.dumps({version: dict(_tables(version)) for version in _NAMES})
    except ModuleNotFoundError as error:
        if error.name != "iptc":
            raise
        text = "missing"
    with open(answer, "w", encoding="utf-8") as stream:  # noqa: PTH123 - a descriptor has no path
        stream.write(text)
    os._exit(0)


def _tables(version: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Our chains, and the built-in chains that lead to them."""
    registered = _registered(version)
    if not registered:
        return
    import iptc

    kind = iptc.Table if version == 4 else iptc.Table6
    kind.commit = _refuse
    kind.existing_table_names = {name: name in registered for name in kind.ALL}
    for name in (t for t in TABLES if t in registered):
        table = kind(name, autocommit=False)
        for chain in table.chains:
            ours = chain.name.startswith(CHAIN_PREFIX)
            rules = list(_rules(table, chain, version, only_jumps=not ours))
            if rules or ours:
                yield chain.name if name == "filter" else f"{name}/{chain.name}", rules


def _registered(version: int) -> list[str]:
    try:
        return Path(_NAMES[version]).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return []


def _refuse(*_: object) -> None:
    raise AssertionError("the second reading never writes")


def _rules(table: Any, chain: Any, version: int, *, only_jumps: bool) -> Iterator[dict[str, Any]]:
    entry = table.first_rule(chain.name)
    while entry:
        target = table.get_target(entry) or b""
        if not only_jumps or (chain.is_builtin() and target.startswith(CHAIN_PREFIX.encode())):
            try:
                yield _rule(table.create_rule(entry, chain), version)
            except Exception as error:  # an extension it does not know, a text it cannot read: one rule, not all
                yield {"unreadable": f"{type(error).__name__}: {error}"}
        entry = table.next_rule(entry)


def _rule(rule: Any, version: int) -> dict[str, Any]:
    return {
        "source": rule.src,
        "destination": rule.dst,
        "in": rule.in_interface or "",
        "out": rule.out_interface or "",
        "protocol": _protocol(rule),
        "fragment": version == 4 and rule.fragment,
        "matches": [[each.name, _parameters(each)] for each in rule.matches],
        "target": rule.target.name,
        "goto": rule.target.goto,
        "options": _parameters(rule.target),
    }


def _protocol(rule: Any) -> str:
    """The number, with a "!" before it where it is negated; iptc has names of its own for some ("tp" is 29)."""
    text = str(rule.protocol)
    numbers = {name: str(number) for number, name in rule.protocols.items()}
    name = text.removeprefix("!")
    return ("!" if name != text else "") + numbers.get(name, name)


def _parameters(module: Any) -> dict[str, list[str]]:
    """Option -> values, a "!" first where it is negated.

    Text comes through a shell parser in iptc: ``\\'`` keeps its backslash, and a comment that looks like an option is
    taken for one. Hence the comment is read from the extension's own data.
    """
    if module.name == "comment":
        head = ctypes.sizeof(type(module.match))
        return {"comment": [bytes(module.match_buf)[head:].partition(b"\0")[0].decode(errors="replace")]}
    return {option: [value.replace("\\'", "'") for value in values] for option, values in module.get_all_parameters().items()}


if __name__ == "__main__":
    _child()
