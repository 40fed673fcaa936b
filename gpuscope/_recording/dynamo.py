"""
Whether `torch.compile` is tracing the code that asks, and a count of the stages that tracing leaves out.

Never imports PyTorch, and never looks at a stage's name, because Dynamo would guard it. Relies on four things:

* Dynamo takes a call of `torch.compiler.is_dynamo_compiling` for a constant, so of an `if` with it only the branch that
  is taken is traced. `is_compiling` would not do: from PyTorch 2.13 on it is true in all threads while one compiles,
  and the stages of the others would vanish.
* The function is a global of this module, so all that is guarded is that this global stays what it is. To ask
  `sys.modules` first whether PyTorch is there was tried, and failed: of a dictionary in which something is looked up,
  Dynamo reads the whole, thousands of modules in each frame, and when another thread imports something meanwhile the
  compilation ends with an error. So `_before_torch` asks, and puts PyTorch's function in its own place once it can.
* Dynamo can't trace what is in C. Where it finds a call of an object, it traces the `__call__` of its class, whatever
  Python itself would call. Thus a `Shortcut` has both.
* A function with the attribute `_dynamo_marked_constant` is called while Dynamo traces, and only its result is kept: no
  code, no graph break. Thus `gpuscope_left_out` can count. The attribute is private; it is what the public
  `torch.compiler.assume_constant_result` sets, and that would import Dynamo. Where it has no effect nothing is counted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from gpuscope._data.native import native

F = TypeVar("F", bound="Callable[..., object]")


if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._log import WarnOnce

    def is_dynamo_compiling() -> bool:
        """Return True while Dynamo traces the caller, False when it runs."""


MAX_PLACES = 1024
"""Places that are counted by name; generated code may have any number."""
_NAME = "is_dynamo_compiling"
_OURS = __file__.removesuffix(os.path.join("_recording", "dynamo.py"))  # noqa: PTH118 - as Dynamo writes it: text
_modules = sys.modules


def __getattr__(name: str) -> Callable[[], bool]:
    # Called for the first question only, even if Dynamo asks it: from then on the name is a global.
    if name != _NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _of_torch() or _before_torch)  # type: ignore[no-any-return]  # Nothing else is there.


def _of_torch() -> Callable[[], bool] | None:
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
    """The stages that were left out of compiled regions in this process: how often each was traced, by place."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self._warnings: WarnOnce | None = None
        """None until recording has begun; only then `logging` is imported."""

    def add(self, place: str) -> None:
        """Count a stage; Dynamo holds its lock meanwhile."""
        if place not in self.places and len(self.places) >= MAX_PLACES:
            place = "elsewhere"
        self.places[place] = self.places.get(place, 0) + 1
        self._say()

    def listen(self) -> None:
        """Warn from now on, once, that there are such stages; called when recording begins."""
        from gpuscope._log import SUPPRESSED, WarnOnce, later

        if self._warnings is None:
            self._warnings = WarnOnce(f"{SUPPRESSED} `gpuscope.statistics().elided` has all.", later)
        self._say()

    def _say(self) -> None:
        if self._warnings is not None and self.places:
            self._warnings.warn(
                "elided",
                "`torch.compile` leaves out the stages inside what it compiles, such as the one at %s. Put a stage "
                "around the compiled callable to time it as a whole.",
                next(iter(self.places)),
            )


class _IsUnderstood:
    """True from PyTorch 2.6 on, which takes a marked function without breaking the graph; 2.4 does not."""

    def __bool__(self) -> bool:
        version = str(getattr(_modules.get("torch"), "__version__", "0.0")).split(".")
        return tuple(map(int, version[:2])) >= (2, 6)


elisions = Elisions()


def gpuscope_left_out() -> None:
    """
    Count a stage in code that is being traced.

    Dynamo calls this instead of tracing it: see above. The result becomes a global of the traced module, as compiled
    functions do, under the name of this function.
    """
    if is_dynamo_compiling():  # Where the attribute below has no effect, Dynamo traces this as well.
        return
    place = "unknown"
    with contextlib.suppress(Exception):  # This part of PyTorch is private; if it changes, compilation must go on.
        place = _place()
    elisions.add(place)


gpuscope_left_out._dynamo_marked_constant = _IsUnderstood()  # type: ignore[attr-defined]


def _place() -> str:
    """Return what Dynamo traces, as `model.py:12 in forward`; the name alone if that is a decorated function itself."""
    stack = _modules["torch._guards"].TracingContext.extract_stack()
    frame = next((frame for frame in reversed(stack) if not frame.filename.startswith(_OURS)), None)
    return f"{frame.filename}:{frame.lineno} in {frame.name}" if frame else str(stack[0].name)


if TYPE_CHECKING or native is None:

    def in_c(function: F, *_parts: object) -> F:
        """Return the function itself, because nothing was built in C."""
        return function

    here_in_c = in_c

else:

    class _Function:
        """
        A function whose common calls are done in C, and the others by the function; it is known by the same name.

        Not a built-in function: those Dynamo traces only where PyTorch has been told so, which would import Dynamo.
        """

        def __init__(self, function: Callable[..., object], *_parts: object) -> None:
            functools.update_wrapper(self, function)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Do what the function does. Dynamo traces this; every other call is made in C."""
            return self.__wrapped__(*args, **kwargs)

        def __get__(self, instance: object, owner: type | None = None) -> _Function:
            """Bind to nothing, as a built-in function. By this, `inspect` and `help` take it for a function."""
            return self

        def __reduce__(self) -> str:
            """Pickle by name, as functions are."""
            return self.__qualname__

        def __repr__(self) -> str:
            """Show the function."""
            return repr(self.__wrapped__)

    class Shortcut(_Function, native.Shortcut):
        """`stage`."""

    class HereShortcut(_Function, native.HereShortcut):
        """`here`."""

    in_c, here_in_c = Shortcut, HereShortcut
