"""
One batch in flight: its way from the program's data to results on the host, over the GPU's streams or without a GPU.

Waits only for events of its own. Decides no order among batches, and calls `prepare` and `infer` but never `post`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gpuscope._overlap.report import Phases
from gpuscope._overlap.slots import FlatTree, Slot, Tree
from gpuscope._recording.stage import stage
from gpuscope.pinned._memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from typing_extensions import Self

    from gpuscope.pinned._memory import Event

Batch: TypeAlias = Any
"""What the program gives for a batch: whatever its `prepare` takes, or a `Tree` without that."""

_STREAMS_ARE_CONTEXTS = hasattr(torch.Stream, "__enter__")


class Timed:
    """A block as a stage, whose time on the host is `spent_ms` afterwards."""

    __slots__ = ("_stage", "_start_ns", "spent_ms")

    def __init__(self, name: str) -> None:
        self.spent_ms = 0.0
        self._stage = stage(name)

    def __enter__(self) -> Self:
        self._start_ns = time.perf_counter_ns()
        self._stage.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stage.__exit__(*exception)
        self.spent_ms = (time.perf_counter_ns() - self._start_ns) / 1e6


def on(stream: torch.cuda.Stream) -> AbstractContextManager[object]:
    """Return a context in which the stream is current: from PyTorch 2.7 on the stream itself, a tenth of the cost."""
    return stream if _STREAMS_ARE_CONTEXTS else torch.cuda.stream(stream)


class Streams:
    """The streams for copies to and from a device: one per direction, beside the current one, which computes."""

    def __init__(self, device: torch.device) -> None:
        self.up, self.down = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]


def _event() -> Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class InFlightBatch:
    """
    A slot and its events, used for one batch after another.

    The upload stream waits for the compute stream only if the slot's memory on the device is new. The compute stream
    waits for the event after the upload, and the download stream for the event after the compute. The host waits only
    for the event after the download, and reuses the slot only then: so no event has to say that the slot is free.

    Args:
        device: where `infer` runs.
        streams: for copies; None without a GPU.
        name: returns the name of a phase's stage.

    """

    def __init__(self, device: torch.device, streams: Streams | None, name: Callable[[str], str]) -> None:
        self.phases = Phases()
        self.error: BaseException | None = None
        self.outputs: Tree = None
        self.slot = Slot(device)
        self._device = device
        self._streams = streams
        self._names = {phase: name(phase) for phase in ("prepare", "pin", "upload", "infer", "download")}
        self._kept: Tree = None
        self._events: list[Event] = [_event() for _ in range(6)] if streams else []
        self._recorded = False
        survives_forks(self)

    def start(self, batch: Batch, prepare: Callable[[Batch], Tree] | None, infer: Callable[[Tree], Tree]) -> None:
        """Do all that the host has to do before `post`. An exception is kept as `error` until the batch's turn."""
        self.phases, self.error, self.outputs, self._recorded = Phases(), None, None, False
        try:
            if prepare is not None:
                with Timed(self._names["prepare"]) as timed:
                    batch = prepare(batch)
                self.phases.prepare = timed.spent_ms
            with Timed(self._names["pin"]) as timed:
                pinned = self.slot.pin(batch)
            self.phases.pin = timed.spent_ms
            self._kept = pinned
            if self._streams is None:
                self._run_here(pinned, infer)
            else:
                self._launch(pinned, infer, self._streams)
        except Exception as error:  # It belongs to this batch, and the results before it come first.
            self.error = error

    def is_done(self) -> bool:
        """Tell whether the results are on the host, without waiting."""
        return not self._recorded or self._events[-1].query()

    def wait(self) -> None:
        """Wait until the results are on the host."""
        if self._recorded:
            self._events[-1].synchronize()
            if self.error is None:
                self._measure()

    def release(self) -> None:
        """Wait until nothing of the batch is under way, and drop its data."""
        if self._recorded:
            self._events[-1].synchronize()
        self.outputs = self._kept = self.error = None
        self._recorded = False

    def _run_here(self, pinned: FlatTree, infer: Callable[[Tree], Tree]) -> None:
        with Timed(self._names["infer"]) as timed:
            self.outputs = infer(pinned.tree())
        self.phases.compute = timed.spent_ms

    def _launch(self, pinned: FlatTree, infer: Callable[[Tree], Tree], streams: Streams) -> None:
        # Each call names its stream, because looking up the current one costs more than the call.
        up_start, up_end, start, end, down_start, down_end = self._events
        compute = torch.cuda.current_stream(self._device)
        if self.slot.reserve(pinned):
            # Work already enqueued on the current stream may still use memory that the allocator gave out again.
            streams.up.wait_stream(compute)
        outputs: Tree = None
        try:
            with on(streams.up), stage(self._names["upload"]):
                up_start.record(streams.up)
                inputs = self.slot.upload(pinned)
                up_end.record(streams.up)
            compute.wait_event(up_end)
            start.record(compute)
            with on(compute), Timed(self._names["infer"]) as timed:
                outputs = infer(inputs)
            self.phases.launch = timed.spent_ms
        finally:
            # Also after an exception, because the slot is free only when all that was launched has ended.
            end.record(compute)
            self._kept = pinned, outputs
            streams.down.wait_event(end)
            with on(streams.down), stage(self._names["download"]):
                down_start.record(streams.down)
                self.outputs = self.slot.download(outputs)
                down_end.record(streams.down)
            self._recorded = True

    def _measure(self) -> None:
        up_start, up_end, start, end, down_start, down_end = self._events
        self.phases.upload = up_start.elapsed_time(up_end)
        self.phases.compute = start.elapsed_time(end)
        self.phases.download = down_start.elapsed_time(down_end)
