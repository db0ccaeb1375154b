"""Time and memory of reading back, proving and describing, by the number of source networks and of general rules.

    python tests/bench/bench_proof.py [--networks 100,1000,10000,100000] [--rules 100,1000,5000] [--backend nftables] [--rounds 5]

Every figure is the median of fresh processes, each with a network namespace of its own; needs root for the networks. Memory is the
peak of the whole process, imports and compiler included. Goals (on the machine of docs/design.md): read back, prove and describe
under 0.3 s at 10,000 networks and 2.5 s and 200 MiB at 100,000 on nft, 5,000 general rules under 5 s, and less than 30 ms more for a
small policy's `apply`.

General rules are ClassBench's filter sets where `../shared/corpus` is (seeds acl1, acl3, fw1, ipc1; beyond their thousand each, the
sources of some are combined with the rest of others), and generated ones with heavily overlapping prefixes. One early rule is turned
round, so that there is something to describe.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

from bench_apply import POLICY, carriers

from fwcompiler.ruleset import Chain, Final, Hook, InRanges, Match, PortsIn, ProtocolIs, Rule, Ruleset, Side

CORPUS = Path(os.environ.get("FWC_CORPUS", Path(__file__).resolve().parents[3] / "shared" / "corpus"))
CLASSBENCH = ("acl1_1k", "acl3_1k", "fw1_1k", "ipc1_1k")
Figures = dict[str, float]


class Clock:
    """Names the stretches of a run."""

    def __init__(self) -> None:
        self.figures: Figures = {}
        self._last = _now()

    def lap(self, name: str) -> None:
        """Everything since the last lap."""
        now = _now()
        self.figures[name], self.figures[f"{name} CPU"] = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now

    def done(self) -> Figures:
        """The laps in seconds, and the peak memory in MiB."""
        return {**self.figures, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _now() -> tuple[float, float]:
    """Seconds by the clock, and of processor time, programs that were run included."""
    return time.perf_counter(), sum(os.times()[:4])


def networks(count: int, backend_name: str) -> Figures:
    """One policy with so many carriers, loaded into a scratch kernel: read back, prove, then describe a kernel with one network moved."""
    from fwcompiler.kernel import netns, observe, runner
    from fwcompiler.pipeline import compile_policy, disproof
    from fwcompiler.proof.access import compare
    from fwcompiler.registry import load

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "policy.yaml").write_text(POLICY)
        Path(folder, "carriers.txt").write_text("\n".join(carriers(count)))
        compiled = compile_policy(str(Path(folder, "policy.yaml")))
        backend = load(backend_name)
        with netns.scratch() as scratch, scratch.entered():
            runner.execute(backend.load(compiled.ruleset))
            clock = Clock()
            listed = backend.parse(runner.outputs(backend.listing(big=count > observe.READ_WHOLE)))
            held = replace(listed, sets=tuple(observe.fill_in(backend.set_kind, s, {}) for s in listed.sets))
            clock.lap("read back")
        assert not disproof(compiled, held)
        clock.lap("prove")
        moved = replace(held, sets=tuple(replace(s, ranges=_moved(s.ranges)) if len(s.ranges) > 3 else s for s in held.sets))
        clock.lap("(change)")
        assert disproof(compiled, moved)
        clock.lap("disprove, describe")
        change = compare(held, moved)
        assert len(change.gained) == len(change.lost) == 1
        clock.lap("access diff")
    return clock.done()


def _moved(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return (*ranges[: len(ranges) // 2], *ranges[len(ranges) // 2 + 1 :], (0xC0000000, 0xC000000F))


def general(count: int, seed: str) -> Figures:
    """So many general rules, held against themselves with every third one repeated behind the last, and with one turned round."""
    from fwcompiler.proof.describe import box_text
    from fwcompiler.proof.host import of_host
    from fwcompiler.proof.prove import differ

    rules = list(generated(count) if seed == "generated" else classbench(count, seed))
    first = Ruleset((Chain("input", tuple(rules), Hook("input")),))
    middle = next(i for i in range(len(rules) // 50, len(rules)) if rules[i].verdict is Final.ACCEPT)
    rules[middle] = replace(rules[middle], verdict=Final.DROP)
    second = Ruleset((Chain("input", tuple(rules), Hook("input")),))
    (chain,) = first.chains
    longer = Ruleset((replace(chain, rules=(*chain.rules, *chain.rules[::3])),))
    clock = Clock()
    assert differ(of_host(first, 4), of_host(longer, 4), 4) is None
    clock.lap("prove equal")
    found = differ(of_host(first, 4), of_host(second, 4), 4)
    texts = [box_text(found.space, box) for box in found.boxes] if found else []
    clock.lap("differ, describe")
    return {**clock.done(), "boxes": len(texts)}


def classbench(count: int, seed: str) -> Iterator[Rule]:
    """Rules of one filter set, or of all of them and mixtures; they come without actions, which are drawn."""
    draw = random.Random(seed)
    names = CLASSBENCH if seed == "mixed" else (seed,)
    base = [matches for name in names for matches in map(_read, (CORPUS / "classbench" / "classbench" / name).read_text().splitlines())]
    for i in range(count):
        matches = base[i] if i < len(base) else _mixture(draw.choice(base), draw.choice(base))
        yield Rule(matches, draw.choice((Final.ACCEPT, Final.DROP)))


def _mixture(one: tuple[Match, ...], other: tuple[Match, ...]) -> tuple[Match, ...]:
    def is_source(match: Match) -> bool:
        return isinstance(match, InRanges) and match.side == "source"

    return (*(m for m in one if is_source(m)), *(m for m in other if not is_source(m)))


def _read(line: str) -> tuple[Match, ...]:
    """``@SOURCE DESTINATION SPORT : SPORT DPORT : DPORT PROTOCOL/MASK …``, parted by tabs."""
    source, destination, source_ports, ports, protocol, *_ = line.lstrip("@").split("\t")
    number, mask = (int(part, 16) for part in protocol.split("/"))
    found = [_inside("source", source), _inside("destination", destination)]
    transports = (number,) if mask else (6, 17)
    sides: tuple[tuple[Side, str], ...] = (("source", source_ports), ("destination", ports))
    for side, text in sides:
        low, high = map(int, text.split(":"))
        if (low, high) != (0, 65535):
            found.append(PortsIn(side, transports, ((low, high),)))
    return (*found, *((ProtocolIs(number),) if mask else ()))


def _inside(side: Side, text: str) -> InRanges:
    network = ip_network(text.strip(), strict=False)
    return InRanges(side, 4, ((int(network[0]), int(network[-1])),))


def generated(count: int) -> Iterator[Rule]:
    """Prefixes of 8 to 28 bits out of one /8 on both sides, and port ranges that overlap."""
    draw = random.Random(count)

    def prefix(side: Side) -> InRanges:
        size = 1 << (32 - draw.randint(8, 28))
        low = (0x0A000000 + draw.randrange(1 << 24)) & -size
        return InRanges(side, 4, ((low, low + size - 1),))

    for _ in range(count):
        low = draw.choice((0, 1024, 5060, draw.randrange(60000)))
        ports = PortsIn("destination", (draw.choice((6, 17)),), ((low, min(65535, low + draw.choice((0, 10, 5000)))),))
        yield Rule((prefix("source"), prefix("destination"), ports), draw.choice((Final.ACCEPT, Final.DROP)))


def small_apply() -> Figures:
    """`fwc apply` of ten carriers into an empty namespace, with the proof and without: medians and their difference, in seconds."""
    from bench_apply import fwc, measured, namespace

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "policy.yaml").write_text(POLICY)
        (folder / "carriers.txt").write_text("\n".join(carriers(10)))
        walls: dict[str, list[float]] = {"with": [], "without": []}
        for turn in range(10):
            for kind, options in (("with", ()), ("without", ("--no-proof",))):
                with namespace() as space:
                    state = ("--state-dir", f"state-{kind}-{turn}")
                    run = measured([*fwc(space, "nftables", "apply", "policy.yaml", "--yes"), *state, *options], folder)
                walls[kind].append(run.wall)
    found = {kind: statistics.median(values) for kind, values in walls.items()}
    return {**found, "difference": statistics.median(a - b for a, b in zip(*walls.values(), strict=True)), "MiB": 0.0}


def repeated(rounds: int, *task: str) -> Figures:
    """Medians over fresh processes."""
    runs = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, __file__, "--one", *task], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{task} failed:\n{done.stderr}")
        runs.append(json.loads(done.stdout))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def show(title: str, found: Figures) -> None:
    """One line."""
    names = [name for name in found if name not in ("MiB", "boxes") and not name.startswith("(") and not name.endswith(" CPU")]
    laps = "  ".join(f"{name} {found[name]:.3f}" + (f" ({found[f'{name} CPU']:.2f})" if f"{name} CPU" in found else "") for name in names)
    more = f"  boxes {found['boxes']:.0f}" if "boxes" in found else ""
    print(f"{title:<32}{laps}  {found['MiB']:.0f} MiB{more}" if found["MiB"] else f"{title:<32}{laps}", flush=True)


def main() -> None:
    """Print one line a size, in seconds; in brackets the processor time, which tells more on a busy machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="100,1000,10000,100000")
    parser.add_argument("--rules", default="100,1000,5000")
    parser.add_argument("--backend", default="nftables")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tasks: dict[str, Callable[[int, str], Figures]] = {"networks": networks, "general": general}
        print(json.dumps(tasks[options.one[0]](int(options.one[1]), options.one[2])))
        return
    for count in filter(None, options.networks.split(",")):
        show(f"{count} networks", repeated(options.rounds, "networks", count, options.backend))
    seeds = [*CLASSBENCH, "mixed", "generated"] if (CORPUS / "classbench").is_dir() else ["generated"]
    for count in map(int, filter(None, options.rules.split(","))):
        for seed in seeds:
            if seed in ("mixed", "generated") or count <= 850:
                show(f"{count} rules, {seed}", repeated(options.rounds, "general", str(count), seed))
    show("apply of ten carriers", small_apply())


if __name__ == "__main__":
    main()
