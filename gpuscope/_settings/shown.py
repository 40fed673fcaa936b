"""
Settings as they may be shown: in a log, in an error, by `gpuscope doctor`. Credentials stay out.

Pure functions of one value.
"""

from __future__ import annotations

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
