"""
For the files here that wrap more than a table says: put something in a function's place, and find a method's name.

What fails here must not fail the program: a class that cannot be named is left as it is.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from gpuscope.instrument import Target

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Mapping


def replace(undo: contextlib.ExitStack, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """
    Put `wrap(function)` in a function's place, where there is one: versions differ.

    Args:
        undo: is given what puts it back, unless somebody else has replaced it since.
        owner: a class or a module.
        name: of the function there, which may be inherited.
        wrap: takes the function, unbound, and returns another.

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
    Return the target that is a class's method, where it has one.

    An inherited method is this class's all the same, and is wrapped there: its owner may be PyTorch's `Sequential`.

    Args:
        stage: the stage's name.
        kind: the class.
        name: of the method.
        attributes: as a target's; those of parameters that this method does not have are left out.

    """
    method = next((vars(one)[name] for one in kind.__mro__ if name in vars(one)), None)
    if method is None:
        return []
    try:
        parameters = inspect.signature(method).parameters
        known = {key: text for key, text in attributes.items() if text.partition(".")[0] in parameters}
        return [Target(stage, f"{kind.__module__}:{kind.__qualname__}.{name}", known)]
    except (TypeError, ValueError):  # Made within a function, or under a name that no import finds.
        return []
