"""Options and fixtures that all tests share.

Helpers that are no tests (`kernelspace`, `cases.loader`) are found because `pythonpath` in pyproject.toml names this folder.
"""

from __future__ import annotations

from collections.abc import Iterator

import kernelspace
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-cases` writes what fwc and the kernel say now into tests/cases: read the difference before keeping it.

    `--oracle-packets` and `--oracle-seed` are told in tests/oracle/README.md.
    """
    parser.addoption("--update-cases", action="store_true", help="rewrite the expectations in tests/cases from the real output")
    parser.addoption("--oracle-packets", type=int, default=8000, help="packets that each backend's kernel is asked about")
    parser.addoption("--oracle-seed", type=int, default=0, help="start of the random policies and packets")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Under `--update-cases` one process runs all tests: two workers would write one file at the same time."""
    if config.getoption("--update-cases") and hasattr(config.option, "numprocesses"):
        config.option.numprocesses = None


@pytest.fixture(scope="session")
def update_cases(request: pytest.FixtureRequest) -> bool:
    """True under `--update-cases`."""
    return bool(request.config.getoption("--update-cases"))


@pytest.fixture(scope="session")
def kernel_allowed() -> bool:
    """True where this process may make network namespaces; asked once."""
    return kernelspace.allowed()


@pytest.fixture
def space(kernel_allowed: bool) -> Iterator[kernelspace.Space]:
    """A fresh network namespace without a name; skips where this user may not make one."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    with kernelspace.namespace() as fresh:
        yield fresh


@pytest.fixture
def netns(kernel_allowed: bool) -> Iterator[str]:
    """The name of a fresh network namespace, for `fwc --netns`; skips where this user may not make one."""
    if not kernel_allowed:
        pytest.skip("needs the right to make network namespaces (root)")
    with kernelspace.named_namespace() as name:
        yield name
