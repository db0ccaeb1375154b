"""What the laws are tried on: addresses that collide, whole policies, and packets that stand at the borders of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import cache
from typing import Any

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fwcompiler.addresses import BITS, LAST, Addresses, Range, address_text, parse_entry, prefix_text
from fwcompiler.catalogue import CATALOGUE
from fwcompiler.diagnostics import Report
from fwcompiler.policy import validate
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.atoms import cut
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.program import Point, Program, sets_of
from fwcompiler.resolve import resolve
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import STATES, Ruleset
from fwcompiler.source import parse_document

LAW = settings(derandomize=True, deadline=None, database=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
"""The same examples every time, in a bounded number."""
DEAR_LAW = settings(LAW, max_examples=75)
"""For what compiles two policies or builds diagrams of two rulesets in every example."""
KERNEL_LAW = settings(LAW, max_examples=6)

HOME = {4: 0x0A000000, 6: 0x20010DB8 << 96}
"""Most addresses are among the 64 after these, so that groups overlap, touch and exclude each other."""


@cache
def values(version: int) -> st.SearchStrategy[int]:
    """Addresses as integers: few that meet often, the ends of the family, and any."""
    near = st.integers(HOME[version], HOME[version] + 63)
    return near | near | st.sampled_from((0, 1, LAST[version] - 1, LAST[version])) | st.integers(0, LAST[version])


@cache
def spans(version: int) -> st.SearchStrategy[Range]:
    """A range of one family."""
    return st.tuples(values(version), values(version)).map(lambda p: (min(p), max(p)))


@cache
def address_sets() -> st.SearchStrategy[Addresses]:
    """A set of both families."""
    return st.builds(Addresses.of, st.lists(spans(4), max_size=5), st.lists(spans(6), max_size=5))


@st.composite
def entries(draw: Callable[..., Any]) -> str:
    """An entry of a group that a policy accepts without a word: near home, in one of the forms people write."""
    version = draw(st.sampled_from((4, 4, 6)))
    low = HOME[version] + draw(st.integers(0, 63))
    form = draw(st.sampled_from(("address", "prefix", "range", "wildcard")))
    if form == "range":
        high = low + draw(st.integers(0, 20))
        return f"{address_text(version, low)}-{address_text(version, high)}"
    if form == "wildcard" and version == 4:
        return f"10.0.{draw(st.integers(0, 3))}.x"
    length = BITS[version] - (draw(st.integers(0, 7)) if form == "prefix" else 0)
    return prefix_text(version, low & -(1 << (BITS[version] - length)), length)


OWN = {
    "own0": ["tcp/5059"],
    "own1": ["tcp/5061"],
    "own2": ["tcp/30000", "udp/30000"],
    "own3": ["tcp/65535"],
    "own4": ["udp/31000-31007", "tcp/31000", "tcp/31002-31003"],
    "own5": ["tcp/1-3", "udp/65534-65535"],
}
OVERRIDES = 40000
"""Services of the catalogue that get other ports get them from here on, ten apart."""
CATALOGUE_NAMES = sorted({*CATALOGUE} - {"sips", "iax2"})
"""`sips` has a port of `OWN`, and `iax2` one of `udptl`."""
GROUPS = ("alpha", "beta", "gamma", "delta")


@st.composite
def documents(draw: Callable[..., Any]) -> dict[str, Any]:
    """A policy as data: groups (dynamic ones among them), services of the catalogue and of one's own, block, trust."""
    names = draw(st.lists(st.sampled_from(GROUPS), min_size=1, max_size=4, unique=True))
    groups: dict[str, Any] = {}
    for name in names:
        members = draw(st.lists(entries(), min_size=1, max_size=4))
        groups[name] = {"members": members, "dynamic": {"timeout": "1h", "max": 64}} if draw(st.integers(0, 3)) == 0 else members
    some = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)
    services: dict[str, Any] = {}
    for number, name in enumerate(draw(st.lists(st.sampled_from(CATALOGUE_NAMES), max_size=5, unique=True))):
        public = CATALOGUE[name].kind == "public"
        services[name] = {"from": "anywhere" if public and draw(st.booleans()) else draw(some)}
        if not public and draw(st.integers(0, 5)) == 0:
            services[name] = {"from": "anywhere", "expose": "on purpose"}
        if name != "vrrp" and draw(st.integers(0, 4)) == 0:
            first = OVERRIDES + 10 * number
            services[name]["ports"] = [f"{CATALOGUE[name].ports[0].protocol}/{first}-{first + draw(st.integers(0, 9))}"]
    for name in draw(st.lists(st.sampled_from(sorted(OWN)), max_size=3, unique=True)):
        services[name] = {"ports": OWN[name], "from": draw(st.just("anywhere") | some), "expose": "on purpose"}
    document: dict[str, Any] = {"version": 1, "groups": groups, "services": services}
    if draw(st.booleans()):
        document["block"] = {"from": draw(some)}
        if draw(st.booleans()):
            document["block"]["except"] = draw(st.just([]) | some)
    if draw(st.booleans()):
        document["trust"] = draw(some)
    draw(options(document))
    if draw(st.integers(0, 2)) == 0:
        document["egress"] = draw(egress(document))
    return document


ASKED_FOR = ("dns", "ntp", "sip", "iax2", "rtp", "udptl", "https", "vrrp", "web", "mail", "icmp", "tcp/8443", "udp/30000-30010")


@st.composite
def egress(draw: Callable[..., Any], document: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries for what a host may send: services of the policy and of the catalogue, ports by number, in every form."""
    names = st.sampled_from((*ASKED_FOR, *document["services"]))
    groups = sorted(document["groups"])
    where = st.sampled_from(("anywhere", *groups)) | st.lists(st.sampled_from(groups), min_size=1, max_size=3, unique=True)
    found: list[dict[str, Any]] = []
    for name in draw(st.lists(names, min_size=1, max_size=5)):
        form: Any = draw(where)
        if draw(st.booleans()):
            form = {"to": form}
            if name not in ("rtp", "udptl", "icmp", "vrrp") and draw(st.booleans()):
                form["ports"] = draw(st.sampled_from((["tcp/8443"], ["udp/5080", "tcp/443"], ["udp/31000-31003"])))
        found.append({name: form})
    return found


@st.composite
def options(draw: Callable[..., Any], document: dict[str, Any]) -> None:
    """Gives some services of a policy what they may say beyond who reaches them.

    Limits are so high that no test's packets reach them.
    """
    cluster = {g for name, s in document["services"].items() for g in s["from"] if name in CATALOGUE and CATALOGUE[name].kind == "cluster"}
    spared = cluster | set(document.get("trust", ()))
    for name, service in document["services"].items():
        protocols = {text.partition("/")[0] for text in service.get("ports", ())} or {p.protocol for p in CATALOGUE[name].ports}
        sources = ["anywhere"] if service["from"] == "anywhere" else [g for g in service["from"] if g not in spared]
        if protocols in ({"tcp"}, {"udp"}) and sources and draw(st.integers(0, 3)) == 0:
            service["limit"] = {draw(st.sampled_from(sources)): "1000/s burst 5000"}
        if name == "rtp" and draw(st.booleans()):
            service["conntrack"] = "bypass"
        if protocols <= {"tcp", "udp"} and draw(st.integers(0, 3)) == 0:
            service["dscp"] = draw(st.sampled_from(("ef", "cs3", 46)))


@st.composite
def reworded(draw: Callable[..., Any], document: dict[str, Any], *, shorter: bool = False) -> dict[str, Any]:
    """The policy in another order, its addresses spelled as ranges; where it may be `shorter`, one group may lack a member."""

    def shuffled(parts: dict[str, Any]) -> dict[str, Any]:
        return {key: parts[key] for key in draw(st.permutations(list(parts)))}

    def spelled(members: list[str]) -> list[str]:
        return [_as_range(text) if draw(st.booleans()) else text for text in draw(st.permutations(members))]

    groups = dict(document["groups"])
    less = draw(st.sampled_from(sorted(groups))) if shorter else ""
    for name, group in groups.items():
        members = spelled(group["members"] if isinstance(group, dict) else group)
        members = members[1:] if name == less and len(members) > 1 else members
        groups[name] = {**group, "members": members} if isinstance(group, dict) else members
    return shuffled({**document, "groups": shuffled(groups), "services": shuffled(document["services"])})


def _as_range(text: str) -> str:
    entry = parse_entry(text)
    return "-".join(address_text(entry.version, each) for each in entry.span)


def resolved(document: dict[str, Any]) -> Resolved:
    """A policy from its data, through text, as a file would give it."""
    report = Report()
    read = parse_document("policy.yaml", yaml.safe_dump(document, sort_keys=False), report)
    assert read is not None
    policy = validate(read, report)
    assert policy is not None, report.findings
    result = resolve(policy, read, report, today=date(2026, 1, 1))
    assert not report.failed, (document, report.findings)
    return result


@st.composite
def packets(draw: Callable[..., Any], policy: Resolved) -> Packet:
    """A packet at or beside a border of the policy: of an address range, of a port range, of a protocol."""
    version = draw(st.sampled_from((4, 6)))
    borders = {b for g in policy.groups.values() for span in g.addresses.family(version) for b in (span[0] - 1, *span, span[1] + 1)}
    loopback = {4: (0x7EFFFFFF, 0x7F000000, 0x7F000001, 0x7FFFFFFF, 0x80000000), 6: (0, 1, 2)}[version]
    source = draw(st.sampled_from(sorted(b for b in borders | set(loopback) if 0 <= b <= LAST[version])) | values(version))
    spans_ = [span for service in policy.services for p in service.ports for span in p.ranges] or [(22, 22)]
    ports = sorted({p for low, high in spans_ for p in (low - 1, low, high, high + 1) if 0 <= p <= 65535})
    protocol = draw(st.sampled_from((6, 6, 6, 17, 17, 17, 1, 58, 112, 47)))
    return Packet(
        version,
        source,
        protocol,
        draw(st.sampled_from(ports) | st.integers(0, 65535)) if protocol in (PROTOCOLS["tcp"], PROTOCOLS["udp"]) else 0,
        destination=draw(st.sampled_from((None, None, *loopback))),
        icmp_type=draw(st.sampled_from((0, 1, 2, 3, 4, 5, 8, 11, 12, 128, 129, 133, 135, 136, 137, 143))),
        interface=draw(st.sampled_from(("eth0", "eth0", "eth0", "lo"))),
        state=draw(st.sampled_from(("new", "new", *STATES))),
    )


def own_ports(policy: Resolved) -> list[int]:
    """Ports at and beside the borders of what a policy's services and entries of `egress` name, at either end."""
    outlets = policy.egress.outlets if policy.egress else ()
    named = [*(p for s in policy.services for p in s.ports), *(p for o in outlets for p in (*o.there, *o.here))]
    spans_ = [span for p in named for span in p.ranges] or [(22, 22)]
    return sorted({p for low, high in (*spans_, (67, 68), (546, 547)) for p in (low - 1, low, high, high + 1) if 0 < p <= 65535})


@st.composite
def sent(draw: Callable[..., Any], policy: Resolved) -> Packet:
    """A packet that the host sends, at or beside a border of the policy at both of its ends."""
    version = draw(st.sampled_from((4, 6)))
    borders = {b for g in policy.groups.values() for span in g.addresses.family(version) for b in (span[0] - 1, *span, span[1] + 1)}
    several = {4: (0xE0000012, 0xE0000016, 0xDFFFFFFF, 0xF0000000), 6: ((0xFF02 << 112) + 0x12, (0xFF02 << 112) + 1)}[version]
    destination = draw(st.sampled_from(sorted(b for b in borders | set(several) if 0 <= b <= LAST[version])) | values(version))
    protocol = draw(st.sampled_from((6, 6, 6, 17, 17, 17, 17, 1, 58, 112, 2, 47)))
    ports = st.sampled_from(own_ports(policy)) | st.integers(1, 65535)
    has_ports = protocol in (PROTOCOLS["tcp"], PROTOCOLS["udp"])
    return Packet(
        version,
        0,
        protocol,
        draw(ports) if has_ports else 0,
        destination,
        draw(ports) if has_ports else 40000,
        draw(st.sampled_from((0, 1, 3, 5, 8, 11, 12, 128, 129, 135, 136, 143))),
        draw(st.sampled_from(("eth0", "eth0", "eth0", "lo"))),
        draw(st.sampled_from(("new", "new", *STATES))),
        leaving=True,
    )


def verdict(ruleset: Ruleset, packet: Packet) -> str:
    """What a ruleset does with one packet."""
    atoms = cut([*sets_of(ruleset), (packet.version, ((packet.source, packet.source),))])
    point = Point(
        packet.protocol,
        packet.port,
        packet.icmp_type,
        packet.state,
        packet.interface,
        None if packet.destination is None else (packet.version, packet.destination),
        packet.source_port,
    )
    outcome = Program(ruleset, atoms).run(point)
    one = atoms.masks[packet.version, ((packet.source, packet.source),)]
    assert not outcome.uncertain & one, "nothing that fwc loads is unknown to fwc"
    return "accept" if outcome.accepts() & one else "drop"


def without_origins(ruleset: Ruleset) -> Ruleset:
    """The ruleset with nothing in it that equality does not look at either."""
    return replace(ruleset, sets=tuple(replace(s, origin=None) for s in ruleset.sets))
