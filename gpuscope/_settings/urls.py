"""
URLs of endpoints and proxies: whether one can be used, and if not, what is wrong with it.

Never quotes one: it may hold a credential.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

SCHEMES = ("http", "https")
USUAL_ENDPOINT, _USUAL_OF_GRPC = "http://localhost:4318", "http://localhost:4317"
_NOT_IN_A_HOST = re.compile(r"[\x00-\x20\x7f-\xa0\"'%<>\\^`{|}]")
_MOST_OF_A_LABEL = 63


def split_url(url: str) -> SplitResult:
    """
    Return the parts of a URL that can be posted to.

    Raises:
        ValueError: with what is wrong, to follow the words "the URL".

    """
    if not url.lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise ValueError("does not begin with http:// or https://")
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


def signal_url(base: str, path: str, protocol: str) -> str:
    """Return where spans or metrics go: a URL of gRPC has no path, and its usual port is another."""
    if protocol == "grpc":
        return _USUAL_OF_GRPC if base == USUAL_ENDPOINT else base
    return base.rstrip("/") + path
