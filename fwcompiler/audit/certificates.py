"""Certificates: what they say, and what is wrong with them. Needs the `cryptography` package (the extra `audit`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from fwcompiler.audit.facts import CertificateFile, Facts, Served
from fwcompiler.audit.findings import Issue

if TYPE_CHECKING:
    from cryptography.x509 import Certificate as X509

SOON = timedelta(days=21)
"""Two thirds of the month before the end in which ACME clients renew have passed by then."""
VERY_SOON = timedelta(days=7)
RSA_LEAST, EC_LEAST = 2048, 256
"""CA/Browser Forum Baseline Requirements 6.1.5."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What one certificate says. `weak`: why browsers refuse its key or signature, or empty."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    key: str
    weak: str
    self_signed: bool
    fingerprint: str

    def days_left(self, now: datetime) -> int:
        """Whole days until it expires; afterwards, whole days since then as a negative number."""
        return int((self.not_after - now) / timedelta(days=1))

    def covers(self, name: str) -> bool:
        """True where a browser takes it for this name (RFC 6125: a wildcard stands for one label)."""
        wanted = name.lower().rstrip(".")
        head, _, rest = wanted.partition(".")
        return any(n == wanted or (head and rest and n == f"*.{rest}") for n in map(str.lower, self.names))


@dataclass(frozen=True, slots=True)
class Shown:
    """A certificate at a place: `tcp/443`, or a file."""

    place: str
    certificate: Certificate


def available() -> bool:
    """True where the package that reads certificates is installed."""
    from importlib.util import find_spec

    return find_spec("cryptography") is not None


def read(content: bytes) -> Certificate | None:
    """The first certificate of PEM or DER; None where there is none."""
    from cryptography import x509

    try:
        if b"-----BEGIN" in content:
            return _read(x509.load_pem_x509_certificates(content)[0])
        return _read(x509.load_der_x509_certificate(content))
    except (ValueError, IndexError):
        return None


def _read(found: X509) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa

    try:
        extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = (*extension.get_values_for_type(x509.DNSName), *map(str, extension.get_values_for_type(x509.IPAddress)))
    except x509.ExtensionNotFound:
        names = ()
    public = found.public_key()
    weak = ""
    if isinstance(public, rsa.RSAPublicKey | dsa.DSAPublicKey):
        key = f"{'RSA' if isinstance(public, rsa.RSAPublicKey) else 'DSA'} {public.key_size}"
        weak = f"{key} key" if public.key_size < RSA_LEAST or key.startswith("DSA") else ""
    elif isinstance(public, ec.EllipticCurvePublicKey):
        key = f"EC {public.curve.name}"
        weak = f"{key} key" if public.key_size < EC_LEAST else ""
    else:
        key = (
            "Ed25519" if isinstance(public, ed25519.Ed25519PublicKey) else "Ed448" if isinstance(public, ed448.Ed448PublicKey) else "other"
        )
    algorithm = found.signature_hash_algorithm
    if algorithm is not None and algorithm.name in ("md5", "sha1"):
        weak = weak or f"signature with {algorithm.name}"
    return Certificate(
        subject=found.subject.rfc4514_string(),
        issuer=found.issuer.rfc4514_string(),
        names=tuple(names),
        not_before=found.not_valid_before_utc,
        not_after=found.not_valid_after_utc,
        key=key,
        weak=weak,
        self_signed=found.subject == found.issuer,
        fingerprint=found.fingerprint(hashes.SHA256()).hex(),
    )


def shown(facts: Facts) -> tuple[Shown, ...]:
    """Every certificate that a port shows or a file holds, ports first."""
    if not available():
        return ()
    found = [(f"tcp/{s.port}", s.chain[0]) for s in facts.served or () if s.chain]
    found += [(f.path, f.content) for f in facts.certificate_files if f.content]
    return tuple(Shown(place, c) for place, content in found if (c := read(content)) is not None)


def certificates(facts: Facts) -> Iterator[Issue]:
    """What is wrong with the certificates of the TLS ports, and of the files that configurations name."""
    if not available():
        return
    served: dict[int, Certificate] = {}
    for each in facts.served or ():
        found = read(each.chain[0]) if each.chain else None
        if found is None:
            message = f"tcp/{each.port} does not talk TLS: {each.error or 'no certificate'}"
            yield Issue("certificate-none", "error", message, place=f"tcp/{each.port}", remedy="switch TLS on, or take the service out")
            continue
        served[each.port] = found
        yield from _judge(found, f"tcp/{each.port}", facts)
        yield from _trust(each, found, facts)
    for file in facts.certificate_files:
        yield from _file(file, served, facts)


def _judge(found: Certificate, place: str, facts: Facts) -> Iterator[Issue]:
    """Time, name and key of one certificate."""
    left = found.not_after - facts.now
    until = f"{found.not_after:%Y-%m-%d}"
    renew = "renew it, and reload what serves it"
    if left <= timedelta(0):
        yield Issue(
            "certificate-expired", "error", f"the certificate expired on {until}, {(-left).days} days ago", place=place, remedy=renew
        )
    elif left <= SOON:
        message = f"the certificate expires on {until}, in {left.days} days"
        yield Issue("certificate-expires", "error" if left <= VERY_SOON else "warning", message, place=place, remedy=renew)
    if found.not_before > facts.now:
        message = f"the certificate is not valid before {found.not_before:%Y-%m-%d %H:%M} UTC"
        yield Issue("certificate-early", "error", message, place=place, remedy="look at this host's clock, or wait")
    if "." in facts.name and not found.covers(facts.name):
        names = ", ".join(found.names[:5]) or "no name at all"
        message = f"the certificate is for {names}, and this host is {facts.name}"
        remedy = "a certificate for the name that people and phones connect to; `--name` if that is another one"
        yield Issue("certificate-name", "error", message, place=place, remedy=remedy)
    if found.weak:
        yield Issue(
            "certificate-key",
            "error",
            f"browsers refuse this certificate: {found.weak}",
            place=place,
            remedy="a new key of EC P-256 or RSA 2048",
        )


def _trust(served: Served, found: Certificate, facts: Facts) -> Iterator[Issue]:
    """A chain that ends nowhere. What has expired is said already."""
    if not served.distrust or found.not_after <= facts.now or found.not_before > facts.now:
        return
    message = f"this host does not trust the certificate: {served.distrust}"
    remedy = "serve the whole chain (fullchain.pem); name a CA of your own with `--ca`"
    yield Issue("certificate-chain", "error", message, place=f"tcp/{served.port}", remedy=remedy)


def _file(file: CertificateFile, served: Mapping[int, Certificate], facts: Facts) -> Iterator[Issue]:
    found = read(file.content) if file.content else None
    if found is None:
        reason = file.error or "there is no certificate in it"
        message = f"{file.named_by} names a certificate that cannot be used: {reason}"
        yield Issue("certificate-file", "error", message, place=file.path, remedy="the path of a PEM file, readable for Asterisk")
        return
    port = file.port
    if port in served:
        if served[port].fingerprint != found.fingerprint:
            message = f"tcp/{port} shows another certificate than {file.path} holds ({found.not_after:%Y-%m-%d})"
            remedy = "`asterisk -rx 'module reload http'` after every renewal"
            yield Issue("certificate-stale", "warning", message, place=f"tcp/{port}", remedy=remedy)
        return
    yield from _judge(found, file.path, facts)
