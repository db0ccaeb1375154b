"""History and the way back: every generation can be returned to, without its policy file."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.harness import BACKENDS, Host, valid

from fwcompiler import state as state_module

FIRST = """version: 1
groups:
  carriers: [198.51.100.16/28]
  agents: {members: [203.0.113.0/24], dynamic: {timeout: 12h, max: 64}}
  admins: [192.0.2.10]
services:
  sip: {from: [carriers, agents]}
  ssh: {from: [admins]}
"""
SECOND = FIRST.replace("198.51.100.16/28", "198.51.100.16/28, 198.51.100.32/28")
THIRD = SECOND.replace("ssh: {from", "https: {from: anywhere}\n  ssh: {from")


def generations(host: Host) -> list[dict[str, object]]:
    """What `history --json` lists."""
    found: list[dict[str, object]] = valid("history", host.fwc("history", "--json").json)["generations"]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_and_back(host: Host, backend: str) -> None:
    """`rollback` returns to the generation before, `rollback N` to any; each is a new generation, and dynamic members stay."""
    host.backend = backend
    for policy in (FIRST, SECOND, THIRD):
        host.apply(policy)
    assert host.fwc("allow", "agents", "192.0.2.66").code == 0
    Path(host.write()).unlink()

    back = host.fwc("rollback", "--yes", "--reason", "calls fail")
    assert (back.code, "applied: generation 4" in back.out, "may no longer reach https tcp/443" in back.out) == (0, True, True)
    assert host.in_sync(SECOND)

    assert host.fwc("rollback", "1", "--yes", "-q").code == 0
    assert host.in_sync(FIRST)
    assert [m["address"] for m in host.fwc("status", "--json").json["members"]["agents"]] == ["192.0.2.66"]
    rows = [(g["number"], g["state"], g["restores"], g["reason"]) for g in generations(host)]
    assert rows == [
        (5, "in force", 1, ""),
        (4, "confirmed", 2, "calls fail"),
        (3, "confirmed", None, ""),
        (2, "confirmed", None, ""),
        (1, "confirmed", None, ""),
    ]
    assert "a return to generation 1" in host.fwc("history").out


def test_history_tells_who_and_what(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who, from where, why, by which backend, proven or not, and the difference in the operator's words."""
    monkeypatch.setenv("USER", "ops")
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.10 50022 198.51.100.5 22")
    host.apply(FIRST)
    host.fwc("apply", host.write(SECOND), "--yes", "--no-proof", "--reason", "example-telecom moved")

    newest = generations(host)[0]

    assert {k: newest[k] for k in ("applied_by", "applied_from", "reason", "backend", "proven", "trial", "lockout")} == {
        "applied_by": "ops",
        "applied_from": "192.0.2.10",
        "reason": "example-telecom moved",
        "backend": "nftables",
        "proven": False,
        "trial": 0,
        "lockout": "",
    }
    assert newest["changes"] == ["carriers: + 198.51.100.32/28 may reach sip udp/5060"]
    assert "NOT PROVEN" in host.fwc("history").out


def test_nothing_to_return_to(host: Host) -> None:
    """Without an earlier generation, with an unknown one or a damaged one, nothing is changed and the reason is told."""
    assert (host.fwc("history").out, generations(host)) == ("nothing was applied yet\n", [])
    assert "there is no earlier generation" in host.fwc("rollback", "--yes").err
    host.apply(FIRST)
    host.apply(SECOND)
    before = host.ours()
    (host.state / "generations" / "1" / "sets.json").write_text("{", encoding="utf-8")

    unknown, damaged = host.fwc("rollback", "9", "--yes"), host.fwc("rollback", "1", "--yes")

    assert (unknown.code, "there is no such generation" in unknown.err) == (4, True)
    assert (damaged.code, "its sets.json is damaged" in damaged.err) == (4, True)
    assert host.ours() == before


def test_rollback_is_guarded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A return that would lock out whoever is logged in is refused like an apply."""
    host.apply(FIRST)
    host.apply(FIRST.replace("192.0.2.10", "192.0.2.10, 192.0.2.77"))
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.77 50022 198.51.100.5 22")

    ran = host.fwc("rollback", "--yes")

    assert (ran.code, "192.0.2.77 would be locked out; nothing was changed" in ran.err) == (4, True)
    assert host.fwc("rollback", "--yes", "--allow-lockout").code == 0


def test_rollback_on_trial(host: Host) -> None:
    """A return can be on trial as well, and be ended at once."""
    host.apply(FIRST)
    host.apply(SECOND)
    assert host.program("rollback", "--yes", "-q", "--confirm", "60s", "--no-wait").code == 0
    assert host.in_sync(FIRST)

    assert host.fwc("rollback").code == 0

    assert host.in_sync(SECOND)
    assert [g["state"] for g in generations(host)] == ["rolled back", "in force", "confirmed"]


def test_rollback_to_another_backend(host: Host) -> None:
    """A generation of another backend is returned to through that backend, whose rules take the place of the present ones."""
    host.apply(FIRST)
    host.backend = "iptables-nft"
    host.apply(SECOND)
    common = ("--netns", host.netns, "--state-dir", str(host.state))
    from cli.harness import fwc

    assert fwc(*common, "rollback", "--yes").code == 0

    assert host.ours() == ""
    host.backend = "nftables"
    assert host.in_sync(FIRST)


def test_retention(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old generations go, the state directory stays small; the one in force and the one to return to never go."""
    monkeypatch.setattr(state_module, "KEEP", 3)
    for policy in (FIRST, SECOND, FIRST, SECOND, FIRST, SECOND):
        host.apply(policy)

    assert [g["number"] for g in generations(host)] == [6, 5, 4]


def test_the_holder_of_the_lock_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits too long for another fwc is told its process and what it does."""
    monkeypatch.setattr(state_module, "LOCK_WAIT", 0.1)
    policy = host.write(FIRST)
    with state_module.StateDir(host.state).lock("apply other.yaml"):
        ran = host.fwc("apply", policy, "--yes")

    assert ran.code == 4
    assert ", fwc apply other.yaml) is at work; nothing was changed" in ran.err
