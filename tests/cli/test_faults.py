"""What goes wrong on real machines: programs, rights, disks, kernels and inputs fail, and no rule changes half way."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.harness import BACKENDS, FWC, POLICY, Host, Ran, program, valid, wrapper

from fwcompiler import state as state_module
from fwcompiler.proof.describe import CounterExample
from fwcompiler.proof.fields import Packet

OTHER = POLICY.replace("192.0.2.10,", "192.0.2.10, 192.0.2.33,").replace("rtp: {from", "https: {from: anywhere}\n  rtp: {from")
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "env", "-u", "USER", "-u", "SUDO_USER", "HOME=/tmp")
NEEDS = {"nftables": ("nft",), "iptables-nft": ("iptables-nft-save", "ipset"), "iptables-legacy": ("iptables-legacy-save", "ipset")}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can read; pytest's own ones they cannot."""
    folder = Path(tempfile.mkdtemp(prefix="fwctest-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def user_host(open_folder: Path, netns: str) -> Host:
    """A host whose files everybody may read; skips where the installed program is out of other users' reach."""
    if subprocess.run([*NOBODY, FWC, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("other users cannot run the installed fwc")
    return Host(open_folder, netns)


def as_user(host: Host, *arguments: str) -> Ran:
    """Run fwc inside the namespace as a user without any right."""
    common = ("--state-dir", str(host.state), "--backend", host.backend)
    return program(*common, *arguments, prefix=("ip", "netns", "exec", host.netns, *NOBODY))


@pytest.mark.parametrize("backend", BACKENDS)
def test_programs_missing(host: Host, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Without its programs a backend names them and their packages; `check` leaves the kernel out and says so; `compile` works."""
    host.backend = backend
    policy = host.write()
    empty = host.folder / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))

    applied = host.fwc("apply", policy, "--yes")
    status = host.fwc("status")
    checked = host.fwc("check", policy, "--json")
    compiled = host.fwc("compile", policy, "-q")
    rows = {row["name"]: row for row in host.fwc("backends", "--json").json["backends"]}

    assert (applied.code, status.code, checked.code, compiled.code) == (4, 4, 0, 0)
    assert all(f"`{name}`" in applied.err and f"`{name}`" in status.err for name in NEEDS[backend])
    assert ("nftables" if backend == "nftables" else "iptables and ipset") in applied.err
    assert "not installed" in valid("check", checked.json)["left_out"][0]
    assert (rows[backend]["usable"], set(NEEDS[backend]) <= set(rows[backend]["missing"])) == (False, True)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_ipset_missing(host: Host, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """iptables alone is not enough: ipset is asked for by name, before anything is done."""
    host.backend = backend
    folder = host.folder / "bin"
    folder.mkdir()
    for path in Path("/usr/sbin").glob("*tables*"):
        (folder / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))

    ran = host.fwc("apply", host.write(), "--yes")
    monkeypatch.undo()

    assert (ran.code, "`ipset` is not installed" in ran.err) == (4, True)
    assert host.ours() == ""


def test_programs_are_found_without_sbin(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH without the sbin directories, as cron and `su` give it, is no reason to fail."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    assert host.fwc("apply", host.write(), "--yes").code == 0


def test_check_needs_no_root(user_host: Host) -> None:
    """An ordinary user can check a policy; where namespaces of one's own are allowed, with a kernel."""
    ran = as_user(user_host, "check", user_host.write(), "--json")

    found = valid("check", ran.json)
    assert (ran.code, found["ok"]) == (0, True)
    assert found["left_out"] == [] or "may not make a network namespace" in found["left_out"][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_in_sync_for_a_user(user_host: Host, backend: str) -> None:
    """Who may not ask the kernel is told that, with exit code 4, and never that all is well."""
    user_host.backend = backend
    user_host.apply()
    before, policy = user_host.ours(), user_host.write()

    ran = {
        command: as_user(user_host, *command.split(), *([policy] if command.split()[0] in ("diff", "apply") else []))
        for command in ("status", "status --json", "diff", "diff --json", "apply --dry-run", "apply --yes", "remove --yes")
    }

    assert {command: r.code for command, r in ran.items()} == dict.fromkeys(ran, 4)
    assert all(r.out == "" and "sync" not in r.err and "Traceback" not in r.err for r in ran.values()), ran
    assert all("not permitted" in r.err or "Permission denied" in r.err for r in ran.values()), ran
    assert user_host.ours() == before


def test_history_for_a_user(user_host: Host) -> None:
    """A user who may not read the state is told so, and not that nothing was applied."""
    user_host.apply()

    ran = as_user(user_host, "history")

    assert (ran.code, "Permission denied" in ran.err, ran.out) == (4, True, "")


def test_user_cannot_apply_with_a_state_of_his_own(user_host: Host) -> None:
    """A state directory that the user may write to does not make the kernel listen to him."""
    mine = user_host.folder / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    user_host.state = mine

    ran = as_user(user_host, "apply", user_host.write(), "--yes")

    assert (ran.code, "not permitted" in ran.err) == (4, True)
    assert (user_host.ours(), (mine / "current").exists()) == ("", False)


def in_mounts(host: Host, script: str) -> Ran:
    """Run a shell script in a mount namespace of its own: $FWC is the program with the host's options, $S its state directory."""
    host.state.mkdir(exist_ok=True)
    names = f'FWC="{FWC} {" ".join(host.common)}"; S="{host.state}"; A="$1"; B="$2"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{names}\n{script}", "sh", host.write(), host.write(OTHER, "other.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_read_only_state(host: Host) -> None:
    """A read-only state directory refuses an apply and a removal before the kernel is touched; reading commands still work."""
    host.apply()
    before = host.ours()

    ran = in_mounts(
        host,
        """mount --bind "$S" "$S" && mount -o remount,bind,ro "$S"
        $FWC apply "$B" --yes -q; echo $?; $FWC remove --yes; echo $?
        $FWC status >/dev/null; echo $?; $FWC diff "$A" -q; echo $?; $FWC diff "$B" -q; echo $?""",
    )

    assert ran.out.split() == ["4", "4", "0", "0", "1"], ran
    assert ran.err.count("Read-only file system; nothing was changed") == 2
    assert host.ours() == before


@pytest.mark.parametrize("size", range(4, 48, 4))
def test_full_disk(host: Host, size: int) -> None:
    """However little room a disk has left: either all is applied and recorded, or nothing is changed and the exit code is 4."""
    ran = in_mounts(
        host,
        f"""mount -t tmpfs -o size={size}k none "$S"
        $FWC apply "$A" --yes -q; echo $?
        $FWC status --json | grep -c '"in_sync": true'; test -e "$S/current"; echo $?""",
    )

    code, synced, recorded = ran.out.split()
    assert (code, synced, recorded, bool(host.ours())) in (("0", "1", "0", True), ("4", "1", "1", False)), ran
    assert "Traceback" not in ran.err
    assert ran.err == "" or "No space left on device" in ran.err


def test_disk_that_fills_up_later(host: Host) -> None:
    """A disk that is full when the next policy comes keeps the old one in force, recorded and in sync."""
    ran = in_mounts(
        host,
        """mount -t tmpfs -o size=200k none "$S"
        $FWC apply "$A" --yes -q; echo $?
        head -c 1000000 /dev/zero > "$S/fill" 2>/dev/null
        $FWC apply "$B" --yes -q; echo $?; $FWC diff "$A" -q; echo $?
        rm "$S/fill"; $FWC apply "$B" --yes -q; echo $?; $FWC diff "$B" -q; echo $?""",
    )

    assert ran.out.split() == ["0", "4", "0", "0", "0"], ran


def test_state_directory_is_a_file(host: Host) -> None:
    """A state directory that is none is refused with its name."""
    host.state.write_text("", encoding="utf-8")

    ran = host.apply(code=4)

    assert f"cannot write to the state directory {host.state}" in ran.err
    assert host.ours() == ""


@pytest.mark.parametrize("damage", ["current", "meta.json", "listing.json", "sets.json", "lists.json"])
@pytest.mark.parametrize("content", ["", "\x00\xff{", "[]", '{"number": 1}'])
def test_damaged_state(host: Host, damage: str, content: str) -> None:
    """A record that cannot be read stops nobody: `status` answers, and the next apply makes everything whole."""
    host.apply()
    path = host.state / "current" if damage == "current" else host.state / "generations" / "1" / damage
    path.write_text(content, encoding="latin-1")

    status = host.fwc("status", "--json")
    host.apply(OTHER)

    assert status.code == 0, status
    valid("status", status.json)
    assert host.in_sync(OTHER)


def test_applies_at_the_same_time(host: Host) -> None:
    """Four applies at once go one after the other; the last one's rules are in force and on record."""
    policies = {name: POLICY.replace("192.0.2.10,", f"192.0.2.{n},") for n, name in enumerate("abcd", 20)}
    running = [
        subprocess.Popen([FWC, *host.common, "apply", host.write(text, f"{name}.yaml"), "--yes", "-q"], stdin=subprocess.DEVNULL)
        for name, text in policies.items()
    ]

    codes = [each.wait(60) for each in running]

    generation = host.fwc("status", "--json").json["generation"]
    assert (codes, generation["number"]) == ([0, 0, 0, 0], 4)
    assert host.in_sync(policies[Path(generation["policy"]).stem])


def test_lock_held_for_long(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for another fwc does not wait for ever, and names the process in the way."""
    monkeypatch.setattr(state_module, "LOCK_WAIT", 0.1)

    with state_module.StateDir(host.state).lock():
        ran = host.apply(code=4)

    assert f"another fwc (process {os.getpid()}) is at work; nothing was changed" in ran.err


REFUSE_LINE = """
text=$(mktemp "$HERE/text.XXXX"); cat > "$text"
n=$(grep -n -- '{pattern}' "$text" | head -1 | cut -d: -f1)
if [ -n "$n" ]; then printf '{words}\\n' "$n" >&2; exit 1; fi
exec "$REAL" "$@" < "$text"
"""


@pytest.mark.parametrize(
    ("backend", "name", "pattern", "words", "place"),
    [
        ("nftables", "nft", "set inet fwc carriers.v4", "/dev/stdin:%s:1-9: Error: Could not process rule: No space left on device", "3:3"),
        ("nftables", "nft", "rule inet fwc service.sip ", "/dev/stdin:%s:9-12: Error: No such file or directory; did you mean x?", "9:3"),
        (
            "iptables-nft",
            "iptables-nft-restore",
            "A FWC-s.sip",
            "iptables-nft-restore v1.8.9 (nf_tables): \\nline %s: RULE_APPEND failed",
            "9:3",
        ),
        ("iptables-legacy", "ip6tables-legacy-restore", "A FWC-s.ssh", "ip6tables-restore: line %s failed", "11:3"),
    ],
)
def test_refusal_is_told_at_the_policy_line(
    host: Host, monkeypatch: pytest.MonkeyPatch, backend: str, name: str, pattern: str, words: str, place: str
) -> None:
    """A line that the kernel refuses is shown as the policy's line; nothing is changed, and `check` finds it as well."""
    host.backend = backend
    folder = wrapper(host.folder / "bin", name, REFUSE_LINE.format(pattern=pattern, words=words))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    applied, checked = host.apply(code=4), host.fwc("check", host.write(), "--json")
    monkeypatch.undo()

    assert f"policy.yaml:{place}: error[kernel]: {name}" in applied.err
    assert "nothing was changed" in applied.err
    assert (checked.code, checked.json["ok"], [f["code"] for f in valid("check", checked.json)["findings"]]) == (4, False, ["kernel"])
    assert host.ours() == ""


@pytest.mark.parametrize("command", ["check", "apply", "diff"])
def test_refusal_without_a_line(host: Host, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A kernel that refuses without saying which line is no reason to call a policy good."""
    folder = wrapper(
        host.folder / "bin", "nft", 'case "$*" in "-f -") echo "internal:0:0-0: Error: Out of memory" >&2; exit 1;; esac\nexec "$REAL" "$@"'
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    ran = host.fwc(command, host.write(), *(["--yes"] if command == "apply" else []))

    assert (ran.code, "Out of memory" in ran.err) == (4, True)


AT_LIVE_LOAD = """
case "$*" in
  *list*|*-save*) exec "$REAL" "$@" ;;
esac
cat > "$HERE/input"; exec < "$HERE/input"
grep -q -e 'service.https' -e 'FWC-s.https' "$HERE/input" || exec "$REAL" "$@"
n=$(( $(cat "$HERE/count" 2>/dev/null || echo 0) + 1 )); echo $n > "$HERE/count"
if [ $n -ne 2 ]; then exec "$REAL" "$@"; fi
{action}
"""
DROP_A_RULE = AT_LIVE_LOAD.format(action="grep -v -e '^add rule inet fwc service.https' -e '^-A FWC-s.https' | \"$REAL\" \"$@\"")
ADD_A_RULE = AT_LIVE_LOAD.format(
    action='"$REAL" "$@" && case "$REAL" in */nft) "$REAL" add rule inet fwc service.https ip saddr 6.6.6.6 drop ;; '
    '*) "${REAL%-restore}" -A FWC-s.https -s 6.6.6.6 -j DROP ;; esac'
)
FAIL = AT_LIVE_LOAD.format(action="cat >/dev/null; echo 'Another app is currently holding the xtables lock' >&2; exit 4")
LOADERS = {"nftables": "nft", "iptables-nft": "iptables-nft-restore", "iptables-legacy": "iptables-legacy-restore"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("before", "fault"),
    [(POLICY, DROP_A_RULE), ("", DROP_A_RULE), (POLICY, ADD_A_RULE)],
    ids=["over another policy", "first apply", "a rule more than was sent"],
)
def test_kernel_that_lists_something_else(host: Host, monkeypatch: pytest.MonkeyPatch, backend: str, before: str, fault: str) -> None:
    """Rules that read back differently after the commit are taken back: exit code 5, and the old ones are in force and on record."""
    host.backend = backend
    if before:
        host.apply(before)
    old = host.ours()
    folder = wrapper(host.folder / "bin", LOADERS[backend], fault)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    ran = host.apply(OTHER, code=5)
    monkeypatch.undo()

    assert "the previous ruleset was restored" in ran.err
    assert host.ours() == old
    assert host.in_sync(before or None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_live_rules_that_are_disproven(host: Host, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """A packet that fares otherwise under the live rules than the policy says brings the old ones back, and the packet is shown."""
    host.backend = backend
    host.apply(POLICY)
    old = host.ours()
    example = CounterExample("from 6.6.6.6 to tcp/443", Packet(4, 0x06060606, 6, 443), "accept", "drops them", {})
    monkeypatch.setattr("fwcompiler.apply.Proven.disproof", lambda _proven, _after: (example,))

    ran = host.apply(OTHER, code=5)
    monkeypatch.undo()

    assert "the live rules do not mean what the policy says" in ran.err
    assert "from 6.6.6.6 to tcp/443: the policy says accept; the kernel drops them" in ran.err
    assert "the previous ruleset was restored" in ran.err
    assert host.ours() == old
    assert host.in_sync(POLICY)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("before", [POLICY, ""], ids=["over another policy", "first apply"])
def test_second_family_fails(host: Host, monkeypatch: pytest.MonkeyPatch, backend: str, before: str) -> None:
    """Where IPv6 is refused after IPv4 went in, IPv4 is put back: never one policy for one half of the internet."""
    host.backend = backend
    if before:
        host.apply(before)
    old = host.ours()
    folder = wrapper(host.folder / "bin", LOADERS[backend].replace("iptables", "ip6tables"), FAIL)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    ran = host.apply(OTHER, code=4)
    monkeypatch.undo()

    assert ("nothing was changed" in ran.err, "xtables lock" in ran.err) == (True, True)
    assert host.ours() == old
    assert host.twins() == []
    assert host.in_sync(before or None)


@pytest.mark.parametrize("before", [POLICY, ""], ids=["over another policy", "first apply"])
def test_listing_fails_after_the_commit(host: Host, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Rules that cannot be read back are not proven, so they do not stay."""
    if before:
        host.apply(before)
    old = host.ours()
    script = """
    if [ "$1" = "-f" ]; then n=$(( $(cat "$HERE/count" 2>/dev/null || echo 0) + 1 )); echo $n > "$HERE/count"; exec "$REAL" "$@"; fi
    if [ "$(cat "$HERE/count")" = 2 ] && [ ! -e "$HERE/failed" ]; then touch "$HERE/failed"; echo "Error: Out of memory" >&2; exit 1; fi
    exec "$REAL" "$@"
    """
    monkeypatch.setenv("PATH", f"{wrapper(host.folder / 'bin', 'nft', script)}:{os.environ['PATH']}")

    ran = host.fwc("apply", host.write(OTHER), "--yes")
    monkeypatch.undo()

    assert ran.code in (4, 5), ran
    assert host.ours() == old
    assert host.in_sync(before or None)


def special_file(path: Path, kind: str) -> None:
    """Something at a path that is no regular file, or one that nobody can want."""
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "loop":
            path.symlink_to(path)
        case "binary":
            path.write_bytes(bytes(range(256)) * 64)
        case "empty":
            path.touch()
        case "nul":
            path.write_bytes(b"\x00" * 4096)


KINDS = ("fifo", "folder", "device", "socket", "loop", "binary", "empty", "nul", "missing")


@pytest.mark.parametrize("kind", KINDS)
def test_strange_list_file(tmp_path: Path, kind: str) -> None:
    """Whatever stands where a list file should: the policy is rejected at once, at the line that names it."""
    special_file(tmp_path / "list.txt", kind)
    (tmp_path / "p.yaml").write_text("version: 1\ngroups: {a: [{file: list.txt}]}\nservices: {ssh: {from: [a]}}\n", encoding="utf-8")

    ran = program("compile", "p.yaml", "--backend", "nftables", cwd=tmp_path)

    assert (ran.code, ran.out) == (3, ""), ran
    assert "error[" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("kind", KINDS)
def test_strange_policy_file(tmp_path: Path, kind: str) -> None:
    """Whatever stands where the policy should: it is rejected at once."""
    special_file(tmp_path / "p.yaml", kind)

    ran = program("check", "p.yaml", "--backend", "nftables", "--json", cwd=tmp_path)

    assert (ran.code, valid("check", ran.json)["ok"]) == (3, False), ran
    assert "error[" in ran.err
    assert "Traceback" not in ran.err


def test_huge_policy(tmp_path: Path) -> None:
    """A policy of more than 32 MiB is refused by its size, not read."""
    path = tmp_path / "p.yaml"
    with path.open("wb") as stream:
        stream.truncate(33 << 20)

    ran = program("check", str(path), "--backend", "nftables")

    assert (ran.code, "error[file-size]" in ran.err) == (3, True)


def test_large_list(host: Host) -> None:
    """A list of 200,000 lines is compiled whole."""
    host.write("".join(f"{11 + (n >> 16)}.{n >> 8 & 255}.{n & 255}.0/25\n" for n in range(200_000)), "list.txt")
    policy = host.write("version: 1\ngroups: {a: [{file: list.txt}]}\nservices: {ssh: {from: [a]}}\n")

    ran = host.fwc("compile", policy)

    assert (ran.code, ran.out.count("/25,")) == (0, 200_000)


def test_executable_is_never_a_folder(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called `nft` on PATH is not taken for the program."""
    (host.folder / "bin" / "nft").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{host.folder / 'bin'}:{os.environ['PATH']}")

    assert host.fwc("apply", host.write(), "--yes").code == 0


def test_state_is_private(host: Host) -> None:
    """Policies and address lists of a host are nobody else's business."""
    host.apply()

    assert stat.S_IMODE((host.state / "generations").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["no-such-namespace", "../../etc", ".", ""])
def test_namespace_that_is_none(tmp_path: Path, name: str) -> None:
    """A name that no namespace has, that could lead elsewhere, or that a script left empty, is a usage error."""
    host = Host(tmp_path, name)

    assert host.fwc("compile", host.write()).code == 2
