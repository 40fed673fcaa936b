"""
Takes notice of PyTorch's CUDA graphs: of captures, in which stages become nodes, and of replays, which get events.

Wraps the methods of `torch.cuda.CUDAGraph` itself. So graphs that the program holds, passes on or made elsewhere
(`torch.cuda.graph`, `make_graphed_callables`, Inductor) are all seen, and nothing that it holds is another object than
before; a watch that had to be asked for, graph by graph, would miss those that libraries make. The wrappers are plain
functions, since `wrapt`'s cost half a microsecond a call. A graph without stages inside pays for one look at an
attribute a replay. Never imports PyTorch, and never raises.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from typing import TYPE_CHECKING, Any

from gpuscope._cuda.graphs.capture import TIMED, Capture
from gpuscope._cuda.graphs.events import EventPool
from gpuscope._cuda.graphs.launch import Launcher
from gpuscope._data.native import StageRecord
from gpuscope._log import COUNTED, WarnOnce

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._cuda.cuda_device import TimedStream
    from gpuscope._cuda.driver import Driver
    from gpuscope._cuda.graphs.capture import OpenCaptures
    from gpuscope._cuda.graphs.events import GraphStages
    from gpuscope._recording.recorder import Recorder

MODULE = "torch.cuda.graphs"
_KEY = "_gpuscope"


class _Watched:
    """What is known of one graph of PyTorch's."""

    __slots__ = ("capture", "captures", "ident", "keeps", "ours", "process", "stages")

    def __init__(self, process: object, *, keeps: bool, ours: bool) -> None:
        self.process = process
        self.keeps = keeps
        """Whether PyTorch keeps the graph that was captured, without which its nodes have no names."""
        self.ours = ours
        """Whether it does so because we said so."""
        self.captures: OpenCaptures | None = None
        """What was told of its capture, as long as that lasts."""
        self.ident = 0
        self.capture: Capture | None = None
        self.stages: GraphStages | None = None


class GraphHooks:
    """
    What the wrappers do.

    Args:
        look: returns the recorder, or None while nothing is recorded.

    """

    def __init__(self, look: Callable[[], Recorder | None]) -> None:
        self.warnings = WarnOnce(COUNTED)
        self._look = look
        self._launcher = Launcher(self.warnings)
        self._pools: dict[int, EventPool] = {}
        self._originals: dict[str, Any] = {}
        self._kind: Any = None
        self._refusal = ""
        self._process = object()
        """Stands for this process: what a fork's child inherits is the parent's."""
        self._max_stages = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    # ---- putting the wrappers on and off

    def install(self, max_stages: int) -> None:
        """
        Wrap the class, now or when PyTorch is imported; once.

        Args:
            max_stages: as many may wait in the queue, and again with the collector; and so twice as many stages may be
                in replays that are not read yet.

        """
        self._max_stages = max_stages
        if self._kind is None:
            import wrapt

            wrapt.when_imported(MODULE)(functools.partial(self._guarded, self._wrap))

    def _wrap(self, module: Any) -> None:
        kind = module.CUDAGraph
        if self._kind is not None or not hasattr(kind, "capture_begin"):
            return
        self._kind = kind
        if not hasattr(kind, "raw_cuda_graph_exec") or not hasattr(kind, "instantiate"):
            self._refusal = "pytorch_too_old"
        wrappers = {
            "__init__": self._new_init,
            "capture_begin": self._new_capture_begin,
            "capture_end": self._new_capture_end,
            "instantiate": self._new_instantiate,
            "replay": self._new_replay,
            "reset": self._new_reset,
        }
        for name, make in wrappers.items():
            original = getattr(kind, name, None)
            if original is not None:
                self._originals[name] = kind.__dict__.get(name)
                setattr(kind, name, functools.wraps(original)(make(original)))

    def remove(self) -> None:
        """Put the class's own methods back."""
        kind, self._kind = self._kind, None
        for name, original in self._originals.items():
            if original is None:
                delattr(kind, name)
            else:
                setattr(kind, name, original)
        self._originals.clear()

    def _forget(self) -> None:
        """Touch no graph of before any more: this process is a fork's child."""
        self._process = object()
        for pool in self._pools.values():
            pool.forget()
        self._pools = {}

    # ---- the wrappers

    def _new_init(self, original: Any) -> Any:
        def __init__(graph: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it stands for one
            keeps = bool(kwargs.get("keep_graph", args[0] if args else False))
            ours = not keeps and not self._refusal and self._recorder_now() is not None
            if ours:
                original(graph, True)
            else:
                original(graph, *args, **kwargs)
            with contextlib.suppress(AttributeError):  # A subclass with slots: it is not watched.
                setattr(graph, _KEY, _Watched(self._process, keeps=keeps or ours, ours=ours))

        return __init__

    def _new_capture_begin(self, original: Any) -> Any:
        def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> Any:
            recorder = self._recorder_now()
            timed_stream = None if recorder is None else self._guarded(self._stream_before_capture, recorder)
            result = original(graph, *args, **kwargs)
            if timed_stream is not None:
                self._guarded(self._begin_capture, graph, recorder, timed_stream)
            return result

        return capture_begin

    def _new_capture_end(self, original: Any) -> Any:
        instantiate = getattr(self._kind, "instantiate", None)

        def capture_end(graph: Any, *args: Any, **kwargs: Any) -> Any:
            watched, whole = self._watched(graph), False
            try:
                result = original(graph, *args, **kwargs)
                if watched is not None and watched.ours and instantiate is not None:
                    instantiate(graph)  # As PyTorch does there for a graph that it need not keep.
                whole = True
            finally:
                if watched is not None and watched.captures is not None:
                    self._guarded(self._end_capture, graph, watched, watched.captures, whole)
            return result

        return capture_end

    def _new_instantiate(self, original: Any) -> Any:
        def instantiate(graph: Any, *args: Any, **kwargs: Any) -> Any:
            watched = self._watched(graph)
            if watched is None or watched.stages is None:
                return original(graph, *args, **kwargs)
            with watched.stages.lock:
                result = original(graph, *args, **kwargs)
                watched.stages.forget_executable()
            return result

        return instantiate

    def _new_replay(self, original: Any) -> Any:
        def replay(graph: Any, *args: Any, **kwargs: Any) -> Any:
            watched = getattr(graph, _KEY, None)
            if watched is None or watched.stages is None or watched.process is not self._process:
                return original(graph, *args, **kwargs)
            launch = functools.partial(original, graph, *args, **kwargs)
            return self._launcher.launch(graph, watched.stages, self._recorder_now(), launch)

        return replay

    def _new_reset(self, original: Any) -> Any:
        def reset(graph: Any, *args: Any, **kwargs: Any) -> Any:
            watched = self._watched(graph)
            if watched is not None and watched.stages is not None:
                watched.stages.retire()
                watched.stages = None
            return original(graph, *args, **kwargs)

        return reset

    def _recorder_now(self) -> Recorder | None:
        """Return the recorder, if it wants stages inside graphs."""
        recorder = self._look()
        return None if recorder is None or recorder.captures is None else recorder

    def _watched(self, graph: Any) -> _Watched | None:
        watched: _Watched | None = getattr(graph, _KEY, None)
        return None if watched is None or watched.process is not self._process else watched

    def _guarded(self, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:  # The program captures and replays as without us.
            self.warnings.warn("graphs", "timing stages inside CUDA graphs failed: %r.", error)
            return None

    # ---- captures

    def _stream_before_capture(self, recorder: Recorder) -> TimedStream | None:
        # As a stage begins: where this is the first, the driver is loaded, and events are made.
        record = StageRecord()
        record.timed_stream = record.pair = None
        recorder.device.begin(record, None)
        recorder.device.give_back(record)
        timed_stream: TimedStream | None = record.timed_stream
        return timed_stream if getattr(recorder.device, "driver", None) is not None else None

    def _begin_capture(self, graph: Any, recorder: Recorder, timed_stream: TimedStream) -> None:
        captures = recorder.captures
        driver: Any = getattr(recorder.device, "driver", None)
        ident = driver.capture_of(timed_stream.handle)
        if ident is None or captures is None:
            return
        watched = self._watched(graph)
        if watched is None:
            watched = _Watched(self._process, keeps=False, ours=False)
            setattr(graph, _KEY, watched)
        refusal = self._refusal or ("" if driver.can_time_graphs else "driver_too_old")
        if not refusal and not watched.keeps:
            refusal = "made_before_recording"
        watched.capture = None if refusal else Capture(self._pool(driver, timed_stream), inline=captures.inline)
        watched.captures, watched.ident = captures, ident
        captures.open(ident, watched.capture or refusal)

    def _pool(self, driver: Driver, timed_stream: TimedStream) -> EventPool:
        key = timed_stream.context.value or 0
        if key not in self._pools:
            self._pools[key] = EventPool(driver, timed_stream.context, timed_stream.index, limit=4 * self._max_stages)
        return self._pools[key]

    def _end_capture(self, graph: Any, watched: _Watched, captures: OpenCaptures, whole: bool) -> None:
        capture, watched.capture, watched.captures = watched.capture, None, None
        captures.close(watched.ident)
        if capture is None:
            return
        stages = capture.finish() if whole else None
        if capture.unfinished:
            captures.ledger.graph_stage("left_after_capture", capture.unfinished)
        if stages is None:
            capture.abandon()
            return
        captures.ledger.graph_stage(TIMED, len(stages))
        watched.stages = stages
        weakref.finalize(graph, stages.retire).atexit = False
