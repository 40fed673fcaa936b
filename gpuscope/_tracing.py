"""
Whether `torch.compile` is tracing the code that asks: PyTorch's own `is_dynamo_compiling`, without importing PyTorch.

Holds a reference to it and nothing else. Dynamo takes the call for a constant, so only this reference is guarded.
To ask `sys.modules` in traced code would not do: Dynamo reads the whole of a dictionary in which something is looked
up, thousands of modules in each frame, and the compilation fails when anything is imported in the meantime.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    def is_dynamo_compiling() -> bool:
        """Return True while Dynamo traces the caller, False when it runs."""


_NAME = "is_dynamo_compiling"
_modules = sys.modules


def __getattr__(name: str) -> Any:
    # The first question, also when Dynamo asks it: it looks attributes of modules up for good.
    if name != _NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _of_torch() or _before_torch)


def _of_torch() -> Any:
    return getattr(_modules.get("torch.compiler"), _NAME, None)


def _before_torch() -> bool:
    """Stand in for PyTorch's function until the program has imported that."""
    if "torch.compiler" not in _modules:
        return False
    found = _of_torch()
    if found is None:  # Another thread is importing it.
        return False
    if found():
        return True
    globals()[_NAME] = found
    return False
