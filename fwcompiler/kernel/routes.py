"""Asks the kernel's routing: which addresses are the host's own, and through which interface it sends to an address.

Netlink as in ``include/uapi/linux/rtnetlink.h``; answers are about the network namespace that the calling thread is in.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from fwcompiler.addresses import BITS, LAST, Ranges, merged

NETLINK_ROUTE = 0
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTN_LOCAL = 2
RT_TABLE_LOCAL = 255
RTA_DST, RTA_OIF = 1, 4
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_SECONDS = struct.pack("@ll", 5, 0)


def own_addresses(version: int) -> Ranges:
    """Addresses of one family at which this host receives packets; empty where the kernel does not tell."""
    body = _ROUTE.pack(_FAMILIES[version], 0, 0, 0, RT_TABLE_LOCAL, 0, 0, 0, 0)
    try:
        return merged(_locals(version, list(_asked(body, NLM_F_DUMP))))
    except OSError:
        return ()


def _locals(version: int, answers: list[bytes]) -> Iterator[tuple[int, int]]:
    for answer in answers:
        family, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(answer)
        attributes = _attributes(answer)
        if family == _FAMILIES[version] and kind == RTN_LOCAL and table == RT_TABLE_LOCAL and RTA_DST in attributes:
            low = int.from_bytes(attributes[RTA_DST])
            yield low, low | LAST[version] >> length


def out_interface(version: int, address: int) -> str:
    """The name of the interface through which the host sends to an address; empty where it has no way there."""
    target = address.to_bytes(BITS[version] // 8)
    body = _ROUTE.pack(_FAMILIES[version], BITS[version], 0, 0, 0, 0, 0, 0, 0) + _ATTRIBUTE.pack(4 + len(target), RTA_DST) + target
    try:
        for answer in _asked(body, 0):
            index = _attributes(answer).get(RTA_OIF)
            if index:
                return socket.if_indextoname(int.from_bytes(index, "little" if struct.pack("=H", 1)[0] else "big"))
    except OSError:
        pass
    return ""


def _asked(body: bytes, flags: int) -> Iterator[bytes]:
    """Bodies of the answers to one request.

    Raises:
        OSError: the kernel refuses it.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SECONDS)
        channel.send(_HEADER.pack(_HEADER.size + len(body), RTM_GETROUTE, NLM_F_REQUEST | flags, 1, 0) + body)
        while True:
            data, place = channel.recv(1 << 17), 0
            while place + _HEADER.size <= len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, place)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    number = -struct.unpack_from("=i", data, place + _HEADER.size)[0]
                    raise OSError(number, os.strerror(number))
                if kind == RTM_NEWROUTE:
                    yield data[place + _HEADER.size : place + length]
                place += (length + 3) & ~3
            if not flags & NLM_F_DUMP:
                return


def _attributes(route: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    place = _ROUTE.size
    while place + _ATTRIBUTE.size <= len(route):
        length, kind = _ATTRIBUTE.unpack_from(route, place)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = route[place + _ATTRIBUTE.size : place + length]
        place += (length + 3) & ~3
    return found
