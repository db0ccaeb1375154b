"""The lab: a policy's own people in a throw-away network, real packets from each of them, compared with the meaning.

`lab_plan` and `lab_edge` decide who is in the network, with which addresses, what is sent, and what has to become of
it. `fwcompiler.kernel` builds the network and sends; what came of it is a :class:`LabResult`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from fwcompiler.addresses import address_text, covers
from fwcompiler.diagnostics import PolicyRejected, Position
from fwcompiler.kernel import labprobe, runner
from fwcompiler.kernel.labnet import Network, network
from fwcompiler.kernel.labprobe import Arrival
from fwcompiler.lab_plan import LabPlan, Trial, plan_lab
from fwcompiler.proof.edge import explain_packet
from fwcompiler.resolved import Resolved

if TYPE_CHECKING:
    from fwcompiler.backend import Backend
    from fwcompiler.pipeline import Compiled
    from fwcompiler.shapes import LabShape, ProbeShape


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one packet, what should have, and why. `place`: the host that got it, where there are several."""

    trial: Trial
    arrival: Arrival | None
    reason: str
    at: Position | None
    place: str = ""

    @property
    def reached(self) -> bool:
        """True where it came in somewhere."""
        return self.arrival is not None

    @property
    def agrees(self) -> bool:
        """True where the kernel did what the policy says: the packet came in where it should, from whom it should."""
        if self.reached != self.trial.expected:
            return False
        return self.trial.fare is None or (self.place == self.trial.fare.place and not self.disguise)

    @property
    def disguise(self) -> str:
        """What is wrong about the address or port that it seemed to come from, or the empty string."""
        fare, seen = self.trial.fare, self.arrival
        if fare is None or seen is None or seen.source < 0:
            return ""
        if (self.trial.version, seen.source) not in fare.sources:
            return f"from {address_text(self.trial.version, seen.source)}"
        own = self.trial.probe.source_port
        wanted = fare.ports or ((own, own) if own else None)
        return f"from port {seen.port}" if wanted and not covers((wanted,), seen.port) else ""

    @property
    def word(self) -> str:
        """What stands in the matrix."""
        if self.arrival is None:
            return "dropped"
        own = self.trial.probe.source_port
        if own:
            return "own port" if self.arrival.port == own else "spare port"
        return self.place or "reached"

    @property
    def wanted(self) -> str:
        """What the policy says, in the same words."""
        fare = self.trial.fare
        if not self.trial.expected or fare is None:
            return "reached" if self.trial.expected else "dropped"
        port = (
            f", from port {fare.ports[0]}-{fare.ports[1]}" if fare.ports else ", from its own port" if self.trial.probe.source_port else ""
        )
        return f"reached {fare.place}{port}"


@dataclass(frozen=True, slots=True)
class LabResult:
    """The lab's matrix, and whether all of it is as the policy says."""

    policy: str
    backend: str
    host: str | None
    plan: LabPlan
    outcomes: tuple[Outcome, ...]
    seconds: float = field(default=0.0, compare=False)

    @property
    def agrees(self) -> bool:
        """True where every packet fared as the policy says."""
        return all(o.agrees for o in self.outcomes)

    def as_json(self) -> LabShape:
        """The shape of `lab --json`."""
        probes = [_probe_json(o) for o in self.outcomes]
        return {"backend": self.backend, "host": self.host, "agrees": self.agrees, "probes": probes, "left_out": list(self.plan.left_out)}


def _probe_json(outcome: Outcome) -> ProbeShape:
    trial, seen = outcome.trial, outcome.arrival
    known = seen is not None and seen.source >= 0
    return {
        "client": trial.client.name,
        "from": address_text(trial.version, trial.packet.source),
        "source_port": trial.probe.source_port or None,
        "to": trial.target.text(trial.version),
        "to_addr": address_text(trial.version, trial.packet.destination) if trial.packet.destination is not None else None,
        "service": trial.target.service if not trial.target.service.startswith("(") else None,
        "reached": outcome.reached,
        "expected": trial.expected,
        "reached_host": outcome.place or None,
        "expected_host": trial.fare.place if trial.fare else None,
        "seen_from": address_text(trial.version, seen.source) if seen and known else None,
        "seen_port": seen.port or None if seen and known else None,
        "agrees": outcome.agrees,
    }


def run_lab(compiled: Compiled, backend: Backend) -> LabResult:
    """Build the network, load the policy's rules there, send, take everything down again.

    Raises:
        PolicyRejected: the backend cannot express something.
        HostRefused: no right to make namespaces, a program is missing, or the kernel refuses.
    """
    from fwcompiler.lab_edge import plan_edge_lab

    started = monotonic()
    refused = backend.refuse(compiled.ruleset)
    if refused:
        raise PolicyRejected(findings=refused)
    runner.require(backend.programs)
    policy = compiled.resolved
    plan = plan_edge_lab(policy) if policy.edge else plan_lab(policy)
    with network(plan.host, plan.stations, plan.router) as net:
        with net.host.entered():
            runner.execute(backend.load(compiled.ruleset))
        outcomes = try_packets(policy, plan, net)
    name = policy.host.name if policy.host else None
    return LabResult(compiled.path, backend.name, name, plan, outcomes, monotonic() - started)


def try_packets(policy: Resolved, plan: LabPlan, net: Network, waits: Sequence[float] = labprobe.WAITS) -> tuple[Outcome, ...]:
    """Send all packets of a plan; the rules are loaded already."""
    responders = [s.options.responder for s in policy.services if s.options.responder]
    reached = labprobe.fire(net, [t.probe for t in plan.trials], waits, responders)
    return tuple(_outcome(policy, plan, trial, r) for trial, r in zip(plan.trials, reached, strict=True))


def _outcome(policy: Resolved, plan: LabPlan, trial: Trial, arrival: Arrival | None) -> Outcome:
    """The full explanation is looked up where it is needed; with big lists it takes its time."""
    place = plan.places[arrival.place] if arrival is not None and plan.places else ""
    found = Outcome(trial, arrival, trial.clause.reason, trial.clause.at, place)
    return found if found.agrees else Outcome(trial, arrival, explain_packet(policy, trial.packet).reason, trial.clause.at, place)


# What is printed.


def lab_text(result: LabResult, *, color: bool = False, width: int = 140) -> str:
    """The matrix, every disagreement in full below it, and the verdict on the whole."""
    red, off = ("\033[31m", "\033[0m") if color else ("", "")
    wrong = [o for o in result.outcomes if not o.agrees]
    behind = set(result.plan.router.stations[_lan(result.plan)]) if result.plan.router else set()
    sides = [[o for o in result.outcomes if (o.trial.probe.station in behind) == side] for side in (False, True)]
    lines = [line for outcomes in sides if outcomes for line in _matrix(outcomes, width)]
    lines += result.plan.left_out
    for o in wrong:
        to, source = o.trial.target.text(o.trial.version), address_text(o.trial.version, o.trial.packet.source)
        got = " ".join(filter(None, ("reached" if o.reached else "dropped", o.place, o.disguise)))
        what = f"{o.trial.client.name} {source} -> {_there(o.trial)}{to}: {got}, but the policy says {o.wanted}: {o.reason}"
        lines.append(f"{red}MISMATCH{off} {what}" + (f" ({o.at})" if o.at else ""))
    count = f"{len(result.outcomes)} packets from {len(result.plan.clients)} clients through {result.backend}"
    verdict = f"{len(wrong)} of them otherwise than the policy says" if wrong else "all as the policy says"
    return "\n".join((*lines, f"{count} in {result.seconds:.1f} s: {verdict}"))


def _lan(plan: LabPlan) -> str:
    assert plan.router
    return list(plan.router.stations)[-1]


def _there(trial: Trial) -> str:
    """The address where there is more than the host's own."""
    return f"{address_text(trial.version, trial.packet.destination)} " if trial.packet.destination is not None else ""


def _matrix(outcomes: Sequence[Outcome], width: int) -> Iterator[str]:
    """One line a client and family, one column a service; several tables where one would be too wide."""
    columns = dict.fromkeys(o.trial.target.column for o in outcomes)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in outcomes:
        who = (outcome.trial.client.name, address_text(outcome.trial.version, outcome.trial.packet.source))
        cells = rows.setdefault(who, {})
        column = outcome.trial.target.column
        cells[column] = _joined(cells.get(column), outcome.word if outcome.agrees else f"{outcome.word.upper()}!")
    left = [max(len(who[i]) for who in [("from", "address"), *rows]) for i in (0, 1)]
    widths = {c: max(len(c), *(len(cells.get(c, "")) for cells in rows.values())) + 2 for c in columns}
    for block in _blocks(widths, width - sum(left) - 4):
        yield _line(("from", "address"), left, block, {c: c for c in block})
        yield from (_line(who, left, block, cells) for who, cells in rows.items())
        yield ""


def _joined(old: str | None, new: str) -> str:
    """One word for all ports of a service, or the hosts that got them; a disagreement at one of them is not hidden by the others."""
    if old is None or new in old.split(", "):
        return old or new
    wrong = next((word for word in (old, new) if word.endswith("!")), "")
    return wrong or ("mixed" if {old, new} & {"dropped", "reached", "mixed"} else f"{old}, {new}")


def _blocks(widths: Mapping[str, int], room: int) -> Iterator[dict[str, int]]:
    """Columns with their widths, as many together as there is room for."""
    block: dict[str, int] = {}
    for name, width in widths.items():
        if block and sum(block.values()) + width > room:
            yield block
            block = {}
        block[name] = width
    yield block


def _line(who: tuple[str, str], left: Sequence[int], block: Mapping[str, int], cells: Mapping[str, str]) -> str:
    start = "  ".join(text.ljust(size) for text, size in zip(who, left, strict=True))
    return f"{start}  {''.join(cells.get(c, '-').ljust(width) for c, width in block.items())}".rstrip()
