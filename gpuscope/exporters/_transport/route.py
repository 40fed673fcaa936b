"""
The way to an endpoint: its host, or the proxy that the environment names, and what has to be said there.

The environment is read once, when the route is found. Connects to nothing.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote
from urllib.request import getproxies, proxy_bypass

from gpuscope._settings.urls import split_url

if TYPE_CHECKING:
    from collections.abc import Mapping
    from urllib.parse import SplitResult

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Whom to connect to, and what to ask for there."""

    host: str
    port: int
    tls: bool
    """Whether TLS begins with the connection, or after the tunnel where there is one."""
    target: str = field(repr=False)
    """Of the request: the path with its query, or the whole URL for a proxy."""
    headers: Mapping[str, str] = field(repr=False)
    tunnel: tuple[str, int] | None = None
    """What the proxy is to connect us to."""
    tunnel_headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def find_route(url: str) -> Route:
    """
    Return the way to a URL.

    Raises:
        ValueError: where it, or the URL of the proxy, is not one that can be used. Quotes neither.

    """
    parts = _split(url, "the endpoint's URL")
    host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (f"?{_quoted(parts.query)}" if parts.query else "")
    headers = _authorization("authorization", parts)
    proxy = _proxy_for(parts)
    if proxy is None:
        return Route(host=host, port=port, tls=parts.scheme == "https", target=path, headers=headers)
    by = _split(proxy if "://" in proxy else f"http://{proxy}", "the URL of the environment's proxy")
    to_proxy = str(by.hostname), by.port or _PORTS[by.scheme]
    asked = _authorization("proxy-authorization", by)
    if parts.scheme == "http":
        # The host as it was written, without the user: the proxy and the header `Host` want the same.
        whole = f"http://{parts.netloc.rpartition('@')[2]}{path}"
        return Route(
            host=to_proxy[0], port=to_proxy[1], tls=by.scheme == "https", target=whole, headers={**headers, **asked}
        )
    if by.scheme == "https":
        raise ValueError("a proxy that is itself reached by TLS cannot be used for an https:// endpoint")
    return Route(
        host=to_proxy[0],
        port=to_proxy[1],
        tls=True,
        target=path,
        headers=headers,
        tunnel=(host, port),
        tunnel_headers=asked,
    )


def _split(url: str, what: str) -> SplitResult:
    try:
        return split_url(url)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from None


def _quoted(query: str) -> str:
    return quote(query, safe="/%:@!$&'()*+,;=~-._?")


def _authorization(header: str, parts: SplitResult) -> dict[str, str]:
    """Return user and password of a URL as a header."""
    if not parts.username and not parts.password:
        return {}
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
    return {header: f"Basic {base64.b64encode(pair).decode()}"}


def _proxy_for(parts: SplitResult) -> str | None:
    proxies, host = getproxies(), str(parts.hostname)
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    around = host if parts.port is None else f"{host}:{parts.port}"
    if not proxy or proxy_bypass(around) or _is_in_networks(host, proxies.get("no", "")):
        return None
    return proxy


def _is_in_networks(host: str, text: str) -> bool:
    """Whether a host's address lies in one of the networks, such as 10.0.0.0/8, that `NO_PROXY` may hold."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for part in filter(None, re.split(r"[,\s]+", text)):
        try:
            if address in ipaddress.ip_network(part, strict=False):
                return True
        except ValueError:
            continue
    return False
