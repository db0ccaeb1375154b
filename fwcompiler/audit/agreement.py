"""Whether Asterisk's files and the policy agree: audio ports, the HTTP server, the manager interface.

Defaults are those of Asterisk (rtp.conf.sample, http.conf.sample, manager.conf.sample, and the sources that read them).
SIP has a module of its own, `signalling`.
"""

from __future__ import annotations

from collections.abc import Iterator

from fwcompiler.addresses import EVERYONE, merged, subtract
from fwcompiler.asterisk import Configuration, Section, Setting, rtp_ports
from fwcompiler.audit.endpoints import Endpoint, covering, endpoint, network
from fwcompiler.audit.facts import Facts
from fwcompiler.audit.findings import Issue
from fwcompiler.diagnostics import Position
from fwcompiler.ports import port_text
from fwcompiler.resolved import Resolved
from fwcompiler.service import ResolvedService

SAMPLE_SECRETS = frozenset(
    ("1234", "mysecret", "amp111", "amp109", "secret", "secret5", "password", "admin", "asterisk", "changeme", "test", "manager", "ami")
)
"""Secrets from the samples of Asterisk, VICIdial and FreePBX, and what people type for the time being."""
SHORTEST_SECRET = 8
HTTP_PORT, TLS_PORT, AMI_PORT, AMI_TLS_PORT = 8088, 8089, 5038, 5039


def agreement(policy: Resolved, facts: Facts) -> Iterator[Issue]:
    """Everything but SIP."""
    for configuration in facts.asterisk.values():
        yield from file_notes(configuration)
    if facts.asterisk and "rtp.conf" not in facts.asterisk_unread:
        yield from rtp(policy, facts)
    if http_conf := facts.asterisk.get("http.conf"):
        yield from http(policy, http_conf)
    if manager_conf := facts.asterisk.get("manager.conf"):
        yield from manager(policy, manager_conf)


def file_notes(configuration: Configuration) -> Iterator[Issue]:
    """What Asterisk refuses or passes over, and what this reading leaves out."""
    for note in configuration.notes:
        remedy = "put it right, then `asterisk -rx 'module reload'`" if note.refused else ""
        yield Issue("asterisk-file", "error" if note.refused else "note", note.message, note.at, remedy=remedy)


def service_named(policy: Resolved, name: str) -> ResolvedService | None:
    """The service of a name, where the policy has it."""
    return next((s for s in policy.services if s.name == name), None)


def rtp(policy: Resolved, facts: Facts) -> Iterator[Issue]:
    """The ports Asterisk sends audio from and expects it on, against those the policy opens."""
    known = facts.asterisk.get("rtp.conf")
    configuration = known or Configuration(f"{facts.asterisk_folder}/rtp.conf")
    taken = rtp_ports(configuration)
    if known is None:
        message = f"there is no {configuration.file}, so Asterisk takes {port_text((taken.first, taken.last))} for audio"
        yield Issue("rtp-values", "warning", message, place=configuration.file, remedy="write one with `rtpstart` and `rtpend`")
    for problem in taken.problems if known else ():
        yield Issue("rtp-values", "warning", problem.message, problem.at, remedy=problem.hint)
    used = ((taken.first, taken.last),)
    opened = merged(r for s in policy.services for p in s.ports if p.protocol == "udp" for r in p.ranges)
    service = service_named(policy, "rtp")
    own = merged(r for p in service.ports for r in p.ranges) if service else ()
    text = f"udp/{port_text((taken.first, taken.last))}"
    missing, idle = subtract(used, opened), subtract(own, used)
    where = service.at if service else Position(configuration.file, 1)
    chunk = policy.plan.chunk(policy.host.name) if policy.plan and policy.host else None
    remedy = f"`rtp: {{ports: {port_text((taken.first, taken.last))}}}`, or `rtpstart` and `rtpend` in {configuration.file}"
    if chunk:
        remedy = f"rtpstart={chunk[0]} and rtpend={chunk[1]} in {configuration.file}: what the edge sends to this host"
    if missing:
        ports = ", ".join(port_text(r) for r in missing)
        message = f"Asterisk uses {text} for audio ({taken.at}), and the policy does not open {ports}: calls there stay silent"
        yield Issue("rtp-range", "error", message, where, remedy=remedy)
    if idle:
        ports = ", ".join(port_text(r) for r in idle)
        yield Issue("rtp-range", "warning", f"`rtp` opens {ports}, which Asterisk does not use ({text}, {taken.at})", where, remedy=remedy)
    general = configuration.section("general")
    strict = general.first("strictrtp") if general else None
    if strict is not None and strict.value.lower() in ("no", "false", "n", "f", "0", "off"):
        message = "`strictrtp` is off: who guesses a port of a running call can talk into it"
        yield Issue("strict-rtp", "warning", message, strict.at, remedy="strictrtp=yes")


def http_binds(configuration: Configuration) -> tuple[Endpoint | None, Endpoint | None, Setting | None]:
    """Where Asterisk's HTTP server listens, plain and with TLS, and its certificate; None where it does not."""
    general = configuration.section("general") or Section("general", Position(configuration.file, 1))
    enabled, address = general.last("enabled"), general.last("bindaddr")
    if enabled is None or not enabled.on:
        return None, None, None
    port = _number(general.last("bindport"), HTTP_PORT)
    plain = endpoint(address.value, port) if address else None
    tls_on = general.last("tlsenable", "sslenable")
    if tls_on is None or not tls_on.on:
        return plain, None, None
    tls_port = _number(general.last("tlsbindport", "sslbindport"), TLS_PORT)
    tls_address = general.last("tlsbindaddr", "sslbindaddr") or address
    tls = (
        endpoint(tls_address.value if "tlsbindaddr" in tls_address.name.lower() else _host(tls_address), tls_port) if tls_address else None
    )
    return plain, tls, general.last("tlscertfile", "tlscert", "sslcert")


def _host(setting: Setting) -> str:
    found = endpoint(setting.value, 1)
    return f"[{found.host}]" if found and ":" in found.host else found.host if found else ""


def _number(setting: Setting | None, default: int) -> int:
    return int(setting.value) if setting is not None and setting.value.isascii() and setting.value.isdigit() else default


def http(policy: Resolved, configuration: Configuration) -> Iterator[Issue]:
    """Plain HTTP stays on the host; TLS listens where `wss` is opened."""
    general = configuration.section("general") or Section("general", Position(configuration.file, 1))
    plain, tls, _ = http_binds(configuration)
    if plain is not None and plain.scope != "loopback":
        at = (general.last("bindaddr") or Setting("", "", general.at)).at
        open_to = covering(policy, "tcp", plain.port)
        so = f", and `{open_to.name}` opens it" if open_to else "; only the firewall keeps others out"
        message = f"Asterisk's plain HTTP server listens on {plain}{so}"
        yield Issue("http-plain", "error" if open_to else "warning", message, at, remedy="bindaddr=127.0.0.1")
    wss = service_named(policy, "wss")
    if tls is None:
        if wss is not None:
            message = f"the policy opens `wss`, and Asterisk's TLS server is off ({general.at})"
            yield Issue("wss", "warning", message, wss.at, remedy="`enabled=yes` and `tlsenable=yes` in http.conf, or take `wss` out")
        return
    at = (general.last("tlsbindaddr", "sslbindaddr") or general.last("bindaddr") or Setting("", "", general.at)).at
    if tls.scope == "loopback":
        if wss is not None:
            message = f"the policy opens `wss`, and Asterisk's TLS server listens on {tls} only"
            yield Issue("wss", "warning", message, at, remedy=f"tlsbindaddr=0.0.0.0:{tls.port}")
    elif covering(policy, "tcp", tls.port) is None:
        message = f"Asterisk's TLS server listens on {tls}, which no service opens: phones in browsers cannot connect"
        yield Issue(
            "wss", "error" if wss else "warning", message, at, remedy=f"`wss: {{ports: {tls.port}, from: […]}}`, or another tlsbindaddr"
        )


def manager(policy: Resolved, configuration: Configuration) -> Iterator[Issue]:
    """The manager interface: where it listens, and with which secrets. Secrets are never shown."""
    general = configuration.section("general") or Section("general", Position(configuration.file, 1))
    enabled = general.last("enabled")
    if enabled is None or not enabled.on:
        return
    address = general.last("bindaddr")
    bind = endpoint(address.value if address else "0.0.0.0", _number(general.last("port"), AMI_PORT))
    beyond = bind is None or bind.scope != "loopback"
    service = covering(policy, "tcp", bind.port) if bind else None
    if beyond and bind is not None and service is None:
        message = f"the manager interface listens on {bind}, and the policy opens it to nobody; only the firewall keeps others out"
        yield Issue("ami-bind", "warning", message, (address or enabled).at, remedy="bindaddr=127.0.0.1")
    elif service is not None and service.groups is None:
        message = f"the manager interface is open to anywhere: whoever reaches it can place calls ({service.expose})"
        yield Issue("ami-bind", "error", message, service.at, remedy=f"name the groups that need `{service.name}`")
    for section in configuration.visible():
        if section.name.lower() != "general":
            yield from _user(section, beyond=beyond)


def _user(section: Section, *, beyond: bool) -> Iterator[Issue]:
    secret = section.last("secret")
    if secret is None:
        return
    weak = _weak(section.name, secret.value)
    if weak:
        message = f"the manager user `{section.name}` has {weak}"
        remedy = "a long random secret, here and in what logs in with it"
        yield Issue("ami-secret", "error" if beyond else "warning", message, secret.at, remedy=remedy)
    if beyond and not _restricted(section):
        message = f"the manager user `{section.name}` may log in from every address that reaches the port"
        yield Issue("ami-permit", "warning", message, section.at, remedy="deny=0.0.0.0/0.0.0.0 and permit=127.0.0.1/255.255.255.255")


def _weak(user: str, secret: str) -> str:
    if secret.lower() in SAMPLE_SECRETS:
        return "a secret that everybody knows from a sample"
    if secret.lower() == user.lower() or not secret:
        return "its own name as secret" if secret else "an empty secret"
    return f"a secret of fewer than {SHORTEST_SECRET} characters" if len(secret) < SHORTEST_SECRET else ""


def _restricted(section: Section) -> bool:
    """Rules are taken in order, the last that holds decides, and without any everybody may (acl.c, ast_apply_ha)."""
    if section.all("acl"):
        return True
    allowed = EVERYONE
    for rule in section.all("deny", "permit"):
        for part in rule.value.split(","):
            named = network(part.strip().removeprefix("!"))
            if named is not None:
                permits = (rule.name.lower() == "permit") != part.strip().startswith("!")
                allowed = allowed | named if permits else allowed - named
    return allowed.v4 != EVERYONE.v4
