"""
`state`: the recorder that the hot path looks at, and all else that periods of recording share.

Starts nothing and ends nothing; `_runtime` does. Imports neither the lifecycle nor the engine. What else is global
belongs to one module alone, as the current stage does (`hot_path`) and the stages compiled away (`dynamo`).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from gpuscope._data.record import Site, UnnamedSite

if TYPE_CHECKING:
    import logging

    from gpuscope._data.record import FromAbove
    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config

MAX_SITES = 2048
"""Stages kept by name. NVTX keeps every name for ever; names with request ids in them must not pile up here as well."""


class State:
    """What periods of recording share. `recorder` is what the hot path looks at: None unless recording is on."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.may_toggle = False
        self.sites: dict[str, Site] = {}
        self.off_stages: dict[str, FromAbove] = {}
        """What `stage` hands out while nothing is recorded, by name."""
        self.unnamed = UnnamedSite()
        self.engine: FromAbove = None
        """The period of recording that is on, or the last one."""
        self.meters: dict[int, FromAbove] = {}
        """The instruments made so far by each MeterProvider of the application."""
        self.environ: dict[str, str] = {}
        self._config: Config | None = None
        self.lock = threading.RLock()
        self.hooked = False
        self.look: FromAbove = None
        """The deep look that is on; it takes part in every period of recording."""
        self.instrumentation: FromAbove = None
        """The functions that were made stages by their names, once there are any."""
        self.graphs: FromAbove = None
        """The hooks that notice captures and launches of CUDA graphs."""

    @property
    def config(self) -> Config:
        """The settings of the environment as it was at import. They are read, and warned about, when first needed."""
        if self._config is None:
            from gpuscope._settings.config import Config

            self._config, warnings = Config.from_env(self.environ)
            for warning in warnings:
                _logger().warning("%s", warning)
        return self._config

    def begin_anew(self, environ: dict[str, str]) -> None:
        """Take another environment. Its settings are read when they are first needed."""
        self.environ, self._config = environ, None


state = State()


def _logger() -> logging.Logger:
    from gpuscope._log import logger

    return logger


def new_site(name: str) -> Site:
    """Return the stage of this name for `with` blocks, made on first use."""
    if len(state.sites) < MAX_SITES:
        return state.sites.setdefault(name, Site(name, {}))
    if len(state.sites) == MAX_SITES:
        state.sites.setdefault(name, Site(name, {}))
        _logger().warning("more than %d stage names; put what varies (ids of requests) into attributes.", MAX_SITES)
    return Site(name, {})
