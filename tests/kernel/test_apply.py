"""What an apply does to a real kernel: nothing where nothing changed, only what differs where something did."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import kernelspace
import pytest
from cli.harness import BACKENDS, POLICY, Host, plain

from fwcompiler.addresses import parse_address
from fwcompiler.kernel import ipset, netns, nftset

RESPELT = """# the same policy in other words
version: 1
services:
  ssh: {from: [admins]}
  rtp: {ports: 10000-20000, from: anywhere}
  sip:
    ports: [udp/5060]
    from:   # in the order in which they joined
      - carriers
      - agents
groups:
  admins: ["2001:DB8:ad:0::10", 192.0.2.10-192.0.2.10]
  agents: {dynamic: {max: 4096, timeout: 720m}, members: [203.0.113.0/25, 203.0.113.128/25]}
  carriers:
    - 2001:db8:51::/48
    - {address: 198.51.100.16/28, comment: the only one}
"""
MORE = POLICY.replace("198.51.100.16/28,", "198.51.100.16/28, 198.51.100.77,").replace("sip: {from", "wss: {from: [admins]}\n  sip: {from")
BIG = 3000


def big(count: int = BIG, service: str = "") -> str:
    """A policy with a group of that many networks, none of which touches the next."""
    networks = "".join(f"    - 10.{n >> 7}.{2 * (n & 127)}.0/24\n" for n in range(count))
    return f"version: 1\ngroups:\n  carriers:\n{networks}  admins: [192.0.2.10]\nservices:\n  sip: {{from: [carriers]}}\n{service}"


@pytest.fixture(params=BACKENDS)
def host(request: pytest.FixtureRequest, tmp_path: Path, netns: str) -> Host:
    """A host of each backend in turn."""
    return Host(tmp_path, netns, request.param)


@pytest.fixture(params=BACKENDS[1:])
def ipt_host(request: pytest.FixtureRequest, tmp_path: Path, netns: str) -> Host:
    """A host of each variant of iptables."""
    return Host(tmp_path, netns, request.param)


@pytest.fixture
def nft_host(tmp_path: Path, netns: str) -> Host:
    """A host with nftables."""
    return Host(tmp_path, netns)


def generation(host: Host) -> int:
    """The number that the kernel gives the nftables ruleset: every transaction raises it."""
    namespace = netns.named(host.netns)
    try:
        with namespace.entered():
            return nftset.generation()
    finally:
        namespace.close()


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its time and content; but the lock, which whoever writes takes."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"}


def rule_handles(host: Host) -> list[str]:
    """Handles of all rules of the table: a rule that was put in anew has another one."""
    return re.findall(
        r"# handle (\d+)$", "".join(re.findall(r"\tchain [^}]*\}", host.run("nft", "-a", "-t", "list", "table", "inet", "fwc"))), re.M
    )


def knock(host: Host, port: int = 9) -> None:
    """Send a UDP packet from the host to itself over a link that is not loopback, so that rules count it."""
    namespace = netns.named(host.netns)
    try:
        with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind(("192.0.2.1", 0))
            sender.sendto(b"knock", ("192.0.2.2", port))
    finally:
        namespace.close()


@pytest.fixture
def linked(host: Host) -> Iterator[Host]:
    """A host with a peer: what the namespace 192.0.2.1 sends arrives at the host through a veth pair."""
    peer = f"{host.netns}p"
    kernelspace.run(("ip", "netns", "add", peer))
    try:
        host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", peer)
        host.run("ip", "address", "add", "192.0.2.2/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        client = Host(host.folder, peer, host.backend)
        client.run("ip", "address", "add", "192.0.2.1/24", "dev", "eth0")
        client.run("ip", "link", "set", "eth0", "up")
        yield client
    finally:
        kernelspace.run(("ip", "netns", "delete", peer))


def counted(host: Host, service: str, verdict: str) -> int:
    """Packets that `status` counts at a service."""
    return int(host.fwc("status", "--json").json["counters"].get(service, {}).get(verdict, {"packets": 0})["packets"])


def test_second_apply_sends_nothing(nft_host: Host) -> None:
    """The same policy again is no transaction: the kernel's generation stays, and so does every file of the state."""
    nft_host.apply()
    before, known = generation(nft_host), files(nft_host.state)

    ran = nft_host.apply()

    assert (generation(nft_host), files(nft_host.state)) == (before, known)
    assert ran.out == "in sync: generation 1 (nftables)\n"


def test_second_apply_changes_nothing(host: Host) -> None:
    """The same policy again leaves rules, sets and the state directory exactly as they are, on every backend."""
    host.apply()
    before, known = host.ours(), files(host.state)

    host.apply()

    assert (host.ours(), files(host.state)) == (before, known)


def test_spelling_is_no_change(host: Host) -> None:
    """Order, comments, and other spellings of the same addresses, ports and durations are the same policy."""
    host.apply(POLICY)

    ran = host.fwc("diff", host.write(RESPELT))

    assert (ran.code, ran.out) == (0, "in sync: the kernel holds exactly this policy\n")


def test_respelt_policy_is_not_sent(nft_host: Host) -> None:
    """Applying the respelt policy is no transaction."""
    nft_host.apply(POLICY)
    before = generation(nft_host)

    ran = nft_host.apply(RESPELT)

    assert generation(nft_host) == before
    assert ran.out.startswith("in sync: ")


def test_one_entry_of_a_big_set(nft_host: Host) -> None:
    """One carrier more is one element transaction: rules keep their handles, the set its name, the rest its content."""
    nft_host.apply(big())
    rules, before = rule_handles(nft_host), generation(nft_host)

    ran = nft_host.fwc("apply", nft_host.write(big(BIG + 1)), "--yes")

    assert ran.code == 0, ran
    assert (rule_handles(nft_host), generation(nft_host)) == (rules, before + 1)
    assert "carriers.v4" in nft_host.set_names()
    assert nft_host.in_sync(big(BIG + 1))


def test_one_entry_of_a_big_set_in_ipset(ipt_host: Host) -> None:
    """One carrier more is one `ipset add`: no chain is sent anew, with rules of others about as well."""
    ipt_host.apply(big())
    ipt_host.iptables("-I", "INPUT", "-s", "192.0.2.99", "-j", "DROP")

    ran = ipt_host.fwc("diff", ipt_host.write(big(BIG + 1)), "--json")

    assert ran.json["changes"] == [f"add element fwc-carriers4 {{ 10.{BIG >> 7}.{2 * (BIG & 127)}.0/24 }}"]


def test_counted_jump_is_no_reason_to_send_rules(host: Host, linked: Host) -> None:
    """Packets that went through our jump do not turn a change of content into a change of rules."""
    host.apply()
    for _ in range(3):
        knock(linked)

    changes = host.fwc("diff", host.write(POLICY.replace("192.0.2.10,", "192.0.2.10, 192.0.2.12,")), "--json").json["changes"]

    assert len(changes) == 1, changes
    assert "192.0.2.12" in changes[0]


def test_rules_and_big_content_flip_together(nft_host: Host) -> None:
    """Where rules and a big set change in one apply, the set's twin is filled first and the old one goes with the same transaction."""
    nft_host.apply(big())

    ran = nft_host.fwc("apply", nft_host.write(big(BIG + 9, "  ssh: {from: [admins, carriers]}\n")), "--yes", "-v")

    assert ran.code == 0, ran
    transactions = [line.strip() for line in ran.out.splitlines() if "set inet fwc carriers" in line]
    assert [line.split(" { ")[0] for line in transactions] == ["add set inet fwc carriers.v4.b", "delete set inet fwc carriers.v4"]
    assert (nft_host.twins(), "carriers.v4.b" in nft_host.set_names()) == ([], True)


def test_flips_go_back_and_forth(host: Host) -> None:
    """Each change of rules and content together takes the other slot's name; no twin is ever left behind."""
    for count, service in ((BIG, ""), (BIG + 1, "  rtp: {from: anywhere}\n"), (BIG, ""), (BIG - 1, "  https: {from: anywhere}\n")):
        host.apply(big(count, service))

        assert host.twins() == []
        assert host.in_sync(big(count, service))


def test_counters_survive(host: Host, linked: Host) -> None:
    """What was counted before an apply is still counted after it, also where the counting chain itself was rewritten."""
    host.apply()
    for _ in range(3):
        knock(linked, 5060)
    before = counted(host, "sip", "drop")

    host.apply(MORE)

    assert (before, counted(host, "sip", "drop")) == (3, 3)


def add_member(host: Host, address: str, seconds: int) -> None:
    """Put an address into the dynamic part of `agents`, as `fwc allow` does."""
    version, value = parse_address(address)
    namespace = netns.named(host.netns)
    try:
        with namespace.entered():
            if host.backend == "nftables":
                nftset.add_member(f"agents.dynamic.v{version}", version, value, seconds * 1000)
            else:
                ipset.add_members(f"fwc-agents~{version}", version, [(value, seconds)])
    finally:
        namespace.close()


def member_times(host: Host) -> dict[str, int]:
    """Dynamic members of `agents` and the seconds they have left."""
    return {m["address"]: m["seconds_left"] for m in host.fwc("status", "--json").json["members"]["agents"]}


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(MORE, id="other rules and addresses"),
        pytest.param(POLICY.replace("timeout: 12h", "timeout: 6h"), id="a shorter timeout for the next ones"),
        pytest.param(POLICY.replace("max: 4096", "max: 100"), id="less room"),
        pytest.param(POLICY.replace("{from: [carriers, agents]}", "{ports: [udp/5070], from: [agents]}"), id="another port"),
    ],
)
def test_dynamic_members_survive(host: Host, policy: str) -> None:
    """Members allowed at run time are kept over an apply, with the time they had left and not a second more."""
    host.apply()
    given = {"192.0.2.201": 3000, "2001:db8::201": 4000}
    for address, seconds in given.items():
        add_member(host, address, seconds)

    host.apply(policy)

    left = member_times(host)
    assert left.keys() == given.keys()
    assert all(given[a] - 30 <= left[a] <= given[a] for a in given), left


NFT_EDITS = {
    "rule added": "insert rule inet fwc input tcp dport 23 accept",
    "rule added to a service": "insert rule inet fwc service.ssh accept",
    "chain emptied": "flush chain inet fwc service.sip",
    "element deleted": "delete element inet fwc carriers.v4 { 198.51.100.16/28 }",
    "element added": "add element inet fwc admins.v4 { 203.0.113.7 }",
    "set emptied": "flush set inet fwc carriers.v6",
    "chain added": "add chain inet fwc extra",
    "base chain added": "add chain inet fwc extra { type filter hook forward priority 5; policy drop; }",
    "nat chain added": """add chain inet fwc extra { type nat hook prerouting priority -100; }
add rule inet fwc extra tcp dport 80 redirect to :8080""",
    "set added": "add set inet fwc own { type ipv4_addr; }",
    "interval set added": "add set inet fwc own.v4 { type ipv4_addr; flags interval; elements = { 192.0.2.0/24 } }",
    "map added": "add map inet fwc own { type ipv4_addr : verdict; }",
    "verdict map to a chain added": """add chain inet fwc x
add map inet fwc own { type inet_service : verdict; elements = { 23 : jump x } }""",
    "counter added": "add counter inet fwc own",
    "quota added": "add quota inet fwc own { over 1 mbytes }",
    "limit added": "add limit inet fwc own { rate 1/second }",
    "helper added": 'add ct helper inet fwc own { type "sip" protocol udp; }',
    "policy accepts": "add chain inet fwc input { policy accept; }",
    "table emptied": "flush table inet fwc",
    "table deleted": "delete table inet fwc",
    "table dormant": "add table inet fwc { flags dormant; }",
    "log rule deleted, verdict kept": "flush chain inet fwc service.rtp\nadd rule inet fwc service.rtp accept",
    "static set made dynamic": """flush chain inet fwc service.ssh
delete set inet fwc admins.v4
add set inet fwc admins.v4 { type ipv4_addr; flags timeout; timeout 1h; }
add rule inet fwc service.ssh ip saddr @admins.v4 counter name "ssh.accept" accept comment "ssh"
add rule inet fwc service.ssh ip6 saddr @admins.v6 counter name "ssh.accept" accept comment "ssh"
add rule inet fwc service.ssh counter name "ssh.drop" drop comment "ssh"
""",
}


@pytest.mark.parametrize("edit", NFT_EDITS)
def test_hand_edit_in_nftables(nft_host: Host, edit: str) -> None:
    """Whatever somebody changes in the table by hand, `status` and `diff` report and `apply` puts right."""
    nft_host.apply()
    before = nft_host.ours()
    nft_host.run("nft", "-f", "-", stdin=NFT_EDITS[edit])

    status = nft_host.fwc("status", "--json").json
    difference = nft_host.fwc("diff", nft_host.write())
    nft_host.apply()

    assert (status["in_sync"], bool(status["drift"]), difference.code) == (False, True, 1)
    assert nft_host.in_sync(POLICY)
    assert sorted(nft_host.ours().splitlines()) == sorted(before.splitlines())


IPTABLES_EDITS: dict[str, tuple[str, ...]] = {
    "rule added": ("iptables -I FWC-input -p tcp --dport 23 -j ACCEPT",),
    "rule added for IPv6 only": ("ip6tables -I FWC-s.ssh -j ACCEPT",),
    "rule deleted": ("iptables -D FWC-input 1",),
    "chain emptied": ("iptables -F FWC-s.sip",),
    "chain added": ("iptables -N FWC-own",),
    "jump lost": ("iptables -D INPUT -j FWC-input",),
    "jump lost for IPv6": ("ip6tables -D INPUT -j FWC-input",),
    "jump doubled": ("iptables -A INPUT -j FWC-input",),
    "jump narrowed": ("iptables -D INPUT -j FWC-input", "iptables -A INPUT -p udp -j FWC-input"),
    "jump from another chain": ("iptables -I FORWARD -j FWC-input",),
    "way past our jump": ("iptables -I INPUT -p tcp -g FWC-s.ssh",),
    "everything emptied": ("iptables -F", "ip6tables -F"),
    "everything deleted": ("iptables -F", "iptables -X"),
    "element deleted": ("ipset del fwc-carriers4 198.51.100.16/28",),
    "element added": ("ipset add fwc-admins4 203.0.113.7",),
    "set emptied": ("ipset flush fwc-carriers6",),
    "set added": ("ipset create fwc-own4 hash:net",),
    "odd set added": ("ipset create fwc-own bitmap:port range 0-99",),
}


@pytest.mark.parametrize("edit", IPTABLES_EDITS)
def test_hand_edit_in_iptables(ipt_host: Host, edit: str) -> None:
    """Whatever somebody changes in our chains, sets and jumps by hand, `status` and `diff` report and `apply` puts right."""
    ipt_host.apply()
    before = ipt_host.ours()
    for line in IPTABLES_EDITS[edit]:
        head, *rest = line.split()
        if head == "ipset":
            ipt_host.run(head, *rest)
        else:
            ipt_host.iptables(*rest, version=6 if head == "ip6tables" else 4)

    status = ipt_host.fwc("status", "--json").json
    difference = ipt_host.fwc("diff", ipt_host.write())
    ipt_host.apply()

    assert (status["in_sync"], bool(status["drift"]), difference.code) == (False, True, 1)
    assert ipt_host.in_sync(POLICY)
    slots = re.compile(r"(fwc-\S+[46])b\b")
    assert sorted(slots.sub(r"\1", ipt_host.ours()).splitlines()) == sorted(before.splitlines())


def test_access_by_hand_is_named(host: Host) -> None:
    """Drift is told as access: who can reach what because of the edit."""
    host.apply()
    if host.backend == "nftables":
        host.run("nft", "add", "element", "inet", "fwc", "admins.v4", "{ 203.0.113.7 }")
    else:
        host.run("ipset", "add", "fwc-admins4", "203.0.113.7")

    lost = host.fwc("diff", host.write(), "--json").json["lost"]

    assert lost == [{"from": ["203.0.113.7"], "to": "tcp/22", "service": "ssh"}]


LISTED = "version: 1\ngroups: {carriers: [{file: list.txt}]}\nservices: {sip: {from: [carriers]}}\n"


def addresses(count: int) -> str:
    """A list file of that many addresses."""
    return "".join(f"198.51.100.{n}\n" for n in range(1, count + 1))


def test_halved_list_is_refused(nft_host: Host) -> None:
    """A list that lost more than half of its addresses is refused, and the old ones stay in force."""
    nft_host.write(addresses(100), "list.txt")
    nft_host.apply(LISTED)
    nft_host.write(addresses(49), "list.txt")
    before = plain(nft_host.ours())

    ran = nft_host.apply(LISTED, code=3)

    assert re.search(r"error\[list-shrink\]: `\S*list.txt` had 100 .*at the last apply and has 49 now", ran.err)
    assert nft_host.ours() == before


def test_half_of_a_list_may_go(nft_host: Host) -> None:
    """A list that keeps half of its addresses is applied."""
    nft_host.write(addresses(100), "list.txt")
    nft_host.apply(LISTED)
    nft_host.write(addresses(50), "list.txt")

    nft_host.apply(LISTED)

    assert nft_host.in_sync(LISTED)


def test_list_may_shrink_where_the_entry_says_so(nft_host: Host) -> None:
    """`allow: [shrink]` at the entry is how an operator says that it is meant."""
    meant = LISTED.replace("file: list.txt", "file: list.txt, allow: [shrink]")
    nft_host.write(addresses(100), "list.txt")
    nft_host.apply(LISTED)
    nft_host.write(addresses(3), "list.txt")

    nft_host.apply(meant)

    assert nft_host.in_sync(meant)


def test_halved_list_is_refused_by_any_path(nft_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is the same one, whether the policy was named from its own folder or with its full path."""
    nft_host.write(addresses(100), "list.txt")
    path = nft_host.write(LISTED)
    monkeypatch.chdir(nft_host.folder)
    assert nft_host.fwc("apply", "policy.yaml", "--yes").code == 0
    nft_host.write(addresses(1), "list.txt")

    ran = nft_host.fwc("apply", path, "--yes")

    assert (ran.code, "error[list-shrink]" in ran.err) == (3, True)


def test_another_backend_takes_over(host: Host) -> None:
    """Applying through another backend leaves no second firewall of ours that nobody keeps up to date, or says so."""
    other = BACKENDS[(BACKENDS.index(host.backend) + 1) % 3]
    host.apply()
    old = Host(host.folder, host.netns, host.backend)
    host.backend = other

    ran = host.fwc("apply", host.write(), "--yes")

    assert ran.code in (0, 4)
    assert old.backend in ran.err or not old.ours()
    assert (ran.code == 0) == bool(re.search("hook input|FWC-input", host.ours()))


def test_removing_another_backend_forgets_nothing(host: Host) -> None:
    """`remove --backend` of one that holds nothing leaves the record of the one in force alone."""
    host.apply()
    other = Host(host.folder, host.netns, BACKENDS[(BACKENDS.index(host.backend) + 1) % 3])

    ran = other.fwc("remove", "--yes", "--json")

    assert ran.json == {"removed": []}
    assert host.in_sync(POLICY)
    assert host.fwc("status", "--json").json["generation"]["number"] == 1
