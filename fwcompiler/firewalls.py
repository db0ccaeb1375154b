"""Other firewalls by name, from the marks that their rules bear, and listings that stand beside ours. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fwcompiler.backend import Saved

IPTABLES_TABLES = ("filter", "nat", "mangle", "raw", "security")
"""Tables that iptables makes, also in nftables (iptables(8))."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How one firewall is known: by a table of nftables or a chain, as regular expressions, and what turns it off."""

    name: str
    table: str
    chain: str
    off: str


MARKS = (
    Mark("firewalld", r"firewalld\S*", r"(INPUT|FORWARD)_ZONES", "systemctl disable --now firewalld"),
    Mark("ufw", r"ufw", r"ufw6?-(before|after|user|reject|track|logging)\S*", "ufw disable"),
    Mark("foomuuri", r"foomuuri", r"foomuuri-\S+", "systemctl disable --now foomuuri"),
    Mark("shorewall", r"shorewall", r"shorewall", "shorewall clear"),
    Mark("csf", r"csf", r"(LOCALINPUT|DENYIN|ALLOWIN)", "csf -x"),
)
"""Firewalls that rule a whole host, as fwc does. fail2ban, docker and their like add to one, and are none."""


def named(nft: Sequence[Saved], iptables: Mapping[str, Sequence[Saved]]) -> Iterator[str]:
    """Every firewall of somebody else's that has rules here, each in a sentence."""
    seen = [*_nft_names(nft), *_iptables_names(iptables)]
    for mark in MARKS:
        patterns = {"table": re.compile(mark.table), "chain": re.compile(mark.chain)}
        where = next((place for kind, name, place in seen if patterns[kind].fullmatch(name)), None)
        if where is not None:
            yield f"{mark.name} is active here ({where}): a packet has to pass it and fwc; `{mark.off}` if fwc is to be the only firewall"


def _nft_names(nft: Iterable[Saved]) -> Iterator[tuple[str, str, str]]:
    """Kind, name and place of tables and chains."""
    for saved in nft:
        for item in json.loads(saved.text)["nftables"]:
            if "table" in item:
                table = item["table"]
                yield "table", table["name"], f"table {table['family']} {table['name']}"
            if "chain" in item:
                chain = item["chain"]
                yield "chain", chain["name"], f"chain {chain['name']} in table {chain['family']} {chain['table']}"


def _iptables_names(iptables: Mapping[str, Sequence[Saved]]) -> Iterator[tuple[str, str, str]]:
    for variant, listings in iptables.items():
        for saved in listings:
            for name in re.findall(r"^:(\S+) ", saved.text, re.MULTILINE):
                yield "chain", name, f"chain {name} of iptables-{variant}"


def beside(backend: str, nft: Sequence[Saved], iptables: Mapping[str, Sequence[Saved]], ours: str) -> Iterator[str]:
    """Rules that the programs of our backend do not show: those of iptables-legacy beside nftables, or the other way round.

    `ours`: a text that only rules of ours contain.
    """
    legacy = _rules(iptables.get("legacy", ()), ours)
    tables = [saved.file for saved in nft if '"rule"' in saved.text]
    tables += [saved.file for saved in iptables.get("nft", ()) if _rules([saved], ours)]
    blind = "every packet passes both, and neither program shows the other's rules"
    if legacy and backend != "iptables-legacy":
        yield f"iptables-legacy is in use beside {backend}, with {_count(legacy)} of others: {blind}"
    elif tables and backend == "iptables-legacy":
        yield f"nftables is in use beside iptables-legacy ({', '.join(tables)}): {blind}"
    if legacy and any(_is_iptables(table) for table in tables):
        yield "both variants of iptables hold rules here: `iptables-legacy-save` and `iptables-nft-save` show half each"


def _is_iptables(table: str) -> bool:
    words = table.replace("tables, table", "").removeprefix("table ").split()
    return len(words) == 2 and words[0] in ("ip", "ip6") and words[1] in IPTABLES_TABLES


def _rules(listings: Iterable[Saved], ours: str) -> int:
    return sum(line.startswith("-A ") and ours not in line for saved in listings for line in saved.text.splitlines())


def _count(rules: int) -> str:
    return "1 rule" if rules == 1 else f"{rules} rules"
