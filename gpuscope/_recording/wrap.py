"""
Makes a stage of each call of a function, by its kind: plain, coroutine, generator, async generator, callable object.

Everything is decided here, when the decorator runs; the wrappers only record. They are closures that
`functools` makes look like their functions (Dynamo can't trace wrapt's on every version), each with a code object of
its own: Dynamo's limit of compiled versions counts by code object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuscope._data.record import Site
from gpuscope._recording import dynamo
from gpuscope._recording.hot_path import end, start
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def stage_of(
    function: Any,
    name: str | None,
    attributes: Mapping[str, Any] | None,
    stream: Any,
    warmup: int | None,
    *,
    graph: bool = True,
) -> Any:
    """
    Return the function as a stage, of the same kind, name, signature and docstring.

    Where recording is off for good that is the function itself; what can't be a stage is refused all the same, so
    that a program does not fail on the day when recording is switched on.

    Raises:
        TypeError: for a class, a property, or what can't be called.

    """
    if isinstance(function, staticmethod | classmethod):
        inner = stage_of(function.__func__, name, attributes, stream, warmup, graph=graph)
        return function if inner is function.__func__ else type(function)(inner)
    _check(function)
    if state.recorder is None and not state.may_toggle:
        return function
    named = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(function, "__module__", None) or type(function).__module__
    site = Site(
        name or named.__qualname__.rpartition("<locals>.")[2], dict(attributes or {}), f"{module}.{named.__qualname__}"
    )
    site.warmup, site.graph = warmup, graph
    import inspect

    if not inspect.isroutine(function):
        return StagedCallable(function, site, stream)
    from gpuscope._recording.functions import looking_like

    return looking_like(function, _wrapper_for(function)(function, site, stream))


def _check(function: Any) -> None:
    if isinstance(function, type):
        raise TypeError(
            f"`stage` cannot decorate the class `{function.__name__}`: it would time only the construction. "
            "Decorate its methods instead."
        )
    if not callable(function):
        raise TypeError(
            f"`stage` cannot decorate {function!r}: it is not callable. For a property, put `@property` above `@stage`."
        )


def _wrapper_for(function: Any) -> Callable[[Any, Site, Any], Any]:
    from gpuscope._recording.functions import by_kind

    return by_kind(function, plain=_plain, coroutine=_coroutine, generator=_generator, async_generator=_async_generator)


def _plain(function: Any, site: Site, stream: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # First and alone, as in `stage`. Each wrapper says it itself: Dynamo has to see it in the traced frame.
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return function(*args, **kwargs)
        recorder = state.recorder
        if recorder is None:
            return function(*args, **kwargs)
        record = start(recorder, site, stream, 0)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            end(record, error)
            raise
        end(record, None)
        return result

    return wrapper


def _coroutine(function: Any, site: Site, stream: Any) -> Any:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return await function(*args, **kwargs)
        recorder = state.recorder
        if recorder is None:
            return await function(*args, **kwargs)
        record = start(recorder, site, stream, 1)
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:
            end(record, error)
            raise
        end(record, None)
        return result

    return wrapper


def _resume(step: Any, value: Any, site: Site, stream: Any) -> Any:
    """Run a generator to its next `yield`, as one stage; a `StopIteration` is no error."""
    recorder = state.recorder
    if recorder is None:
        return step(value)
    record = start(recorder, site, stream, 0)
    try:
        item = step(value)
    except StopIteration:
        end(record, None)
        raise
    except BaseException as error:
        end(record, error)
        raise
    end(record, None)
    return item


def _generator(function: Any, site: Site, stream: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return (yield from function(*args, **kwargs))
        generator = function(*args, **kwargs)
        step, value = generator.send, None
        while True:
            try:
                item = _resume(step, value, site, stream)
            except StopIteration as stop:
                return stop.value
            try:
                step, value = generator.send, (yield item)
            except GeneratorExit:
                generator.close()
                raise
            except BaseException as error:  # Thrown in by the consumer, and handed on.
                step, value = generator.throw, error

    return wrapper


async def _resume_async(awaitable: Any, site: Site, stream: Any) -> Any:
    recorder = state.recorder
    if recorder is None:
        return await awaitable
    record = start(recorder, site, stream, 1)
    try:
        item = await awaitable
    except StopAsyncIteration:
        end(record, None)
        raise
    except BaseException as error:
        end(record, error)
        raise
    end(record, None)
    return item


def _async_generator(function: Any, site: Site, stream: Any) -> Any:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        generator = function(*args, **kwargs)
        awaitable = generator.__anext__()
        while True:
            try:
                item = await _resume_async(awaitable, site, stream)
            except StopAsyncIteration:
                return
            try:
                awaitable = generator.asend((yield item))
            except GeneratorExit:
                await generator.aclose()
                raise
            except BaseException as error:  # Thrown in by the consumer, and handed on.
                awaitable = generator.athrow(error)

    return wrapper


class StagedCallable:
    """A callable object, an `nn.Module` for one, whose calls are stages. Everything but the call is the object's."""

    def __init__(self, target: Any, site: Site, stream: Any) -> None:
        """Wrap `target` by the kind of its `__call__`."""
        self.__wrapped__ = target
        self.__doc__ = target.__doc__
        self._gpuscope_site = site
        self._gpuscope_call = _wrapper_for(getattr(target, "func", target.__call__))(target, site, stream)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object, as a stage."""
        return self._gpuscope_call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Take every other attribute from the object."""
        if name == "__wrapped__":
            raise AttributeError(name)  # While it is being unpickled or copied.
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> Any:
        """Pickle the object and decorate it again where it is unpickled."""
        site = self._gpuscope_site
        return _wrap_again, (self.__wrapped__, site.name, site.attributes, site.warmup, site.graph)

    def __repr__(self) -> str:
        """Show the stage and the object."""
        return f"<stage {self._gpuscope_site.name!r} of {self.__wrapped__!r}>"


def _wrap_again(target: Any, name: str, attributes: Mapping[str, Any], warmup: int | None, graph: bool) -> Any:
    return stage_of(target, name, attributes, None, warmup, graph=graph)
