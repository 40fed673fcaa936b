"""
The lifecycle: on, off, flush, shutdown, fork, exit.

Keeps nothing itself; what is global is `_recording.state`. Imports the engine, and so numpy, only when recording starts
or somebody asks for a summary.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypedDict, cast

from gpuscope import _exits
from gpuscope._data.plain.values import shown
from gpuscope._multiprocessing import finish_in_children
from gpuscope._recording.dynamo import elisions
from gpuscope._recording.state import state
from gpuscope._settings.enabling import description, seconds, to_record
from gpuscope._settings.environment import is_below_run, is_off, is_our_command, set_without_the_switch, variables

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Unpack

    from gpuscope._collecting.aggregation.summary import Summary
    from gpuscope._collecting.engine import Engine
    from gpuscope._data.interfaces import Device, Nvtx
    from gpuscope._data.statistics import Statistics
    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config
    from gpuscope.exporters import Exporter

    class Parts(TypedDict, total=False):
        """Parts of an engine that tests replace; `Engine` describes them."""

        device: Device
        nvtx: Nvtx
        clock: Callable[[], int]
        epoch_clock: Callable[[], int]
        exporters: tuple[Exporter, ...]


_CATCH_UP_S = 1.0
_NOTHING = {"recorded": 0, "exported": 0, "pending": 0, "dropped": {}, "lost": {}, "untimed": {}, "missing": {}}


def enable(**settings: object) -> None:
    """
    Start or resume recording.

    Functions that were decorated while gpuscope was off for good (`GPUSCOPE` unset or 0) are not recorded; those
    decorated with `GPUSCOPE=idle`, or after this call, are.

    Args:
        settings: fields of `Config`, e.g. `exporters="file"`, `file="spans.jsonl"`. What is left out comes from the
            environment as it was when gpuscope was imported. If the settings differ from those in use, what was
            recorded so far is exported, and a new period of recording begins.

    Raises:
        TypeError: for a name that is not a setting, or is one that only a variable can set.
        ValueError: for a value that is not allowed, or a `file` in a directory that does not exist.

    """
    with state.lock:
        # A signal handler within the imports that follow leaves what it wants to the call that it came into.
        is_outermost, state.wanted = state.wanted is None, settings
        try:
            while is_outermost and (wanted := state.wanted) is not None:
                _enable(wanted)
                if state.wanted is wanted:
                    state.wanted = None
        finally:
            if is_outermost:
                state.wanted = None


def _enable(settings: Mapping[str, object]) -> None:
    config = to_record(state.config, settings)
    engine = state.engine
    if engine is None or engine.ended or (settings and engine.config != config):
        if engine is not None:
            engine.shutdown(engine.config.shutdown_timeout_s)
            state.has_recorded |= engine.statistics().recorded > 0
        start(config)
        _say_where(config)
    elif state.recorder is None:
        state.switch_to(engine.recorder)
        engine.sample(on=True)
    state.allow_toggling()


def start(config: Config, **parts: Unpack[Parts]) -> Engine:
    """Begin a new period of recording. `parts` replace those of the engine, for tests."""
    from gpuscope._collecting.engine import Engine

    with state.lock:
        engine = state.engine = Engine(
            config, on_provider=_exits.be_first, on_pass=_on_pass(config), meters=state.meters, **parts
        )
        if state.look is not None:
            state.look.attach(engine.recorder)
        if config.flight:
            from gpuscope._flight.flight_recorder import attach

            attach(engine, is_child=state.is_fork)
        if config.stall:
            from gpuscope._stalls import stalls

            stalls.attach(engine, engine.collector)
        state.switch_to(engine.recorder)
        engine.follow_program()
        if config.graph_stages or config.sample_hz:
            from gpuscope._cuda.graphs.hooks import GraphHooks

            state.graphs = state.graphs or GraphHooks(lambda: state.recorder)
            state.graphs.install(config.queue_size)
        _hook_exit_and_fork()
    _logger().info("recording starts: %s", description(config))
    elisions.listen()
    return engine


def _say_where(config: Config) -> None:
    from gpuscope import _said  # With it comes `logging`, for which a program that records nothing has no use.

    _said.where(config)


def _logger() -> logging.Logger:
    from gpuscope._log import logger

    return logger


def _on_pass(config: Config) -> Callable[[Recorder], None]:
    """Return what the collector calls once per pass: it follows the program, and takes deep looks if any are wanted."""
    from gpuscope._host.following import on_pass

    if not (config.profile or config.profile_every_s):
        return on_pass(config)
    from gpuscope._profiling.now_and_then import polls

    return on_pass(config, polls(config))


@contextlib.contextmanager
def period(config: Config, **parts: Unpack[Parts]) -> Iterator[Engine]:
    """Record with another engine for the length of a block, and then go back to what was before."""
    with state.lock:
        before = (state.engine, state.recorder, state.may_toggle)
        engine = start(config, **parts)
        state.allow_toggling()
    try:
        yield engine
    finally:
        engine.shutdown(config.shutdown_timeout_s)
        state.has_recorded |= engine.statistics().recorded > 0
        state.engine, recorder, state.may_toggle = before
        state.switch_to(recorder)


def disable() -> None:
    """Record no new stages; those in progress are still exported. `enable()` resumes."""
    state.switch_to(None)
    if state.engine is not None:
        state.engine.sample(on=False)


def is_enabled() -> bool:
    """Tell whether stages are being recorded."""
    return state.recorder is not None


def flush(timeout: float | None = None) -> bool:
    """
    Export every stage that has ended, and wait for that, including the GPU work of those stages.

    Args:
        timeout: how long to wait at most, in seconds; by default `GPUSCOPE_SHUTDOWN_TIMEOUT`.

    Returns:
        Whether all of it was exported in time, and nothing was lost since the flush before.

    """
    return (engine := state.engine) is None or engine.flush(seconds(timeout, engine.config.shutdown_timeout_s))


def shutdown(timeout: float | None = None) -> bool:
    """
    Stop recording, export what can be exported, and end gpuscope's threads.

    Runs by itself when the process exits. It does not shut down the application's own TracerProvider.

    Args:
        timeout: how long to wait at most, in seconds; by default `GPUSCOPE_SHUTDOWN_TIMEOUT`.

    Returns:
        Whether everything was exported in time.

    """
    state.switch_to(None)
    engine = state.engine
    return engine is None or engine.shutdown(seconds(timeout, engine.config.shutdown_timeout_s))


def reset() -> None:
    """Shut down and forget what was recorded; for tests."""
    shutdown()
    state.engine = None
    state.sites.clear()
    state.set_up_sites.clear()


def statistics() -> Statistics:
    """Return what became of every stage of this period of recording, or of the last one."""
    engine = state.engine
    if engine is not None:
        return engine.statistics()
    with contextlib.suppress(ImportError):  # In a signal handler, while the first `enable()` is importing it.
        from gpuscope._recording.ledger import Ledger

        return Ledger().statistics()
    return cast("Statistics", SimpleNamespace(**_NOTHING))


def summary() -> Summary:
    """
    Return each stage's count, host and GPU percentiles, launch delay and share of the request. Print it for a table.

    Waits up to one second until the collector has caught up with the stages that have ended, and with their GPU work.
    Sends nothing.
    """
    engine = state.engine
    if engine is None:
        from gpuscope._collecting.aggregation.statistics import StageStatistics

        return StageStatistics().summary()
    engine.flush(_CATCH_UP_S, send=False)
    return engine.summary.summary(engine.statistics().looks)  # type: ignore[no-any-return]  # Of a room above `state`.


def _hook_exit_and_fork() -> None:
    if not state.hooked:
        state.hooked = True
        atexit.register(_exits.finish)
        # Before handlers of `atexit`, an interpreter that ends forbids thread pools and imports that a new collector
        # needs. Those of `_register_atexit` (private) run earlier, last in, first out: that of the pools comes first.
        import concurrent.futures.thread  # noqa: F401

        getattr(threading, "_register_atexit", lambda _: None)(_exits.before_the_end)
        if hasattr(os, "register_at_fork"):
            # A child forked while the collector imports modules would find their locks taken for ever.
            os.register_at_fork(
                before=_exits.finish_set_up, after_in_child=_after_fork_in_child, after_in_parent=state.count_fork
            )
        finish_in_children(_exits.finish)


def _after_fork_in_child() -> None:
    """Begin anew: stages, threads, locks, connections and CUDA events remain the parent's."""
    engine, was_on, state.is_fork = state.engine, state.recorder is not None, True
    state.lock, state.look = threading.RLock(), None
    for instruments in state.meters.values():
        instruments.forget()
    if engine is None or engine.ended:
        return
    engine.abandon()
    start(engine.config)
    if not was_on:
        state.switch_to(None)
    _exits.be_first()
    finish_in_children(_exits.finish)


def set_up() -> bool:
    """Do as the environment says, at import and again by `gpuscope run`; return whether it names stages."""
    state.begin_anew(variables())
    if state.audience is None and (is_our_command() or is_below_run(state.environ)):
        state.audience = False
    if is_off(state.environ):
        if not (names := set_without_the_switch(state.environ)):
            return False
        from gpuscope import _said

        _said.without_the_switch(names)
    config = state.config
    state.may_toggle = config.mode != "absent"
    if config.mode == "on":
        try:
            start(config)
            _say_where(config)
        except Exception as error:  # Whatever it is, `import gpuscope` goes on. In a sub-interpreter it is numpy.
            _logger().warning("nothing is recorded, because recording could not start: %s.", shown(error))
    return state.may_toggle and bool(config.stages or config.stages_file or config.frameworks)
