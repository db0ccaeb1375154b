"""Names, texts and refusals of the iptables backends, without a kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fwcompiler_iptables import legacy, nft
from fwcompiler_iptables.parse import tokenize
from fwcompiler_iptables.render import neutral_set, quote, set_name, sets_text, specs
from fwcompiler_iptables.tables import BUILT_IN, chain_name, hook_of, neutral_chain, table_of
from hypothesis import given
from hypothesis import strategies as st

from fwcompiler.addresses import LAST
from fwcompiler.backend import Backend, Command, Fill, SetChange
from fwcompiler.diagnostics import Position
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
    Match,
    PortIn,
    ProtocolIs,
    Rule,
    Ruleset,
    StateIn,
    TypeIn,
    Unknown,
    Untrack,
)

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,19}", fullmatch=True)
AT = Position("policy.yaml", 7, 3)


def ruleset(*matches: Match, verdict: Final = Final.ACCEPT, log_prefix: str = "") -> Ruleset:
    """One base chain with one rule."""
    rule = Rule(matches, verdict, "sip", log_prefix, AT)
    return Ruleset((Chain("input", (rule,), Hook("input", 0, "drop")),))


class TestNames:
    """Kernel names are short enough and can be read back."""

    @given(NAMES, st.sampled_from(("", ".dynamic")), st.sampled_from((4, 6)), st.sampled_from(("", "b")))
    def test_sets(self, name: str, kind: str, version: int, slot: str) -> None:
        """A set's name, family and slot come back from its kernel name, which fits into 31 characters."""
        neutral = f"{name}{kind}.v{version}"
        kernel = set_name(neutral, slot)

        assert neutral_set(kernel) == (neutral, version, slot)
        assert len(kernel) <= 31
        assert kernel.startswith("fwc-")

    @given(NAMES, st.sampled_from(("", "service.", "early.")))
    def test_chains(self, name: str, kind: str) -> None:
        """A chain's name comes back from its kernel name, which fits into 28 characters."""
        assert neutral_chain(chain_name(kind + name)) == kind + name
        assert len(chain_name(kind + name)) <= 28

    @given(st.from_regex(r"FWC-[A-Za-z0-9._-]{0,24}", fullmatch=True))
    def test_any_kernel_chain(self, kernel: str) -> None:
        """Every chain with our prefix, also one that fwc never makes, has a neutral name of its own in every table."""
        names = {table: neutral_chain(kernel, table) for table in BUILT_IN}

        assert {chain_name(name) for name in names.values()} == {kernel}
        assert len(set(names.values())) == len(BUILT_IN)

    def test_hooks(self) -> None:
        """Every built-in chain of every table has a hook of its own, and the hook leads back to the table."""
        hooks = {(table, chain): hook_of(table, chain) for table, chains in BUILT_IN.items() for chain in chains.values()}

        assert len(set(hooks.values())) == 14
        assert all(hook and table_of(hook) == table for (table, _), hook in hooks.items())
        assert hook_of("raw", "INPUT") is None
        assert table_of(Hook("prerouting", 0)) is None

    def test_not_ours(self) -> None:
        """A set name that fwc would not choose is not translated."""
        assert [neutral_set(name) for name in ("fwc-x", "fwc-4", "fwc-a4d", "theirs4", "fwc-a~b4")] == [None] * 5


class TestTexts:
    """Rules and sets as text."""

    @given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=30))
    def test_quoting(self, text: str) -> None:
        """What is quoted is read back as one argument."""
        assert tokenize(f"a {quote(text)} b") == ["a", text, "b"]

    def test_order(self) -> None:
        """Options stand in the order in which the kernel lists them, whatever the order of the matches."""
        rule = Rule(
            (
                StateIn(frozenset(("new",))),
                PortIn("destination", "udp", (1, 2)),
                Interface("in", "eth0"),
                InRanges("source", 4, ((16, 31),)),
            ),
            Final.DROP,
            "sip",
        )

        assert specs(rule, 4, {}) == [
            "-s 0.0.0.16/28 -i eth0 -p udp -m conntrack --ctstate NEW -m udp --dport 1:2 -m comment --comment sip -j DROP"
        ]

    def test_slots(self) -> None:
        """A set in its other slot is named by the name it has there."""
        rule = Rule((InSet("source", "a.v4", 4),), Goto("service.sip"))

        assert specs(rule, 4, {"a.v4": "b"}) == ["-m set --match-set fwc-a4b src -g FWC-s.sip"]

    def test_families(self) -> None:
        """A rule of one family is in that family's file only, one of none in both, one of two in neither."""
        rules = (
            Rule((Family(4),), Final.ACCEPT, "four"),
            Rule((), Final.DROP, "both"),
            Rule((Family(6), InSet("source", "a.v4", 4)), Final.DROP, "never"),
        )
        files = nft.render(Ruleset((Chain("input", rules, Hook("input")),))).files

        assert [[word in files[name] for word in ("four", "both", "never")] for name in ("fwc.v4", "fwc.v6")] == [
            [True, True, False],
            [False, True, False],
        ]

    def test_policy_is_a_rule(self) -> None:
        """A base chain that drops by policy ends in a rule that drops: a chain of ours cannot have a policy."""
        text = nft.render(ruleset(InRanges("source", 4, ((1, 1),)))).files["fwc.v4"]

        assert text.splitlines()[-3:] == ["-A FWC-input -j DROP", "-I INPUT 1 -j FWC-input", "COMMIT"]

    def test_sets(self) -> None:
        """Sets are created at the size they need; a whole family is its two halves."""
        text = sets_text(Ruleset((), (AddressSet("all.v6", 6, ((0, LAST[6]),)), AddressSet("d.dynamic.v4", 4, timeout=60, size=10))))

        assert text.splitlines() == [
            "create fwc-all6 hash:net family inet6 hashsize 64 maxelem 16777216",
            "add fwc-all6 ::/1",
            "add fwc-all6 8000::/1",
            "create fwc-d~4 hash:ip family inet hashsize 64 maxelem 10 timeout 60",
        ]

    def test_same_bytes(self) -> None:
        """The same ruleset gives the same text, whatever order a set of states has in memory."""
        states = StateIn(frozenset(("new", "related", "established", "untracked")))

        assert nft.render(ruleset(states)) == legacy.render(ruleset(states))
        assert "--ctstate ESTABLISHED,NEW,RELATED,UNTRACKED" in nft.render(ruleset(states)).files["fwc.v6"]


class TestTables:
    """Chains in the tables that their hooks ask for."""

    BOTH = Ruleset(
        (
            Chain("service.sip", (Rule((), Final.DROP, "sip"),)),
            Chain("service.ssh", (Rule((), Final.ACCEPT, "ssh"),)),
            Chain("early", (Rule((PortIn("destination", "udp", (5060, 5060)),), Goto("service.sip")),), Hook("prerouting", -300, "accept")),
            Chain("input", (Rule((), Goto("service.sip")), Rule((), Goto("service.ssh"))), Hook("input")),
        )
    )

    def test_placed(self) -> None:
        """A chain that two tables lead to is in both, one that one leads to in this one only; filter comes first."""
        filtering, raw = nft.render(self.BOTH).files["fwc.v4"].split("COMMIT\n")[:2]

        assert filtering.startswith("*filter\n:FWC-input")
        assert raw.splitlines() == [
            "*raw",
            ":FWC-early - [0:0]",
            ":FWC-s.sip - [0:0]",
            "-A FWC-early -p udp -m udp --dport 5060 -g FWC-s.sip",
            "-A FWC-s.sip -m comment --comment sip -j DROP",
            "-I PREROUTING 1 -j FWC-early",
        ]

    def test_order(self) -> None:
        """Loading changes filter before the rest; a table that goes altogether goes before filter changes, and so on removal."""
        fewer = replace(self.BOTH, chains=(*self.BOTH.chains[:2], replace(self.BOTH.chains[3], rules=self.BOTH.chains[3].rules[1:])))
        orders = [
            [s.do.stdin.split("\n")[0] for s in steps if isinstance(s.do, Command) and "--noflush" in s.do.argv]
            for steps in (legacy.load(self.BOTH), legacy.update(self.BOTH, fewer, ()), legacy.remove(self.BOTH))
        ]

        assert orders == [
            ["*filter", "*filter", "*raw", "*raw"],
            ["*raw", "*raw", "*filter", "*filter"],
            ["*raw", "*raw", "*filter", "*filter"],
        ]


class TestRefuse:
    """What iptables would wrap, widen or cut is refused with the policy's line."""

    @pytest.mark.parametrize(
        ("match", "word"),
        [
            (PortIn("destination", "tcp", (99999, 99999)), "ports 99999"),
            (PortIn("destination", "tcp", (5, 4)), "ports 5-4"),
            (PortIn("destination", "sctp", (5, 5)), "sctp"),
            (PortIn("destination", "tcp", (5, 5), negated=True), "negated port"),
            (ProtocolIs(0), "every protocol"),
            (ProtocolIs(300), "protocol 300"),
            (ProtocolIs(51), "extension header"),
            (TypeIn(4, (3, 255)), "every type"),
            (StateIn(frozenset()), "empty list of states"),
            (Limit(3000, "second", 5), "one per cent"),
            (Limit(0, "second", 5), "one per cent"),
            (Limit(5, "second", 10_001), "burst"),
            (Limit(1, "day", 100), "burst"),
            (Interface("in", "eth+"), "eth+"),
            (Interface("in", "a-name-of-sixteen"), "a-name"),
            (Interface("in", "eth 0"), "eth 0"),
            (InSet("source", "carriers", 4), "carriers"),
            (InSet("source", "carriers.v4", 6), "carriers.v4"),
            (InRanges("source", 4, ((0, 1 << 32),)), "outside its family"),
            (Unknown("-m time"), "-m time"),
        ],
    )
    def test_matches(self, match: Match, word: str) -> None:
        """A match that iptables cannot hold exactly."""
        (finding,) = nft.refuse(ruleset(match))

        assert word in finding.message
        assert (finding.at, finding.code) == (AT, "value")

    def test_combinations(self) -> None:
        """Matches that only together are too much."""
        limit, two = Limit(5, "second", 5), InRanges("source", 4, ((1, 1), (3, 3)))
        for matches, word in (
            ((PortIn("source", "udp", (5, 5)), PortIn("source", "tcp", (5, 5))), "one protocol a rule"),
            ((Interface("in", "a"), Interface("in", "b")), "one interface"),
            ((TypeIn(4, (3, 8)), limit), "split it"),
            ((limit, two), "split it"),
        ):
            assert word in nft.refuse(ruleset(*matches))[0].message
        assert "split it" in nft.refuse(ruleset(limit, log_prefix="x"))[0].message
        assert "29 characters" in nft.refuse(ruleset(log_prefix="x" * 30))[0].message
        assert "cannot take" in nft.refuse(ruleset(log_prefix="x\ny"))[0].message

    def test_names(self) -> None:
        """Sets and chains that have no kernel name, and hooks without a chain."""
        sets = (
            AddressSet("a" * 30 + ".v4", 4),
            AddressSet("odd", 4),
            AddressSet("a.v6", 4),
            AddressSet("t.v4", 4, timeout=1 << 31, size=0),
        )
        chains = (
            Chain("INPUT", ()),
            Chain("s.x", ()),
            Chain("FWC-x", ()),
            Chain("c" * 26, ()),
            Chain("pre", (), Hook("prerouting", -299)),
        )

        assert len(nft.refuse(Ruleset((), sets))) == 5
        assert [f.code for f in nft.refuse(Ruleset(chains))] == ["name", "name", "name", "name", "value"]

    def test_tables(self) -> None:
        """What a table cannot do is refused with the policy's line, and so is a hook that no table has."""
        drop, untrack = Rule((), Final.DROP, origin=AT), Rule((), Untrack(), origin=AT)
        for rule, hook, word in (
            (drop, Hook("prerouting", -100, "accept", "nat"), "cannot drop in table nat"),
            (Rule((), Final.REJECT, origin=AT), Hook("prerouting", -300, "accept"), "cannot reject in table raw"),
            (untrack, Hook("input"), "in table raw only"),
            (drop, Hook("prerouting", -200, "accept"), "no chain at hook prerouting with priority -200"),
            (drop, Hook("output", -150, "accept", "filter"), "no chain at hook output"),
        ):
            finding = nft.refuse(Ruleset((Chain("x", (rule,), hook),)))[0]
            assert word in finding.message
            assert finding.at == AT
        assert not nft.refuse(Ruleset((Chain("x", (untrack, drop), Hook("output", -300, "accept")),)))

    def test_nothing_to_say(self) -> None:
        """An ordinary ruleset is not refused, nor the form in which a kernel gives one back."""
        back = Chain("INPUT", (Rule((Family(4),), Jump("input")),), Hook("input", 0, "accept"))
        chain = Chain("service.sip", (Rule((InSet("source", "carriers.v4", 4), Limit(60, "minute", 5)), Final.REJECT, "sip"),))

        assert list(nft.refuse(Ruleset((back, chain), (AddressSet("carriers.v4", 4),)))) == []


class TestSteps:
    """What an update consists of, as data."""

    BASE = Ruleset((Chain("input", (Rule((InSet("source", "a.v4", 4),), Final.ACCEPT, "x"),)),), (AddressSet("a.v4", 4, ((1, 1),)),))

    def test_shape(self) -> None:
        """Both variants have the shape of a backend and differ in their programs only."""
        assert isinstance(nft, Backend)
        assert isinstance(legacy, Backend)
        assert {p for p in nft.programs if "nft" in p} | {"ipset"} == set(nft.programs)
        assert (nft.name, legacy.name) == ("iptables-nft", "iptables-legacy")

    def test_one_prefix(self) -> None:
        """One prefix more is one fill, whose undo is the opposite."""
        wanted = AddressSet("a.v4", 4, ((1, 1), (16, 31)))
        (step,) = nft.update(self.BASE, replace(self.BASE, sets=(wanted,)), [SetChange(wanted, ((16, 31),), ())])

        assert step.do == Fill("ipset", "fwc-a4", 4, ((16, 31),), ())
        assert step.undo == (Fill("ipset", "fwc-a4", 4, (), ((16, 31),)),)

    def test_undo_of_a_swap(self) -> None:
        """More is a twin, filled, swapped and destroyed; the undo of the destruction knows the old content."""
        wanted = AddressSet("a.v4", 4, ((16, 31), (64, 64)))
        steps = nft.update(self.BASE, replace(self.BASE, sets=(wanted,)), [SetChange(wanted, wanted.ranges, ((1, 1),))])
        swap = Command(("ipset", "swap", "fwc-a4b", "fwc-a4"))

        assert [s.do for s in steps[1:4]] == [
            Fill("ipset", "fwc-a4b", 4, wanted.ranges),
            swap,
            Command(("ipset", "destroy", "fwc-a4b"), missing_ok=True),
        ]
        assert steps[2].undo == (swap,)
        assert steps[3].undo[1] == Fill("ipset", "fwc-a4b", 4, ((1, 1),))

    def test_origins(self) -> None:
        """A line that iptables refuses can be traced to the policy."""
        steps = nft.load(ruleset(InRanges("source", 4, ((1, 1),))))
        command = steps[0].do
        assert isinstance(command, Command)
        (line,) = command.origins

        assert "-s 0.0.0.1" in command.stdin.split("\n")[line - 1]
        assert command.origins[line] == AT
