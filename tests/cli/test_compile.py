"""`compile` prints the same bytes for the same policy, and a person can load them by hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from cli.harness import BACKENDS, POLICY, ROOT, Host, fwc, plain, program, valid

from fwcompiler.pipeline import compile_policy
from fwcompiler.proof.access import compare

EXAMPLE = str(ROOT / "docs" / "examples" / "dialer.yaml")
FILES = {"nftables": ["fwc.nft"], "iptables-nft": ["fwc.ipset", "fwc.v4", "fwc.v6"], "iptables-legacy": ["fwc.ipset", "fwc.v4", "fwc.v6"]}
BESIDE = ["http-to-https.apache.conf", "http-to-https.nginx.conf"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", ["0", "1", "4711"])
def test_same_bytes_whatever_the_hash_seed(backend: str, seed: str) -> None:
    """Neither Python's hash seed nor the folder one stands in shows in the output."""
    here = fwc("compile", EXAMPLE, "--backend", backend)

    there = program("compile", EXAMPLE, "--backend", backend, env={"PYTHONHASHSEED": seed}, cwd=Path("/"))

    assert (here.code, there.code) == (0, 0)
    assert here.out == there.out


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_are_what_is_printed(tmp_path: Path, backend: str) -> None:
    """`-o DIR` writes the files that `--json` holds, makes the folder, and names them."""
    folder = tmp_path / "out" / "here"

    ran = fwc("compile", EXAMPLE, "--backend", backend, "-o", str(folder))
    printed = valid("compile", fwc("compile", EXAMPLE, "--backend", backend, "--json").json)

    files = [*FILES[backend], *BESIDE]
    assert ran.out.split() == [str(folder / name) for name in files]
    assert {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir()} == printed["files"]
    assert (list(printed["files"]), printed["backend"]) == (files, backend)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """`-o` onto a file is a usage error that names it."""
    (tmp_path / "out").touch()

    ran = fwc("compile", EXAMPLE, "--backend", "nftables", "-o", str(tmp_path / "out"))

    assert (ran.code, f"cannot write to {tmp_path / 'out'}" in ran.err) == (2, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loads_by_hand(host: Host, backend: str) -> None:
    """The files load with the programs' own commands, and the kernel then holds what an apply would have made."""
    host.backend = backend
    variant = backend.removeprefix("iptables-")
    loaders = {"fwc.nft": ("nft", "-f"), "fwc.ipset": ("ipset", "restore", "-file")}
    loaders |= {f"fwc.v{v}": (f"ip{'6' if v == 6 else ''}tables-{variant}-restore", "--noflush") for v in (4, 6)}
    folder = host.folder / "out"
    host.fwc("compile", EXAMPLE, "-o", str(folder))

    for name in FILES[backend]:
        host.run(*loaders[name], str(folder / name))

    assert host.fwc("diff", EXAMPLE).out == "in sync: the kernel holds exactly this policy\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_load_equals_apply(host: Host, backend: str) -> None:
    """Loading nothing but what `compile` prints on standard output gives the listing that an apply gives."""
    host.backend = backend
    host.apply(Path(EXAMPLE).read_text(encoding="utf-8").replace("file: ", f"file: {ROOT}/docs/examples/"))
    applied = host.ours()
    host.fwc("remove", "--yes")
    printed = host.fwc("compile", EXAMPLE).out

    if backend == "nftables":
        host.run("nft", "-f", "-", stdin=printed)
    else:
        variant = backend.removeprefix("iptables-")
        _, sets, v4, v6 = re.split(r"^# fwc\.\w+\n", printed, flags=re.M)
        host.run("ipset", "restore", stdin=sets)
        host.run(f"iptables-{variant}-restore", "--noflush", stdin=v4)
        host.run(f"ip6tables-{variant}-restore", "--noflush", stdin=v6)

    assert sorted(plain(host.ours()).splitlines()) == sorted(applied.splitlines())


def shuffled(text: str) -> str:
    """The policy with every mapping and every list of names turned round."""

    def turn(value: object) -> object:
        if isinstance(value, dict):
            return {key: turn(value[key]) for key in reversed(value)}
        return [turn(item) for item in reversed(value)] if isinstance(value, list) else value

    return yaml.safe_dump(turn(yaml.safe_load(text)), sort_keys=False)


def test_order_has_no_meaning(tmp_path: Path) -> None:
    """Groups, services and members in another order are the same firewall: same sets, same chains, same access."""
    folder = tmp_path / "examples"
    folder.mkdir()
    for name in ("carriers", "blacklists"):
        (folder / name).symlink_to(ROOT / "docs" / "examples" / name)
    text = Path(EXAMPLE).read_text(encoding="utf-8")
    (folder / "a.yaml").write_text(text, encoding="utf-8")
    (folder / "b.yaml").write_text(shuffled(text), encoding="utf-8")

    one, other = (compile_policy(str(folder / name)).ruleset for name in ("a.yaml", "b.yaml"))

    change = compare(one, other)
    assert (change.gained, change.lost) == ((), ())
    assert {s.name: s.ranges for s in one.sets} == {s.name: s.ranges for s in other.sets}
    assert one.chain("input") == other.chain("input")
    assert {c.name: frozenset(c.rules) for c in one.chains} == {c.name: frozenset(c.rules) for c in other.chains}


def test_comments_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    """Lines that only move the others change no byte of the output."""
    for name, text in (("a.yaml", POLICY), ("b.yaml", "# moved\n\n" + POLICY.replace("\n", "  # here\n\n"))):
        (tmp_path / name).write_text(text, encoding="utf-8")

    first, second = (fwc("compile", str(tmp_path / name), "--backend", "nftables") for name in ("a.yaml", "b.yaml"))

    assert (first.code, first.out) == (0, second.out)


def test_interpreter_is_the_one_under_test() -> None:
    """The program that these tests start belongs to the interpreter that runs them."""
    assert program("--version").code == 0
    assert Path(sys.executable).parent == Path(sys.prefix) / "bin"
