"""Whether Python's start looks for stages by name: in `gpuscope-startup.pth`, which installing puts in place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME = "gpuscope-startup.pth"
_OFF = ("0", "false", "no", "off")


def seen(switch: str = "1", folders: Iterable[str] = ()) -> tuple[str, str]:
    """
    Return what there is, and what to do about it; the second is empty where all is right.

    Args:
        switch: the value of `GPUSCOPE_STARTUP`.
        folders: where to look for the file; `sys.path` if there are none.

    """
    there = any(Path(folder, NAME).is_file() for folder in folders or sys.path if folder)
    if not there or importlib.util.find_spec("_gpuscope_startup") is None:
        return (
            "its file is not in site-packages, so GPUSCOPE_STAGES works in programs that import gpuscope alone",
            "Install gpuscope again with pip, or start programs by `gpuscope run`.",
        )
    if switch.strip().lower() in _OFF:
        return "switched off by GPUSCOPE_STARTUP", ""
    return "GPUSCOPE_STAGES works in programs that do not import gpuscope", ""
