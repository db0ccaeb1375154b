"""A dialer host in a network namespace: interfaces, listening sockets, web servers, certificates and Asterisk's files.

Sockets are made inside the namespace and served by threads of this process, so that nothing is left when the block ends.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import kernelspace
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

NAME = "dialer1.example.net"
EXAMPLES = Path(__file__).parent / "asterisk"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
REDIRECT = f"HTTP/1.1 301 Moved Permanently\r\nLocation: https://{NAME}/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Made:
    """A certificate with its key, as PEM."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> bytes:
        """The certificate alone."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def both(self) -> bytes:
        """The certificate and its key."""
        form = serialization.PrivateFormat.PKCS8
        return self.pem + self.key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def certificate(
    name: str = NAME,
    *,
    issuer: Made | None = None,
    start: float = -1,
    days: float = 90,
    authority: bool = False,
    key: Key | None = None,
    now: datetime | None = None,
) -> Made:
    """A certificate for a name, valid from `start` days from now for `days`; signed by itself where there is no issuer."""
    now = now or datetime.now(UTC)
    own = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=start))
        .not_valid_after(now + timedelta(days=start + days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    return Made(builder.sign(issuer.key if issuer else own, hashes.SHA256()), own)


@dataclass
class Dialer:
    """The namespace with what runs in it. `folder/asterisk` holds Asterisk's files."""

    netns: str
    folder: Path
    _held: ExitStack = field(default_factory=ExitStack)
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def asterisk(self) -> Path:
        """Asterisk's configuration folder."""
        return self.folder / "asterisk"

    def write(self, name: str, text: str) -> None:
        """One of Asterisk's files."""
        self.asterisk.mkdir(exist_ok=True)
        (self.asterisk / name).write_text(text, encoding="utf-8")

    def run(self, *argv: str) -> str:
        """Run a program in the namespace."""
        return kernelspace.in_named(self.netns, *argv)

    def _open(self, kind: socket.SocketKind, address: str, port: int) -> socket.socket:
        made: list[socket.socket] = []

        def inside() -> None:
            with open(f"/run/netns/{self.netns}", "rb") as space:  # noqa: PTH123
                kernelspace._setns(space.fileno())
            opened = socket.socket(socket.AF_INET, kind)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((address, port))
            made.append(opened)

        # A thread that enters a namespace and ends: this one never leaves its own.
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        self._held.callback(made[0].close)
        return made[0]

    def udp(self, port: int, address: str = "0.0.0.0") -> None:
        """A UDP socket that nobody reads."""
        self._open(socket.SOCK_DGRAM, address, port)

    def tcp(self, port: int, address: str = "0.0.0.0", *, answer: bytes = b"", tls: Made | None = None) -> None:
        """A TCP server that gives everybody the same answer, through TLS where there is a certificate."""
        listener = self._open(socket.SOCK_STREAM, address, port)
        listener.listen(8)
        listener.settimeout(0.2)
        context = None
        if tls is not None:
            file = self.folder / f"server-{port}.pem"
            file.write_bytes(tls.both)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(file)
        thread = threading.Thread(target=self._serve, args=(listener, answer, context))
        thread.start()
        self._held.callback(thread.join)
        self._held.callback(self._stop.set)

    def _serve(self, listener: socket.socket, answer: bytes, context: ssl.SSLContext | None) -> None:
        kept: list[socket.socket] = []
        while not self._stop.is_set():
            with suppress(OSError):
                channel, _ = listener.accept()
                channel.settimeout(2)
                if context is not None:
                    with suppress(OSError):
                        context.wrap_socket(channel, server_side=True).close()
                elif answer:
                    channel.recv(4096)
                    channel.sendall(answer)
                    channel.close()
                else:
                    kept.append(channel)  # somebody is logged in
        for channel in kept:
            channel.close()

    def connect(self, source: str, to: str, port: int) -> None:
        """A connection that stays open, from one address of the namespace to another."""
        opened = self._open(socket.SOCK_STREAM, source, 0)
        opened.settimeout(5)
        opened.connect((to, port))


@contextmanager
def dialer(netns: str, folder: Path) -> Iterator[Dialer]:
    """A dialer with a public and a private address, nothing running yet."""
    made = Dialer(netns, folder)
    for arguments in (
        ("link", "set", "lo", "up"),
        ("link", "add", "eth0", "type", "veth", "peer", "name", "outside"),
        ("link", "set", "eth0", "up"),
        ("addr", "add", "203.0.113.5/24", "dev", "eth0"),
        ("addr", "add", "10.20.0.11/24", "dev", "eth0"),
    ):
        made.run("ip", *arguments)
    with made._held:
        yield made
