"""Laws of ports and of their texts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from property.strategies import LAW

from fwcompiler.addresses import covers
from fwcompiler.ports import FIRST, LAST, PROTOCOLS, WITH_PORTS, PortError, Ports, difference, joined, overlap, parse_ports


def read(text: str) -> Ports | str:
    """The ports that a text stands for, or the code of its refusal."""
    try:
        return parse_ports(text)
    except PortError as error:
        return error.code


number = st.integers(FIRST, LAST) | st.sampled_from((1, 2, 5060, 65534, 65535))
span = st.tuples(number, number).map(lambda pair: (min(pair), max(pair)))
transport = st.sampled_from(WITH_PORTS)
one = st.builds(lambda protocol, s: Ports(protocol, (s,)), transport, span)
several = st.lists(one, max_size=6)


@LAW
@given(one)
def test_texts_read_back(ports: Ports) -> None:
    """One range prints as text that reads as the same, whatever the case and the blanks around it."""
    (text,) = ports.texts()

    assert parse_ports(text) == parse_ports(f" {text.upper()} ") == ports


@LAW
@given(several, transport, number)
def test_joining_keeps_every_port(items: list[Ports], protocol: str, port: int) -> None:
    """Joined ports are one value a protocol, in order, and hold the ports that the parts hold."""
    result = joined(items)

    assert [p.protocol for p in result] == sorted({p.protocol for p in items})
    assert joined(result) == result == joined(reversed(items))
    held = any(p.protocol == protocol and covers(p.ranges, port) for p in items)
    assert held == any(p.protocol == protocol and covers(p.ranges, port) for p in result)


@LAW
@given(one, one, number)
def test_overlap(a: Ports, b: Ports, port: int) -> None:
    """Overlap is symmetric and holds exactly the ports of both; the difference is the rest."""
    common = overlap(a, b)

    assert common == overlap(b, a)
    both = a.protocol == b.protocol and covers(a.ranges, port) and covers(b.ranges, port)
    assert both == (common is not None and covers(common.ranges, port))
    if a.protocol == b.protocol:
        assert covers(difference(a, b), port) == (covers(a.ranges, port) and not covers(b.ranges, port))


@LAW
@given(
    st.text(max_size=20)
    | st.builds(lambda p, t: f"{p}/{t}", st.sampled_from((*PROTOCOLS, "sctp", "")), st.text("0123456789-+ _٣", max_size=12))
)
def test_reading_never_breaks(text: str) -> None:
    """Any text at all is ports between 1 and 65535 or refused with a known code: nothing wraps around as in iptables."""
    ports = read(text)

    if isinstance(ports, str):
        assert ports in ("port", "port-bounds", "range-order")
        return
    assert all(FIRST <= low <= high <= LAST for low, high in ports.ranges)
    assert bool(ports.ranges) == (ports.protocol in WITH_PORTS)
