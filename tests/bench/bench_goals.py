"""The speed goals one by one, and the same policy through other firewalls beside them, all in one run.

    python tests/bench/bench_goals.py [--backends nftables,iptables-nft] [--rounds 5] [--million] [--peers 10,1000,10000]

Every figure is the median of whole processes, started anew, in network namespaces of their own; what it is compared with takes
turns with it. Goals in seconds hold for a machine that is otherwise idle. Needs root.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench_apply import FWC, HAND_WRITTEN, POLICY, Run, carriers, fwc, measured, namespace
from incumbents import ALLOW_LISTED, ferm_file, firewalld, installed, seconds, ufw_folder

from fwcompiler.kernel import netns

DYNAMIC = POLICY.replace("  admins:", "  agents: {members: [203.0.113.0/24], dynamic: {timeout: 12h}}\n  admins:").replace(
    "sip: {from: [carriers]}", "sip: {from: [carriers, agents]}"
)
MISSING = "-"


@dataclass(frozen=True)
class Goal:
    """What was measured, what it is measured against, and the most that it may be: seconds, or a ratio where there is a partner."""

    title: str
    ours: list[Run]
    most: float
    beside: list[Run] | None = None
    memory: float | None = None

    def row(self) -> str:
        """One line of the table."""
        wall = statistics.median(r.wall for r in self.ours)
        memory = statistics.median(r.memory for r in self.ours)
        value = statistics.median(a.wall / b.wall for a, b in zip(self.ours, self.beside, strict=True)) if self.beside else wall
        meets = value <= self.most and (self.memory is None or memory <= self.memory)
        goal = f"{self.most:g} x" if self.beside else f"{self.most:g} s"
        goal += f", {self.memory:g} MiB" if self.memory else ""
        ratio = f"{value:.2f}" if self.beside else MISSING
        return f"{self.title:<44}{wall:>9.3f}{memory:>7.0f}{ratio:>7}  {goal:<16}{'meets' if meets else 'MISSES'}"


class Bench:
    """One backend in a folder with the policy's files."""

    def __init__(self, backend: str, folder: Path, rounds: int) -> None:
        self.backend, self.folder, self.rounds = backend, folder, rounds

    def write(self, entries: list[str], text: str = POLICY) -> None:
        """The policy, its list, and the hand-written file of the same rules."""
        (self.folder / "policy.yaml").write_text(text, encoding="ascii")
        (self.folder / "carriers.txt").write_text("\n".join(entries), encoding="ascii")
        (self.folder / "hand.nft").write_text(HAND_WRITTEN.format(elements=", ".join(entries)), encoding="ascii")

    def run(self, name: str, *arguments: str) -> Run:
        """One command of fwc."""
        return measured(fwc(name, self.backend, *arguments), self.folder)

    def apply(self, name: str) -> Run:
        """One `fwc apply`."""
        return self.run(name, "apply", "policy.yaml", "--yes")

    def forget(self) -> None:
        """Start as a host that has never seen fwc."""
        subprocess.run(("rm", "-rf", str(self.folder / "state")), check=True)

    def times(self, what: Callable[[], Run]) -> list[Run]:
        """What a task takes, the first time left out."""
        what()
        return [what() for _ in range(self.rounds)]

    def goals(self, million: bool) -> Iterator[Goal]:
        """All goals, in the order of the table."""
        yield Goal("fwc --version", self.times(lambda: measured([str(FWC), "--version"], self.folder)), 0.04)
        with namespace() as name:
            self.write(carriers(10))
            yield Goal("unchanged apply, 10 carriers", self.times(lambda: self.apply(name)), 0.25)
        self.forget()
        yield self.cold_restore()
        yield self.first_apply(100_000, 1.0)
        yield self.one_entry(100_000)
        for size in (10, 100_000):
            yield self.allow(size)
        if million:
            yield self.first_apply(1_000_000, 0.5, 600)

    def cold_restore(self) -> Goal:
        """What a boot does: a namespace without any rules, the state directory of a host that has some."""
        self.write(carriers(10))
        with namespace() as name:
            self.apply(name)

        def restored() -> Run:
            with namespace() as fresh:
                return measured([str(FWC), "restore", "-q", "--netns", fresh, "--state-dir", "state"], self.folder)

        found = Goal("cold restore, 10 carriers", self.times(restored), 0.25)
        self.forget()
        return found

    def first_apply(self, size: int, most: float, memory: float | None = None) -> Goal:
        """Beside `nft -f` of the hand-written file."""
        self.write(carriers(size))
        ours, theirs = [], []
        for _ in range(self.rounds if size < 1_000_000 else 1):
            with namespace() as name:
                ours.append(self.apply(name))
            self.forget()
            theirs.append(measured(["unshare", "-n", "nft", "-f", "hand.nft"], self.folder))
        return Goal(f"first apply, {size:,} carriers, beside nft -f", ours, most, theirs, memory)

    def one_entry(self, size: int) -> Goal:
        """Entries come and go one by one."""
        entries = carriers(size)
        self.write(entries)
        ours = []
        with namespace() as name:
            self.apply(name)
            for n in range(1, self.rounds + 1):
                self.write(entries[:-n])
                ours.append(self.apply(name))
        self.forget()
        return Goal(f"one-entry apply, {size:,} carriers", ours, 0.6)

    def allow(self, size: int) -> Goal:
        """One member in, beside the same by hand."""
        self.write(carriers(size), DYNAMIC)
        with namespace() as name:
            self.apply(name)
            numbers = iter(range(1, 250))
            ours = self.times(lambda: self.run(name, "allow", "agents", f"198.18.1.{next(numbers)}"))
        self.forget()
        return Goal(f"allow of a member beside {size:,} carriers", ours, 0.2)


def peers(sizes: list[int], rounds: int) -> None:
    """One line for each tool and size: what loading takes, and what one network more takes."""
    print(f"\n{'peer':<34}{'carriers':>9}{'load s':>9}{'one more s':>12}")
    for size in sizes:
        entries = carriers(size)
        for title, tool in (("fwc", _fwc), ("nft -f by hand, nft add element", _by_hand), ("firewalld, its runtime set", _firewalld)):
            _peer_row(title, size, [tool(entries) for _ in range(rounds)])
        for title, program, command in (("ferm, whole reload", "ferm", ferm_file), ("ufw from its file, whole reload", "ufw", ufw_folder)):
            _peer_row(title, size, [_reloaded(program, command, entries) for _ in range(rounds)])
        print(f"{'foomuuri':<34}{size:>9}  {'not measured here' if installed('foomuuri') else 'is not installed'}")


Times = tuple[float, float] | None


def _peer_row(title: str, size: int, found: list[Times]) -> None:
    times = [each for each in found if each]
    figures = [f"{statistics.median(column):.3f}" for column in zip(*times, strict=True)] if times else []
    print(f"{title:<34}{size:>9}" + (f"{figures[0]:>9}{figures[1]:>12}" if figures else "  is not installed"), flush=True)


def _inside(name: str, *argv: str) -> float:
    return seconds(("ip", "netns", "exec", name, *argv))


def _fwc(entries: list[str]) -> Times:
    with tempfile.TemporaryDirectory() as made, namespace() as name:
        bench = Bench("nftables", Path(made), 1)
        bench.write(entries[:-1])
        load = bench.apply(name).wall
        bench.write(entries)
        return load, bench.apply(name).wall


def _by_hand(entries: list[str]) -> Times:
    with tempfile.TemporaryDirectory() as made, namespace() as name:
        path = Path(made) / "hand.nft"
        path.write_text(HAND_WRITTEN.format(elements=", ".join(entries[:-1])), encoding="ascii")
        load = _inside(name, "nft", "-f", str(path))
        return load, _inside(name, "nft", "add", "element", "inet", "hand", "carriers4", f"{{ {entries[-1]} }}")


def _firewalld(entries: list[str]) -> Times:
    if not (installed("firewalld") and installed("dbus-daemon")):
        return None
    with tempfile.TemporaryDirectory() as made, namespace() as name, netns.named(name).entered():
        folder = Path(made)
        with firewalld(folder, ALLOW_LISTED, entries[:-1]) as daemon:
            load = daemon.timed("--reload")
            return load, daemon.timed("--ipset=listed", f"--add-entry={entries[-1]}")


def _reloaded(program: str, command: Callable[[Path, list[str]], tuple[str, ...]], entries: list[str]) -> Times:
    if not installed(program):
        return None
    with tempfile.TemporaryDirectory() as made, namespace() as name:
        load = _inside(name, *command(Path(made), entries[:-1]))
        return load, _inside(name, *command(Path(made), entries))


def main() -> None:
    """Goals of every backend, then the peers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="nftables,iptables-nft")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--million", action="store_true", help="the million carriers, too")
    parser.add_argument("--peers", default="10,1000,10000")
    options = parser.parse_args()
    for backend in options.backends.split(","):
        print(f"{backend:<44}{'seconds':>9}{'MiB':>7}{'ratio':>7}  {'goal':<16}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for goal in Bench(backend, Path(folder), options.rounds).goals(options.million):
                print(goal.row(), flush=True)
    if options.peers:
        peers([int(size) for size in options.peers.split(",")], min(3, options.rounds))


if __name__ == "__main__":
    main()
