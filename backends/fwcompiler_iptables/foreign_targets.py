"""iptables' targets -> neutral verdicts (iptables-extensions(8)).

Targets that only do something on the side go on; NAT becomes `Translate`; those that hand the packet to a program or
answer it by themselves are `Undecided`. A target nobody here knows is `Unknown`, and may do anything.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from ipaddress import ip_address, ip_network

from fwcompiler.addresses import Range, Ranges, merged
from fwcompiler.ruleset import Final, Goto, Jump, Match, Side, Translate, Undecided, Unknown, Untrack, Verdict
from fwcompiler_iptables.foreign_options import Group, Spec
from fwcompiler_iptables.foreign_values import span_of

FINALS = {"ACCEPT": Final.ACCEPT, "DROP": Final.DROP, "RETURN": Final.RETURN, "REJECT": Final.REJECT, "STEAL": Final.DROP}
GO_ON = frozenset(
    (
        *("LOG", "NFLOG", "ULOG", "MARK", "CONNMARK", "TCPMSS", "DSCP", "CHECKSUM", "CLASSIFY", "TRACE", "AUDIT", "TEE", "TOS", "TTL"),
        *("HL", "ECN", "SECMARK", "CONNSECMARK", "IDLETIMER", "LED", "RATEEST", "SET", "HMARK", "IPMARK", "TCPOPTSTRIP", "IPV4OPTSSTRIP"),
        *("ACCOUNT", "NETFLOW", "IMQ", "LOGMARK", "NFACCT"),
    )
)
UNDECIDED = frozenset(
    (*("QUEUE", "NFQUEUE", "SYNPROXY", "TPROXY", "TARPIT", "DELUDE", "CHAOS", "MIRROR", "ROUTE", "CLUSTERIP", "ECHO", "DNETMAP"),)
)
_SIDES: Mapping[str, Side] = {
    **{"DNAT": "destination", "REDIRECT": "destination", "DNPT": "destination", "SAME": "source"},
    **{"SNAT": "source", "MASQUERADE": "source", "SNPT": "source"},
}


def read_target(spec: Spec, version: int, table: str, chains: Container[str]) -> tuple[Verdict, list[Match]]:
    """What a rule does, and an `Unknown` where nobody knows. Calls name chains of the same table, of which `chains` are known."""
    target = spec.target
    if target is None:
        return None, []
    name = target.name
    if spec.goto:
        return Goto(f"{table}/{name}"), []
    if f"{table}/{name}" in chains and not target.options:
        return Jump(f"{table}/{name}"), []
    if name in FINALS:
        return FINALS[name], []
    if name == "NOTRACK" or (name == "CT" and any(option == "--notrack" for _, option, _ in target.options)):
        return Untrack(), []
    if name in GO_ON or name == "CT":
        return None, []
    if name in _SIDES or name == "NETMAP":
        return _translate(target, version), []
    if name in UNDECIDED:
        return Undecided(target.text()), []
    if target.options:
        return None, [Unknown(f"-j {target.text()}")]
    return Jump(f"{table}/{name}"), []


def _translate(target: Group, version: int) -> Translate:
    """The new address and port. With ranges it is one of them; what cannot be read is any address and port."""
    options = {option: values for _, option, values in target.options}
    side = _SIDES.get(target.name, "destination")
    here = target.name == "REDIRECT"
    addresses: list[Range] = []
    ports: list[Range] = []
    try:
        for _, option, values in target.options:
            if option in ("--to-destination", "--to-source", "--to") and values:
                found, port = _address(values[0], version, network=target.name == "NETMAP")
                addresses += found
                ports += [port] if port else []
            elif option == "--to-ports" and values:
                ports.append(_ports(values[0]))
    except ValueError:
        addresses, ports = [(0, (1 << (32 if version == 4 else 128)) - 1)], [(0, 65535)]
    if "--random" in options or "--random-fully" in options:
        ports = ports or ([(0, 65535)] if side == "source" else [])
    span = (min(low for low, _ in ports), max(high for _, high in ports)) if ports else None
    return Translate(side, target.text(), version, merged(addresses), here, span)


def _address(text: str, version: int, *, network: bool) -> tuple[Ranges, Range | None]:
    """``A``, ``A-B``, ``A:PORT``, ``:PORT``, ``[A6]:PORT``; for NETMAP a network."""
    if network:
        found = ip_network(text, strict=False)
        return ((int(found[0]), int(found[-1])),), None
    if version == 6 and not text.startswith("["):
        return (span_of(text, 6),), None
    match = re.fullmatch(r"\[?([0-9A-Fa-f.:]*?)\]?(?:-\[?([0-9A-Fa-f.:]+?)\]?)?(?::([0-9-]+)(?:/\d+)?)?", text)
    if version == 4:
        match = re.fullmatch(r"([0-9.]*)(?:-([0-9.]+))?(?::([0-9-]+)(?:/\d+)?)?", text)
    if not match:
        raise ValueError(text)
    low, high, port = match.groups()
    ranges: Ranges = ((int(ip_address(low)), int(ip_address(high or low))),) if low else ()
    return ranges, _ports(port) if port else None


def _ports(text: str) -> Range:
    low, _, high = text.partition("-")
    return int(low), int(high or low)
