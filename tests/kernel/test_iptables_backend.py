"""Both iptables variants against the kernel of this machine, each test in a network namespace of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from fwcompiler_iptables import legacy, nft
from fwcompiler_iptables.commands import Iptables

from fwcompiler.addresses import LOOPBACK, Ranges, merged, subtract
from fwcompiler.backend import Command, Fill, SetChange, Step
from fwcompiler.diagnostics import HostRefused
from fwcompiler.kernel import ipset, runner
from fwcompiler.kernel.netns import scratch
from fwcompiler.plan import keeping_members
from fwcompiler.ruleset import (
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
    PortIn,
    ProtocolIs,
    Rule,
    Ruleset,
    StateIn,
    TypeIn,
    Unknown,
    Untrack,
)

pytestmark = pytest.mark.skipif(subprocess.run(("unshare", "-n", "true"), check=False).returncode != 0, reason="needs root")

CARRIERS: Ranges = ((0x0A010000, 0x0A0100FF), (0x0A020000, 0x0A0200FF))
BLOCKED: Ranges = ((0xC0000200, 0xC00002FF),)
CARRIERS6: Ranges = ((0x20010DB8 << 96, (0x20010DB8 << 96) + (1 << 96) - 1),)
FOREIGN = """*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
:ufw-before-input - [0:0]
-A INPUT -s {0} -m comment --comment "odd \\"words' -j FWC-input" -j ACCEPT
-A INPUT -j ufw-before-input
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -p tcp -m multiport --dports 22,80:90 -j ACCEPT
COMMIT
"""


def policy(*, carriers: Ranges = CARRIERS, sip: tuple[Rule, ...] = (), size: int = 4096) -> Ruleset:
    """A ruleset such as the compiler hands over: every kind of match, both families."""
    no_agent = InSet("source", "agents.dynamic.v4", 4, negated=True)
    rules = (
        Rule((Interface("in", "lo"),), Final.ACCEPT, "loopback"),
        *(Rule((InRanges("source", v, (LOOPBACK[v],)),), Final.DROP, "loopback") for v in (4, 6)),
        Rule((InSet("source", "block.v4", 4), no_agent), Final.DROP, "block"),
        Rule((StateIn(frozenset(("invalid",))),), Final.DROP, "invalid"),
        Rule((PortIn("destination", "udp", (5060, 5060)),), Goto("service.sip")),
        Rule((ProtocolIs(112),), Goto("service.vrrp")),
        Rule((StateIn(frozenset(("established", "related"))),), Final.ACCEPT, "established"),
        Rule((PortIn("destination", "udp", (10000, 20000)),), Final.ACCEPT, "rtp"),
        Rule((TypeIn(4, (3, 11, 12)),), Final.ACCEPT, "icmp"),
        Rule((TypeIn(6, (1, 2, 3, 4, 130)),), Final.ACCEPT, "icmp"),
        Rule((TypeIn(4, (8,)), Limit(20, "second", 40)), Final.ACCEPT, "icmp"),
        Rule((Limit(5, "second", 10),), None, log_prefix="fwc drop: "),
        Rule((), Final.DROP, "other"),
    )
    members = (
        Rule((InSet("source", "carriers.v4", 4),), Final.ACCEPT, "sip"),
        Rule((InSet("source", "carriers.v6", 6),), Final.ACCEPT, "sip"),
        *sip,
        Rule((InSet("source", "agents.dynamic.v4", 4),), Final.ACCEPT, "sip"),
        Rule((), Final.DROP, "sip"),
    )
    chains = (
        Chain("input", rules, Hook("input", 0, "drop")),
        Chain("service.sip", members),
        Chain(
            "service.vrrp",
            (Rule((InRanges("source", 4, ((0x0A140000, 0x0A1400FF),)),), Final.ACCEPT, "vrrp"), Rule((), Final.DROP, "vrrp")),
        ),
    )
    sets = (
        AddressSet("agents.dynamic.v4", 4, timeout=43200, size=size),
        AddressSet("block.v4", 4, BLOCKED),
        AddressSet("carriers.v4", 4, carriers),
        AddressSet("carriers.v6", 6, CARRIERS6),
    )
    return Ruleset(chains, sets)


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """A fresh network namespace for each test; gone afterwards."""
    with scratch() as fresh, fresh.entered():
        yield


@pytest.fixture(params=[nft, legacy], ids=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> Iptables:
    """Each variant in turn."""
    each: Iptables = request.param
    return each


def shell(text: str, stdin: str = "") -> str:
    """Run a command line of the test's own; it must not fail."""
    return subprocess.run(("sh", "-c", text), input=stdin, capture_output=True, text=True, check=True).stdout


def listed(backend: Iptables) -> Ruleset:
    """The live ruleset as the backend reads it."""
    return backend.parse(runner.outputs(backend.listing()))


def wanted(backend: Iptables, ruleset: Ruleset) -> Ruleset:
    """A ruleset in the form a kernel gives back, set contents grafted on."""
    with scratch() as other, other.entered():
        runner.execute(backend.load(ruleset))
        read = listed(backend)
    contents = {s.name: s.ranges for s in ruleset.sets}
    return replace(read, sets=tuple(replace(s, ranges=contents[s.name]) for s in read.sets))


def everything(backend: Iptables) -> str:
    """All that a removal must leave alone: both families, all tables, nft's own view, all sets; without dates."""
    saves = shell(f"iptables-{backend.variant}-save; ip6tables-{backend.variant}-save; ipset save")
    native = shell("nft list ruleset 2>/dev/null") if backend.variant == "nft" else ""
    return re.sub(r"^#.*\n", "", re.sub(r"\[\d+:\d+\]", "", saves), flags=re.M) + native


def foreign(backend: Iptables) -> None:
    """Rules of others: a DROP policy, docker-like and ufw-like chains, a comment made to confuse."""
    for program, network in (("iptables", "203.0.113.9/32"), ("ip6tables", "2001:db8:9::/64")):
        shell(f"{program}-{backend.variant}-restore --noflush", FOREIGN.format(network))
    shell("ipset create theirs hash:ip initval 0x1; ipset add theirs 192.0.2.77")


def change(ruleset: Ruleset, name: str, old: Ranges, new: Ranges) -> SetChange:
    """The change of one set from old to new content."""
    each = next(s for s in ruleset.sets if s.name == name)
    return SetChange(replace(each, ranges=new), subtract(new, old), subtract(old, new))


def explicit(ruleset: Ruleset) -> dict[str, tuple[Rule, ...]]:
    """What the kernel should give back, worked out from the neutral rules alone: a family each, a type each."""
    return {c.name: tuple(r for v in (4, 6) for rule in c.rules for r in in_family(rule, v)) for c in ruleset.chains}


def in_family(rule: Rule, version: int) -> Iterator[Rule]:
    """The rules one family has for a neutral rule."""
    if rule.version not in (None, version):
        return
    for match in rule.matches:
        if isinstance(match, TypeIn):
            rest = tuple(m for m in rule.matches if m is not match)
            yield from (replace(rule, matches=(TypeIn(version, (kind,)), *rest)) for kind in match.types)
            return
    yield rule if rule.version else replace(rule, matches=(Family(version), *rule.matches))


class TestLoad:
    """From nothing to a whole ruleset, and what is read back."""

    def test_read_back(self, backend: Iptables) -> None:
        """What is loaded is read back rule for rule, with each rule's family named; only the jumps are new."""
        ruleset = policy()
        runner.execute(backend.load(ruleset))
        live = listed(backend)

        assert Chain("INPUT", tuple(Rule((Family(v),), Jump("input")) for v in (4, 6)), Hook("input", 0, "accept")) == live.chains[0]
        assert explicit(ruleset) == {c.name: c.rules for c in live.chains[1:]}
        assert [(s.name, s.version, s.timeout, s.size) for s in ruleset.sets] == [(s.name, s.version, s.timeout, s.size) for s in live.sets]
        assert live.others == ()

    def test_contents(self, backend: Iptables) -> None:
        """Static sets hold their content, dynamic ones start empty."""
        runner.execute(backend.load(policy()))

        assert ipset.read("fwc-carriers4") == CARRIERS
        assert ipset.read("fwc-carriers6") == CARRIERS6
        assert ipset.members("fwc-agents~4") == ()

    def test_nothing_there(self, backend: Iptables) -> None:
        """A host without anything of ours reads as an empty ruleset, and reading leaves no trace."""
        before = everything(backend)

        assert not listed(backend)
        assert before == everything(backend)

    def test_every_match(self, backend: Iptables) -> None:
        """Every kind of match and verdict, negated where it can be, survives the way through the kernel."""
        members = (
            Rule((InRanges("source", 4, ((0x0A000001, 0x0A000007),), negated=True),), Final.RETURN, "sip"),
            Rule((InRanges("destination", 6, ((1 << 100, (1 << 100) + 5),)), InRanges("source", 6, ((16, 31),))), Final.REJECT, "sip"),
            Rule((InRanges("source", 4, ((1 << 28, (1 << 28) + 255),), negated=True), Interface("in", "eth0", negated=True)), Final.REJECT),
            Rule((PortIn("destination", "tcp", (1, 5)), PortIn("source", "tcp", (1024, 65535)))),
            Rule((ProtocolIs(17), PortIn("source", "udp", (53, 53), negated=True)), Final.DROP),
            Rule((ProtocolIs(6, negated=True), StateIn(frozenset(("new", "untracked")), negated=True)), Jump("service.vrrp")),
            Rule((InSet("destination", "block.v4", 4), Limit(3, "minute", 5)), None, log_prefix='say "it" \\ so: '),
            Rule((Interface("out", "lo"),), Final.ACCEPT, "sip"),
        )
        # The kernel lists addresses and interfaces before the rest, which is the order above.
        # What returns from a service's chain goes on behind ours, so the base chain has to be one that accepts.
        ruleset = policy(sip=members)
        ruleset = replace(ruleset, chains=tuple(replace(c, hook=replace(c.hook, policy="accept")) if c.hook else c for c in ruleset.chains))
        assert list(backend.refuse(ruleset)) == []
        runner.execute(backend.load(ruleset))

        got, want = listed(backend).chain("service.sip").rules, explicit(ruleset)["service.sip"]
        assert sorted(map(meaning, want)) == sorted(map(meaning, got))

    def test_unrolled(self, backend: Iptables) -> None:
        """Lists of ranges become a rule each, or one rule where they are negated; log and verdict become two."""
        spans = ((16, 31), (40, 44))
        members = (
            Rule((InRanges("source", 4, spans),), Final.DROP, log_prefix="x: "),
            Rule((InRanges("source", 4, spans, negated=True),), Final.RETURN),
        )
        runner.execute(backend.load(policy(sip=members)))
        rules = listed(backend).chain("service.sip").rules

        for span in spans:
            match = InRanges("source", 4, (span,))
            assert Rule((match,), None, log_prefix="x: ") in rules
            assert Rule((match,), Final.DROP) in rules
        assert Rule(tuple(InRanges("source", 4, (s,), negated=True) for s in spans), Final.RETURN) in rules

    def test_rendered_files(self, backend: Iptables) -> None:
        """The files a person loads by hand make the same kernel state as the steps."""
        ruleset = policy()
        files = backend.render(ruleset).files
        shell("ipset restore", files["fwc.ipset"])
        shell(f"iptables-{backend.variant}-restore --noflush", files["fwc.v4"])
        shell(f"ip6tables-{backend.variant}-restore --noflush", files["fwc.v6"])

        assert replace(wanted(backend, ruleset), sets=()) == replace(listed(backend), sets=())
        assert ipset.read("fwc-carriers4") == CARRIERS

    def test_failure_between_families(self, backend: Iptables) -> None:
        """Where IPv6 is refused, IPv4 is taken out again, and so are the sets: foreign rules stand as before."""
        foreign(backend)
        before = everything(backend)
        ghost = Rule((InSet("source", "ghost.v6", 6),), Final.ACCEPT, "sip")

        with pytest.raises(HostRefused, match="ghost6"):
            runner.execute(backend.load(policy(sip=(ghost,))))
        assert before == everything(backend)

    def test_refused_set(self, backend: Iptables) -> None:
        """Where a set cannot be made, those made before it are gone again."""
        shell("ipset create fwc-carriers6 hash:ip family inet6")

        with pytest.raises(HostRefused, match="already exists"):
            runner.execute(backend.load(policy()))
        assert shell("ipset list -n").replace("fwc-carriers6\n", "") == ""


def meaning(rule: Rule) -> str:
    """A rule's text with its matches in a fixed order: the kernel lists them in its own."""
    return repr((sorted(map(repr, rule.matches)), rule.verdict, rule.service, rule.log_prefix))


class TestByHand:
    """What a person typed into our chains."""

    TYPED = (
        ("-s 192.0.2.0/24 ! -i eth1 -p tcp --dport 22:23 -j ACCEPT", 4),
        ("-p udp ! --dport 5060 -m state --state NEW,RELATED -j REJECT --reject-with icmp-admin-prohibited", 4),
        ("! -s 192.0.2.1 -m set ! --match-set fwc-block4 src -j RETURN", 4),
        ("-p icmp --icmp-type echo-request -j ACCEPT", 4),
        ("-p icmp --icmp-type any -j DROP", 4),
        ("-m limit --limit 1/min -j LOG --log-prefix x", 6),
        ("-p ipv6-icmp --icmpv6-type neighbour-solicitation -j ACCEPT", 6),
        ("-j FWC-s.vrrp", 6),
    )
    READ = (
        Rule(
            (
                InRanges("source", 4, ((0xC0000200, 0xC00002FF),)),
                Interface("in", "eth1", negated=True),
                PortIn("destination", "tcp", (22, 23)),
            ),
            Final.ACCEPT,
        ),
        Rule(
            (
                Family(4),
                ProtocolIs(17),
                PortIn("destination", "udp", (5060, 5060), negated=True),
                StateIn(frozenset(("new", "related"))),
            ),
            Final.REJECT,
        ),
        Rule(
            (InRanges("source", 4, ((0xC0000201, 0xC0000201),), negated=True), InSet("source", "block.v4", 4, negated=True)), Final.RETURN
        ),
        Rule((TypeIn(4, (8,)),), Final.ACCEPT),
        Rule((Family(4), ProtocolIs(1)), Final.DROP),
        Rule((Family(6), Limit(1, "minute", 5)), None, log_prefix="x"),
        Rule((TypeIn(6, (135,)),), Final.ACCEPT),
        Rule((Family(6),), Jump("service.vrrp")),
    )
    ODD = (
        "-p tcp -m multiport --dports 22,80:90 -j ACCEPT",
        "-i eth+ -j ACCEPT",
        "-p tcp --syn -j REJECT --reject-with tcp-reset",
        "-p udp -j REJECT",
        "-p icmp --icmp-type 3/4 -j ACCEPT",
        "! -f -j NFLOG --nflog-group 3",
        "-m comment --comment '-j ACCEPT' -m mac --mac-source 00:11:22:33:44:55 -j DROP",
        "-m conntrack --ctstate DNAT,NEW -j ACCEPT",
        "-j theirs",
        "-s 10.0.3.0/255.0.255.0 -j LOG --log-uid",
        "-m set --match-set other src -j ACCEPT",
        "-m time --timestart 01:00 -m pkttype --pkt-type broadcast -j DROP",
    )

    def type_in(self, backend: Iptables, typed: Sequence[tuple[str, int]]) -> None:
        """Load the policy, then append rules the way a person does."""
        runner.execute(backend.load(policy()))
        shell(f"iptables-{backend.variant} -N theirs; ipset create other hash:ip")
        for text, version in typed:
            shell(f"{'ip6tables' if version == 6 else 'iptables'}-{backend.variant} -A FWC-s.sip {text}")

    def test_modelled(self, backend: Iptables) -> None:
        """Usual rules are read for what they are."""
        self.type_in(backend, self.TYPED)
        rules = listed(backend).chain("service.sip").rules

        for want in self.READ:
            assert meaning(want) in [meaning(r) for r in rules]
        assert not [m for r in rules for m in r.matches if isinstance(m, Unknown)]

    def test_unknown(self, backend: Iptables) -> None:
        """Anything else is marked as unknown, never guessed, and counts as a difference."""
        self.type_in(backend, [(text, 4) for text in self.ODD])
        rules = [r for r in listed(backend).chain("service.sip").rules if r.version == 4][-len(self.ODD) :]

        assert [text for text, r in zip(self.ODD, rules, strict=True) if not any(isinstance(m, Unknown) for m in r.matches)] == []

    def test_put_back(self, backend: Iptables) -> None:
        """An update takes typed rules out; where it fails half way, they come back exactly as they were typed."""
        self.type_in(backend, [*((text, 4) for text in self.ODD), self.TYPED[0], self.TYPED[2], *self.TYPED[5:]])
        before, live = everything(backend), listed(backend)
        ghost = Rule((InSet("source", "ghost.v6", 6),), Final.ACCEPT, "sip")
        aim = wanted(backend, policy())
        broken = replace(aim, chains=tuple(replace(c, rules=(*c.rules, ghost)) if c.name == "service.sip" else c for c in aim.chains))

        with pytest.raises(HostRefused, match="ghost6"):
            runner.execute(backend.update(live, broken, ()))
        assert before == everything(backend)
        runner.execute(backend.update(live, aim, ()))
        assert aim == replace(listed(backend), sets=aim.sets)


class TestUpdate:
    """From one ruleset to another."""

    def test_no_difference(self, backend: Iptables) -> None:
        """Same rules, same contents: nothing to do."""
        runner.execute(backend.load(policy()))

        assert tuple(backend.update(listed(backend), wanted(backend, policy()), ())) == ()

    def test_one_element(self, backend: Iptables) -> None:
        """A single prefix more or less is changed in the set itself."""
        runner.execute(backend.load(policy()))
        for old, new in ((CARRIERS, merged((*CARRIERS, (7, 7)))), (merged((*CARRIERS, (7, 7))), CARRIERS), (CARRIERS, CARRIERS[1:])):
            aim = wanted(backend, policy(carriers=new))
            ipset.change("fwc-carriers4", 4, old, ())
            steps = backend.update(listed(backend), aim, [change(aim, "carriers.v4", old, new)])
            runner.execute(steps)

            assert [Fill] == [type(s.do) for s in steps]
            assert new == ipset.read("fwc-carriers4")

    def test_many_elements(self, backend: Iptables) -> None:
        """More goes into a twin that is swapped in; the rules are not touched and no twin stays."""
        runner.execute(backend.load(policy()))
        new = merged((i << 8, i << 8) for i in range(2000))
        aim = wanted(backend, policy(carriers=new))
        rules = shell(f"iptables-{backend.variant}-save")
        steps = backend.update(listed(backend), aim, [change(aim, "carriers.v4", CARRIERS, new)])
        runner.execute(steps)

        assert new == ipset.read("fwc-carriers4")
        assert rules.split("\n")[1:-2] == shell(f"iptables-{backend.variant}-save").split("\n")[1:-2]
        assert "fwc-carriers4b" not in shell("ipset list -n")
        assert not [s for s in steps if isinstance(s.do, Command) and "restore" in s.do.argv[0]]

    def test_rules_with_content(self, backend: Iptables) -> None:
        """Where rules and content change, the rules move over to the twin; the next such change moves them back."""
        old = CARRIERS
        runner.execute(backend.load(policy()))
        for extra, new, name in ((1, ((1, 9), (99, 99)), "fwc-carriers4b"), (2, ((5, 5),), "fwc-carriers4")):
            sip = tuple(Rule((InRanges("source", 4, ((i << 9, i << 9),)),), Final.ACCEPT, "sip") for i in range(extra))
            aim = wanted(backend, policy(carriers=new, sip=sip))
            runner.execute(backend.update(listed(backend), aim, [change(aim, "carriers.v4", old, new)]))
            old = new

            assert new == ipset.read(name)
            assert aim == replace(listed(backend), sets=aim.sets)
            assert tuple(backend.update(listed(backend), aim, ())) == ()
            assert len(shell("ipset list -n").split()) == 4

    def test_failed_flip(self, backend: Iptables) -> None:
        """A flip that fails in IPv6 leaves the old set with its content in the old rules."""
        runner.execute(backend.load(policy()))
        before = everything(backend)
        sip = (Rule((InRanges("source", 4, ((5, 5),)),), Final.ACCEPT, "sip"), Rule((Family(6), ProtocolIs(50)), Final.ACCEPT, "sip"))
        aim = wanted(backend, policy(carriers=((1, 9),), sip=sip))
        steps = list(backend.update(listed(backend), aim, [change(aim, "carriers.v4", CARRIERS, ((1, 9),))]))
        place = next(i for i, s in enumerate(steps) if isinstance(s.do, Command) and s.do.argv[0].startswith("ip6tables"))
        broken = steps[place].do
        assert isinstance(broken, Command)
        steps[place] = replace(steps[place], do=replace(broken, stdin=broken.stdin.replace("-p 50", "-p no-such-protocol")))

        with pytest.raises(HostRefused):
            runner.execute(steps)
        assert before == everything(backend)
        assert ipset.read("fwc-carriers4") == CARRIERS

    def test_lost_jump(self, backend: Iptables) -> None:
        """A jump that somebody flushed away is put first again, one that is there twice is there once."""
        runner.execute(backend.load(policy()))
        aim = wanted(backend, policy())
        shell(f"iptables-{backend.variant} -F INPUT; iptables-{backend.variant} -A INPUT -s 192.0.2.9 -j DROP")
        shell(f"ip6tables-{backend.variant} -A INPUT -j FWC-input; ip6tables-{backend.variant} -A INPUT -i lo -j FWC-input")
        assert aim != replace(listed(backend), sets=aim.sets)
        runner.execute(backend.update(listed(backend), aim, ()))

        assert aim == replace(listed(backend), sets=aim.sets)
        assert shell(f"iptables-{backend.variant} -S INPUT").split("\n")[1:3] == [
            "-A INPUT -j FWC-input",
            "-A INPUT -s 192.0.2.9/32 -j DROP",
        ]
        assert shell(f"ip6tables-{backend.variant} -S INPUT").split("\n")[1:-1] == ["-A INPUT -j FWC-input"]

    def test_only_what_changed(self, backend: Iptables) -> None:
        """A rule of one family and chain touches this chain in this family and nothing else."""
        runner.execute(backend.load(policy()))
        aim = wanted(backend, policy(sip=(Rule((InRanges("source", 6, ((5, 5),)),), Final.ACCEPT, "sip"),)))
        steps = [s.do for s in backend.update(listed(backend), aim, ()) if s.do != Command(("true",))]

        assert [Command] == [type(s) for s in steps]
        assert isinstance(steps[0], Command)
        assert steps[0].argv[0].startswith("ip6tables")
        assert [line for line in steps[0].stdin.split("\n") if line.startswith(":")] == [":FWC-s.sip - [0:0]"]
        runner.execute([Step(s) for s in steps])
        assert aim == replace(listed(backend), sets=aim.sets)

    def test_counters_survive(self, backend: Iptables) -> None:
        """A rule that stays keeps what it has counted, also in a chain that is replaced; both families add up."""
        runner.execute(backend.load(policy()))
        shell(
            'ip link set lo up; python3 -c \'import socket; s = socket.socket(socket.AF_INET, 2); s.sendto(b"12345678", ("127.0.0.1", 9))\''
        )
        before = backend.counters(runner.outputs(backend.listing()))
        new = replace(
            policy(), chains=tuple(replace(c, rules=c.rules[:1] + c.rules[4:]) for c in policy().chains[:1]) + policy().chains[1:]
        )
        aim = wanted(backend, new)
        runner.execute(backend.update(listed(backend), aim, ()))
        after = backend.counters(runner.outputs(backend.listing()))

        assert before["loopback.accept"] >= (1, 36)
        assert before["loopback.accept"] == after["loopback.accept"]
        assert "invalid.drop" in before
        assert "block.drop" not in after

    def test_members_survive(self, backend: Iptables) -> None:
        """Dynamic members outlive every update; a set whose size changes is built anew with the time they had left."""
        runner.execute(backend.load(policy()))
        ipset.add_members("fwc-agents~4", 4, [(5, 1000), (6, None)])
        for ruleset, name in ((policy(sip=(Rule((Family(4),), Final.DROP, "sip"),)), "fwc-agents~4"), (policy(size=100), "fwc-agents~4b")):
            live = listed(backend)
            held = tuple((a, None if t is None else t * 1000) for a, t in ipset.members("fwc-agents~4"))
            live = replace(live, sets=tuple(replace(s, members=held) if s.dynamic else s for s in live.sets))
            aim = keeping_members(live, wanted(backend, ruleset))
            runner.execute(backend.update(live, aim, ()))
            (five, left), forever = ipset.members(name)

            assert aim == replace(listed(backend), sets=aim.sets)
            assert (five, forever) == (5, (6, None))
            assert 990 <= (left or 0) <= 1000
        assert "fwc-agents~4\n" not in shell("ipset list -n")

    def test_group_and_chain_gone(self, backend: Iptables) -> None:
        """Chains and sets that the policy no longer has are taken out, sets last."""
        runner.execute(backend.load(policy()))
        small = Ruleset((Chain("input", (Rule((), Final.DROP, "other"),), Hook("input", 0, "drop")),))
        aim = wanted(backend, small)
        runner.execute(backend.update(listed(backend), aim, ()))

        assert aim == listed(backend)
        assert shell("ipset list -n") == ""
        assert [x for x in shell(f"iptables-{backend.variant}-save").split("\n") if x.startswith(":FWC")] == [":FWC-input - [0:0]"]

    def test_leftovers(self, backend: Iptables) -> None:
        """A twin that a crash left behind, and a set of ours with a strange type, are found and cleared away."""
        runner.execute(backend.load(policy()))
        shell("ipset create fwc-carriers4b hash:net; ipset create fwc-odd list:set")
        live = listed(backend)
        assert live.others == ("set fwc-carriers4b", "set fwc-odd")
        aim = wanted(backend, policy(carriers=((1, 9),)))
        runner.execute(backend.update(live, aim, [change(aim, "carriers.v4", CARRIERS, ((1, 9),))]))

        assert ipset.read("fwc-carriers4") == ((1, 9),)
        assert aim == replace(listed(backend), sets=aim.sets)


class TestRemove:
    """Nothing of ours stays, nothing else changes."""

    def test_with_foreign_rules(self, backend: Iptables) -> None:
        """Rules, chains, policies and sets of others are byte for byte what they were, in their order."""
        foreign(backend)
        before = everything(backend)
        runner.execute(backend.load(policy()))
        assert before != everything(backend)
        runner.execute(backend.remove(listed(backend)))

        assert before == everything(backend)
        assert not listed(backend)

    def test_with_nothing_else(self, backend: Iptables) -> None:
        """A host without any table has none afterwards; only the legacy table, once used, stays registered and empty."""
        if backend.variant == "legacy":
            shell("iptables-legacy -nL; ip6tables-legacy -nL")
        before = everything(backend)
        runner.execute(backend.load(policy()))
        runner.execute(backend.remove(listed(backend)))

        assert before == everything(backend)

    def test_foreign_rules_that_came_later(self, backend: Iptables) -> None:
        """What others added around ours meanwhile stays."""
        with scratch() as other, other.entered():
            foreign(backend)
            alone = everything(backend)
        runner.execute(backend.load(policy()))
        foreign(backend)
        runner.execute(backend.remove(listed(backend)))

        assert alone == everything(backend)

    def test_race(self, backend: Iptables) -> None:
        """A rule that somebody adds between the listing and the removal is not taken out with an emptied table."""
        runner.execute(backend.load(policy()))
        live = listed(backend)
        shell(f"iptables-{backend.variant} -A FORWARD -s 192.0.2.9 -j DROP")
        before = everything(backend)
        if backend.variant == "nft":
            with pytest.raises(HostRefused):
                runner.execute(backend.remove(live))
            assert before == everything(backend)
        runner.execute(backend.remove(listed(backend)))

        assert "-A FORWARD -s 192.0.2.9/32 -j DROP" in everything(backend)
        assert "FWC" not in everything(backend)

    def test_after_updates(self, backend: Iptables) -> None:
        """A ruleset that has been updated, with twins in place, is removed as completely."""
        foreign(backend)
        before = everything(backend)
        runner.execute(backend.load(policy()))
        aim = wanted(backend, policy(carriers=((1, 9),), sip=(Rule((InRanges("source", 4, ((5, 5),)),), Final.ACCEPT, "sip"),)))
        runner.execute(backend.update(listed(backend), aim, [change(aim, "carriers.v4", CARRIERS, ((1, 9),))]))
        runner.execute(backend.remove(listed(backend)))

        assert before == everything(backend)


def everywhere(*, early: tuple[Rule, ...] = ()) -> Ruleset:
    """The policy with chains in every table: blocks dropped early, media untracked, and a chain that two tables lead to."""
    base = policy()
    udp = Rule((PortIn("destination", "udp", (5060, 5060)),), Goto("service.sip"))
    media = Rule((PortIn("source", "udp", (10000, 20000)),), Untrack())
    chains = (
        *base.chains,
        Chain("early", (Rule((InSet("source", "block.v4", 4),), Final.DROP, "block"), *early, udp), Hook("prerouting", -300, "accept")),
        Chain("media", (media, Rule((), Final.ACCEPT, "rtp")), Hook("output", -300, "accept")),
        Chain("marks", (Rule((PortIn("source", "udp", (5060, 5060)),), None),), Hook("postrouting", -150, "accept")),
        Chain("nat", (Rule((Interface("in", "eth0"),), Final.RETURN),), Hook("prerouting", -100, "accept", "nat")),
    )
    return replace(base, chains=chains)


class TestTables:
    """Chains in raw, mangle and nat beside those in filter."""

    def test_read_back(self, backend: Iptables) -> None:
        """Each table holds what its hook asks for, jumps first, a shared chain in both its tables; all of it is read back."""
        foreign(backend)
        assert list(backend.refuse(everywhere())) == []
        runner.execute(backend.load(everywhere()))
        live = listed(backend)

        names = {"INPUT", "raw/PREROUTING", "raw/OUTPUT", "mangle/POSTROUTING", "nat/PREROUTING"}
        assert {c.name: c.hook for c in live.chains if c.hook}.keys() == names
        assert live.chain("raw/service.sip").rules == live.chain("service.sip").rules
        assert live.chain("raw/media").rules == explicit(everywhere())["media"]
        assert not backend.update(live, wanted(backend, everywhere()), ())

    def test_lost_and_moved(self, backend: Iptables) -> None:
        """What somebody took out of another table is put back, first in its chain; filter is not touched for it."""
        runner.execute(backend.load(everywhere()))
        aim = wanted(backend, everywhere())
        shell(f"iptables-{backend.variant} -t raw -F PREROUTING; iptables-{backend.variant} -t raw -A PREROUTING -s 192.0.2.9 -j DROP")
        shell(f"ip6tables-{backend.variant} -t raw -F FWC-s.sip")
        steps = backend.update(listed(backend), aim, ())
        runner.execute(steps)

        assert [s.do.stdin.split("\n")[0] for s in steps if isinstance(s.do, Command)] == ["*raw", "*raw"]
        assert aim == replace(listed(backend), sets=aim.sets)
        assert shell(f"iptables-{backend.variant} -t raw -S PREROUTING").split("\n")[1] == "-A PREROUTING -j FWC-early"

    def test_failure_in_a_later_table(self, backend: Iptables) -> None:
        """Where a later table is refused, the earlier ones are as they were."""
        foreign(backend)
        before = everything(backend)
        ghost = Rule((InSet("source", "ghost.v6", 6),), Final.DROP, "block")

        with pytest.raises(HostRefused, match="ghost6"):
            runner.execute(backend.load(everywhere(early=(ghost,))))
        empty = r"^\*(raw|mangle|nat)\n(:\w+ ACCEPT \n)*COMMIT\n"  # what a legacy table once used, and an nft one, leave
        native = r"^table ip6? (raw|mangle|nat) \{\n(\tchain \w+ \{\n\t\t.*\n\t\}\n\n?)*\}\n"
        left, was = (re.sub(native, "", re.sub(empty, "", text, flags=re.M), flags=re.M) for text in (everything(backend), before))
        assert was == left

    def test_back_to_one_table(self, backend: Iptables) -> None:
        """Tables that a policy needs no more are left as they would be without us; their content goes before filter changes."""
        runner.execute(backend.load(everywhere()))
        aim = wanted(backend, policy())
        steps = backend.update(listed(backend), aim, ())
        runner.execute(steps)

        assert aim == replace(listed(backend), sets=aim.sets)
        saved = re.findall(r"^\*(\w+)", shell(f"iptables-{backend.variant}-save"), re.M)
        assert set(saved) == ({"filter"} if backend.variant == "nft" else {"filter", "raw", "mangle", "nat"})
        assert not backend.update(listed(backend), aim, ())

    def test_remove(self, backend: Iptables) -> None:
        """Removal leaves no trace in any table, whether others use them or not; in theirs at most an empty built-in chain."""
        tables = "for t in raw mangle nat filter; do for p in iptables ip6tables; do $p-legacy -t $t -nL; done; done"
        if backend.variant == "legacy":
            shell(tables)
        before = everything(backend)
        runner.execute(backend.load(everywhere()))
        runner.execute(backend.remove(listed(backend)))
        assert before == everything(backend)

        shell(f"iptables-{backend.variant} -t raw -A PREROUTING -s 192.0.2.9 -j ACCEPT")
        shell(f"iptables-{backend.variant} -t raw -A OUTPUT -j DROP; iptables-{backend.variant} -t raw -F OUTPUT")
        before = everything(backend)
        runner.execute(backend.load(everywhere()))
        runner.execute(backend.remove(listed(backend)))
        assert before == everything(backend)

    def test_reading_registers_nothing(self, backend: Iptables) -> None:
        """Listing a host that uses one table only makes no other one."""
        shell(f"iptables-{backend.variant} -A INPUT -j ACCEPT")
        before = everything(backend)
        listed(backend)

        assert before == everything(backend)
