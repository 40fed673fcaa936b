"""
A PyTorch model by module: each of its children a stage, for a look at where in the model the time goes.

Called by code, for one model; no framework's file. A stage a child is a few microseconds a child: not for always.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["stage_children"]


class _Open(threading.local):
    """The stages of children that run in this thread, the innermost last, with what was being handled then."""

    def __init__(self) -> None:
        self.stack: list[tuple[Any, Any, BaseException | None]] = []


_open = _Open()


def stage_children(model: nn.Module) -> Callable[[], None]:
    """
    Make a stage of each call of each direct child of a module, named as the module calls it (`layer1`, `head`).

    Uses PyTorch's forward hooks, so a copy of the model has them too, and what `torch.compile` traces has no stages.
    Not for a model that is to be scripted by `torch.jit.script`, or pickled whole to where there is no gpuscope.

    Args:
        model: whose children are to be stages; call it again on a child for a level below.

    Returns:
        What takes the hooks away again.

    Raises:
        TypeError: for what has no children to name.

    """
    if not hasattr(model, "named_children"):
        raise TypeError(f"`stage_children` takes an `nn.Module`, not {model!r}.")
    undo = contextlib.ExitStack()
    for name, child in model.named_children():
        # First, so that no other's hook can fail between ours and the child.
        undo.callback(child.register_forward_pre_hook(_Begin(name), prepend=True).remove)
        undo.callback(child.register_forward_hook(_end, always_call=True).remove)
    return undo.close


class _Begin:
    """Opens the stage; an object, not a closure, so that a model with it can be copied and pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: Any, _inputs: Any) -> None:
        if not gpuscope.is_enabled():
            return
        stage = gpuscope.stage(self.name)
        stage.__enter__()
        _open.stack.append((module, stage, sys.exc_info()[1]))


def _end(module: Any, _inputs: Any, _outputs: Any) -> None:
    if _open.stack and _open.stack[-1][0] is module:
        _, stage, handled_before = _open.stack.pop()
        error = sys.exc_info()[1]
        # PyTorch calls this within its `except` where the child raised; the caller may be within one of its own.
        stage.__exit__(*((None,) * 3 if error is handled_before else sys.exc_info()))
