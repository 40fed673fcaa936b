"""
For frameworks that need more than a table: put a wrapper in a function's place, and find a method's name.

What fails here must not fail the program: a class that no import finds by its name is left as it is.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Protocol, TypeVar

from gpuscope.instrument import Target

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import TypeAlias

    Function: TypeAlias = Callable[..., object]
    """A framework's function: its arguments and its result are passed on as they are."""


R = TypeVar("R")


class Block(Protocol):
    """What this folder needs of a `with` block that it enters and leaves in two places, such as `gpuscope.stage`."""

    def __enter__(self) -> object:
        """Begin the block."""

    def __exit__(self, *exception: object) -> object:
        """End the block."""


def replace(
    undo: contextlib.ExitStack, owner: type | ModuleType, name: str, wrap: Callable[[Callable[..., R]], Function]
) -> None:
    """
    Put `wrap(function)` in a function's place, if there is such a function: versions differ.

    Args:
        undo: gets a callback that puts the function back, unless somebody else has replaced it since.
        owner: a class or a module.
        name: the function's name there; it may be inherited.
        wrap: takes the function, unbound, and returns another one.

    """
    function = getattr(owner, name, None)
    if function is None:
        return
    is_own, now = name in vars(owner), functools.wraps(function)(wrap(function))
    setattr(owner, name, now)

    def put_back() -> None:
        if vars(owner).get(name) is not now:
            return
        if is_own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)

    undo.callback(put_back)


def method_of(stage: str, kind: type, name: str, attributes: Mapping[str, str]) -> list[Target]:
    """
    Return a list with the target that wraps a class's method, or an empty one if the class has no such method.

    An inherited method is wrapped in this class, not where it comes from, which may be PyTorch's `Sequential`.

    Args:
        stage: the stage's name.
        kind: the class.
        name: the method's name.
        attributes: as for `Target`; expressions of parameters that this method does not have are left out.

    """
    method = next((vars(one)[name] for one in kind.__mro__ if name in vars(one)), None)
    if method is None:
        return []
    try:
        parameters = inspect.signature(method).parameters
        known = {key: text for key, text in attributes.items() if text.partition(".")[0] in parameters}
        return [Target(stage, f"{kind.__module__}:{kind.__qualname__}.{name}", known)]
    except (TypeError, ValueError):  # A class that was made within a function, or under a name that no import finds.
        return []
