"""
A function of device tensors as CUDA graphs, one per set of inputs, so that its dispatch costs next to nothing.

A function that can't be captured, or that replays would make wrong, is called as it is, and `reason` says why. Each
batch is computed once, also where a graph is made for it. Only a capture waits for the device.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import threading
import traceback
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from gpuscope._cuda.driver import CAPTURE_MODE_RELAXED, Handle, load_driver
from gpuscope._data.plain.values import shown
from gpuscope._log import logger
from gpuscope._overlap.kept import Pool, can_tell, counts_of, without_collecting
from gpuscope._overlap.leaves import PLAIN, is_atom, taken_apart
from gpuscope._overlap.modes import modes_of_thread
from gpuscope.pinned._memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from gpuscope._overlap.leaves import FlatTree, Leaf, Tree

REHEARSALS = 3
"""Batches that are computed on a side stream before a capture: what first calls allocate, tune and compile can't be
captured. As in https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture."""
MAX_GRAPHS = 16
"""Inputs of further shapes, or at further addresses, are not captured, because each graph holds memory."""
MAX_REHEARSED = 1000
"""Kinds of inputs that are counted."""


class CapturedCall(NamedTuple):
    """One call of the function as a graph."""

    structure: pytree.TreeSpec | None
    """Of the inputs."""
    graph: torch.cuda.CUDAGraph
    outputs: FlatTree


class GraphedFunction:
    """
    Calls a function by replaying CUDA graphs.

    A graph belongs to the addresses of its inputs and to the modes in which it was captured. All graphs share one pool
    of memory: any next call may overwrite the results, so they have to be copied on the current stream.

    Args:
        function: takes one tree of tensors on the device and returns one.

    """

    def __init__(self, function: Callable[[Tree], Tree]) -> None:
        self.reason = ""
        """Why the function is called without a graph; empty if it isn't."""
        self._full = False
        self._broken = ""
        """Why it can't be called at all."""
        self._function = function
        self._pool: Pool | None = None
        self._captured: dict[Hashable, list[CapturedCall]] = {}
        """By the keys of the inputs' leaves; the few with the same keys differ in structure."""
        self._rehearsed: dict[Hashable, int] = {}
        """How many calls there were with such inputs, wherever they were."""
        self._last: torch.cuda.CUDAGraph | None = None
        """One that is not replayed again, but whose memory the program holds."""
        if not can_tell():
            self.reason = "PyTorch's allocator can't tell whether `infer` keeps tensors from one call to the next"
        survives_forks(self)

    @property
    def state(self) -> str:
        """`on`, with a limit that was reached, or why not; for people."""
        return self.reason or (f"on, for the first {MAX_GRAPHS} different inputs only" if self._full else "on")

    def __call__(self, inputs: Tree) -> Tree | FlatTree:
        """Return the function's results, on the current stream; those of a graph taken apart, as they are kept."""
        if self._broken:
            raise RuntimeError(self._broken)
        if self.reason:
            return self._function(inputs)
        flat = taken_apart(inputs)
        modes, kinds = modes_of_thread(), tuple(map(_kind_of, flat.leaves))
        key = modes, kinds, tuple(map(_address_of, flat.leaves))
        for captured in self._captured.get(key, ()):
            if captured.structure == flat.structure:
                captured.graph.replay()
                return captured.outputs
        if None in kinds:
            self._give_up("its inputs hold objects that nobody can compare; give it tensors, numbers and texts")
            return self._function(inputs)
        if self._is_rehearsed((modes, kinds)):
            return self._capture(key, flat, inputs)
        return self._function(inputs) if self._full else self._beside(inputs)

    def _is_rehearsed(self, like: Hashable) -> bool:
        if sum(map(len, self._captured.values())) >= MAX_GRAPHS or len(self._rehearsed) >= MAX_REHEARSED:
            self._full = True
            return False
        count = self._rehearsed.get(like, 0)
        self._rehearsed[like] = count + 1
        return count >= REHEARSALS

    def _beside(self, inputs: Tree) -> Tree:
        current = torch.cuda.current_stream()
        beside = _stream_beside(current.device.index, threading.get_ident())
        beside.wait_stream(current)
        try:
            with torch.cuda.stream(beside), _no_autocast_cache():
                return self._function(inputs)
        finally:
            current.wait_stream(beside)

    def _capture(self, key: Hashable, flat: FlatTree, inputs: Tree) -> Tree | FlatTree:
        self._pool = pool = self._pool or Pool()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        beside = _stream_beside(current.device.index, threading.get_ident())
        counts = counts_of(flat.leaves)
        try:
            with (
                _no_autocast_cache(),
                torch.cuda.graph(graph, pool=pool.handle, stream=beside, capture_error_mode="thread_local"),
            ):
                outputs = pytree.tree_map_only(torch.Tensor, _without_lazy_bits, self._function(_views_of(flat)))
        except Exception as error:  # Whatever the function did that a capture does not allow.
            torch.cuda.set_stream(current)  # PyTorch leaves the capture's stream current.
            _end_for_good(graph, beside)
            self._failed(pool, error)
            return self._function(inputs)
        graph.replay()  # What was captured has not run yet.
        returned = taken_apart(outputs)
        reason = _why_not(returned)
        if not reason:
            # As tensors of our own, so that what else refers to their memory is the program's.
            returned = returned._replace(leaves=[_alias(leaf) for leaf in returned.leaves])
            outputs = None
            if without_collecting(lambda: pool.is_kept_by_program(flat.leaves, counts, returned.leaves)):
                reason = "it keeps tensors from one call to the next, which replays would not renew"
        if reason:
            self._last = graph
            self._give_up(reason)
            return returned
        self._captured.setdefault(key, []).append(CapturedCall(flat.structure, graph, returned))
        return returned

    def _failed(self, pool: Pool, error: Exception) -> None:
        self._give_up(f"its capture failed: {shown(error)}")
        _let_go_of_frames(error)
        if without_collecting(pool.holds_more):
            self._broken = (
                "`infer` kept tensors of a call whose capture as a CUDA graph failed, so they were never computed: "
                f"leave out `graph=True`. It failed with {shown(error)}."
            )
            raise RuntimeError(self._broken) from error

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        logger.warning("no CUDA graph of `infer`: %s; calling it without one.", reason)


def _let_go_of_frames(error: BaseException | None) -> None:
    """Clear the frames of an exception and of those that it came after: they hold the tensors of the call."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Leave out the cache of autocast, which would lie in the memory of a graph or of a side stream."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _why_not(outputs: FlatTree) -> str:
    """Return why replays would not give such outputs; empty if they do."""
    for leaf in outputs.leaves:
        if not isinstance(leaf, torch.Tensor):
            if not is_atom(leaf):
                return f"it returns a `{type(leaf).__qualname__}`, which replays would not renew"
        elif type(leaf) not in PLAIN:
            return f"it returns a tensor of the subclass `{type(leaf).__qualname__}`"
        elif not leaf.is_cuda:
            return f"it returns a tensor on {leaf.device}, which replays would not renew"
        elif leaf.requires_grad:
            return "its outputs require gradients; run the loop under `torch.no_grad()` or `torch.inference_mode()`"
    return ""


def _views_of(inputs: FlatTree) -> Tree:
    """Return the inputs as new tensors, so that it shows if the program keeps one."""
    leaves = inputs.leaves
    return inputs._replace(leaves=[x.view(x.shape) if isinstance(x, torch.Tensor) else x for x in leaves]).tree()


def _without_lazy_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg()


def _alias(leaf: Leaf) -> Leaf:
    """Return a tensor on the same memory that holds no other tensor, as a view holds its base."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    with torch.inference_mode(mode=False):
        alias = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        return alias.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())


@functools.cache
def _stream_beside(device: int, _thread: int) -> torch.cuda.Stream:
    """
    One for all calls and captures of a thread on a device: PyTorch keeps a cuBLAS workspace per stream for ever.

    Memory that is freed on it is used again in the order of one thread's calls only.
    """
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


def _kind_of(leaf: Leaf) -> Hashable:
    """Return what a graph depends on but the address; None for an object whose value nobody knows."""
    if isinstance(leaf, torch.Tensor):
        bits = leaf.is_conj(), leaf.is_neg(), leaf.requires_grad
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, bits
    return _kind_of_atom(leaf) if is_atom(leaf) else None


def _kind_of_atom(leaf: Leaf) -> Hashable:
    kind = type(leaf)
    if kind is float or kind is complex:  # By text, because 0.0 and -0.0 are equal, and a NaN is not.
        return kind, repr(leaf)
    if isinstance(leaf, range):  # Two that are empty are equal.
        return kind, leaf.start, leaf.stop, leaf.step
    if isinstance(leaf, enum.Enum):  # The program may say how it is shown and compared.
        return kind, id(leaf)
    if isinstance(leaf, np.generic):
        return kind, np.generic.dtype.__get__(leaf), np.generic.tobytes(leaf)
    return kind, leaf


def _address_of(leaf: Leaf) -> int:
    return leaf.data_ptr() if isinstance(leaf, torch.Tensor) else 0
