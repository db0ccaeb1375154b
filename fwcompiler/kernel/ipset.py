"""Content of ipsets over raw netlink, in the network namespace of the calling thread.

`ipset restore` takes 0.7 s for 100,000 networks, most of it in parsing and in one message a network. The kernel
takes as many elements in one message as fit into an attribute (``IPSET_ATTR_ADT``, include/uapi/linux/netfilter/ipset/ip_set.h,
net/netfilter/ipset/ip_set_core.c: ``ip_set_ad``), which brings the same work down to a twentieth.

Sets are created, swapped and destroyed by the `ipset` program; only elements pass through here.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from types import TracebackType

from fwcompiler.addresses import BITS, LAST, Range, Ranges, merged, prefix_count, prefixes, subtract
from fwcompiler.diagnostics import HostRefused

Element = tuple[int, int]
"""Network and prefix length, as the kernel stores it."""

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 6 << 8  # NFNL_SUBSYS_IPSET
_LIST, _ADD, _DEL, _TEST = 7, 9, 10, 11
_SO_SNDBUFFORCE = 32
_REQUEST, _ACK, _EXCL = 1, 4, 0x200
_ERROR, _DONE = 2, 3
_NESTED, _NETWORK_ORDER, _TYPE_MASK = 0x8000, 0x4000, 0x3FFF  # NLA_F_NESTED, NLA_F_NET_BYTEORDER
_PROTOCOL = 6
"""Every kernel since 2.6.39 takes protocol 6: newer ones speak 7 and accept 6 (ip_set_core.c, ``protocol_min_failed``)."""

_A_PROTOCOL, _A_SETNAME, _A_HEADER_FLAGS, _A_DATA, _A_ADT, _A_LINENO = 1, 2, 6, 7, 8, 9
_A_IP, _A_CIDR, _A_TIMEOUT, _A_FLAGS = 1, 3, 6, 8
_A_ENTRIES = 24  # IPSET_ATTR_ELEMENTS
_FLAG_NOMATCH = 1 << 2  # IPSET_FLAG_NOMATCH among the CADT flags
_FLAG_LIST_HEADER = 1 << 2  # IPSET_FLAG_LIST_HEADER among the command's: what `ipset list -t` asks for
_ADT_ROOM = 65535 - 4
"""The length of an attribute is a u16 and counts its own header."""

FEW = 256
"""Addresses that are looked up one by one instead of reading a set: 4 ms, where 100,000 entries take 40."""

_NOT_THERE = 4103  # IPSET_ERR_EXIST: for a test, the element is not in the set
_ERRORS = {
    4097: "it is of the other address family, or the kernel speaks another ipset protocol",
    4100: "it is busy",
    4103: "the element is there already, or is not there",
    4104: "the prefix length does not fit the set",
    4106: "it is of the other address family",
    4107: "it has no timeout",
    4109: "it takes no IPv4 addresses",
    4110: "it takes no IPv6 addresses",
    4352: "it is full",
    4353: "the element is null-valued and cannot be stored",
}


def change(name: str, version: int, add: Ranges = (), remove: Ranges = ()) -> None:
    """Take `remove` out of a ``hash:net`` set and put `add` in.

    Meant as address sets, however the kernel has cut them into prefixes: taking one address out of a stored /24
    leaves the other 255. New prefixes go in before old ones go out, so no address that stays is ever missing.

    Raises:
        HostRefused: no such set, wrong family, full; elements sent before may have taken effect.
    """
    with _Session(name, version) as session:
        if not remove:
            session.send(_ADD, elements(version, add))
            return
        if _is_small(remove) and session.exchange(elements(version, add), elements(version, remove), subtract(remove, add)):
            return
        stored, holes = session.stored()
        if not holes:
            stored = _near(version, stored, merged((*add, *remove)))
        wanted = elements(version, merged((*subtract(_content(version, stored, holes), remove), *add)))
        keep, have = set(wanted), set(stored)
        session.send(_ADD, [e for e in wanted if e not in have])
        session.send(_DEL, [e for e in (*stored, *holes) if e not in keep])


def read(name: str) -> Ranges:
    """All addresses of a set, merged.

    Raises:
        HostRefused: no such set, or the kernel will not list it.
    """
    with _Session(name) as session:
        stored, holes = session.stored()
        return _content(session.version, stored, holes)


def members(name: str) -> tuple[tuple[int, int | None], ...]:
    """Members of a dynamic ``hash:ip`` set, ascending, with the seconds they have left (None: for ever).

    Raises:
        HostRefused: no such set, or the kernel will not list it.
    """
    with _Session(name) as session:
        return tuple(sorted((address, left or None) for address, left in session.members()))


def add_members(name: str, version: int, entries: Sequence[tuple[int, int | None]]) -> None:
    """Put members with the seconds they have left (None: for ever) into a dynamic set; a present one is refreshed.

    Raises:
        HostRefused: no such set, wrong family, full.
    """
    with _Session(name, version) as session:
        session.send(_ADD, [(a, BITS[version]) for a, _ in entries], [left or 0 for _, left in entries])


def remove_member(name: str, version: int, address: int) -> None:
    """Take a member out of a dynamic set, or find it gone.

    Raises:
        HostRefused: no such set, wrong family.
    """
    with _Session(name, version) as session:
        session.send(_DEL, [(address, BITS[version])])


def lookup(name: str, version: int, address: int) -> bool:
    """True when the set holds the address.

    Raises:
        HostRefused: no such set, wrong family.
    """
    return lookups(name, version, (address,))[0]


def lookups(name: str, version: int, addresses: Iterable[int]) -> list[bool]:
    """:func:`lookup` for each of several addresses."""
    with _Session(name, version) as session:
        return [session.holds(address) for address in addresses]


def holds_as_many(name: str, version: int, ranges: Ranges) -> bool:
    """True when a set has as many entries as `ranges` are cut into: fewer would not do for these addresses.

    Raises:
        HostRefused: no such set.
    """
    with _Session(name, version) as session:
        whole = ranges == ((0, LAST[version]),)
        return session.entries() == (2 if whole else prefix_count(version, ranges))


def elements(version: int, ranges: Iterable[Range]) -> list[Element]:
    """The fewest prefixes for ranges. ``hash:net`` cannot hold /0 (ipset(8)): two /1 stand for it."""
    cut = list(prefixes(version, ranges))
    if cut and cut[0][1] == 0:
        return [(0, 1), (1 << (BITS[version] - 1), 1)]
    return cut


def _content(version: int, stored: Iterable[Element], holes: Sequence[Element]) -> Ranges:
    """What prefixes cover. `holes` are ``nomatch`` entries, which somebody else must have made: the longest prefix wins."""
    if not holes:
        behind = [(1 << (BITS[version] - length)) - 1 for length in range(BITS[version] + 1)]
        return merged([(network, network + behind[length]) for network, length in stored])
    content: Ranges = ()
    kinds = [(e[1], e, True) for e in stored] + [(e[1], e, False) for e in holes]
    for _, element, inside in sorted(kinds):
        spans = (_span(version, element),)
        content = merged(content + spans) if inside else subtract(content, spans)
    return content


def _is_small(ranges: Ranges) -> bool:
    """So few addresses that asking about each of them takes less time than reading a large set."""
    return sum(high - low + 1 for low, high in ranges) <= FEW


def _near(version: int, stored: Sequence[Element], changed: Ranges) -> list[Element]:
    """The prefixes that a change can concern: taking one address out of 100,000 networks looks at one of them."""
    low, high = changed[0][0], changed[-1][1]
    sizes = [1 << (BITS[version] - length) for length in range(BITS[version] + 1)]
    return [e for e in stored if e[0] <= high and e[0] + sizes[e[1]] > low]


def _span(version: int, element: Element) -> Range:
    network, length = element
    return network, network + (1 << (BITS[version] - length)) - 1


class _NotThere(HostRefused):
    """The kernel's answer about an element that a set does not hold."""


class _Session:
    """One netlink socket, talking about one set."""

    def __init__(self, name: str, version: int = 4) -> None:
        self.name = name
        self.version = version
        self.sequence = 0

    def __enter__(self) -> _Session:
        try:
            self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
            self.socket.bind((0, 0))
        except OSError as error:
            raise self._refused(error.errno or 0) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()

    def exchange(self, add: Sequence[Element], remove: Sequence[Element], gone: Ranges) -> bool:
        """Take out whole prefixes and put others in, without reading the set. False where that did not do: one was stored in
        another form, or an entry around or inside of them still holds an address that should be `gone`.
        """
        self.send(_ADD, add)
        try:
            self.send(_DEL, [e for e in remove if e not in add], flags=_EXCL)
        except _NotThere:
            return False
        return not any(self.holds(address) for low, high in gone for address in range(low, high + 1))

    def send(self, command: int, what: Sequence[Element], timeouts: Sequence[int] | None = None, *, flags: int = 0) -> None:
        """Add or delete elements, as many in a message as fit; each message is acknowledged before the next goes out.

        Without ``NLM_F_EXCL`` an element that is there already (or already gone) is no error, as with ``ipset -exist``.
        """
        size = _ADT_ROOM // _element_size(self.version, timeouts is not None)
        for start in range(0, len(what), size):
            part = timeouts[start : start + size] if timeouts is not None else None
            body = _encode(self.version, what[start : start + size], part)
            # ip_set_ad takes ADT only together with a line number, which it would give back in an error.
            self._request(command, _attribute(_A_LINENO, struct.pack("=I", 0)) + _attribute(_A_ADT | _NESTED, body), _ACK | flags)
            for _ in self._replies():
                pass

    def holds(self, address: int) -> bool:
        """Ask about one address. The kernel answers with an acknowledgement, or says that it "is not there"."""
        element = _encode(self.version, [(address, BITS[self.version])], None)[4:]
        self._request(_TEST, _attribute(_A_DATA | _NESTED, element), _ACK)
        try:
            for _ in self._replies():
                pass
        except _NotThere:
            return False
        return True

    def entries(self) -> int:
        """How many elements the set has, from its head."""
        self._request(_LIST, _attribute(_A_HEADER_FLAGS | _NETWORK_ORDER, struct.pack(">I", _FLAG_LIST_HEADER)), 0)
        heads = [body for message in self._replies() for kind, body in _attributes(message[4:]) if kind == _A_DATA]
        return sum(int.from_bytes(value, "big") for head in heads for kind, value in _attributes(head) if kind == _A_ENTRIES)

    def stored(self) -> tuple[list[Element], list[Element]]:
        """Prefixes as stored: those that match, and those entered as ``nomatch``."""
        matching: list[Element] = []
        holes: list[Element] = []
        for body in self._bodies():
            plain = _decode(body)
            if plain:
                self.version = plain[0]
                matching += plain[1]
                continue
            for network, length, _, nomatch in self._elements(body):
                (holes if nomatch else matching).append((network, length))
        return matching, holes

    def members(self) -> Iterator[tuple[int, int]]:
        """Every member and the seconds it has left; 0: for ever."""
        for body in self._bodies():
            yield from ((network, left) for network, _, left, _ in self._elements(body))

    def _bodies(self) -> Iterator[bytes]:
        """The element lists of a dump, some thousand elements each."""
        self._request(_LIST, b"", 0)
        for message in self._replies():
            yield from (body for kind, body in _attributes(message[4:]) if kind == _A_ADT and body)

    def _elements(self, body: bytes) -> Iterator[tuple[int, int, int, bool]]:
        """Elements of any form: network, prefix length, seconds left, nomatch."""
        for _, data in _attributes(body):
            length, left, nomatch, network = -1, 0, False, 0
            for kind, value in _attributes(data):
                if kind == _A_IP:
                    network = int.from_bytes(value[4:], "big")
                    self.version = 4 if len(value) == 8 else 6
                elif kind == _A_CIDR:
                    length = value[0]
                elif kind == _A_TIMEOUT:
                    left = int.from_bytes(value, "big")
                elif kind == _A_FLAGS:
                    nomatch = bool(int.from_bytes(value, "big") & _FLAG_NOMATCH)
            yield network, BITS[self.version] if length < 0 else length, left, nomatch

    def _request(self, command: int, attributes: bytes, flags: int) -> None:
        self.sequence += 1
        family = socket.AF_INET if self.version == 4 else socket.AF_INET6
        body = struct.pack("=BBH", family, 0, 0) + _attribute(_A_PROTOCOL, bytes((_PROTOCOL,)))
        body += _attribute(_A_SETNAME, self.name.encode() + b"\0") + attributes
        head = struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM | command, _REQUEST | flags, self.sequence, 0)
        # A full ADT message is 64 KiB; where the administrator set a smaller default buffer it would be EMSGSIZE.
        with suppress(PermissionError):
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 4 * len(body) + 65536)
        try:
            self.socket.send(head + body)
        except OSError as error:
            raise self._refused(error.errno or 0) from error

    def _replies(self) -> Iterator[bytes]:
        """Bodies of the answers to the last request, until its acknowledgement or the end of its dump."""
        while True:
            try:
                data = self.socket.recv(1 << 18)
            except OSError as error:
                raise self._refused(error.errno or 0) from error
            place = 0
            while place < len(data):
                size, kind, _, sequence, _ = struct.unpack_from("=IHHII", data, place)
                body = data[place + 16 : place + size]
                place += size + 3 & ~3
                if sequence != self.sequence:
                    continue
                if kind in (_ERROR, _DONE):
                    code = struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                    if code:
                        raise self._refused(-code)
                    return
                yield body

    def _refused(self, number: int) -> HostRefused:
        refusal = _NotThere if number == _NOT_THERE else HostRefused
        text = _ERRORS.get(number) or (os.strerror(number) if number < 4096 else f"ipset error {number}")
        hint = "there is no such set" if number == 2 else ""
        return refusal(f"ipset `{self.name}`: {text}", hint=hint)


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", len(payload) + 4, kind) + payload + b"\0" * (-len(payload) & 3)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, place)
        if size < 4:
            return
        yield kind & _TYPE_MASK, data[place + 4 : place + size]
        place += size + 3 & ~3


def _template(version: int, timeouts: bool) -> tuple[bytes, int, int, int]:
    """One empty element, and where in it address, prefix length and timeout stand."""
    octets = BITS[version] // 8
    address = _attribute((1 if version == 4 else 2) | _NETWORK_ORDER, bytes(octets))
    data = _attribute(_A_IP | _NESTED, address) + _attribute(_A_CIDR, b"\0")
    if timeouts:
        data += _attribute(_A_TIMEOUT | _NETWORK_ORDER, bytes(4))
    return _attribute(_A_DATA | _NESTED, data), 12, 12 + octets + 4, 12 + octets + 12


def _element_size(version: int, timeouts: bool) -> int:
    return len(_template(version, timeouts)[0])


def _decode(body: bytes) -> tuple[int, list[Element]] | None:
    """Undo :func:`_encode` column by column where every element has the same plain form; None where one has not."""
    for version in (4, 6):
        template, at_address, at_length, _ = _template(version, False)
        size, octets = len(template), BITS[version] // 8
        if len(body) % size:
            continue
        # The kernel marks the address itself as nested (6.18), where the program marks it as in network byte order.
        template = template[:11] + body[11:12] + template[12:]
        count = len(body) // size
        rest = bytearray(body)
        addresses = bytearray(count * octets)
        for i in range(octets):
            addresses[i::octets] = body[at_address + i :: size]
            rest[at_address + i :: size] = bytes(count)
        rest[at_length::size] = bytes(count)
        if rest == template * count:
            networks: Iterable[int] = (
                struct.unpack(f">{count}I", addresses)
                if version == 4
                else [int.from_bytes(addresses[i : i + octets], "big") for i in range(0, len(addresses), octets)]
            )
            return version, list(zip(networks, body[at_length::size], strict=True))
    return None


def _encode(version: int, what: Sequence[Element], timeouts: Sequence[int] | None) -> bytes:
    """Repeat the template and fill its columns by strided slices: no Python code runs per element and byte."""
    template, at_address, at_length, at_timeout = _template(version, timeouts is not None)
    size, octets = len(template), BITS[version] // 8
    out = bytearray(template * len(what))
    addresses = b"".join([network.to_bytes(octets, "big") for network, _ in what])
    for i in range(octets):
        out[at_address + i :: size] = addresses[i::octets]
    out[at_length::size] = bytes([length for _, length in what])
    if timeouts is not None:
        seconds = b"".join([left.to_bytes(4, "big") for left in islice(timeouts, len(what))])
        for i in range(4):
            out[at_timeout + i :: size] = seconds[i::4]
    return bytes(out)
