"""What a host loads at boot: the last confirmed generation, or the best that is left of it, and never nothing."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli.harness import BACKENDS, FWC, Host, fwc, valid

from fwcompiler.boot import unit_text
from fwcompiler.restore import minimal

FIRST = """version: 1
groups:
  carriers: [198.51.100.16/28, 2001:db8:51::/48]
  agents: {members: [203.0.113.0/24], dynamic: {timeout: 12h, max: 64}}
  admins: [192.0.2.10]
services:
  sip: {from: [carriers, agents]}
  ssh: {from: [admins]}
"""
SECOND = FIRST.replace("198.51.100.16/28", "198.51.100.32/28")


def restart(host: Host) -> None:
    """The kernel forgets everything, as at a restart."""
    if host.backend == "nftables":
        host.run("nft", "flush", "ruleset")
        return
    variant = host.backend.removeprefix("iptables-")
    for family in ("ip", "ip6"):
        for table, action in itertools.product(("raw", "mangle", "nat", "filter"), ("-F", "-X")):
            host.run(f"{family}tables-{variant}", "-t", table, action)
    host.run("ipset", "destroy")


def damage(host: Host, number: int, name: str = "listing.json") -> None:
    """A file of a generation holds something else than was written."""
    path = host.state / "generations" / str(number) / name
    path.write_text(path.read_text(encoding="utf-8")[:-3], encoding="utf-8")


@pytest.mark.parametrize("backend", BACKENDS)
def test_restored(host: Host, backend: str) -> None:
    """After a restart the last generation is back, with its dynamic members and the time they have left; no policy file is needed."""
    host.backend = backend
    host.apply(FIRST)
    host.apply(SECOND)
    assert host.fwc("allow", "agents", "192.0.2.66", "--for", "1h").code == 0
    Path(host.write()).unlink()
    restart(host)
    assert host.ours() == ""

    ran = host.fwc("restore", "--json")

    assert valid("restore", ran.json) == {"generation": 2, "backend": backend, "notes": []}
    assert host.in_sync(SECOND)
    (member,) = host.fwc("status", "--json").json["members"]["agents"]
    assert (member["address"], 3500 < member["seconds_left"] <= 3600) == ("192.0.2.66", True)
    assert host.fwc("restore").code == 0, "a second time it finds nothing to do"


@pytest.mark.parametrize("name", ["listing.json", "sets.json", "meta.json"])
def test_damaged_generation(host: Host, name: str) -> None:
    """A damaged generation gives way to the confirmed one before it, with exit code 4 and the reason."""
    host.apply(FIRST)
    host.apply(SECOND)
    damage(host, 2, name)
    restart(host)

    ran = host.fwc("restore")

    assert (ran.code, "generation 2 cannot be loaded" in ran.err, "generation 1 is in force" in ran.err) == (4, True, True)
    assert host.in_sync(FIRST)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minimal(host: Host, backend: str) -> None:
    """Where no generation is left, only loopback, established, ICMP and the admins' ssh get through; it ends with 4."""
    host.backend = backend
    host.apply(FIRST)
    damage(host, 1)
    restart(host)

    ran = host.fwc("restore")

    assert (ran.code, "ONLY THE MINIMAL RULES ARE IN FORCE" in ran.err, "ssh from the recorded admins" in ran.err) == (4, True, True)
    only_ssh = host.write("version: 1\nname: minimal\ngroups: {admins: [192.0.2.10]}\nservices: {ssh: {from: [admins]}}\n", "minimal.yaml")
    assert valid("verify", host.fwc("verify", only_ssh, "--json").json)["equal"] is True
    host.apply(FIRST)
    assert host.in_sync(FIRST)


def test_state_is_gone(host: Host) -> None:
    """With an empty state directory nobody knows the admins: ssh is open to anybody with a key, everything else is closed."""
    ran = host.fwc("restore")

    assert (ran.code, "no confirmed generation is recorded" in ran.err, "ssh from anybody" in ran.err) == (4, True, True)
    assert "tcp dport 22 goto service.ssh" in host.ours()


def test_another_backend_where_one_fails(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the program of the recorded backend is gone, the minimal rules come through another one."""
    host.apply(FIRST)
    restart(host)
    folder = host.folder / "bin"
    folder.mkdir()
    for path in (*Path("/usr/sbin").glob("*tables*"), *Path("/usr/sbin").glob("ipset"), *Path("/sbin").glob("ipset")):
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))

    ran = host.fwc("restore")
    monkeypatch.undo()

    assert (ran.code, "`nft` is not installed" in ran.err) == (4, True)
    host.backend = "iptables-nft"
    assert "FWC-" in host.ours()


def test_removed(host: Host) -> None:
    """After `fwc remove` nothing is loaded at boot, and that is no failure."""
    host.apply(FIRST)
    assert host.fwc("remove", "--yes").code == 0

    ran = host.fwc("restore")

    assert (ran.code, "`fwc remove` took the rules out" in ran.out, host.ours()) == (0, True, "")
    host.apply(FIRST)
    restart(host)
    assert host.fwc("restore").code == 0
    assert host.in_sync(FIRST)


def test_interrupted_apply_is_not_booted(host: Host) -> None:
    """A generation whose apply never got to its end is dropped."""
    host.apply(FIRST)
    shutil.copytree(host.state / "generations" / "1", host.state / "generations" / "pending")
    restart(host)

    assert host.fwc("restore").code == 0
    assert host.in_sync(FIRST)
    assert not (host.state / "generations" / "pending").exists()


def test_read_only_state(host: Host) -> None:
    """A state directory that cannot be written to is no reason to boot open."""
    host.apply(FIRST)
    restart(host)
    command = (
        f'mount --bind "{host.state}" "{host.state}" && mount -o remount,bind,ro "{host.state}" && {FWC} {" ".join(host.common)} restore'
    )

    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, check=False)

    assert (done.returncode, "restored: generation 1" in done.stdout) == (0, True), done
    assert host.in_sync(FIRST)


def test_a_boot_does_not_wait_for_libraries(host: Host) -> None:
    """`restore` imports neither typer nor pydantic nor pyroute2: a host waits for it."""
    host.apply(FIRST)
    restart(host)
    script = f"""import sys; from fwcompiler.cli import run; code = run({[*host.common, "restore"]!r})
print(code, sorted({{m.partition(".")[0] for m in sys.modules}} & {{"typer", "pydantic", "pyroute2", "yaml", "rich"}}))"""

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "0 []", done


def test_unit(tmp_path: Path) -> None:
    """`install-boot` writes the unit and enables it, and `--remove` leaves nothing of it."""
    root, state = tmp_path / "root", tmp_path / "state"
    common = ("--state-dir", str(state), "install-boot", "--root", str(root), "--json")

    installed = valid("install-boot", fwc(*common).json)["installed"]
    text = Path(installed[0]).read_text(encoding="utf-8")

    assert f"ExecStart={FWC} --state-dir {state} restore\n" in text
    assert "Before=network-pre.target" in text
    assert (Path(installed[1]).is_symlink(), str(Path(installed[1]).readlink())) == (True, "/etc/systemd/system/fwc.service")
    assert fwc(*common).code == 0, "again is no error"
    assert valid("install-boot", fwc(*common, "--remove").json)["removed"] == installed
    assert [p for p in root.rglob("*") if not p.is_dir()] == []
    assert fwc("--netns", "x", "install-boot").code == 2


def test_unit_quotes() -> None:
    """What means something to systemd in a path is written so that it does not."""
    assert 'ExecStart="/opt/my fwc/bin/fwc" /a%%b restore\n' in unit_text(("/opt/my fwc/bin/fwc", "/a%b", "restore"), Path("/a%b"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    """systemd finds nothing wrong with the unit."""
    (tmp_path / "fwc.service").write_text(unit_text((FWC, "restore"), tmp_path), encoding="utf-8")

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "fwc.service"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert (done.returncode, [line for line in done.stderr.splitlines() if "fwc.service" in line]) == (0, [])


def test_minimal_rules_of_a_damaged_record() -> None:
    """A record of who may log in that is damaged is an error, not an open host."""
    for broken in ({}, {"ports": 22, "anywhere": False, "v4": [], "v6": [], "dynamic": []}):
        with pytest.raises((LookupError, TypeError, ValueError)):
            minimal(broken)
