"""
What is put in a function's place: the same function, as a stage with attributes from its arguments.

Changes nothing of the program; that is done by `instrument._patching`.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any

import wrapt

from gpuscope._errors import UnsuitableError
from gpuscope._log import WarnOnce
from gpuscope._recording.hot_path import current
from gpuscope._recording.stage import stage
from gpuscope._recording.state import state
from gpuscope.instrument import _expressions
from gpuscope.instrument._pre_hook import with_pre_hook

if TYPE_CHECKING:
    from gpuscope.instrument._targets import Target


def as_stage(target: Target, found: Any) -> Any:
    """
    Return what is found under a name, a class's attribute unbound, as a stage of the same kind.

    Raises:
        UnsuitableError: for what is no function.

    """
    if isinstance(found, staticmethod | classmethod):
        return type(found)(as_stage(target, found.__func__))
    if isinstance(found, functools.partialmethod):
        return functools.partialmethod(as_stage(target, found.func), *found.args, **found.keywords)
    _check(found)
    notes = _ArgumentAttributes(target, found)
    if not isinstance(found, FunctionType):
        return _staged_object(target, found, notes)
    return stage(target.stage)(with_pre_hook(found, notes.prepared(found)) if notes.readers else found)


def _check(found: Any) -> None:
    if isinstance(found, type):
        raise UnsuitableError(f"it is a class; name one of its methods, as in `{found.__name__}.__call__`.")
    if isinstance(found, property | functools.cached_property):
        raise UnsuitableError("it is a property; name the function that it calls.")
    if not callable(found):
        raise UnsuitableError(f"it is a `{type(found).__name__}`, which cannot be called.")
    if not inspect.isroutine(found) and not hasattr(type(found), "__get__"):
        # In its place no other object will do: programs ask what it is, and keep it in lists of children.
        raise UnsuitableError(f"it is an instance; name its method, as in `{type(found).__name__}.__call__`.")


class _StagedObject(wrapt.FunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]
    """A callable in C, or with attributes that count (`functools.lru_cache`): everything but the call is its own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle it as what it stands for: nearly always as its name."""
        return self.__wrapped__.__reduce_ex__(protocol)


def _staged_object(target: Target, found: Any, notes: _ArgumentAttributes) -> Any:
    def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        with stage(target.stage):
            notes.take(args if instance is None else (instance, *args), kwargs)
            return wrapped(*args, **kwargs)

    return _StagedObject(found, call)


class _ArgumentAttributes:
    """Reads a target's attributes from a call's arguments, and notes them in the record of the stage that runs."""

    def __init__(self, target: Target, function: Any) -> None:
        self.target = target
        self.readers = {}
        self._warnings = WarnOnce()
        for key, expression in target.attributes.items():
            try:
                self.readers[key] = _expressions.reader(expression, inspect.signature(function))
            except (TypeError, ValueError) as error:
                self._leave_out(key, error)

    def prepared(self, function: Any) -> Any:
        """Return the form that a layer takes."""

        def prepare(args: Any, kwargs: Any) -> Any:
            self.take(args, kwargs)
            return function

        return prepare

    def take(self, args: Any, kwargs: Any) -> None:
        """Note the attributes of one call. Never raises."""
        record = current.get()
        # Not where recording is off, or has failed to begin this stage.
        if state.recorder is None or record is None or record.site.name != self.target.stage:
            return
        values = dict(record.attributes or ())
        for key, read in self.readers.items():
            try:
                value = _expressions.plain(read(args, kwargs))
            except Exception as error:  # The arguments are the application's, and may raise anything.
                self._leave_out(key, error)
                continue
            if value is not None:
                values[key] = value
        record.attributes = values or None

    def _leave_out(self, key: str, error: Exception) -> None:
        message = "the attribute `%s=%s` of `%s` is left out: "
        message += "%s" if isinstance(error, ValueError | TypeError) else "%r"
        self._warnings.warn(key, message, key, self.target.attributes[key], self.target.path, error)
