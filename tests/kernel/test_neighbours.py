"""Rules that other programs made survive everything fwc does, and after `remove` nothing shows that fwc was ever there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli.harness import BACKENDS, POLICY, Host, fwc, plain

CHANGED = POLICY.replace("192.0.2.10,", "192.0.2.10, 192.0.2.64/27,").replace("rtp: {from", "https: {from: anywhere}\n  rtp: {from")

FIREWALLD = """table inet firewalld {
	ct helper helper-sip-udp {
		type "sip" protocol udp
		l3proto inet
	}
	set trusted {
		type ipv4_addr
		flags interval
		elements = { 192.0.2.0/28, 198.51.100.1-198.51.100.9 }
	}
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname "lo" accept
		jump filter_INPUT_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_INPUT_ZONES {
		ip saddr @trusted goto filter_IN_trusted
	}
	chain filter_IN_trusted {
		tcp dport { 22, 80 } ct state { new, untracked } accept
	}
}
"""
FAIL2BAN = """table inet f2b-table {
	set addr-set-sshd {
		type ipv4_addr
		elements = { 192.0.2.66, 192.0.2.67 }
	}
	chain f2b-chain {
		type filter hook input priority filter - 1; policy accept;
		tcp dport { 22 } ip saddr @addr-set-sshd reject with icmp port-unreachable
	}
}
"""
CROWDSEC = """table ip crowdsec {
	set crowdsec-blacklists {
		type ipv4_addr
		flags timeout
		elements = { 203.0.113.66 timeout 4h, 203.0.113.67 timeout 100d }
	}
	chain crowdsec-chain {
		type filter hook input priority filter - 10; policy accept;
		ip saddr @crowdsec-blacklists counter drop
	}
}
table ip6 crowdsec6 {
	set crowdsec6-blacklists {
		type ipv6_addr
		flags timeout
		elements = { 2001:db8::66 timeout 4h }
	}
	chain crowdsec6-chain {
		type filter hook input priority filter - 10; policy accept;
		ip6 saddr @crowdsec6-blacklists counter drop
	}
}
"""
ODD = """table inet fwc2 {
	comment "not ours, whatever its name begins with"
	counter sip.accept { }
	quota month { over 100 mbytes }
	map ports { type inet_service : verdict; elements = { 23 : drop } }
	chain input {
		type filter hook input priority 5; policy accept;
		tcp dport vmap @ports
		limit rate 3/hour log prefix "fwc drop: "
	}
}
table netdev early {
	chain in {
		type filter hook ingress device "lo" priority -500; policy accept;
	}
}
"""
DOCKER = """*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""
BANNED = """*filter
:f2b-sshd - [0:0]
-I INPUT 1 -p tcp -m multiport --dports 22,2222 -j f2b-sshd
-A f2b-sshd -s {banned} -j REJECT
-A f2b-sshd -j RETURN
COMMIT
"""
UFW = """*filter
:INPUT DROP [0:0]
:ufw{v}-before-input - [0:0]
:ufw{v}-user-input - [0:0]
:ufw{v}-reject-input - [0:0]
-A INPUT -j ufw{v}-before-input
-A INPUT -j ufw{v}-reject-input
-A ufw{v}-before-input -i lo -j ACCEPT
-A ufw{v}-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw{v}-before-input -j ufw{v}-user-input
-A ufw{v}-user-input -p tcp -m tcp --dport 22 -m comment --comment "'dapp_OpenSSH' \\"FWC-input\\"" -j ACCEPT
COMMIT
"""
SETS = """create crowdsec-blacklists hash:net family inet hashsize 1024 maxelem 65536 timeout 300000
add crowdsec-blacklists 203.0.113.0/25 timeout 200000
add crowdsec-blacklists 198.51.100.7 timeout 200000
create f2b-sshd hash:ip family inet hashsize 1024 maxelem 65536
add f2b-sshd 192.0.2.66
create fwcx-not-ours hash:ip family inet6 hashsize 1024 maxelem 65536
add fwcx-not-ours 2001:db8::66
"""
SET_RULE = "*filter\n-I INPUT 1 -m set --match-set crowdsec-blacklists src -j DROP\nCOMMIT\n"


def iptables_world(host: Host, variant: str) -> None:
    """What docker, fail2ban, ufw and the crowdsec bouncer leave in one variant's tables, and the sets they match."""
    if "crowdsec-blacklists" not in host.run("ipset", "list", "-n"):
        host.run("ipset", "restore", stdin=SETS)
    for text in (DOCKER, BANNED.format(banned="192.0.2.66/32"), UFW.format(v=""), SET_RULE):
        host.run(f"iptables-{variant}-restore", "--noflush", stdin=text)
    for text in (BANNED.format(banned="2001:db8::66/128"), UFW.format(v="6")):
        host.run(f"ip6tables-{variant}-restore", "--noflush", stdin=text)


def nft_world(host: Host) -> None:
    """Tables of firewalld, fail2ban, crowdsec, and some that try to look like ours."""
    host.run("nft", "-f", "-", stdin=FIREWALLD + FAIL2BAN + CROWDSEC + ODD)


def empty_world(host: Host) -> None:
    """Nobody else."""


def docker_alone(host: Host) -> None:
    """Docker's IPv4 rules in iptables-nft, and nothing for IPv6."""
    host.run("iptables-nft-restore", "--noflush", stdin=DOCKER)


def everything(host: Host) -> None:
    """A host that mixes all of them."""
    nft_world(host)
    iptables_world(host, "nft")
    iptables_world(host, "legacy")


WORLDS = {
    "nobody": empty_world,
    "native nft": nft_world,
    "docker alone": docker_alone,
    "iptables-nft": lambda host: iptables_world(host, "nft"),
    "iptables-legacy": lambda host: iptables_world(host, "legacy"),
    "everybody": everything,
}


def listings(host: Host) -> dict[str, str]:
    """Everything the namespace's kernel holds, handles of nftables rules included, without counts and times.

    The legacy tables are named: asking for them makes them, before as after.
    """
    found = {"nft": plain(host.run("nft", "-a", "list", "ruleset"))}
    for family in ("ip", "ip6"):
        found[f"{family}tables-nft"] = plain(host.run(f"{family}tables-nft-save"))
        for table in ("filter", "nat", "raw", "mangle"):
            found[f"{family}tables-legacy {table}"] = plain(host.run(f"{family}tables-legacy-save", "-t", table))
    saved = re.sub(r"(add \S+ \S+) timeout \d+", r"\1", host.run("ipset", "save"))
    found["ipset"] = "\n".join(sorted(re.sub(r" (initval|bucketsize) \S+", "", saved).splitlines()))
    return found


def foreign(found: dict[str, str]) -> dict[str, list[str]]:
    """The part of listings that is not fwc's."""
    left = {}
    for name, text in found.items():
        kept = re.sub(r"^table inet fwc \{.*?^\}$", "", text, flags=re.M | re.S)
        kept = re.sub(r"^\tchain FWC-.*?^\t\}$", "", kept, flags=re.M | re.S)
        # The jump of iptables-nft makes a table and built-in chains; empty ones are nobody's.
        kept = re.sub(
            r"^\tchain (PREROUTING|INPUT|FORWARD|OUTPUT) \{ # handle \d+\n\t\ttype .*\n(.*jump FWC-.*\n)?\t\}$", "", kept, flags=re.M
        )
        kept = re.sub(r"^table ip6? (filter|raw) \{ # handle \d+\s*\}$", "", kept, flags=re.M)
        lines = [line for line in kept.splitlines() if line and not OURS.search(line)]
        if name.endswith("-nft"):
            lines = re.sub(EMPTY_TABLE, "", "\n".join((*lines, "")), flags=re.M).splitlines()
        left[name] = lines
    return left


OURS = re.compile(r"^(:FWC-|-A FWC-|-A (INPUT|PREROUTING) -j FWC-|(create|add) fwc-|\t\t.*jump FWC-)")
EMPTY_TABLE = r"^\*(filter|raw)\n(:[A-Z]+ ACCEPT \[0:0\]\n)+COMMIT\n"


def break_ours(host: Host) -> None:
    """Take out what is ours as far as an operator's one command would."""
    if host.backend == "nftables":
        host.run("nft", "flush", "table", "inet", "fwc")
    else:
        for version in (4, 6):
            host.iptables("-D", "INPUT", "-j", "FWC-input", version=version)
            host.iptables("-F", "FWC-input", version=version)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", WORLDS)
def test_neighbours_are_left_alone(tmp_path: Path, netns: str, backend: str, world: str) -> None:
    """Apply, change, repair and remove: what others made keeps its handles, places and contents, and at the end no byte is left."""
    host = Host(tmp_path, netns, backend)
    WORLDS[world](host)
    before = listings(host)
    theirs = foreign(before)

    host.apply(POLICY)
    applied = listings(host)
    host.apply(CHANGED)
    changed = foreign(listings(host))
    break_ours(host)
    host.apply(CHANGED)
    repaired = foreign(listings(host))
    removed = host.fwc("remove", "--yes", "--json").json
    after = listings(host)

    assert (applied != before, any(theirs.values())) == (True, True)
    assert foreign(applied) == theirs
    assert changed == theirs
    assert repaired == theirs
    assert removed == {"removed": [backend]}
    assert after == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_remove_takes_every_backend(tmp_path: Path, netns: str, backend: str) -> None:
    """`remove` without `--backend` finds what is ours wherever it is, without any record of it."""
    host = Host(tmp_path, netns, backend)
    before = listings(host)
    host.apply()

    ran = fwc("--netns", netns, "--state-dir", str(tmp_path / "elsewhere"), "remove", "--yes", "--json")

    assert ran.json == {"removed": [backend]}
    assert listings(host) == before


def test_status_does_not_count_others(tmp_path: Path, netns: str) -> None:
    """Another program's rules are no drift of ours."""
    host = Host(tmp_path, netns)
    host.apply()

    everything(host)

    assert host.in_sync(POLICY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_put_in_front_of_us_stay_there(tmp_path: Path, netns: str, backend: str) -> None:
    """A ban that fail2ban inserts in front of our jump is neither moved nor drift, and the next apply keeps it."""
    host = Host(tmp_path, netns, backend)
    host.apply()
    iptables_world(host, "nft")
    iptables_world(host, "legacy")
    theirs = foreign(listings(host))

    synced = host.in_sync(POLICY)
    host.apply(CHANGED)

    assert synced
    assert foreign(listings(host)) == theirs
