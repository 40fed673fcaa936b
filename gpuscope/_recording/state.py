"""
`state`: what is global in the package, and what the hot path asks, whether anything is recorded.

Starts nothing and ends nothing; `_runtime` does. Imports neither the lifecycle nor the engine.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from gpuscope._data.record import Site, UnnamedSite

if TYPE_CHECKING:
    import logging

    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config

MAX_SITES = 2048
"""Stages kept by name: NVTX keeps every name for ever, so names with request ids in them must not pile up here too."""


class State:
    """What is global. `recorder` is what the hot path looks at: None unless recording is on."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.may_toggle = False
        self.sites: dict[str, Site] = {}
        self.off_stages: dict[str, Any] = {}
        self.unnamed = UnnamedSite()
        self.engine: Any = None
        """The period of recording that is on, or the last one. `Any`: the engine is built on this module."""
        self.meters: dict[Any, Any] = {}
        self.environ: dict[str, str] = {}
        self._config: Config | None = None
        self.lock = threading.RLock()
        self.hooked = False
        self.look: Any = None
        """The deep look that is on, which takes part in every period of recording."""
        self.instrumentation: Any = None
        """The functions that were made stages by their names, once there are any."""
        self.graphs: Any = None
        """What takes notice of CUDA graphs."""

    @property
    def config(self) -> Config:
        """The settings of the environment as it was at import; read, and complained of, when first needed."""
        if self._config is None:
            from gpuscope._settings.config import Config

            self._config, complaints = Config.from_env(self.environ)
            for complaint in complaints:
                _logger().warning("%s", complaint)
        return self._config

    def begin_anew(self, environ: dict[str, str]) -> None:
        """Take another environment; its settings are read when they are first needed."""
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
        _logger().warning("more than %d stage names; put what varies into attributes instead.", MAX_SITES)
    return Site(name, {})
