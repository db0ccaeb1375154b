"""Other firewalls with the policy of the benchmarks: SIP for a list of networks, audio and web for everybody, SSH for one address.

Each is configured in a folder of its own and loads into the network namespace of whoever starts it; what belongs to the
machine is never read or written. A tool that is not installed is skipped by whoever asks `installed`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DBUS = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={folder}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"""
FIREWALLD = "DefaultZone=public\nCleanupOnExit=yes\nFirewallBackend=nftables\nLogDenied=off\n"
IPSET = """\
<?xml version="1.0" encoding="utf-8"?>
<ipset type="hash:net"><option name="maxelem" value="1048576"/>{entries}</ipset>
"""
ZONE = """\
<?xml version="1.0" encoding="utf-8"?>
<zone target="DROP"><port port="10000-20000" protocol="udp"/><port port="80" protocol="tcp"/><port port="443" protocol="tcp"/>{rules}</zone>
"""
ALLOW_LISTED = '<rule family="ipv4"><source ipset="listed"/><port port="5060" protocol="udp"/><accept/></rule>'
DROP_LISTED = '<rule family="ipv4"><source ipset="listed"/><drop/></rule>'
FERM = """\
table filter chain INPUT {{
    policy DROP;
    interface lo ACCEPT;
    proto udp dport 5060 {{ saddr ({sources}) ACCEPT; DROP; }}
    proto tcp dport 22 {{ saddr 192.0.2.10 ACCEPT; DROP; }}
    mod state state (ESTABLISHED RELATED) ACCEPT;
    proto tcp dport (80 443) ACCEPT;
    proto udp dport 10000:20000 ACCEPT;
    proto icmp ACCEPT;
}}
"""


def installed(program: str) -> bool:
    """Whether a program is on this machine."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is not None


class Firewalld:
    """A running firewalld with a bus of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={folder}/bus"}

    def listed(self, entries: Sequence[str]) -> None:
        """Write the list into its permanent configuration."""
        texts = "".join(f"<entry>{entry}</entry>" for entry in entries)
        (self.folder / "ipsets" / "listed.xml").write_text(IPSET.format(entries=texts), encoding="utf-8")

    def command(self, *arguments: str) -> None:
        """`firewall-cmd`; it has to succeed."""
        subprocess.run(("firewall-cmd", *arguments), check=True, capture_output=True, env=self.environment)

    def timed(self, *arguments: str) -> float:
        """What a `firewall-cmd` takes."""
        start = time.perf_counter()
        self.command(*arguments)
        return time.perf_counter() - start

    def is_up(self) -> bool:
        """Whether it answers, rules loaded."""
        return subprocess.run(("firewall-cmd", "--state"), capture_output=True, check=False, env=self.environment).returncode == 0


@contextmanager
def firewalld(folder: Path, rules: str, entries: Sequence[str], *, wait: float = 120) -> Iterator[Firewalld]:
    """Start firewalld where this thread is; it and its bus are gone afterwards.

    Raises:
        TimeoutError: it does not come up.
    """
    made = Firewalld(folder)
    for name in ("zones", "ipsets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "bus.conf").write_text(DBUS.format(folder=folder), encoding="utf-8")
    (folder / "firewalld.conf").write_text(FIREWALLD, encoding="utf-8")
    (folder / "zones" / "public.xml").write_text(ZONE.format(rules=rules), encoding="utf-8")
    made.listed(entries)
    bus = ("dbus-daemon", f"--config-file={folder}/bus.conf", "--nofork", "--nopidfile")
    daemon = ("firewalld", "--nofork", "--nopid", "--system-config", str(folder), "--log-target", "file", "--log-file", str(folder / "log"))
    with started(bus, made.environment):
        _until((folder / "bus").exists, 10)
        with started(daemon, made.environment):
            _until(made.is_up, wait)
            yield made


@contextmanager
def started(argv: Sequence[str], environment: dict[str, str]) -> Iterator[None]:
    """A program that runs for the length of a block."""
    with subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def ferm_file(folder: Path, entries: Sequence[str]) -> tuple[str, ...]:
    """Write ferm's configuration; returns the command that loads it."""
    (folder / "ferm.conf").write_text(FERM.format(sources=" ".join(entries)), encoding="ascii")
    return ("ferm", str(folder / "ferm.conf"))


def ufw_folder(folder: Path, entries: Sequence[str]) -> tuple[str, ...]:
    """Write ufw's rules into a copy of its configuration; returns the command that loads them, the copy mounted over the original.

    By commands ufw takes a tenth of a second for each rule, so the rules go into its file, as its own commands write them.
    """
    copy = folder / "ufw"
    shutil.copytree("/etc/ufw", copy, dirs_exist_ok=True)
    rules = [f"-A ufw-user-input -p udp --dport 5060 -s {entry} -j ACCEPT" for entry in entries]
    rules += ["-A ufw-user-input -p tcp --dport 22 -s 192.0.2.10 -j ACCEPT", "-A ufw-user-input -p udp --dport 10000:20000 -j ACCEPT"]
    rules += [f"-A ufw-user-input -p tcp --dport {port} -j ACCEPT" for port in (80, 443)]
    path = copy / "user.rules"
    path.write_text(path.read_text(encoding="ascii").replace("### RULES ###\n", "\n".join(("### RULES ###", *rules, ""))), encoding="ascii")
    path = copy / "ufw.conf"
    path.write_text(path.read_text(encoding="ascii").replace("ENABLED=no", "ENABLED=yes"), encoding="ascii")
    script = f"mount --make-rprivate / && mount --bind {copy} /etc/ufw && exec /lib/ufw/ufw-init force-reload"
    return ("unshare", "-m", "sh", "-c", script)


def seconds(argv: Sequence[str]) -> float:
    """Wall time of a program that has to succeed."""
    start = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{argv[0]} failed: {done.stderr or done.stdout}")
    return time.perf_counter() - start
