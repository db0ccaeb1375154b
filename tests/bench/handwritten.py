"""The rules of one policy as experienced people write them by hand, in the shapes that are known to be fast.

Every shape means what the policy means: `bench_packets.py` shows that with `fwc diff --against` before it measures anything.
The shapes: `plain` asks the block list, then the ports, all at input; `maps` does with verdict maps on protocol and port;
`signalling first` asks for the restricted ports first, since none of their sources is blocked; `early` drops strangers to SIP and
blocked sources before connection tracking as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

POLICY = """\
version: 1
groups:
  carriers: [{{file: carriers.txt}}]
  bad: [{{file: bad.txt}}]
block: {{from: [bad]}}
services:
  sip: {{from: [carriers]}}
  rtp: {{from: anywhere{rtp}}}
  https: {{from: anywhere}}
  ssh: {{from: [carriers]}}
"""

_TABLE = """\
table inet hand {{
	set carriers {{ type ipv4_addr; flags interval; elements = {{ {carriers} }}; }}
	set bad {{ type ipv4_addr; flags interval; elements = {{ {bad} }}; }}
	chain signalling {{ ip saddr @carriers counter accept; counter drop; }}
	chain early_sip {{ ip saddr @carriers accept; iif "lo" accept; fib daddr type local counter drop; }}
{raw}	chain input {{
		type filter hook input priority filter; policy drop;
		iif "lo" counter accept
		ip saddr 127.0.0.0/8 counter drop
		ip daddr 127.0.0.0/8 counter drop
		ip6 saddr ::1 counter drop
		ip6 daddr ::1 counter drop
{ports}		icmp type {{ 3, 11, 12 }} counter accept
		icmp type 8 limit rate 20/second burst 40 packets counter accept
		icmpv6 type {{ 1, 2, 3, 4, 130, 131, 132, 133, 134, 135, 136, 143 }} counter accept
		icmpv6 type 128 limit rate 20/second burst 40 packets counter accept
		limit rate 5/second burst 10 packets log prefix "drop: " level info
		counter drop
	}}
}}
"""
_BLOCK = "ip saddr @bad counter drop"
_INVALID = "ct state invalid counter drop"
_ESTABLISHED = "ct state established,related counter accept"
_SIGNALLING = ("tcp dport 22 goto signalling", "udp dport 5060 goto signalling")
_PUBLIC = ("tcp dport 443 counter accept", "udp dport 10000-20000 counter accept")
_SIGNALLING_MAP = "meta l4proto . th dport vmap { tcp . 22 : goto signalling, udp . 5060 : goto signalling }"
_PUBLIC_MAP = "meta l4proto . th dport vmap { tcp . 443 : accept, udp . 10000-20000 : accept }"
_RAW = "\tchain early { type filter hook prerouting priority raw; policy accept; "
_OUT = "\tchain out { type filter hook output priority raw; policy accept; udp sport 10000-20000 notrack; }\n"
_EARLY_REST = 'udp dport 5060 goto early_sip; iif "lo" accept; ip saddr @bad fib daddr type local counter drop; }\n'


def nft(carriers: Sequence[str], bad: Sequence[str], *, bypass: bool) -> dict[str, str]:
    """Text for `nft -f` by the name of the shape."""
    untrack = f"{_RAW}udp dport 10000-20000 notrack; }}\n{_OUT}" if bypass else ""
    early = f"{_RAW}udp dport 10000-20000 {'notrack ' if bypass else ''}accept; {_EARLY_REST}{_OUT if bypass else ''}"
    first = (_INVALID, *_SIGNALLING, _BLOCK, _ESTABLISHED, *_PUBLIC)
    shapes = {
        "plain": (untrack, (_BLOCK, _INVALID, *_SIGNALLING, _ESTABLISHED, *_PUBLIC)),
        "maps": (untrack, (_BLOCK, _INVALID, _SIGNALLING_MAP, _ESTABLISHED, _PUBLIC_MAP)),
        "signalling first": (untrack, first),
        "early, signalling first": (early, first),
    }
    sets = {"carriers": ", ".join(carriers), "bad": ", ".join(bad)}
    return {name: _TABLE.format(**sets, raw=raw, ports="".join(f"\t\t{line}\n" for line in ports)) for name, (raw, ports) in shapes.items()}


_IPSETS = """\
create carriers hash:net family inet hashsize {size} maxelem 1000000
create bad hash:net family inet hashsize {size} maxelem 1000000
"""
_FILTER = """\
*filter
:INPUT DROP [0:0]
:SIGNALLING - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -s {loopback} -j DROP
-A INPUT -d {loopback} -j DROP
{first}-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -p tcp -m tcp --dport 22 -g SIGNALLING
-A INPUT -p udp -m udp --dport 5060 -g SIGNALLING
{then}-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -p tcp -m tcp --dport 443 -j ACCEPT
-A INPUT -p udp -m udp --dport 10000:20000 -j ACCEPT
{icmp}-A INPUT -m limit --limit 5/second --limit-burst 10 -j LOG --log-prefix "drop: "
-A INPUT -j DROP
{known}-A SIGNALLING -j DROP
COMMIT
"""
_UNTRACK = """\
-A PREROUTING -p udp -m udp --dport 10000:20000 -j CT --notrack
-A OUTPUT -p udp -m udp --sport 10000:20000 -j CT --notrack
"""
_EARLY = """\
-A PREROUTING -p udp -m udp --dport 10000:20000 -j ACCEPT
-A PREROUTING -p udp -m udp --dport 5060 -g EARLY_SIP
-A PREROUTING -i lo -j ACCEPT
"""
_EARLY_BLOCK = "-A PREROUTING -m set --match-set bad src -m addrtype --dst-type LOCAL -j DROP\n"
_EARLY_KNOWN = "-A EARLY_SIP -m set --match-set carriers src -j ACCEPT\n"
_EARLY_DROP = "-A EARLY_SIP -i lo -j ACCEPT\n-A EARLY_SIP -m addrtype --dst-type LOCAL -j DROP\n"
_ICMP = {
    4: ("-p icmp -m icmp --icmp-type", (3, 11, 12), 8),
    6: ("-p ipv6-icmp -m icmp6 --icmpv6-type", (1, 2, 3, 4, 130, 131, 132, 133, 134, 135, 136, 143), 128),
}


def iptables(carriers: Sequence[str], bad: Sequence[str], *, bypass: bool) -> dict[str, Mapping[str, str]]:
    """Texts for `ipset restore` and the two `iptables-restore`, by the name of the shape."""
    size = max(64, 1 << max(len(carriers) // 2 - 1, 0).bit_length())
    sets = "".join([_IPSETS.format(size=size), *(f"add carriers {c}\n" for c in carriers), *(f"add bad {b}\n" for b in bad)])
    shapes = {"plain": (False, False), "signalling first": (True, False), "early, signalling first": (True, True)}
    return {
        name: {"ipset": sets, **{str(v): _filter(v, first) + _raw(v, early, bypass) for v in (4, 6)}}
        for name, (first, early) in shapes.items()
    }


def _filter(version: int, signalling_first: bool) -> str:
    """The table `filter` of one family."""
    kind, types, echo = _ICMP[version]
    icmp = "".join(f"-A INPUT {kind} {n} -j ACCEPT\n" for n in types)
    icmp += f"-A INPUT {kind} {echo} -m limit --limit 20/second --limit-burst 40 -j ACCEPT\n"
    block = "-A INPUT -m set --match-set bad src -j DROP\n" if version == 4 else ""
    known = "-A SIGNALLING -m set --match-set carriers src -j ACCEPT\n" if version == 4 else ""
    first, then = ("", block) if signalling_first else (block, "")
    return _FILTER.format(loopback="127.0.0.0/8" if version == 4 else "::1", first=first, then=then, icmp=icmp, known=known)


def _raw(version: int, early: bool, bypass: bool) -> str:
    """The table `raw` of one family; nothing where nothing is decided there."""
    block, known = (_EARLY_BLOCK, _EARLY_KNOWN) if version == 4 else ("", "")
    drops = f"{_EARLY}{block}{known}{_EARLY_DROP}" if early else ""
    if not (drops or bypass):
        return ""
    chain = ":EARLY_SIP - [0:0]\n" if early else ""
    return f"*raw\n{chain}{_UNTRACK if bypass else ''}{drops}COMMIT\n"
