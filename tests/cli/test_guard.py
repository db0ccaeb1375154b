"""The guard: whoever is logged in has to be able to log in anew, or nothing is changed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import kernelspace
import pytest
from cli.harness import BACKENDS, Host

POLICY = """version: 1
groups:
  carriers: [198.51.100.16/28]
  agents: {members: [203.0.113.0/24], dynamic: {timeout: 12h, max: 64}}
  admins: [192.0.2.10]
  office:
    - 192.0.2.32/28
    - 2001:db8:ad::/48
services:
  sip: {from: [carriers]}
  ssh: {from: [admins, office, agents]}
"""


@contextmanager
def logged_in(netns: str, client: str, port: int = 22) -> Iterator[None]:
    """An established TCP connection in a namespace, from an address that is not the server's own."""
    kernelspace.in_named(netns, "ip", "link", "set", "lo", "up")
    server = "2001:db8::5" if ":" in client else "198.51.100.5"
    for address in (server, client):
        kernelspace.in_named(netns, "ip", "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
    family = socket.AF_INET6 if ":" in client else socket.AF_INET
    space = kernelspace.Space(os.open(f"/run/netns/{netns}", os.O_RDONLY))
    with space.entered():
        listening, calling = socket.socket(family, socket.SOCK_STREAM), socket.socket(family, socket.SOCK_STREAM)
        listening.bind((server, port))
        listening.listen()
        calling.bind((client, 0))
        calling.connect((server, port))
        accepted = listening.accept()[0]
    try:
        yield
    finally:
        for each in (accepted, calling, listening):
            each.close()
        os.close(space.descriptor)


def came_by_ssh(monkeypatch: pytest.MonkeyPatch, client: str, port: int = 22) -> None:
    """This process was started over SSH."""
    monkeypatch.setenv("SSH_CONNECTION", f"{client} 50022 198.51.100.5 {port}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused(host: Host, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """A policy that keeps our own address out is refused with exit code 4; the kernel and the state stay empty."""
    host.backend = backend
    came_by_ssh(monkeypatch, "192.0.2.77")

    ran = host.apply(POLICY, code=4)

    assert "policy.yaml:11:3: error[lock-out]: 192.0.2.77 could not log in any more" in ran.err
    assert "192.0.2.77 would be locked out; nothing was changed" in ran.err
    assert (host.ours(), (host.state / "current").exists()) == ("", False)


@pytest.mark.parametrize("client", ["192.0.2.10", "192.0.2.40", "203.0.113.9", "127.0.0.1", "2001:db8:ad::1"])
def test_allowed(host: Host, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """Whoever the policy lets in may apply it, and so may somebody at the host itself."""
    came_by_ssh(monkeypatch, client)

    assert host.apply(POLICY).err == ""


@pytest.mark.parametrize("client", ["192.0.2.77", "2001:db8:77::1"])
def test_others_count(host: Host, client: str) -> None:
    """Who is logged in over another connection would be locked out as well; an own session is not needed to see that."""
    with logged_in(host.netns, client):
        ran = host.apply(POLICY, code=4)

    assert re.search(rf"{client} could not log in any more: .* \(connected to tcp/22 since [-\d]+ [\d:]+\)", ran.err), ran.err
    assert host.apply(POLICY).code == 0, "once he is gone, nobody stands in the way"


def test_the_port_that_one_came_by(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SSH server on another port than the policy thinks is found through SSH_CONNECTION, and the line to write is told."""
    came_by_ssh(monkeypatch, "192.0.2.10", 2222)
    ran = host.apply(POLICY, code=4)
    assert "write `ports: [tcp/22, tcp/2222]` at `ssh`" in ran.err

    assert host.apply(POLICY.replace("ssh: {from", "ssh: {ports: [tcp/22, tcp/2222], from")).code == 0


def test_forgotten_ssh(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy without the service ssh locks everybody out."""
    came_by_ssh(monkeypatch, "192.0.2.10")

    ran = host.apply(POLICY.replace("  ssh: {from: [admins, office, agents]}\n", ""), code=4)

    assert "no service covers it" in ran.err
    assert "add to `services`: `ssh: {from: [admins]}`, and to `groups`: `admins: [192.0.2.10]`" in ran.err


@pytest.mark.parametrize(
    "policy", [POLICY, POLICY.replace("[admins, office, agents]", "[office]")], ids=["in one line", "below each other"]
)
def test_the_line_that_is_told_is_right(host: Host, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """Carrying out the hint to the letter makes the next apply succeed."""
    came_by_ssh(monkeypatch, "192.0.2.77")
    said = host.apply(policy, code=4).err
    path = Path(host.write(policy))
    lines = policy.splitlines()

    changed = re.search(r"change \S+:(\d+) to: `(.*)`", said)
    added = re.search(r"add below \S+:(\d+): `(.*)`", said)
    if changed:
        lines[int(changed[1]) - 1] = changed[2]
    else:
        assert added, said
        lines.insert(int(added[1]), added[2])
    path.write_text("\n".join((*lines, "")), encoding="utf-8")

    assert host.fwc("apply", str(path), "--yes").code == 0


def test_blocked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """An admin whose address is on the block list, from which nobody is spared, is locked out, and is told so."""
    came_by_ssh(monkeypatch, "192.0.2.10")

    block = "block: {from: [admins], except: [%s]}\n"
    ran, other = host.apply(POLICY + block % "carriers", code=4), host.apply(POLICY + block % "office", code=4)

    assert "the block list has the source" in ran.err
    assert "the address is blocked: name one of admins, office, agents in `except` of `block`, with 192.0.2.10 in it" in ran.err
    assert "`    - 192.0.2.10`" in other.err, "a group that is spared already will do"


def test_dynamic_members_count(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dynamic member may log in as long as he is one, and is told that; without membership he is locked out."""
    host.apply(POLICY)
    assert host.fwc("allow", "agents", "192.0.2.77", "--for", "1h").code == 0
    came_by_ssh(monkeypatch, "192.0.2.77")
    changed = POLICY.replace("198.51.100.16/28", "198.51.100.32/28")

    ran = host.apply(changed)
    assert re.search(r"warning\[lock-out\]: 192.0.2.77 .* may log in only as a member of agents, for (59|60) min more", ran.err), ran.err

    assert host.fwc("revoke", "agents", "192.0.2.77", "--allow-lockout").code == 0
    assert "192.0.2.77 would be locked out" in host.apply(POLICY, code=4).err


def test_override(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--allow-lockout` goes on, loudly, and history tells who was locked out."""
    came_by_ssh(monkeypatch, "192.0.2.77")

    ran = host.fwc("apply", host.write(POLICY), "--yes", "-q", "--allow-lockout")

    assert (ran.code, "warning[lock-out]: 192.0.2.77 could not log in any more" in ran.err) == (0, True)
    assert host.fwc("history", "--json").json["generations"][0]["lockout"] == "192.0.2.77"
    assert "LOCKED OUT ON PURPOSE: 192.0.2.77" in host.fwc("history").out


@pytest.mark.parametrize("command", ["diff", "apply --dry-run"])
def test_warned(host: Host, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """`diff` and a dry run say the same, as a warning."""
    came_by_ssh(monkeypatch, "192.0.2.77")

    ran = host.fwc(*command.split(), host.write(POLICY))

    assert (ran.code, "warning[lock-out]: 192.0.2.77" in ran.err, "access gained" in ran.out) == (1, True, True)


def test_nothing_changes_nobody_is_asked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """An apply that changes nothing locks nobody out who is not locked out already."""
    host.apply(POLICY)
    came_by_ssh(monkeypatch, "192.0.2.77")

    assert host.apply(POLICY).err == ""


def test_sudo_does_not_hide_the_connection(tmp_path: Path) -> None:
    """Where the environment was cleaned on the way, as sudo does, the connection is found at a process that called us."""
    code = "from fwcompiler.kernel import session; print(session.ssh_connection(), session.ssh_connection(ancestors=False))"
    import subprocess
    import sys

    done = subprocess.run(
        ["sh", "-c", f'env -u SSH_CONNECTION "{sys.executable}" -c "{code}"; true'],
        env={**os.environ, "SSH_CONNECTION": "192.0.2.77 50022 198.51.100.5 2222"},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )

    assert "client='192.0.2.77', client_port=50022, server='198.51.100.5', server_port=2222) None" in done.stdout


@contextmanager
def ssh_server(netns: str, folder: Path, port: int) -> Iterator[Path]:
    """OpenSSH's server in a namespace; yields the key that root may log in with."""
    sshd = shutil.which("sshd")
    if sshd is None:
        pytest.skip("sshd is not installed")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # where it locks its unprivileged half up
    options = (f"Port={port}", f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/user.pub", "StrictModes=no", "UsePAM=no")
    argv = ["ip", "netns", "exec", netns, sshd, "-D", "-f", "/dev/null", *(x for o in (*options, "PidFile=none") for x in ("-o", o))]
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield folder / "user"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def addressed(netns: str, *addresses: str) -> None:
    """Addresses that are not the server's own, all in one namespace."""
    kernelspace.in_named(netns, "ip", "link", "set", "lo", "up")
    for address in addresses:
        kernelspace.in_named(netns, "ip", "address", "add", address, "dev", "lo")


def connected(netns: str, client: str, port: int) -> socket.socket:
    """A connection that says what SSH's first line says, and no more; once the server has answered."""
    space = kernelspace.Space(os.open(f"/run/netns/{netns}", os.O_RDONLY))
    try:
        for _ in range(100):
            with space.entered():
                calling = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            calling.bind((client, 0))
            with suppress(ConnectionRefusedError):
                calling.connect(("198.51.100.5", port))
                assert calling.recv(100).startswith(b"SSH-2.0-")
                return calling
            calling.close()
            time.sleep(0.05)
    finally:
        os.close(space.descriptor)
    raise AssertionError("the server does not answer")


@pytest.mark.parametrize("port", [22, 2222])
def test_who_guesses_passwords_is_a_stranger(host: Host, port: int) -> None:
    """Who is connected to sshd without having logged in is named in a warning, and the apply goes on; who is logged in stops it.

    sshd is found on whatever port it listens.
    """
    addressed(host.netns, "198.51.100.5", "192.0.2.77", "192.0.2.78")
    with ssh_server(host.netns, host.folder, port) as key, connected(host.netns, "192.0.2.77", port):
        assert (warned := host.apply(POLICY)).code == 0
        login = [*("ssh", "-T", "-b", "192.0.2.78", "-p", str(port), "-i", str(key), "-F", "none", "-o", "StrictHostKeyChecking=no")]
        login += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "root@198.51.100.5", "echo in; cat"]
        host.run("nft", "insert", "rule", "inet", "fwc", "input", "accept")
        with subprocess.Popen(["ip", "netns", "exec", host.netns, *login], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as session:
            assert session.stdout is not None
            assert session.stdout.readline() == b"in\n"
            refused = host.apply(POLICY, code=4)
            assert session.stdin is not None
            session.stdin.close()
        assert host.apply(POLICY).code == 0

    assert f"warning[lock-out]: trying to log in, and could not try again: 192.0.2.77 (tcp/{port})" in warned.err
    assert "192.0.2.78 would be locked out; nothing was changed" in refused.err
    assert "192.0.2.77 could not log in" not in refused.err


@pytest.mark.parametrize(("client", "code"), [("::ffff:192.0.2.77", 4), ("::ffff:192.0.2.10", 0), ("UNKNOWN", 0)])
def test_addresses_in_the_clothes_of_others(host: Host, monkeypatch: pytest.MonkeyPatch, client: str, code: int) -> None:
    """An IPv4 address that a server writes as IPv6 is asked about as IPv4; one that is none at all cannot be asked about."""
    came_by_ssh(monkeypatch, client)

    ran = host.apply(POLICY, code=code)

    assert ("192.0.2.77 would be locked out" in ran.err) is (code == 4)


def test_revoking_oneself(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would take himself out of the group that he is logged in by is told so; `--allow-lockout` overrides, others may go."""
    host.apply(POLICY)
    for address in ("198.51.100.99", "198.51.100.98"):
        assert host.fwc("allow", "agents", address).code == 0
    came_by_ssh(monkeypatch, "198.51.100.99")

    refused = host.fwc("revoke", "agents", "198.51.100.99")
    still = host.fwc("members", "agents", "--json").json["members"]["agents"]
    codes = [host.fwc("revoke", "agents", *words).code for words in (["198.51.100.98"], ["198.51.100.99", "--allow-lockout"])]

    assert (refused.code, "you are logged in from 198.51.100.99, and could not log in any more" in refused.err) == (4, True)
    assert [m["address"] for m in still] == ["198.51.100.98", "198.51.100.99"]
    assert codes == [0, 0]
