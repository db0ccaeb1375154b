"""The kernel as oracle: random policies, random packets, and nobody may disagree about any of them.

`README.md` beside this file tells how to run it for longer.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import kernelspace
import pytest
from cli.harness import BACKENDS
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from oracle.compare import Bench, Case, bench, read, report
from oracle.machine import InvalidRun, machine
from oracle.mutations import POLICY as WHOLE
from oracle.packets import HOST, member_commands, members, packets, with_members
from oracle.wire import TCP, UDP, Probe, Way
from property.strategies import HOME, documents, resolved

from fwcompiler.backend import Backend, Saved
from fwcompiler.foreign import at_present
from fwcompiler.kernel import runner
from fwcompiler.lower import lower
from fwcompiler.proof.ask import ask
from fwcompiler.proof.meaning import clauses
from fwcompiler.registry import load
from fwcompiler.ruleset import State

PER_POLICY = 320
CLAUSES = {
    "the loopback interface is open",
    "a loopback address may not come from outside",
    "a loopback address may not be reached from outside",
    "the block list has the source",
    "the source is trusted",
    "connection tracking finds the packet invalid",
    "it belongs to an established connection",
    "no service covers it",
    "an ICMPv6 type that a host needs",
    "ping is answered, at a limited rate",
    "SERVICE names the source",
    "SERVICE does not name the source",
    "SERVICE is open to anywhere",
}
"""What every run must have met, besides all states. ICMP errors over IPv4 are missing: they are related or invalid, so
other clauses decide them before."""


POLICY: dict[str, Any] = {
    "version": 1,
    "groups": {"alpha": ["10.0.0.0/28", "2001:db8::/124"]},
    "services": {"ssh": {"from": ["alpha"]}, "rtp": {"from": "anywhere"}},
}


WITH_OPTIONS: dict[str, Any] = {
    **WHOLE,
    "services": {
        **WHOLE["services"],
        "sip": {"from": ["carriers", "agents"], "limit": {"agents": "1000/s burst 5000"}, "dscp": "cs3"},
        "rtp": {"from": "anywhere", "conntrack": "bypass", "dscp": "ef"},
    },
}


@pytest.fixture(autouse=True)
def kernel(kernel_allowed: bool) -> None:
    """Skips where this user may not make network namespaces."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")


@pytest.fixture(params=BACKENDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Two kernels, for each backend."""
    backend = load(request.param)
    runner.require(backend.programs)
    with bench(backend) as made:
        yield made


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """A policy, in an empty kernel or over another policy; now and then with a group so large that it goes another way."""
    document, before = draw(documents()), draw(st.none() | documents())
    number = draw(st.integers(0, 2**32))
    for each in (document, before):
        if each and draw(st.integers(0, 5)) == 0:
            name = next(iter(each["groups"]))
            form = each["groups"][name]
            members = form["members"] if isinstance(form, dict) else form
            members += many(Random(number // 2))
    return Case(document, number, before)


def many(random: Random) -> list[str]:
    """More addresses and prefixes than go into the text of a transaction, of both families."""
    v4 = [
        f"10.{random.randrange(1, 4)}.{random.randrange(256)}.{4 * random.randrange(64)}/{random.choice((30, 31, 32))}" for _ in range(1100)
    ]
    v6 = [f"2001:db8:1:{random.randrange(4096):x}::/{random.choice((64, 65, 126))}" for _ in range(700)]
    return [*v4, *v6]


def test_nobody_disagrees(pair: Bench, pytestconfig: pytest.Config) -> None:
    """Meaning, listing and kernel say the same about every packet of every policy, and the run met all there is to meet."""
    packets, start = int(pytestconfig.getoption("--oracle-packets")), int(pytestconfig.getoption("--oracle-seed"))
    rerun = f"pytest tests/oracle -k '{pair.backend.name}' --oracle-packets {packets} --oracle-seed {start}"
    policies = -(-packets // PER_POLICY)

    @seed(start)
    @settings(max_examples=policies, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    @example(Case(WHOLE, 1))
    @example(Case(WHOLE, 2, POLICY))
    @example(Case(WITH_OPTIONS, 3))
    @example(Case(WHOLE, 4, WITH_OPTIONS))
    def run(case: Case) -> None:
        wrong = pair.try_policy(case, PER_POLICY)
        if wrong:
            pytest.fail(report(case, wrong, rerun))

    run()

    tally = pair.tally
    assert tally.sent >= packets
    assert tally.arrived > 0.7 * tally.sent
    for state in ("new", "established", "related", "invalid", "untracked"):
        assert tally.verdicts[state, "drop"] > 0, state
        assert tally.verdicts[state, "accept"] > 0 or state == "invalid", state
    assert set() == CLAUSES - set(tally.clauses)


def planted(name: str) -> tuple[str, ...]:
    """A rule that opens ssh to everybody, as somebody would type it."""
    if name == "nftables":
        return ("nft", "insert", "rule", "inet", "fwc", "input", "tcp", "dport", "22", "accept")
    return (name, "-I", "FWC-input", "1", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")


@pytest.mark.parametrize("told", [True, False], ids=["listed", "unlisted"])
def test_a_wrong_rule_is_found(pair: Bench, told: bool) -> None:
    """A rule that opens ssh is noticed, by whoever sees it: by the kernel, and by the readings where they read the listing after."""
    policy = resolved(POLICY)
    with pair.loaded(lower(policy)) as held, pair.ruled.space.entered():
        kernelspace.run(planted(pair.backend.name))
        wrong = pair.compare(clauses(policy), read(pair.backend) if told else held, packets(policy, Random(1), 1000))

    assert len(wrong) > 10
    for each in wrong:
        assert (each.packet.protocol, each.packet.port, each.clause.verdict, each.kernel) == (6, 22, "drop", "accept")
        assert (each.traced, each.diagram) == (("accept", "accept") if told else ("drop", "drop"))
    text = report(Case(POLICY, 1), wrong, "this test")
    assert "tcp/22" in text
    assert "10.0.0.0/28" in text
    assert "meaning drop" in text


def test_lost_reports_make_a_run_invalid() -> None:
    """Where the kernel has no room for its reports, silence must not be taken for a drop."""
    probes = packets(with_members(resolved(POLICY), {}), Random(2), 400)
    with machine() as small:
        small._log.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        small._reports = lambda: iter(())  # type: ignore[method-assign]
        small.ask(probes)
        del small._reports

        with pytest.raises(InvalidRun):
            small.ask(probes)


def test_the_kernel_calls_packets_what_they_are() -> None:
    """Connections put into the table beforehand are known, in both directions, and nothing else is."""
    wanted: dict[Way, State] = {
        "alone": "new",
        "original": "established",
        "reply": "established",
        "related": "related",
        "broken": "invalid",
    }
    probes = [
        Probe(version, HOME[version] + number, HOST[version], protocol, 5060, 40000 + number, 0, interface, way)
        for version in (4, 6)
        for protocol in (TCP, UDP)
        for interface in ("eth0", "lo")
        for number, way in enumerate(wanted)
    ]
    with machine() as bare:
        assert bare.ask(probes) == [wanted[p.way] for p in probes]
        assert bare.ask(probes) == [wanted[p.way] for p in probes], "no packet leaves a trace"


LISTINGS = 6
ASKED = 60


def saved(backend: Backend) -> list[Saved]:
    """What an admin would save of this host, in the backend's form."""
    if backend.set_kind == "nft":
        commands: tuple[tuple[str, ...], ...] = (("nft", "-j", "list", "table", "inet", "fwc"),)
    else:
        variant = backend.name.removeprefix("iptables-")
        commands = ((f"iptables-{variant}-save",), (f"ip6tables-{variant}-save",), ("ipset", "save"))
    return [Saved(argv[0], text) for argv in commands if (text := kernelspace.run(argv))]


def test_saved_listings_answer_as_the_kernel_does(pair: Bench) -> None:
    """A listing read as anybody's (`explain --listing`) gives the kernel's verdict, or says `may` where a limit decides."""

    @seed(3)
    @settings(max_examples=LISTINGS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(documents(), st.integers(0, 2**32))
    def run(document: dict[str, Any], number: int) -> None:
        policy, random = resolved(document), Random(number)
        who = members(policy, random)
        probes = packets(with_members(policy, who), random, ASKED)
        with pair.loaded(lower(policy)) as held, pair.ruled.space.entered():
            for argv in member_commands(pair.backend.set_kind, "add", held, who):
                kernelspace.run(argv)
            everybody = at_present(pair.backend.foreign(saved(pair.backend)))
            states, verdicts = pair.bare.ask(probes), pair.ruled.ask(probes)
        for probe, state, through in zip(probes, states, verdicts, strict=True):
            if state is not None:
                answer = ask(everybody, probe.packet(state))
                if answer.verdict == "may":
                    assert all("limit" in what for what in answer.depends), (answer, probe, state)
                else:
                    assert answer.verdict == ("accept" if through else "drop"), (answer, probe, state)

    run()


def test_limits_count_each_source(pair: Bench) -> None:
    """A source over its limit is cut off, one packet early or late; another source of its group, and groups without one, are not."""
    services = {**WHOLE["services"], "sip": {"from": ["carriers", "agents"], "limit": {"agents": "1/h burst 5"}}}
    policy = resolved({**WHOLE, "services": services})
    senders = {
        4: (0xCB007101, 0xCB007102, 0xC6336411),
        6: ((0x20010DB8000A << 80) + 1, (0x20010DB8000A << 80) + 2, (0x20010DB80051 << 80) + 1),
    }
    for version, sources in senders.items():
        with pair.loaded(lower(policy)):
            sent = [pair.ruled.ask([Probe(version, s, HOST[version], UDP, 5060, 40000)] * 12) for s in (*sources, sources[0])]
        through = [sum(state is not None for state in each) for each in sent]

        assert through[0] in (5, 6)
        assert through[0] == through[1]
        assert through[2] == 12
        assert through[3] == 0
        assert sent[0][: through[0]] == ["new"] * through[0], "the first ones get through"
