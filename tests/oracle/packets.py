"""Packets that stand where rules part: at and beside the borders of every address set and port range of a policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from oracle.machine import INTERFACES, LOOPBACK
from oracle.wire import ICMP, ICMPV6, TCP, UDP, Probe, Way
from property.strategies import HOME

from fwcompiler.addresses import LAST, Addresses, address_text
from fwcompiler.addresses import LOOPBACK as LOOPBACK_ADDRESSES
from fwcompiler.backend import SetKind
from fwcompiler.proof.fields import ECHO_REQUEST
from fwcompiler.resolved import Resolved
from fwcompiler.ruleset import Ruleset

HOST = {4: 0xC6120001, 6: (0x20010002 << 96) + 1}
SEVERAL = {4: (0xE0000001, 0xFFFFFFFF), 6: ((0xFF02 << 112) + 1,)}
"""Addresses of more than this host: multicast, broadcast (RFC 1112, RFC 919, RFC 4291)."""
PROTOCOLS = {4: (ICMP, ICMPV6, 47, 50, 112, 132, 253), 6: (ICMP, ICMPV6, 47, 112, 132, 253)}
"""Besides TCP and UDP. Protocol numbers that are extension headers of IPv6 mean something else there."""
TYPES = (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 17, *range(127, 138), 143, 144, 160)
WAYS: tuple[Way, ...] = ("alone", "alone", "alone", "original", "reply", "related", "broken")
ECHOES = 30
"""So many pings stay below the burst of every limit, whichever way a policy sends them."""

Members = Mapping[tuple[str, int], tuple[int, ...]]
"""Dynamic members by group and family."""


def members(policy: Resolved, random: Random) -> Members:
    """Some addresses for every dynamic group, near those that the groups have anyway."""
    found: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, group in policy.groups.items():
        for version in (4, 6) if group.dynamic else ():
            found[name, version] = tuple(sorted({HOME[version] + random.randrange(64) for _ in range(random.randrange(4))}))
    return found


def joined(first: Members, second: Members) -> Members:
    """The members of both."""
    return {key: tuple(sorted({*first.get(key, ()), *second.get(key, ())})) for key in {**first, **second}}


def with_members(policy: Resolved, at_present: Members) -> Resolved:
    """The policy that says at present what its dynamic groups hold: a member counts as if the policy listed it."""
    groups = dict(policy.groups)
    for (name, version), addresses in at_present.items():
        spans = [(a, a) for a in addresses]
        more = Addresses.of(spans if version == 4 else [], spans if version == 6 else [])
        groups[name] = replace(groups[name], addresses=groups[name].addresses | more)
    return replace(policy, groups=groups)


def member_commands(kind: SetKind, verb: Literal["add", "delete"], held: Ruleset, at_present: Members) -> Iterator[tuple[str, ...]]:
    """What an admin would type to put members into the dynamic sets that a kernel holds, and to take them out."""
    names = {each.name: each.kernel_name for each in held.sets}
    for (group, version), addresses in at_present.items():
        kernel = names.get(f"{group}.dynamic.v{version}")
        for address in addresses if kernel else ():
            text = address_text(version, address)
            nft = ("nft", verb, "element", "inet", "fwc", str(kernel), f"{{ {text} }}")
            yield nft if kind == "nft" else ("ipset", verb[:3], str(kernel), text)


@dataclass(frozen=True)
class Borders:
    """Values at and beside the borders of a policy."""

    addresses: Mapping[int, tuple[int, ...]]
    ports: tuple[int, ...]

    @staticmethod
    def of(policy: Resolved) -> Borders:
        """All borders of a policy whose groups hold their members."""
        addresses = {version: tuple(sorted(_addresses(policy, version))) for version in (4, 6)}
        return Borders(addresses, tuple(sorted(set(_ports(policy)))))


def _addresses(policy: Resolved, version: int) -> set[int]:
    spans = [span for group in policy.groups.values() for span in group.addresses.family(version)]
    near = {border for low, high in (*spans, LOOPBACK_ADDRESSES[version]) for border in (low - 1, low, high, high + 1)}
    return {a for a in near | {HOST[version]} if 0 <= a <= LAST[version]}


def _ports(policy: Resolved) -> Iterator[int]:
    for low, high in (span for service in policy.services for ports in service.ports for span in ports.ranges):
        yield from (port for port in (low - 1, low, (low + high) // 2, high, high + 1) if 0 < port <= 65535)
    yield 22


def packets(policy: Resolved, random: Random, count: int) -> list[Probe]:
    """Packets for a policy whose groups hold their members. All randomness is from `random`."""
    borders = Borders.of(policy)
    found: list[Probe] = []
    echoes = 0
    while len(found) < count:
        probe = _packet(borders, random, 1024 + len(found))
        echoes += probe.icmp_type in ECHO_REQUEST.values() and not probe.has_ports
        if echoes <= ECHOES or probe.icmp_type not in ECHO_REQUEST.values():
            found.append(probe)
    return found


def _packet(borders: Borders, random: Random, own_port: int) -> Probe:
    version = random.choice((4, 6))
    protocol = random.choice((TCP, TCP, UDP, UDP, ICMP if version == 4 else ICMPV6, random.choice(PROTOCOLS[version])))
    ports = protocol in (TCP, UDP)
    destination = HOST[version] if random.random() < 0.7 else random.choice((_address(borders, random, version), *SEVERAL[version]))
    return Probe(
        version,
        _address(borders, random, version),
        destination,
        protocol,
        port=_port(borders, random) if ports else 0,
        source_port=_port(borders, random) if ports and random.random() < 0.3 else own_port,
        icmp_type=random.choice(TYPES) if protocol in (ICMP, ICMPV6) else 0,
        interface=random.choice((*INTERFACES * 5, LOOPBACK)),
        way=random.choice(WAYS),
    )


def _address(borders: Borders, random: Random, version: int) -> int:
    if random.random() < 0.8:
        return random.choice(borders.addresses[version])
    return HOME[version] + random.randrange(70) if random.random() < 0.7 else random.randrange(LAST[version] + 1)


def _port(borders: Borders, random: Random) -> int:
    return random.choice(borders.ports) if random.random() < 0.9 else random.randrange(1, 65536)
