"""The policy language as pydantic models: what a document may say, field by field.

Nothing is resolved here: addresses and ports stay the text the operator wrote, so that later stages can point at
it. Unknown keys are errors. `fwc schema` prints the JSON Schema made from these models.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, ValidationError

from fwcompiler.catalogue import CATALOGUE, Role
from fwcompiler.diagnostics import Report, did_you_mean
from fwcompiler.source import Document, Key, KeyPath

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,19}$")]
HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$")]
Kind = Literal["everyone", "loopback", "multicast"]
Duration = Annotated[str, StringConstraints(pattern=r"^([0-9]{1,6}[smhdw])+$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ListFile(_Model):
    """A list file as group member: one entry a line, or a column of a CSV file, or a path into a JSON file."""

    file: str = Field(min_length=1, description="Path of the list, relative to the policy file that names it.")
    column: str | None = Field(default=None, description="CSV and TSV: the heading of the column that holds the addresses.")
    path: str | None = Field(default=None, description="JSON: where the addresses are, as in `regions[].signalling[]`.")
    bad_lines: Literal["skip", "refuse"] = Field(
        default="skip", description="What to do with lines that are no usable address: leave them out with a warning, or refuse the policy."
    )
    allow: list[Literal["everyone", "loopback", "multicast", "shrink"]] = Field(
        default_factory=list, description="Kinds of entries that are refused otherwise; `shrink`: the list may lose more than half."
    )


class AddressEntry(_Model):
    """One address with more to say about it."""

    address: str = Field(description="Address, prefix, range `a-b` or wildcard `a.b.c.x`.")
    comment: str = Field(default="", description="For the reader.")
    allow: list[Kind] = Field(default_factory=list, description="Kinds of entries that are refused otherwise.")


def _member_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if isinstance(value, ListFile | AddressEntry):
        return "<file>" if isinstance(value, ListFile) else "<address>"
    if isinstance(value, dict):
        return "<address>" if "address" in value else "<file>"
    return None


Member = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ListFile, Tag("<file>")] | Annotated[AddressEntry, Tag("<address>")],
    Discriminator(_member_form, custom_error_type="member", custom_error_message="an address, `{file: …}` or `{address: …}`"),
]


class Dynamic(_Model):
    """Members that come and go while the host runs; they are kept over an apply."""

    timeout: Duration = Field(default="12h", description="How long a member stays when nothing else is said: `90s`, `30m`, `12h`, `7d`.")
    max: int = Field(default=4096, ge=1, le=1_000_000, description="How many members there may be at once, per address family.")


class Group(_Model):
    """A named set of addresses, both families mixed."""

    members: list[Member] = Field(default_factory=list, description="Addresses and list files.")
    dynamic: Dynamic | None = Field(default=None, description="Lets addresses be added and removed at run time.")


def _group_form(value: Any) -> str | None:
    return "<list>" if isinstance(value, list) else "<full>" if isinstance(value, dict | Group) else None


GroupForm = Annotated[
    Annotated[list[Member], Tag("<list>")] | Annotated[Group, Tag("<full>")],
    Discriminator(_group_form, custom_error_type="group", custom_error_message="a list of addresses, or a mapping with `members`"),
]


class Block(_Model):
    """Sources whose packets are dropped before anything is looked at."""

    from_: list[str] = Field(alias="from", min_length=1, description="Groups to block.")
    except_: list[str] | None = Field(
        default=None, alias="except", description="Groups that are never blocked; left out: every group that a service names."
    )


def _from_form(value: Any) -> str | None:
    return "<anywhere>" if isinstance(value, str) else "<groups>" if isinstance(value, list) else None


From = Annotated[
    Annotated[Literal["anywhere"], Tag("<anywhere>")] | Annotated[list[str], Tag("<groups>"), Field(min_length=1)],
    Discriminator(_from_form, custom_error_type="from", custom_error_message="`anywhere` or a list of groups"),
]
PortsForm = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[int, Tag("<number>")] | Annotated[list[str | int], Tag("<list>"), Field(min_length=1)],
    Discriminator(
        lambda v: {str: "<text>", int: "<number>", list: "<list>"}.get(type(v)),
        custom_error_type="ports",
        custom_error_message="a list as in `[tcp/9100, udp/4000-4999]`",
    ),
]


def _one_or_several(what: str) -> Discriminator:
    return Discriminator(
        lambda v: "<one>" if isinstance(v, str) else "<several>" if isinstance(v, list) else None,
        custom_error_type="sources",
        custom_error_message=f"{what}, or a list of them",
    )


Roles = Annotated[
    Annotated[Role, Tag("<one>")] | Annotated[list[Role], Tag("<several>"), Field(min_length=1)],
    _one_or_several("a role"),
]
Places = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[list[str], Tag("<several>"), Field(min_length=1)],
    _one_or_several("a role or a host"),
]


class HostEntry(_Model):
    """One host of the installation."""

    role: Roles = Field(description="What it is for, which says which services it offers; a list where it has several roles.")
    addresses: list[str] = Field(
        min_length=1, description="Its addresses, both families; the first IPv4 address is where an edge forwards to."
    )
    wan: str | None = Field(default=None, description="The edge only: its interface to the internet.")
    lan: str | None = Field(default=None, description="The edge only: its interface to the dialers.")
    rtp: str | None = Field(default=None, description="Dialers only: the media ports of this one, as in its rtp.conf: `10000-14999`.")


class RtpPlan(_Model):
    """How the media ports are dealt out: one chunk a dialer, in order."""

    first: int = Field(
        default=10000, ge=1024, le=65535, description="Where the first dialer's chunk begins; even, because RTCP has the odd ports."
    )
    chunk: int = Field(default=5000, ge=2, le=64512, description="Ports a dialer; a call takes two.")


class Edge(_Model):
    """The firewall in front of several dialers."""

    host: str = Field(description="The host that is the edge.")
    inbound_sip: str | None = Field(default=None, description="The one dialer that SIP from outside is forwarded to.")
    dialers: list[str] | None = Field(
        default=None, min_length=1, description="The dialers behind it, in the order of their chunks; left out: all."
    )
    rtp: RtpPlan | None = Field(default=None, description="The chunk plan; left out where every dialer has an `rtp` of its own.")
    forward: dict[Name, str] = Field(
        default_factory=dict, description="Other services and the one host that each is forwarded to: `{https: web1}`."
    )
    networks: list[str] = Field(
        default_factory=list, description="Networks behind the edge, besides the hosts, that go out under its address."
    )


Rate = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,5}/(s|m|h|second|minute|hour)( burst [0-9]{1,5})?$")]
Dscp = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[int, Tag("<number>"), Field(ge=0, le=63)],
    Discriminator(
        lambda v: {str: "<name>", int: "<number>"}.get(type(v)),
        custom_error_type="dscp",
        custom_error_message="a class as in `cs3` or `ef`, or a number",
    ),
]


class ServiceEntry(_Model):
    """Who may reach one service."""

    from_: From = Field(alias="from", description="`anywhere`, or the groups that may reach it.")
    ports: PortsForm | None = Field(
        default=None, description="Ports, for services of one's own and in place of the catalogue's: `[tcp/9100, udp/4000-4999]`."
    )
    rtp_conf: Annotated[str, StringConstraints(min_length=1)] | None = Field(
        default=None, description="rtp only: take the ports from this `rtp.conf` of Asterisk, a path relative to the policy file."
    )
    on: Places | None = Field(
        default=None, description="Roles or hosts that offer it, in place of the catalogue's; a service of one's own is on every host."
    )
    redirect: Literal["web-server", "closed", "responder"] | None = Field(
        default=None,
        description="http only: the web server redirects to HTTPS (default), `fwc responder` does, or port 80 stays closed.",
    )
    plain: list[str] | None = Field(
        default=None, min_length=1, description="With `redirect: responder`: groups that go on reaching the web server in plain HTTP."
    )
    responder_port: int | None = Field(default=None, ge=1, le=65535, description="With `redirect: responder`: its port, by default 8880.")
    expose: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] | None = Field(
        default=None, description="The reason why a service that is not public is open to anywhere; shown in every check."
    )
    limit: dict[str, Rate] | None = Field(
        default=None,
        min_length=1,
        description="What each source of a group may send, as in `{agents: 50/s burst 200}`; `anywhere`: whom no service names.",
    )
    conntrack: Literal["track", "bypass"] = Field(
        default="track",
        description="rtp only: `bypass` keeps the media out of connection tracking, both ways; what is only forwarded to these ports "
        "too, so not beside containers that send to them.",
    )
    dscp: Dscp | None = Field(default=None, description="Mark for what this host sends from the service's ports: `ef`, `cs3`, `46`.")


Sources = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[list[str], Tag("<several>"), Field(min_length=1)],
    _one_or_several("a group, an address, `anywhere`"),
]


class EgressEntry(_Model):
    """Where this host may send one service's packets, with more to say about it."""

    to: Sources = Field(description="`anywhere`, a group, or a list of groups.")
    ports: PortsForm | None = Field(default=None, description="The other side's ports, in place of the service's: `[tcp/8443]`.")
    on: Places | None = Field(default=None, description="Roles or hosts that it is for; left out: every host.")


def _egress_form(value: Any) -> str | None:
    return "<one>" if isinstance(value, str) else "<several>" if isinstance(value, list) else "<full>" if isinstance(value, dict) else None


EgressForm = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[list[str], Tag("<several>"), Field(min_length=1)] | Annotated[EgressEntry, Tag("<full>")],
    Discriminator(
        _egress_form, custom_error_type="egress", custom_error_message="`anywhere`, a group, a list of groups, or a mapping with `to`"
    ),
]


class PolicyTest(_Model):
    """An expectation that every check, diff and apply verifies: about packets that come `from` somebody, or that `egress` is about."""

    from_: Sources | None = Field(default=None, alias="from", description="A group, an address, a prefix, a range or `anywhere`.")
    egress: Sources | None = Field(
        default=None, description="In place of `from`: where this host sends the packets, in the same forms; refused ones are rejected."
    )
    from_port: int | None = Field(
        default=None, ge=1, le=65535, description="With `egress`: the port that this host sends from; left out: one of no service."
    )
    to: str = Field(description="`udp/5060`, `tcp/10000-20000`, `vrrp`, `icmp` …")
    expect: Literal["accept", "drop", "reject"] = Field(
        description="The verdict for all of these packets; what is refused is dropped, and with `egress` rejected."
    )
    state: Literal["new", "established", "related", "invalid"] = Field(
        default="new", description="Connection tracking state of the packets."
    )
    host: str | None = Field(
        default=None, description="The host it is about; left out: every host, and for `accept` those that have a service at the port."
    )


class Policy(_Model):
    """A whole policy, after its includes were merged in."""

    version: Literal[1] = Field(description="Version of the policy language.")
    name: str = Field(default="", max_length=200, description="What this policy is for; shown in listings.")
    include: list[Annotated[str, StringConstraints(min_length=1)]] = Field(
        default_factory=list, description="Other policy files to merge in; this file wins over them."
    )
    groups: dict[Name, GroupForm] = Field(default_factory=dict, description="Named sets of addresses.")
    hosts: dict[HostName, HostEntry] = Field(
        default_factory=dict, description="The hosts of the installation; the policy is compiled for one of them at a time."
    )
    edge: Edge | None = Field(default=None, description="The firewall in front of several dialers.")
    block: Block | None = Field(default=None, description="Sources that are dropped first.")
    trust: list[str] = Field(default_factory=list, description="Groups whose every packet is accepted.")
    services: dict[Name, ServiceEntry] = Field(default_factory=dict, description="What this host offers, and to whom.")
    egress: list[Annotated[dict[str, EgressForm], Field(min_length=1, max_length=1)]] | None = Field(
        default=None,
        min_length=1,
        description="What this host may send, as in `- sip: carriers`: everything else is rejected. Left out: everything.",
    )
    tests: list[PolicyTest] = Field(default_factory=list, description="Expectations, verified by every check, diff and apply.")


def validate(document: Document, report: Report) -> Policy | None:
    """The model of a merged document; None after errors were reported, every one at its place."""
    if not isinstance(document.data, dict):
        what = "empty" if document.data is None else "not a mapping"
        report.error("type", f"the policy is {what}", document.locate(()), "start with `version: 1`")
        return None
    try:
        return Policy.model_validate(document.data)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            _report_item(document, report, dict(item))
        return None


def _report_item(document: Document, report: Report, item: dict[str, Any]) -> None:
    path: KeyPath = tuple(item["loc"])
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _report_unknown_key(document, report, path)
    at = document.locate(path)
    if kind == "missing":
        return report.error("required", f"`{path[-1]}` is missing", at, _missing_hint(path))
    if kind == "string_pattern_mismatch" and "Duration" not in context and path[-1] == "[key]":
        at = document.locate(path[:-1], key=True)
        hint = "up to 63 letters, digits, `-` and `.`" if path[0] == "hosts" else "a letter, then up to 19 letters, digits, `-` or `_`"
        return report.error("name", f"`{path[-2]}` cannot be a name", at, hint)
    if path == ("edge", "inbound_sip") and isinstance(item["input"], list):
        hint = "a packet to 5060 names no dialer: one of them takes all inbound calls"
        return report.error("sip-owner", "5060 has exactly one owner, and this is a list", at, hint)
    if kind == "string_pattern_mismatch" and "limit" in path:
        return report.error("value", f"`{item['input']}` is not a rate", at, "write 50/s, 10/m burst 20 or 100/h")
    if kind == "string_pattern_mismatch":
        return report.error("value", f"`{item['input']}` is not a duration", at, "write 90s, 30m, 12h or 7d")
    if kind in ("literal_error", "greater_than_equal", "less_than_equal", "too_short", "too_long", "string_too_short", "string_too_long"):
        return report.error("value", _value_message(item), at, _value_hint(item, path))
    if kind in ("member", "group", "from", "ports", "sources", "dscp", "egress"):
        return report.error("type", f"expected {item['msg']}, found {_kind_of(item['input'])}", at)
    expected = _EXPECTED.get(kind, item["msg"][:1].lower() + item["msg"][1:])
    report.error("type", f"`{_readable(path)}` must be {expected}, found {_kind_of(item['input'])}", at, _type_hint(item, path))
    return None


_EXPECTED = {
    "string_type": "text",
    "int_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _report_unknown_key(document: Document, report: Report, path: KeyPath) -> None:
    name = str(path[-1])
    at = document.locate(path, key=True)
    known = _keys_at(path[:-1])
    if name == "<<":
        report.error("unknown-key", "YAML merge keys are not part of the policy language", at, "use `include`")
    else:
        report.error(
            "unknown-key",
            f"there is no key `{name}` here",
            at,
            _belongs(name, path) or did_you_mean(name, known) or (f"known: {', '.join(known)}" if known else ""),
        )


def _belongs(name: str, path: KeyPath) -> str:
    options = {"limit": "limit", "limits": "limit", "conntrack": "conntrack", "notrack": "conntrack: bypass", "dscp": "dscp"}
    return f"`{options[name]}` is said at a service" if len(path) == 1 and name in options else ""


def _keys_at(path: KeyPath) -> list[str]:
    """Names of the keys that the language has at a place of the document."""
    models: dict[str, type[BaseModel]] = {
        "services": ServiceEntry,
        "groups": Group,
        "tests": PolicyTest,
        "egress": EgressEntry,
        "block": Block,
        "hosts": HostEntry,
        "edge": RtpPlan if path[-1:] == ("rtp",) else Edge,
    }
    model: type[BaseModel] = models.get(str(path[0]), Policy) if path else Policy
    if path and path[0] == "groups":
        model = (
            AddressEntry if path[-1] == "<address>" else ListFile if path[-1] == "<file>" else Dynamic if path[-1] == "dynamic" else Group
        )
    return [field.alias or name for name, field in model.model_fields.items()]


def _missing_hint(path: KeyPath) -> str:
    hints = {"version": "`version: 1` says which policy language this is", "from": "say `from: anywhere` or name the groups"}
    if path[0] == "block":
        return "name the groups to block"
    return hints.get(str(path[-1]), "")


def _value_message(item: dict[str, Any]) -> str:
    value, context = item["input"], item.get("ctx", {})
    match item["type"]:
        case "literal_error":
            return f"`{value}` is not one of {context['expected']}".replace("'", "`")
        case "greater_than_equal":
            return f"{value} is below {context['ge']}"
        case "less_than_equal":
            return f"{value} is above {context['le']}"
        case "string_too_long":
            return f"text is longer than {context['max_length']} characters"
        case "too_long":
            return "an entry is about one service, and this one names several"
        case _:
            return "this may not be empty"


def _value_hint(item: dict[str, Any], path: KeyPath) -> str:
    if path and path[-1] == "version":
        return "this version of fwc reads `version: 1`"
    if path == ("egress",):
        return "an empty list would cut this host off: name what it needs, as in `- dns: resolvers`, or leave `egress` out"
    if item["type"] == "too_long":
        return "begin each with a dash of its own"
    if "from" in path and isinstance(item["input"], str):
        return did_you_mean(item["input"], ["anywhere"]) or f"a group is named in a list: [{item['input']}]"
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        return did_you_mean(item["input"], re.findall(r"'([^']+)'", item["ctx"]["expected"]))
    return ""


_FORMS = {"timeout": "write 90s, 30m, 12h or 7d", "rtp": "write 10000-14999", "to": "write udp/5060, tcp/10000-20000, vrrp or icmp"}


def _type_hint(item: dict[str, Any], path: KeyPath) -> str:
    if path == ("egress",):
        return "write a list of services with where they may be asked: `- dns: resolvers`"
    if item["type"] == "list_type" and item["input"] == "anywhere":
        return "name groups here; what is open to anywhere is said at a service"
    if item["type"] == "list_type" and isinstance(item["input"], str):
        return f"write a list: [{item['input']}]"
    if path == ("edge", "rtp"):
        return "write {first: 10000, chunk: 5000}"
    if path and path[-1] in _FORMS:
        return _FORMS[str(path[-1])]
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        return "put it in quotes if it is meant as text"
    return ""


def _kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    kind = names.get(type(value), type(value).__name__)
    return f"`{value}`" if isinstance(value, str | int | float) and len(str(value)) < 40 else kind


def _readable(path: KeyPath) -> str:
    parts: list[Key] = [p for p in path if not str(p).startswith(("<", "["))]
    return ".".join(str(p) for p in parts) or "policy"


def known_services() -> list[str]:
    """Names in the catalogue, for hints."""
    return list(CATALOGUE)
