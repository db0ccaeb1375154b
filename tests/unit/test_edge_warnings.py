"""What a policy with an edge, or with a redirect to HTTPS, is warned about: services that end at a closed port."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwcompiler.pipeline import compile_all

POLICY = """version: 1
groups: {carriers: [198.51.100.16/28]}
hosts:
  gw: {role: edge, wan: eth0, lan: eth1, addresses: [203.0.113.1, 10.20.0.1]}
  d1: {role: dialer, addresses: [10.20.0.11]}
  w1: {role: web, addresses: [10.20.0.20]}
edge: {host: gw, inbound_sip: d1, rtp: {first: 10000, chunk: 5000}, forward: {https: w1}}
services:
  sip: {from: [carriers]}
  rtp: {from: anywhere}
  https: {from: anywhere}
"""
ALONE = "version: 1\ngroups: {office: [198.51.100.16/28]}\nservices:\n"


def warned(folder: Path, text: str) -> list[tuple[str, int, str]]:
    """Code, line and hint of every warning, whichever host it is about."""
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    findings = dict.fromkeys(f for compiled in compile_all(str(path)) for f in compiled.findings)
    return [(f.code, f.at.line if f.at else 0, f.hint) for f in findings]


def test_an_edge_without_services_of_its_own_forwards(tmp_path: Path) -> None:
    """An edge that only forwards drops nothing that was meant; one that has neither, and a host without services, are told."""
    assert warned(tmp_path, POLICY) == []
    text = POLICY.partition("edge:")[0].replace("  d1", "  db: {role: database, addresses: [10.20.0.9]}\n  d1")
    assert warned(tmp_path, f"{text}services: {{rtp: {{from: anywhere}}}}\n") == [
        ("group-unused", 2, ""),
        ("covered", 4, ""),
        ("covered", 5, ""),
        ("covered", 7, ""),
    ]


@pytest.mark.parametrize(
    ("change", "hints"),
    [
        (("forward: {https: w1}", "forward: {}"), ["forward: {https: w1}, or narrow its `from`"]),
        (("https: {from: anywhere}", "https: {from: anywhere}\n  http: {from: anywhere}"), ["forward: {http: w1}, or narrow its `from`"]),
        (("https: {from: anywhere}", "https: {from: anywhere}\n  http: {from: anywhere, redirect: closed}"), []),
        (("https: {from: anywhere}", "https: {from: anywhere}\n  ami: {from: [carriers]}\n  ssh: {from: [carriers]}"), []),
        (("https: {from: anywhere}", "https: {from: anywhere}\n  own: {ports: [tcp/700], from: anywhere}"), []),
        (
            ("https: {from: anywhere}", "https: {from: anywhere}\n  own: {ports: [tcp/700], from: anywhere, on: dialer}"),
            ["forward: {own: d1}, or narrow its `from`"],
        ),
        (("10.20.0.20]}\nedge: {", '203.0.113.9]}\nedge: {networks: ["10.20.0.0/24"], '), []),
    ],
)
def test_what_an_edge_sends_to_nobody(tmp_path: Path, change: tuple[str, str], hints: list[str]) -> None:
    """A service open to anywhere that only hosts behind the edge have is closed from outside unless the edge sends it on. The edge's
    own services, restricted ones, and hosts with public addresses are not meant.
    """
    assert change[0] in POLICY
    found = warned(tmp_path, POLICY.replace(*change))

    assert [hint for code, _, hint in found if code == "not-forwarded"] == hints


@pytest.mark.parametrize("mode", ["responder", "web-server"])
def test_a_redirect_to_a_closed_port(tmp_path: Path, mode: str) -> None:
    """A redirect leads to tcp/443: where no service is, nobody arrives. Any service there will do, behind an edge on any host."""
    http = f"  http: {{from: anywhere, redirect: {mode}}}\n"

    assert [f[:2] for f in warned(tmp_path, ALONE + http) if f[0] == "https-closed"] == [("https-closed", 4)]
    assert "https-closed" not in {f[0] for f in warned(tmp_path, f"{ALONE}{http}  https: {{from: [office]}}\n")}
    assert "https-closed" not in {f[0] for f in warned(tmp_path, f"{ALONE}{http}  portal: {{ports: [tcp/440-450], from: [office]}}\n")}
    assert "https-closed" not in {f[0] for f in warned(tmp_path, ALONE + http.replace(mode, "closed") + "  rtp: {from: anywhere}\n")}

    edge = POLICY.replace("{https: w1}", "{https: w1, http: d1}").replace("https: {from: anywhere}", "https: {from: anywhere, on: web}")
    assert "https-closed" not in {f[0] for f in warned(tmp_path, edge + http)}
    several = edge.replace(edge[edge.index("edge: {") : edge.index("services:")], "")
    assert [f[1] for f in warned(tmp_path, several + http) if f[0] == "https-closed"] == [11]
