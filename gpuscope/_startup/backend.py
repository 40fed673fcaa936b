"""
Builds the package as setuptools does, and puts the start-up file beside it, in wheels and in editable installs.

The file is one line, which `site` runs at each start of Python. It looks at the environment, and imports nothing unless
a variable of ours is set. Used by `pip` alone, as `pyproject.toml` says.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the other hooks are as they are

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "gpuscope-startup.pth"
LINE = (
    'import os; ("GPUSCOPE" in os.environ or "GPUSCOPE_STAGES" in os.environ) and '
    'exec("try: import _gpuscope_startup\\nexcept Exception: pass")\n'
    # Short, because compiling it is what it costs. What the line raised would be shown at each start of Python.
)


def build_wheel(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel with the start-up file in it; return its name."""
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    _add(Path(wheel_directory, name))
    return name


def build_editable(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Do the same for an editable install."""
    name: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    _add(Path(wheel_directory, name))
    return name


def _add(wheel: Path) -> None:
    """Add the file to a wheel, and to the list of the files in it."""
    content = LINE.encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    new = wheel.with_suffix(".new")
    with ZipFile(wheel) as old, ZipFile(new, "w", ZIP_DEFLATED) as file:
        for item in old.infolist():
            record = f"{NAME},sha256={digest},{len(content)}\n" if item.filename.endswith(".dist-info/RECORD") else ""
            file.writestr(item, old.read(item) + record.encode())
        entry = ZipInfo(NAME)
        entry.external_attr = 0o100644 << 16
        file.writestr(entry, content)
    os.replace(new, wheel)  # noqa: PTH105
