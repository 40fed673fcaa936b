"""
One batch in flight: its way from the program's data to results on the host, over the GPU's streams or without a GPU.

Waits for events of its own, and for whole streams only after an interrupt. Decides no order among batches, and calls
`prepare` and `infer` but never `post`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from gpuscope._overlap.gradients import connected, with_gradients
from gpuscope._overlap.leaves import FlatTree, taken_apart
from gpuscope._overlap.report import Phases
from gpuscope._overlap.slots import Slot
from gpuscope._recording.stage import stage
from gpuscope.pinned._memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from typing_extensions import Self

    from gpuscope._overlap.gradients import Found
    from gpuscope._overlap.leaves import Tree
    from gpuscope.pinned._memory import Event

Batch: TypeAlias = Any
"""
What the program gives for a batch: whatever its `prepare` takes, or a `Tree` without that. `Any`, because the program
alone knows what that is; it is only carried.
"""

_STREAMS_ARE_CONTEXTS = hasattr(torch.Stream, "__enter__")


class Work(NamedTuple):
    """What is done with each batch."""

    prepare: Callable[[Batch], Tree] | None
    infer: Callable[[Tree], Tree | FlatTree]
    copies: bool
    """Whether outputs are copied before the next call of `infer`."""


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
    waits for the event after the upload, and the download stream for the event after the compute, which includes the
    copies of outputs: from then on `infer` may overwrite what it returned. The host waits only for the
    event after the download, and reuses the slot only then: so no event has to say that the slot is free.

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
        self._gradients: Found = []
        self._events: list[Event] = [_event() for _ in range(6)] if streams else []
        self._arriving: FlatTree | None = None
        """The outputs on the host, before they are there."""
        self._uses_callers_memory = False
        """Whether tensors of the batch are uploaded from where the program has them."""
        self._compute: torch.cuda.Stream | None = None
        """The stream that was given work, until all of that has ended."""
        self._sealed = False
        """Whether the last event comes after all of that work, and has not been waited for."""
        survives_forks(self)

    def start(self, batch: Batch, work: Work) -> None:
        """Do all that the host has to do before `post`. An exception is kept as `error` until the batch's turn."""
        self.phases, self.error, self.outputs, self._uses_callers_memory = Phases(), None, None, False
        try:
            if work.prepare is not None:
                with Timed(self._names["prepare"]) as timed:
                    batch = work.prepare(batch)
                self.phases.prepare = timed.spent_ms
            with Timed(self._names["pin"]) as timed:
                pinned = self.slot.pin(batch)
            self.phases.pin = timed.spent_ms
            self._kept = pinned
            self._uses_callers_memory = self._streams is not None and self.slot.borrows(pinned)
            if self._streams is None:
                self._run_here(pinned, work)
            else:
                self._launch(pinned, work, self._streams)
        except Exception as error:  # It belongs to this batch, and the results before it come first.
            self.error = error

    def is_done(self) -> bool:
        """Tell whether the results are on the host, without waiting."""
        return not self._sealed or self._events[-1].query()

    def wait(self) -> None:
        """Wait until the results are on the host."""
        self._wait_for_end()
        if self.error is None and self._arriving is not None:
            self._measure()
            arrived, self._arriving = self._arriving, None
            self.outputs = connected(arrived, self._gradients) if self._gradients else arrived.tree()

    def wait_for_upload(self) -> None:
        """Wait until the batch's data has been read, so that the program may overwrite it."""
        if self._uses_callers_memory:
            self._events[1 if self.error is None else -1].synchronize()

    def release(self) -> None:
        """Wait until nothing of the batch is under way, and drop its data."""
        self._wait_for_end()
        self.outputs = self.error = self._kept = self._arriving = None
        self._gradients = []

    def _wait_for_end(self) -> None:
        if self._sealed:
            self._events[-1].synchronize()
        elif self._streams is not None and self._compute is not None:
            # An interrupt came before the last event was recorded.
            for stream in (self._streams.up, self._compute, self._streams.down):
                stream.synchronize()
        self._sealed, self._compute = False, None

    def _run_here(self, pinned: FlatTree, work: Work) -> None:
        with Timed(self._names["infer"]) as timed:
            outputs = work.infer(pinned.tree())
        self.phases.compute = timed.spent_ms
        if work.copies:
            outputs = self.slot.stage(taken_apart(outputs), pinned).tree()
        self.outputs = outputs

    def _launch(self, pinned: FlatTree, work: Work, streams: Streams) -> None:
        # Each call names its stream, because looking up the current one costs more than the call.
        up_start, up_end, start, end, _, _ = self._events
        compute = torch.cuda.current_stream(self._device)
        self._compute = compute
        outputs: FlatTree | None = None
        try:
            if self.slot.reserve(pinned):
                # Work already enqueued on the current stream may still use memory that the allocator gave out again.
                streams.up.wait_stream(compute)
            with on(streams.up), stage(self._names["upload"]):
                up_start.record(streams.up)
                inputs = self.slot.upload(pinned)
                up_end.record(streams.up)
            compute.wait_event(up_end)
            start.record(compute)
            with on(compute), Timed(self._names["infer"]) as timed:
                given = work.infer(inputs)
                returned = given if type(given) is FlatTree else taken_apart(given)
            self.phases.launch = timed.spent_ms
            self._gradients = with_gradients(returned)
            outputs = self._staged(returned, pinned, compute) if work.copies else returned
        finally:
            # Also after an exception, because the slot is free only when all that was launched has ended.
            end.record(compute)
            streams.down.wait_event(end)
            if outputs is None:
                streams.down.wait_stream(streams.up)
            self._download(outputs, streams.down)

    def _staged(self, returned: FlatTree, pinned: FlatTree, compute: torch.cuda.Stream) -> FlatTree:
        if any(map(_is_pinned, returned.leaves)):
            # `infer` may have enqueued a copy into it, so the host reads it only when that is over.
            end = self._events[3]
            end.record(compute)
            end.synchronize()
        staged = self.slot.stage(returned, pinned)
        self._kept = pinned, returned
        return staged

    def _download(self, outputs: FlatTree | None, down: torch.cuda.Stream) -> None:
        down_start, down_end = self._events[4:]
        try:
            with on(down), stage(self._names["download"]):
                down_start.record(down)
                if outputs is not None:
                    self._kept = self._kept, outputs
                    self._arriving = self.slot.download(outputs)
        finally:
            down_end.record(down)
            self._sealed = True

    def _measure(self) -> None:
        up_start, up_end, start, end, down_start, down_end = self._events
        self.phases.upload = up_start.elapsed_time(up_end)
        self.phases.compute = start.elapsed_time(end)
        self.phases.download = down_start.elapsed_time(down_end)


def _is_pinned(leaf: object) -> bool:
    if isinstance(leaf, np.ndarray):
        try:
            return not leaf.flags.writeable or torch.from_numpy(leaf).is_pinned()
        except (TypeError, ValueError):  # Of a dtype or strides that PyTorch does not have, so that nobody can tell.
            return True
    return isinstance(leaf, torch.Tensor) and leaf.is_cpu and leaf.layout is torch.strided and leaf.is_pinned()
