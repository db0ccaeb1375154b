"""Commands that only look: status, explain, verify, lab, backends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from fwcompiler.commands.app import Full, Options, PolicyFile, app, chosen_backend, chosen_host, compiled_policy, print_json
from fwcompiler.diagnostics import EXIT_DIFFERS, EXIT_OK, Finding, UsageError, format_findings

if TYPE_CHECKING:
    from fwcompiler.shapes import BackendShape


@app.command()
def status(context: typer.Context, full: Full = False) -> int:
    """Tell whether the host still holds what was applied, and what passed through it."""
    from fwcompiler.status import read_status, status_text

    options: Options = context.obj
    with chosen_host(options, full=full) as host:
        found = read_status(host)
    if options.json:
        print_json(found)
    else:
        print(status_text(found, color=options.color_out))
    return EXIT_OK


@app.command()
def explain(
    context: typer.Context,
    to: Annotated[str, typer.Option("--to", help="Protocol and port: udp/5060.")],
    source: Annotated[
        str | None, typer.Option("--from", metavar="ADDR", help="Source address; left out: a packet that this host sends to --to-addr.")
    ] = None,
    to_addr: Annotated[str | None, typer.Option("--to-addr", metavar="ADDR", help="Destination; default: an address of this host.")] = None,
    interface: Annotated[str | None, typer.Option("--in", metavar="NAME", help="Input interface; default: eth0, or an edge's wan.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="NAME", help="Output interface of a packet that this host sends; default: eth0.")
    ] = None,
    from_port: Annotated[int | None, typer.Option("--from-port", min=1, max=65535, help="The port that this host sends from.")] = None,
    state: Annotated[str, typer.Option(help="new, established, related, invalid or untracked.")] = "new",
    live: Annotated[bool, typer.Option("--live", help="Ask the loaded ruleset, and say where it and the policy part.")] = False,
    listing: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Ask a saved `nft -j list ruleset` or `iptables-save`, whoever wrote it. May be said again where a host's listing is in "
            "several files.",
        ),
    ] = None,
    policy: Annotated[str | None, typer.Argument(metavar="POLICY", help="The policy file; none with --listing.")] = None,
) -> int:
    """Say what happens to one packet, and why, with the policy line."""
    from fwcompiler.explain import explain_listing, explain_live, packet_from, packet_sent
    from fwcompiler.proof.edge import explain_packet
    from fwcompiler.report import explain_json

    options: Options = context.obj
    if source is None or out is not None:
        if to_addr is None or interface is not None:
            hint = "--from ADDR for one that comes in; --to-addr ADDR, without --in, for one that this host sends"
            raise UsageError("which packet is meant?", hint=hint)
        packet = packet_sent(to, to_addr, source, out or "eth0", state, from_port)
    elif from_port is not None:
        raise UsageError("--from-port belongs to packets that this host sends", hint="leave --from out, and say --to-addr")
    else:
        packet = packet_from(source, to, to_addr, interface or "eth0", state)
    if listing:
        if policy is not None or live:
            raise UsageError("--listing asks a file and nothing else", hint="leave the policy and --live out")
        asked = explain_listing(listing, packet)
        if options.json:
            print_json(asked.as_json())
        else:
            print(asked.text())
        return EXIT_OK
    if policy is None:
        raise UsageError("Missing argument 'POLICY'.", hint="or ask a saved listing with --listing FILE")
    compiled = compiled_policy(policy, options)
    if interface is None and compiled.resolved.edge and not packet.leaving:
        packet = replace(packet, interface=compiled.resolved.edge.wan)
    traced = None
    if live:
        with chosen_host(options) as host:
            traced = explain_live(host, compiled.resolved, packet)
    explanation = traced.policy if traced else explain_packet(compiled.resolved, packet)
    if options.json:
        print_json(traced.as_json() if traced else explain_json(explanation))
        return EXIT_OK
    print("\n".join(explanation.steps))
    if explanation.at:
        print(format_findings([Finding("value", "decided here", explanation.at, severity="note")]).replace("note[value]: ", ""))
    if traced:
        print(traced.text())
    return EXIT_OK


@app.command()
def verify(context: typer.Context, policy: PolicyFile, full: Full = False) -> int:
    """Prove that the live rules mean what the policy says, and that nobody else's rules change it.

    With `--backend all`: prove that all backends would load the same.
    """
    from fwcompiler.report import verify_json, verify_text
    from fwcompiler.verify import verify_backends, verify_live

    options: Options = context.obj
    compiled = compiled_policy(policy, options)
    if options.backend == "all":
        verified = verify_backends(compiled, full=full)
    else:
        with chosen_host(options, full=full) as host:
            verified = verify_live(compiled, host)
    if options.json:
        print_json(verify_json(verified))
    elif not options.quiet or not verified.equal:
        print(verify_text(verified))
    return EXIT_OK if verified.equal else EXIT_DIFFERS


@app.command()
def lab(context: typer.Context, policy: PolicyFile) -> int:
    """Try a policy with real packets in a throw-away network of namespaces."""
    from fwcompiler.lab import lab_text, run_lab

    options: Options = context.obj
    result = run_lab(compiled_policy(policy, options), chosen_backend(options))
    if options.json:
        print_json(result.as_json())
    else:
        print(lab_text(result, color=options.color_out))
    return EXIT_OK if result.agrees else EXIT_DIFFERS


@app.command()
def backends(context: typer.Context) -> int:
    """List the installed backends, where they come from, and whether their programs are here."""
    from fwcompiler.kernel.runner import find
    from fwcompiler.registry import installed, load, origin

    options: Options = context.obj
    rows: list[BackendShape] = []
    for name, point in installed().items():
        try:
            missing = [p for p in load(name).programs if find(p) is None]
            rows.append({"name": name, "from": origin(point), "usable": not missing, "missing": missing, "error": None})
        except UsageError as broken:
            rows.append({"name": name, "from": origin(point), "usable": False, "missing": [], "error": broken.message})
    if options.json:
        print_json({"backends": rows})
        return EXIT_OK
    from fwcompiler.tables import table_text

    states = ["usable" if r["usable"] else r["error"] or f"missing: {', '.join(r['missing'])}" for r in rows]
    lines = [(r["name"], state, r["from"]) for r, state in zip(rows, states, strict=True)]
    print(table_text(("backend", "state", "from"), lines, color=options.color_out))
    return EXIT_OK
