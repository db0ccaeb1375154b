"""Connection tracking: deletes the entries of connections that would not be let in any more.

The table is dumped and matched here, and each entry is deleted by its own tuple. Letting the kernel match would be shorter,
but its filter inverts matches on IPv6 addresses (6.18: a filtered delete of one source removed everybody else's flows). A
filter on one IPv4 source or on a port is right, and is used to make the dump short; what it returns is matched all the same.

Works in the network namespace of the calling thread. Numbers: ``include/uapi/linux/netfilter/nfnetlink_conntrack.h``;
behaviour: ``net/netfilter/nf_conntrack_netlink.c``.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fwcompiler.addresses import BITS, Addresses, Range, Ranges, covers
from fwcompiler.kernel import netlink
from fwcompiler.kernel.netlink import HEADER, Channel

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET, _DELETE = 1, 2  # enum cntl_msg_types
_TUPLE_ORIG, _ID, _ZONE, _FILTER = 1, 12, 18, 25  # enum ctattr_type
_TUPLE_IP, _TUPLE_PROTO = 1, 2  # enum ctattr_tuple
_V4_SRC, _V6_SRC = 1, 3  # enum ctattr_ip
_PROTO_NUM, _SRC_PORT, _DST_PORT = 1, 2, 3  # enum ctattr_l4proto
_FILTER_ORIG = 1  # CTA_FILTER_ORIG_FLAGS
_BY_SOURCE, _BY_PORT = 1 << 0, 1 << 3 | 1 << 5  # CTA_FILTER_F_CTA_IP_SRC, and .._PROTO_NUM with .._PROTO_DST_PORT (nf_internals.h)
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_FEW = 4
"""Ports up to which the table is asked for each by itself; the kernel walks all of it each time."""
_TOGETHER = 200
"""Deletions sent at once; each is acknowledged, and their answers fit any receive buffer."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Connections to end: those that `sources` opened to one range of ports of one protocol (by IANA number).

    `to`: those only that were opened to these addresses, by family; None: to whatever address.
    """

    protocol: int
    ports: Range
    sources: Addresses
    to: Mapping[int, Ranges] | None = None


_Flow = tuple[int, int, int, bytes]
"""Protocol, who opened the connection, to which port, and what the kernel dumped of it. Plain tuples: there may be 262,144."""


def delete(cuts: Sequence[Cut]) -> int:
    """Delete the entries of all connections that a cut names, both families; returns how many there were.

    Raises:
        NetlinkError: the kernel refuses; some may be gone.
    """
    deleted = 0
    with Channel() as channel:
        for version in (4, 6):
            own = [c for c in cuts if c.sources.family(version)]
            if own:
                deleted += _delete(channel, version, _matching(_flows(channel, version, own), version, own))
    return deleted


@dataclass(frozen=True, slots=True)
class Begun:
    """A connection that this host opened: its first packet. Ports are 0 where the protocol has none."""

    version: int
    protocol: int
    source: int
    source_port: int
    destination: int
    port: int


def delete_begun(own: Mapping[int, Ranges], is_lost: Callable[[Begun], bool]) -> int:
    """Delete the entries of connections that this host opened to others and that are lost; returns how many there were.

    ``own``: the host's addresses by family.

    Raises:
        NetlinkError: the kernel refuses; some may be gone.
    """
    deleted = 0
    with Channel() as channel:
        for version, mine in own.items():
            found: list[bytes] = []
            for data in channel.dump(_SUBSYSTEM | _GET, _FAMILY[version]) if mine else ():
                begun = _begun(version, data)
                ours = begun is not None and covers(mine, begun.source) and not covers(mine, begun.destination)
                if begun is not None and ours and is_lost(begun):
                    found.append(data)
            deleted += _delete(channel, version, found)
    return deleted


def _begun(version: int, data: bytes) -> Begun | None:
    values = _original(data)
    source, destination = (values.get((_TUPLE_IP, kind)) for kind in ((_V4_SRC, _V4_SRC + 1) if version == 4 else (_V6_SRC, _V6_SRC + 1)))
    protocol = values.get((_TUPLE_PROTO, _PROTO_NUM))
    if source is None or destination is None or protocol is None:
        return None
    ports = (values.get((_TUPLE_PROTO, kind), 0) for kind in (_SRC_PORT, _DST_PORT))
    return Begun(version, protocol, source, next(ports), destination, next(ports))


def _matching(flows: Iterable[_Flow], version: int, cuts: Sequence[Cut]) -> Iterator[bytes]:
    by_protocol: dict[int, list[tuple[int, int, Ranges, Ranges | None]]] = {}
    for cut in cuts:
        to = None if cut.to is None else cut.to.get(version, ())
        by_protocol.setdefault(cut.protocol, []).append((*cut.ports, cut.sources.family(version), to))
    for protocol, source, port, entry in flows:
        for low, high, sources, to in by_protocol.get(protocol, ()):
            if low <= port <= high and covers(sources, source) and (to is None or _is_to(to, version, entry)):
                yield entry
                break


def _is_to(addresses: Ranges, version: int, entry: bytes) -> bool:
    begun = _begun(version, entry)
    return begun is not None and covers(addresses, begun.destination)


def _flows(channel: Channel, version: int, cuts: Sequence[Cut]) -> Iterator[_Flow]:
    for narrowed in _narrowed(version, cuts):
        for data in channel.dump(_SUBSYSTEM | _GET, _FAMILY[version], *narrowed):
            flow = _parse(version, data)
            if flow is not None:
                yield flow


def _narrowed(version: int, cuts: Sequence[Cut]) -> list[tuple[bytes, ...]]:
    """What has the kernel list one source only, or a few ports one by one. Kernels before 5.8 do not know it, and list all."""
    spans = {span for cut in cuts for span in cut.sources.family(version)}
    first, last = next(iter(spans))
    if version == 4 and len(spans) == 1 and first == last:
        address = netlink.nested(_TUPLE_IP, netlink.attribute(_V4_SRC, first.to_bytes(4, "big")))
        return [_filter(address, _BY_SOURCE)]
    ports = {(cut.protocol, cut.ports) for cut in cuts}
    if len(ports) > _FEW or any(low != high for _, (low, high) in ports):
        return [()]
    return [_filter(_to_port(protocol, port), _BY_PORT) for protocol, (port, _) in sorted(ports)]


def _to_port(protocol: int, port: int) -> bytes:
    number = netlink.attribute(_PROTO_NUM, bytes((protocol,)))
    return netlink.nested(_TUPLE_PROTO, number, netlink.attribute(_DST_PORT, struct.pack(">H", port)))


def _filter(part: bytes, flags: int) -> tuple[bytes, ...]:
    return netlink.nested(_TUPLE_ORIG, part), netlink.nested(_FILTER, netlink.attribute(_FILTER_ORIG, struct.pack("=I", flags)))


def _shape(version: int) -> tuple[tuple[slice, bytes], ...]:
    """Where in a dumped entry the headers of a tuple with ports stand, and what they are: the values lie between them."""
    octets = BITS[version] // 8
    address, number, port = 4 + octets, 8, 8  # a header and a value, padded
    ip, proto = 4 + 2 * address, 4 + number + 2 * port
    source = _V4_SRC if version == 4 else _V6_SRC
    nest = netlink.NLA_F_NESTED
    heads = (
        (0, ((4 + ip + proto, nest | _TUPLE_ORIG), (ip, nest | _TUPLE_IP), (address, source))),
        (8 + address, ((address, source + 1),)),
        (4 + ip, ((proto, nest | _TUPLE_PROTO), (5, _PROTO_NUM))),
        (4 + ip + 4 + number, ((6, _SRC_PORT),)),
        (4 + ip + 4 + number + port, ((6, _DST_PORT),)),
    )
    packed = ((HEADER + at, b"".join(struct.pack("=HH", *head) for head in each)) for at, each in heads)
    return tuple((slice(at, at + len(head)), head) for at, head in packed)


_SHAPES = {4: _shape(4), 6: _shape(6)}


def _parse(version: int, data: bytes) -> _Flow | None:
    """A dumped entry; None for one without ports. The common shape is read in place: a table may hold 262,144 of them."""
    shape = _SHAPES[version]
    for place, head in shape:
        if data[place] != head:
            return _walk(data)
    source = shape[0][0].stop
    number, port = shape[2][0].stop, shape[4][0].stop
    octets = BITS[version] // 8
    address = int.from_bytes(data[source : source + octets], "big")
    return data[number], address, int.from_bytes(data[port : port + 2], "big"), data


def _walk(data: bytes) -> _Flow | None:
    """An entry of any shape, attribute by attribute."""
    values = _original(data)
    source = values.get((_TUPLE_IP, _V4_SRC), values.get((_TUPLE_IP, _V6_SRC)))
    protocol, port = values.get((_TUPLE_PROTO, _PROTO_NUM)), values.get((_TUPLE_PROTO, _DST_PORT))
    if source is None or protocol is None or port is None:
        return None
    return protocol, source, port, data


def _original(data: bytes) -> dict[tuple[int, int], int]:
    """The values of an entry's original direction, by the attributes that hold them."""
    found: dict[tuple[int, int], int] = {}
    for kind, start, end in netlink.attributes(data, HEADER):
        for part, low, high in netlink.attributes(data, start, end) if kind == _TUPLE_ORIG else ():
            for which, first, last in netlink.attributes(data, low, high):
                found[part, which] = int.from_bytes(data[first:last], "big")
    return found


def _names(data: bytes) -> bytes:
    """The attributes of a dumped entry that name it: its tuple, its zone, and its id, so that a successor is spared."""
    return b"".join(
        netlink.attribute(kind | (netlink.NLA_F_NESTED if kind == _TUPLE_ORIG else 0), data[start:end])
        for kind, start, end in netlink.attributes(data, HEADER)
        if kind in (_TUPLE_ORIG, _ZONE, _ID)
    )


def _delete(channel: Channel, version: int, entries: Iterable[bytes]) -> int:
    """Delete entries one by one, many in one send; those that ended by themselves meanwhile do not count."""
    waiting = [_names(entry) for entry in entries]
    deleted = 0
    for start in range(0, len(waiting), _TOGETHER):
        for error in channel.ask_each(_SUBSYSTEM | _DELETE, _FAMILY[version], waiting[start : start + _TOGETHER]):
            if error is None:
                deleted += 1
            elif error.errno != errno.ENOENT:
                raise error
    return deleted
