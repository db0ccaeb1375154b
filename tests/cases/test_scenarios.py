"""Whole-program scenarios: every file in this folder, from the policy's text to what a kernel lists and decides.

README.md describes the files. Expectations are rewritten by `pytest tests/cases --update-cases`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import pytest
from cases.canonical import canonical
from cases.loader import BACKENDS, Case, PacketCase, all_cases, all_rejected, load_case, update_case
from kernelspace import Space, namespace, run
from oracle.machine import machine
from oracle.through import edge_layout, kernel_fate, known_flow
from oracle.wire import Probe, Way

from fwcompiler import cli
from fwcompiler.addresses import Addresses, address_text, parse_address
from fwcompiler.backend import Backend
from fwcompiler.catalogue import CATALOGUE
from fwcompiler.diagnostics import CODES, UsageError
from fwcompiler.kernel import runner
from fwcompiler.pipeline import Compiled, compile_policy
from fwcompiler.proof.atoms import cut
from fwcompiler.proof.edge import explain_packet, follow
from fwcompiler.proof.fields import Packet
from fwcompiler.proof.program import Point, Program, sets_of
from fwcompiler.proof.trace import trace, trace_through
from fwcompiler.registry import load
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import BUILT_IN, AddressSet, Ruleset, State

CASES = all_cases()
SMALL_SET = 40
"""Entries up to which sets are listed with their content."""
LONG = 400
"""Lines from which a text is kept as a fingerprint."""
SAME = "as kernel iptables-nft\n"
"""Stands for the listing of iptables-legacy where it is the same."""
WRITTEN_WITH = {"nft": "v1.0.6", "iptables-nft": "v1.8.9", "iptables-legacy": "v1.8.9"}
"""Programs whose listings the cases hold. Others print the same rules in other words, so there only the rules are compared."""

ONLY_ON_HOSTS = {
    "kernel": "a refusal by the kernel; fwc renders nothing that a kernel refuses, so only a host's own state can cause it",
    "list-shrink": "compares with what was applied before",
    "lock-out": "about who is logged in on the host",
}
"""Codes of `diagnostics.CODES` that no policy file alone can trigger, with the reason."""


@lru_cache
def _backend(name: str) -> Backend | None:
    """The backend where it can be loaded and its programs are here, else None."""
    try:
        backend = load(name)
    except UsageError:
        return None
    return backend if all(runner.find(program) for program in backend.programs) else None


@pytest.fixture
def backend(request: pytest.FixtureRequest, kernel_allowed: bool) -> Backend:
    """A backend by its name; skips where it cannot be used here."""
    found = _backend(request.param)
    if found is None:
        pytest.skip(f"the backend {request.param} cannot be used here")
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    return found


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case with its files written out; the working directory is where they are, as an operator's would be."""
    found = load_case(request.param)
    folder = tmp_path / "case"
    folder.mkdir()
    found.write_inputs(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FWC_STATE_DIR", str(tmp_path / "state"))
    return found


every_case = pytest.mark.parametrize("case", CASES, indirect=True, ids=lambda path: path.stem)
every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def _compare(case: Case, found: Mapping[str, str], update: bool) -> None:
    """Hold what was found against the sections of the case, or write it there."""
    found = dict(_shortened(found))
    if update:
        update_case(case.path, found)
        return
    missing = [name for name in found if name not in case.sections]
    assert not missing, (
        f"{case.path.name} has no section {', '.join(missing)}: run pytest tests/cases --update-cases, then read what it wrote"
    )
    for name, text in found.items():
        assert text.splitlines() == case.sections[name].splitlines(), f"section `{name}` of {case.path.name}"


def _shortened(found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, text in found.items():
        lines = text.count("\n")
        if lines > LONG:
            yield f"{name} sha256", f"{hashlib.sha256(text.encode()).hexdigest()} of {lines} lines\n"
        else:
            yield name, text


@every_case
def test_policy_is_understood(case: Case, update_cases: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy compiles to the expected neutral rules, with the expected warnings and no others."""
    arguments = [] if _backend("nftables") else ["--backend", "iptables-nft"]
    assert cli.run([*arguments, *_host(case), "check", "policy.yaml"]) == 0, capsys.readouterr().err
    warnings = capsys.readouterr().err

    _compare(case, {"canonical": canonical(compile_policy("policy.yaml", host=case.host)), "warnings": warnings}, update_cases)


@every_case
def test_packets_are_explained(case: Case) -> None:
    """Each packet of a case meets the verdict and the service that the case names, in the policy's own meaning."""
    assert case.packets, f"{case.path.name} names no packets"
    compiled = compile_policy("policy.yaml", host=case.host)
    expected, found = [], []
    for each in case.packets:
        policy = _with_members(compiled.resolved, case) if each.members else compiled.resolved
        explanation = explain_packet(policy, _packet(each))
        to = follow(policy, policy.edge, _packet(each)).host if policy.edge and not each.leaving and explanation.verdict == "accept" else ""
        nobodys = each.label in (("trust", "egress", "uncounted") if each.leaving else BUILT_IN)
        expected.append(f"{each.text}: {each.verdict} {None if nobodys else each.label} {each.host}")
        found.append(f"{each.text}: {explanation.verdict} {(explanation.service or 'None').replace('/', '-')} {to}")

    assert expected == found


@every_case
@every_backend
def test_kernel_takes_it(case: Case, backend: Backend, update_cases: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """What `compile` prints is loaded by the backend's own tools and listed by the kernel as the case says.

    What `apply` would do instead of them gives the same listing, and in it every packet of the case meets its verdict.
    """
    files = _compiled_files(case, backend, capsys)
    compiled = compile_policy("policy.yaml", host=case.host)
    small = all(len(s.ranges) <= SMALL_SET for s in compiled.ruleset.sets)
    with namespace() as by_hand:
        with by_hand.entered():
            _load_files(backend, files)
        nat = "*nat\n" in files.get("fwc.v4", "")
        listing = _listing(backend, by_hand, small, nat=nat)
    with namespace() as by_fwc:
        with by_fwc.entered():
            runner.execute(backend.load(compiled.ruleset))
        assert listing == _listing(backend, by_fwc, small, nat=nat)
        _decide(case, backend, by_fwc, compiled.resolved)
    if compiled.resolved.edge:
        _send(case, backend, compiled)

    found = dict(files)
    if _prints_as_written(backend):
        same = backend.name == "iptables-legacy" and listing.splitlines() == case.sections.get("kernel iptables-nft", "").splitlines()
        found[f"kernel {backend.name}"] = SAME if same else listing
    _compare(case, found, update_cases)


def _host(case: Case) -> list[str]:
    return ["--host", case.host] if case.host else []


@lru_cache
def _version(program: str) -> str:
    return run((program, "--version"))


def _prints_as_written(backend: Backend) -> bool:
    """True with the versions of the tools that wrote the listings in the cases."""
    program = "nft" if backend.name == "nftables" else backend.name
    return WRITTEN_WITH.get(program, "") in _version(program).split()


def _compiled_files(case: Case, backend: Backend, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `compile` writes; twice, because the same input gives the same bytes."""
    texts: list[dict[str, str]] = []
    for folder in (Path("one"), Path("two")):
        assert cli.run(["compile", "policy.yaml", *_host(case), "--backend", backend.name, "-o", str(folder)]) == 0, capsys.readouterr().err
        texts.append({path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("fwc.*"))})
    assert texts[0] == texts[1]
    return texts[0]


def _load_files(backend: Backend, files: Mapping[str, str]) -> None:
    """Load rendered files as an operator would by hand."""
    if backend.name == "nftables":
        run(("nft", "-f", "-"), files["fwc.nft"])
        return
    variant = backend.name.removeprefix("iptables-")
    if files["fwc.ipset"]:
        run(("ipset", "restore"), files["fwc.ipset"])
    for program, name in (("iptables", "fwc.v4"), ("ip6tables", "fwc.v6")):
        run((f"{program}-{variant}-restore", "--noflush"), files[name])


_BY_NAME = re.compile(r"(l4proto|-p) vrrp\b")
"""A name that the tools take from /etc/protocols, where the host has it."""
_COUNTER = re.compile(r"(\tcounter \S+) \{\n\t\tpackets \d+ bytes \d+\n\t\}\n\n?")


def _listing(backend: Backend, space: Space, small: bool, *, nat: bool) -> str:
    """What the kernel lists, without counters and dates; sets sorted."""
    return _BY_NAME.sub(r"\1 112", _raw_listing(backend, space, small, nat))


def _raw_listing(backend: Backend, space: Space, small: bool, nat: bool) -> str:
    if backend.name == "nftables":
        return _COUNTER.sub(r"\1\n", space.run("nft", *(() if small else ("-t",)), "list", "table", "inet", "fwc"))
    variant = backend.name.removeprefix("iptables-")
    tables = ("filter", "nat") if nat else ("filter",)
    saves = [
        f"# {p}\n" + "".join(_plain(space.run(f"{p}-{variant}-save", "-t", t)) for t in tables if (p, t) != ("ip6tables", "nat"))
        for p in ("iptables", "ip6tables")
    ]
    sets = sorted(space.run("ipset", "save").splitlines(keepends=True))
    return "".join((*saves, "# ipset\n", *map(_plain_set, sets)))


def _plain(save: str) -> str:
    lines = (line for line in save.splitlines(keepends=True) if not line.startswith("#"))
    return "".join(re.sub(r"^(:.*) \[\d+:\d+\]$", r"\1", line) for line in lines)


def _plain_set(line: str) -> str:
    """Newer kernels print a random `initval` and the default `bucketsize`."""
    return re.sub(r" (?:bucketsize \d+|initval 0x[0-9a-f]+)", "", line)


def _decide(case: Case, backend: Backend, space: Space, policy: Resolved) -> None:
    """Every packet, run through the rules that the kernel lists.

    One with a loopback address that should not be there may be dropped before its turn, as blocked or as a stranger; one from a
    blocked source as a stranger to a service, or as invalid. Whatever drops it first counts it.
    """
    expected, found = [], []
    for with_members in (False, True):
        packets = [p for p in case.packets if p.members == with_members]
        if not packets:
            continue
        with space.entered():
            if with_members:
                _add_members(case, backend)
            ruleset = _observed(backend)
        expected += [f"{each.text}: {each.verdict} {each.label}" for each in packets]
        for each in packets:
            verdict = _verdict_at(_with_members(policy, case) if with_members else policy, ruleset, each) or _verdict(ruleset, each)
            early = each.label in ("loopback", "block") and verdict.startswith("drop ")
            found.append(f"{each.text}: {f'drop {each.label}' if early else verdict}")
    assert expected == found


def _verdict_at(policy: Resolved, ruleset: Ruleset, each: PacketCase) -> str:
    """`accept sip` for a packet that an edge sends on, as the listed rules do; the empty string where it is for the host itself. So it says
    of a packet that the host sends.

    Of what nothing of ours decides the label is `other`, but from lan to lan, where a service needs no rule to pass.
    """
    if each.leaving:
        decided = trace(ruleset, _packet(each), "output")
        return f"{decided.verdict} {decided.service.removeprefix('egress.') or 'uncounted'}"
    passed = follow(policy, policy.edge, _packet(each)) if policy.edge else None
    if passed is None or not passed.leaves:
        return ""
    arriving = passed.packet if each.state != "new" else replace(passed.packet, destination=_own(policy, each))
    decision = trace_through(ruleset, arriving, passed.leaves)
    if passed.sent and each.state == "new":
        assert decision.to == passed.packet.destination, each.text
    return f"{decision.verdict} {decision.service or (each.label if passed.leaves == each.interface else 'other')}"


def _own(policy: Resolved, each: PacketCase) -> int:
    """Where a packet is addressed to: without a word of it, to the edge's first address."""
    assert policy.edge
    return policy.edge.addresses.family(each.version)[0][0] if each.destination is None else each.destination


WAYS: dict[str, Way] = {"new": "alone", "established": "original", "related": "related", "invalid": "broken"}


def _send(case: Case, backend: Backend, compiled: Compiled) -> None:
    """Every packet for real, through a kernel that routes as the edge does: where it comes out, and for whom."""
    policy = compiled.resolved
    assert policy.edge
    assert policy.host
    behind = {f.host.name: f.host for f in (*policy.edge.forwards, *policy.edge.guarded)}
    layout = edge_layout(policy.edge, policy.host.addresses, [pair for host in behind.values() for pair in host.addresses])
    expected, found = [], []
    with machine(layout) as kernel:
        with kernel.space.entered():
            runner.execute(backend.load(compiled.ruleset))
        for with_members in (False, True):
            packets = [p for p in case.packets if p.members == with_members and not p.leaving]
            if packets and with_members:
                with kernel.space.entered():
                    _add_members(case, backend)
            for each in packets:
                to = _own(policy, each)
                number = 40000 + len(expected)
                way = WAYS[each.state]
                probe = Probe(each.version, each.source, to, each.protocol, each.port, number, each.icmp_type, each.interface, way)
                flow = known_flow(policy.edge, probe)
                fate = kernel_fate(kernel.reports([probe], [flow] if flow else [])[0])
                names = (n for n, h in behind.items() if (each.version, fate.to) in h.addresses)
                found.append(f"{each.text}: {fate.verdict} {next(names, '')}")
                expected.append(f"{each.text}: {each.verdict} {each.host}")
    assert expected == found


def _kernel_name(backend: Backend, each: AddressSet) -> str:
    """The name in the kernel; a backend may have its own naming."""
    own = getattr(backend, "set_name", None)
    return str(own(each)) if own else each.kernel_name


def _observed(backend: Backend) -> Ruleset:
    """The parsed listing, static sets with the content that the kernel holds, dynamic ones with their members."""
    listed = backend.parse(runner.outputs(backend.listing()))
    assert not listed.others
    return replace(listed, sets=tuple(replace(each, ranges=_content(backend, each)) for each in listed.sets))


def _content(backend: Backend, each: AddressSet) -> tuple[tuple[int, int], ...]:
    name = _kernel_name(backend, each)
    if each.dynamic:
        return tuple(sorted((address, address) for address, _ in runner.read_members(backend.set_kind, name, each.version)))
    return runner.read_set(backend.set_kind, name, each.version)


def _add_members(case: Case, backend: Backend) -> None:
    sets = {each.name: each for each in backend.parse(runner.outputs(backend.listing())).sets}
    for group, text in case.members:
        name = _kernel_name(backend, sets[f"{group}.dynamic.v{parse_address(text)[0]}"])
        if backend.set_kind == "nft":
            run(("nft", "add", "element", "inet", "fwc", name, f"{{ {text} }}"))
        else:
            run(("ipset", "add", name, text))


def _with_members(policy: Resolved, case: Case) -> Resolved:
    """The policy as if the members stood in their groups."""
    groups = dict(policy.groups)
    for group, text in case.members:
        version, address = parse_address(text)
        span = [(address, address)]
        added = Addresses.of(span if version == 4 else (), span if version == 6 else ())
        groups[group] = replace(groups[group], addresses=groups[group].addresses | added)
    return replace(policy, groups=groups)


def _packet(each: PacketCase) -> Packet:
    return Packet(
        each.version,
        each.source,
        each.protocol,
        each.port,
        each.destination,
        icmp_type=each.icmp_type,
        interface=each.interface,
        state=cast(State, each.state),
        source_port=each.source_port,
        leaving=each.leaving,
    )


def _verdict(ruleset: Ruleset, each: PacketCase) -> str:
    """`accept sip`: what the listed rules do with a packet, by the label of the rule that decides."""
    source = (each.version, ((each.source, each.source),))
    atoms = cut([*sets_of(ruleset), source])
    destination = None if each.destination is None else (each.version, each.destination)
    point = Point(each.protocol, each.port, each.icmp_type, cast(State, each.state), each.interface, destination)
    outcome, mask = Program(ruleset, atoms).run(point), atoms.masks[source]
    assert not outcome.uncertain & mask, address_text(each.version, each.source)
    words = [f"accept {label}" for label, m in outcome.accepted.items() if m & mask]
    return ", ".join(words or [f"drop {label}" for label, m in outcome.dropped.items() if m & mask])


def test_every_case_is_complete() -> None:
    """Every scenario has packets and the expectations of all backends; none waits for its first `--update-cases`."""
    wanted = {"canonical", "warnings", "fwc.nft", "fwc.ipset", "fwc.v4", "fwc.v6", *(f"kernel {name}" for name in BACKENDS)}
    incomplete = {}
    for path in CASES:
        case = load_case(path)
        missing = wanted - {name.removesuffix(" sha256") for name in case.sections}
        if missing or not case.packets:
            incomplete[path.name] = sorted(missing) or ["packets"]

    assert incomplete == {}


def test_every_service_of_the_catalogue_has_a_packet() -> None:
    """Each catalogue service lets a packet in somewhere among the cases, and each that is not public keeps one out."""
    labels = {(p.verdict, p.label) for path in CASES for p in load_case(path).packets}
    wanted = {("accept", name) for name in CATALOGUE} | {("drop", name) for name, s in CATALOGUE.items() if s.kind != "public"}

    assert set() == wanted - labels


def test_every_code_is_exercised() -> None:
    """Each code of `diagnostics.CODES` shows in some case, but for those that only a host can cause."""
    text = "".join(load_case(path).sections.get(name, "") for path in (*CASES, *all_rejected()) for name in ("stderr", "warnings"))
    shown = set(re.findall(r"^(?:\S+: )?(?:error|warning)\[([a-z0-9-]+)\]", text, re.M))

    assert set(CODES) == shown | set(ONLY_ON_HOSTS)
    assert not shown & set(ONLY_ON_HOSTS)


def test_the_machine_is_left_alone() -> None:
    """The tests make their rules in namespaces of their own: this process is still in the one of the process that started it."""
    assert Path(f"/proc/{os.getppid()}/ns/net").readlink() == Path("/proc/thread-self/ns/net").readlink()
