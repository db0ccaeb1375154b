"""Iptables_Semantics proved, in Isabelle, an upper and a lower bound of what each of these firewalls accepts; both have to hold here.

The bounds are lists of rules without chains, interfaces or anything else but addresses, protocols and ports, printed as `iptables -Ln`
does. They were made for new connections: whatever the firewall lets pass, the upper one lets pass; whatever the lower one does, the
firewall does, whichever way the tests go that nobody models. Interfaces were rewritten to the sources behind them, so the bounds hold
where nobody spoofs (`BEHIND`), and for TCP where a new packet is a SYN.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest
from foreign import corpus
from foreign.comparing import behind, ends, only

from fwcompiler.addresses import LAST, Ranges, merged, subtract
from fwcompiler.foreign import tcp_flags
from fwcompiler.ports import PROTOCOLS
from fwcompiler.proof.conditions import outs
from fwcompiler.proof.host import of_host
from fwcompiler.ruleset import Chain, Final, Hook, HookName, InRanges, Interface, Match, PortIn, ProtocolIs, Rule, Ruleset, Side

FOLDER = corpus.CORPUS / "iptables-semantics" / "thy" / "Iptables_Semantics" / "Examples" / "IPPartEval"
_SOURCES = {
    "docker_topos/iptables-save": "docker_topos/iptables-save.topos4.1",
    "configs_ugent/iptables": "configs_ugent/iptables-save.v1.4.21",
    "config_memphis_testbed/iptables": "config_memphis_testbed/iptables-save",
    "config_random_srv/iptables": "config_random_srv/iptables-save",
    "config_home_user/typical_home_user": "config_home_user/typical_home_user_iptables-save",
}
"""Bounds whose dump has another name than they."""
_BOUND = re.compile(r"(?P<name>.*?)(\.Ln)?\.(?P<chain>FWD|INP)(\.Ln)?\.(?P<side>upper|lower)")
_LINE = re.compile(r"(ACCEPT|DROP) +(\S+) +-- +(\S+) +(\S+) *(.*)")
_PORTS = re.compile(r"(spts?|dpts?):(\d+)(?::(\d+))?")
_HOOKS: dict[str, tuple[HookName, str]] = {"FWD": ("forward", "FORWARD"), "INP": ("input", "INPUT")}
BEHIND: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"lo": ("127.0.0.0/8",)},
    "openvpn.eu": {"eth0": ("192.168.0.0/24",), "eth1": ("192.168.2.0/24",)},
    "rlworkman.net": {"eth0": ("192.168.13.0/24",)},
    "medium-sized-company": {"eth0": ("172.16.2.0/24",)},
    "config_home_user": {f"eth0.{n}": (f"192.168.{n}.0/24",) for n in (10, 11, 12, 13, 14, 19, 20, 21, 22, 23, 24)},
}
"""By dump, the sources behind its interfaces as the authors gave them (their `ipassmt`), read off the bounds; the first is every dump's."""
_PRIVATE = ("10.0.0.0/8", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
_INTERNET = {"config_home_user": "eth1"}
"""Interfaces behind which is everything else."""
_ABSENT = {"TUM_Net/iptables_20.10.2013"}
"""Their dump is too large for the corpus."""


def bounds() -> list[tuple[str, Path, Path, str, str]]:
    """Name, dump, bound, chain and side of every bound whose dump is there."""
    found = []
    for path in sorted(FOLDER.glob("*/*.upper")) + sorted(FOLDER.glob("*/*.lower")):
        match = _BOUND.fullmatch(f"{path.parent.name}/{path.name}")
        assert match, path
        if match["name"] not in _ABSENT:
            name = _SOURCES.get(match["name"], match["name"])
            found.append((f"{name}-{match['chain']}-{match['side']}", FOLDER / name, path, match["chain"], match["side"]))
    return found


def read_bound(text: str, hook: HookName, chain: str) -> Ruleset:
    """The list of one chain; a line that this does not understand is an error."""
    rules: list[Rule] = []
    policy, inside = "", False
    for line in text.splitlines():
        if line.startswith("Chain "):
            inside = line.split()[1] == chain
            policy = line.rstrip(")").split()[-1] if inside else policy
        elif inside and line.strip() and not line.startswith("target"):
            rules.append(_rule(line))
    assert policy in ("ACCEPT", "DROP")
    return Ruleset((Chain("bound", tuple(rules), Hook(hook, 0, "accept" if policy == "ACCEPT" else "drop", version=4)),))


def _rule(line: str) -> Rule:
    found = _LINE.fullmatch(line.rstrip())
    assert found, line
    target, protocol, source, destination, rest = found.groups()
    matches: list[Match] = []
    addresses: tuple[tuple[Side, str], ...] = (("source", source), ("destination", destination))
    for side, text in addresses:
        network = ip_network(text)
        matches.append(InRanges(side, 4, ((int(network[0]), int(network[-1])),)))
    if protocol != "all":
        matches.append(ProtocolIs({**PROTOCOLS, "esp": 50}.get(protocol) or int(protocol)))
    words = rest.split()
    assert not words or words[0] == protocol, line
    for word in words[1:]:
        ports = _PORTS.fullmatch(word)
        assert ports, line
        low, high = int(ports[2]), int(ports[3] or ports[2])
        matches.append(PortIn("source" if word.startswith("s") else "destination", protocol, (low, high)))
    return Rule(tuple(matches), Final.ACCEPT if target == "ACCEPT" else Final.DROP)


def spoofed(dump: Path) -> list[Rule]:
    """Rules that drop what comes in where its source is not, and what no new packet is."""
    rules: list[Rule] = [Rule((ProtocolIs(6), replace(tcp_flags(0x17, 0x02), negated=True)), Final.DROP)]
    sources = {name: _ranges(networks) for name, networks in {**BEHIND[""], **BEHIND.get(dump.parent.name, {})}.items()}
    if dump.parent.name in _INTERNET:
        sources[_INTERNET[dump.parent.name]] = subtract(((0, LAST[4]),), _ranges(_PRIVATE))
    for name, ranges in sources.items():
        rules.append(Rule((Interface("in", name), InRanges("source", 4, ranges, negated=True)), Final.DROP))
        rules.append(Rule((Interface("in", name, negated=True), InRanges("source", 4, ranges)), Final.DROP))
    return rules


def _ranges(networks: Iterable[str]) -> Ranges:
    return merged((int(n[0]), int(n[-1])) for n in map(ip_network, networks))


def met(dump: Path, limit: Ruleset, chain: str) -> Mapping[tuple[str, str], str]:
    """Ends of new packets in the firewall and in its bound."""
    hook, name = _HOOKS[chain]
    firewall = only(corpus.read_dump(dump), f"filter/{name}")
    programs = (of_host(behind(each, spoofed(dump), hook), 4, hook, outs(firewall)) for each in (firewall, limit))
    return ends(*programs, version=4, states=("new",))


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the corpus is not here")
def test_every_bound_is_found() -> None:
    """All 38 bounds whose dump is in the corpus take part."""
    assert len(bounds()) == 38
    assert all(dump.is_file() for _, dump, *_ in bounds())


@pytest.mark.parametrize(("dump", "bound", "chain", "side"), [pytest.param(*each[1:], id=each[0]) for each in bounds()])
def test_bounds_hold(dump: Path, bound: Path, chain: str, side: str) -> None:
    """No new packet is accepted that the upper bound drops, and none is stopped that the lower bound accepts."""
    hook, name = _HOOKS[chain]

    found = met(dump, read_bound(bound.read_text(), hook, name), chain)

    for (firewall, limit), packets in found.items():
        if side == "upper":
            assert firewall != "accept" or limit == "accept", packets
        else:
            assert limit != "accept" or firewall == "accept", packets
    assert ("drop", "drop") in found


def test_a_bound_that_is_too_narrow_is_noticed() -> None:
    """The comparison can fail: with one accepting rule of an upper bound gone, packets pass that it drops."""
    _, dump, path, chain, _ = next((b for b in bounds() if b[0].startswith("sargon") and b[4] == "upper"), ("", Path(), Path(), "", ""))
    if not chain:
        pytest.skip("the corpus is not here")
    (bound,) = read_bound(path.read_text(), *_HOOKS[chain]).chains
    first = next(i for i, rule in enumerate(bound.rules) if rule.verdict is Final.ACCEPT)
    narrow = Ruleset((replace(bound, rules=(*bound.rules[:first], *bound.rules[first + 1 :])),))

    assert ("accept", "drop") in met(dump, narrow, chain)
