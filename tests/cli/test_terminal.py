"""What depends on who reads and who answers: terminals, pipes, colors, and the question before an apply."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Sequence

import pytest
from cli.harness import FWC, POLICY, Host

CLEAN = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FWC_STATE_DIR", "SSH_CONNECTION")}
COLOR = "\x1b["


def at_terminal(arguments: Sequence[str], answer: str = "", env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run fwc at a terminal of its own, give the answer to its question, and return exit code and screen."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [FWC, *arguments], stdin=slave, stdout=slave, stderr=slave, env={**CLEAN, **(env or {})}, start_new_session=True
    )
    os.close(slave)
    screen, asked, deadline = b"", False, time.monotonic() + 30
    try:
        while time.monotonic() < deadline and select.select([master], [], [], 30)[0]:
            try:
                screen += os.read(master, 4096)
            except OSError:
                break
            if answer and not asked and b"[y/N]" in screen:
                asked = True
                os.write(master, answer.encode())
    finally:
        os.close(master)
    return child.wait(10), screen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("answer", "code"), [("y\n", 0), ("yes\n", 0), ("Y\n", 0), ("n\n", 2), ("\n", 2), ("yes please\n", 2), ("\x04", 2)]
)
def test_answer_decides(host: Host, answer: str, code: int) -> None:
    """At a terminal apply shows the difference and asks; only a yes changes anything."""
    ended, screen = at_terminal((*host.common, "apply", host.write()), answer)

    assert ended == code, screen
    assert screen.index("access gained") < screen.index("apply this? [y/N]")
    assert ("nothing was changed" in screen, bool(host.ours())) == (code != 0, code == 0)


def test_interrupt_at_the_question(host: Host) -> None:
    """Ctrl-C instead of an answer changes nothing."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [FWC, *host.common, "apply", host.write()],
        stdin=slave,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=CLEAN,
        start_new_session=True,
    )
    assert child.stderr is not None
    asked = b""
    while b"[y/N]" not in asked and (part := os.read(child.stderr.fileno(), 4096)):
        asked += part
    child.send_signal(2)

    code, rest = child.wait(10), child.stderr.read().decode()
    child.stderr.close()
    os.close(master)
    os.close(slave)

    assert (b"apply this?" in asked, code, "Traceback" in rest, host.ours()) == (True, 130, False, "")


@pytest.mark.parametrize("command", [("apply", "POLICY"), ("remove",)])
def test_nobody_to_ask(host: Host, command: tuple[str, ...]) -> None:
    """Without a terminal and without --yes: exit code 2, and nothing is changed."""
    if command == ("remove",):
        host.apply()
    before = host.ours()

    ran = host.program(*(host.write() if word == "POLICY" else word for word in command))

    assert (ran.code, "say --yes" in ran.err, host.ours() == before) == (2, True, True)


def test_removal_asks(host: Host) -> None:
    """`remove` says what it opens, and asks."""
    host.apply()

    kept, screen = at_terminal((*host.common, "remove"), "n\n")
    stayed = bool(host.ours())
    gone, _ = at_terminal((*host.common, "remove"), "y\n")

    assert (kept, stayed, gone, host.ours()) == (2, True, 0, "")
    assert "all rules of fwc" in screen
    assert "what they protect is open" in screen


def test_apply_in_sync_does_not_ask(host: Host) -> None:
    """Where there is nothing to do there is nothing to ask."""
    host.apply()

    code, screen = at_terminal((*host.common, "apply", host.write()))

    assert (code, screen) == (0, "in sync: generation 1 (nftables)\n")


@pytest.mark.parametrize(
    ("options", "env", "colored"),
    [((), {}, True), (("--no-color",), {}, False), ((), {"NO_COLOR": "1"}, False), ((), {"NO_COLOR": ""}, True)],
)
def test_colors(host: Host, options: tuple[str, ...], env: dict[str, str], colored: bool) -> None:
    """A terminal gets colors, unless --no-color or NO_COLOR says otherwise; an empty NO_COLOR says nothing."""
    difference = at_terminal((*host.common, *options, "diff", host.write()), env=env)[1]
    findings = at_terminal((*host.common, *options, "check", host.write(POLICY + "x: 1\n", "wrong.yaml")), env=env)[1]

    assert (COLOR in difference, COLOR in findings) == (colored, colored)


def test_no_colors_in_a_pipe(host: Host) -> None:
    """What is not read at a terminal has no colors in it."""
    ran = host.program("diff", host.write(POLICY.replace("[192.0.2.10,", "[192.0.2.10/24,")))

    assert COLOR not in ran.out + ran.err
    assert "warning[host-bits]" in ran.err


@pytest.mark.parametrize("command", ["compile", "diff"])
def test_closed_pipe(host: Host, command: str) -> None:
    """A reader that goes away early, as `head` does, gets no traceback."""
    networks = ", ".join(f"10.{n >> 7}.{2 * (n & 127)}.0/24" for n in range(9000))
    path = host.write(f"version: 1\ngroups: {{a: [{networks}]}}\nservices: {{ssh: {{from: [a]}}}}\n")

    done = subprocess.run(
        ["bash", "-c", '"$@" | head -n 1; exit ${PIPESTATUS[0]}', "bash", FWC, *host.common, command, path, "-v"],
        capture_output=True, text=True, check=False, env=CLEAN, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip

    assert (done.stderr, len(done.stdout.splitlines())) == ("", 1)
    assert done.returncode in (141, {"compile": 0, "diff": 1}[command])


def test_closed_pipe_does_not_stop_an_apply(host: Host) -> None:
    """An apply whose reader has gone is carried out, or it is not; the exit code tells which."""
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", FWC, *host.common, "apply", host.write(), "--yes"],
        capture_output=True, text=True, check=False, env=CLEAN, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip

    assert (done.returncode, done.stderr, bool(host.ours())) in ((0, "", True), (141, "", False))
