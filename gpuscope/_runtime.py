"""
The global state department: on, off, flush, shutdown, fork, exit.

All mutable module state of the package is `state`, here. Imports the engine, and so numpy, only when recording starts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

from gpuscope._children import finish_in_children
from gpuscope._environment import is_off, variables
from gpuscope._record import Site, Unnamed
from gpuscope._tracing import elisions

if TYPE_CHECKING:
    import logging
    from collections.abc import Iterator

    from gpuscope._config import Config
    from gpuscope._engine import Engine, Recorder
    from gpuscope._ledger import Statistics
    from gpuscope.analysis.summary import Summary

_CATCH_UP_S = 1.0
MAX_SITES = 2048
"""Stages kept by name: NVTX keeps every name for ever, so names with request ids in them must not pile up here too."""


class State:
    """What is global. `recorder` is what the hot path looks at: None unless recording is on."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.may_toggle = False
        self.sites: dict[str, Site] = {}
        self.off_stages: dict[str, Any] = {}
        self.unnamed = Unnamed()
        self.engine: Engine | None = None
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

    def reset(self) -> None:
        """Shut down and forget what was recorded: for tests."""
        shutdown()
        self.engine = None
        self.sites.clear()

    @property
    def config(self) -> Config:
        """The settings of the environment as it was at import; read, and complained of, when first needed."""
        if self._config is None:
            from gpuscope._config import Config

            self._config, complaints = Config.from_env(self.environ)
            for complaint in complaints:
                _logger().warning("%s", complaint)
        return self._config


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


def enable(**settings: Any) -> None:
    """
    Start or resume recording.

    Functions decorated while gpuscope was off for good (`GPUSCOPE` unset or 0) are not affected; those decorated
    with `GPUSCOPE=idle`, or after this call, are.

    Args:
        settings: fields of `Config`, e.g. `exporters="file"`, `file="spans.jsonl"`. What is left out comes from the
            environment as it was when gpuscope was imported. If they differ from those in use, what was recorded is
            exported and a new period begins.

    Raises:
        TypeError: for a name that is not a setting.
        ValueError: for a value that is not allowed.

    """
    config = state.config.changed(**{**settings, "mode": "on"})
    directory = os.path.dirname(config.file) or "."  # noqa: PTH120 - `pathlib` costs the import 2 ms
    if "file" in config.exporters and not os.path.isdir(directory):  # noqa: PTH112
        raise ValueError(f"`file` is {config.file!r}: there is no directory {directory!r}; create it first.")
    with state.lock:
        engine = state.engine
        if engine is None or engine.ended or (settings and engine.config != config):
            if engine is not None:
                engine.shutdown(engine.config.shutdown_timeout_s)
            start(config)
        elif state.recorder is None:
            state.recorder = engine.recorder
        if not state.may_toggle:
            state.may_toggle = True
            state.off_stages.clear()


def start(config: Config, **parts: Any) -> Engine:
    """Begin a new period of recording. `parts` are the engine's: a device, clocks, more exporters."""
    from gpuscope._engine import Engine

    with state.lock:
        state.engine = Engine(config, on_provider=_be_first_at_exit, meters=state.meters, **parts)
        if state.look is not None:
            state.look.attach(state.engine.recorder)
        state.recorder = state.engine.recorder
        if config.graph_stages:
            from gpuscope._graph_hooks import GraphHooks

            state.graphs = state.graphs or GraphHooks(lambda: state.recorder)
            state.graphs.install(config.queue_size)
        _hook_exit_and_fork()
    _logger().info("recording starts: %s", _description(config))
    elisions.listen()
    return state.engine


@contextlib.contextmanager
def period(config: Config, **parts: Any) -> Iterator[Engine]:
    """Record for the length of a block with an engine of its own, and put back what was before."""
    with state.lock:
        before = (state.engine, state.recorder, state.may_toggle)
        engine = start(config, **parts)
        state.may_toggle = True
    try:
        yield engine
    finally:
        engine.shutdown(config.shutdown_timeout_s)
        state.engine, state.recorder, state.may_toggle = before


def _description(config: Config) -> str:
    where = ", ".join(config.exporters)
    if "otlp" in config.exporters or "auto" in config.exporters:
        where += f" (OTLP: {config.traces_url})"
    if "file" in config.exporters:
        where += f" (file: {config.file})"
    return f"exporter {where}; NVTX {'on' if config.nvtx else 'off'}; queue {config.queue_size}; pid {os.getpid()}."


def disable() -> None:
    """Stop recording new stages; those in progress are still exported. `enable()` resumes."""
    state.recorder = None


def is_enabled() -> bool:
    """Tell whether stages are being recorded."""
    return state.recorder is not None


def flush(timeout: float | None = None) -> bool:
    """
    Have every stage that has ended exported.

    Args:
        timeout: seconds; by default `GPUSCOPE_SHUTDOWN_TIMEOUT`.

    Returns:
        Whether that was done in time.

    """
    engine = state.engine
    return engine is None or engine.flush(engine.config.shutdown_timeout_s if timeout is None else timeout)


def shutdown(timeout: float | None = None) -> bool:
    """
    Stop recording, export what can be exported, and end gpuscope's threads.

    Called at exit by itself. The application's own TracerProvider is left alone.

    Args:
        timeout: seconds; by default `GPUSCOPE_SHUTDOWN_TIMEOUT`.

    Returns:
        Whether everything was exported in time.

    """
    state.recorder = None
    engine = state.engine
    return engine is None or engine.shutdown(engine.config.shutdown_timeout_s if timeout is None else timeout)


def statistics() -> Statistics:
    """Return what became of every stage of this period of recording, or of the last."""
    from gpuscope._ledger import Ledger
    from gpuscope._queue import RecordQueue

    if state.engine is None:
        return Ledger().statistics(RecordQueue(0), None, ())
    return state.engine.statistics()


def summary() -> Summary:
    """
    Return count, host and GPU percentiles, launch delay and share of the request, by stage; print it for a table.

    Waits up to a second for the collector to catch up with what has ended, GPU work included; sends nothing.
    """
    from gpuscope.analysis._statistics import StageStatistics

    if state.engine is None:
        return StageStatistics().summary()
    state.engine.flush(_CATCH_UP_S, send=False)
    return state.engine.summary.summary()


def _be_first_at_exit() -> None:
    # Handlers run last in, first out, and a provider registers its own when it is made: ours has to come before.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)


def _at_exit() -> None:
    shutdown()


def _before_the_end() -> None:
    _finish_set_up()
    # Whatever provider the program made in its last moments: this handler is the newest now, and runs first.
    _be_first_at_exit()


def _finish_set_up() -> None:
    if state.engine is not None:
        state.engine.wait_until_ready()


def _hook_exit_and_fork() -> None:
    if not state.hooked:
        state.hooked = True
        atexit.register(_at_exit)
        # Before handlers of `atexit` run, the end of the interpreter forbids thread pools and some imports, which a
        # collector started a moment ago still needs. Handlers of this kind run last in, first out as well, so the
        # pools' own has to be there first. Private, and only of use to programs of a few milliseconds.
        import concurrent.futures.thread  # noqa: F401

        getattr(threading, "_register_atexit", lambda _: None)(_before_the_end)
        if hasattr(os, "register_at_fork"):
            # A child forked while the collector imports would find those modules' locks taken for ever.
            os.register_at_fork(before=_finish_set_up, after_in_child=_after_fork_in_child)
        finish_in_children(_at_exit)


def _after_fork_in_child() -> None:
    """Begin anew: the parent's stages, threads, locks, connections and CUDA events are the parent's."""
    engine, was_on = state.engine, state.recorder is not None
    state.lock = threading.RLock()
    state.look = None
    for instruments in state.meters.values():
        instruments.forget()
    if engine is None or engine.ended:
        return
    engine.abandon()
    start(engine.config)
    if not was_on:
        state.recorder = None
    _be_first_at_exit()
    finish_in_children(_at_exit)


def set_up() -> bool:
    """Do as the environment says, at import and again by `gpuscope run`; tell whether it names functions as stages."""
    state.environ, state._config = variables(), None
    if is_off(state.environ):
        return False
    config = state.config
    state.may_toggle = config.mode != "absent"
    if config.mode == "on":
        start(config)
    return state.may_toggle and bool(config.stages or config.stages_file or config.frameworks)
