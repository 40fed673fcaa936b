"""
`state`: the recorder that the hot path looks at, and all else that periods of recording share.

Starts nothing and ends nothing; `_runtime` does. Imports neither the lifecycle nor the engine. What else is global
belongs to one module alone, as the current stage does (`hot_path`) and the stages compiled away (`dynamo`).
"""

from __future__ import annotations

import copyreg
import sys
import threading
from types import CodeType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gpuscope._data.native import native
from gpuscope._data.plain.values import snapshot_mapping
from gpuscope._data.record import Site, UnnamedSite

if TYPE_CHECKING:
    import logging
    from collections.abc import Mapping

    from gpuscope._data.record import FromAbove
    from gpuscope._data.statistics import Statistics
    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.complaints import Complaint
    from gpuscope._settings.config import Config

Key = TypeVar("Key")
MAX_NAMED = 5
_MAX_WRAPPERS = 64
MAX_SITES = 2048
"""Stages kept by name. NVTX keeps every name for ever; names with request ids in them must not pile up here as well."""


class Period(Protocol):
    """A period of recording, as whoever finds it here sees it: `_collecting.engine.Engine`."""

    @property
    def config(self) -> Config:
        """Its settings."""

    @property
    def recorder(self) -> Recorder:
        """What the hot path reads while it is on."""

    @property
    def ended(self) -> bool:
        """Whether it records no more."""

    @property
    def summary(self) -> FromAbove:
        """The figures of its stages: `_collecting.aggregation.statistics.StageStatistics`."""

    def statistics(self) -> Statistics:
        """Return the account of this moment."""

    def wait_until_ready(self) -> None:
        """Wait until a collector that has just started has made its exporters."""

    def flush(self, timeout_s: float, *, send: bool = True) -> bool:
        """Have everything recorded so far resolved and, with `send`, exported; return whether that was done in time."""

    def sample(self, *, on: bool) -> None:
        """Ask streams whether they have work, where that is wanted at all, or do so no more."""

    def hand_over(self) -> None:
        """Hand everything recorded so far to the application's providers, before these end."""

    def shutdown(self, timeout_s: float) -> bool:
        """Export what can be exported in time, count the rest as lost, and end."""

    def shutdown_at_exit(self) -> bool:
        """Do so within what is left of the time at the end of the process."""

    def abandon(self) -> None:
        """Do nothing more: this process is the child of a fork."""


if TYPE_CHECKING or native is None:

    class StateFields:
        """What the hot path looks at."""

        __slots__ = ("off_stages", "recorder")
        recorder: Recorder | None
        """None unless recording is on."""
        off_stages: dict[str, FromAbove]
        """What `stage` hands out while nothing is recorded, by name; nothing in it is replaced or taken out."""

else:
    StateFields = native.StateFields


class State(StateFields):
    """What periods of recording share."""

    def __init__(self) -> None:
        self.recorder = None
        self.off_stages = {}
        self.may_toggle = False
        self.sites: dict[str, Site] = {}
        self.set_up_sites: dict[tuple[str, int | None, bool, bool], Site] = {}
        """Those of blocks with a `warmup`, `graph` or `memory` of their own, by name and these three."""
        self.unnamed = UnnamedSite()
        self.left_plain: dict[str, None] = {}
        """Names of functions that were decorated, or named by `instrument`, while gpuscope was off for good."""
        self.engine: Period | None = None
        """The period of recording that is on, or the last one."""
        self.meters: dict[int, FromAbove] = {}
        """The instruments made so far by each MeterProvider of the application."""
        self.environ: dict[str, str] = {}
        self._config: Config | None = None
        self._complaints: list[Complaint] = []
        self._said: set[str] = set()
        """What was warned about in the environment. `gpuscope run` reads it twice."""
        self.lock = threading.RLock()
        self.wanted: Mapping[str, object] | None = None
        """The settings of an `enable` that is not done yet."""
        self.hooked = False
        self.audience: bool | None = None
        """Whether somebody is to be told of start and end: True with `gpuscope run`, False in other commands of ours;
        else it depends on the terminal."""
        self.told = ""
        """What was said of the start."""
        self.said_unwritten = False
        """Whether it was said that a file was named which nobody writes."""
        self.said_outcome = False
        """Whether the end of the program was spoken of."""
        self.reads_headers = False
        """Whether somebody has taken in the headers of a request, for settings that are about those."""
        self.makes_report = False
        """Whether `gpuscope run` makes a report, and so speaks of the files itself."""
        self.is_fork = False
        """Whether this process is the child of a fork."""
        self.forks = 0
        """How many children this process has forked, itself or in `multiprocessing`."""
        self.has_recorded = False
        """Whether a period before this one had a stage."""
        self.look: FromAbove = None
        """The deep look that is on; it takes part in every period of recording."""
        self.instrumentation: FromAbove = None
        """The functions that were made stages by their names, once there are any."""
        self.measures_memory = False
        """Whether a stage has asked for its memory."""
        self.measure: FromAbove = None
        """Has a recorder measure memory, where that is wanted: `_host.memory.attach`."""
        self.graphs: FromAbove = None
        """The hooks that notice captures and launches of CUDA graphs."""

    def __reduce__(self) -> str:
        """Pickle by name: a function that goes to another process by value finds that process's own."""
        return "state"

    @property
    def config(self) -> Config:
        """The settings of the environment as it was at import. They are read, and warned about, when first needed."""
        if self._config is None:
            from gpuscope._settings.config import Config

            self._config, self._complaints = Config.from_env(self.environ)
            for complaint in self._complaints:
                if not complaint.uses and complaint not in self._said:
                    self._said.add(complaint)
                    _logger().warning("%s", complaint)
        return self._config

    def complain(self, use: str, config: Config) -> None:
        """Have the collector warn of variables that matter only where this is in use, and were not overruled."""
        from gpuscope._log import later

        for complaint in self._complaints:
            overruled = any(getattr(config, name) != getattr(self._config, name) for name in complaint.settings)
            if use in complaint.uses and complaint not in self._said and not overruled:
                self._said.add(complaint)
                later("%s", complaint)

    def switch_to(self, recorder: Recorder | None) -> None:
        """Record new stages with this recorder, or none. Blocks made for another ask when they are entered."""
        before, self.recorder = self.recorder, recorder
        if before is not None:
            before.paused = True
        if recorder is not None:
            recorder.paused = False
            if self.measure is not None:
                self.measure(recorder)

    def measure_memory(self) -> None:
        """Have the memory of stages measured that ask for it, from now on."""
        if not self.measures_memory:
            self.measures_memory = True
            if self.recorder is not None and self.measure is not None:
                self.measure(self.recorder)

    def allow_toggling(self) -> None:
        """Have what is decorated from now on be a stage; say, once, what was decorated before and stays plain."""
        if self.may_toggle:
            return
        self.may_toggle = True
        self.off_stages = {}
        if self.left_plain:
            names = [*self.left_plain]
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            _logger().warning(
                "%s%s will not be recorded: decorated or named while gpuscope was off for good. Set GPUSCOPE=idle or "
                "GPUSCOPE=1, or call `enable()` before that.",
                ", ".join(f"`{name}`" for name in names[:MAX_NAMED]),
                more,
            )
            self.left_plain.clear()

    @property
    def has_launched(self) -> bool:
        """Whether this process leaves its work to others: it has forked, or `multiprocessing` has started some."""
        return self.forks > 0 or any(name.startswith("multiprocessing.popen_") for name in list(sys.modules))

    def count_fork(self) -> None:
        """Note that this process has forked a child."""
        self.forks += 1

    def begin_anew(self, environ: dict[str, str]) -> None:
        """Take another environment. Its settings are read when they are first needed."""
        self.environ, self._config = environ, None


state = State()


def _site_again(warmup: int | None, graph: bool, memory: bool, *facts: Any) -> Site:
    site = Site(*facts)
    site.warmup, site.graph, site.memory = warmup, graph, memory
    return site


# A function that goes to another process by value takes along what was said of its stage, and nothing of what was
# counted or prepared here.
copyreg.pickle(
    Site,
    lambda site: (
        _site_again,
        (site.warmup, site.graph, site.memory, site.name, site.attributes, site.function, site.code),
    ),
)


def _logger() -> logging.Logger:
    from gpuscope._log import logger

    return logger


def site_of(name: str, warmup: int | None = None, *, graph: bool = True, memory: bool = False) -> Site:
    """Return the stage of this name and these settings for `with` blocks, made on first use."""
    if warmup is None and graph and not memory:
        return _kept(state.sites, name, name)
    # A block's own settings belong to it alone. Its calls are counted, and warmed up, apart from those of plain blocks.
    site = _kept(state.set_up_sites, (name, warmup, graph, memory), name)
    site.warmup, site.graph, site.memory = warmup, graph, memory
    return site


def site_of_function(function: object, name: str | None, attributes: Mapping[str, object] | None) -> Site:
    """Return a new stage for a function, or another object that can be called; by default under its own name."""
    has_name = hasattr(function, "__qualname__")
    named: Any = function if has_name else type(function)
    module = getattr(function, "__module__", None) or type(function).__module__
    name = name or named.__qualname__.rpartition("<locals>.")[2]
    own = {} if attributes is None else snapshot_mapping(attributes)
    # An object goes by the name of its class, whose `__call__` may come from elsewhere: `nn.Module`'s, say.
    return Site(name, own, f"{module}.{named.__qualname__}", _code_of(function) if has_name else None)


def _code_of(function: object) -> tuple[str, int] | None:
    """Return the file and the first line of the function that gave its name to those around it; None if not Python."""
    for _ in range(_MAX_WRAPPERS):
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    code = getattr(function, "__code__", None)
    return (code.co_filename, code.co_firstlineno) if type(code) is CodeType else None


def _kept(sites: dict[Key, Site], key: Key, name: str) -> Site:
    """Return what is kept under a key; beyond the limit it is made for this once."""
    site = sites.get(key) or Site(name, {})
    if len(sites) < MAX_SITES:
        return sites.setdefault(key, site)
    if len(sites) == MAX_SITES and key not in sites:
        sites[key] = site
        from gpuscope._log import later  # It is there, because something is recorded.

        later("more than %d stage names; put what varies (ids of requests) into attributes.", MAX_SITES)
    return site
