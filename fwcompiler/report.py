"""What commands print: text for people, and the JSON shapes whose schemas are in `schemas/`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from fwcompiler.addresses import BITS, NOBODY, Addresses, address_text, includes
from fwcompiler.contents import difference
from fwcompiler.diagnostics import Finding
from fwcompiler.plan import Plan
from fwcompiler.proof.access import LOOPBACK_ADDRESSES, SENDERS, Access
from fwcompiler.proof.describe import packet_text
from fwcompiler.proof.meaning import Explanation
from fwcompiler.proof.memberaccess import MemberAccess
from fwcompiler.proof.sending import Sending, SendingChange
from fwcompiler.resolved import Resolved, ResolvedTest
from fwcompiler.ruleset import Final, InSet, Ruleset

if TYPE_CHECKING:
    from fwcompiler.shapes import (
        AccessShape,
        CountShape,
        DiffShape,
        ExplainShape,
        FindingShape,
        MemberAccessShape,
        SendingChangeShape,
        TestShape,
        TestsShape,
        UncertainShape,
        VerifyShape,
    )
    from fwcompiler.verify import Verified

MAX_SOURCES = 6
MAX_LINES = 40


def finding_json(finding: Finding) -> FindingShape:
    """One finding for `check --json`."""
    return {
        "severity": "error" if finding.is_error else "warning",
        "code": finding.code,
        "message": finding.message,
        "at": str(finding.at) if finding.at else None,
        "hint": finding.hint,
    }


def good_text(policies: Sequence[Resolved]) -> str:
    """What was checked: `: 7 services, 4 groups, 2 tests`, and on which hosts where there are several."""
    names = [p.host.name for p in policies if p.host]
    services = {s.name for p in policies for s in p.services} | {f.service.name for p in policies if p.edge for f in p.edge.forwards}
    tests = {t.at for p in policies for t in p.tests}
    hosts = f" on {', '.join(names)}" if names else ""
    return f"{hosts}: {len(services)} services, {len(policies[0].groups)} groups, {len(tests)} tests"


def access_json(access: Access) -> AccessShape:
    """One line of access gained or lost."""
    shape: AccessShape = {"from": access.sources(), "to": access.to, "service": access.service}
    if access.at:
        shape["at"] = access.at
    if access.direct:
        shape["direct"] = True
    return shape


def diff_json(plan: Plan) -> DiffShape:
    """The shape of `diff --json`: exact, nothing summarised."""
    return {
        "in_sync": plan.in_sync,
        "gained": [access_json(a) for a in plan.access.gained],
        "lost": [access_json(a) for a in plan.access.lost],
        "uncertain": [*_uncertain("gained", plan.access.perhaps_gained), *_uncertain("lost", plan.access.perhaps_lost)],
        "dynamic": [*_dynamic("gained", plan.members_gained), *_dynamic("lost", plan.members_lost)],
        "egress": sending_json(plan.sending),
        "changes": list(plan.changes(whole=True)),
        "edited": list(plan.edited),
        "notes": list(plan.notes),
    }


def sending_json(change: SendingChange) -> SendingChangeShape:
    """What this host may send, and may not any more."""
    return {
        "gained": [each.as_json() for each in change.gained],
        "lost": [each.as_json() for each in change.lost],
        "dynamic": [*_dynamic("gained", change.members_gained), *_dynamic("lost", change.members_lost)],
    }


def _dynamic(change: Literal["gained", "lost"], parts: Iterable[MemberAccess]) -> list[MemberAccessShape]:
    shapes: list[MemberAccessShape] = []
    for p in parts:
        shape: MemberAccessShape = {"group": p.group, "to": p.to, "service": p.service, "change": change}
        if p.at:
            shape["at"] = p.at
        shapes.append(shape)
    return shapes


def _member_lines(parts: Iterable[MemberAccess], policy: Resolved | None, sign: str, may: str) -> Iterator[str]:
    """`+ dynamic members of agents may reach wss tcp/8089`, one line for all ports of a service."""
    together: dict[tuple[str, str | None, str], list[str]] = {}
    for part in parts:
        together.setdefault((part.group, part.service, part.at), []).append(part.to)
    for (group, service, at), ports in together.items():
        where = f" of {_host_name(at, policy)}" if at else ""
        yield f"{sign} dynamic members of {group} {may} {service + ' ' if service else ''}{', '.join(ports)}{where}"


def _uncertain(change: Literal["gained", "lost"], parts: Iterable[Access]) -> list[UncertainShape]:
    return [{"from": a.sources(), "to": a.to, "service": a.service, "change": change, "depends": list(a.depends)} for a in parts]


def explain_json(explanation: Explanation) -> ExplainShape:
    """The shape of `explain --json`."""
    return {
        "verdict": explanation.verdict,
        "service": explanation.service,
        "reason": explanation.reason,
        "at": str(explanation.at) if explanation.at else None,
    }


def verify_json(found: Verified) -> VerifyShape:
    """The shape of `verify --json`."""
    return {
        "equal": found.equal,
        "compared": list(found.compared),
        "problems": list(found.problems),
        "counter_examples": [
            {"packets": e.packets, "packet": packet_text(e.packet), "policy": e.policy, "kernel": e.kernel} for e in found.counter_examples
        ],
        "foreign": [
            {"packets": m.packets, "packet": packet_text(m.packet), "policy": says, "host": m.host, "rule": m.by, "certain": m.certain}
            for m, says in found.foreign
        ],
        "not_looked_at": list(found.unread),
        "sampled": list(found.sampled),
    }


def verify_text(found: Verified) -> str:
    """What was proven, or what speaks against it with one packet for each."""
    lines = [*found.problems]
    for e in found.counter_examples:
        lines += [f"{e.packets}", f"  the policy: {e.policy}", f"  the kernel: {e.kernel}", f"  for example {packet_text(e.packet)}"]
    if not lines:
        means = "means" if len(found.compared) == 1 else "mean"
        lines.append(f"proven for all packets: {', '.join(found.compared)} {means} what the policy says")
        lines += sampled_text(found.sampled)
        if found.foreign:
            lines.append("but rules that are not fwc's change what becomes of packets:")
        elif not found.alone:
            lines.append("rules of others on this host change nothing")
    for m, says in found.foreign:
        lines += [m.packets, f"  the policy: {says}", f"  the host: {m.does}: {m.by}", f"  for example {packet_text(m.packet)}"]
    return "\n".join((*lines, *(f"not looked at: {what}" for what in found.unread)))


def sampled_text(names: Sequence[str]) -> tuple[str, ...]:
    """What is said of sets whose content was not read whole; nothing where there are none."""
    return (f"sets too big to read were sampled, --full reads them: {', '.join(names)}",) if names else ()


def tests_json(found: Sequence[tuple[ResolvedTest, str]]) -> TestsShape:
    """The shape of `test --json`."""
    rows: list[TestShape] = [
        {
            "from": "this host" if test.leaving else test.source,
            "to": f"{test.source} {test.ports}" if test.leaving else str(test.ports),
            "state": test.state,
            "expect": test.expect,
            "passed": not wrong,
            "message": wrong,
            "at": str(test.at),
        }
        for test, wrong in found
    ]
    return {"passed": all(row["passed"] for row in rows), "tests": rows}


def tests_text(found: Sequence[tuple[ResolvedTest, str]]) -> str:
    """A line a test; where one is not met, what happens instead."""
    lines = []
    for test, wrong in found:
        what = f"{test.expect} {test.words()}" + (f", {test.state}" if test.state != "new" else "")
        lines.append(f"{'FAILED' if wrong else 'ok    '}  {test.at}: {what}" + (f", but {wrong}" if wrong else ""))
    failed = sum(bool(wrong) for _, wrong in found)
    return "\n".join([*lines, f"{len(found) - failed} passed, {failed} failed"])


def diff_text(plan: Plan, policy: Resolved | None, *, color: bool, whole: bool = False) -> str:
    """Access gained and lost in the policy's words, then the kernel changes."""
    if plan.in_sync:
        return "\n".join(
            (*plan.notes, "in sync: the kernel holds exactly this policy" if not plan.of_others else "nobody gains or loses access")
        )
    green, red, bold, off = ("\033[32m", "\033[31m", "\033[1m", "\033[0m") if color else ("",) * 4
    lines: list[str] = list(plan.notes)
    if not plan.live and not plan.of_others:
        lines.append("nothing of fwc is loaded yet; this policy grants what follows, and everything else will be dropped")
    if plan.edited:
        lines.append(f"{bold}changed by hand since it was applied{off}")
        lines += _first_lines(plan.edited, whole=whole)
    plus, minus = f"{green}+{off}", f"{red}-{off}"
    access, more, less = plan.access, *sending_lines(plan.sending, policy, plus, minus)
    live = None if plan.of_others else plan.live
    for title, sign, may, parts, members, sent, known in (
        ("access gained", plus, "may reach", access.gained, plan.members_gained, more, None),
        ("access lost", minus, "may no longer reach", access.lost, plan.members_lost, less, live),
        ("access perhaps gained", f"{green}?{off}", "may reach", access.perhaps_gained, (), (), None),
        ("access perhaps lost", f"{red}?{off}", "may no longer reach", access.perhaps_lost, (), (), live),
    ):
        if parts or members or sent:
            lines.append(f"{bold}{title}{off}")
            lines += [f"  {text}" for text in access_lines(parts, policy, sign, may, known, plan.wanted)]
            lines += [f"  {text}" for text in _member_lines(members, policy, sign, may)]
            lines += [f"  {text}" for text in sent]
    if not access and not plan.members_gained and not plan.members_lost and not plan.sending:
        lines.append(("by its rules alone, " if plan.live.others else "") + "no new connection gains or loses access")
    if not plan.steps and not plan.replaces:
        return "\n".join(lines)
    lines.append(f"{bold}kernel changes{off}")
    return "\n".join((*lines, *_change_lines(plan, whole=whole)))


def _change_lines(plan: Plan, *, whole: bool) -> list[str]:
    if not plan.live and not whole:
        return [f"  {_load_text(plan)} (every line with -v)"]
    return _first_lines(plan.changes(whole=whole), whole=whole)


def _first_lines(texts: Sequence[str], *, whole: bool) -> list[str]:
    shown = texts if whole else texts[:MAX_LINES]
    lines = [f"  {line if whole else _cut(line)}" for line in shown]
    return [*lines, f"  and {len(texts) - len(shown)} more lines (all of them with -v)"] if len(texts) > len(shown) else lines


def _load_text(plan: Plan) -> str:
    """A first load in one line; the ruleset itself is what `compile` prints."""
    wanted = plan.wanted
    rules, entries = sum(len(c.rules) for c in wanted.chains), sum(len(s.ranges) for s in wanted.sets)
    text = f"load {len(wanted.chains)} chains with {rules} rules, {len(wanted.sets)} sets with {entries} entries"
    return f"{text}, and remove the rules of fwc from {plan.replaces}" if plan.replaces else text


def _cut(line: str) -> str:
    return line if len(line) <= 200 else line[:197] + "..."


def access_lines(
    parts: Iterable[Access], policy: Resolved | None, sign: str, may: str, live: Ruleset | None = None, wanted: Ruleset | None = None
) -> Iterator[str]:
    """`+ carriers may reach sip udp/5060`, one line for all ports that the same sources gain or lose at one service.

    Sources that are part of one group have its name in front: `carriers: + 198.51.100.64/28 may reach sip udp/5060`. ``live``: the
    rules that let them in until now, whose groups have the say about who they are. ``wanted``: whose groups stand for a policy's where
    there is none.
    """
    now, held = _groups(policy) or (_groups_in(wanted) if wanted else {}), _groups_in(live) if live else {}
    groups = {**held, **{name: each for name, each in now.items() if name not in held}}
    whole = {name: each for name, each in groups.items() if _has_all(each, now.get(name, NOBODY))}
    together: dict[tuple[str, str | None, tuple[str, ...], str, bool], list[str]] = {}
    for part in parts:
        who = _who(part, policy, whole)
        inside = "" if who in whole else _inside(part, groups)
        together.setdefault((f"{inside}{sign} {who}", part.service, part.depends, part.at, part.direct), []).append(part.to)
    for (who, service, depends, at, direct), ports in together.items():
        where = f" of {_host_name(at, policy)}{', sent there directly' if direct else ''}" if at else ""
        on = f"; it depends on {_cut('; '.join(depends))}" if depends else ""
        yield f"{who} {may} {service + ' ' if service else ''}{', '.join(ports)}{where}{on}"


def _has_all(held: Addresses, now: Addresses) -> bool:
    """True where all of a group's addresses now are among those it had; only what is new is searched for."""
    return all(includes(was, difference(was, will)[1]) for was, will in ((held.v4, now.v4), (held.v6, now.v6)))


def sending_lines(change: SendingChange, policy: Resolved | None, plus: str, minus: str) -> tuple[list[str], list[str]]:
    """What this host may send, and what it may not any more; where everything was open, or is now, that in one line."""
    more = [f"{plus} this host may reach {text}" for text in _sent_texts(change.gained, policy)]
    less = [f"{minus} this host may no longer reach {text}" for text in _sent_texts(change.lost, policy)]
    for members, lines, start in (
        (change.members_gained, more, f"{plus} this host may"),
        (change.members_lost, less, f"{minus} this host may no longer"),
    ):
        together: dict[tuple[str, str | None], list[str]] = {}
        for each in members:
            together.setdefault((each.group, each.service), []).append(each.to)
        lines += [f"{start} reach dynamic members of {group}: {_with_service(service, to)}" for (group, service), to in together.items()]
    if change.left is not None and change.lost:
        less = [f"{minus} this host may no longer reach anything but", *(f"    {text}" for text in _sent_texts(change.left, policy))]
    if change.opened and change.gained:
        more = [f"{plus} this host may reach everything"]
    return more, less


def _sent_texts(parts: Iterable[Sending], policy: Resolved | None) -> Iterator[str]:
    """`carriers: sip udp/5060`, one line for all ports of a service at the same addresses."""
    together: dict[tuple[str, str | None], list[str]] = {}
    for part in parts:
        access = part.as_access()
        groups = _groups(policy)
        who = _who(access, policy, groups)
        inside = "" if who in groups else _inside(access, groups)
        where = f"{who} ({inside.removesuffix(': ')})" if inside else who
        together.setdefault((where, part.service), []).append(f"{part.to} from port {part.from_port}" if part.from_port else part.to)
    for (where, service), ports in together.items():
        yield f"{where}: {_with_service(service, ports)}"


def _with_service(service: str | None, ports: Sequence[str]) -> str:
    """`sip udp/5060`; what is no service's says enough by itself."""
    named = service and not any(service in (each, each.partition("/")[0]) for each in ports)
    return f"{service} {', '.join(ports)}" if named else ", ".join(ports)


def _host_name(address: str, policy: Resolved | None) -> str:
    """The host of the policy that has an address, with the address where it has several; else the address."""
    for forward in policy.edge.forwards if policy and policy.edge else ():
        own = [address_text(*each) for each in forward.host.addresses]
        if address in own:
            return forward.host.name if len(own) == 1 else f"{forward.host.name} ({address})"
    return address


def _groups(policy: Resolved | None) -> dict[str, Addresses]:
    """The policy's groups; those that are only blocked come last, because nobody is known by that."""
    if policy is None:
        return {}
    blocked = policy.block.groups if policy.block else ()
    used = {*policy.named, *policy.trust, *(policy.egress.groups() if policy.egress else ())}
    names = sorted(policy.groups, key=lambda name: name in blocked and name not in used)
    return {name: policy.groups[name].addresses for name in names}


def _groups_in(live: Ruleset) -> dict[str, Addresses]:
    """The groups that rules accept, by the names of their sets."""
    matches = (m for c in live.chains for r in c.rules if r.verdict is Final.ACCEPT for m in r.matches)
    accepted = {m.set for m in matches if isinstance(m, InSet) and m.side == "source" and not m.negated}
    found: dict[str, Addresses] = {}
    for each in live.sets:
        name, _, family = each.name.rpartition(".v")
        if each.name in accepted and name and family and not each.dynamic:
            own = Addresses(each.ranges, ()) if each.version == 4 else Addresses((), each.ranges)
            found[name] = found.get(name, NOBODY) | own
    return found


def _who(access: Access, policy: Resolved | None, named: Mapping[str, Addresses]) -> str:
    """Groups where the sources are whole groups, `anywhere but …` where they are most addresses, else addresses."""
    if access.is_anywhere:
        return "anywhere"
    if any(access.addresses.only(version).size + LOOPBACK_ADDRESSES.only(version).size > _half(version) for version in BITS):
        left = SENDERS - access.addresses
        for version, other in ((4, 6), (6, 4)):
            missing = left.only(version)
            if not access.addresses.family(other) and missing.size < _half(version):
                return f"anywhere over IPv{version}" + (f" but {_few(missing)}" if missing else "")
        if all(left.only(version).size < _half(version) for version in BITS):
            return "anywhere but the block list" if left == _blocked(policy) else f"anywhere but {_few(left)}"
    groups: list[str] = []
    rest = access.addresses
    for name, own in named.items():
        if own and access.addresses.includes(own) and own & rest:
            groups.append(name)
            rest = rest - own
    return ", ".join([*groups, *([_few(rest)] if rest else [])])


def _half(version: int) -> int:
    """Half of the addresses that there are."""
    return 1 << (BITS[version] - 1)


def _blocked(policy: Resolved | None) -> Addresses | None:
    if policy is None or policy.block is None:
        return None
    return policy.addresses(policy.block.groups) - policy.addresses(policy.block.excepted) - LOOPBACK_ADDRESSES


def _few(addresses: Addresses) -> str:
    more = f" and {len(addresses) - MAX_SOURCES} more" if len(addresses) > MAX_SOURCES else ""
    shown = Addresses(addresses.v4[:MAX_SOURCES], addresses.v6[:MAX_SOURCES]).texts()
    return ", ".join(shown[:MAX_SOURCES]) + more


def _inside(access: Access, named: Mapping[str, Addresses]) -> str:
    """`carriers: ` where the sources all belong to one group."""
    return next((f"{name}: " for name, own in named.items() if own and own.includes(access.addresses)), "")


def counters_json(counters: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, CountShape]]:
    """Counters by service and verdict."""
    services: dict[str, dict[str, CountShape]] = {}
    for name, (packets, octets) in sorted(counters.items()):
        service, _, verdict = name.rpartition(".")
        services.setdefault(service, {})[verdict] = {"packets": packets, "bytes": octets}
    return services
