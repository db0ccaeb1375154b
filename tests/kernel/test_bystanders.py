"""What our rules before routing do to packets that are for another host: nothing, and `verify` and the proof of an apply see to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cli.harness import BACKENDS, POLICY, Host

from fwcompiler.pipeline import compile_policy, disproof
from fwcompiler.ruleset import Chain, ForHost, Ruleset

BLOCKING = POLICY.replace("services:", "  bad: [192.0.2.66, '2001:db8:bad::/48']\nblock: {from: [bad]}\nservices:")


def for_anybody(chain: Chain) -> Chain:
    """A chain whose rules ask no more whether a packet is for this host."""
    return replace(chain, rules=tuple(replace(r, matches=tuple(m for m in r.matches if not isinstance(m, ForHost))) for r in chain.rules))


def changed(ruleset: Ruleset, name: str) -> Ruleset:
    """A ruleset with one such chain."""
    made = replace(ruleset, chains=tuple(for_anybody(c) if c.name == name else c for c in ruleset.chains))
    assert made != ruleset
    return made


@pytest.mark.parametrize(("chain", "packets"), [("early", "from 192.0.2.66 to"), ("early.sip", "to udp/5060")])
def test_a_lost_test_of_the_destination(tmp_path: Path, chain: str, packets: str) -> None:
    """An early drop of packets for anybody is found, with packets of either family, and the rule that drops them."""
    path = tmp_path / "policy.yaml"
    path.write_text(BLOCKING, encoding="utf-8")
    compiled = compile_policy(str(path))
    assert disproof(compiled, compiled.ruleset) == ()

    found = disproof(compiled, changed(compiled.ruleset, chain))

    assert any(packets in each.packets for each in found)
    assert {each.packet.version for each in found} == {4, 6}
    assert all(each.packets.endswith(", for another host") for each in found)
    assert all(f"drops them in chain {chain}: " in each.kernel for each in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_verify_finds_it_in_the_kernel(tmp_path: Path, netns: str, backend: str) -> None:
    """A rule by hand that drops strangers' SIP to containers changes nothing about this host; `verify` finds it all the same."""
    host = Host(tmp_path, netns, backend)
    host.apply(BLOCKING)
    assert host.fwc("verify", host.write(BLOCKING)).code == 0

    if backend == "nftables":
        host.run("nft", "add rule inet fwc early.sip drop")
    else:
        host.iptables("-t", "raw", "-A", "FWC-e.sip", "-j", "DROP")
    policy = host.write(BLOCKING)
    ran = host.fwc("verify", policy)

    assert ran.code == 1, ran
    assert "to udp/5060" in ran.out.splitlines()[0]
    assert ran.out.splitlines()[0].endswith(", for another host")
    assert "the policy: accept: they are for another host" in ran.out
    assert any(
        "for another host: our rules as they are drop them in chain " in note for note in host.fwc("diff", policy, "--json").json["notes"]
    )
    host.apply(BLOCKING)
    assert host.fwc("verify", policy).code == 0
