"""
The files of `integrations/`: found by name, and imported once their framework is imported.

Knows no framework, and imports none to find a file.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._settings.names import perhaps

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

_PACKAGE = "gpuscope.integrations"
_MODULE = re.compile(r'^MODULE = "([\w.]+)"', re.MULTILINE)
_ALSO = re.compile(r'^ALSO = "([\w, ]+)"', re.MULTILINE)
"""Other names that people would try for a file."""


def modules_of(names: Iterable[str]) -> dict[str, str]:
    """
    Return the module of each framework that is named, without importing it; `all` names every framework.

    Raises:
        ValueError: for a name that is not a framework's.

    """
    names = list(names)
    found: dict[str, str] = {}
    known, others = _known() if names else ({}, {})
    for given in names:
        name = others.get(given, given)
        if name != "all" and name not in known:
            meant = perhaps(name, [*known, *others])
            raise ValueError(f"Unknown framework {name!r}: expected one of {', '.join(known)}, or all{meant}.")
        found.update(known if name == "all" else {name: known[name]})
    return found


def _known() -> tuple[dict[str, str], dict[str, str]]:
    """Return the module by the name of its file, and the name of the file by each of its other names."""
    modules, others = {}, {}
    for folder in importlib.import_module(_PACKAGE).__path__:
        for file in pkgutil.iter_modules([folder]):
            # Its text is read, because importing it would import the framework.
            text = Path(folder, f"{file.name}.py").read_text(encoding="utf-8")
            if (match := _MODULE.search(text)) is not None:
                modules[file.name] = match[1]
            if (also := _ALSO.search(text)) is not None:
                others.update(dict.fromkeys(also[1].split(", "), file.name))
    return dict(sorted(modules.items())), others


def load(name: str) -> ModuleType:
    """Import a framework's file."""
    return importlib.import_module(f"{_PACKAGE}.{name}")
