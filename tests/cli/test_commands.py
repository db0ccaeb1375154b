"""The command line as documented: exit codes, JSON that its schemas accept, and what goes to which stream."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli.harness import BACKENDS, FWC, POLICY, SCHEMAS, Host, fwc, program, valid

from fwcompiler import __version__
from fwcompiler.commands import MODULES, registered

WRONG = POLICY.replace("sip: {from: [carriers, agents]}", "sip: {from: [carrier], ports: 99999}")
OTHER = POLICY.replace("192.0.2.10,", "192.0.2.10, 192.0.2.33,")
FAILING = POLICY + "tests: [{from: 8.8.8.8, to: udp/5060, expect: accept}]\n"
LINES = {
    "check": ("check", "POLICY"),
    "compile": ("compile", "POLICY"),
    "diff": ("diff", "POLICY"),
    "apply": ("apply", "POLICY", "--yes"),
    "dry run": ("apply", "POLICY", "--dry-run"),
    "status": ("status",),
    "verify": ("verify", "POLICY"),
    "test": ("test", "POLICY"),
    "explain": ("explain", "POLICY", "--from", "192.0.2.10", "--to", "tcp/22"),
    "remove": ("remove", "--yes"),
    "backends": ("backends",),
}
SCHEMA_OF = {"dry run": "diff"}


def arguments(name: str, host: Host, policy: str = POLICY) -> list[str]:
    """The command line of that name, with a policy file of that text."""
    return [host.write(policy) if word == "POLICY" else word for word in LINES[name]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LINES)
def test_json_is_what_the_schema_says(host: Host, backend: str, name: str) -> None:
    """`--json` prints one document that the published schema accepts, and nothing else on standard output."""
    host.backend = backend
    if name in ("status", "remove", "dry run", "verify"):
        host.apply(OTHER)

    ran = host.fwc("--json", *arguments(name, host))

    assert ran.code == (1 if name in ("diff", "dry run", "verify") else 0), ran
    valid(SCHEMA_OF.get(name, name), ran.json)


def test_lab_json(host: Host) -> None:
    """The lab's matrix of real packets agrees with the policy and follows its schema."""
    ran = host.fwc("lab", host.write(), "--json")

    assert (ran.code, valid("lab", ran.json)["agrees"]) == (0, True)


@pytest.mark.parametrize("name", [name for name in LINES if "POLICY" in LINES[name]])
def test_json_of_a_rejected_policy(host: Host, name: str) -> None:
    """A rejected policy: exit code 3, the findings on standard error; `check --json` has them as JSON too, others print nothing."""
    ran = host.fwc(*arguments(name, host, WRONG), "--json")

    assert ran.code == 3
    assert re.search(r"policy.yaml:9:\d+: error\[port-bounds\]", ran.err)
    assert re.search(r"policy.yaml:9:\d+: error\[group-unknown\].*\n(.*\n)*? +hint: did you mean `carriers`\?", ran.err)
    if name == "check":
        found = valid("check", ran.json)
        assert (found["ok"], sorted(f["code"] for f in found["findings"] if f["severity"] == "error")) == (
            False,
            ["group-unknown", "port-bounds"],
        )
    else:
        assert ran.out == ""


def test_findings_come_all_at_once_and_sorted(host: Host) -> None:
    """All findings of a stage are shown in one run, in reading order, the same every time."""
    runs = {host.fwc("check", host.write(WRONG)).err for _ in range(3)}

    places = [tuple(map(int, m)) for m in re.findall(r"policy.yaml:(\d+):(\d+): ", runs.pop())]
    assert (runs, len(places) >= 2, places) == (set(), True, sorted(places))


def test_failing_policy_test_stops_everything(host: Host) -> None:
    """A policy that does not pass its own tests is rejected by check, diff and apply, and nothing is changed."""
    path = host.write(FAILING)

    codes = [host.fwc(*line).code for line in (("check", path), ("diff", path), ("apply", path, "--yes"), ("test", path))]

    assert codes == [3, 3, 3, 1]
    assert host.ours() == ""


def test_exit_codes_of_a_life(host: Host) -> None:
    """0 and 1 tell in sync from different, at every step of a policy's life."""
    path = host.write()
    steps = [
        ("diff", path), ("apply", path, "--dry-run"), ("apply", path, "--yes"), ("diff", path), ("apply", path, "--dry-run"),
        ("apply", path, "--yes"), ("status",), ("verify", path), ("remove", "--yes"), ("diff", path), ("verify", path), ("remove", "--yes"),
    ]  # fmt: skip

    assert [host.fwc(*step).code for step in steps] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0]


def test_dry_run_changes_nothing(host: Host) -> None:
    """`--dry-run` prints the same difference as the apply, and touches neither kernel nor state."""
    path = host.write()

    dry = host.fwc("apply", path, "--dry-run")

    assert (host.ours(), host.state.exists()) == ("", False)
    assert host.fwc("apply", path, "--yes").out == dry.out + "applied: generation 1 (nftables)\n"


@pytest.mark.parametrize(
    "line",
    [
        (),
        ("no-such-command",),
        ("apply",),
        ("check", "a", "b"),
        ("check", "--no-such-option", "a"),
        ("--backend",),
        ("explain", "POLICY", "--from", "192.0.2.10"),
        ("explain", "POLICY", "--from", "nobody", "--to", "tcp/22"),
        ("explain", "POLICY", "--from", "192.0.2.10", "--to", "tcp/99999"),
        ("explain", "POLICY", "--from", "192.0.2.10", "--to", "tcp/22", "--state", "old"),
        ("explain", "POLICY", "--from", "192.0.2.10", "--to", "tcp/22", "--to-addr", "2001:db8::1"),
        ("diff", "POLICY", "--against", "yesterday"),
        ("--backend", "nftable", "check", "POLICY"),
        ("--netns", "no-such-namespace", "status"),
        ("schema", "no-such-schema"),
    ],
    ids=" ".join,
)
def test_usage_errors(tmp_path: Path, line: tuple[str, ...]) -> None:
    """A command line that cannot be carried out: exit code 2, and one plain sentence with a hint on standard error."""
    (tmp_path / "p.yaml").write_text(POLICY, encoding="utf-8")

    ran = fwc(*(str(tmp_path / "p.yaml") if word == "POLICY" else word for word in line))

    assert ran.code == 2
    assert line == () or (ran.out == "" and re.match(r"error: .*\n(  hint: .*\n)?$", ran.err)), ran
    assert "Traceback" not in ran.err


def test_common_options_stand_anywhere(host: Host) -> None:
    """Common options mean the same before the command, between its arguments and after them, with `=` or without."""
    path, state = host.write(), str(host.state)
    lines = [
        ["--netns", host.netns, "--state-dir", state, "--json", "diff", path],
        ["diff", "--netns", host.netns, path, "--json", "--state-dir", state],
        ["diff", path, f"--state-dir={state}", "--json", f"--netns={host.netns}"],
        ["--json", "diff", f"--netns={host.netns}", "--", path],
    ]

    runs = [fwc(*(line if line != lines[3] else [f"--state-dir={state}", *line])) for line in lines]

    assert len({(ran.code, ran.out, ran.err) for ran in runs}) == 1
    assert runs[0].code == 1


def test_state_dir_from_the_environment(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """FWC_STATE_DIR names the state directory; --state-dir wins over it."""
    monkeypatch.setenv("FWC_STATE_DIR", str(host.folder / "named"))
    host.state = host.folder / "option"

    assert fwc("--netns", host.netns, "apply", host.write(), "--yes").code == 0
    assert host.fwc("apply", host.write(OTHER), "--yes").code == 0

    assert (host.folder / "named" / "current").exists()
    assert (host.state / "current").exists()


def test_quiet(host: Host) -> None:
    """-q leaves standard output to those who ask for something, and prints errors only."""
    path = host.write(POLICY.replace("[192.0.2.10,", "[192.0.2.10/24,"))

    runs = [host.fwc(*line, "-q") for line in (("check", path), ("diff", path), ("apply", path, "--yes"), ("remove", "--yes"))]

    assert [(r.code, r.out, r.err) for r in runs] == [(0, "", ""), (1, "", ""), (0, "", ""), (0, "", "")]


def test_warnings_go_to_standard_error(host: Host) -> None:
    """A warning is shown with its place, and never among the JSON."""
    ran = host.fwc("diff", host.write(POLICY.replace("[192.0.2.10,", "[192.0.2.10/24,")), "--json")

    assert (ran.code, valid("diff", ran.json)["in_sync"]) == (1, False)
    assert re.search(r"policy.yaml:7:\d+: warning\[host-bits\]", ran.err)


def test_verbose_shows_everything(host: Host) -> None:
    """Without -v long lines and long lists of changes are cut, and say so; with it every change is there as it will be sent."""
    host.apply()
    many = "".join(f"  own{n}: {{ports: [tcp/{3 * n + 30000}], from: [{'carriers, ' * 9}admins]}}\n" for n in range(20))
    path = host.write(POLICY + many)

    short, whole = (host.fwc("diff", path, *more).out.split("kernel changes\n")[1] for more in ((), ("-v",)))

    changes = host.fwc("diff", path, "--json").json["changes"]
    assert [line.strip() for line in whole.splitlines()] == changes
    assert f"and {len(changes) - len(short.splitlines()) + 1} more lines (all of them with -v)" in short


def test_every_command_has_help() -> None:
    """Every command describes itself and its options; help is no error."""
    names = [command.name or command.callback.__name__ for command in registered().registered_commands if command.callback]

    runs = {name: fwc(name, "--help") for name in names}

    assert {name: ran.code for name, ran in runs.items()} == dict.fromkeys(names, 0)
    assert all(len(ran.out) > 100 for ran in runs.values())
    assert all(f" {name} " in fwc("--help").out for name in names)


def test_version_starts_fast() -> None:
    """`--version` imports neither pydantic nor typer, and is the package's own."""
    heavy = "[m for m in ('pydantic', 'typer', 'yaml', 'rich') if m in sys.modules]"
    script = f"import sys; from fwcompiler.cli import run; run(['--version']); print({heavy})"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == f"fwc {__version__}\n[]\n"
    assert program("--version").out == f"fwc {__version__}\n"
    assert fwc("-q", "--version").out == f"fwc {__version__}\n"


@pytest.mark.parametrize("name", [p.name.removesuffix(".schema.json") for p in sorted(SCHEMAS.glob("*.schema.json"))])
def test_schema_command(name: str) -> None:
    """`fwc schema NAME` prints what `schemas/` holds, which is a valid JSON Schema."""
    ran = fwc("schema", name)

    assert ran.json == json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    assert ran.json["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(
    ("question", "verdict", "service", "line"),
    [
        ("--from 198.51.100.17 --to udp/5060", "accept", "sip", 9),
        ("--from 8.8.8.8 --to udp/5060", "drop", "sip", 9),
        ("--from 8.8.8.8 --to udp/5060 --state established", "drop", "sip", 9),
        ("--from 8.8.8.8 --to udp/10000", "accept", "rtp", 10),
        ("--from 8.8.8.8 --to tcp/25", "drop", None, None),
        ("--from 8.8.8.8 --to tcp/25 --state established", "accept", None, None),
        ("--from 192.0.2.10 --to tcp/22 --state invalid", "drop", None, None),
        ("--from 127.0.0.1 --to tcp/22", "drop", None, None),
        ("--from 127.0.0.1 --to tcp/25 --in lo", "accept", None, None),
        ("--from 2001:db8:51::9 --to udp/5060 --to-addr 2001:db8::1", "accept", "sip", 9),
        ("--from 2001:db8:51::9 --to icmp", "accept", None, None),
    ],
)
def test_explain(tmp_path: Path, question: str, verdict: str, service: str | None, line: int | None) -> None:
    """`explain` gives the verdict, the service and the policy line that decides."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")

    ran = fwc("explain", str(path), *question.split(), "--json")

    found = valid("explain", ran.json)
    assert (ran.code, found["verdict"], found["service"]) == (0, verdict, service)
    assert (found["at"] or ":0:").split(":")[-2] == str(line or 0)


def test_program_is_the_same(host: Host) -> None:
    """The installed program does what the tests call in process, exit code and streams alike."""
    path = host.write()
    for line in (("check", path), ("diff", path, "--json"), ("apply", path, "--yes"), ("status", "--json"), ("nonsense",)):
        here, there = fwc(*host.common, *line) if line[0] != "apply" else None, program(*host.common, *line)

        assert here is None or here == there
    assert Path(FWC).exists()


def test_which_module_has_which_command() -> None:
    """Every command is found under the module that registers it: a command line imports no other."""
    found: dict[str, set[str]] = {}
    for command in registered().registered_commands:
        assert command.callback
        module = command.callback.__module__.rpartition(".")[2]
        found.setdefault(module, set()).add(command.name or command.callback.__name__)

    assert found == {module: set(commands) for module, commands in MODULES.items()}
