"""
`DoubleBuffer`: several batches in flight, in order. What one of them does is in `_overlap.in_flight`.

Waits for single copies, never for a stream; only the capture of a graph waits for the device. For one thread, and the
workers that it starts itself.
"""

from __future__ import annotations

import contextvars
import inspect
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from gpuscope._data.plain.values import shown
from gpuscope._overlap.graphed import REHEARSALS, GraphedFunction
from gpuscope._overlap.in_flight import InFlightBatch, Streams, Timed, Work
from gpuscope._overlap.modes import in_modes_of_this_thread
from gpuscope._overlap.report import OverlapReport, PhaseTotals
from gpuscope.pinned._memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from gpuscope._overlap.in_flight import Batch
    from gpuscope._overlap.leaves import Tree

Result: TypeAlias = Any
"""What the program's `post` returns, or a `Tree` without that. `Any`, because the program alone knows what that is."""


_WORKERS = "gpuscope-post"
"""The beginning of the names of threads."""


class DoubleBuffer:
    """
    Up to `depth` batches in flight, for loops of your own: `put` a batch, `get` the oldest result.

    `put` returns as soon as the batch is on its way; `get` waits for its results and calls `post` with them. An
    exception of `prepare` or `infer` is kept with its batch, and raised by the `get` of that batch. For one thread.
    Without a GPU `put` does everything but `post`.

    Args:
        infer: takes the inputs on the device and returns outputs: nested containers (dicts, lists, tuples, and whatever
            else `torch.utils._pytree` knows) of dense tensors, arrays, and objects that hold none, which are copied as
            well. Runs on the stream, in the autocast and in the gradient and inference mode that are current at `put`.
            It may keep its inputs and return the same memory each time.
        post: takes the outputs on the host. What it returns is the result; without `post` that is the outputs. Results
            stay valid, whatever holds them.
        prepare: takes a batch and returns such containers of tensors or numpy arrays on the host. Tensors that are
            already pinned are uploaded from where they are, and must not change until their batch has a result.
        depth: batches in flight at most, each with memory for inputs and outputs. 2 or more to overlap anything.
        device: where `infer` runs; None: the current GPU, or the CPU if there is no GPU.
        graph: whether to replay `infer` as a CUDA graph. A graph is captured per set of shapes and modes after three
            batches; capturing waits for the device. What can't be captured, or keeps tensors from one call to the next,
            is called as it is, and `report().graph` says why. Python code in `infer` runs only at captures, and what it
            reads beside its inputs must stay where it is.
        copy_outputs: whether outputs are copied before the next call of `infer`, on the GPU from one place to another.
            False saves that, and takes any object for an output. Then each call must return memory of its own, which
            nothing writes to until the batch has its result. Outputs of graphs are always copied.
        workers: threads that call `post`, all at once; this helps if `post` releases the GIL. With 0, `get` calls it.
        name: a prefix of the stages: `name.prepare`, `.pin`, `.upload`, `.infer`, `.download` and `.post`.

    Raises:
        TypeError: if one of the functions can't be called or is a coroutine function; for options of another type.
        ValueError: for a `depth` below 1, negative `workers`, or a `device` that can't be used.

    """

    _closed = True  # There is nothing to close until a constructor has ended.

    def __init__(
        self,
        infer: Callable[[Tree], Tree],
        post: Callable[[Tree], Result] | None = None,
        *,
        prepare: Callable[[Batch], Tree] | None = None,
        depth: int = 2,
        device: torch.device | str | None = None,
        graph: bool = False,
        copy_outputs: bool = True,
        workers: int = 0,
        name: str = "",
    ) -> None:
        _check_functions(infer=infer, post=post, prepare=prepare)
        _check_options(depth=depth, workers=workers, name=name, graph=graph, copy_outputs=copy_outputs)
        self.depth = depth
        self._post = post
        self._device = _device(device)
        self._graphs = GraphedFunction(infer) if graph and self._device.type == "cuda" else None
        # The next replay may overwrite what one returned.
        self._work = Work(prepare, self._graphs or infer, copies=copy_outputs or self._graphs is not None)
        self._no_graph = "there is no GPU" if graph else "off"
        self._prefix = f"{name}." if name else ""
        self._streams = Streams(self._device) if self._device.type == "cuda" else None
        self._free: list[InFlightBatch] = []
        self._in_flight: deque[tuple[InFlightBatch, Future[Result] | None]] = deque()
        first = depth + (REHEARSALS if self._graphs else 0)
        self._totals = PhaseTotals(first, time.perf_counter_ns, on_gpu=self._streams is not None)
        self._workers = ThreadPoolExecutor(workers, _WORKERS) if workers else None
        self._closed = False
        survives_forks(self)

    def put(self, batch: Batch) -> None:
        """
        Send a batch on its way.

        Raises:
            RuntimeError: if `depth` batches are in flight, or after `close`.

        """
        if self._closed:
            raise RuntimeError("This `DoubleBuffer` is closed; make a new one.")
        if self.full:
            raise RuntimeError(f"All {self.depth} slots are in flight; `get` a result before the next `put`.")
        self.wait_for_upload()  # `prepare` may fill the same memory again.
        started = self._free.pop() if self._free else InFlightBatch(self._device, self._streams, self._name)
        try:
            started.start(batch, self._work)
        except BaseException:  # A KeyboardInterrupt: what was launched has to end before the slot is used again.
            started.release()
            self._free.append(started)
            raise
        # Not by a name here: an exception of `infer` holds this frame, and the future holds the exception.
        self._in_flight.append((started, self._given_to_workers(started)))

    def wait_for_upload(self) -> None:
        """Wait until the data of the newest batch has been read; nothing to wait for unless that was pinned already."""
        if self._in_flight:
            self._in_flight[-1][0].wait_for_upload()

    def get(self) -> Result:
        """
        Wait for the oldest batch and return its result, or raise the exception that was raised for it.

        Raises:
            RuntimeError: if no batch is in flight.

        """
        if not self._in_flight:
            raise RuntimeError("No batch is in flight; `put` one first.")
        oldest, future = self._in_flight[0]
        if future is not None:
            future.exception()  # Waits for the worker. An interrupt leaves the batch in flight: `post` reads its slot.
        self._in_flight.popleft()
        try:
            result = self._result(oldest) if future is None else future.result()
            self._totals.add(oldest.phases)
            return result
        finally:
            oldest.release()
            self._free.append(oldest)
            del future  # Its exception would hold this frame, and this frame it.

    def ready(self) -> bool:
        """Tell whether `get` would return without waiting for the GPU or for a worker."""
        if not self._in_flight:
            return False
        oldest, future = self._in_flight[0]
        return oldest.is_done() if future is None else future.done()

    @property
    def full(self) -> bool:
        """Whether `depth` batches are in flight."""
        return len(self._in_flight) >= self.depth

    def __len__(self) -> int:
        """The number of batches in flight."""
        return len(self._in_flight)

    def report(self) -> OverlapReport:
        """Return where the time goes, how much of it is hidden, and what bounds the loop."""
        if self._graphs is None:
            return self._totals.report(graph=self._no_graph)
        return self._totals.report(graph=self._graphs.state)

    def resumed(self) -> None:
        """Count the time since the last result as the program's own, in `report`."""
        self._totals.resumed()

    def close(self) -> None:
        """Give up the batches in flight, and return once nothing of them is under way. May be called again."""
        self._closed = True
        while self._in_flight:
            oldest, future = self._in_flight.popleft()
            if future is not None and not future.cancel():
                future.exception()  # Waits for the worker. An exception is given up with its batch.
            oldest.release()
        self._free.clear()
        if self._workers is not None:
            # One that lets go of the last reference can't wait for itself.
            self._workers.shutdown(wait=not threading.current_thread().name.startswith(_WORKERS))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close; what is under way still uses the memory."""
        if not self._closed:
            self.close()

    def _given_to_workers(self, started: InFlightBatch) -> Future[Result] | None:
        if self._workers is None:
            return None
        run = in_modes_of_this_thread(self._result)
        return self._workers.submit(contextvars.copy_context().run, run, started)

    def _result(self, started: InFlightBatch) -> Result:
        started.wait()
        if started.error is not None:
            raise started.error
        if self._post is None:
            return started.slot.apart(started.outputs)
        with Timed(self._name("post")) as timed:
            result = started.slot.apart(self._post(started.outputs))
        started.phases.post = timed.spent_ms
        return result

    def _name(self, phase: str) -> str:
        return self._prefix + phase


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'`device` is {device!r}: expected "cpu", or a GPU such as "cuda" or "cuda:1".') from None
    if found.type not in ("cuda", "cpu"):
        raise ValueError(f'`device` is {found}: expected "cpu", or a GPU such as "cuda" or "cuda:1".')
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'`device` is {found}, but no CUDA device can be used here: expected "cpu".')
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise ValueError(f"`device` is {found}: expected an index below {torch.cuda.device_count()}.")
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found


def _check_functions(**functions: object) -> None:
    for name, function in functions.items():
        if function is None and name != "infer":
            continue
        if not callable(function):
            raise TypeError(f"`{name}` is {shown(function)}: expected a function of one argument.")
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"`{name}` is a coroutine function: expected one that returns its result.")


def _check_options(*, depth: object, workers: object, name: object, **switches: object) -> None:
    for option, value in (("depth", depth), ("workers", workers)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"`{option}` is {shown(value)}: expected a whole number.")
    if not isinstance(name, str):
        raise TypeError(f"`name` is {shown(name)}: expected a text.")
    for option, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{option}` is {shown(value)}: expected True or False.")
    if cast("int", depth) < 1:
        raise ValueError(f"`depth` is {depth}: expected 1 or more batches in flight; 2 for double buffering.")
    if cast("int", workers) < 0:
        raise ValueError(f"`workers` is {workers}: expected 0, or a number of threads for `post`.")
