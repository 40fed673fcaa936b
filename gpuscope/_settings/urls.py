"""
URLs of endpoints and proxies: whether one can be used, and if not, what is wrong with it.

Never quotes one: it may hold a credential.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMES = ("http", "https")
_TARGET = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")
USUAL_ENDPOINT, _USUAL_OF_GRPC = "http://localhost:4318", "http://localhost:4317"
NO_SCHEME = "does not begin with http:// or https://"
_PROTOCOLS = {
    "otlp_endpoint": ("otlp_protocol",),
    "otlp_metrics_endpoint": ("otlp_metrics_protocol",),
    "otlp_base_endpoint": ("otlp_protocol", "otlp_metrics_protocol"),
}
"""By the settings of endpoints: those of the protocols that they may be for."""
_NOT_IN_A_HOST = re.compile(r"[\x00-\x20\x7f-\xa0\"'%<>\\^`{|}]")
_MOST_OF_A_LABEL = 63


def split_url(url: str) -> SplitResult:
    """
    Return the parts of a URL that can be posted to.

    Raises:
        ValueError: with what is wrong, to follow the words "the URL".

    """
    if not url.lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise ValueError(NO_SCHEME)
    # `urlsplit` leaves out line ends and tabs, and so would hide them.
    if re.search(r"[\x00-\x1f\x7f]", url):
        raise ValueError("has a control character in it")
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        raise ValueError("has brackets that are not around an IPv6 address") from None
    try:
        bad_port = parts.port == 0
    except ValueError:
        bad_port = True
    if not host:
        raise ValueError("has no host")
    if bad_port:
        raise ValueError("has a port that is not a number from 1 to 65535")
    if not _is_host(host):
        raise ValueError("has a host that is not a name or an address")
    return parts


def _is_host(host: str) -> bool:
    if ":" in host:  # An IPv6 address, which `urlsplit` has looked at; an interface may follow the `%`.
        return not _NOT_IN_A_HOST.search(host.partition("%")[0])
    labels = host.removesuffix(".").split(".")
    return not _NOT_IN_A_HOST.search(host) and all(0 < len(label) <= _MOST_OF_A_LABEL for label in labels)


def is_target(url: str) -> bool:
    """Tell whether this is a host and its port with nothing around them, as gRPC takes them."""
    return bool(_TARGET.fullmatch(url))


def without_a_scheme(value_of: Callable[[str], object]) -> list[str]:
    """Return the settings of endpoints that are a host and its port, and are for HTTP, which needs a URL."""
    return [
        name
        for name, protocols in _PROTOCOLS.items()
        if is_target(str(value_of(name))) and all(value_of(protocol) != "grpc" for protocol in protocols)
    ]


def with_scheme(url: str, *, insecure: bool) -> str:
    """Return an endpoint of gRPC's as a URL; by OpenTelemetry's rule one without a scheme has TLS."""
    return f"{'http' if insecure else 'https'}://{url}" if is_target(url) else url


def signal_url(own: str, base: str, path: str, *, protocol: str, insecure: bool) -> str:
    """Return where spans or metrics go: a URL of gRPC has no path, and its usual port is another."""
    if own:
        return with_scheme(own, insecure=insecure) if protocol == "grpc" else own
    base = _USUAL_OF_GRPC if protocol == "grpc" and base == USUAL_ENDPOINT else with_scheme(base, insecure=insecure)
    return base if protocol == "grpc" else base.rstrip("/") + path
