"""New connections lost while 55,000 entries of a blacklist are replaced: fwc on every backend, and firewalld where it is installed.

    python tests/bench/bench_continuity.py [--entries 55000] [--every 0.02]

A stranger opens a connection to another port every `--every` seconds, through a veth, before, during and after. Needs root.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from incumbents import DROP_LISTED, firewalld, installed
from livehost import USABLE, Host, live_host, newcomers, policy

from fwcompiler.registry import load

BLOCKED = "block: {from: [bad]}\n"


def networks(count: int, first: int) -> list[str]:
    """Networks that none of the stations is in."""
    return [f"{first + (n >> 15)}.{n >> 7 & 255}.{(n & 127) * 2}.0/24" for n in range(count)]


def measured(host: Host, every: float, replace: Callable[[], None]) -> tuple[int, int, float]:
    """Connections sent, connections lost, and how long the replacement took."""
    with newcomers(host, "stranger", 10000, burst=1, pause=every) as sent:
        time.sleep(0.3)
        start = time.perf_counter()
        replace()
        took = time.perf_counter() - start
        time.sleep(0.3)
    return sent.count, len(sent.lost()), took


def of_fwc(name: str, folder: Path, entries: int, every: float) -> tuple[int, int, float]:
    """One replacement by `fwc apply`."""
    listed = folder / "bad.txt"
    text = policy("one", rest=BLOCKED).replace("groups: {", "groups: {bad: [{file: bad.txt}], ")
    with live_host(load(name), folder) as host:
        listed.write_text("\n".join(networks(entries, 20)), encoding="ascii")
        host.apply(text)
        listed.write_text("\n".join(networks(entries, 60)), encoding="ascii")
        return measured(host, every, lambda: host.apply(text))


def of_firewalld(folder: Path, entries: int, every: float) -> tuple[int, int, float]:
    """One replacement by a reload of firewalld's permanent configuration."""
    own = folder / "firewalld"
    with (
        live_host(load(USABLE[0]), folder) as host,
        host.net.host.entered(),
        firewalld(own, DROP_LISTED, networks(entries, 20)) as daemon,
    ):
        daemon.listed(networks(entries, 60))
        return measured(host, every, lambda: daemon.command("--reload"))


def main() -> None:
    """One line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=55_000)
    parser.add_argument("--every", type=float, default=0.02)
    options = parser.parse_args()
    print(f"{'by':<16}{'seconds':>9}{'sent':>8}{'lost':>8}{'lost s':>9}", flush=True)
    for name in (*USABLE, "firewalld"):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            if name != "firewalld":
                sent, lost, took = of_fwc(name, folder, options.entries, options.every)
            elif installed("firewalld") and installed("dbus-daemon"):
                sent, lost, took = of_firewalld(folder, options.entries, options.every)
            else:
                print("firewalld       is not installed")
                continue
        print(f"{name:<16}{took:>9.2f}{sent:>8}{lost:>8}{lost * options.every:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
