"""
Settings as they may be shown: in a log, in an error, by `gpuscope doctor`. Credentials stay out.

Pure functions of one value.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from gpuscope._settings.urls import is_target

_HOST = re.compile(r"(?:[^\[\]%\s=;&\\]+|\[[^\[\]\s]+\](?::\d+)?)")
_PATH = re.compile(r"[\w/.~:+-]*")
"""Of those that are shown. With other signs, a path may hold parameters."""
_PEM = "-----"
_LONGEST_WORD = 40
"""Keys are longer than what settings allow."""


def shown_url(url: str) -> str:
    """Return a URL without user, password, query and fragment; less where these cannot be told apart from the rest."""
    if is_target(url):
        return url
    unreadable = "a URL that cannot be read"
    try:
        parts = urlsplit(url)
        _ = parts.port  # A password may stand where the port does.
    except ValueError:
        return unreadable
    host = parts.netloc.rpartition("@")[2]
    # A `/`, `?` or `#` in a password, an encoded `@`, or no scheme: what looks like a host or a path may be a secret.
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or ("@" in url and "@" not in parts.netloc):
        return unreadable
    return f"{parts.scheme}://{host}{parts.path if _PATH.fullmatch(parts.path) else '/...'}"


def shown_path(path: str) -> str:
    """Return a path as one line of printable text."""
    return path if path.isprintable() else repr(path)


def shown_variable(text: str) -> str:
    """
    Return what is said of the text of a malformed variable: a number is quoted, of anything else the length alone.

    What was meant for another variable may be a credential, and looks like any other word.
    """
    if re.fullmatch(r"[-+]?\d{1,9}(\.\d{1,9})?", text.strip()):
        return text.strip()
    return f"a text of {len(text)} character{'' if len(text) == 1 else 's'}"


def shown_text(value: object) -> str:
    """Return what a program gave as a setting as it may be quoted: not what may be a URL, a secret's pair, or a key."""
    text = str(value)
    may_be_secret = len(text) > _LONGEST_WORD or any(sign in text for sign in ("@", "://", "=", "%"))
    return "..." if may_be_secret and not text.isdigit() else repr(value)


def shown_setting(name: str, value: Any) -> str:
    """Return a setting as it may be shown: of headers the names alone."""
    if name.endswith("_headers"):
        # A name without a value may be the end of one, which commas and padding have cut off.
        return f"<{', '.join(name if text.strip('=') else '...' for name, text in value.items())}>"
    if name.endswith("client_key") and _PEM in value:  # The key where its file was to be named.
        return "..."
    return repr(shown_url(value) if name.endswith("endpoint") else value)
