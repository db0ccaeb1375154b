"""Proves that packets for somebody else, containers behind this host for one, are not dropped by our rules before routing.

A policy's clauses speak of packets for this host. Rules at prerouting meet all others too, and there a drop is a drop for
everybody. At an edge, where those are the policy's business, `passing` follows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fwcompiler.foreign import LOCAL
from fwcompiler.proof.compose import Program
from fwcompiler.proof.conditions import outs
from fwcompiler.proof.describe import CounterExample, assumed, box_text, example, kernel_does
from fwcompiler.proof.diagram import ACCEPT, DROP, REJECT
from fwcompiler.proof.host import HostProgram, Stage, for_another_host, stages
from fwcompiler.proof.prove import FAMILIES, differ
from fwcompiler.proof.trace import trace
from fwcompiler.ruleset import Ruleset

_SOMEBODY = {4: 0xC0000201, 6: (0x2001_0DB8 << 96) + 1}
"""Addresses for documentation (RFC 5737, RFC 3849): of another host."""


def touched(ruleset: Ruleset) -> Iterator[CounterExample]:
    """Packets for other hosts that rules before routing drop; nothing: proven for all packets.

    What is redirected there is seen where it arrives.

    Raises:
        StepsExceeded: the ruleset is beyond what can be decided.
    """
    for version in FAMILIES:
        way = tuple(for_another_host(stage) for stage in stages(ruleset, version, ("prerouting",), outs(ruleset)))
        if not any(map(_ends_here, way)):
            continue
        difference = differ(Program({}, ()), HostProgram({}, (), version, way), version)
        for box in difference.boxes if difference else ():
            assert difference is not None
            space, given = difference.space, {**assumed(difference.space, box), LOCAL: False}
            packet = example(space, box)
            packet = replace(packet, destination=_SOMEBODY[version]) if packet.destination is None else packet
            decided = trace(ruleset, packet, "prerouting", given)
            says, does = "accept: they are for another host", kernel_does(box.verdicts[1], decided)
            yield CounterExample(f"{box_text(space, box)}, for another host", packet, says, does, given)


def _ends_here(stage: Stage) -> bool:
    """True where anything at all in a base chain keeps packets from going on."""
    ends = {line.verdict for lines in stage.chains.values() for line in lines if not line.chain}
    return stage.policy != ACCEPT or bool(ends & {DROP, REJECT})
