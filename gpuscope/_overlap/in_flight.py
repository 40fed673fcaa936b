"""
One batch in flight: the way from the program's data to results on the host, on the GPU's streams or without a GPU.

Enqueues and waits for events of its own; decides no order, and calls `infer` but never `post`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from gpuscope._overlap.report import Phases
from gpuscope._overlap.slots import FlatTree, Slot, Tree
from gpuscope._recording.stage import stage
from gpuscope.pinned._memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

_STREAMS_ARE_CONTEXTS = hasattr(torch.Stream, "__enter__")


class Timed:
    """A block as a stage, and afterwards its time on the host."""

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


def on(stream: torch.cuda.Stream) -> Any:
    """Return a context in which the stream is the current one: itself from PyTorch 2.7 on, at a tenth of the cost."""
    return stream if _STREAMS_ARE_CONTEXTS else torch.cuda.stream(stream)


class Streams:
    """The streams that copies of a device go on: one for each direction, beside that which is current."""

    def __init__(self, device: torch.device) -> None:
        self.up, self.down = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class InFlightBatch:
    """
    A slot and its events, used for one batch after another.

    Args:
        device: where `infer` runs.
        streams: for copies; None without a GPU.
        name: returns a phase's name as a stage.

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
        self._events: list[Any] = [_event() for _ in range(6)] if streams else []
        self._recorded = False
        survives_forks(self)

    def start(self, batch: Tree, prepare: Callable[[Any], Tree] | None, infer: Callable[[Tree], Tree]) -> None:
        """Do all that the host has to do before `post`. An exception is kept for when the results are asked for."""
        self.phases, self.error, self.outputs, self._recorded = Phases(), None, None, False
        try:
            if prepare is not None:
                with Timed(self._names["prepare"]) as timed:
                    batch = prepare(batch)
                self.phases.prepare = timed.spent_ms
            with Timed(self._names["pin"]) as timed:
                pinned_batch = self.slot.stage(batch)
            self.phases.pin = timed.spent_ms
            self._kept = pinned_batch
            if self._streams is None:
                self._run_here(pinned_batch, infer)
            else:
                self._launch(pinned_batch, infer, self._streams)
        except Exception as error:  # It belongs to this batch, whose turn comes after those before it.
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
        """Wait until nothing of the batch is under way, and let go of it."""
        if self._recorded:
            self._events[-1].synchronize()
        self.outputs = self._kept = self.error = None
        self._recorded = False

    def _run_here(self, pinned_batch: FlatTree, infer: Callable[[Tree], Tree]) -> None:
        with Timed(self._names["infer"]) as timed:
            self.outputs = infer(pinned_batch.tree())
        self.phases.compute = timed.spent_ms

    def _launch(self, pinned_batch: FlatTree, infer: Callable[[Tree], Tree], streams: Streams) -> None:
        # Streams are named in each call: to look the current one up costs more than what is done on it.
        up_start, up_end, start, end, down_start, down_end = self._events
        compute = torch.cuda.current_stream(self._device)
        if self.slot.reserve(pinned_batch):
            # The allocator gave what work enqueued on the current stream may still use.
            streams.up.wait_stream(compute)
        outputs: Tree = None
        try:
            with on(streams.up), stage(self._names["upload"]):
                up_start.record(streams.up)
                inputs = self.slot.upload(pinned_batch)
                up_end.record(streams.up)
            compute.wait_event(up_end)
            start.record(compute)
            with on(compute), Timed(self._names["infer"]) as timed:
                outputs = infer(inputs)
            self.phases.launch = timed.spent_ms
        finally:
            # Also after an exception: the slot is free only when all that was launched has ended.
            end.record(compute)
            self._kept = pinned_batch, outputs
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
