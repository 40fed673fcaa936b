"""
Makes a stage of each call of a function, by its kind: plain, coroutine, generator, async generator, callable object.

Everything is decided here, when the decorator runs; the wrappers only record. Each may also be traced by Dynamo (of
`torch.compile`), and must then leave nothing of itself behind. That is why they look as they do, and repeat each other:

* The question to Dynamo stands first, and alone, in each. Dynamo takes it for a constant, so what is below is not
  traced, guarded or run. If `state.recorder` were looked at before it, that would be guarded, and `enable()` or
  `disable()` would compile everything anew. Only the wrapper of async generators does not ask; Dynamo traces none.
* Each wrapper has a code object of its own, which `looking_like` makes. Dynamo keeps compiled versions by code object,
  8 of each by default, and the closures of one `def` share theirs: the ninth stage to be compiled would fail, or
  silently run uncompiled. A helper shared by the wrappers would be one such code object, and one more call per stage.
* They are plain closures, to which `functools` gives name and signature. Objects of wrapt look even more like their
  functions, but cost half a microsecond per call, and not every version of Dynamo can trace them (not on methods in
  PyTorch 2.4, not in cells of closures in 2.11 and 2.13). Nor can all trace `contextlib.ContextDecorator` (2.4, 2.6).
* The record is there before the `try` in which it begins and ends, so that an interrupt can be met wherever it comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, cast

from gpuscope._data.record import Site
from gpuscope._recording import dynamo
from gpuscope._recording.hot_path import begin, end, end_raised, new_record
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping

    from gpuscope._data.interfaces import Stream

F = TypeVar("F")
P = ParamSpec("P")
R = TypeVar("R")
Item = TypeVar("Item")
AnyCallable: TypeAlias = "Callable[..., Any]"
"""A function of the application's, of whatever signature: its wrapper takes that over."""


def stage_of(
    function: F,
    name: str | None,
    attributes: Mapping[str, object] | None,
    stream: Stream,
    warmup: int | None,
    *,
    graph: bool = True,
) -> F:
    """
    Return the function as a stage, of the same kind, name, signature and docstring.

    Where recording is off for good, that is the function itself. What can't be a stage is refused there as well, so
    that a program does not fail on the day when recording is switched on.

    Raises:
        TypeError: for a class, a property, or what can't be called.

    """
    if isinstance(function, staticmethod | classmethod):
        inner = stage_of(function.__func__, name, attributes, stream, warmup, graph=graph)
        return function if inner is function.__func__ else type(function)(inner)
    called = _checked(function)
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
        return cast("F", StagedCallable(called, site, stream))
    from gpuscope._recording.functions import looking_like

    return cast("F", looking_like(called, _wrapper_for(called)(called, site, stream)))


def _checked(function: object) -> AnyCallable:
    if isinstance(function, type):
        raise TypeError(
            f"`stage` cannot decorate the class `{function.__name__}`: it would time only the construction. "
            "Decorate its methods instead."
        )
    if not callable(function):
        raise TypeError(
            f"`stage` cannot decorate {function!r}: it is not callable. For a property, put `@property` above `@stage`."
        )
    return function


def _wrapper_for(function: AnyCallable) -> Callable[[AnyCallable, Site, Stream], AnyCallable]:
    from gpuscope._recording.functions import by_kind

    make = by_kind(function, plain=_plain, coroutine=_coroutine, generator=_generator, async_generator=_async_generator)
    return cast("Callable[[AnyCallable, Site, Stream], AnyCallable]", make)


def _plain(function: Callable[P, R], site: Site, stream: Stream) -> Callable[P, R]:
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        # First and alone, here and in each wrapper below: see above.
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return function(*args, **kwargs)
        recorder = state.recorder
        if recorder is None:
            return function(*args, **kwargs)
        record = new_record()
        try:
            begin(recorder, record, site, stream, 0)
            result = function(*args, **kwargs)
            end(record, None)
        except BaseException as error:
            end_raised(record, error, None)
            raise
        return result

    return wrapper


def _coroutine(function: Callable[P, Awaitable[R]], site: Site, stream: Stream) -> Callable[P, Awaitable[R]]:
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return await function(*args, **kwargs)
        recorder = state.recorder
        if recorder is None:
            return await function(*args, **kwargs)
        record = new_record()
        try:
            begin(recorder, record, site, stream, 1)
            result = await function(*args, **kwargs)
            end(record, None)
        except BaseException as error:
            end_raised(record, error, None)
            raise
        return result

    return wrapper


def _resume(step: Callable[..., Item], value: object, site: Site, stream: Stream) -> Item:
    """Run a generator to its next `yield`, as one stage; a `StopIteration` is not an error."""
    recorder = state.recorder
    if recorder is None:
        return step(value)
    record = new_record()
    try:
        begin(recorder, record, site, stream, 0)
        item = step(value)
        end(record, None)
    except BaseException as error:
        end_raised(record, error, StopIteration)
        raise
    return item


def _generator(
    function: Callable[P, Generator[Item, object, object]], site: Site, stream: Stream
) -> Callable[P, Generator[Item, object, object]]:
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Generator[Item, object, object]:
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return (yield from function(*args, **kwargs))
        generator = function(*args, **kwargs)
        step: Callable[..., Item]
        value: object
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


async def _resume_async(awaitable: Awaitable[Item], site: Site, stream: Stream) -> Item:
    recorder = state.recorder
    if recorder is None:
        return await awaitable
    record = new_record()
    try:
        begin(recorder, record, site, stream, 1)
        item = await awaitable
        end(record, None)
    except BaseException as error:
        end_raised(record, error, StopAsyncIteration)
        raise
    return item


def _async_generator(
    function: Callable[P, AsyncGenerator[Item, object]], site: Site, stream: Stream
) -> Callable[P, AsyncGenerator[Item, object]]:
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Item, object]:
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
    """A callable object, such as an `nn.Module`, whose calls are stages. Everything but the call is the object's."""

    def __init__(self, target: Any, site: Site, stream: Stream) -> None:  # An object of whatever class.
        """Wrap `target` by the kind of its `__call__`."""
        self.__wrapped__ = target
        self.__doc__ = target.__doc__
        self._gpuscope_site = site
        self._gpuscope_call = _wrapper_for(getattr(target, "func", target.__call__))(target, site, stream)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the object, as a stage."""
        return self._gpuscope_call(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        """Take every other attribute from the object."""
        if name == "__wrapped__":
            raise AttributeError(name)  # While it is being unpickled or copied.
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the object; it is decorated again where it is unpickled."""
        site = self._gpuscope_site
        return _wrap_again, (self.__wrapped__, site.name, site.attributes, site.warmup, site.graph)

    def __repr__(self) -> str:
        """Show the stage and the object."""
        return f"<stage {self._gpuscope_site.name!r} of {self.__wrapped__!r}>"


def _wrap_again(target: F, name: str, attributes: Mapping[str, object], warmup: int | None, graph: bool) -> F:
    return stage_of(target, name, attributes, None, warmup, graph=graph)
