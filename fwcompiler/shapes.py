"""The JSON that commands print, as types; `fwcompiler.schemas` makes JSON Schemas of them."""

from __future__ import annotations

from typing import (
    Literal,
    NotRequired,  # typing's own is not enough for pydantic before Python 3.12
)

from typing_extensions import TypedDict


class FindingShape(TypedDict):
    """One finding; `at` is file:line:column."""

    severity: Literal["error", "warning"]
    code: str
    message: str
    at: str | None
    hint: str


class CheckShape(TypedDict):
    """`check --json`: `left_out` says what could not be done here."""

    ok: bool
    findings: list[FindingShape]
    left_out: list[str]


AccessShape = TypedDict(
    "AccessShape", {"from": list[str], "to": str, "service": str | None, "at": NotRequired[str], "direct": NotRequired[Literal[True]]}
)
"""`from`: prefixes, ranges `a-b` or `anywhere`; `to`: a protocol with a port or range; `service`: None for none of the policy.

`at`: the address behind an edge that is reached, a range of them, or in words all that no rule names; left out where it is the host
itself. `direct`: by sending to that address, past the edge's NAT."""


UncertainShape = TypedDict(
    "UncertainShape",
    {"from": list[str], "to": str, "service": str | None, "change": Literal["gained", "lost"], "depends": list[str]},
)
"""Access that may be gained or lost: whether it is depends on what a rule asks that nobody can tell."""


class MemberAccessShape(TypedDict):
    """What the dynamic members of a group gain or lose, whoever they are; `at` as for other access."""

    group: str
    to: str
    service: str | None
    change: Literal["gained", "lost"]
    at: NotRequired[str]


class SendingShape(TypedDict):
    """What this host may send: `at` prefixes, ranges or `anywhere`, `to` a protocol with the port or range there.

    With `from_port`, `to` is a protocol alone, and which packets are meant is said by this host's own port.
    """

    at: list[str]
    to: str
    service: str | None
    from_port: NotRequired[str]


class SendingChangeShape(TypedDict):
    """What this host may send after a change and could not before, and the other way round; `dynamic`: to members at run time."""

    gained: list[SendingShape]
    lost: list[SendingShape]
    dynamic: list[MemberAccessShape]


class DiffShape(TypedDict):
    """`diff --json` and `apply --dry-run --json`. `gained` and `lost` are certain, `uncertain` may be either way.

    These speak of addresses that are written down; `dynamic` says what members of groups at run time gain and lose.
    `egress` is about what this host sends.

    `notes` says what was not compared, what of a listing was not understood, and, against the live rules, what rules of others
    change. `edited` says what somebody changed in our rules since they were applied.
    """

    in_sync: bool
    gained: list[AccessShape]
    lost: list[AccessShape]
    uncertain: list[UncertainShape]
    dynamic: list[MemberAccessShape]
    egress: SendingChangeShape
    changes: list[str]
    edited: list[str]
    notes: list[str]


class TrialShape(TypedDict):
    """How long an apply is on trial, and the generation that it returns to; None: to what was there before."""

    seconds: float
    previous: int | None


class ApplyShape(DiffShape):
    """`apply --json` and `rollback --json`: the difference that was applied, and the generation now in force."""

    applied: bool
    generation: int
    trial: TrialShape | None


class EndedShape(TypedDict):
    """`rollback --json` during a trial: the generation that was on trial, and the one in force again."""

    ended_trial: int
    generation: int | None


class ConfirmShape(TypedDict):
    """`confirm --json`: the generation that stays."""

    confirmed: int


class RestoreShape(TypedDict):
    """`restore --json`: the generation in force; None where `fwc remove` was the last word."""

    generation: int | None
    backend: str
    notes: list[str]


class InstallBootShape(TypedDict, total=False):
    """`install-boot --json`: the files that came or went."""

    installed: list[str]
    removed: list[str]


class HistoryEntryShape(TypedDict):
    """One generation. `ending`: why and when it was rolled back. `lockout`: who was locked out on purpose.

    `trial`: seconds it was on trial for, 0 for none. `restores`: the generation that it is a return to.
    `changes`: access gained (+) and lost (-), as `diff` words it.
    """

    number: int
    state: Literal["in force", "on trial", "confirmed", "rolled back", "damaged"]
    ending: str
    applied_at: str
    applied_by: str
    applied_from: str
    reason: str
    policy: str
    backend: str
    proven: bool
    lockout: str
    trial: float
    restores: int | None
    changes: list[str]


class HistoryShape(TypedDict):
    """`history --json`: the newest first."""

    generations: list[HistoryEntryShape]


class ExplainShape(TypedDict):
    """`explain --json`."""

    verdict: Literal["accept", "drop", "reject"]
    service: str | None
    reason: str
    at: str | None


class LiveExplainShape(TypedDict):
    """`explain --live --json`: what the host does, whether the policy says the same, and what it says.

    `redirect`: a rule sends the packet to another address or port. `may`: it depends on what nobody can tell. `by`: whose rule
    decides. `not_looked_at`: rules of others that could not be read.
    """

    verdict: Literal["accept", "drop", "reject", "redirect", "may"]
    service: str | None
    reason: str
    at: str | None
    agrees: bool
    by: Literal["fwc", "others"]
    policy: ExplainShape
    not_looked_at: list[str]


class ListingExplainShape(TypedDict):
    """`explain --listing --json`: `may` where the answer `depends` on what the packet does not tell."""

    verdict: Literal["accept", "drop", "reject", "may"]
    service: str | None
    reason: str
    at: str | None
    possible: list[str]
    depends: list[str]


class CounterExampleShape(TypedDict):
    """Packets that the kernel treats otherwise than the policy says; `packet` is one of them."""

    packets: str
    packet: str
    policy: str
    kernel: str


class ForeignShape(TypedDict):
    """Packets that rules of others take from what the policy says: `host` is what becomes of them, `rule` the rule that decides.

    `certain` is false where it depends on something that nobody can tell.
    """

    packets: str
    packet: str
    policy: str
    host: Literal["accept", "drop", "reject", "redirect"]
    rule: str
    certain: bool


class VerifyShape(TypedDict):
    """`verify --json`: `compared` names the backends whose rules were proven; `problems` what stands in the way.

    `counter_examples` are faults of the rules of fwc, `foreign` what rules of others change; `not_looked_at` names those that
    could not be read.
    """

    equal: bool
    compared: list[str]
    problems: list[str]
    counter_examples: list[CounterExampleShape]
    foreign: list[ForeignShape]
    not_looked_at: list[str]
    sampled: list[str]


TestShape = TypedDict(
    "TestShape",
    {"from": str, "to": str, "state": str, "expect": Literal["accept", "drop", "reject"], "passed": bool, "message": str, "at": str},
)


class TestsShape(TypedDict):
    """`test --json`."""

    passed: bool
    tests: list[TestShape]


class CountShape(TypedDict):
    """Packets and bytes of one counter."""

    packets: int
    bytes: int


class MemberShape(TypedDict):
    """A dynamic member; `seconds_left` is None for one that stays.

    `since`, `by`, `peer` (the address it was done from) and `reason` are None where a member is not `recorded`: somebody put it into
    the kernel's set by hand. A recorded one that is not `loaded` is missing there, and the next apply puts it in.
    """

    address: str
    seconds_left: int | None
    since: str | None
    by: str | None
    peer: str | None
    reason: str | None
    recorded: bool
    loaded: bool


class MembersShape(TypedDict):
    """`members --json`: by group."""

    members: dict[str, list[MemberShape]]


class MemberChangeShape(TypedDict):
    """`allow --json` and `revoke --json`: what was done, and the access that new connections from the address gain and lose by it.

    `egress`: what this host may now send to the address, or not any more.
    """

    do: str
    group: str
    address: str
    until: str | None
    gained: list[AccessShape]
    lost: list[AccessShape]
    egress: SendingChangeShape
    notes: list[str]


class MemberEventShape(TypedDict):
    """A line of `members --history --json`: `do` is allow, revoke or expire; `peer` the address it was done from."""

    at: str
    do: str
    group: str
    address: str
    until: str | None
    by: str
    peer: str
    reason: str


class MembersHistoryShape(TypedDict):
    """`members --history --json`, oldest first."""

    history: list[MemberEventShape]


class GenerationShape(TypedDict):
    """A recorded apply."""

    number: int
    backend: str
    policy: str
    name: str
    applied_at: str
    applied_by: str
    applied_from: str
    fingerprint: str
    proven: bool
    reason: str
    lockout: str
    trial: float
    restores: int | None


class PendingShape(TypedDict):
    """The pending trial: seconds until it returns, and to which generation; None: to what was there before."""

    number: int
    seconds_left: float
    previous: int | None


class StatusShape(TypedDict):
    """`status --json`: `counters` by service and verdict, `drift` what an apply would send to put things right, `edited` what somebody
    changed in our rules since they were applied.

    `notes` names rules of others that change what becomes of packets, those that could not be looked at, and rules of ours in
    another backend.

    `second_reading`: whether python-iptables reads the rules of a legacy host as fwc does: `agrees`, `differs: ...` with the first
    difference, or `not possible: ...` with the reason; None for other backends, and where python-iptables is not installed.
    """

    backend: str
    in_sync: bool
    drift: list[str]
    edited: list[str]
    generation: GenerationShape | None
    trial: PendingShape | None
    counters: dict[str, dict[str, CountShape]]
    members: dict[str, list[MemberShape]]
    notes: list[str]
    second_reading: str | None


class CompileShape(TypedDict):
    """`compile --json`: file name -> text."""

    backend: str
    files: dict[str, str]


class RemoveShape(TypedDict):
    """`remove --json`: the backends that had something of ours."""

    removed: list[str]


BackendShape = TypedDict("BackendShape", {"name": str, "from": str, "usable": bool, "missing": list[str], "error": str | None})


class BackendsShape(TypedDict):
    """`backends --json`."""

    backends: list[BackendShape]


ProbeShape = TypedDict(
    "ProbeShape",
    {
        "client": str,
        "from": str,
        "source_port": int | None,
        "to": str,
        "to_addr": str | None,
        "service": str | None,
        "reached": bool,
        "expected": bool,
        "reached_host": str | None,
        "expected_host": str | None,
        "seen_from": str | None,
        "seen_port": int | None,
        "agrees": bool,
    },
)


class LabShape(TypedDict):
    """`lab --json`: every probe, what arrived and what the policy says.

    At an edge also at which host, and from which address and port as seen there.
    """

    backend: str
    host: str | None
    agrees: bool
    probes: list[ProbeShape]
    left_out: list[str]


class IssueShape(TypedDict):
    """One finding of the audit; `at` is file:line:column, `place` says where in words."""

    code: str
    severity: Literal["note", "warning", "error"]
    message: str
    at: str | None
    place: str
    remedy: str


class ExposureShape(TypedDict):
    """One line of the exposure matrix: how much of a group reaches each service."""

    who: str
    size: str
    reaches: dict[str, Literal["all", "some", "none"]]


class PortShape(TypedDict):
    """One range of the port plan."""

    lane: str
    label: str
    first: int
    last: int
    kind: Literal["public", "restricted", "asterisk", "local"]


class CertificateShape(TypedDict):
    """A certificate that a port shows or a file holds."""

    place: str
    subject: str
    issuer: str
    names: list[str]
    not_after: str
    days_left: int
    key: str


class AuditShape(TypedDict):
    """`audit --json`: `ok` is false where a finding is as bad as `--fail-on`; `in_sync` None where the rules could not be read."""

    policy: str
    name: str
    host: str
    at: str
    ok: bool
    counts: dict[str, int]
    findings: list[IssueShape]
    exposure: list[ExposureShape]
    ports: list[PortShape]
    certificates: list[CertificateShape]
    in_sync: bool | None
    drift: list[str]
    left_out: list[str]
