"""
What replaces a function: the same function as a stage, with attributes read from its arguments.

Changes nothing in the program; `instrument._patching` does.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

import wrapt

from gpuscope._data.plain.values import message_of, shown, snapshot_mapping
from gpuscope._errors import UnsuitableError
from gpuscope._interrupts import is_an_interrupt
from gpuscope._log import WarnOnce, later
from gpuscope._recording.arguments import expressions
from gpuscope._recording.arguments.pre_hook import with_pre_hook
from gpuscope._recording.hot_path import current
from gpuscope._recording.queue import tell
from gpuscope._recording.stage import stage
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import SupportsIndex

    from gpuscope._recording.arguments.pre_hook import Function, PreHook
    from gpuscope.instrument._targets import Target

Member: TypeAlias = Any
"""What a module or class has under a name. `Any`, because its kind is asked for at run time, and kept."""


def as_stage(target: Target, found: Member) -> Member:
    """
    Return what was found under a name, as a stage of the same kind; an attribute of a class is taken unbound.

    Raises:
        UnsuitableError: if it is not a function.

    """
    if isinstance(found, staticmethod | classmethod):
        return type(found)(as_stage(target, found.__func__))
    if isinstance(found, functools.partialmethod):
        return functools.partialmethod(as_stage(target, found.func), *found.args, **found.keywords)
    _check(found)
    attributes = _ArgumentAttributes(target, found)
    if not isinstance(found, FunctionType):
        if target.members is not None:
            raise UnsuitableError("`members` are of plain and coroutine functions.")
        return _wrapped_object(target, found, attributes)
    batch = {name: getattr(target, name) for name in ("members", "weights", "basis", "key")}
    wrapped = with_pre_hook(found, attributes.pre_hook(found)) if attributes.readers else found
    try:
        return stage(target.stage, **batch)(wrapped)
    except (TypeError, ValueError) as error:
        if target.members is None:
            raise
        raise UnsuitableError(message_of(error)) from error


def _check(found: Member) -> None:
    if isinstance(found, type):
        raise UnsuitableError(f"it is a class; name one of its methods, as in `{found.__name__}.__call__`.")
    if isinstance(found, property | functools.cached_property):
        raise UnsuitableError("it is a property; name the function that it calls.")
    if not callable(found):
        raise UnsuitableError(f"it is of type `{type(found).__name__}`, which cannot be called; name a function.")
    if not inspect.isroutine(found) and not hasattr(type(found), "__get__"):
        # No other object can take its place: programs ask for its type, and keep it in lists of children.
        raise UnsuitableError(f"it is an instance; name its method, as in `{type(found).__name__}.__call__`.")


class _StageObject(wrapt.FunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]
    """
    A callable written in C, or one whose attributes matter (`functools.lru_cache`), as a stage.

    Everything but the call is the callable's own.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        """Pickle it as what it stands for: nearly always as its name."""
        reduced: str | tuple[object, ...] = self.__wrapped__.__reduce_ex__(protocol)
        return reduced


def _wrapped_object(target: Target, found: Function, attributes: _ArgumentAttributes) -> Member:
    def call(
        wrapped: Callable[..., object], instance: object, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        with stage(target.stage):
            attributes.note(args if instance is None else (instance, *args), kwargs)
            return wrapped(*args, **kwargs)

    return _StageObject(found, call)


class _ArgumentAttributes:
    """Reads a target's attributes from a call's arguments, and notes them in the record of the running stage."""

    def __init__(self, target: Target, function: Function) -> None:
        self.target = target
        self.readers: dict[str, expressions.Reader] = {}
        self._warnings = WarnOnce(say=later)
        for key, expression in target.attributes.items():
            try:
                self.readers[key] = expressions.reader(expression, inspect.signature(function))
            except (TypeError, ValueError) as error:
                self._leave_out(key, error)

    def pre_hook(self, function: Function) -> PreHook[..., Any]:
        """Return a pre-hook that notes the attributes of a call and then has the function called."""

        def hook(args: tuple[object, ...], kwargs: dict[str, object]) -> Function:
            self.note(args, kwargs)
            return function

        return hook

    def note(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Note the attributes of one call. Never raises."""
        record = current.get()
        # Does nothing where recording is off, or where this stage has failed to begin.
        if state.recorder is None or record is None or record.site.name != self.target.stage:
            return
        values = {}
        for key, read in self.readers.items():
            try:
                value = expressions.plain(read(args, kwargs))
            except Exception as error:  # The arguments are the application's, and may raise anything.
                if is_an_interrupt(error):
                    raise
                self._leave_out(key, error)
                continue
            if value is not None:
                values[key] = value
        if values:
            tell(record, snapshot_mapping(values))

    def _leave_out(self, key: str, error: Exception) -> None:
        why = message_of(error) if isinstance(error, ValueError | TypeError) else shown(error)
        self._warnings.warn(
            key,
            "the attribute `%s=%s` of `%s` is left out: %s",
            key,
            self.target.attributes[key],
            self.target.path,
            why,
        )
