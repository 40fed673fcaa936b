"""
Outputs that require gradients, on the host: still part of the graph that they were computed in, as `.cpu()` has them.

Only for programs that run the loop without `no_grad`. Waits for nothing: the copies must have arrived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gpuscope._overlap.leaves import FlatTree, Tree

Found = list[tuple[int, torch.Tensor]]
"""Outputs on a device that require gradients, by their places among the leaves."""


class _Arrived(torch.autograd.Function):
    """A copy on the host, whose gradient goes back to the device."""

    @staticmethod
    def forward(ctx: Any, there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        ctx.device = there.device
        return here.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].to(ctx.device), None


def with_gradients(outputs: FlatTree) -> Found:
    """Return the outputs on a GPU that require gradients."""
    return [
        (place, leaf)
        for place, leaf in enumerate(outputs.leaves)
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda and leaf.requires_grad
    ]


def connected(arrived: FlatTree, found: Found) -> Tree:
    """Return the outputs on the host, those that require gradients connected with where they come from."""
    leaves = list(arrived.leaves)
    with torch.inference_mode(mode=False), torch.enable_grad():
        for place, leaf in found:
            leaves[place] = _Arrived.apply(leaf, leaves[place])  # type: ignore[no-untyped-call]
    return arrived._replace(leaves=leaves).tree()
