"""
Whether a captured function keeps tensors from one call to the next, which replays of its graph would not renew.

Asks PyTorch's allocator which memory of the graph's pool is in use. Only at captures.
"""

from __future__ import annotations

import gc
from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.cuda import _POOL_HANDLE

    from gpuscope._overlap.leaves import Leaf

_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def can_tell() -> bool:
    """Return whether this PyTorch and its allocator can say what is in use."""
    return _use_count is not None and torch.cuda.get_allocator_backend() == "native"


def without_collecting(found: Callable[[], bool]) -> bool:
    """Ask again after a garbage collection if it is so, because tensors in reference cycles are nobody's."""
    if not found():
        return False
    gc.collect()
    return found()


class Pool:
    """Memory that the graphs of one function share."""

    def __init__(self) -> None:
        self.handle: _POOL_HANDLE = torch.cuda.graph_pool_handle()
        self._ours: set[int] = set()
        """Addresses of the outputs of the graphs so far."""

    def is_kept_by_program(self, inputs: Iterable[Leaf], counts: Counter[int], outputs: Iterable[Leaf]) -> bool:
        """
        Tell whether the program holds memory of the pool, or tensors that share the inputs' memory.

        Args:
            inputs: of the captured call.
            counts: what `counts_of` said of them before the call.
            outputs: of the call, all as tensors that only we hold.

        """
        ours = tensors_of(outputs)
        per_storage = Counter(each.untyped_storage()._cdata for each in ours)
        in_use = self._in_use()
        self._ours |= {each.untyped_storage().data_ptr() for each in ours}
        new = [each for each in ours if each.untyped_storage().data_ptr() in in_use]
        return (
            bool(in_use - self._ours)
            or any(_count(each) > per_storage[each.untyped_storage()._cdata] for each in new)
            or any(now > counts[storage] + per_storage[storage] for storage, now in counts_of(inputs).items())
        )

    def holds_more(self) -> bool:
        """Tell whether anything in the pool is in use but the outputs of graphs."""
        return bool(self._in_use() - self._ours)

    def _in_use(self) -> set[int]:
        found = set()
        for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
            if tuple(segment["segment_pool_id"]) == tuple(self.handle):
                address = segment["address"]
                for block in segment["blocks"]:
                    if block["state"] == "active_allocated":
                        found.add(address)
                    address += block["size"]
        return found


def tensors_of(leaves: Iterable[Leaf]) -> list[torch.Tensor]:
    """Return the tensors on GPUs."""
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda]


def counts_of(leaves: Iterable[Leaf]) -> Counter[int]:
    """Return how many tensors share the memory of each of these, by storage."""
    return Counter({each.untyped_storage()._cdata: _count(each) for each in tensors_of(leaves)})


def _count(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return _use_count(storage._cdata) - 1 if _use_count else 0  # Without `storage`.
