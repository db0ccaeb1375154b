"""The second reading of a legacy host through python-iptables: it agrees with ours, it finds what differs, it never gets in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from cases.loader import CASES, load_case
from fwcompiler_iptables import legacy, nft
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from kernelspace import Space, namespace

from fwcompiler import second_reading
from fwcompiler.kernel import netns, runner
from fwcompiler.kernel import second_reading as kernel_reading
from fwcompiler.pipeline import Host, compile_policy
from fwcompiler.ruleset import (
    STATES,
    AddressSet,
    Chain,
    Family,
    Final,
    Goto,
    Hook,
    InRanges,
    InSet,
    Interface,
    Jump,
    Limit,
    Match,
    PortIn,
    ProtocolIs,
    Rule,
    Ruleset,
    StateIn,
    TypeIn,
    Unknown,
    Untrack,
    Verdict,
)
from fwcompiler.second_reading import READER, compare
from fwcompiler.shapes import StatusShape
from fwcompiler.state import StateDir
from fwcompiler.status import read_status, status_text

pytestmark = [
    pytest.mark.skipif(find_spec("iptc") is None, reason="python-iptables (the extra `legacy`) is not installed"),
    pytest.mark.skipif(not all(runner.find(p) for p in legacy.programs), reason="iptables-legacy or ipset is not installed"),
]

FWC = (sys.executable, "-c", "import sys; from fwcompiler.cli import main; sys.exit(main())")
TABLES = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")

EVERYTHING = """
version: 1
groups:
  carriers: [198.51.100.16/28, 203.0.113.7-203.0.113.99, 2001:db8:51::/48]
  agents:
    members: [203.0.113.0/24, 2001:db8:7::/64]
    dynamic: {timeout: 12h, max: 4096}
  admins: [192.0.2.10]
  cluster: [10.20.0.0/24]
  bad: [198.18.0.0/15, 2001:db8:bad::/48]
  worse: {members: [100.64.0.1], dynamic: {timeout: 1h, max: 10}}
block: {from: [bad, worse], except: [carriers, agents]}
trust: [cluster]
services:
  sip: {from: [carriers, agents]}
  sip-tcp: {from: [carriers]}
  rtp: {from: anywhere}
  https: {from: anywhere}
  wss: {from: [agents, admins]}
  ssh: {from: [admins]}
  ntp: {from: [cluster]}
  vrrp: {from: [cluster]}
  a-very-long-service1: {ports: [tcp/1, udp/65535, tcp/100-200], from: [admins, carriers]}
tests:
  - {from: 8.8.8.8, to: udp/5060, expect: drop}
"""

HAND_MADE = {
    4: (
        "-s 10.0.0.0/8 ! -d 192.0.2.1 -i eth0 ! -o eth1 -j ACCEPT",
        "! -s 10.1.0.0/16 -j DROP",
        "-s 10.0.1.0/255.0.255.0 -j DROP",
        "-i eth+ -j DROP",
        "-i + -j DROP",
        "-p tcp -j ACCEPT",
        "-p tcp -m tcp -j ACCEPT",
        "! -p udp -j RETURN",
        "-p 112 -j ACCEPT",
        "-p 29 -j ACCEPT",
        "-p 22 -j ACCEPT",
        "-p 253 -j ACCEPT",
        "-p esp -j ACCEPT",
        "-p ipv6-icmp -j ACCEPT",
        "-p udp --sport 5060 --dport 1024: -j ACCEPT",
        "-p udp --dport :1024 -g FWC-s.sip",
        "-p tcp ! --dport 80:90 -j FWC-s.sip",
        "-p tcp --syn -j ACCEPT",
        "-p tcp -m multiport --dports 22,80:90 -j ACCEPT",
        "-p sctp --dport 3868 -j ACCEPT",
        "-m set --match-set fwc-carriers4 src -j ACCEPT",
        "-m set ! --match-set fwc-agents~4b dst -j ACCEPT",
        "-m set --match-set fwc-carriers4 src,dst -j ACCEPT",
        "-m set --match-set foreign src -j ACCEPT",
        "-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        "-m conntrack ! --ctstate INVALID,UNTRACKED -j ACCEPT",
        "-m conntrack --ctstate SNAT -j ACCEPT",
        "-m conntrack --ctstate NEW --ctdir ORIGINAL -j ACCEPT",
        "-m state --state NEW -j ACCEPT",
        "-m limit --limit 3/minute -j ACCEPT",
        "-m limit --limit 20/second --limit-burst 40 -j ACCEPT",
        "-m limit --limit 7/hour --limit-burst 1 -j ACCEPT",
        "-m iprange --src-range 10.0.0.3-10.0.0.9 -j ACCEPT",
        "-m iprange ! --dst-range 10.0.0.3-10.0.0.9 -j ACCEPT",
        "-m iprange --src-range 10.0.0.3-10.0.0.9 --dst-range 10.0.0.3-10.0.0.9 -j ACCEPT",
        "-p icmp --icmp-type echo-request -j ACCEPT",
        "-p icmp --icmp-type any -j ACCEPT",
        "-p icmp --icmp-type 3/4 -j ACCEPT",
        "-p icmp ! --icmp-type 8 -j ACCEPT",
        "-j REJECT",
        "-p tcp -j REJECT --reject-with tcp-reset",
        "-j LOG",
        "-j LOG --log-prefix 'it is \"ours\" or o\\ther: '",
        "-j LOG --log-prefix x --log-level debug",
        "-j NFLOG --nflog-group 3",
        "-m comment --comment sip -j ACCEPT",
        "-m comment --comment sip -m comment --comment rtp -j ACCEPT",
        "-m comment --comment 'it is \"ours\" or o\\ther -j DROP'",
        '-m comment --comment "don\'t"',
        "-m comment --comment --foo",
        "-m comment --comment '!'",
        "-m comment --comment ''",
        "-f -j DROP",
        "! -f -j DROP",
        "-m hashlimit --hashlimit-above 10/sec --hashlimit-name x --hashlimit-mode srcip -j DROP",
        "-m recent --name a --set",
        "-m addrtype --dst-type LOCAL -j ACCEPT",
        "-m mark --mark 3",
        "-m mac --mac-source 00:11:22:33:44:55 -j ACCEPT",
        "",
    ),
    6: (
        "-s 2001:db8::/33 ! -d ::1 -i lo -j ACCEPT",
        "-s 2001:db8::1/ffff:ffff::ffff -j DROP",
        "-p udp --dport 5060 -g FWC-s.sip",
        "-m set --match-set fwc-carriers6 src -j ACCEPT",
        "-m iprange --src-range 2001:db8::3-2001:db8::9 -j ACCEPT",
        "-p icmpv6 --icmpv6-type neighbour-solicitation -j ACCEPT",
        "-p icmpv6 --icmpv6-type 1/4 -j ACCEPT",
        "-p icmpv6 -j ACCEPT",
        "-p tcp -m tcp --sport 0:0 -j ACCEPT",
        "-m limit --limit 30/day -j REJECT",
        "-j REJECT --reject-with icmp6-adm-prohibited",
        "-m rt --rt-type 0 -j DROP",
    ),
}
MAKE = """
ipset create fwc-carriers4 hash:net; ipset create fwc-carriers6 hash:net family inet6; ipset create foreign hash:ip
ipset create fwc-agents~4b hash:ip timeout 100 maxelem 10
for program in iptables-legacy ip6tables-legacy; do
  $program -N FWC-s.sip; $program -N FWC-input; $program -N FWC-empty; $program -N DOCKER; $program -A DOCKER -j ACCEPT
  $program -A INPUT -j NFLOG --nflog-group 3
  $program -A INPUT -i eth0 -j FWC-input; $program -A INPUT -j DOCKER; $program -I INPUT -g FWC-input; $program -A FORWARD -j FWC-s.sip
done
"""


@pytest.fixture
def inside(space: Space) -> Iterator[None]:
    """The test runs in a network namespace of its own."""
    with space.entered():
        yield


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """An empty state directory."""
    return StateDir(tmp_path / "state")


def readings() -> tuple[Ruleset, Ruleset]:
    """What fwc and what python-iptables read here."""
    answer = kernel_reading.ask()
    assert not answer.reason
    return legacy.parse(runner.outputs(legacy.listing())), second_reading.read(answer.text)


def shell(text: str) -> str:
    """Run a command line; it must not fail."""
    return subprocess.run(("sh", "-ec", text), capture_output=True, text=True, check=True).stdout


def rules(ruleset: Ruleset) -> list[Rule]:
    """All rules of all chains."""
    return [rule for chain in ruleset.chains for rule in chain.rules]


def unknown(rule: Rule) -> bool:
    """True for a rule of which a reader did not understand everything."""
    return any(isinstance(m, Unknown) for m in rule.matches)


def status(state: StateDir) -> StatusShape:
    """`fwc status` of the namespace we are in."""
    return read_status(Host(legacy, netns.Namespace(), state))


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put another module in python-iptables' place, for children only."""
    (folder / "iptc.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def load_something() -> None:
    """One jump and one chain of ours, so that there is something to read."""
    shell("iptables-legacy -N FWC-input; iptables-legacy -A FWC-input -p udp --dport 5060 -j DROP; iptables-legacy -I INPUT -j FWC-input")


def agree_on_policy(path: Path) -> None:
    """Both readings of a compiled policy are the same, and the second one understands all of it."""
    runner.execute(legacy.load(compile_policy(str(path)).ruleset))
    ours, theirs = readings()

    assert compare(ours, theirs) is None
    assert compare(theirs, ours) is None
    assert [rule for rule in rules(theirs) if unknown(rule)] == []
    assert len(rules(ours)) == len(rules(theirs)) > 20


class TestAgreement:
    """Two readers that share no code see the same rules."""

    @pytest.mark.usefixtures("inside")
    def test_policy_with_everything(self, tmp_path: Path) -> None:
        """Every kind of rule that the compiler emits is read the same twice."""
        path = tmp_path / "policy.yaml"
        path.write_text(EVERYTHING, encoding="utf-8")

        agree_on_policy(path)

    @pytest.mark.usefixtures("inside")
    @pytest.mark.parametrize("name", ["design_example", "catalogue_public", "every_port", "trust_dynamic", "block_several_groups"])
    def test_policies_of_the_cases(self, name: str, tmp_path: Path) -> None:
        """Policies from tests/cases are read the same twice."""
        load_case(CASES / f"{name}.txt").write_inputs(tmp_path)

        agree_on_policy(tmp_path / "policy.yaml")

    @pytest.mark.usefixtures("inside")
    @pytest.mark.parametrize("version", [4, 6])
    def test_rules_typed_by_hand(self, version: int) -> None:
        """Whatever somebody types into our chains: our reader and the second one agree, or ours says that it does not know."""
        shell(MAKE)
        program = "iptables-legacy" if version == 4 else "ip6tables-legacy"
        shell("\n".join(f"{program} -A FWC-input {text}" for text in HAND_MADE[version]))
        ours, theirs = readings()

        assert compare(ours, theirs) is None
        found = [r for r in ours.chain("input").rules if r.version == version]
        assert len(HAND_MADE[version]) == len(found)
        assert len(found) // 2 < len([r for r in found if not unknown(r)])
        assert [r for r, other in zip(found, theirs.chain("input").rules, strict=False) if unknown(other) and not unknown(r)] == []

    @pytest.mark.usefixtures("inside")
    def test_only_what_is_ours(self) -> None:
        """Built-in chains show their jumps to our chains and nothing else, foreign chains are not there."""
        shell(MAKE)
        _, theirs = readings()

        assert {"INPUT", "FORWARD", "input", "service.sip", "empty"} == {chain.name for chain in theirs.chains}
        first, second = (r for r in theirs.chain("INPUT").rules if r.version == 4)
        assert Rule((Family(4),), Goto("input")) == first
        assert Rule((Family(4), Interface("in", "eth0")), Jump("input")) == second
        assert Hook("forward", 0, "accept") == theirs.chain("FORWARD").hook

    @pytest.mark.usefixtures("inside")
    def test_nothing_loaded(self) -> None:
        """On a host without legacy tables there is nothing to read, and reading registers no table."""
        ours, theirs = readings()

        assert not ours
        assert not theirs
        assert [Path(name).read_text(encoding="ascii") for name in TABLES if Path(name).exists()] == ["", ""]


class TestOtherTables:
    """Chains of ours outside of table filter."""

    @pytest.mark.usefixtures("inside")
    def test_agree(self) -> None:
        """Both readings see the same chains in raw, mangle and nat, and the same difference when one is changed."""
        media = Rule((PortIn("source", "udp", (10000, 20000)),), Untrack())
        chains = (
            Chain("service.sip", (Rule((), Final.DROP, "sip"),)),
            Chain("early", (Rule((PortIn("destination", "udp", (5060, 5060)),), Goto("service.sip")),), Hook("prerouting", -300, "accept")),
            Chain("media", (media,), Hook("output", -300, "accept")),
            Chain("marks", (Rule((), Final.RETURN),), Hook("output", -150, "accept", "route")),
            Chain("nat", (Rule((), Final.RETURN),), Hook("prerouting", -100, "accept", "nat")),
            Chain("input", (Rule((), Goto("service.sip")),), Hook("input")),
        )
        runner.execute(legacy.load(Ruleset(chains)))
        ours, theirs = readings()

        assert {"raw/service.sip", "service.sip", "raw/OUTPUT", "mangle/marks", "nat/PREROUTING"} <= {c.name for c in ours.chains}
        assert compare(ours, theirs) is None
        shell("iptables-legacy -t raw -A FWC-s.sip -j ACCEPT")
        assert "raw/service.sip" in (compare(ours, readings()[1]) or "")


class TestReadingOnly:
    """The second reading changes nothing."""

    @pytest.mark.usefixtures("inside")
    def test_tables_stay_as_they_are(self) -> None:
        """Rules, counters, policies and the list of registered tables are the same before and after."""
        shell(MAKE)
        look = f"cat {' '.join(TABLES)}; iptables-legacy-save -c; ip6tables-legacy-save -c"
        before = [line for line in shell(look).splitlines() if not line.startswith("#")]
        readings()

        assert before == [line for line in shell(look).splitlines() if not line.startswith("#")]

    @pytest.mark.usefixtures("inside")
    def test_nothing_is_sent_to_the_kernel(self, tmp_path: Path) -> None:
        """The child sets no socket option, the only way to write legacy rules (include/uapi/linux/netfilter_ipv4/ip_tables.h)."""
        strace = shutil.which("strace")
        if strace is None:
            pytest.skip("strace is not installed")
        load_something()
        log = tmp_path / "trace"
        child = (sys.executable, "-W", "ignore", "-m", kernel_reading.__name__)
        done = subprocess.run(
            (strace, "-f", "-qq", "-e", "trace=setsockopt,getsockopt", "-o", str(log), *child), capture_output=True, check=False
        )
        if "ptrace" in done.stderr.decode():
            pytest.skip("this machine does not let strace work")

        assert "FWC-input" in done.stdout.decode()
        assert "getsockopt" in log.read_text(encoding="utf-8")
        assert "setsockopt" not in log.read_text(encoding="utf-8")


class TestDifference:
    """What the readings do not agree on is said in one sentence."""

    OURS = Ruleset((Chain("input", (Rule((PortIn("destination", "udp", (5060, 5060)), Family(4)), Goto("service.sip")),)),))

    def changed(self, *rules: Rule) -> Ruleset:
        """The ruleset with other rules."""
        return Ruleset((Chain("input", rules),))

    def test_another_rule(self) -> None:
        """The chain, the family, the rule's number and both readings are named."""
        theirs = self.changed(Rule((Family(4), ProtocolIs(17), PortIn("destination", "udp", (5061, 5061))), Final.ACCEPT, "sip"))

        assert compare(self.OURS, theirs) == (
            "chain input, IPv4, rule 1: fwc reads `udp destination port 5060: goto service.sip`, "
            "python-iptables reads `protocol 17, udp destination port 5061: accept (counted as sip)`"
        )

    def test_missing_and_additional_rules(self) -> None:
        """A rule that only one of them sees is shown."""
        rule = self.OURS.chains[0].rules[0]
        other = Rule((Family(6), Interface("in", "lo", True), StateIn(frozenset(("new",)))), None, log_prefix="x ")
        more = self.changed(rule, other)

        assert compare(more, self.OURS) == (
            "chain input, IPv6, rule 1: python-iptables does not see `input interface not lo, state new: log 'x '`"
        )
        assert compare(self.OURS, more) == "chain input, IPv6, rule 1: fwc does not see `input interface not lo, state new: log 'x '`"

    def test_missing_chain(self) -> None:
        """A chain that only one of them sees is named."""
        assert compare(self.OURS, Ruleset()) == "chain input: python-iptables does not see it"
        assert compare(Ruleset(), self.OURS) == "chain input: fwc does not see it"

    def test_unknown(self) -> None:
        """Our `Unknown` cannot be contradicted; an `Unknown` of the other one is a difference where we claim to know."""
        vague = self.changed(Rule((Family(4), Unknown("-m mac"))))

        assert compare(vague, self.OURS) is None
        assert "something unknown (-m mac)" in (compare(self.OURS, vague) or "")

    @pytest.mark.usefixtures("inside")
    def test_in_status(self, state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
        """`status` shows the difference; here our parser is made to misread a verdict."""
        load_something()
        parse = type(legacy).parse

        def misread(_: object, outputs: tuple[str, ...]) -> Ruleset:
            found = parse(legacy, outputs)
            if not found.chains:
                return found
            chain = found.chain("input")
            wrong = replace(chain, rules=tuple(replace(rule, verdict=Final.ACCEPT) for rule in chain.rules))
            return replace(found, chains=tuple(wrong if each is chain else each for each in found.chains))

        monkeypatch.setattr(type(legacy), "parse", misread)
        found = status(state)

        assert found["second_reading"] == (
            "differs: chain input, IPv4, rule 1: fwc reads `udp destination port 5060: accept`, "
            "python-iptables reads `protocol 17, udp destination port 5060: drop`"
        )
        assert "second reading (python-iptables): differs: chain input, IPv4, rule 1" in status_text(found)

    @pytest.mark.usefixtures("inside")
    def test_rules_that_changed_meanwhile(self, state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
        """A change between the two readings is no difference: both are read again."""
        load_something()
        ask, times = kernel_reading.ask, []

        def late() -> kernel_reading.Answer:
            times.append(1)
            if len(times) == 1:
                shell("iptables-legacy -A FWC-input -p tcp -j DROP")
            return ask()

        monkeypatch.setattr(kernel_reading, "ask", late)

        assert status(state)["second_reading"] == "agrees"
        assert len(times) == 2

    @pytest.mark.usefixtures("inside")
    def test_rules_that_change_all_the_time(self, state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the rules never rest, `status` says so."""
        load_something()
        ask = kernel_reading.ask

        def late() -> kernel_reading.Answer:
            shell("iptables-legacy -A FWC-input -p tcp -j DROP")
            return ask()

        monkeypatch.setattr(kernel_reading, "ask", late)

        assert status(state)["second_reading"] == "not possible: the rules change while they are read"


class TestStatus:
    """`fwc status` works with python-iptables, without it, and with a broken one."""

    @pytest.mark.usefixtures("inside")
    def test_agrees(self, state: StateDir) -> None:
        """One line says that the readings agree."""
        load_something()
        found = status(state)

        assert found["second_reading"] == "agrees"
        assert "second reading (python-iptables): agrees" in status_text(found).splitlines()

    @pytest.mark.usefixtures("inside")
    def test_other_backend(self, state: StateDir) -> None:
        """For another backend there is no second reading, and no line about it."""
        found = read_status(Host(nft, netns.Namespace(), state))

        assert found["second_reading"] is None
        assert READER not in status_text(found)

    @pytest.mark.usefixtures("inside")
    def test_not_installed(self, state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without python-iptables no child is started, and nothing is said."""
        load_something()
        monkeypatch.setattr(kernel_reading, "find_spec", lambda _: None)
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        found = status(state)
        assert found["second_reading"] is None
        assert READER not in status_text(found)

    @pytest.mark.usefixtures("inside")
    def test_missing_in_the_child(self, state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A child that does not find python-iptables is the same as one that was never started."""
        load_something()
        stand_in(tmp_path, monkeypatch, "raise ModuleNotFoundError('no iptc', name='iptc')")

        assert status(state)["second_reading"] is None

    @pytest.mark.usefixtures("inside")
    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "python-iptables crashed (SIGSEGV)"),
            ("import distutils_of_another_time", "failed: ModuleNotFoundError: No module named 'distutils_of_another_time'"),
            ("raise OSError('libxtables.so.12: cannot open')", "failed: OSError: libxtables.so.12: cannot open"),
            ("import os\nos._exit(3)", "failed: exit code 3 without a word"),
            ("import time\ntime.sleep(60)", "python-iptables did not answer within 1 seconds"),
            ("import os\nos.write(1, b'noise')\nos._exit(0)", "python-iptables failed: noise"),
        ],
    )
    def test_broken(self, module: str, reason: str, state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A child that crashes, fails or hangs gives a reason; the rest of the status is as always."""
        load_something()
        stand_in(tmp_path, monkeypatch, module)
        monkeypatch.setattr(kernel_reading, "TIMEOUT", 1)
        found = status(state)

        assert (found["second_reading"] or "").startswith("not possible: ")
        assert reason in (found["second_reading"] or "")
        assert found["drift"] == ["rules of fwc are loaded, but no generation is recorded"]

    def test_no_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An interpreter that cannot be started is a reason too."""
        monkeypatch.setattr(sys, "executable", "/nowhere/python")

        assert kernel_reading.ask().reason == "/nowhere/python cannot be started: No such file or directory"

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"4": {}, "6": 3}', '{"4": {"FWC-x": [{}]}, "6": {}}'])
    def test_nonsense(self, text: str) -> None:
        """Text that is no reading is a ValueError, not a crash."""
        with pytest.raises(ValueError, match=r"\w"):
            second_reading.read(text)

    def test_command_line(self, netns: str, tmp_path: Path) -> None:
        """`fwc status` ends with 0, crashing child or not, and its JSON holds the answer."""
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "iptc.py").write_text("import os\nos.abort()", encoding="utf-8")
        subprocess.run(("ip", "netns", "exec", netns, "iptables-legacy", "-N", "FWC-input"), check=True)
        options = ("--netns", netns, "--backend", "iptables-legacy", "--state-dir", str(tmp_path / "state"), "--json")
        for folder, expected in (("", "agrees"), (str(broken), "not possible: python-iptables crashed (SIGABRT)")):
            environment = {**os.environ, "PYTHONPATH": folder}
            done = subprocess.run((*FWC, "status", *options), capture_output=True, text=True, check=False, env=environment)

            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["second_reading"] == expected


def spans(last: int) -> st.SearchStrategy[tuple[int, int]]:
    """Ranges from 0 to `last`."""
    ends = st.integers(0, last)
    return st.tuples(ends, ends).map(lambda pair: (min(pair), max(pair)))


SETS = ("carriers.v4", "carriers.v6", "v4.v4", "x4b.v6", "b.dynamic.v4", "agents.dynamic.v6", "x4.dynamic.v4", "q-_9.v6")
CHAINS = ("service.sip", "other", "s", "service.a-very-long-service1", "FWC", "INPUTS")
sides = st.sampled_from(("source", "destination"))
versions = st.sampled_from((4, 6))
labels = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


def addresses(version: int) -> st.SearchStrategy[tuple[int, int]]:
    """Ranges of a family, prefixes among them more often than chance would have it."""
    bits = 32 if version == 4 else 128
    whole = st.tuples(st.integers(0, (1 << bits) - 1), st.integers(0, bits))
    prefixes = whole.map(lambda p: (p[0] >> p[1] << p[1], p[0] | ((1 << p[1]) - 1)))
    return st.one_of(prefixes, spans((1 << bits) - 1))


def family_matches(version: int) -> st.SearchStrategy[Match]:
    """Matches that name a family."""
    names = [name for name in SETS if name.endswith(str(version))]
    types = st.lists(st.integers(0, 254), min_size=1, max_size=3, unique=True).map(lambda each: TypeIn(version, tuple(sorted(each))))
    return st.one_of(
        st.builds(InSet, sides, st.sampled_from(names), st.just(version), st.booleans()),
        st.builds(InRanges, sides, st.just(version), st.tuples(addresses(version)), st.booleans()),
        st.just(Family(version)),
        types,
    )


plain_matches: st.SearchStrategy[Match] = st.one_of(
    st.builds(Interface, st.sampled_from(("in", "out")), st.sampled_from(("lo", "eth0.7", "a-name-of-15-ch", "x")), st.booleans()),
    st.builds(ProtocolIs, st.sampled_from((1, 2, 6, 17, 47, 50, 58, 89, 112, 132, 200, 255)), st.booleans()),
    st.builds(PortIn, sides, st.sampled_from(("tcp", "udp")), spans(65535)),
    st.builds(StateIn, st.frozensets(st.sampled_from(STATES), min_size=1), st.booleans()),
    st.builds(Limit, st.integers(1, 9), st.sampled_from(("second", "minute")), st.integers(1, 99)),
    st.builds(Limit, st.integers(50, 99), st.sampled_from(("hour", "day")), st.integers(1, 9)),
)
verdicts: st.SearchStrategy[Verdict] = st.one_of(
    st.none(), st.sampled_from(list(Final)), st.sampled_from(CHAINS).map(Goto), st.sampled_from(CHAINS).map(Jump)
)
somewhere = versions.flatmap(
    lambda v: st.lists(st.one_of(family_matches(v), plain_matches), max_size=4, unique_by=lambda m: (type(m), getattr(m, "side", "")))
)
prefixes = st.sampled_from(("", "", "fwc drop: ", "it's "))
some_rules = st.builds(lambda matches, *rest: Rule(tuple(matches), *rest), somewhere, verdicts, labels, prefixes)
writable = some_rules.filter(lambda rule: not legacy.refuse(Ruleset((Chain("input", (rule,)),))))


@given(found=st.lists(writable, min_size=10, max_size=60))
@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # shrinking takes minutes here
def test_random_rulesets(kernel_allowed: bool, found: list[Rule]) -> None:
    """Whatever the backend writes, both readers read the same from the kernel, and the second one knows all of it."""
    assume(kernel_allowed)
    sets = [AddressSet(n, int(n[-1]), timeout=60 if "dynamic" in n else None, size=9 if "dynamic" in n else None) for n in SETS]
    chains = (Chain("input", tuple(found), Hook("input")), *(Chain(name, (Rule((), Final.DROP, "other"),)) for name in CHAINS))
    ruleset = Ruleset(chains, tuple(sets))
    assume(not legacy.refuse(ruleset))
    with namespace() as space, space.entered():
        runner.execute(legacy.load(ruleset))
        ours, theirs = readings()

    assert compare(ours, theirs) is None
    assert compare(theirs, ours) is None
