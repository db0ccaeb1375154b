"""Miscompilations: what a broken compiler could write, as edits of the text that would be loaded.

Each kind is given for both forms of text, nft's and that of iptables-restore and ipset. An edit that finds nothing to change
is an error: a mutation that does nothing would pass for one that was caught.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

POLICY: dict[str, Any] = {
    "version": 1,
    "groups": {
        "carriers": ["198.51.100.16/28", "2001:db8:51::/48"],
        "agents": {"members": ["203.0.113.0/24", "2001:db8:a::/64"], "dynamic": {"timeout": "12h", "max": 64}},
        "admins": ["192.0.2.10", "2001:db8:ad::10"],
        "cluster": ["10.20.0.0/24", "fd00:20::/64"],
        "bad": ["185.0.0.0/16", "10.20.0.128/25", "2001:db8:bad::/48", "fd00:20::bad"],
        "scanners": {"members": ["185.1.0.0/16"], "dynamic": {"timeout": "1h", "max": 64}},
    },
    "block": {"from": ["bad", "scanners"], "except": ["admins"]},
    "trust": ["cluster"],
    "services": {
        "sip": {"from": ["carriers", "agents"]},
        "ssh": {"from": ["admins"]},
        "exporter": {"ports": ["tcp/9100-9103"], "from": ["admins"]},
        "vrrp": {"from": ["carriers"]},
        "rtp": {"from": "anywhere"},
        "https": {"from": "anywhere"},
        "ntp": {"from": ["admins"]},
    },
}
"""A policy in which every kind of rule that fwc makes decides something."""

Edit = Callable[[str], str]


@dataclass(frozen=True)
class Mutation:
    """One kind. `nft` edits the nft file; `iptables` names a file (`ipset`, `v4`, `v6`) and edits that.

    `early`: a mistake in the chains before connection tracking.
    `refused`: no kernel takes it, so it never comes to a proof. `same`, by form: why it changes no packet's fate there.
    `unseen`: why no packet that can be sent shows it.
    """

    name: str
    nft: Edit
    iptables: tuple[str, Edit]
    early: bool = False
    refused: bool = False
    same: Mapping[str, str] | None = None
    unseen: str = ""

    def apply(self, files: Mapping[str, str]) -> dict[str, str]:
        """The files with the mistake in them."""
        changed = dict(files)
        name, edit = ("fwc.nft", self.nft) if "fwc.nft" in files else (f"fwc.{self.iptables[0]}", self.iptables[1])
        changed[name] = edit(files[name])
        assert changed[name] != files[name], f"{self.name} changes nothing in {name}"
        return changed

    def why_same(self, form: str) -> str:
        """Why the mutation means the same in a form of text; empty where it does not."""
        return (self.same or {}).get(form, "")


def sub(pattern: str, replacement: str) -> Edit:
    """Replace the first place where a pattern stands."""
    return lambda text: re.sub(pattern, replacement, text, count=1, flags=re.M)


def everywhere(pattern: str, replacement: str) -> Edit:
    """Replace every place where a pattern stands."""
    return lambda text: re.sub(pattern, replacement, text, flags=re.M)


def gone(pattern: str) -> Edit:
    """Take out the first line in which a pattern stands."""
    return sub(rf"^.*{pattern}.*\n", "")


def moved(line: str, before: str) -> Edit:
    """Put the first line in which `line` stands in front of the first in which `before` stands."""

    def edit(text: str) -> str:
        lines = text.splitlines(keepends=True)
        at = next(i for i, one in enumerate(lines) if re.search(line, one))
        taken = lines.pop(at)
        lines.insert(next(i for i, one in enumerate(lines) if re.search(before, one)), taken)
        return "".join(lines)

    return edit


def added(before: str, text: str) -> Edit:
    """Put a line in front of the first in which `before` stands."""
    return sub(rf"^(.*{before})", rf"{text}\n\1")


def both(*edits: Edit) -> Edit:
    """One edit after the other."""

    def edit(text: str) -> str:
        for each in edits:
            changed = each(text)
            assert changed != text
            text = changed
        return text

    return edit


def _set(*names: str) -> str:
    """A set's head in nft's text, up to its elements."""
    return rf"(set {re.escape('.'.join(names))} \{{\n.*\n.*\n\t\telements = \{{\n)"


_SSH, _SIP = r"tcp dport 22 ", r"udp dport 5060 "
_IPT_ESTABLISHED, _ESTABLISHED = "ESTABLISHED,RELATED", "ct state established,related"
_ENDS = {"nft": "the end of a base chain drops as well, and a goto ends there"}

MUTATIONS = (
    Mutation("dropped source match", sub(r'ip saddr @admins.v4 (.*"ssh")', r"\1"), ("v4", sub(r"(-A FWC-s.ssh) .* src", r"\1"))),
    Mutation(
        "swapped direction", sub("ip saddr @carriers.v4", "ip daddr @carriers.v4"), ("v4", sub("fwc-carriers4 src", "fwc-carriers4 dst"))
    ),
    Mutation("first port too high", sub("dport 10000-", "dport 10001-"), ("v4", sub("10000:", "10001:"))),
    Mutation("last port too high", sub("-20000", "-20001"), ("v6", sub(":20000", ":20001"))),
    Mutation("first port too low", sub("dport 9100-", "dport 9099-"), ("v6", sub("9100:", "9099:"))),
    Mutation("last port too low", sub("-9103", "-9102"), ("v4", sub(":9103", ":9102"))),
    Mutation("a range shrunk to its first port", sub("9100-9103", "9100"), ("v4", sub("9100:9103", "9100"))),
    Mutation("lost negation", sub("!= @admins.v4", "@admins.v4"), ("v4", sub("! --match-set fwc-admins4", "--match-set fwc-admins4"))),
    Mutation(
        "added negation",
        sub("ip6 saddr @block.v6", "ip6 saddr != @block.v6"),
        ("v6", sub("--match-set fwc-block6", "! --match-set fwc-block6")),
    ),
    Mutation("missing IPv6 rule", gone("saddr @carriers.v6"), ("v6", gone("FWC-s.sip .*fwc-carriers6"))),
    Mutation("missing IPv4 rule", gone("saddr @agents.v4"), ("v4", gone("fwc-agents4"))),
    Mutation("dispatch of one family only", sub(_SSH, "meta nfproto ipv4 tcp dport 22 "), ("v6", gone("--dport 22 "))),
    Mutation("established before restricted services", moved(_ESTABLISHED, _SSH), ("v4", moved(_IPT_ESTABLISHED, "--dport 22 "))),
    Mutation("a restricted service behind established", moved(_SIP, "tcp dport 443"), ("v6", moved("--dport 5060", "--dport 443"))),
    Mutation("invalid dropped behind established", moved("ct state invalid", _ESTABLISHED), ("v4", moved("INVALID", _IPT_ESTABLISHED))),
    Mutation("accept for drop", sub(r'"ssh.drop" drop', '"ssh.drop" accept'), ("v4", sub("comment ssh -j DROP", "comment ssh -j ACCEPT"))),
    Mutation("drop for accept", sub(r'"https.accept" accept', '"https.accept" drop'), ("v6", sub("https -j ACCEPT", "https -j DROP"))),
    Mutation("block list accepts", sub(r'"block.drop" drop', '"block.drop" accept'), ("v4", sub("block -j DROP", "block -j ACCEPT"))),
    Mutation(
        "reject for accept",
        sub(r'"rtp.accept" accept', '"rtp.accept" reject with icmpx admin-prohibited'),
        ("v4", sub("rtp -j ACCEPT", "rtp -j REJECT --reject-with icmp-admin-prohibited")),
    ),
    Mutation(
        "empty set",
        sub(_set("carriers", "v4") + r".*\n\t\t\}\n", lambda m: m[1].rsplit("\t\telements", 1)[0]),
        ("ipset", gone("add fwc-carriers4")),
    ),  # type: ignore[arg-type]
    Mutation(
        "extra element",
        sub(_set("admins", "v6"), r"\1 2001:db8:ad::12,\n"),
        ("ipset", added("add fwc-admins6", "add fwc-admins6 2001:db8:ad::12")),
    ),
    Mutation("missing element", gone("10.20.0.128/25"), ("ipset", gone("10.20.0.128/25"))),
    Mutation("missing IPv6 element", gone("fd00:20::bad"), ("ipset", gone("fd00:20::bad"))),
    Mutation("widened prefix", sub("198.51.100.16/28", "198.51.100.0/27"), ("ipset", sub("198.51.100.16/28", "198.51.100.0/27"))),
    Mutation("narrowed prefix", sub("2001:db8:51::/48", "2001:db8:51::/49"), ("ipset", sub("2001:db8:51::/48", "2001:db8:51::/49"))),
    Mutation("neighbouring address", sub("192.0.2.10,", "192.0.2.11,"), ("ipset", sub("192.0.2.10$", "192.0.2.11"))),
    Mutation("wrong set", sub(r'@admins.v4 (.*"ssh")', r"@agents.v4 \1"), ("v4", sub("(FWC-s.ssh .*)fwc-admins4", r"\1fwc-agents4"))),
    Mutation(
        "set of the wrong family",
        sub("ip saddr @carriers.v4", "ip saddr @carriers.v6"),
        ("v4", sub("fwc-carriers4", "fwc-carriers6")),
        refused=True,
    ),
    Mutation("lost dynamic members", gone("ip saddr @agents.dynamic.v4"), ("v4", gone("fwc-agents~4"))),
    Mutation(
        "dynamic members of another group",
        sub("saddr @agents.dynamic.v6", "saddr @scanners.dynamic.v6"),
        ("v6", sub("fwc-agents~6", "fwc-scanners~6")),
    ),
    Mutation("wrong protocol", sub(_SIP, "tcp dport 5060 "), ("v4", sub("-p udp -m udp --dport 5060", "-p tcp -m tcp --dport 5060"))),
    Mutation("wrong protocol number", sub("l4proto 112", "l4proto 113"), ("v6", sub("-p 112", "-p 113"))),
    Mutation("wrong port", sub(_SIP, "udp dport 5061 "), ("v6", sub("--dport 5060", "--dport 5061"))),
    Mutation("source port for destination port", sub(_SIP, "udp sport 5060 "), ("v4", sub("--dport 5060", "--sport 5060"))),
    Mutation("wrong goto target", sub("goto service.ssh", "goto service.https"), ("v4", sub("-g FWC-s.ssh", "-g FWC-s.https"))),
    Mutation("dropped goto", gone(_SSH), ("v4", gone("--dport 22 "))),
    Mutation("swapped rules", moved('"ssh.drop" drop', "@admins.v4 .*ssh"), ("v4", moved("FWC-s.ssh .*DROP", "FWC-s.ssh .*ACCEPT"))),
    Mutation(
        "swapped services",
        both(sub("goto service.sip", "goto X"), sub("goto service.ssh", "goto service.sip"), sub("goto X", "goto service.ssh")),
        ("v4", both(sub("-g FWC-s.sip", "-g X"), sub("-g FWC-s.ssh", "-g FWC-s.sip"), sub("-g X", "-g FWC-s.ssh"))),
    ),
    Mutation("trust before block", moved("saddr @cluster.v4", "saddr @block.v4"), ("v4", moved("fwc-cluster4", "fwc-block4"))),
    Mutation("lost trust", gone("saddr @cluster.v6"), ("v6", gone("FWC-input .*fwc-cluster6"))),
    Mutation("lost block rule", gone("saddr @block.v6"), ("v6", gone("match-set fwc-block6"))),
    Mutation("lost invalid rule", gone("ct state invalid"), ("v4", gone("INVALID"))),
    Mutation("lost established rule", gone(_ESTABLISHED), ("v6", gone(_IPT_ESTABLISHED))),
    Mutation("lost loopback rule", gone('iif "lo"'), ("v6", gone("-i lo"))),
    Mutation("wrong interface", sub('iif "lo"', 'iifname "eth0"'), ("v4", sub("-i lo", "-i eth0"))),
    Mutation("loopback addresses let in", gone("ip saddr 127"), ("v4", gone("-s 127"))),
    Mutation("loopback addresses reachable", gone("ip daddr 127"), ("v4", gone("-d 127"))),
    Mutation(
        "loopback by the wrong end",
        sub("ip6 daddr ::1", "ip6 saddr ::1"),
        ("v6", sub("-d ::1", "-s ::1")),
        unseen="::1 arrives on no interface but lo, whatever the rules say",
    ),
    Mutation("wrong hook", sub("hook input", "hook forward"), ("v4", sub("-I INPUT", "-I FORWARD"))),
    Mutation("lost jump, or base chain", sub(r"\t\ttype filter hook .*\n", ""), ("v6", gone("-I INPUT"))),
    Mutation("wrong ICMP type", sub("icmp type 8 ", "icmp type 13 "), ("v4", sub("--icmp-type 8 ", "--icmp-type 13 "))),
    Mutation("lost ICMPv6 type", gone("icmpv6 type 135 "), ("v6", gone("--icmpv6-type 135 "))),
    Mutation(
        "ICMP error dropped",
        gone("icmp type 11 "),
        ("v4", gone("--icmp-type 11 ")),
        unseen="an ICMP error is related or invalid, so other rules decide it before",
    ),
    Mutation(
        "lost rate limit",
        sub(r"(icmp type 8) limit rate 20/second burst 40 packets", r"\1"),
        ("v4", sub("(--icmp-type 8) -m limit --limit 20/second --limit-burst 40", r"\1")),
    ),
    Mutation(
        "other rate limit",
        sub("(icmpv6 type 128 limit rate) 20", r"\1 21"),
        ("v6", sub("(--icmpv6-type 128 -m limit --limit) 20", r"\1 25")),
        unseen="one ping in a second makes the difference",
    ),
    Mutation(
        "state added", sub(_ESTABLISHED, "ct state established,related,new"), ("v4", sub(_IPT_ESTABLISHED, "NEW,ESTABLISHED,RELATED"))
    ),
    Mutation("state left out", sub(_ESTABLISHED, "ct state established"), ("v6", sub(_IPT_ESTABLISHED, "ESTABLISHED"))),
    Mutation("state turned round", sub("ct state invalid", "ct state != invalid"), ("v4", sub("--ctstate INVALID", "! --ctstate INVALID"))),
    Mutation("return added", added('@admins.v4 .*"ssh"', "return"), ("v4", added("-A FWC-s.ssh", "-A FWC-s.ssh -j RETURN"))),
    Mutation("accept added", added('@carriers.v4 .*"sip"', "accept"), ("v6", added("-A FWC-s.sip", "-A FWC-s.sip -j ACCEPT"))),
    Mutation(
        "base chain added that drops",
        sub("chain input", "chain first { type filter hook input priority -10; policy drop; }\nchain input"),
        ("v4", added("-A FWC-input", "-A FWC-input -j DROP")),
    ),
    Mutation(
        "service without its end, jumped to",
        both(gone('"ssh.drop" drop'), sub("goto service.ssh", "jump service.ssh")),
        ("v4", both(gone("comment ssh -j DROP"), sub("-g FWC-s.ssh", "-j FWC-s.ssh"))),
    ),
    Mutation(
        "policy accept without the last drop",
        both(gone('"other.drop" drop'), sub("policy drop", "policy accept")),
        ("v4", gone("comment other -j DROP")),
    ),
    Mutation("service without its end", gone('"ssh.drop" drop'), ("v4", gone("comment ssh -j DROP")), same=_ENDS),
    Mutation("lost last drop", gone('"other.drop" drop'), ("v6", gone("comment other -j DROP")), same=_ENDS),
    Mutation(
        "policy accept",
        sub("policy drop", "policy accept"),
        ("v4", gone("comment other -j DROP")),
        same={"nft": "the last rule drops as well"},
    ),
    Mutation(
        "jump for goto",
        everywhere("goto service", "jump service"),
        ("v4", everywhere(" -g ", " -j ")),
        same=dict.fromkeys(("nft", "iptables"), "the last rule of a service's chain decides every packet"),
    ),
    Mutation(
        "base chain added that accepts",
        sub("chain input", "chain first { type filter hook input priority -10; policy accept; }\nchain input"),
        ("v4", added("-A FWC-s.ssh", "-A FWC-s.rtp -j ACCEPT")),
        same={"nft": "an accept in one base chain goes on to the next", "iptables": "the chain accepts every packet anyhow"},
    ),
    Mutation(
        "rules of different services swapped",
        moved(_SIP, _SSH),
        ("v4", moved("--dport 5060", "--dport 22 ")),
        same=dict.fromkeys(("nft", "iptables"), "no packet goes to both"),
    ),
    Mutation("a group dropped early", gone(r"\t\tip saddr @carriers.v4 accept"), ("v4", gone("FWC-e.sip .*fwc-carriers4")), early=True),
    Mutation("dynamic members dropped early", gone(r"@agents.dynamic.v6 accept"), ("v6", gone("FWC-e.sip .*fwc-agents~6")), early=True),
    Mutation(
        "trusted sources dropped early", gone(r"\t\tip6 saddr @cluster.v6 accept"), ("v6", gone("FWC-e.sip .*fwc-cluster6")), early=True
    ),
    Mutation("loopback dropped early", gone('iif "lo" accept'), ("v4", gone("FWC-(early|e.sip) -i lo")), early=True),
    Mutation(
        "another port dropped early",
        sub("udp dport 5060 goto early", "tcp dport 443 goto early"),
        ("v4", sub("(FWC-early) -p udp -m udp --dport 5060", r"\1 -p tcp -m tcp --dport 443")),
        early=True,
    ),
    Mutation(
        "everybody dropped early",
        sub("(priority -300; policy) accept", r"\1 drop"),
        ("v6", added("-A FWC-e.sip", "-A FWC-early -j DROP")),
        early=True,
    ),
    Mutation(
        "strangers not dropped early",
        gone("udp dport 5060 goto early"),
        ("v4", gone("FWC-early -p udp -m udp --dport 5060")),
        early=True,
        same=dict.fromkeys(("nft", "iptables"), "the input chain drops them as well"),
    ),
    Mutation(
        "blocked sources not dropped early",
        gone("@block.v6 fib"),
        ("v6", gone("FWC-early .*fwc-block6")),
        early=True,
        same=dict.fromkeys(("nft", "iptables"), "the input chain drops them as well"),
    ),
)
