"""
The lifecycle: on, off, flush, shutdown, fork, exit.

Keeps nothing itself: what is global is `state`, below. Imports the engine, and so numpy, only when recording starts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

from gpuscope._multiprocessing import finish_in_children
from gpuscope._recording.dynamo import elisions
from gpuscope._recording.state import state
from gpuscope._settings.environment import is_off, variables
from gpuscope._settings.shown import shown_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuscope._collecting.aggregation.summary import Summary
    from gpuscope._collecting.engine import Engine
    from gpuscope._data.statistics import Statistics
    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config

_CATCH_UP_S = 1.0


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
    from gpuscope._collecting.engine import Engine

    with state.lock:
        engine = state.engine = Engine(
            config, on_provider=_be_first_at_exit, on_pass=_on_pass(config), meters=state.meters, **parts
        )
        if state.look is not None:
            state.look.attach(engine.recorder)
        state.recorder = engine.recorder
        if config.graph_stages:
            from gpuscope._cuda.graphs.hooks import GraphHooks

            state.graphs = state.graphs or GraphHooks(lambda: state.recorder)
            state.graphs.install(config.queue_size)
        _hook_exit_and_fork()
    from gpuscope._log import logger

    logger.info("recording starts: %s", _description(config))
    elisions.listen()
    return engine


def _on_pass(config: Config) -> Callable[[Recorder], None] | None:
    """Return what the collector does once per pass: look whether a deep look is asked for."""
    if not config.profile:
        return None
    from gpuscope._profiling.on_demand import OnDemand

    return OnDemand(config.profile).poll


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
        where += f" (OTLP: {shown_url(config.traces_url)})"
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


def reset() -> None:
    """Shut down and forget what was recorded: for tests."""
    shutdown()
    state.engine = None
    state.sites.clear()


def statistics() -> Statistics:
    """Return what became of every stage of this period of recording, or of the last."""
    from gpuscope._recording.ledger import Ledger

    engine: Engine | None = state.engine
    if engine is None:
        return Ledger().statistics()
    return engine.statistics()


def summary() -> Summary:
    """
    Return count, host and GPU percentiles, launch delay and share of the request, by stage; print it for a table.

    Waits up to a second for the collector to catch up with what has ended, GPU work included; sends nothing.
    """
    from gpuscope._collecting.aggregation.statistics import StageStatistics

    engine: Engine | None = state.engine
    if engine is None:
        return StageStatistics().summary()
    engine.flush(_CATCH_UP_S, send=False)
    return engine.summary.summary()


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
    state.begin_anew(variables())
    if is_off(state.environ):
        return False
    config = state.config
    state.may_toggle = config.mode != "absent"
    if config.mode == "on":
        start(config)
    return state.may_toggle and bool(config.stages or config.stages_file or config.frameworks)
