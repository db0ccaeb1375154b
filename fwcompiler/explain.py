"""Reads the packet that `fwc explain` is asked about."""

from __future__ import annotations

from typing import cast, get_args

from fwcompiler.addresses import AddressError, parse_address
from fwcompiler.diagnostics import UsageError, did_you_mean
from fwcompiler.ports import PortError, parse_ports
from fwcompiler.proof.fields import Packet, packet_to
from fwcompiler.ruleset import State


def packet_from(source: str, to: str, to_addr: str | None, interface: str, state: str) -> Packet:
    """A packet from the words of the command line.

    Raises:
        UsageError: a word is no address, no port or no state, or the addresses are of different families.
    """
    try:
        version, value = parse_address(source)
        destination = parse_address(to_addr) if to_addr is not None else None
        ports = parse_ports(to)
    except (AddressError, PortError) as error:
        raise UsageError(error.message, hint=error.hint) from error
    if ports.ranges and ports.ranges[0][0] != ports.ranges[0][1]:
        raise UsageError(f"`{to}` is a range: a packet goes to one port", hint=f"ask about {ports.protocol}/{ports.ranges[0][0]}")
    if state not in get_args(State):
        raise UsageError(f"there is no state `{state}`", hint=did_you_mean(state, get_args(State)) or ", ".join(get_args(State)))
    if destination is not None and destination[0] != version:
        raise UsageError(f"`{source}` and `{to_addr}` are of different families")
    return packet_to(
        version, value, ports, destination=destination[1] if destination else None, interface=interface, state=cast(State, state)
    )
