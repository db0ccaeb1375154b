"""Counter-examples in words: the smallest readable box, a packet, the policy's line and the rule that decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from property.strategies import resolved

from fwcompiler.lower import lower
from fwcompiler.proof.describe import CounterExample, counter_examples
from fwcompiler.proof.meaning import clauses
from fwcompiler.proof.prove import prove
from fwcompiler.ruleset import Chain, Final, InSet, Limit, Rule, Ruleset

POLICY: dict[str, Any] = {
    "version": 1,
    "groups": {
        "carriers": ["198.51.100.16/28"],
        "agents": {"members": ["203.0.113.0/24"], "dynamic": {"timeout": "1h", "max": 8}},
        "bad": ["198.18.0.0/15", "192.0.2.0/24"],
    },
    "block": {"from": ["bad"]},
    "services": {"sip": {"from": ["carriers", "agents"]}, "rtp": {"from": "anywhere"}},
}


def found(change: Any, document: dict[str, Any] = POLICY) -> list[CounterExample]:
    """What is said of the compiled policy with every rule sent through `change`, which returns the rules in its place."""
    policy = resolved(document)
    ruleset = lower(policy)
    chains = tuple(Chain(c.name, tuple(r for rule in c.rules for r in change(c.name, rule)), c.hook) for c in ruleset.chains)
    changed = replace(ruleset, chains=chains)
    return list(counter_examples(prove(clauses(policy), changed), policy, changed))


def without(name: str) -> Any:
    """Rules less those that look into a set."""
    return lambda _, rule: [] if any(isinstance(m, InSet) and m.set == name for m in rule.matches) else [rule]


def test_a_group_is_named() -> None:
    """Sources that are a group are called by its name; policy line, rule and packet are there."""
    (one,) = found(without("carriers.v4"))

    assert one.packets.startswith("from carriers (198.51.100.16/28) to udp/5060, ")
    assert one.policy == "accept: sip names the source: 198.51.100.16 is in carriers (198.51.100.16/28, policy.yaml:4:5) (policy.yaml:18:3)"
    assert one.kernel == "drops them in chain early.sip: for this host: drop (sip)"
    assert str(one).endswith("for example 198.51.100.16 -> udp/5060, new, in eth0")


def test_members_at_run_time_are_told() -> None:
    """A difference that only members of a dynamic set meet says so, and the policy's side counts the source as a member."""
    told = [e for e in found(without("agents.dynamic.v6")) if e.packet.version == 6]

    assert told
    for each in told:
        assert "source is a dynamic member of agents" in each.packets
        assert each.policy.startswith("accept: sip names the source")
        assert each.kernel.startswith("drops them in chain early.sip")


def test_most_addresses_are_told_by_what_is_missing() -> None:
    """Where nearly everybody is meant, the few who are not are named."""
    first = found(lambda name, rule: [Rule((), Final.ACCEPT), rule] if name == "service.sip" and rule.verdict == Final.DROP else [rule])[0]

    assert first.packets.startswith("from any IPv4 address but agents (203.0.113.0/24), carriers (")
    assert first.kernel == "accepts them in chain service.sip: everything: accept"


def test_the_plainest_comes_first() -> None:
    """Of several boxes the first says no more than who and where; what hangs on members at run time comes behind."""
    document = {**POLICY, "services": {**POLICY["services"], "ssh": {"from": ["carriers"]}}}
    told = found(lambda name, rule: [Rule((), Final.ACCEPT), rule] if name == "service.ssh" else [rule], document)
    first, *others = [e.packets for e in told if e.packet.version == 4]

    assert first == "from any IPv4 address but bad (192.0.2.0/24, 198.18.0.0/15), carriers (198.51.100.16/28) to tcp/22"
    assert [text for text in others if "dynamic member" in text]


def test_an_exhausted_limit_is_told() -> None:
    """A ping that is answered although the limit is exhausted is a difference, and its policy side is the end of the policy."""

    def unlimited(_: str, rule: Rule) -> list[Rule]:
        return [replace(rule, matches=tuple(m for m in rule.matches if not isinstance(m, Limit)))]

    told = [e for e in found(unlimited) if e.packet.version == 4 and e.packet.protocol == 1]

    assert told
    for each in told:
        assert "while the limit 20/second burst 40 is exhausted" in each.packets
        assert each.policy == "drop: no service covers it"
        assert each.packet.icmp_type == 8


def test_ports_stand_with_protocols_that_have_them() -> None:
    """Of protocols without ports no port is said, and of all others together no list of numbers."""
    told = found(lambda _, rule: [replace(rule, verdict=Final.ACCEPT)] if rule.service == "other" else [rule])

    texts = [e.packets for e in told]
    assert any("tcp, " in t and "other protocols" in t for t in texts)
    assert not [t for t in texts if "protocols 0" in t or "vrrp/" in t or "icmp/5" in t]


def test_without_rules_of_ours() -> None:
    """Where packets meet no chain of ours there is no rule to name, and that is said."""
    policy = resolved(POLICY)
    first = next(iter(counter_examples(prove(clauses(policy), Ruleset()), policy, Ruleset())))

    assert first.kernel == "accepts them: they meet no rule of ours"


@pytest.mark.parametrize("kind", [135, 143])
def test_the_example_is_one_that_can_be(kind: int) -> None:
    """Connection tracking leaves neighbour discovery alone: an example of it is untracked, never new."""

    def lost(_: str, rule: Rule) -> list[Rule]:
        return [] if any(getattr(m, "types", ()) == (kind,) for m in rule.matches) else [rule]

    told = found(lost)

    assert told
    assert {(e.packet.icmp_type, e.packet.state) for e in told} == {(kind, "untracked")}
