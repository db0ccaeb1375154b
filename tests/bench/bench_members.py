"""Wall time of `fwc allow` beside `nft add element` (or `ipset add`), with few and with many carriers loaded.

    python tests/bench/bench_members.py [--sizes 10,100000] [--backends nftables,iptables-nft,iptables-legacy] [--rounds 7]

Every figure is a whole process, the median of its rounds, in a network namespace of its own; the two take turns. Needs root.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FWC = Path(sys.executable).with_name("fwc")
NETNS = "fwcbench-members"
POLICY = """\
version: 1
groups:
  carriers: [{file: carriers.txt}]
  agents: {members: [203.0.113.0/24], dynamic: {timeout: 12h}}
  admins: [192.0.2.10]
services:
  sip: {from: [carriers, agents]}
  rtp: {from: anywhere}
  ssh: {from: [admins]}
"""


def timed(*argv: str) -> float:
    """Seconds that a program takes."""
    started = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True)
    return time.perf_counter() - started


def by_hand(backend: str, address: str) -> tuple[str, ...]:
    """What an admin would type."""
    inside = ("ip", "netns", "exec", NETNS)
    if backend == "nftables":
        return (*inside, "nft", "add", "element", "inet", "fwc", "agents.dynamic.v4", f"{{ {address} timeout 1h }}")
    return (*inside, "ipset", "add", "fwc-agents~4", address, "timeout", "3600")


def measure(backend: str, size: int, rounds: int) -> None:
    """Print one line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.joinpath("policy.yaml").write_text(POLICY, encoding="ascii")
        networks = (f"{20 + (n >> 15)}.{n >> 7 & 255}.{(n & 127) * 2}.0/24" for n in range(size))
        folder.joinpath("carriers.txt").write_text("\n".join(networks), encoding="ascii")
        common = (str(FWC), "--netns", NETNS, "--state-dir", str(folder / "state"), "--backend", backend)
        subprocess.run(("ip", "netns", "add", NETNS), check=True)
        try:
            timed(*common, "apply", str(folder / "policy.yaml"), "--yes", "-q")
            pairs = [
                (timed(*common, "allow", "agents", f"198.18.1.{n}"), timed(*by_hand(backend, f"198.18.2.{n}")))
                for n in range(1, rounds + 1)
            ]
        finally:
            subprocess.run(("ip", "netns", "delete", NETNS), check=True)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{backend:16} {size:7} carriers: allow {ours:.3f} s, by hand {theirs:.3f} s")


def main() -> None:
    """Measure every backend at every size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="10,100000")
    parser.add_argument("--backends", default="nftables,iptables-nft,iptables-legacy")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for backend in options.backends.split(","):
        for size in options.sizes.split(","):
            measure(backend, int(size), options.rounds)


if __name__ == "__main__":
    main()
