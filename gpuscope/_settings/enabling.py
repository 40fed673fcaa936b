"""
The settings that a program switches recording on with: those of the environment, changed by keyword arguments.

Looks at the disk, and changes nothing there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gpuscope._settings.shown import shown_path, shown_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope._settings.config import Config

VARIABLES_ONLY = {
    "config_file": "OpenTelemetry's SDK reads that file",
    "mode": "recording is on after this call",
    "startup": "the interpreter has started already",
    "stages": "call `gpuscope.instrument.instrument(stages)` instead",
    "frameworks": "call `gpuscope.instrument.instrument(frameworks=...)` instead",
    "stages_file": "call `gpuscope.instrument.instrument(file=...)` instead",
}
"""Settings that are not keywords, and what to do instead."""
_FILES = ("_certificate", "_client_key")


def to_record(config: Config, settings: Mapping[str, object]) -> Config:
    """
    Return a configuration with some settings changed and recording on.

    Raises:
        TypeError: for a name that is not a setting, or would have no effect here.
        ValueError: for a value that is not allowed, or a `file` that cannot be one.

    """
    # Here, because every program that imports gpuscope imports this module.
    from dataclasses import fields, replace

    from gpuscope._settings.keywords import meant

    given = {each.name: name for name in settings for _, each in meant(fields(config), name)}
    for setting, name in given.items():
        if setting in VARIABLES_ONLY:
            raise TypeError(f"`{name}` is set by its variable only; {VARIABLES_ONLY[setting]}.")
    config = replace(config.changed(**settings), mode="on")
    if "file" in config.exporters:
        _check_file("file", config.file)
    if "flight" in given:
        _check_file(given["flight"], config.flight)
    for setting, name in given.items():
        path = getattr(config, setting)
        if setting.endswith(_FILES) and path and not os.path.exists(path):  # noqa: PTH110 - as below
            raise ValueError(f"`{name}` is {path!r}: there is no such file.")
    return config


def _check_file(name: str, file: str) -> None:
    directory = os.path.dirname(file) or "."  # noqa: PTH120 - `pathlib` costs the import 2 ms
    if not os.path.isdir(directory):  # noqa: PTH112
        raise ValueError(f"`{name}` is {file!r}: there is no directory {directory!r}; create it first.")
    if os.path.isdir(file):  # noqa: PTH112
        raise ValueError(f"`{name}` is {file!r}: that is a directory; name a file in it.")


def description(config: Config) -> str:
    """Return what recording starts with, for the log."""
    where = ", ".join(config.exporters)
    if "otlp" in config.exporters or "auto" in config.exporters:
        where += f" (OTLP: {shown_url(config.traces_url)})"
    if "file" in config.exporters:
        where += f" (file: {shown_path(config.file)})"
    return f"exporter {where}; NVTX {'on' if config.nvtx else 'off'}; queue {config.queue_size}; pid {os.getpid()}."


def places_of(config: Config) -> str:
    """Return where stages go, as far as it is known before the first one: the end of a sentence."""
    collector = f"to {shown_url(config.traces_url)}"
    names = {"file": f"to the file {shown_path(config.file.replace('{pid}', str(os.getpid())))}"}
    if not config.sdk_disabled:
        names |= {"otlp": collector, "sdk": "through the program's TracerProvider"}
        if config.traces_exporter.strip().lower() != "none":
            names["auto"] = f"{collector}, or through the program's TracerProvider if it sets one"
    found = [names[name] for name in config.exporters if name in names]
    return " and ".join(found) or "nowhere; `gpuscope.summary()` has their figures"


def seconds(timeout: object, default: float) -> float:
    """
    Return a time to wait: the default for None.

    Raises:
        TypeError: for what is not a number.

    """
    if timeout is None:
        return default
    if not isinstance(timeout, int | float):
        raise TypeError(f"`timeout` is of type `{type(timeout).__name__}`: expected a number of seconds, or None.")
    return timeout
