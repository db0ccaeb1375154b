"""The lines for Apache and nginx, in the real servers, asked with curl in a namespace of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kernelspace
import pytest

from fwcompiler.webserver import redirect_files

NAME = "dialer1.example.com"
MODULES = Path("/usr/lib/apache2/modules")
TOKEN = ".well-known/acme-challenge/token-1"

APACHE = """
ServerRoot {folder}
PidFile {folder}/apache.pid
ErrorLog {folder}/error.log
Mutex pthread
{modules}
User nobody
Group nogroup
ServerName {name}
DocumentRoot {folder}/www
Listen 80
Listen 443
IncludeOptional {folder}/http-to-https.apache.conf
<Directory {folder}/www>
    Require all granted
</Directory>
<VirtualHost *:443>
    SSLEngine on
    SSLCertificateFile {folder}/cert.pem
    SSLCertificateKeyFile {folder}/key.pem
    Header always set X-Method expr=%{{REQUEST_METHOD}}
</VirtualHost>
"""
NGINX = """
user nobody nogroup;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
daemon off;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/http-to-https.nginx.conf;
    server {{
        listen 443 ssl;
        ssl_certificate {folder}/cert.pem;
        ssl_certificate_key {folder}/key.pem;
        add_header X-Method $request_method always;
        root {folder}/www;
    }}
}}
"""
NEEDED = ("mpm_event", "authz_core", "socache_shmcb", "ssl", "rewrite", "headers", "dir")


def server_argv(server: str, folder: Path) -> tuple[str, ...]:
    """Writes the server's configuration and says how to start it."""
    for name, text in redirect_files().items():
        (folder / name).write_text(text.replace("/var/www/html", str(folder / "www")))
    if server == "nginx":
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
        return ("nginx", "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf"))
    loaded = "\n".join(f"LoadModule {m}_module {MODULES}/mod_{m}.so" for m in NEEDED if (MODULES / f"mod_{m}.so").exists())
    (folder / "apache.conf").write_text(APACHE.format(folder=folder, modules=loaded, name=NAME))
    return ("apache2", "-DFOREGROUND", "-f", str(folder / "apache.conf"))


@contextmanager
def web_server(server: str, folder: Path) -> Iterator[None]:
    """A web server with the lines of fwc, a certificate for `NAME`, one page and one challenge."""
    folder.chmod(0o755)
    (folder / "www" / TOKEN).parent.mkdir(parents=True)
    (folder / "www" / TOKEN).write_text("token-1.thumbprint")
    (folder / "www" / "page").write_text("the page")
    certificate = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}")
    kernelspace.run((*certificate, "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"))
    with (folder / "out.log").open("wb") as out:
        process = subprocess.Popen(server_argv(server, folder), stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 20
        while not _up(443):
            assert process.poll() is None, (folder / "out.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)


def _up(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def curl(folder: Path, *arguments: str) -> str:
    """What curl prints; the name leads to this namespace, and the certificate is trusted."""
    resolve = [part for port in (80, 443) for part in ("--resolve", f"{NAME}:{port}:127.0.0.1")]
    return kernelspace.run(("curl", "-sS", "--max-time", "10", "--cacert", f"{folder}/cert.pem", *resolve, *arguments))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the web servers' users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.fixture
def inside(space: kernelspace.Space) -> Iterator[None]:
    """This thread inside a namespace whose loopback interface is up."""
    space.run("ip", "link", "set", "lo", "up")
    with space.entered():
        yield


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("server", ["apache2", "nginx"])
def test_plain_http_ends_at_https(server: str, folder: Path) -> None:
    """With the printed lines a browser ends at the same page over TLS, a POST stays one, and a challenge is answered in the clear."""
    if shutil.which(server) is None or shutil.which("curl") is None:
        pytest.skip(f"{server} or curl is not installed")
    ended = ("-L", "-o", "/dev/null", "-w", "%{url_effective} %{http_code} %{num_redirects}")

    with web_server(server, folder):
        assert curl(folder, "-L", f"http://{NAME}/page") == "the page"
        assert curl(folder, *ended, f"http://{NAME}/page?a=1&b=%20x") == f"https://{NAME}/page?a=1&b=%20x 200 1"
        posted = curl(folder, "-L", "-D", "-", "-o", "/dev/null", "-d", "a=1", f"http://{NAME}/page")
        challenge = curl(folder, "-D", "-", f"http://{NAME}/{TOKEN}")
        split = curl(folder, "-D", "-", "-o", "/dev/null", f"http://{NAME}/%0d%0aLocation:%20evil")

    assert "308 Permanent Redirect" in posted
    assert "X-Method: POST" in posted
    assert challenge.splitlines()[0].split()[1] == "200"
    assert challenge.endswith("token-1.thumbprint")
    assert [line for line in split.splitlines() if line.lower().startswith("location:")] == [
        f"Location: https://{NAME}/%0d%0aLocation:%20evil"
    ]
