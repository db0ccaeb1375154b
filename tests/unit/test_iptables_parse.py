"""Reading `iptables-save` and `ipset list -t`, without a kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fwcompiler_iptables import legacy, nft
from fwcompiler_iptables.parse import ALONE, parse_listing, tokenize
from hypothesis import given
from hypothesis import strategies as st

from fwcompiler.backend import Command, SetChange
from fwcompiler.ruleset import (
    AddressSet,
    Chain,
    Family,
    Final,
    Goto,
    Hook,
    InRanges,
    InSet,
    Jump,
    Limit,
    PortIn,
    ProtocolIs,
    Rule,
    TypeIn,
    Unknown,
    Untrack,
)

SETS = """Name: fwc-carriers4
Type: hash:net
Revision: 7
Header: family inet hashsize 64 maxelem 16777216 bucketsize 12 initval 0x2c0f9755
Size in memory: 504
References: 0
Number of entries: 1

Name: fwc-agents~6
Type: hash:ip
Revision: 6
Header: family inet6 hashsize 1024 maxelem 4096 timeout 43200 bucketsize 12 initval 0x59fcbbe1
Size in memory: 216
References: 0
Number of entries: 0
"""


def save(*lines: str, policy: str = "ACCEPT") -> str:
    """One family's listing with these lines in table filter, among other tables."""
    chains = sorted({line.split("-A ")[1].split()[0] for line in lines if "-A FWC-" in line})
    head = [f":{chain} - [0:0]" for chain in chains]
    other = ["*nat", ":DOCKER - [0:0]", "[0:0] -A DOCKER -j ACCEPT", "COMMIT", "*security", ":FWC-x - [0:0]", "COMMIT"]
    return "\n".join(("# Generated", *other, "*filter", f":INPUT {policy} [5:60]", ":FORWARD ACCEPT [0:0]", *head, *lines, "COMMIT", ""))


def one(line: str, version: int = 4) -> Rule:
    """The rule that one line of a chain of ours is read as."""
    texts = [save(f"[0:0] -A FWC-x {line}") if version == v else "" for v in (4, 6)]
    (rule,) = parse_listing(texts, SETS).chains[0].rules
    return rule


class TestRules:
    """Lines of our chains."""

    @pytest.mark.parametrize(
        ("line", "rule"),
        [
            ("-p vrrp -g FWC-s.vrrp", Rule((Family(4), ProtocolIs(112)), Goto("service.vrrp"))),
            ("-p 112 -j FWC-x", Rule((Family(4), ProtocolIs(112)), Jump("x"))),
            ("-p udp -m udp --sport 53 -j ACCEPT", Rule((Family(4), PortIn("source", "udp", (53, 53))), Final.ACCEPT)),
            ("-p tcp -m tcp -j ACCEPT", Rule((Family(4), ProtocolIs(6)), Final.ACCEPT)),
            ("-p tcp -m tcp --dport 1024: -j ACCEPT", Rule((Family(4), PortIn("destination", "tcp", (1024, 65535))), Final.ACCEPT)),
            ("-d 10.0.0.0/255.255.255.0 -j DROP", Rule((InRanges("destination", 4, ((0x0A000000, 0x0A0000FF),)),), Final.DROP)),
            ("-s 0.0.0.0 -j DROP", Rule((InRanges("source", 4, ((0, 0),)),), Final.DROP)),
            ("-p icmp -m icmp --icmp-type ping -j ACCEPT", Rule((TypeIn(4, (8,)),), Final.ACCEPT)),
            ("-m limit --limit 3/hour -j RETURN", Rule((Family(4), Limit(3, "hour", 5)), Final.RETURN)),
            ("-m comment --comment -j -j DROP", Rule((Family(4),), Final.DROP, "-j")),
            ('-m comment --comment "say \\"hi\\" -m x" -j DROP', Rule((Family(4),), Final.DROP, 'say "hi" -m x')),
            ("", Rule((Family(4),))),
            ("-j CT --notrack", Rule((Family(4),), Untrack())),
            ("-j NOTRACK", Rule((Family(4),), Untrack())),
            ("-m set ! --match-set fwc-carriers4 dst", Rule((InSet("destination", "carriers.v4", 4, negated=True),))),
        ],
    )
    def test_modelled(self, line: str, rule: Rule) -> None:
        """A line is read for what it is."""
        assert one(line) == rule

    @pytest.mark.parametrize(
        ("line", "unknown"),
        [
            ("-p tcp -m tcp --dport 80 --tcp-flags SYN SYN -j DROP", "-m tcp --tcp-flags SYN SYN"),
            ("-p tcp -m multiport --dports 1,2:4 -j DROP", "-m multiport --dports 1,2:4"),
            ("! -f -j DROP", "! -f"),
            ("-i eth+ -j DROP", "-i eth+"),
            ("-p no-such -j DROP", "-p no-such"),
            ("-s 10.0.3.0/255.0.255.0 -j DROP", "-s 10.0.3.0/255.0.255.0"),
            ("-j NFLOG --nflog-prefix 'a b'", "-j NFLOG --nflog-prefix 'a \"b'\""),
            ("-j docker", "-j docker"),
            ("-g docker", "-g docker"),
            ("-j REJECT --reject-with tcp-reset", "--reject-with tcp-reset"),
            ("-j LOG --log-prefix x --log-level 7", "-j LOG --log-prefix x --log-level 7"),
            ("-m set --match-set fwc-agents~6 src -j DROP", "-m set --match-set fwc-agents~6 src"),
            ("-m set --match-set fwc-carriers4 src,dst -j DROP", "-m set --match-set fwc-carriers4 src,dst"),
            ("-m set --match-set fwc-carriers4 src --return-nomatch -j DROP", "-m set --match-set fwc-carriers4 src --return-nomatch"),
            ("-m conntrack --ctstate NEW,SNAT -j DROP", "-m conntrack --ctstate NEW,SNAT"),
            ("-p icmp -m icmp ! --icmp-type 3 -j DROP", "-m icmp ! --icmp-type 3"),
            ("-m limit --limit 3/fortnight -j DROP", "-m limit --limit 3/fortnight"),
            ("-m", "-m"),
            ("--new-option 5 -j ACCEPT", "--new-option 5 -j ACCEPT"),
        ],
    )
    def test_unknown(self, line: str, unknown: str) -> None:
        """What the neutral types cannot hold is kept as text, next to what they can."""
        texts = [m.text for m in one(line).matches if isinstance(m, Unknown)]

        assert len(texts) == 1
        assert tokenize(texts[0])[:3] == tokenize(unknown)[:3]

    def test_order_of_families(self) -> None:
        """A chain's rules are those of IPv4, then those of IPv6."""
        texts = (save("[1:2] -A FWC-x -j DROP"), save("[3:4] -A FWC-x -j ACCEPT"))
        (chain,) = parse_listing(texts, "").chains

        assert chain == Chain("x", (Rule((Family(4),), Final.DROP), Rule((Family(6),), Final.ACCEPT)))
        assert [r.count for r in chain.rules] == [(1, 2), (3, 4)]

    @given(st.text(max_size=40))
    def test_any_text(self, text: str) -> None:
        """No line of a listing, however odd, ends in a crash, and none in our chains is passed over."""
        line = text.translate({ord(c): " " for c in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"})
        (rule,) = parse_listing((save(f"[0:0] -A FWC-x {line}"), ""), "").chains[0].rules

        assert rule.version == 4


class TestAround:
    """What is not in our chains."""

    def test_jumps(self) -> None:
        """Of the built-in chains only the jumps to ours are seen, as often as they are there."""
        lines = ("[0:0] -A INPUT -s 1.1.1.1/32 -j ACCEPT", "[0:0] -A INPUT -j FWC-x", "[0:0] -A INPUT -j FWC-x", "[0:0] -A FWC-x -j DROP")
        ruleset = parse_listing((save(*lines), ""), "")

        assert ruleset.chains[0].rules == (Rule((Family(4),), Jump("x")),) * 2
        assert [c.name for c in ruleset.chains] == ["INPUT", "x"]

    def test_alone(self) -> None:
        """A table with nobody else's rule, chain or policy is marked on our jump; the mark is no part of equality."""
        jump, rule = "[0:0] -A INPUT -j FWC-x", "[0:0] -A FWC-x -j DROP"
        origins = [
            parse_listing((text, ""), "").chains[0].rules[0].origin
            for text in (save(jump, rule), save(jump, rule, policy="DROP"), save(jump, rule, "[0:0] -A FORWARD -j DROP"))
        ]

        assert [o.file if o else None for o in origins] == [ALONE, None, None]

    def test_tables(self) -> None:
        """Chains of one name in several tables are chains of their own, and so are the built-in chains that lead to them."""
        raw = "*raw\n:PREROUTING ACCEPT [0:0]\n:FWC-x - [0:0]\n[1:2] -A PREROUTING -j FWC-x\n[0:0] -A FWC-x -g FWC-s.a\nCOMMIT\n"
        filtering = save("[0:0] -A INPUT -j FWC-x", "[3:4] -A FWC-x -j DROP")
        ruleset = parse_listing((raw + filtering, ""), "")

        assert {c.name: c.hook for c in ruleset.chains if c.hook} == {
            "INPUT": Hook("input", 0, "accept"),
            "raw/PREROUTING": Hook("prerouting", -300, "accept"),
        }
        assert ruleset.chain("raw/PREROUTING").rules == (Rule((Family(4),), Jump("raw/x")),)
        assert ruleset.chain("raw/x").rules == (Rule((Family(4),), Goto("raw/service.a")),)
        assert ruleset.chain("x").rules == (Rule((Family(4),), Final.DROP),)

    def test_nothing(self) -> None:
        """No output at all, and tables without anything of ours, are an empty ruleset."""
        assert not parse_listing(("", ""), "")
        assert not parse_listing((save("[0:0] -A INPUT -j DROP"), save()), "Name: theirs\nType: hash:ip\nHeader: family inet\n")

    def test_sets(self) -> None:
        """Sets are read with what fwc chose for them; those with our prefix that it did not make are named."""
        odd = SETS + "\nName: fwc-a4\nType: hash:net\nHeader: family inet hashsize 64 maxelem 9 counters\n"
        ruleset = parse_listing(("", ""), odd)

        assert ruleset.sets == (AddressSet("agents.dynamic.v6", 6, timeout=43200, size=4096), AddressSet("carriers.v4", 4))
        assert [s.kernel_name for s in ruleset.sets] == ["fwc-agents~6", "fwc-carriers4"]
        assert ruleset.others == ("set fwc-a4",)

    @pytest.mark.parametrize(("matched", "slot", "left"), [("", "", "fwc-carriers4b"), ("b", "b", "fwc-carriers4")])
    def test_twins(self, matched: str, slot: str, left: str) -> None:
        """Of two twins the one that rules match is the set."""
        sets = SETS + "\n" + SETS.split("\n\n", maxsplit=1)[0].replace("carriers4", "carriers4b")
        ruleset = parse_listing((save(f"[0:0] -A FWC-x -m set --match-set fwc-carriers4{matched} src -j DROP"), ""), sets)

        assert [s.slot for s in ruleset.sets if s.name == "carriers.v4"] == [slot]
        assert ruleset.others == (f"set {left}",)
        assert ruleset.chains[0].rules[0].matches == (InSet("source", "carriers.v4", 4),)

    def test_both_twins_in_use(self) -> None:
        """A crash between two tables leaves rules that match either twin: the second is a set of its own, and goes when the rules do."""
        sets = SETS + "\n" + SETS.split("\n\n", maxsplit=1)[0].replace("carriers4", "carriers4b")
        lines = [f"[0:0] -A FWC-{chain} -m set --match-set fwc-carriers4{slot} src -j DROP" for chain, slot in (("x", ""), ("y", "b"))]
        ruleset = parse_listing((save(*lines), ""), sets)
        wanted = replace(
            ruleset,
            sets=tuple(replace(s, ranges=((1, 1),)) for s in ruleset.sets if ".twin." not in s.name),
            chains=tuple(replace(c, rules=ruleset.chains[0].rules) for c in ruleset.chains),
        )
        change = SetChange(next(s for s in wanted.sets if s.name == "carriers.v4"), ((1, 1),), ())
        does = [step.do for step in nft.update(ruleset, wanted, (change,))]
        sent = [" ".join(do.argv) for do in does if isinstance(do, Command)]

        assert [(s.name, s.kernel_name) for s in ruleset.sets[1:]] == [
            ("carriers.twin.v4", "fwc-carriers4b"),
            ("carriers.v4", "fwc-carriers4"),
        ]
        assert ruleset.others == ()
        assert "fwc-carriers4c" in sent[0]
        assert sent[-2:] == ["ipset destroy fwc-carriers4", "ipset destroy fwc-carriers4b"]

    def test_counters(self) -> None:
        """A counter is the sum of the rules of both families that have its service and verdict."""
        line = "-A FWC-x -m comment --comment sip -j ACCEPT"
        outputs = (save(f"[1:10] {line}", f"[2:20] {line}", "[9:9] -A FWC-x -j DROP"), save(f"[4:40] {line}"), "")

        assert nft.counters(outputs) == legacy.counters(outputs) == {"sip.accept": (7, 70)}
