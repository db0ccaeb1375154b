"""Reads the scenario files of this folder (README.md describes them) into dataclasses, and writes their expectations.

A plain module: other tests import it as `cases.loader` (tests/conftest.py puts the folder `tests` on the path).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

CASES = Path(__file__).parent
REJECTED = CASES / "rejected"

INPUT_FORMS = ("crlf", "escaped", "generated", "directory")
EXPECTATIONS = ("canonical", "warnings", "fwc.nft", "fwc.ipset", "fwc.v4", "fwc.v6")
BACKENDS = ("nftables", "iptables-nft", "iptables-legacy")
KERNELS = tuple(f"kernel {name}" for name in BACKENDS)
INSTRUCTIONS = ("host", "packets", "members", "packets with members", "command", "exit", "stderr")
STATES = ("new", "established", "related", "invalid", "untracked")
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "vrrp": 112}

_HEADING = "=== "


class CaseError(Exception):
    """A case file that does not follow README.md; the message names the file and the line."""


@dataclass(frozen=True)
class InputFile:
    """A file of the case; `form` is one of INPUT_FORMS or the empty string."""

    name: str
    form: str
    text: str

    def write(self, folder: Path) -> None:
        """Create it below a folder."""
        path = folder / self.name
        if self.form == "directory":
            path.mkdir(parents=True, exist_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content())

    def content(self) -> bytes:
        """The bytes that the file will hold."""
        match self.form:
            case "crlf":
                return self.text.replace("\n", "\r\n").encode()
            case "escaped":
                return self.text.rstrip("\n").encode("ascii").decode("unicode_escape").encode("latin-1")
            case "generated":
                return "".join(_generated(self.text)).encode()
            case _:
                return self.text.encode()


@dataclass(frozen=True)
class PacketCase:
    """One line of `=== packets`: a packet, the verdict and the label of the rule that decides.

    `destination` None: an address of the host itself. `label` is a service's name or one of fwc's own labels (`block`,
    `trust`, `established`, `invalid`, `icmp`, `loopback`, `other`). `members`: it counts on the case's dynamic members.
    `host`: where an edge lets it go. `leaving`: the host itself sends it, from `source_port`.
    """

    text: str
    version: int
    source: int
    protocol: int
    port: int
    icmp_type: int
    state: str
    interface: str
    destination: int | None
    verdict: str
    label: str
    members: bool = False
    host: str = ""
    leaving: bool = False
    source_port: int = 40000


@dataclass(frozen=True)
class Case:
    """A case file: what it shows, its input files, its expectations by section name, and its packets."""

    path: Path
    title: str
    inputs: tuple[InputFile, ...]
    sections: Mapping[str, str]
    packets: tuple[PacketCase, ...] = ()
    members: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def write_inputs(self, folder: Path) -> None:
        """Create all input files below a folder."""
        for each in self.inputs:
            each.write(folder)

    @property
    def host(self) -> str | None:
        """The host that the policy is compiled for, where it names several."""
        return self.sections.get("host", "").strip() or None

    def command(self) -> list[str]:
        """The arguments of fwc that the case is about; `check policy.yaml` where it says nothing."""
        return self.sections.get("command", "check policy.yaml").split()


def all_cases() -> list[Path]:
    """The scenario files, in order."""
    return sorted(CASES.glob("*.txt"))


def all_rejected() -> list[Path]:
    """The files of rejected policies, in order."""
    return sorted(REJECTED.glob("*.txt"))


def load_case(path: Path | str) -> Case:
    """Read one case file.

    Raises:
        CaseError: it does not follow README.md.
    """
    path = Path(path)
    title: list[str] = []
    inputs: list[InputFile] = []
    sections: dict[str, str] = {}
    packets: list[PacketCase] = []
    members: list[tuple[str, str]] = []
    for heading, number, body in _split(path.read_text(encoding="utf-8")):
        if heading is None:
            title = [line for line in body.splitlines() if line.strip()]
            continue
        if heading in sections or heading in {each.name for each in inputs}:
            raise CaseError(f"{path}:{number}: a second section `{heading}`")
        if not _is_section(heading):
            inputs.append(_input(heading, body, f"{path}:{number}"))
            continue
        sections[heading] = body
        if heading.startswith("packets"):
            lines = ((number + i, line) for i, line in enumerate(body.splitlines(), 1) if line.partition("#")[0].strip())
            packets += [_packet(line.partition("#")[0].strip(), f"{path}:{n}", heading != "packets") for n, line in lines]
        if heading == "members":
            members = [(words[0], words[1]) for line in body.splitlines() if (words := line.split())]
    if not title:
        raise CaseError(f"{path}:1: a case starts with a line that says what it shows")
    if not inputs:
        raise CaseError(f"{path}:1: there is no input file")
    return Case(path, "\n".join(title), tuple(inputs), sections, tuple(packets), tuple(members))


def update_case(path: Path, found: Mapping[str, str]) -> None:
    """Write expectations into a case file, each in its section; sections that are missing are added at the end.

    A heading `NAME sha256` is replaced by the `NAME` that was found, and the other way round.
    """
    parts = [part for part in _split(path.read_text(encoding="utf-8")) if part[0] is None or not _elided(part[0], found)]
    known = [heading for heading, _, _ in parts if heading is not None]
    texts = [(heading, found.get(heading, body) if heading else body) for heading, _, body in parts]
    texts += [(heading, body) for heading, body in found.items() if heading not in known]
    whole = "\n".join(f"{_HEADING}{heading}\n{body}" if heading else body for heading, body in texts)
    path.write_text(whole, encoding="utf-8")


def _elided(heading: str, found: Mapping[str, str]) -> bool:
    other = heading.removesuffix(" sha256") if heading.endswith(" sha256") else f"{heading} sha256"
    return heading not in found and other in found


def _split(text: str) -> Iterator[tuple[str | None, int, str]]:
    """Heading, its line number, and the text up to the next one, without the blank lines at its end."""
    heading: str | None = None
    start = 0
    body: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith(_HEADING):
            yield heading, start, _body(body)
            heading, start, body = line[len(_HEADING) :].strip(), number, []
        else:
            body.append(line)
    yield heading, start, _body(body)


def _body(lines: list[str]) -> str:
    while lines and not lines[-1].strip():
        lines.pop()
    return "".join(f"{line}\n" for line in lines)


def _is_section(heading: str) -> bool:
    return heading.removesuffix(" sha256") in (*EXPECTATIONS, *KERNELS, *INSTRUCTIONS)


def _input(heading: str, body: str, at: str) -> InputFile:
    name, _, form = heading.partition(" ")
    if form not in ("", *INPUT_FORMS):
        raise CaseError(f"{at}: `{heading}` is neither a section nor an input file; the forms of input are {', '.join(INPUT_FORMS)}")
    return InputFile(name, form, body)


_GENERATED = re.compile(r"(?:(\d+) addresses from (\S+) step (\d+)(?: size (/\d+))?|(\d+) blanks)$")


def _generated(text: str) -> Iterator[str]:
    """`3000 addresses from 198.18.0.0 step 8 size /31`, `33554433 blanks`; any other line stands for itself."""
    for line in text.splitlines():
        found = _GENERATED.match(line)
        if not found:
            yield f"{line}\n"
        elif found[5]:
            yield " " * int(found[5])
        else:
            first = ip_address(found[2])
            yield from (f"{first + i * int(found[3])}{found[4] or ''}\n" for i in range(int(found[1])))


_PACKET = re.compile(
    rf"(?P<source>\S+) -> (?:(?P<destination>[0-9a-f.:]*[.:][0-9a-f.:]*) )?(?P<to>[a-z0-9]+(?:/\d+)?)"
    rf"(?: (?P<state>{'|'.join(STATES)}))?(?: (?:in|out) (?P<interface>\S+))? = (?P<verdict>accept|drop|reject) (?P<label>\S+)"
    rf"(?: at (?P<host>\S+))?$"
)


def _packet(line: str, at: str, members: bool) -> PacketCase:
    found = _PACKET.match(line)
    if not found:
        raise CaseError(f"{at}: `{line}` is not `FROM -> [ADDRESS] PROTOCOL/PORT [STATE] [in INTERFACE] = VERDICT LABEL [at HOST]`")
    here, _, port_here = found["source"].partition(":")
    leaving = here == "here"
    source = ip_address("0.0.0.0" if "." in (found["destination"] or "") else "::") if leaving else ip_address(found["source"])
    destination = ip_address(found["destination"]) if found["destination"] else None
    if destination is not None and destination.version != source.version:
        raise CaseError(f"{at}: addresses of two families")
    protocol, port, icmp_type = _target(found["to"], source.version, at)
    return PacketCase(
        line,
        source.version,
        int(source),
        protocol,
        port,
        icmp_type,
        found["state"] or "new",
        found["interface"] or "eth0",
        None if destination is None else int(destination),
        found["verdict"],
        found["label"],
        members,
        found["host"] or "",
        leaving,
        int(port_here or 40000) if leaving else 40000,
    )


def _target(text: str, version: int, at: str) -> tuple[int, int, int]:
    """Protocol number, port, ICMP type of `udp/5060`, `icmp`, `icmp/3`, `vrrp`, `protocol/47`. Plain `icmp` is an echo request."""
    name, _, number = text.partition("/")
    if name == "protocol" and number:
        return int(number), 0, 0
    if name == "icmp":
        return (1, 0, int(number or 8)) if version == 4 else (58, 0, int(number or 128))
    if name not in PROTOCOLS or (name in ("tcp", "udp")) != bool(number):
        raise CaseError(f"{at}: `{text}` is no protocol with its port")
    return PROTOCOLS[name], int(number or 0), 0
