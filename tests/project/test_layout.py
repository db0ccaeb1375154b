"""What the project consists of: the wheel's packages, generated files, and nothing that names one machine."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import fwcompiler
from fwcompiler.catalogue import CATALOGUE
from fwcompiler.diagnostics import CODES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"fwcompiler", "fwcompiler_nftables", "fwcompiler_iptables"}
TEXTS = (".py", ".md", ".yaml", ".yml", ".json", ".toml", ".txt", "")
TEST_FILES = sorted(p for p in (ROOT / "tests").rglob("*.py") if "__pycache__" not in p.parts)


def tracked() -> list[Path]:
    """The project's text files, without what tools leave behind."""
    tools = {".git", ".venv", ".fwc-venv", "dist", "build", "__pycache__", "out"}
    found = (p for p in ROOT.rglob("*") if p.is_file() and p.suffix in TEXTS)
    return sorted(
        p
        for p in found
        if not any(
            part in tools or part.startswith((".hypo", ".ruff", ".mypy", ".pytest", ".import")) for part in p.relative_to(ROOT).parts
        )
    )


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """scripts/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("fwc_generate", ROOT / "scripts" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wheel_holds_three_packages(tmp_path: Path) -> None:
    """The wheel's top level is the three packages and its metadata; each says that it is typed; no test is in it."""
    script = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)

    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
    info = f"fwcompiler-{fwcompiler.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert not [name for name in names if name.split("/")[-1].startswith(("test_", "conftest"))]


@pytest.mark.skipif(os.environ.get("FWC_TEST_WHEEL") != "1", reason="only where the wheel is installed (scripts/test)")
@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_the_wheel_is_under_test(package: str) -> None:
    """The suite runs against the installed package, not against the checkout."""
    file = importlib.import_module(package).__file__

    assert file is not None
    assert "site-packages" in file
    assert not Path(file).is_relative_to(ROOT / "fwcompiler")


def test_generated_files_are_up_to_date(generator: ModuleType) -> None:
    """Schemas and reference pages are what the code says; `sh scripts/update-generated` writes them."""
    stale = [
        name
        for name, text in generator.generated().items()
        if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != text
    ]

    assert stale == []


def test_every_schema_is_generated(generator: ModuleType) -> None:
    """No file in schemas/ is left over from a shape that is gone."""
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "schemas").iterdir()} <= set(generator.generated())


@pytest.mark.parametrize("code", CODES)
def test_error_code_is_documented(code: str) -> None:
    """Every code that a finding can have is in docs/errors.md."""
    assert re.search(rf"^\| `{code}` \| \S", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.M)


def test_error_codes_in_the_code_are_known() -> None:
    """Codes are words of the table, and each is used somewhere."""
    source = "\n".join(p.read_text(encoding="utf-8") for folder in ("fwcompiler", "backends") for p in (ROOT / folder).rglob("*.py"))
    tables = source.replace((ROOT / "fwcompiler" / "diagnostics.py").read_text(encoding="utf-8"), "")

    unused = [code for code in CODES if f'"{code}"' not in tables and code not in ("address-loopback", "address-multicast")]

    assert unused == []


@pytest.mark.parametrize("name", CATALOGUE)
def test_service_is_documented(name: str) -> None:
    """Every service of the catalogue is in the reference with its ports."""
    page = (ROOT / "docs" / "reference" / "services.md").read_text(encoding="utf-8")

    assert re.search(rf"^\| `{name}` \| .*{CATALOGUE[name].ports[0].texts()[0]}", page, re.M)


def test_policy_fields_are_documented(generator: ModuleType) -> None:
    """Every field of the policy language has a sentence, and a row in the reference."""
    page = (ROOT / "docs" / "reference" / "policy.md").read_text(encoding="utf-8")

    fields = [(model, field.alias or name, field.description) for model in generator.MODELS for name, field in model.model_fields.items()]
    assert [f"{model.__name__}.{name}" for model, name, text in fields if not text or f"| `{name}` |" not in page] == []


def test_every_model_is_documented(generator: ModuleType) -> None:
    """The reference has a section for every model of the language."""
    from fwcompiler import policy

    models = {m for m in vars(policy).values() if isinstance(m, type) and issubclass(m, policy._Model) and m is not policy._Model}

    assert models == set(generator.MODELS)


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_say_what_they_state(path: Path) -> None:
    """Every module, fixture, helper and test of the suite has a docstring; a test's is a sentence."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]

    silent = [f.name for f in functions if f.name.startswith("test_") and not (ast.get_docstring(f) or "").rstrip().endswith((".", "?"))]

    assert (silent, bool(ast.get_docstring(tree)) or not functions) == ([], True)


def test_scripts_of_the_readme_exist() -> None:
    """Every script that the README or the changelog tells people to run is there, and is shell that parses."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md"))

    scripts = set(re.findall(r"\bscripts/[\w-]+", text))

    assert scripts >= {"scripts/demo", "scripts/test"}
    for name in scripts:
        subprocess.run(["sh", "-n", str(ROOT / name)], check=True)


def test_changelog_and_licence_are_there() -> None:
    """There is a changelog in the form it names, with a section to write into, and the licence that pyproject.toml names."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert changelog.startswith("# Changelog")
    assert re.search(r"^## \[(Unreleased|\d+\.\d+\.\d+)\]", changelog, re.M)
    assert all((ROOT / name).stat().st_size for name in project["license-files"])


def test_no_file_names_a_machine() -> None:
    """No path of the machine the project was made on is in any of its files; only this test spells them, in two pieces."""
    paths = re.compile("(?<![\\w.])(/wor" + "k/|/roo" + "t/|/hom" + "e/)")

    found = [
        f"{p.relative_to(ROOT)}:{n}"
        for p in tracked()
        for n, line in enumerate(p.read_text("utf-8", "replace").split("\n"), 1)
        if paths.search(line)
    ]

    assert found == []


def test_version_is_one() -> None:
    """The version stands in one place, and the installed metadata agrees."""
    from importlib.metadata import version

    assert version("fwcompiler") == fwcompiler.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.]?(dev|rc)?\d+)?", fwcompiler.__version__)
