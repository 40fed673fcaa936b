"""
The HTML timeline: a recording as one file that opens in a browser, from disk, with no network.

Puts the page together and writes it. `_viewers.timeline_data` decides what the page is told, and `assets` how it looks.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope.analysis._viewers.timeline_data import timeline_data
from gpuscope.analysis.verdict import judge

if TYPE_CHECKING:
    import os

    from gpuscope.analysis._plain import HasPlainData, Plain
    from gpuscope.analysis._verdicts.findings import Findings
    from gpuscope.analysis.figures import Figures
    from gpuscope.analysis.recording import Recording

SCRIPTS = "format model view palette track marks picture panels pickers tables verdicts answers missing input main"
"""Files of `assets` which, in this order, are one script."""


def write_html(
    recording: Recording,
    path: str | os.PathLike[str],
    findings: HasPlainData | None = None,
    *,
    figures: Figures | None = None,
) -> None:
    """
    Write the timeline of a recording.

    Args:
        recording: What to show; an empty one becomes a page that says so.
        path: The file, replaced if it exists.
        findings: The verdicts: `judge(recording)`, or anything with such an `as_dict()`. Without them, the page says
            that nothing was judged.
        figures: The recording's figures, if they have been computed already.

    Raises:
        OSError: The file cannot be written.

    """
    Path(path).write_text(render(recording, findings, figures), encoding="utf-8")


class Timeline:
    """
    A timeline that a notebook draws, with the answers of the verdicts on top; printed, it is the answers alone.

    Args:
        recording: What to show.
        findings: The verdicts, or None to judge here.
        height: Of the drawing, in pixels.

    """

    def __init__(self, recording: Recording, findings: Findings | None = None, *, height: int = 720) -> None:
        self.recording = recording
        self.findings = judge(recording) if findings is None else findings
        self.height = height

    def __repr__(self) -> str:
        return "\n".join(self.findings.summary())

    def _repr_html_(self) -> str:
        # In a frame of its own, whose script can reach nothing of the notebook.
        style = f"width:100%;height:{int(self.height)}px;border:0"
        page = html.escape(render(self.recording, self.findings), quote=True)
        return f'<iframe sandbox="allow-scripts allow-modals" style="{style}" srcdoc="{page}"></iframe>'


def render(recording: Recording, findings: HasPlainData | None = None, figures: Figures | None = None) -> str:
    """Return the page as HTML. The arguments are those of `write_html`."""
    data = _inert(timeline_data(recording, None if findings is None else findings.as_dict(), figures))
    style, script = _asset("timeline.css"), "".join(_asset(f"{name}.js") for name in SCRIPTS.split())
    parts = {"policy": _policy(style, script), "style": style, "data": data, "script": script}
    # Split once, so that a part which happens to contain such a mark is left as it is.
    head, *rest = _asset("timeline.html").split("<!--gpuscope:")
    return head + "".join(parts[mark] + text for mark, text in (each.split("-->", 1) for each in rest))


def _inert(data: dict[str, Plain]) -> str:
    """Return JSON in which HTML sees neither tags nor entities: a stage may be named `</script>`."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(style: str, script: str) -> str:
    """Return a content security policy that lets the browser run our script and load nothing."""
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (files("gpuscope.analysis") / "assets" / name).read_text(encoding="utf-8")
