"""
A function of device tensors as CUDA graphs, one for each set of shapes, so that its dispatch costs next to nothing.

Falls back to calling the function, with the reason, where it can't be captured.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from gpuscope._cuda.driver import CAPTURE_MODE_RELAXED, Handle, load_driver
from gpuscope._log import logger
from gpuscope.pinned._memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

REHEARSALS = 3
"""Calls before a capture, on a stream beside: what first calls allocate, tune and compile can't be captured. As in
https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture."""
MAX_GRAPHS = 16
"""Inputs of further shapes, or at further addresses, are not captured: each graph holds memory."""


class GraphedFunction:
    """
    Calls a function by graphs.

    A graph belongs to the addresses of its inputs, and its results are overwritten by the next call with the same. All
    graphs share one pool of memory, so calls must not overlap on the GPU.

    Args:
        function: takes one tree of tensors on the device and returns one.

    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.reason = ""
        """Why the function is called without a graph."""
        self._full = False
        self._function = function
        self._pool: Any = None
        self._captured: dict[Hashable, list[tuple[Any, torch.cuda.CUDAGraph, Any]]] = {}
        """Structure of the inputs, graph and outputs, by what is known of each tensor of the inputs."""
        survives_forks(self)

    @property
    def state(self) -> str:
        """What to tell people: `on`, for what, or why not."""
        return self.reason or (f"on, for the first {MAX_GRAPHS} of more different inputs" if self._full else "on")

    def __call__(self, inputs: Any) -> Any:
        """Return the function's results, on the current stream."""
        if self.reason:
            return self._function(inputs)
        leaves, structure = pytree.tree_flatten(inputs)
        key = tuple(map(_facts, leaves))
        for captured in self._captured.get(key, ()):
            if captured[0] == structure:
                break
        else:
            captured = self._capture(key, structure, inputs)
        if captured is None:
            return self._function(inputs)
        _, graph, outputs = captured
        graph.replay()
        return outputs

    def _capture(self, key: Hashable, structure: Any, inputs: Any) -> Any:
        if sum(map(len, self._captured.values())) >= MAX_GRAPHS:
            self._full = True
            return None
        # What autocast keeps of a capture would be memory of the graph's.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            self._rehearse(inputs)
            return self._try_to_capture(key, structure, inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _rehearse(self, inputs: Any) -> None:
        current = torch.cuda.current_stream()
        beside = _stream_beside(current.device.index)
        # Copies, for the function may work in place, and what is replayed afterwards must find the inputs as they are.
        copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(REHEARSALS):
                self._function(copies)
        current.wait_stream(beside)

    def _try_to_capture(self, key: Hashable, structure: Any, inputs: Any) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        beside = _stream_beside(current.device.index)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
                outputs = self._function(inputs)
        except Exception as error:  # Whatever it did that a capture does not allow.
            torch.cuda.set_stream(current)  # PyTorch leaves that of the capture.
            _end_for_good(graph, beside)
            return self._give_up(f"its capture failed: {error!r}")
        captured = structure, graph, outputs
        self._captured.setdefault(key, []).append(captured)
        return captured

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        logger.warning("no CUDA graph: %s. It is called as before.", reason)


@functools.cache
def _stream_beside(device: int) -> torch.cuda.Stream:
    """One for all rehearsals and captures on a device: PyTorch keeps a workspace of cuBLAS for each stream for ever."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _end_for_good(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """
    End a capture that was invalidated, for PyTorch as well: its `capture_end` raises before it has tidied up.

    Else the whole program would suffer from then on: `torch.randn` raises, since the generator takes itself for
    captured, and the allocators of device and pinned memory keep what was used on several streams. So the stream is
    captured once more, which can't fail, and `capture_end` is called again.
    """
    with contextlib.suppress(RuntimeError):
        graph.pool()  # Raises until the capture has ended well, as it has after an exception of the program's own.
        return
    spare = torch.empty(1, device=stream.device)
    driver = load_driver()
    if driver is None:
        return
    with contextlib.suppress(RuntimeError), torch.cuda.stream(stream):
        driver.call("cuStreamBeginCapture_v2", Handle(stream.cuda_stream), CAPTURE_MODE_RELAXED)
        spare.zero_()  # An empty graph would be warned of.
        graph.capture_end()


def _facts(leaf: Any) -> Hashable:
    """Return what a graph depends on: a tensor's address, shape and type, and the value of whatever is none."""
    if isinstance(leaf, torch.Tensor):
        return leaf.data_ptr(), tuple(leaf.shape), leaf.stride(), leaf.dtype
    return repr(leaf)
