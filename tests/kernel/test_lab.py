"""The lab: its choice of clients and packets (pure), and its verdicts on right and on wrong rules (in namespaces)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fwcompiler.addresses import Addresses, Range, parse_address, parse_entry
from fwcompiler.backend import Step
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import runner
from fwcompiler.kernel.labnet import Network, network
from fwcompiler.lab import lab_text, run_lab, try_packets
from fwcompiler.lab_plan import HOST_POOL, LabPlan, pick, plan_lab
from fwcompiler.pipeline import Compiled, compile_policy
from fwcompiler.registry import installed, load
from fwcompiler.ruleset import Chain, Final, InSet, Rule, Ruleset

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "dialer.yaml"
USABLE = [name for name in installed() if all(runner.find(p) for p in load(name).programs)]
FWC = (sys.executable, "-c", "import sys; from fwcompiler.cli import main; sys.exit(main())")

on_every_backend = pytest.mark.parametrize("backend", USABLE)


@pytest.fixture(scope="module")
def example() -> Compiled:
    """The shipped example, compiled."""
    return compile_policy(str(EXAMPLE))


@pytest.fixture
def kernel(kernel_allowed: bool) -> None:
    """Skips where this user may not make network namespaces."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")


def compiled(folder: Path, text: str) -> Compiled:
    """A policy from its text."""
    path = folder / "policy.yaml"
    path.write_text(f"version: 1\n{text}", encoding="utf-8")
    return compile_policy(str(path))


def plan(folder: Path, text: str) -> LabPlan:
    """The lab's plan for a policy."""
    return plan_lab(compiled(folder, text).resolved)


def addresses(*texts: str) -> Addresses:
    """A set of addresses from their texts."""
    spans: dict[int, list[Range]] = {4: [], 6: []}
    for text in texts:
        entry = parse_entry(text, ("everyone", "loopback", "multicast"))
        spans[entry.version].append(entry.span)
    return Addresses.of(spans[4], spans[6])


class TestPick:
    """Which address of a group stands for it."""

    @pytest.mark.parametrize(
        ("group", "expected"),
        [
            ("198.51.100.16/28", "198.51.100.17"),
            ("198.51.100.7", "198.51.100.7"),
            ("198.51.100.6/31", "198.51.100.6"),
            ("192.0.2.250-192.0.2.252", "192.0.2.250"),
            ("0.0.0.0/1", "1.0.0.1"),
            ("0.0.0.0/0", "1.0.0.1"),
            ("2001:db8::/32", "2001:db8::1"),
            ("::/1", "::1:0:1"),
            ("2001:db8::5", "2001:db8::5"),
        ],
    )
    def test_one_that_a_station_can_have(self, group: str, expected: str) -> None:
        """Not the one that names a network, no loopback, multicast or unspecified address, whatever the group covers."""
        version, value = parse_address(expected)

        assert value == pick(addresses(group), version)

    @pytest.mark.parametrize("group", ["127.0.0.0/8", "224.0.0.0/4", "fe80::/10", "ff00::/8", "::1"])
    def test_none_where_no_station_can_have_one(self, group: str) -> None:
        """Loopback, link-local and multicast addresses send no packets over a wire of the lab."""
        assert [pick(addresses(group), v) for v in (4, 6)] == [None, None]

    def test_another_one_where_it_is_taken(self) -> None:
        """A taken address is passed over, down to the network's own address when nothing else is left."""
        group = addresses("192.0.2.0/30")
        base = parse_address("192.0.2.0")[1]

        assert base + 2 == pick(group, 4, {base + 1})
        assert base == pick(group, 4, {base + 1, base + 2, base + 3})
        assert pick(group, 4, range(base, base + 4)) is None


class TestPlan:
    """Who is in the lab and what is sent; no kernel is asked."""

    def test_example(self, example: Compiled) -> None:
        """Every group that a service names, a stranger, a blocked source, and a carrier that is on the block list."""
        planned = plan_lab(example.resolved)

        assert [c.name for c in planned.clients] == ["carriers", "agents", "cluster", "admins", "internet", "blocked", "blocked carriers"]
        assert [tuple(c.addresses) for c in planned.clients] == [(4, 6)] * 6 + [(4,)]
        assert planned.left_out == ()

    def test_first_and_last_port(self, example: Compiled) -> None:
        """Both ends of a range are tried, one uncovered port of each protocol, and a ping."""
        tried = [t.text(4) for t in plan_lab(example.resolved).targets]

        assert tried[:3] == ["udp/5060", "udp/10000", "udp/20000"]
        assert tried[-3:] == ["tcp/9", "udp/9", "icmp"]

    def test_role_without_overlap(self, tmp_path: Path) -> None:
        """An address that only its group has stands for it where there is one, not one that others share or block."""
        policy = (
            "groups: {agents: [203.0.113.0/24], admins: [203.0.113.0/25], bad: [203.0.113.128/26]}\n"
            "block: {from: [bad], except: []}\nservices: {sip: {from: [agents]}, ssh: {from: [admins]}}\n"
        )
        found = {c.name: c.addresses.get(4) for c in plan(tmp_path, policy).clients}

        assert parse_address("203.0.113.193")[1] == found["agents"]
        assert parse_address("203.0.113.129")[1] == found["blocked"]

    def test_shared_address(self, tmp_path: Path) -> None:
        """Two groups with one and the same address are two clients at one station."""
        planned = plan(tmp_path, "groups: {a: [192.0.2.1], b: [192.0.2.1]}\nservices: {sip: {from: [a]}, wss: {from: [b]}}\n")
        stations = {t.client.name: t.probe.station for t in planned.trials if t.version == 4}

        assert stations["a"] == stations["b"] != stations["internet"]
        assert len(planned.stations) == 2

    def test_host_address_gives_way(self, tmp_path: Path) -> None:
        """The host's own address is never a client's, even where a group has all of the lab's pool."""
        pool = ", ".join(f'"{text}"' for text in HOST_POOL.texts())
        planned = plan(tmp_path, f"groups: {{a: [{pool}], b: [198.18.0.2]}}\nservices: {{sip: {{from: [a, b]}}}}\n")
        taken = {(v, a) for c in planned.clients for v, a in c.addresses.items()}

        assert not taken & set(planned.host.items())

    def test_nobody_to_stand_for_a_group(self, tmp_path: Path) -> None:
        """A group with dynamic members only cannot be tried, and the lab says so."""
        planned = plan(tmp_path, "groups: {agents: {dynamic: {timeout: 12h}}}\nservices: {sip: {from: [agents]}}\n")

        assert [c.name for c in planned.clients] == ["internet"]
        assert planned.left_out == ("agents has dynamic members only: nobody stands for it",)

    def test_no_stranger(self, tmp_path: Path) -> None:
        """Where a group is everyone, there is no stranger; a family without an address has no rows."""
        policy = "groups: {all: [{address: 0.0.0.0/0, allow: [everyone]}]}\nservices: {sip: {from: [all]}}\n"
        planned = plan(tmp_path, policy)

        assert [(c.name, tuple(c.addresses)) for c in planned.clients] == [("all", (4,)), ("internet", (6,))]

    def test_protocols_without_ports(self, tmp_path: Path) -> None:
        """VRRP is tried as itself, a ping as ICMP or ICMPv6, both over both families."""
        tried = {
            (t.target.service, t.probe.protocol)
            for t in plan(tmp_path, "groups: {a: [192.0.2.1, '2001:db8::1']}\nservices: {vrrp: {from: [a]}}\n").trials
        }

        assert {("vrrp", "vrrp"), ("(ping)", "icmp"), ("(ping)", "icmpv6")} <= tried

    def test_several_block_groups(self, tmp_path: Path) -> None:
        """Each blocked group has a row of its own."""
        policy = "groups: {a: [192.0.2.1], b: [192.0.2.2], c: [192.0.2.3]}\nblock: {from: [a, b]}\nservices: {sip: {from: [c]}}\n"

        assert [c.name for c in plan(tmp_path, policy).clients] == ["c", "internet", "blocked by a", "blocked by b"]


def without(ruleset: Ruleset, chain: str, index: int, rule: Rule | None) -> Ruleset:
    """The ruleset with one rule of a chain replaced or taken out."""

    def changed(each: Chain) -> Chain:
        return replace(each, rules=(*each.rules[:index], *((rule,) if rule else ()), *each.rules[index + 1 :]))

    return replace(ruleset, chains=tuple(changed(c) if c.name == chain else c for c in ruleset.chains))


@pytest.mark.usefixtures("kernel")
class TestRun:
    """The whole lab."""

    @on_every_backend
    def test_example_agrees(self, backend: str, example: Compiled) -> None:
        """The shipped example does what it says on every backend, IPv4 and IPv6, and the matrix tells it."""
        result = run_lab(example, load(backend))
        text = lab_text(result)

        assert result.agrees, text
        assert not [p for p in result.as_json()["probes"] if p["reached"] != p["expected"]]
        rows = {tuple(line.split()[:2]): line.split()[2:] for line in text.splitlines() if line}
        services = ["sip", "rtp", "http", "https", "wss", "ssh", "ami", "exporter", "(no", "service)", "(ping)"]
        open_to_anywhere = {"rtp", "http", "https", "(ping)"}
        assert rows["from", "address"] == services
        words = ["reached" if name in open_to_anywhere else "dropped" for name in services if name != "service)"]
        assert rows["internet", "192.0.2.1"] == words
        assert rows["blocked", "2001:db8:bad::1"] == ["dropped"] * 10
        assert text.endswith("all as the policy says")
        assert "\033" not in text

    @on_every_backend
    def test_open_to_all_by_mistake(self, backend: str, example: Compiled) -> None:
        """Rules that lost their source match let in everybody of both families: each of them is named loudly."""
        wrong = example.ruleset
        for chain in ("service.sip", "early.sip"):
            wrong = without(wrong, chain, 0, Rule((), Final.ACCEPT, "sip"))
        result = run_lab(replace(example, ruleset=wrong), load(backend))

        assert not result.agrees
        wrong_ones = {(o.trial.client.name, o.trial.target.service, o.reached) for o in result.outcomes if not o.agrees}
        assert {("admins", "sip", True), ("internet", "sip", True), ("blocked", "sip", True)} == wrong_ones
        text = lab_text(result)
        assert "MISMATCH internet 192.0.2.1 -> udp/5060: reached, but the policy says dropped: sip does not name the source" in text
        assert "MISMATCH internet 2001:db8::1 -> udp/5060: reached" in text
        assert "REACHED!" in text
        assert text.endswith("5 of them otherwise than the policy says")

    def test_every_rule_matters(self, example: Compiled) -> None:
        """Each accept taken out of a service, and each drop of the block list, is noticed: no row is green by itself.

        What chain `early` drops, `input` would drop as well, and the other way round: so each is tried without the other.
        """
        planned = plan_lab(example.resolved)
        unnoticed, tried = [], 0
        with network(planned.host, planned.stations) as net:
            for chain in (c for c in example.ruleset.chains if c.name != "early"):
                label = chain.name.removeprefix("early.")
                for index, rule in enumerate(chain.rules):
                    if not any(isinstance(m, InSet) and ".dynamic." not in m.set for m in rule.matches):
                        continue
                    tried += 1
                    concerned = tuple(
                        t for t in planned.trials if t.version == rule.version and (rule.service or label) in (t.target.service, "block")
                    )
                    wrong = without(example.ruleset, chain.name, index, None)
                    if rule.service == "block" and chain.name == "input":
                        wrong = replace(wrong, chains=tuple(c for c in wrong.chains if not c.name.startswith("early")))
                    if agrees(replace(example, ruleset=wrong), replace(planned, trials=concerned), net):
                        unnoticed.append((chain.name, rule))

        assert tried == 24
        assert unnoticed == []

    def test_backend_that_fails(self, example: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
        """A failure and a Ctrl-C in the middle leave no descriptor and no interface, and this process where it was."""
        for error in (HostRefused("no"), KeyboardInterrupt()):
            monkeypatch.setattr(runner, "execute", raising(error))
            before = state_of_process()
            with pytest.raises(type(error)):
                run_lab(example, load(USABLE[0]))

            assert before == state_of_process()

    def test_nothing_is_left(self, example: Compiled) -> None:
        """Neither descriptors nor child processes nor names of namespaces nor interfaces stay behind."""
        run_lab(example, load(USABLE[0]))
        before = state_of_process()
        run_lab(example, load(USABLE[0]))

        assert before == state_of_process()

    def test_two_at_a_time(self) -> None:
        """Two labs on one machine do not get in each other's way."""
        labs = [subprocess.Popen((*FWC, "lab", str(EXAMPLE), "--json"), stdout=subprocess.PIPE, text=True) for _ in range(2)]
        answers = [lab.communicate()[0] for lab in labs]

        assert [lab.returncode for lab in labs] == [0, 0]
        for answer in map(json.loads, answers):
            assert answer["agrees"]
            assert len(answer["probes"]) > 100

    def test_interrupted(self) -> None:
        """Ctrl-C ends the lab at once, without a process or an interface left."""
        lab = subprocess.Popen((*FWC, "lab", str(EXAMPLE)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(0.5)
        lab.send_signal(signal.SIGINT)

        assert lab.wait(10) != 1
        with pytest.raises(ProcessLookupError):
            os.killpg(lab.pid, 0)
        assert not [path for path in Path("/sys/class/net").glob("*/address") if path.read_text().startswith("02:00:00:00:")]


def agrees(policy: Compiled, planned: LabPlan, net: Network) -> bool:
    """Whether the lab is content with a policy's rules; they are taken out again."""
    backend = load(USABLE[0])
    with net.host.entered():
        runner.execute(backend.load(policy.ruleset))
    outcomes = try_packets(policy.resolved, planned, net, (0.1, 0.1))
    with net.host.entered():
        runner.execute(backend.remove(backend.parse(runner.outputs(backend.listing()))))
    assert outcomes
    return all(o.agrees for o in outcomes)


def state_of_process() -> tuple[dict[str, str], list[str], Path]:
    """Open descriptors, child processes, and the network namespace this thread is in."""
    descriptors = {}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            descriptors[path.name] = str(path.readlink())
    children = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return descriptors, children, Path("/proc/thread-self/ns/net").readlink()


def raising(error: BaseException) -> Callable[[Sequence[Step]], None]:
    """A function that fails."""

    def fail(_: Sequence[Step]) -> None:
        raise error

    return fail
