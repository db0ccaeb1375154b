"""Runs commands and fills sets. Nothing else in fwc starts a program or changes a kernel.

Steps run in order; when one fails, what the steps before it did is undone in reverse, and the failure says so.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import cast

from fwcompiler.addresses import Ranges
from fwcompiler.backend import Command, Do, Fill, SetKind, Step
from fwcompiler.diagnostics import Finding, HostRefused, Position, Unavailable
from fwcompiler.kernel import ipset, nftset
from fwcompiler.kernel.watch import Watch, watching, xtables_locked

UNCHANGED = "; nothing was changed"
PACKAGES = {"nft": "nftables", "ipset": "ipset"}

# How the programs say that there is nothing of ours: nft, iptables-save, ipset.
_NOTHING = re.compile(r"No such file or directory|does not exist|No such table|Table .* incompatible", re.I)
_NFT_PLACE = re.compile(r"^/dev/stdin:(\d+):[\d-]+: (?:Error: )?(.*)$", re.M)
_RESTORE_LINE = re.compile(r"line:? (\d+)")


def search_path() -> list[str]:
    """PATH, and where it has only the bin directories, as for `su` and cron, the sbin directories beside them."""
    path = os.environ.get("PATH", "/usr/bin:/bin").split(os.pathsep)
    beside = {"/usr/bin": "/usr/sbin", "/bin": "/sbin"}
    return list(dict.fromkeys((*path, *(beside[p] for p in path if p in beside))))


def find(program: str) -> str | None:
    """Full path of a program, or None."""
    for folder in search_path():
        path = os.path.join(folder, program)  # noqa: PTH118 - pathlib costs more than the whole search
        if os.access(path, os.X_OK) and os.path.isfile(path):  # noqa: PTH113
            return path
    return None


def require(programs: Sequence[str]) -> None:
    """Check that programs are installed.

    Raises:
        HostRefused: naming all that are missing, and their packages.
    """
    missing = [p for p in programs if find(p) is None]
    if missing:
        packages = dict.fromkeys(PACKAGES.get(p, "iptables") for p in missing)
        names = ", ".join(f"`{p}`" for p in missing)
        raise Unavailable(
            f"{names} {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"install {' and '.join(packages)} with apt, dnf or zypper",
        )


def run(command: Command) -> str:
    """Run one command and return what it printed.

    Raises:
        HostRefused: not installed, or it failed; refusals of single lines are mapped to the policy.
    """
    program = find(command.argv[0])
    if program is None:
        if command.otherwise is not None:
            return run(command.otherwise)
        if command.may_fail:
            return ""
        require(command.argv[:1])
    result = subprocess.run(
        [program or "", *command.argv[1:]],
        input=command.stdin,
        capture_output=True,
        text=True,
        errors="surrogateescape",  # comments in other people's rules are bytes
        check=False,
        env={**os.environ, "PATH": os.pathsep.join(search_path()), "LC_ALL": "C", **_told},
    )
    if result.returncode == 0:
        return result.stdout
    if command.otherwise is not None:
        return run(command.otherwise)
    if command.may_fail or (command.missing_ok and _NOTHING.search(result.stderr)):
        return ""
    raise _refusal(command, result.stderr)


def _refusal(command: Command, stderr: str) -> HostRefused:
    text = stderr.strip()
    if re.search(r"Operation not permitted|[Pp]ermission denied|must be root", text):
        return Unavailable(f"{command.argv[0]}: not permitted", hint="fwc needs root (CAP_NET_ADMIN) for this")
    findings = [
        Finding("kernel", f"{command.argv[0]}: {message}", at) for line, message in _failed_lines(text) if (at := _origin(command, line))
    ]
    words = " ".join(line.strip() for line in text.splitlines() if line.strip()) or "failed without a word"
    return HostRefused(f"{command.argv[0]} refused: {words if len(words) <= 400 else words[:400] + ' ...'}", findings)


def _failed_lines(stderr: str) -> Iterator[tuple[int, str]]:
    """Numbers of refused lines, from nft's or iptables-restore's words."""
    found = False
    for match in _NFT_PLACE.finditer(stderr):
        found = True
        yield int(match[1]), match[2]
    line = None if found else _RESTORE_LINE.search(stderr)
    if line:
        yield int(line[1]), stderr.splitlines()[0]


def _origin(command: Command, line: int) -> Position | None:
    return command.origins.get(line)


def outputs(commands: Sequence[Command]) -> tuple[str, ...]:
    """What each command prints, in order."""
    return tuple(run(c) for c in commands)


def try_out(steps: Sequence[Step], listing: Sequence[Command], *, fill: bool = True) -> tuple[str, ...]:
    """Load into a scratch namespace and list there, large sets being filled last: a listing takes time by their size.

    Without `fill` they stay empty, for who is going to fill the real ones: that is all or nothing, and what is listed is the same.

    Raises:
        HostRefused: the kernel refuses a step.
    """
    try:
        for step in steps:
            if isinstance(step.do, Command):
                run(step.do)
        listed = outputs(listing)
    except HostRefused as refused:
        refused.message += "; nothing was changed"
        raise
    if fill:
        execute([step for step in steps if isinstance(step.do, Fill)])
    return listed


def execute(steps: Sequence[Step], watch: Watch | None = None) -> None:
    """Run steps in order; consecutive fills of nftables sets are one transaction. `watch` does not listen to large ones.

    Raises:
        HostRefused: a step failed; what came before it was undone.
    """
    undo: list[Do] = []
    try:
        for together, batch in _transactions(steps):
            if together:
                with watch.deaf() if watch and _is_large(batch) else nullcontext():
                    _fill_nft([cast(Fill, s.do) for s in batch])
                undo[:0] = [u for s in reversed(batch) for u in s.undo]
                continue
            for step in batch:
                _do(step.do)
                undo[:0] = step.undo
    except BaseException as error:
        _undo(undo, error)
        raise


_told: dict[str, str] = {}
"""What programs are told in their environment besides ours."""


@contextmanager
def undisturbed(kind: SetKind) -> Iterator[Watch | None]:
    """Keep others away from the rules for the length of a block, as far as the kernel lets us, and hear what they do.

    nftables has no lock, but tells every transaction: the watch hears them. iptables-legacy has a lock, which is held here;
    iptables-nft and ipset take none, so what they do between a look and the commit is not noticed.

    Raises:
        HostRefused: somebody holds the lock for long.
    """
    if kind == "nft":
        with watching() as watch:
            yield watch
        return
    with xtables_locked() as told:
        _told.update(told)
        try:
            yield None
        finally:
            _told.clear()


LARGE = 1000
"""Elements in one transaction from which on a watch does not listen to it."""


def _transactions(steps: Sequence[Step]) -> Iterator[tuple[bool, list[Step]]]:
    """Steps as :func:`execute` runs them: true for those that are one transaction together."""
    for together, group in groupby(steps, key=lambda s: isinstance(s.do, Fill) and s.do.kind == "nft"):
        yield together, list(group)


def _is_large(steps: Sequence[Step]) -> bool:
    return sum(len(s.do.add) + len(s.do.remove) for s in steps if isinstance(s.do, Fill)) > LARGE


def heard_transactions(steps: Sequence[Step]) -> int:
    """How many transactions of nf_tables a watch hears :func:`execute` make of steps."""
    return sum((not _is_large(batch)) if together else len(batch) for together, batch in _transactions(steps))


def _undo(undo: Sequence[Do], error: BaseException) -> None:
    """Put back what was done, the last step first."""
    failed: list[str] = []
    for each in undo:
        try:
            _do(each)
        except HostRefused as second:
            failed.append(second.message)
    if isinstance(error, HostRefused):
        error.message += f"; putting back failed too: {'; '.join(failed)}" if failed else UNCHANGED


def _do(do: Do) -> None:
    if isinstance(do, Command):
        run(do)
    elif do.kind == "nft":
        _fill_nft([do])
    else:
        ipset.change(do.set, do.version, do.add, do.remove)


def _fill_nft(fills: Sequence[Fill]) -> None:
    nftset.change_many([(f.set, f.version, f.add, f.remove) for f in fills])


def read_set(kind: SetKind, name: str, version: int) -> Ranges:
    """Content of a static set, as the kernel holds it."""
    return nftset.read(name, version) if kind == "nft" else ipset.read(name)


def read_members(kind: SetKind, name: str, version: int) -> tuple[tuple[int, int | None], ...]:
    """Members of a dynamic set with their remaining milliseconds."""
    if kind == "nft":
        return nftset.members(name, version)
    return tuple((address, None if left is None else left * 1000) for address, left in ipset.members(name))


def generation_id() -> int | None:
    """The number that nf_tables gives its present ruleset; None where it cannot be asked."""
    try:
        return nftset.generation()
    except HostRefused:
        return None


def holds(kind: SetKind, name: str, version: int, address: int) -> bool:
    """True where a set holds an address, static or dynamic; takes the same time however large it is."""
    return nftset.lookup(name, version, address) if kind == "nft" else ipset.lookup(name, version, address)


def put_members(kind: SetKind, name: str, version: int, entries: Sequence[tuple[int, int | None]]) -> None:
    """Put members with the milliseconds they have left (None: for good) into a dynamic set; a present one starts anew.

    Raises:
        HostRefused: no such set, or it is full.
    """
    if kind == "nft":
        nftset.add_members(name, version, entries)
    else:
        ipset.add_members(name, version, [(address, None if left is None else max(1, -(-left // 1000))) for address, left in entries])


def take_member(kind: SetKind, name: str, version: int, address: int) -> None:
    """Take a member out of a dynamic set; it may be gone already.

    Raises:
        HostRefused: no such set.
    """
    if kind == "nft":
        nftset.remove_member(name, version, address)
    else:
        ipset.remove_member(name, version, address)


def iptables_rules(variant: str) -> int:
    """How many rules one iptables variant holds, both families; 0 where it is not installed or may not be asked."""
    total = 0
    for program in (f"iptables-{variant}-save", f"ip6tables-{variant}-save"):
        if find(program):
            try:
                total += run(Command((program,), missing_ok=True)).count("\n-A ")
            except HostRefused:
                continue
    return total


def iptables_default() -> str:
    """The variant behind the plain name `iptables`; nft where it cannot be asked."""
    if find("iptables") is None:
        return "iptables-nft"
    return "iptables-legacy" if "legacy" in run(Command(("iptables", "--version"))) else "iptables-nft"
