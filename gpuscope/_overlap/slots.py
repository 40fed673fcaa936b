"""
The memory of one batch in flight: allocated once, grown to the largest batch so far, and reused by later batches.

Enqueues copies on the current stream. Knows nothing of events or order: whoever uses a slot must know when it is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch.utils import _pytree as pytree

from gpuscope._overlap import leaves as known
from gpuscope._overlap.buffers import GrowingBuffer
from gpuscope._overlap.leaves import FlatTree, taken_apart
from gpuscope.pinned._memory import copy_on_host

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeGuard

    from gpuscope._overlap.leaves import Leaf, Tree

T = TypeVar("T")


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
        self._let_go()
        flat = taken_apart(batch)
        return flat._replace(leaves=self._each(flat.leaves, self._host, self._pinned))

    def borrows(self, pinned: FlatTree) -> bool:
        """Tell whether tensors on the host are the program's own."""
        return any(
            _is_on_host(leaf) and not buffer.holds(leaf.data_ptr())
            for leaf, buffer in zip(pinned.leaves, self._host, strict=False)
        )

    def reserve(self, pinned: FlatTree) -> bool:
        """Have the memory on the device that `upload` needs; return whether some of it is new."""
        return any(self._each(pinned.leaves, self._inputs, self._reserved))

    def upload(self, pinned: FlatTree) -> Tree:
        """Enqueue the copies to the device on the current stream; return the batch on the device."""
        return pinned._replace(leaves=self._each(pinned.leaves, self._inputs, self._uploaded)).tree()

    def stage(self, outputs: FlatTree, given: FlatTree) -> FlatTree:
        """
        Return copies of the outputs, those on GPUs on this slot's device, enqueued on its current stream.

        From another GPU, PyTorch has the current streams of both wait for each other. The outputs themselves have to be
        held until the copies are done, because their memory may be another stream's. Objects of the batch as it was
        `given` pass as they are.
        """
        memo = {id(leaf): leaf for leaf in given.leaves}
        return outputs._replace(leaves=[self._staged(leaf, memo) for leaf in outputs.leaves])

    def download(self, outputs: FlatTree) -> FlatTree:
        """Enqueue the copies from the device on the current stream; return the outputs on the host."""
        return outputs._replace(leaves=self._each(outputs.leaves, self._outputs, self._downloaded))

    def apart(self, result: Tree) -> Tree:
        """
        Return the result, with copies of the tensors and arrays that lie in this slot's memory.

        What a result holds where this does not look keeps that memory for itself: see `GrowingBuffer`.
        """
        return result if known.is_atom(result) else pytree.tree_map(self._apart, result, is_leaf=_is_whole)

    def _let_go(self) -> None:
        for buffers in (self._host, self._inputs, self._outputs):
            for buffer in buffers:
                buffer.let_go()

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
            host = buffer.shaped(leaf.shape, known.torch_dtype(leaf), known.dense_strides_of_array(leaf))
            np.copyto(host.numpy(), leaf)
            return host if self._cuda else host.view(host.shape)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not leaf.is_cpu:
            return leaf
        known.check_input(leaf)
        leaf = leaf.detach()
        strides = known.dense_strides(leaf)
        if self._cuda and strides in (None, leaf.stride()) and not has_lazy_bits(leaf) and leaf.is_pinned():
            return leaf
        host = buffer.shaped(leaf.shape, leaf.dtype, strides)
        if strides is None:
            copy_on_host(host, leaf)
        else:
            host.copy_(leaf)
        # Without a GPU `infer` gets this one, so it is a new tensor, whose shape `infer` may change.
        return host if self._cuda else host.view(host.shape)

    def _reserved(self, leaf: Leaf, buffer: GrowingBuffer) -> bool:
        if not _is_on_host(leaf):
            return False
        buffer.shaped(leaf.shape, leaf.dtype, known.dense_strides(leaf))
        return buffer.grew

    def _uploaded(self, leaf: Leaf, buffer: GrowingBuffer) -> Leaf:
        if not _is_on_host(leaf):
            return leaf
        there = buffer.shaped(leaf.shape, leaf.dtype, known.dense_strides(leaf))
        there.copy_(leaf, non_blocking=True)
        return there.view(there.shape)

    def _staged(self, leaf: Leaf, memo: dict[int, object]) -> Leaf:
        if isinstance(leaf, np.ndarray):
            return known.copied_object(leaf, memo) if leaf.dtype.hasobject else np.array(leaf, subok=True)
        if not isinstance(leaf, torch.Tensor):
            return known.copied_object(leaf, memo)
        known.check_type(leaf)
        if not (self._cuda and leaf.is_cuda):
            return _cloned(leaf)
        known.check_output(leaf)
        leaf = leaf.detach()
        return leaf.clone() if leaf.device == self.device else leaf.to(self.device, non_blocking=True)

    def _downloaded(self, leaf: Leaf, buffer: GrowingBuffer) -> Leaf:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_cuda:
            return leaf
        known.check_output(leaf)
        leaf = leaf.detach()
        if has_lazy_bits(leaf):  # PyTorch would resolve them on the host, before the copy has arrived there.
            leaf = leaf.resolve_conj().resolve_neg()
        host = buffer.shaped(leaf.shape, leaf.dtype, known.dense_strides(leaf))
        host.copy_(leaf, non_blocking=True)
        return host.view(host.shape)

    def _apart(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided:
            return leaf.clone() if self._holds(leaf.data_ptr()) else leaf
        if isinstance(leaf, np.ndarray):
            return leaf.copy() if self._holds(leaf.__array_interface__["data"][0]) else leaf
        return leaf

    def _holds(self, address: int) -> bool:
        return any(buffer.holds(address) for buffer in (*self._host, *self._outputs))


def has_lazy_bits(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor stands for the conjugate or the negative of its elements in memory."""
    return tensor.is_conj() or tensor.is_neg()


def _cloned(leaf: torch.Tensor) -> torch.Tensor:
    if not leaf.requires_grad:
        return leaf.clone()
    with torch.enable_grad():  # A parameter that `infer` returns without gradients requires them all the same.
        return leaf.clone()


def _is_whole(node: Tree) -> bool:
    # Also a long list of numbers, say, which would take longer to search than it took to make.
    return known.is_size(node) or (isinstance(node, list | tuple) and len(node) > known.MAX_SEARCHED)


def _is_on_host(leaf: Leaf) -> TypeGuard[torch.Tensor]:
    return isinstance(leaf, torch.Tensor) and leaf.is_cpu
