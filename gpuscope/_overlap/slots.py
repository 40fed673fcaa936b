"""
The memory of one batch in flight: allocated once, grown to the largest batch so far, and reused by later batches.

Enqueues copies in and out on the current stream. Knows nothing of events or order: whoever uses a slot must know when
it is free.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch.utils import _pytree as pytree

from gpuscope.pinned._memory import copy_on_host

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeGuard

    from gpuscope.pinned._checks import Array

Tree: TypeAlias = Any
"""Nested containers, as `torch.utils._pytree` knows them, of tensors, arrays and other leaves. PyTorch has no type."""
Leaf: TypeAlias = object

T = TypeVar("T")

MAX_SEARCHED = 1000
"""Longer lists and tuples in a result are not searched for tensors in a slot's memory."""


class GrowingBuffer:
    """Bytes on the host or on a device. Each use gets as many as it needs, and new memory if they don't suffice."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self.grew = False
        """Whether the last use needed new memory."""
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self._last: torch.Tensor | None = None

    def shaped(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor on the first bytes; it overwrites what was there before."""
        last = self._last
        self.grew = False
        if last is None or last.dtype is not dtype or last.shape != shape:
            self._last = last = self._cut(shape, dtype)
        return last

    def _cut(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = dtype.itemsize * math.prod(shape)
        self.grew = size > self._bytes.numel()
        # A view made in the caller's inference mode could not be used outside it.
        with torch.inference_mode(False):
            if self.grew:
                self._bytes = _empty(size, self._bytes.device, pinned=self._pinned)
            return self._bytes[:size].view(dtype).view(shape)

    def holds(self, address: int) -> bool:
        """Tell whether an address is in this memory."""
        start = self._bytes.data_ptr()
        return start <= address < start + self._bytes.numel()


def _empty(size: int, device: torch.device, *, pinned: bool) -> torch.Tensor:
    if pinned:
        from gpuscope.pinned import PinnedBuffer

        pages: torch.Tensor = PinnedBuffer((size,), torch.uint8).tensor
        return pages
    return torch.empty(size, dtype=torch.uint8, device=device)


class FlatTree(NamedTuple):
    """A tree taken apart: its leaves, and the structure, which is None for a lone leaf."""

    leaves: list[Leaf]
    structure: pytree.TreeSpec | None

    def tree(self) -> Tree:
        """Put the tree together again."""
        return self.leaves[0] if self.structure is None else pytree.tree_unflatten(self.leaves, self.structure)


def taken_apart(tree: Tree) -> FlatTree:
    """Take a tree apart; a lone tensor, as most trees are, needs no search."""
    return FlatTree([tree], None) if type(tree) is torch.Tensor else FlatTree(*pytree.tree_flatten(tree))


class Slot:
    """
    Memory for the inputs and the outputs of one batch, leaf by leaf.

    Args:
        device: where the inputs go. On the CPU they are copied too, so that `infer` never gets the caller's tensors.

    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._host: list[GrowingBuffer] = []
        self._inputs: list[GrowingBuffer] = []
        self._outputs: list[GrowingBuffer] = []

    def pin(self, batch: Tree) -> FlatTree:
        """Copy what has to be uploaded into pinned memory; what is pinned already, or on the device, stays as it is."""
        flat = taken_apart(batch)
        return flat._replace(leaves=self._each(flat.leaves, self._host, self._pinned))

    def reserve(self, pinned: FlatTree) -> bool:
        """Have the memory on the device that `upload` needs; return whether some of it is new."""
        return any(self._each(pinned.leaves, self._inputs, self._reserved))

    def upload(self, pinned: FlatTree) -> Tree:
        """Enqueue the copies to the device on the current stream; return the batch on the device."""
        return pinned._replace(leaves=self._each(pinned.leaves, self._inputs, self._uploaded)).tree()

    def download(self, outputs: Tree) -> Tree:
        """Enqueue the copies from the device on the current stream; return the outputs on the host."""
        flat = taken_apart(outputs)
        return flat._replace(leaves=self._each(flat.leaves, self._outputs, self._downloaded)).tree()

    def apart(self, result: Tree) -> Tree:
        """Return the result, with copies of the tensors and arrays that lie in this slot's memory."""
        return pytree.tree_map(self._apart, result, is_leaf=_is_long)

    def _each(
        self, leaves: list[Leaf], buffers: list[GrowingBuffer], function: Callable[[Leaf, GrowingBuffer], T]
    ) -> list[T]:
        """Call a function with each leaf and the buffer of its place."""
        if len(buffers) < len(leaves):
            pinned = buffers is not self._inputs and self._cuda
            where = self.device if buffers is self._inputs else torch.device("cpu")
            buffers += [GrowingBuffer(where, pinned=pinned) for _ in range(len(leaves) - len(buffers))]
        return list(map(function, leaves, buffers))

    def _pinned(self, leaf: Leaf, buffer: GrowingBuffer) -> Leaf:
        if isinstance(leaf, np.ndarray):
            host = buffer.shaped(leaf.shape, _torch_dtype(leaf))
            np.copyto(host.numpy(), leaf)
            return host
        if not isinstance(leaf, torch.Tensor) or not leaf.is_cpu:
            return leaf
        _check(leaf, "a batch")
        if self._cuda and leaf.is_contiguous() and leaf.is_pinned():
            return leaf.detach()
        host = buffer.shaped(leaf.shape, leaf.dtype)
        copy_on_host(host, leaf.detach())
        # Without a GPU `infer` gets this one, so it is a new tensor, whose shape `infer` may change.
        return host if self._cuda else host.view(host.shape)

    def _reserved(self, leaf: Leaf, buffer: GrowingBuffer) -> bool:
        if not _is_on_host(leaf):
            return False
        buffer.shaped(leaf.shape, leaf.dtype)
        return buffer.grew

    def _uploaded(self, leaf: Leaf, buffer: GrowingBuffer) -> Leaf:
        if not _is_on_host(leaf):
            return leaf
        there = buffer.shaped(leaf.shape, leaf.dtype)
        there.copy_(leaf, non_blocking=True)
        return there.view(there.shape)

    def _downloaded(self, leaf: Leaf, buffer: GrowingBuffer) -> Leaf:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_cuda:
            return leaf
        _check(leaf, "the outputs of `infer`")
        host = buffer.shaped(leaf.shape, leaf.dtype)
        host.copy_(leaf.detach() if leaf.requires_grad else leaf, non_blocking=True)
        return host.view(host.shape)

    def _apart(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided:
            return leaf.clone() if self._holds(leaf.data_ptr()) else leaf
        if isinstance(leaf, np.ndarray):
            return leaf.copy() if self._holds(leaf.__array_interface__["data"][0]) else leaf
        return leaf

    def _holds(self, address: int) -> bool:
        return any(buffer.holds(address) for buffer in (*self._host, *self._outputs))


def _is_long(node: Tree) -> bool:
    # A list of numbers, say, which would take longer to search than it took to make.
    return isinstance(node, list | tuple) and len(node) > MAX_SEARCHED


def _is_on_host(leaf: Leaf) -> TypeGuard[torch.Tensor]:
    return isinstance(leaf, torch.Tensor) and leaf.is_cpu


def _torch_dtype(array: Array) -> torch.dtype:
    try:
        return torch.from_numpy(np.empty(0, array.dtype)).dtype
    except TypeError:
        raise TypeError(
            f"An array in a batch is of {array.dtype}, which PyTorch does not have: convert it in `prepare`."
        ) from None


def _check(tensor: torch.Tensor, where: str) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"A tensor in {where} has the layout {tensor.layout}: expected a dense tensor. Copy its parts, or call "
            "`.to_dense()`."
        )
