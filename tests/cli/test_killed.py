"""`kill -9` of fwc at any moment: the kernel holds the old or the new rules, and the next apply finishes the work.

Programs that fwc starts are wrapped, and the wrapper kills fwc when its turn comes, so that every step between two
programs is tried in the same way each time. Moments inside fwc itself, netlink among them, are tried by the clock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from cli.harness import FWC, POLICY, Host, killed_at, valid, wrapper

from fwcompiler.addresses import EVERYONE, NOBODY, Addresses

PROGRAMS = {
    "nftables": ("nft",),
    **{
        f"iptables-{v}": ("ipset", *(f"{f}tables-{v}-{verb}" for f in ("ip", "ip6") for verb in ("restore", "save")))
        for v in ("nft", "legacy")
    },
}
KILLER = """
exec 9>"$HERE/lock"; flock 9
n=$(( $(cat "$HERE/count" 2>/dev/null || echo 0) + 1 )); echo $n > "$HERE/count"; flock -u 9; exec 9>&-
"$REAL" "$@"; code=$?
if [ "$n" = "$(cat "$HERE/victim" 2>/dev/null)" ]; then kill -9 $PPID; fi
exit $code
"""
CARRIERS = "".join(f"    - 10.{n >> 7}.{2 * (n & 127)}.0/24\n" for n in range(600))
OLD = f"""version: 1
groups:
  carriers:
{CARRIERS}  admins: [192.0.2.10, 2001:db8::10]
services:
  sip: {{from: [carriers]}}
  ssh: {{from: [admins]}}
"""
NEW = OLD.replace("10.0.0.0/24", "10.200.0.0/24").replace(
    "ssh: {from: [admins]}", "ssh: {from: [admins, carriers]}\n  rtp: {from: anywhere}"
)


def span(text: str) -> tuple[int, int, int]:
    """A prefix, a range `a-b` or an address, as family, first and last."""
    first, _, last = text.partition("-")
    networks = [ip_network(part) for part in (first, last or first)]
    return networks[0].version, int(networks[0][0]), int(networks[1][-1])


def reached(entries: Sequence[Mapping[str, Any]]) -> dict[str, Addresses]:
    """Who gains or loses what, by protocol and ports."""
    found: dict[str, Addresses] = {}
    for entry in entries:
        spans = [span(text) for text in entry["from"] if text != "anywhere"]
        named = Addresses.of(*([(low, high) for v, low, high in spans if v == version] for version in (4, 6)))
        found[entry["to"]] = found.get(entry["to"], NOBODY) | (EVERYONE if "anywhere" in entry["from"] else named)
    return found


def differing(host: Host, policy: str) -> dict[str, dict[str, Addresses]]:
    """What the kernel would gain and lose on the way to a policy."""
    found = valid("diff", host.fwc("diff", host.write(policy, "asked.yaml"), "--json").json)
    return {key: reached(found[key]) for key in ("gained", "lost")}


def check_and_heal(host: Host, old: str, new: str) -> None:
    """After a kill: access between both policies, a state that can be read, and a next apply that ends in sync.

    Each table of iptables is a transaction of its own. Whoever has access by both policies keeps it all the same, and nobody has
    any that neither grants. With nftables, one of both policies is in force as a whole.
    """
    to_old, to_new = differing(host, old), differing(host, new)
    for key, what in (("gained", "access that both policies grant is missing"), ("lost", "neither policy grants what the kernel does")):
        for to in to_old[key].keys() & to_new[key].keys():
            assert not to_old[key][to] & to_new[key][to], f"{to}: {what}"
    if host.backend == "nftables":
        assert not any(to_old.values()) or not any(to_new.values()), "one transaction covers both families"
    status = host.fwc("status", "--json")
    assert status.code == 0, status
    valid("status", status.json)
    host.apply(new)
    assert host.in_sync(new)
    assert host.twins() == []
    assert not (host.state / "generations" / "pending").exists()


def wrapped(folder: Path, netns: str, backend: str, script: str = KILLER) -> Host:
    """A host whose programs are wrapped, with the old policy in force."""
    host = Host(folder, netns, backend)
    host.apply(OLD)
    for name in PROGRAMS[backend]:
        wrapper(folder / "bin", name, script)
    return host


def killed_apply(host: Host, policy: str, victim: int | None) -> tuple[int, int]:
    """Apply as a program that dies after its `victim`-th program has run; exit code and how many programs it ran."""
    folder = host.folder / "bin"
    (folder / "count").write_text("0", encoding="ascii")
    (folder / "victim").write_text("" if victim is None else str(victim), encoding="ascii")
    ran = host.program("apply", host.write(policy), "--yes", "-q", env={"PATH": f"{folder}:{os.environ['PATH']}"})
    return ran.code, int((folder / "count").read_text(encoding="ascii"))


@pytest.mark.parametrize(("backend", "moments"), [("nftables", 5), ("iptables-nft", 9), ("iptables-legacy", 4)])
def test_killed_between_programs(tmp_path: Path, netns: str, backend: str, moments: int) -> None:
    """Dying right after any of the last programs that an apply runs leaves nothing between the old policy and the new one.

    What runs before them is the scratch namespace's, and cannot matter.
    """
    host = wrapped(tmp_path, netns, backend)
    code, total = killed_apply(host, NEW, None)
    assert (code, total > moments) == (0, True)
    old, new = NEW, OLD

    for victim in range(total - moments + 1, total + 1):
        code, _ = killed_apply(host, new, victim)

        assert code in (-signal.SIGKILL, 0), (victim, code)
        check_and_heal(host, old, new)
        old, new = new, old


def test_killed_by_the_clock(host: Host) -> None:
    """Dying at any time of an apply that fills a big set through netlink leaves nothing in between either."""
    host.apply(OLD)
    started = time.monotonic()
    assert host.program("apply", host.write(NEW), "--yes", "-q").code == 0
    whole = time.monotonic() - started
    old, new = NEW, OLD

    for step in range(6):
        child = subprocess.Popen([FWC, *host.common, "apply", host.write(new), "--yes", "-q"], stdin=subprocess.DEVNULL)
        time.sleep(whole * (0.5 + step / 12))
        child.kill()
        child.wait(10)

        # A program that fwc had started may still be at work.
        time.sleep(0.05)
        check_and_heal(host, old, new)
        old, new = new, old


@pytest.mark.parametrize(("backend", "name"), [("nftables", "INT"), ("iptables-nft", "TERM"), ("nftables", "HUP")])
def test_interrupted(tmp_path: Path, netns: str, backend: str, name: str) -> None:
    """A signal while the live rules are being changed leaves one of both policies, and the next apply finishes."""
    host = wrapped(tmp_path, netns, backend, KILLER.replace("kill -9", f"kill -{name}"))
    _, total = killed_apply(host, NEW, None)
    old, new = NEW, OLD

    for victim in range(total - 1, total + 1):
        killed_apply(host, new, victim)

        check_and_heal(host, old, new)
        old, new = new, old


MOMENTS = {
    "before": ("fwcompiler.apply:_execute", "before", "the rules from before are in force", "did not get to its end, and is not recorded"),
    "after": ("fwcompiler.apply:_verify", "after", "all of its rules are in force, and are not recorded yet", "it is generation 2 now"),
}


@pytest.mark.parametrize("backend", ["nftables", "iptables-legacy"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_apply_is_told(host: Host, backend: str, moment: str) -> None:
    """An apply that was killed is told by `status`, `diff`, `allow` and `revoke` with what is in force and what to do; the next apply
    says what became of it, and then nothing is left to say.
    """
    host.backend = backend
    host.apply()
    place, when, in_force, became = MOMENTS[moment]
    policy = host.write(POLICY.replace("192.0.2.10,", "192.0.2.11,"))

    assert killed_at(host, place, when, "apply", policy, "--yes", "-q") == -signal.SIGKILL

    status, diff = valid("status", host.fwc("status", "--json").json), host.fwc("diff", policy, "--json").json
    for notes in (status["notes"], diff["notes"]):
        assert f"that was killed did not get to its end: {in_force}; `fwc apply {policy}` puts it right" in notes[0]
    assert (status["edited"], diff["edited"]) == ([], []), "nobody changed these by hand"
    for command in ("allow", "revoke"):
        ran = host.fwc(command, "agents", "198.51.100.99")
        assert (ran.code, "note: an apply was killed before its end: `fwc status` tells" in ran.out) == (0, True), ran
    ran = host.fwc("apply", policy, "--yes")
    assert (ran.code, f"note: an apply of {policy}" in ran.err, became in ran.err) == (0, True, True), ran
    assert host.fwc("status", "--json").json["notes"] == []
    assert host.fwc("apply", policy, "--yes").err == ""
