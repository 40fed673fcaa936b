"""
A function of device tensors as CUDA graphs, one per set of inputs, so that its dispatch costs next to nothing.

A function that can't be captured is called as it is, and `reason` says why. Only a capture waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils import _pytree as pytree

from gpuscope._cuda.driver import CAPTURE_MODE_RELAXED, Handle, load_driver
from gpuscope._log import logger
from gpuscope.pinned._memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch.cuda import _POOL_HANDLE

    from gpuscope._overlap.slots import Leaf, Tree

REHEARSALS = 3
"""Calls on a side stream before a capture: what first calls allocate, tune and compile can't be captured. As in
https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture."""
MAX_GRAPHS = 16
"""Inputs of further shapes, or at further addresses, are not captured, because each graph holds memory."""


class CapturedCall(NamedTuple):
    """One call of the function as a graph."""

    structure: pytree.TreeSpec
    """Of the inputs."""
    graph: torch.cuda.CUDAGraph
    outputs: Tree


class GraphedFunction:
    """
    Calls a function by replaying CUDA graphs.

    A graph belongs to the addresses of its inputs. Its results are overwritten by the next call with the same inputs.
    All graphs share one pool of memory, so calls must not overlap on the GPU.

    Args:
        function: takes one tree of tensors on the device and returns one.

    """

    def __init__(self, function: Callable[[Tree], Tree]) -> None:
        self.reason = ""
        """Why the function is called without a graph; empty if it isn't."""
        self._full = False
        self._function = function
        self._pool: _POOL_HANDLE | None = None
        self._captured: dict[Hashable, list[CapturedCall]] = {}
        """By the keys of the inputs' leaves; the few with the same keys differ in structure."""
        survives_forks(self)

    @property
    def state(self) -> str:
        """`on`, with a limit that was reached, or why not; for people."""
        return self.reason or (f"on, for the first {MAX_GRAPHS} different inputs only" if self._full else "on")

    def __call__(self, inputs: Tree) -> Tree:
        """Return the function's results, on the current stream."""
        if self.reason:
            return self._function(inputs)
        leaves, structure = pytree.tree_flatten(inputs)
        key = tuple(map(_key_of, leaves))
        captured: CapturedCall | None
        for captured in self._captured.get(key, ()):
            if captured.structure == structure:
                break
        else:
            captured = self._capture(key, structure, inputs)
        if captured is None:
            return self._function(inputs)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, key: Hashable, structure: pytree.TreeSpec, inputs: Tree) -> CapturedCall | None:
        if sum(map(len, self._captured.values())) >= MAX_GRAPHS:
            self._full = True
            return None
        # What autocast caches during a capture would lie in the graph's memory.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            self._rehearse(inputs)
            return self._try_to_capture(key, structure, inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _rehearse(self, inputs: Tree) -> None:
        current = torch.cuda.current_stream()
        beside = _stream_beside(current.device.index)
        # On copies: the function may work in place, and the replay afterwards must find the inputs as they are.
        copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(REHEARSALS):
                self._function(copies)
        current.wait_stream(beside)

    def _try_to_capture(self, key: Hashable, structure: pytree.TreeSpec, inputs: Tree) -> CapturedCall | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        beside = _stream_beside(current.device.index)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
                outputs = self._function(inputs)
        except Exception as error:  # Whatever the function did that a capture does not allow.
            torch.cuda.set_stream(current)  # PyTorch leaves the capture's stream current.
            _end_for_good(graph, beside)
            self._give_up(f"its capture failed: {error!r}")
            return None
        captured = CapturedCall(structure, graph, outputs)
        self._captured.setdefault(key, []).append(captured)
        return captured

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        logger.warning("no CUDA graph of `infer`: %s; calling it without one.", reason)


@functools.cache
def _stream_beside(device: int) -> torch.cuda.Stream:
    """One for all rehearsals and captures on a device: PyTorch keeps a cuBLAS workspace per stream for ever."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _end_for_good(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """
    End an invalidated capture for PyTorch as well, whose `capture_end` raises before it has tidied up.

    Otherwise the whole program would suffer from then on: `torch.randn` raises, because its generator believes that it
    is being captured, and the allocators of device and pinned memory never reuse what several streams used. So the
    stream is captured once more, which can't fail, and `capture_end` is called again.
    """
    with contextlib.suppress(RuntimeError):
        graph.pool()  # Raises unless the capture ended well, as it did if the exception was the program's own.
        return
    spare = torch.empty(1, device=stream.device)
    driver = load_driver()
    if driver is None:
        return
    with contextlib.suppress(RuntimeError), torch.cuda.stream(stream):
        driver.call("cuStreamBeginCapture_v2", Handle(stream.cuda_stream), CAPTURE_MODE_RELAXED)
        spare.zero_()  # PyTorch warns of an empty graph.
        graph.capture_end()


def _key_of(leaf: Leaf) -> Hashable:
    """Return what a graph depends on: address, shape, strides and dtype of a tensor, the value of any other leaf."""
    if isinstance(leaf, torch.Tensor):
        return leaf.data_ptr(), tuple(leaf.shape), leaf.stride(), leaf.dtype
    return repr(leaf)
