"""Who is said to have done something."""

from __future__ import annotations

import os
import pwd

import pytest

from fwcompiler.kernel import session


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SUDO_USER": "operator", "LOGNAME": "root", "USER": "root"}, "operator"),
        ({"LOGNAME": "operator"}, "operator"),
        ({}, pwd.getpwuid(os.getuid()).pw_name),
    ],
)
def test_who_works_here(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    """Whoever called sudo, else the login's name, else the name of the process's owner, as in a cron job."""
    for name in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert session.user() == expected


def test_an_owner_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container whose users have no names the number stands for them."""
    for name in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)

    assert session.user() == str(os.geteuid())
