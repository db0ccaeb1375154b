"""The proof of a host with a responder: a mistake in any of its rules is found, with a packet that fares otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fwcompiler.pipeline import Compiled, compile_policy
from fwcompiler.proof.redirected import redirect_examples
from fwcompiler.ruleset import Chain, Final, ForHost, Hook, InSet, PortIn, Rewritten, Rule, Ruleset, redirected

POLICY = """version: 1
groups:
  cluster: [10.20.0.0/24, "2001:db8:20::/48"]
  customers:
    members: [198.51.100.0/24]
    dynamic: {timeout: 1h}
  bad: [203.0.113.0/24]
block: {from: [bad]}
services:
  http: {from: FROM, redirect: responder, plain: [cluster]}
  https: {from: anywhere}
"""
Change = Callable[[Rule], Rule | None]


@pytest.fixture(params=["anywhere", "[cluster, customers]"])
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Compiled:
    """The policy with `http` open to anywhere, and narrowed."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY.replace("FROM", request.param))
    return compile_policy(str(path))


def changed(ruleset: Ruleset, chain: str, change: Change) -> Ruleset:
    """The ruleset with every rule of a chain changed, or left out."""

    def each(found: Chain) -> Chain:
        rules = (change(rule) for rule in found.rules)
        return replace(found, rules=tuple(r for r in rules if r is not None)) if found.name == chain else found

    made = replace(ruleset, chains=tuple(map(each, ruleset.chains)))
    assert made != ruleset
    return made


def without(kind: type) -> Change:
    """A rule without its matches of one kind."""
    return lambda rule: replace(rule, matches=tuple(m for m in rule.matches if not isinstance(m, kind)))


def aimed(port: int) -> Change:
    """Redirects to another port."""
    return lambda rule: replace(rule, verdict=redirected(port)) if rule.verdict == redirected(8880) else rule


MISTAKES: dict[str, tuple[str, Change]] = {
    "everybody reaches the responder's port": ("input", without(Rewritten)),
    "nobody gets through to the responder": ("input", lambda r: None if any(isinstance(m, Rewritten) for m in r.matches) else r),
    "redirected to a closed port": ("responder", aimed(8881)),
    "redirected to an open port": ("responder", aimed(443)),
    "not redirected": ("responder", lambda r: None if r.verdict == redirected(8880) else r),
    "redirected on its way elsewhere": ("responder", without(ForHost)),
    "nobody stays in the clear": ("responder", lambda r: None if any(isinstance(m, InSet) for m in r.matches) else r),
    "everybody stays in the clear": ("responder", without(InSet)),
    "only one family stays in the clear": (
        "responder",
        lambda r: None if any(isinstance(m, InSet) and m.version == 6 for m in r.matches) else r,
    ),
    "all ports are redirected": ("responder", without(PortIn)),
    "loopback addresses are hidden": ("responder", lambda r: None if len(r.matches) == 1 and r.verdict is Final.ACCEPT else r),
}


def test_the_compiled_rules_are_right(compiled: Compiled) -> None:
    """What is compiled means what the policy says."""
    assert list(redirect_examples(compiled.resolved, compiled.ruleset)) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(compiled: Compiled, mistake: str) -> None:
    """Each mistake in the rules around the responder shows as packets that fare otherwise than the policy says."""
    found = list(redirect_examples(compiled.resolved, changed(compiled.ruleset, *MISTAKES[mistake])))

    assert found
    assert all(each.policy != each.kernel for each in found)


def test_a_second_nat_chain_is_found(compiled: Compiled) -> None:
    """Somebody's own redirect among ours, of HTTPS to another port."""
    other = Chain("other", (Rule((PortIn("destination", "tcp", (443, 443)),), redirected(8443)),), Hook("prerouting", -99, "accept", "nat"))
    ruleset = replace(compiled.ruleset, chains=(*compiled.ruleset.chains, other))

    assert any("443" in each.packets for each in redirect_examples(compiled.resolved, ruleset))
