"""The option of the tests of the audit."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/audit --update-picture` writes what Chromium shows into docs/images: look at it before keeping it."""
    parser.addoption("--update-picture", action="store_true", help="rewrite docs/images/audit.png")


@pytest.fixture(scope="session")
def update_picture(request: pytest.FixtureRequest) -> bool:
    """True under `--update-picture`; the option exists only where this folder is named on the command line."""
    return bool(request.config.getoption("--update-picture", default=False))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the caller's environment decides about a test."""
    for name in ("FWC_STATE_DIR", "NO_COLOR", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
