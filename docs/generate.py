"""
Writes the pages that are made of the code: `settings.md` and those of the API.

`python docs/generate.py` writes them; a test compares them with what is there.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpuscope
import gpuscope.instrument
import gpuscope.testing
from gpuscope._settings.config import Config
from gpuscope._settings.enabling import VARIABLES_ONLY

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
HELPERS = ("DoubleBuffer", "PinnedBuffer", "PinnedPool", "PoolExhaustedError", "measure", "overlap", "warm_up")
MADE = "<!-- Made by docs/generate.py: change the code, not this page. -->\n"
SETTINGS = """# Settings

Each setting is a variable of the environment, and most are a keyword of `gpuscope.enable(...)`, too. A keyword wins
over its variable. Where several variables stand in a line, the first that is set counts. A variable that cannot be
understood is said once, and its default holds. A keyword that cannot be understood raises. `enable` takes both
spellings: `enable(exporters="file")` and `enable(GPUSCOPE_EXPORTER="file")` are one. By its variable's name a setting
has the variable's unit.

| variable | keyword | default | meaning |
|---|---|---|---|
"""


def settings() -> str:
    """The page of settings."""
    lines = []
    for setting in dataclasses.fields(Config):
        names = ", ".join(f"`{variable}`" for variable in setting.metadata["variables"])
        keyword = "" if setting.name in VARIABLES_ONLY else f"`{setting.name}`"
        lines.append(f"| {names} | {keyword} | {setting.metadata['shown']} | {setting.metadata['text']} |")
    return MADE + SETTINGS + "\n".join(lines) + "\n"


def api() -> str:
    """What is imported as `gpuscope`, without the helpers."""
    names = [name for name in gpuscope.__all__ if name[0] != "_" and name not in HELPERS]
    head = "# API\n\nOverlap, pinned memory, measuring: [helpers](api-helpers.md). Tests, stages by name: "
    head += "[modules](api-modules.md). Prose: [stages](stages.md).\n"
    return MADE + head + "".join(_entries(gpuscope, names))


def helpers() -> str:
    """The helpers that are imported as `gpuscope`, too."""
    head = (
        "# API of the helpers\n\nThe rest: [API](api.md). Prose: [overlap and pinned memory](overlap-and-pinned.md).\n"
    )
    return MADE + head + "".join(_entries(gpuscope, HELPERS))


def modules() -> str:
    """The public names of modules of their own."""
    head = "# API of `gpuscope.testing` and `gpuscope.instrument`\n\nThe rest: [API](api.md).\n"
    named = [(module, sorted(module.__all__)) for module in (gpuscope.testing, gpuscope.instrument)]
    return MADE + head + "".join(entry for module, names in named for entry in _entries(module, names))


def _entries(module: Any, names: Any) -> Iterator[str]:
    for name in names:
        thing = getattr(module, name)
        yield f"\n## `{module.__name__}.{name}{_signature(thing)}`\n\n{_markdown(inspect.getdoc(thing) or '')}\n"
        if isinstance(thing, type):
            yield from _members(thing)


def _members(kind: type) -> Iterator[str]:
    rows = []
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name[0] == "_" or not inspect.isfunction(function):
            continue
        shown = name if isinstance(member, property) else name + _signature(function)
        first = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(f"* `{shown}`: {first}\n")
    if rows:
        yield "\n" + "".join(rows)


def _signature(thing: Any) -> str:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _markdown(text: str) -> str:
    """Google's sections become a line in bold, and those of names a list; the rest is Markdown already."""
    parts = re.split(r"^(Args|Raises|Returns|Yields|Attributes|Examples):\n", text, flags=re.MULTILINE)
    lines = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        inside = textwrap.dedent(body).strip()
        if title in ("Args", "Raises", "Attributes"):
            inside = re.sub(r"^(\*{0,2}\w[\w, .]*): ", r"* `\1`: ", inside, flags=re.MULTILINE)
            inside = re.sub(r"^    ", "  ", inside, flags=re.MULTILINE)
        lines.append(f"**{title}**\n\n{inside}")
    return "\n\n".join(lines)


PAGES = {"settings.md": settings, "api.md": api, "api-helpers.md": helpers, "api-modules.md": modules}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
