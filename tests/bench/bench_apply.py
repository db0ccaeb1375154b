"""Wall time and peak memory of fwc beside a hand-written `nft -f` file of the same rules, in one run, as ratios.

    python tests/bench/bench_apply.py [--sizes 10,1000,10000,100000] [--backends nftables,...] [--rounds 5]

Every figure is a whole process, started anew, in a network namespace of its own; the two programs take turns, and
the ratio is taken pair by pair, so that a machine whose speed drifts does not decide. Needs root.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FWC = Path(sys.executable).with_name("fwc")
BYTECODE = tempfile.TemporaryDirectory(prefix="fwc-bench-")
ENVIRONMENT = {**os.environ, "PYTHONPYCACHEPREFIX": BYTECODE.name, "PYTHONDONTWRITEBYTECODE": ""}
"""An installed fwc has its bytecode beside it; a checkout may not."""
HAND_WRITTEN = """\
table inet hand {{
	set carriers4 {{ type ipv4_addr; flags interval; elements = {{ {elements} }}; }}
	set admins4 {{ type ipv4_addr; flags interval; elements = {{ 192.0.2.10 }}; }}
	counter sip_accept {{ }}
	counter sip_drop {{ }}
	counter ssh_accept {{ }}
	counter ssh_drop {{ }}
	chain sip {{ ip saddr @carriers4 counter name "sip_accept" accept; counter name "sip_drop" drop; }}
	chain ssh {{ ip saddr @admins4 counter name "ssh_accept" accept; counter name "ssh_drop" drop; }}
	chain input {{
		type filter hook input priority filter; policy drop;
		iif "lo" accept
		ip saddr 127.0.0.0/8 drop
		ip6 saddr ::1 drop
		ct state invalid drop
		tcp dport vmap {{ 22 : goto ssh }}
		udp dport vmap {{ 5060 : goto sip }}
		ct state established,related accept
		tcp dport vmap {{ 80 : accept, 443 : accept }}
		udp dport vmap {{ 10000-20000 : accept }}
		icmp type {{ 3, 11, 12 }} accept
		icmp type 8 limit rate 20/second burst 40 packets accept
		icmpv6 type {{ 1, 2, 3, 4, 130, 131, 132, 133, 134, 135, 136, 143 }} accept
		icmpv6 type 128 limit rate 20/second burst 40 packets accept
		limit rate 5/second burst 10 packets log prefix "drop: " level info
		drop
	}}
}}
"""
POLICY = """\
version: 1
groups:
  carriers: [{file: carriers.txt}]
  admins: [192.0.2.10]
services:
  sip: {from: [carriers]}
  rtp: {from: anywhere}
  http: {from: anywhere}
  https: {from: anywhere}
  ssh: {from: [admins]}
"""


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds and peak resident memory in MiB."""

    wall: float
    memory: float


def measured(argv: list[str], folder: Path) -> Run:
    """Run a command to its end; it must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stderr is not None
    words = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{argv} failed: {words.decode()}")
    return Run(wall, usage.ru_maxrss / 1024)


def carriers(count: int) -> list[str]:
    """Distinct /28 networks in random order, none of them touching another."""
    chosen = random.Random(count).sample(range(0x0B000000 >> 5, 0x7E000000 >> 5), count)
    return [f"{n >> 19 & 255}.{n >> 11 & 255}.{n >> 3 & 255}.{(n & 7) << 5}/28" for n in chosen]


@contextmanager
def namespace() -> Iterator[str]:
    """A network namespace with a name of its own."""
    name = f"fwcbench{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def fwc(name: str, backend: str, *arguments: str) -> list[str]:
    """A command line of fwc in the namespace."""
    return [str(FWC), *arguments, "-q", "--netns", name, "--state-dir", "state", "--backend", backend]


def rounds_of(backend: str, entries: list[str], folder: Path) -> dict[str, list[tuple[Run, Run]]]:
    """One round of every task, each beside a load of the hand-written file in a namespace of its own."""
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "carriers.txt").write_text("\n".join(entries[:-1]))
    (folder / "hand.nft").write_text(HAND_WRITTEN.format(elements=", ".join(entries[:-1])))
    shutil.rmtree(folder / "state", ignore_errors=True)
    found: dict[str, list[tuple[Run, Run]]] = {}

    def task(title: str, argv: Callable[[str], list[str]], name: str) -> None:
        ours = measured(argv(name), folder)
        with_hand = ["unshare", "-n", "nft", "-f", "hand.nft"]
        found.setdefault(title, []).append((ours, measured(with_hand, folder)))

    with namespace() as name:
        task("compile", lambda _: [str(FWC), "compile", "policy.yaml", "-q", "--backend", backend], name)
        task("first apply", lambda n: fwc(n, backend, "apply", "policy.yaml", "--yes"), name)
        task("unchanged apply", lambda n: fwc(n, backend, "apply", "policy.yaml", "--yes"), name)
        (folder / "carriers.txt").write_text("\n".join(entries))
        task("one-entry apply", lambda n: fwc(n, backend, "apply", "policy.yaml", "--yes"), name)
    return found


def main() -> None:
    """Print one line a backend, size and task: medians, and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="10,1000,10000,100000")
    parser.add_argument("--backends", default="nftables,iptables-nft,iptables-legacy")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(f"{'backend':<16}{'carriers':>9}  {'task':<16}{'seconds':>9}{'MiB':>8}{'nft -f s':>10}{'MiB':>8}{'ratio':>8}")
    for backend in options.backends.split(","):
        for size in map(int, options.sizes.split(",")):
            entries = carriers(size)
            results: dict[str, list[tuple[Run, Run]]] = {}
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(options.rounds):
                    for title, pairs in rounds_of(backend, entries, Path(folder)).items():
                        results.setdefault(title, []).extend(pairs)
            for title, pairs in results.items():
                print_row(backend, size, title, pairs)


def print_row(backend: str, size: int, title: str, pairs: list[tuple[Run, Run]]) -> None:
    """Medians of both sides, and the median of the ratios pair by pair."""
    ours, theirs = zip(*pairs, strict=True)
    wall, hand = (statistics.median(r.wall for r in side) for side in (ours, theirs))
    memory, hand_memory = (statistics.median(r.memory for r in side) for side in (ours, theirs))
    ratio = statistics.median(a.wall / b.wall for a, b in pairs)
    print(f"{backend:<16}{size:>9}  {title:<16}{wall:>9.3f}{memory:>8.0f}{hand:>10.3f}{hand_memory:>8.0f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
