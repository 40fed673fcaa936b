"""
The HTML timeline: a recording as one file that opens in a browser, from disk, with no network.

Writes the page and nothing else; what the page is told is `_viewers.timeline_data`'s, how it looks is in `assets`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuscope.analysis._viewers.timeline_data import timeline_data

if TYPE_CHECKING:
    import os

    from gpuscope.analysis.figures import Figures
    from gpuscope.analysis.recording import Recording

SCRIPTS = "format model view palette track marks picture panels pickers tables verdicts missing input main"
"""Files of `assets`: in this order they are one script."""


def write_html(
    recording: Recording, path: str | os.PathLike[str], findings: Any = None, *, figures: Figures | None = None
) -> None:
    """
    Write the timeline of a recording.

    Args:
        recording: What to show; an empty one becomes a page that says so.
        path: The file, replaced if it exists.
        findings: The verdicts, anything with `as_dict()`, or None: then the page says that nothing was judged.
        figures: The recording's figures, if somebody has computed them already.

    Raises:
        OSError: The file cannot be written.

    """
    Path(path).write_text(render(recording, findings, figures), encoding="utf-8")


def render(recording: Recording, findings: Any = None, figures: Figures | None = None) -> str:
    """Return the page."""
    data = _inert(timeline_data(recording, None if findings is None else findings.as_dict(), figures))
    style, script = _asset("timeline.css"), "".join(_asset(f"{name}.js") for name in SCRIPTS.split())
    parts = {"policy": _policy(style, script), "style": style, "data": data, "script": script}
    # Split once: what a part contains is never looked at for the marks of others.
    head, *rest = _asset("timeline.html").split("<!--gpuscope:")
    return head + "".join(parts[mark] + text for mark, text in (each.split("-->", 1) for each in rest))


def _inert(data: dict[str, Any]) -> str:
    """Return JSON that no name in it can leave, be it `</script>`: HTML sees neither tags nor entities in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(style: str, script: str) -> str:
    """Return a content security policy by which the browser runs our script, and loads nothing from anywhere."""
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (files("gpuscope.analysis") / "assets" / name).read_text(encoding="utf-8")
