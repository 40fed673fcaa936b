"""
Whether `torch.compile` is tracing the code that asks: PyTorch's own `is_dynamo_compiling`, without importing PyTorch.

Holds a reference to it. Dynamo takes the call for a constant, so only this reference is guarded.
To ask `sys.modules` in traced code would not do: Dynamo reads the whole of a dictionary in which something is looked
up, thousands of modules in each frame, and the compilation fails when anything is imported in the meantime.

And counts the stages of which tracing leaves nothing. Never looks at a stage's name: Dynamo would guard it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuscope._log import WarnOnce

    def is_dynamo_compiling() -> bool:
        """Return True while Dynamo traces the caller, False when it runs."""


MAX_PLACES = 1024
"""Places that are counted by name: code that is generated has as many as it likes."""
_NAME = "is_dynamo_compiling"
_OURS = __file__.removesuffix(os.path.join("_recording", "dynamo.py"))  # noqa: PTH118 - as Dynamo writes it: text
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


class Elisions:
    """The stages that were left out of compiled regions, in this process: by place, how often each was traced."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self._warnings: WarnOnce | None = None
        """None until recording has begun; by then logging is imported."""

    def add(self, place: str) -> None:
        """Count a stage; Dynamo holds its lock meanwhile."""
        if place not in self.places and len(self.places) >= MAX_PLACES:
            place = "elsewhere"
        self.places[place] = self.places.get(place, 0) + 1
        self._say()

    def listen(self) -> None:
        """Say from now on, once, that there are such stages: recording has begun."""
        from gpuscope._log import SUPPRESSED, WarnOnce

        if self._warnings is None:
            self._warnings = WarnOnce(f"{SUPPRESSED} `gpuscope.statistics().elided` has all.")
        self._say()

    def _say(self) -> None:
        if self._warnings is not None and self.places:
            with contextlib.suppress(Exception):  # What the application does with a log line breaks no compilation.
                self._warnings.warn(
                    "elided",
                    "`torch.compile` leaves out the stages inside what it compiles, as at %s. Put one around the "
                    "compiled callable to time it as a whole.",
                    next(iter(self.places)),
                )


class _IsUnderstood:
    """True from PyTorch 2.6 on, which is known to take a marked function without breaking the graph; 2.4 is not."""

    def __bool__(self) -> bool:
        version = str(getattr(_modules.get("torch"), "__version__", "0.0")).split(".")
        return tuple(map(int, version[:2])) >= (2, 6)


elisions = Elisions()


def gpuscope_left_out() -> None:
    """
    Count a stage in code that is being traced.

    Dynamo does not trace this, it calls it, and the call leaves no code and no graph break: that is what
    `torch.compiler.assume_constant_result` means by the attribute below, and itself it would import Dynamo. The result
    becomes a global of the traced module, as the compiled functions do, under the name of this function.
    """
    if is_dynamo_compiling():  # It traces this, too, where it does not understand.
        return
    place = "unknown"
    with contextlib.suppress(Exception):  # A private part of PyTorch may change; that breaks no compilation either.
        place = _place()
    elisions.add(place)


gpuscope_left_out._dynamo_marked_constant = _IsUnderstood()  # type: ignore[attr-defined]


def _place() -> str:
    """Return what Dynamo traces, `model.py:12 in forward`; of a decorated function that is compiled itself its name."""
    stack = _modules["torch._guards"].TracingContext.extract_stack()
    frame = next((frame for frame in reversed(stack) if not frame.filename.startswith(_OURS)), None)
    return f"{frame.filename}:{frame.lineno} in {frame.name}" if frame else str(stack[-1].name)
