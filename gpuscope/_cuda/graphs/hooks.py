"""
Takes notice of PyTorch's CUDA graphs: of captures, in which stages become nodes, and of replays, which get events.

Wraps the methods of the class `torch.cuda.CUDAGraph`, not its objects. So all graphs are seen, whoever made them
(`torch.cuda.graph`, `make_graphed_callables`, Inductor) and whoever holds them, and nothing that the program holds is
another object than before. A watch that the program had to ask for, graph by graph, would miss those that libraries
make. The wrappers are plain functions, because those of `wrapt` cost half a microsecond per call. A graph without
stages inside pays for one look at an attribute per replay.

Record nodes have addresses only as long as the graph that was captured exists. So PyTorch is made to keep it
(`keep_graph=True`), and made to instantiate it when it would have done so by itself. Never imports PyTorch, and never
raises: what fails is logged once, and the program captures and replays as it would without us.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING, ParamSpec, TypeAlias, TypeVar

from gpuscope._cuda.graphs.capture import TIMED, Capture
from gpuscope._cuda.graphs.events import EventPool
from gpuscope._cuda.graphs.launch import Launcher
from gpuscope._cuda.graphs.quiet import Quiet
from gpuscope._cuda.graphs.watched import Watched
from gpuscope._data.native import StageRecord
from gpuscope._data.plain.values import shown
from gpuscope._interrupts import is_the_programs
from gpuscope._log import COUNTED, WarnOnce, later
from gpuscope._recording.current_stage import current

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from gpuscope._cuda.cuda_device import CudaDevice
    from gpuscope._cuda.driver import Driver
    from gpuscope._cuda.graphs.launch import Graph
    from gpuscope._cuda.timed_stream import TimedStream
    from gpuscope._data.interfaces import Captures
    from gpuscope._recording.recorder import Recorder

P = ParamSpec("P")
R = TypeVar("R")
Method: TypeAlias = "Callable[..., object]"
"""A method of PyTorch's class, or what stands for it. Versions of PyTorch differ in the arguments."""

MODULE = "torch.cuda.graphs"
_KEY = "_gpuscope"


class GraphHooks:
    """
    The wrappers, and what they do.

    Args:
        get_recorder: returns the recorder, or None while nothing is recorded.

    """

    def __init__(self, get_recorder: Callable[[], Recorder | None]) -> None:
        self.warnings = WarnOnce(COUNTED, later)
        self._get_recorder = get_recorder
        self._launcher = Launcher(self.warnings)
        self._pools: dict[int, EventPool] = {}
        """By the addresses of their contexts."""
        self._originals: dict[str, object] = {}
        """The class's own methods by name; None for those that it inherits."""
        self._kind: type | None = None
        """`CUDAGraph`, while it is wrapped."""
        self._refusal = ""
        self.quiet = Quiet()
        self._process = object()
        """Stands for this process: a graph that a forked child inherits has the parent's."""
        self._max_stages = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    # ---- putting the wrappers on and off

    def install(self, max_stages: int) -> None:
        """
        Wrap the class, now or when PyTorch is imported; once.

        `max_stages` is how many stages may wait in the queue, and how many with the collector; twice as many may be in
        replays that are not read yet.
        """
        self._max_stages = max_stages
        if self._kind is None:
            import wrapt

            wrapt.when_imported(MODULE)(lambda module: self._guarded(self._wrap, module))

    def _wrap(self, module: ModuleType) -> None:
        kind: type = module.CUDAGraph
        if self._kind is not None or not hasattr(kind, "capture_begin"):
            return
        self._kind = kind
        if not hasattr(kind, "raw_cuda_graph_exec") or not hasattr(kind, "instantiate"):
            self._refusal = "pytorch_too_old"
        wrappers = {
            "__init__": self._new_init,
            "capture_begin": self._new_capture_begin,
            "capture_end": self._new_capture_end,
            "debug_dump": self._new_debug_dump,
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
        """Touch none of the present graphs any more: this process is a forked child."""
        self._process = object()
        self.quiet.forget()
        for pool in self._pools.values():
            pool.forget()
        self._pools = {}

    # ---- the wrappers

    def _new_init(self, original: Method) -> Method:
        def __init__(graph: Graph, *args: object, **kwargs: object) -> None:  # noqa: N807 - it stands for one
            keeps = bool(kwargs.get("keep_graph", args[0] if args else False))
            ours = not keeps and not self._refusal and self._recorder_now() is not None
            if ours:
                original(graph, True)
            else:
                original(graph, *args, **kwargs)
            with contextlib.suppress(AttributeError):  # A subclass with slots: it is not watched.
                setattr(graph, _KEY, Watched(self._process, keeps=keeps or ours, ours=ours))

        return __init__

    def _new_capture_begin(self, original: Method) -> Method:
        def capture_begin(graph: Graph, *args: object, **kwargs: object) -> object:
            recorder = self._recorder_now()
            captures = None if recorder is None else recorder.captures
            timed_stream = None if captures is None else self._guarded(self._stream_before_capture, captures.device)
            result = self.quiet.around(functools.partial(original, graph, *args, **kwargs), graph)
            if captures is not None and timed_stream is not None:
                self._guarded(self._begin_capture, graph, captures, timed_stream)
            return result

        return capture_begin

    def _new_capture_end(self, original: Method) -> Method:
        instantiate = getattr(self._kind, "instantiate", None)

        def capture_end(graph: Graph, *args: object, **kwargs: object) -> object:
            watched, whole = self._watched(graph), False
            try:
                result = original(graph, *args, **kwargs)
                if watched is not None and watched.ours and instantiate is not None:
                    instantiate(graph)  # As PyTorch does here for a graph that it need not keep.
                whole = True
            finally:
                self.quiet.end(graph)
                if watched is not None and watched.captures is not None:
                    self._guarded(self._end_capture, graph, watched, watched.captures, whole)
            return result

        return capture_end

    def _new_instantiate(self, original: Method) -> Method:
        def instantiate(graph: Graph, *args: object, **kwargs: object) -> object:
            watched = self._watched(graph)
            if watched is None or not watched.was_timed:
                return original(graph, *args, **kwargs)
            with watched.lock:
                result = original(graph, *args, **kwargs)
                if watched.stages is not None:
                    watched.stages.forget_executable()
            return result

        return instantiate

    def _new_replay(self, original: Method) -> Method:
        def replay(graph: Graph, *args: object, **kwargs: object) -> object:
            watched: Watched | None = getattr(graph, _KEY, None)
            if (site := getattr(current.get(), "site", None)) is not None:
                site.replays += 1
            if watched is None or not watched.was_timed or watched.process is not self._process:
                return original(graph, *args, **kwargs)
            launch = functools.partial(original, graph, *args, **kwargs)
            return self._launcher.launch(graph, watched, self._recorder_now(), launch)

        return replay

    def _new_reset(self, original: Method) -> Method:
        def reset(graph: Graph, *args: object, **kwargs: object) -> object:
            watched = self._watched(graph)
            if watched is None or not watched.was_timed:
                return original(graph, *args, **kwargs)
            with watched.lock:
                watched.drop()
                return original(graph, *args, **kwargs)

        return reset

    def _new_debug_dump(self, original: Method) -> Method:
        def debug_dump(graph: Graph, *args: object, **kwargs: object) -> object:
            watched = self._watched(graph)
            if watched is None or not watched.was_timed:
                return original(graph, *args, **kwargs)
            with watched.lock:
                return original(graph, *args, **kwargs)

        return debug_dump

    def _recorder_now(self) -> Recorder | None:
        """Return the recorder, if it wants stages inside graphs."""
        recorder = self._get_recorder()
        return None if recorder is None or recorder.captures is None else recorder

    def _watched(self, graph: Graph) -> Watched | None:
        watched: Watched | None = getattr(graph, _KEY, None)
        return None if watched is None or watched.process is not self._process else watched

    def _guarded(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # The program captures and replays as it would without us.
            if is_the_programs(error):
                raise
            self.warnings.warn("graphs", "timing stages inside CUDA graphs failed: %s.", shown(error))
            return None

    # ---- captures

    def _stream_before_capture(self, device: CudaDevice) -> TimedStream | None:
        """
        Return the stream that is about to be captured, by beginning a stage on it and taking it back.

        Where no stage ran before, this loads the driver, opens the stream and makes its first events. `_begin_capture`
        needs the first two to ask for the capture's id, without which the stages inside would go unseen. Events are
        better made before the capture than in it, because not every capture mode is documented to allow that. Bringing
        the device to its final functions is not the point: what `swap` puts in stays, whatever the device becomes.
        """
        record = StageRecord()
        record.timed_stream = record.pair = None
        device.begin(record, None)
        device.give_back(record)
        timed_stream: TimedStream | None = record.timed_stream
        return timed_stream

    def _begin_capture(self, graph: Graph, captures: Captures, timed_stream: TimedStream) -> None:
        driver = captures.device.driver
        ident = None if driver is None else captures.device.capture_of(timed_stream)
        if driver is None or ident is None:
            return
        watched = self._watched(graph)
        if watched is None:
            watched = Watched(self._process, keeps=False, ours=False)
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

    def _end_capture(self, graph: Graph, watched: Watched, captures: Captures, whole: bool) -> None:
        capture, watched.capture, watched.captures = watched.capture, None, None
        try:
            captures.close(watched.ident)
        except BaseException:  # An interrupt, which goes on.
            captures.close(watched.ident)
            raise
        if capture is None:
            return
        stages = capture.finish() if whole else None
        if capture.unfinished:
            captures.ledger.graph_stage("left_after_capture", capture.unfinished)
        if stages is None:
            capture.abandon()
            return
        captures.ledger.graph_stage(TIMED, len(stages))
        watched.keep(graph, stages)
