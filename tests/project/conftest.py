"""The option of the tests about the project's own pages."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/project --update-docs` writes the real output into the pages: read the difference before keeping it."""
    parser.addoption("--update-docs", action="store_true", help="rewrite the outputs in README.md and docs from the real ones")


@pytest.fixture(scope="session")
def update_docs(request: pytest.FixtureRequest) -> bool:
    """True under `--update-docs`; the option exists only where this folder is named on the command line."""
    return bool(request.config.getoption("--update-docs", default=False))
