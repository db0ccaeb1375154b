"""What a web server needs so that plain HTTP ends at HTTPS by itself: `redirect: web-server`. Pure text.

GET and HEAD get 301, everything else 308, so that a POST stays a POST (RFC 9110, 15.4). The host that is named is the one
that the server itself made of the request, without a port. Challenges of a certificate authority (ACME http-01) are left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fwcompiler.resolved import Resolved

APACHE = r"""# Apache: plain HTTP ends at HTTPS. Needs mod_rewrite. Leave no other <VirtualHost *:80> beside it.
<VirtualHost *:80>
    UseCanonicalName Off
    RewriteEngine On
    RewriteCond %{REQUEST_URI} !^/\.well-known/acme-challenge/
    RewriteCond %{REQUEST_METHOD} ^(GET|HEAD)$
    RewriteRule ^ https://%{SERVER_NAME}%{REQUEST_URI} [R=301,L]
    RewriteCond %{REQUEST_URI} !^/\.well-known/acme-challenge/
    RewriteRule ^ https://%{SERVER_NAME}%{REQUEST_URI} [R=308,L]
</VirtualHost>
"""

NGINX = r"""# nginx: plain HTTP ends at HTTPS. Leave no other server on port 80 beside it.
server {
    listen 80 default_server;
    listen [::]:80 default_server;
    location /.well-known/acme-challenge/ {
        root /var/www/html;
    }
    location / {
        if ($request_method ~ ^(GET|HEAD)$) {
            return 301 https://$host$request_uri;
        }
        return 308 https://$host$request_uri;
    }
}
"""


def left_to_web_server(policy: Resolved) -> bool:
    """True where a host has plain HTTP open and nothing of fwc redirects it."""
    return any(s.name == "http" and s.options.responder is None for s in policy.services)


def redirect_files() -> dict[str, str]:
    """By file name, the lines for each web server."""
    return {"http-to-https.apache.conf": APACHE, "http-to-https.nginx.conf": NGINX}
