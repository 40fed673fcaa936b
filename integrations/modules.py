"""
A PyTorch model by module: each of its children is a stage, to see where in the model the time goes.

The program calls it, for one model; no framework's name selects it. It costs a few microseconds per child and call, so
it is not for permanent use.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ._wrapping import Block

__all__ = ["stage_children"]


class _Open(threading.local):
    """This thread's open stages, innermost last: module, stage, and the exception that was being handled before."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, Block, BaseException | None]] = []


_open = _Open()


def stage_children(model: nn.Module) -> Callable[[], None]:
    """
    Make each call of each direct child of a module a stage, with the child's name in the module (`layer1`, `head`).

    It uses PyTorch's forward hooks. So a copy of the model has them too, and what `torch.compile` traces has no stages.
    It is not for a model that is to be scripted by `torch.jit.script`, or pickled whole for a place without gpuscope.

    Args:
        model: the module; for the next level below, call this again with a child.

    Returns:
        A function that removes the hooks again.

    Raises:
        TypeError: if `model` is not an `nn.Module`, that is, has no `named_children`.

    """
    if not hasattr(model, "named_children"):
        raise TypeError(f"`stage_children` takes an `nn.Module`, not an object of type `{type(model).__qualname__}`.")
    undo = contextlib.ExitStack()
    for name, child in model.named_children():
        # As the first hook, so that no other one can fail between ours and the child.
        undo.callback(child.register_forward_pre_hook(_Begin(name), prepend=True).remove)
        undo.callback(child.register_forward_hook(_end, always_call=True).remove)
    return undo.close


class _Begin:
    """Begins the stage. It is an object, not a closure, so that a model with it can be copied and pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, _inputs: object) -> None:
        if not gpuscope.is_enabled():
            return
        stage = gpuscope.stage(self.name)
        stage.__enter__()
        _open.stack.append((module, stage, sys.exc_info()[1]))


def _end(module: nn.Module, _inputs: object, _outputs: object) -> None:
    if _open.stack and _open.stack[-1][0] is module:
        _, stage, handled_before = _open.stack.pop()
        error = sys.exc_info()[1]
        # If the child raised, PyTorch calls this inside its `except`; the caller may be inside an `except` of its own.
        stage.__exit__(*((None,) * 3 if error is handled_before else sys.exc_info()))
