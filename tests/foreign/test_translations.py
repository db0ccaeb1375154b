"""Upstream's iptables-translate promises that 452 commands mean the same in nftables; as far as both readers model them, they do.

Each command is read as text, its translation is loaded and listed by nft, and both are compared for all packets. Rules that only
count decide here, so that their tests take part. What is not proven is counted by file, with the reason; a pair that is not in the
list fails, and so does one that is but should not.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import kernelspace
import pytest
from foreign import corpus
from foreign.comparing import deciding, differences, rewritings
from fwcompiler_iptables.foreign import read_save
from fwcompiler_nftables.foreign import read_nft

from fwcompiler.foreign import grade
from fwcompiler.ruleset import HookName, Ruleset

FOLDER = corpus.CORPUS / "iptables-tests" / "extensions"
PAIRS = 452
OTHER_FAMILIES = 69
"""ebtables' and arptables'."""
PROVEN = 281
"""At least so many of the 383 of IPv4 and IPv6 are proven equal."""
_NAMES = "each reader names the test in its own language's words, so that they are two tests"
_UPSTREAM = "the translation means something else"
NOT_PROVEN: dict[str, tuple[int, str]] = {
    "libip6t_ah.txlate": (4, f"length and reserved bits of the header: {_NAMES}"),
    "libip6t_frag.txlate": (2, f"IPv6 extension headers: {_NAMES}"),
    "libip6t_hbh.txlate": (2, f"IPv6 extension headers: {_NAMES}"),
    "libip6t_mh.txlate": (4, "mobility headers are unknown in iptables"),
    "libip6t_rt.txlate": (3, f"IPv6 extension headers: {_NAMES}"),
    "libipt_ah.txlate": (1, "no index at all: never in iptables, by name in nft"),
    "libipt_realm.txlate": (4, f"routing realms: {_NAMES}"),
    "libxt_SYNPROXY.txlate": (1, f"handed to a part of the kernel: {_NAMES}"),
    "libxt_TPROXY.txlate": (7, f"handed to a program: {_NAMES}"),
    "libxt_addrtype.txlate": (1, f"address types on one interface: {_NAMES}"),
    "libxt_connbytes.txlate": (5, f"counts by connection: {_NAMES}"),
    "libxt_connlabel.txlate": (2, f"labels of connections: {_NAMES}"),
    "libxt_connlimit.txlate": (4, f"counts of connections: {_NAMES}"),
    "libxt_dccp.txlate": (3, f"types of DCCP packets: {_NAMES}"),
    "libxt_ecn.txlate": (1, f"`! --ecn-tcp-ece` becomes `tcp flags != ecn`, which compares all flags: {_UPSTREAM}"),
    "libxt_esp.txlate": (2, "no index at all: never in iptables, by name in nft"),
    "libxt_hashlimit.txlate": (2, f"limits by address: {_NAMES}"),
    "libxt_limit.txlate": (1, f"a burst of 0 becomes nft's usual 5: {_UPSTREAM}"),
    "libxt_policy.txlate": (2, f"IPsec: {_NAMES}"),
    "libxt_quota.txlate": (2, f"quotas: {_NAMES}"),
    "libxt_rpfilter.txlate": (3, f"the route back: {_NAMES}"),
    "libxt_socket.txlate": (5, f"sockets: {_NAMES}"),
    "libxt_statistic.txlate": (3, f"random and every nth: {_NAMES}"),
    "libxt_tcp.txlate": (2, f"TCP options: {_NAMES}"),
    "libxt_tcpmss.txlate": (4, f"TCP options: {_NAMES}"),
    "libxt_time.txlate": (9, f"time of day: {_NAMES}"),
}
"""By file: how many pairs are not proven equal, and why."""
_HOOKS: dict[str, HookName] = {
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "PREROUTING": "prerouting",
    "POSTROUTING": "postrouting",
}
_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
_NAT = {"prerouting": -100, "output": -100, "input": 100, "postrouting": 100}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the corpus is not here")


@dataclass
class Pair:
    """A command of iptables, and the commands of nft that it is translated to."""

    file: str
    command: str
    nft: list[str] = field(default_factory=list)

    @property
    def version(self) -> int | None:
        """4 or 6; None for bridges and ARP."""
        return {"iptables": 4, "ip6tables": 6}.get(re.split(r"[- ]", self.command)[0])

    @property
    def place(self) -> tuple[str, str]:
        """Table and chain of the rule, the chain in iptables' spelling."""
        table = re.search(r"-t (\w+)", self.command)
        chain = re.search(r"(?:-A|-I|--append|--insert)\s+(\S+)", self.command)
        name = chain[1] if chain else ""
        return table[1] if table else "filter", name.upper() if name.upper() in _HOOKS else name


def pairs() -> Iterator[Pair]:
    """All pairs of the corpus."""
    for path in sorted(FOLDER.glob("*.txlate")):
        pair: Pair | None = None
        for line in path.read_text().splitlines():
            if line.startswith("nft"):
                assert pair is not None
                pair.nft.append(shlex.split(line)[1] if line.startswith("nft '") else line.removeprefix("nft "))
            elif line.strip() and not line.startswith("#"):
                if pair is not None:
                    yield pair
                pair = Pair(path.name, line.strip())
        if pair is not None:
            yield pair


def script(pair: Pair) -> str:
    """What nft needs to load a translation: its table, and what the rule refers to; a chain of nobody's is called at input."""
    found = re.search(r"rule (ip6?) (\w+) (\w+)", pair.nft[-1])
    assert found, pair
    where, (table, chain) = f"{found[1]} {found[2]}", pair.place
    lines = [f"add table {where}"]
    hook = _HOOKS.get(chain)
    if hook:
        kind = "nat" if table == "nat" else "route" if (table, hook) == ("mangle", "output") else "filter"
        priority = _NAT[hook] if table == "nat" else _PRIORITIES[table]
        lines.append(f"add chain {where} {found[3]} {{ type {kind} hook {hook} priority {priority}; }}")
    else:
        lines += [f"add chain {where} {found[3]}", f"add chain {where} INPUT {{ type filter hook input priority 0; }}"]
        lines.append(f"add rule {where} INPUT jump {found[3]}")
    text = " ".join(pair.nft)
    lines += [f"add chain {where} {name}" for name in re.findall(r"(?:jump|goto) (\w+)", text)]
    if "add set" not in text:
        lines += [f"add set {where} {name} {{ type ipv{pair.version}_addr; }}" for name in re.findall(r"@(\w+)", text)]
    return "\n".join((*lines, *pair.nft, ""))


def save(pair: Pair) -> str:
    """The command as iptables-save would print what it made, with the chains that it needs."""
    table, chain = pair.place
    rule = re.sub(r"-t \w+ ?", "", pair.command.split(None, 1)[1])
    rule = re.sub(r"(-A|-I|--append|--insert)\s+\S+", f"-A {chain}", rule, count=1)
    own = [] if chain in _HOOKS else [":INPUT ACCEPT", f"-A INPUT -j {chain}"]
    called = [f":{name} -" for name in re.findall(r"-[jg] (LONGNACCEPT)", rule)]
    return "\n".join((f"*{table}", f":{chain} {'ACCEPT' if chain in _HOOKS else '-'}", *called, *own, rule, "COMMIT", ""))


def listed(pair: Pair) -> Ruleset | None:
    """What nft holds after loading the translation; None where this one does not load or list it."""
    text = corpus.list_as_json(script(pair))
    return read_nft(text) if text else None


def unequal(pair: Pair, translated: Ruleset) -> str:
    """Why command and translation are not proven equal; empty where they are."""
    assert pair.version is not None
    command = read_save(save(pair), pair.version)
    for side, name in ((command, "iptables"), (translated, "nft")):
        if any(grade(rule) == "unknown" for chain in side.chains for rule in chain.rules):
            return f"unknown in {name}"
    table, chain = pair.place
    hook = _HOOKS.get(chain, "input")
    first, second = deciding(command), deciding(translated)
    if hook == "postrouting":
        return str(rewritings(first, second, pair.version, hook) or "")
    found = differences(first, second, pair.version, "input" if hook == "prerouting" else hook)
    if not found and table == "nat":
        found = rewritings(first, second, pair.version, hook)
    return str(found or "")


def test_translations_mean_what_the_commands_mean() -> None:
    """Every pair is proven equal, of another family, not loadable here, or counted in the list of those not modelled alike."""
    if not kernelspace.allowed():
        pytest.skip("needs the right to make network namespaces (root)")
    everything = list(pairs())
    ours = [pair for pair in everything if pair.version]
    assert (len(everything), len(everything) - len(ours)) == (PAIRS, OTHER_FAMILIES)
    proven, not_loaded = 0, []
    failed: dict[str, list[tuple[str, str]]] = {}
    for pair in ours:
        ruleset = listed(pair) if pair.place[1] else None
        if ruleset is None:
            not_loaded.append(pair.command)
            continue
        why = unequal(pair, ruleset)
        proven += not why
        if why:
            failed.setdefault(pair.file, []).append((pair.command, why))

    counted = Counter({file: len(found) for file, found in failed.items()})
    new = {file: failed[file] for file in counted if counted[file] > NOT_PROVEN.get(file, (0, ""))[0]}
    assert not new, new
    gone = [file for file, (count, _) in NOT_PROVEN.items() if counted[file] < count]
    assert not gone, "fewer than listed: correct the list"
    assert proven >= PROVEN, (proven, len(not_loaded), not_loaded)
