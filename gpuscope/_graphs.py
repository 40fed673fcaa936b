"""
A function of device tensors as CUDA graphs, one for each set of shapes, so that its dispatch costs next to nothing.

Falls back to calling the function, with the reason, where it can't be captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from gpuscope._log import logger
from gpuscope._pinned_memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

REHEARSALS = 3
"""Calls before a capture, on a stream beside: what first calls allocate, tune and compile can't be captured. As in
https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture."""
MAX_GRAPHS = 16
"""Inputs of further shapes, or at further addresses, are not captured: each graph holds memory."""


class Graphs:
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
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        survives_forks(self)

    @property
    def state(self) -> str:
        """What to tell people: `on`, for what, or why not."""
        return self.reason or (f"on, for the first {MAX_GRAPHS} of more different inputs" if self._full else "on")

    def __call__(self, inputs: Any) -> Any:
        """Return the function's results, on the current stream."""
        if self.reason:
            return self._function(inputs)
        key = self._key(inputs)
        if key not in self._captured and not self._capture(key, inputs):
            return self._function(inputs)
        graph, outputs = self._captured[key]
        graph.replay()
        return outputs

    def _key(self, inputs: Any) -> Hashable:
        leaves, structure = pytree.tree_flatten(inputs)
        return str(structure), tuple(_facts(leaf) for leaf in leaves)

    def _capture(self, key: Hashable, inputs: Any) -> bool:
        if len(self._captured) >= MAX_GRAPHS:
            self._full = True
            return False
        # What autocast keeps of a capture would be memory of the graph's.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            self._rehearse(inputs)
            return self._try_to_capture(key, inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _rehearse(self, inputs: Any) -> None:
        current, beside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # Copies, for the function may work in place, and what is replayed afterwards must find the inputs as they are.
        copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(REHEARSALS):
                self._function(copies)
        current.wait_stream(beside)

    def _try_to_capture(self, key: Hashable, inputs: Any) -> bool:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._function(inputs)
        except Exception as error:  # Whatever it did that a capture does not allow.
            return self._give_up(f"its capture failed: {error!r}")
        self._captured[key] = graph, outputs
        return True

    def _give_up(self, reason: str) -> bool:
        self.reason = reason
        logger.warning("no CUDA graph: %s. It is called as before.", reason)
        return False


def _facts(leaf: Any) -> Hashable:
    """Return what a graph depends on: a tensor's address, shape and type, and the value of whatever is none."""
    if isinstance(leaf, torch.Tensor):
        return leaf.data_ptr(), tuple(leaf.shape), leaf.stride(), leaf.dtype
    return repr(leaf)
