"""Ports in the forms of a policy."""

from __future__ import annotations

import pytest

from fwcompiler.ports import PortError, Ports, joined, overlap, parse_ports


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("tcp/443", Ports("tcp", ((443, 443),))),
        ("UDP/10000-20000", Ports("udp", ((10000, 20000),))),
        (" udp / 5060 ", Ports("udp", ((5060, 5060),))),
        ("tcp/1-65535", Ports("tcp", ((1, 65535),))),
        ("vrrp", Ports("vrrp")),
        ("icmp", Ports("icmp")),
    ],
)
def test_forms(text: str, ports: Ports) -> None:
    """Protocol and port, a range, or a protocol that has no ports."""
    assert parse_ports(text) == ports


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("tcp/0", "port-bounds"),
        ("tcp/65536", "port-bounds"),
        ("tcp/99999", "port-bounds"),
        ("udp/1-70000", "port-bounds"),
        ("udp/9000-8000", "range-order"),
        ("udp/-1", "port"),
        ("udp/1-", "port"),
        ("udp/1:2", "port"),
        ("udp/0x10", "port"),
        ("udp/٣", "port"),
        ("udp/99999999999", "port"),
        ("udp", "port"),
        ("vrrp/1", "port"),
        ("sctp/1", "port"),
        ("5060", "port"),
        ("tcp/http", "port"),
        ("tcp/1/2", "port"),
        ("", "port"),
    ],
)
def test_refused(text: str, code: str) -> None:
    """What iptables would wrap around or guess is refused here."""
    with pytest.raises(PortError) as caught:
        parse_ports(text)

    assert caught.value.code == code


def test_joining() -> None:
    """One value a protocol, ranges merged, in order."""
    parts = [parse_ports(t) for t in ("udp/5061", "tcp/80", "udp/5060", "vrrp")]

    assert joined(parts) == (Ports("tcp", ((80, 80),)), Ports("udp", ((5060, 5061),)), Ports("vrrp"))


def test_overlap() -> None:
    """Only the same protocol overlaps; without ports all of it does."""
    assert overlap(parse_ports("udp/1-100"), parse_ports("udp/50-200")) == Ports("udp", ((50, 100),))
    assert overlap(parse_ports("udp/1-100"), parse_ports("tcp/50-200")) is None
    assert overlap(parse_ports("vrrp"), parse_ports("vrrp")) == Ports("vrrp")


def test_texts() -> None:
    """One text a range; the value itself prints all of them."""
    ports = Ports("udp", ((1, 1), (3, 9)))

    assert (ports.texts(), str(ports), str(Ports("vrrp"))) == (("udp/1", "udp/3-9"), "udp/1, udp/3-9", "vrrp")
