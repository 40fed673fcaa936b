"""
Settings as they may be shown: in a log, in an error, by `gpuscope doctor`. Credentials stay out.

Pure functions of one value.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit


def shown_url(url: str) -> str:
    """Return a URL without user, password, query and fragment; less where these cannot be told apart from the rest."""
    unreadable = "a URL that cannot be read"
    try:
        parts = urlsplit(url)
        _ = parts.port  # A password may stand where the port does.
    except ValueError:
        return unreadable
    if "@" in url and "@" not in parts.netloc:
        # A `/`, `?` or `#` in a password, or no scheme: what looks like a host, path or scheme may be a secret.
        return unreadable
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def shown_text(text: str) -> str:
    """Return what was seen in a variable as it may be quoted: not what may be a URL or a pair with a credential."""
    return repr(text) if not any(sign in text for sign in ("@", "://", "=")) else "..."


def shown_setting(name: str, value: Any) -> str:
    """Return a setting as it may be shown: of headers the names alone."""
    if name.endswith("_headers"):
        return f"<{', '.join(value)}>"
    return repr(shown_url(value) if name.endswith("endpoint") else value)
