"""Readings of other people's rules that once were wrong, or that both languages have to name alike."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from fwcompiler_iptables.foreign import read_save
from fwcompiler_nftables.foreign import read_nft

from fwcompiler.foreign import FRAGMENT
from fwcompiler.ruleset import AnyOf, Family, Match, Opaque, ProtocolIs, Rule, Translate


def iptables_rule(text: str, table: str = "filter", chain: str = "INPUT", version: int = 4) -> Rule:
    """One rule out of a dump."""
    ruleset = read_save(f"*{table}\n:{chain} ACCEPT [0:0]\n-A {chain} {text}\nCOMMIT\n", version)
    return ruleset.chain(f"{table}/{chain}").rules[-1]


def nft_rule(*expressions: dict[str, Any], hook: str = "input", kind: str = "filter") -> Rule:
    """One rule out of nft's JSON."""
    where = {"family": "ip", "table": "t"}
    chain = {**where, "name": "c", "type": kind, "hook": hook, "prio": 0, "policy": "accept"}
    objects = [{"table": {"family": "ip", "name": "t"}}, {"chain": chain}, {"rule": {**where, "chain": "c", "expr": list(expressions)}}]
    return read_nft(json.dumps({"nftables": objects})).chain("ip/t/c").rules[-1]


def match(left: dict[str, Any], right: Any, operator: str = "==") -> dict[str, Any]:
    """A match statement."""
    return {"match": {"op": operator, "left": left, "right": right}}


@pytest.mark.parametrize("way", ["i", "o"])
def test_a_star_is_no_wildcard_in_iptables(way: str) -> None:
    """`-i eth*` is an interface of that very name, as nft's `eth\\*` is; only `eth+` stands for all that begin so."""
    (star,) = iptables_rule(f"-{way} eth* -j ACCEPT", chain="FORWARD").matches
    (in_nft,) = nft_rule(match({"meta": {"key": f"{way}ifname"}}, "eth\\*"), {"accept": None}, hook="forward").matches

    assert star == in_nft == Opaque(f'meta {way}ifname == "eth\\\\*"')


def test_random_ports_are_any_port_in_both_languages() -> None:
    """A source that is rewritten with random ports leaves from any port."""
    for kind, target in (("masquerade", "MASQUERADE --random"), ("snat", "SNAT --to-source 192.0.2.1 --random-fully")):
        value = {"flags": "fully-random" if "fully" in target else "random", **({"addr": "192.0.2.1"} if kind == "snat" else {})}
        rules = (
            iptables_rule(f"-j {target}", "nat", "POSTROUTING"),
            nft_rule({kind: value}, hook="postrouting", kind="nat"),
        )
        for rule in rules:
            assert isinstance(rule.verdict, Translate)
            assert rule.verdict.ports == (0, 65535)
    plain = nft_rule({"snat": {"addr": "192.0.2.1"}}, hook="postrouting", kind="nat").verdict
    assert isinstance(plain, Translate)
    assert plain.ports is None


@pytest.mark.parametrize(("operator", "negated"), [("!=", False), ("==", True)])
def test_fragments_are_one_test_in_both_languages(operator: str, negated: bool) -> None:
    """nft asks for the offset, iptables for `-f`; a question about a whole packet knows the answer by the common name."""
    offset = {"&": [{"payload": {"protocol": "ip", "field": "frag-off"}}, 0x1FFF]}
    (in_nft,) = nft_rule(match(offset, 0, operator), {"drop": None}).matches
    (in_iptables,) = iptables_rule(f"{'! ' if negated else ''}-f -j DROP").matches

    assert in_nft == in_iptables == Opaque(FRAGMENT, negated)


@pytest.mark.parametrize(
    ("option", "left", "right", "operator"),
    [
        ("-m mac --mac-source 0A:12:3E:4F:B2:C6", {"payload": {"protocol": "ether", "field": "saddr"}}, "0a:12:3e:4f:b2:c6", "=="),
        ("-m length ! --length 40", {"meta": {"key": "length"}}, 40, "!="),
        ("-m length --length 86:", {"meta": {"key": "length"}}, {"range": [86, 65535]}, "=="),
        ("-m length --length :0x190", {"meta": {"key": "length"}}, {"range": [0, 400]}, "=="),
        ("-m helper --helper sip", {"ct": {"key": "helper"}}, "sip", "=="),
        ("-m ttl --ttl-gt 3", {"payload": {"protocol": "ip", "field": "ttl"}}, 3, ">"),
        ("-m ttl --ttl-lt 3", {"payload": {"protocol": "ip", "field": "ttl"}}, 3, "<"),
        ("-m ecn ! --ecn-ip-ect 2", {"payload": {"protocol": "ip", "field": "ecn"}}, "ect0", "!="),
    ],
)
def test_tests_of_one_field_have_one_name(option: str, left: dict[str, Any], right: Any, operator: str) -> None:
    """What iptables writes as an option and nft as a field is the same test, so that one firewall written twice is equal."""
    assert iptables_rule(f"{option} -j DROP").matches == nft_rule(match(left, right, operator), {"drop": None}).matches


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("-p 50 -m esp --espspi 500", (ProtocolIs(50), Opaque("esp spi == 500"))),
        ("-p 51 -m ah --ahspi 0:4294967295", (ProtocolIs(51),)),
        ("-p 51 -m ah ! --ahspi 0:4294967295", (ProtocolIs(51), AnyOf(()))),
        ("-p tcp -m ecn --ecn-tcp-cwr", (ProtocolIs(6), Opaque("tcp flags & 0x80 == 0x80"))),
    ],
)
def test_headers_of_ipsec_and_ecn(text: str, matches: tuple[Match, ...]) -> None:
    """Every index is no test at all and no index never holds; the congestion flags are TCP flags."""
    assert iptables_rule(f"{text} -j DROP").matches == matches


def test_what_a_rule_changes_is_stateful_by_its_common_name() -> None:
    """Behind a rule that sets the hop limit, a test of the hop limit is one of its own."""
    text = "*mangle\n:INPUT ACCEPT [0:0]\n-A INPUT -m hl --hl-gt 3 -j DROP\n-A INPUT -j HL --hl-set 3\nCOMMIT\n"

    (test,) = read_save(text, 6).chain("mangle/INPUT").rules[0].matches

    assert test == Opaque("hoplimit > 3", stateful=True)


@pytest.mark.parametrize(("answer", "implied"), [("icmp", Family(4)), ("icmpv6", Family(6)), ("tcp reset", ProtocolIs(6))])
def test_an_answer_tells_whom_it_is_for(answer: str, implied: Match) -> None:
    """nft lists `meta nfproto ipv6 reject` as `reject with icmpv6 …`, without the test, though IPv4 packets go on."""
    rule = nft_rule({"reject": {"type": answer, "expr": "port-unreachable"}})

    assert rule.matches == (implied,)
    assert nft_rule({"reject": {"type": "icmpx", "expr": "port-unreachable"}}).matches == ()


def test_a_bit_that_is_not_set() -> None:
    """`ct status ! dnat` is the negation of `ct status dnat`, as `! --ctstate DNAT` is in iptables."""
    left = {"ct": {"key": "status"}}
    (with_bit,) = nft_rule(match(left, "dnat", "in"), {"accept": None}).matches
    (without,) = nft_rule(match(left, "dnat", "!"), {"accept": None}).matches

    assert isinstance(with_bit, Opaque)
    assert without == replace(with_bit, negated=True)
