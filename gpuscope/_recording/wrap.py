"""
Makes a stage of each call of a function, by its kind: plain, coroutine, generator, async generator, callable object.

Everything is decided here, when the decorator runs; the wrappers only record. Each may also be traced by Dynamo (of
`torch.compile`), and must then leave nothing of itself behind. That is why they look as they do, and repeat each other:

* The question to Dynamo stands first, and alone, in each. Dynamo takes it for a constant, so what is below is not
  traced, guarded or run. If `state.recorder` were looked at before it, that would be guarded, and `enable()` or
  `disable()` would compile everything anew. Only the wrapper of async generators does not ask; Dynamo traces none.
* Each wrapper has a code object of its own, which `looking_like` makes. Dynamo keeps 8 compiled versions per code
  object, and closures of one `def` share theirs: the ninth stage would fail, or run uncompiled. So would a helper.
* Each names `__class__`: in its cell the function finds the class for `super()` (`functions.looking_like`).
* They are plain closures, to which `functools` gives name and signature. Objects of wrapt look even more like their
  functions, but cost half a microsecond per call, and not every version of Dynamo can trace them, from 2.4 to 2.13.
* The record is there before the `try` in which it begins and ends, so that an interrupt can be met wherever it comes.
  Python 3.10 looks for signals where a handler begins, too. So each stands in another `try`, which is free from 3.11.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, cast

from gpuscope._data.plain.values import shown
from gpuscope._recording import dynamo
from gpuscope._recording.hot_path import begin, end, end_raised, new_record
from gpuscope._recording.state import MAX_SITES, site_of_function, state

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping

    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import Site
    from gpuscope._recording.batches.members import Said

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
    said: Said | None = None,
    memory: bool = False,
) -> F:
    """
    Return the function as a stage, of the same kind, name, signature and docstring.

    Where recording is off for good, that is the function itself. What can't be a stage is refused there as well, so
    that a program does not fail on the day when recording is switched on.

    Raises:
        TypeError: for a class, a property, or what can't be called; with members, for what has no single call.

    """
    if isinstance(function, staticmethod | classmethod):
        inner = stage_of(function.__func__, name, attributes, stream, warmup, graph=graph, said=said, memory=memory)
        return function if inner is function.__func__ else type(function)(inner)
    called = _checked(function)
    if state.recorder is None and not state.may_toggle:
        if len(state.left_plain) < MAX_SITES:
            state.left_plain[str(getattr(function, "__qualname__", type(function).__qualname__))] = None
        return function
    from gpuscope._recording import functions

    if type(function) is MethodType:  # A method again, which goes with copies of its object.
        inner = stage_of(
            function.__func__,  # type: ignore[attr-defined]
            name,
            attributes,
            stream,
            warmup,
            graph=graph,
            said=said,
            memory=memory,
        )
        return cast("F", MethodType(inner, function.__self__))  # type: ignore[attr-defined]
    site = site_of_function(function, name, attributes)
    site.warmup, site.graph, site.memory = warmup, graph, memory
    if said is not None:
        from gpuscope._recording.batches.members import as_batch

        called = as_batch(called, said, site.name)
    wrapper = _wrapper_for(called)(called, site, stream)
    if type(function) is FunctionType:
        return cast("F", functions.looking_like(called, wrapper))
    return cast("F", functions.staged_callable(called, wrapper, site, stream, wrap_again))


def _checked(function: object) -> AnyCallable:
    if isinstance(function, type):
        raise TypeError(
            f"`stage` cannot decorate the class `{function.__name__}`: it would time only the construction. "
            "Decorate its methods instead."
        )
    if not callable(function):
        raise TypeError(
            f"`stage` cannot decorate {shown(function)}: it is not callable. For a property, put `@property` above "
            "`@stage`."
        )
    return function


def _wrapper_for(function: AnyCallable) -> Callable[[AnyCallable, Site, Stream], AnyCallable]:
    from gpuscope._recording.functions import by_kind

    make = by_kind(function, plain=_plain, coroutine=_coroutine, generator=_generator, async_generator=_async_generator)
    return cast("Callable[[AnyCallable, Site, Stream], AnyCallable]", make)


def _plain(function: Callable[P, R], site: Site, stream: Stream) -> Callable[P, R]:
    __class__ = None

    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal __class__
        # First and alone, here and in each wrapper below: see above.
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return function(*args, **kwargs)
        recorder = state.recorder
        if recorder is None:
            return function(*args, **kwargs)
        record = new_record()
        try:
            try:
                begin(recorder, record, site, stream, 0)
                result = function(*args, **kwargs)
                end(record, None)
            except BaseException as error:  # The program's: it is noted, and goes on.
                end_raised(record, error, None)
                raise
        except BaseException as error:  # See above: the same once more, which does nothing where it was done.
            end_raised(record, error, None)
            raise
        return result

    return wrapper


def _coroutine(function: Callable[P, Awaitable[R]], site: Site, stream: Stream) -> Callable[P, Awaitable[R]]:
    __class__ = None

    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal __class__
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return await function(*args, **kwargs)
        recorder = state.recorder
        if recorder is None:
            return await function(*args, **kwargs)
        record = new_record()
        try:
            try:
                begin(recorder, record, site, stream, 1)
                result = await function(*args, **kwargs)
                end(record, None)
            except BaseException as error:  # The program's: it is noted, and goes on.
                end_raised(record, error, None)
                raise
        except BaseException as error:  # See above: the same once more, which does nothing where it was done.
            end_raised(record, error, None)
            raise
        return result

    return wrapper


def _resume(step: Callable[..., Item], sent: list[object], site: Site, stream: Stream) -> Item:
    """
    Run a generator to its next `yield`, as one stage; a `StopIteration` is not an error.

    What is sent comes in a list and is taken out. In a variable, an exception that the consumer throws in would be held
    by this frame, which it holds by its traceback.
    """
    recorder = state.recorder
    if recorder is None:
        return step(sent.pop())
    record = new_record()
    try:
        try:
            begin(recorder, record, site, stream, 0)
            item = step(sent.pop())
            end(record, None)
        except BaseException as error:  # The program's: it is noted, and goes on.
            end_raised(record, error, StopIteration)
            raise
    except BaseException as error:  # See above: the same once more, which does nothing where it was done.
        end_raised(record, error, StopIteration)
        raise
    return item


def _generator(
    function: Callable[P, Generator[Item, object, object]], site: Site, stream: Stream
) -> Callable[P, Generator[Item, object, object]]:
    __class__ = None

    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Generator[Item, object, object]:
        nonlocal __class__
        if dynamo.is_dynamo_compiling():
            dynamo.gpuscope_left_out()
            return (yield from function(*args, **kwargs))
        generator = function(*args, **kwargs)
        # Arguments and items are not held while the consumer works, because they may be batches on the GPU: an item is
        # yielded out of a list, which then is empty.
        del args, kwargs
        step: Callable[..., Item]
        sent: list[object]
        step, sent = generator.send, [None]
        while True:
            try:
                items = [_resume(step, sent, site, stream)]
            except StopIteration as stop:
                return stop.value
            try:
                step, sent = generator.send, [(yield items.pop())]
            except GeneratorExit:
                generator.close()
                raise
            except BaseException as error:  # Thrown in by the consumer, and handed on.
                step, sent = generator.throw, [error]

    return wrapper


async def _resume_async(steps: list[Awaitable[Item]], site: Site, stream: Stream) -> Item:
    recorder = state.recorder
    if recorder is None:
        return await steps.pop()
    record = new_record()
    try:
        try:
            begin(recorder, record, site, stream, 1)
            item = await steps.pop()
            end(record, None)
        except BaseException as error:  # The program's: it is noted, and goes on.
            end_raised(record, error, StopAsyncIteration)
            raise
    except BaseException as error:  # See above: the same once more, which does nothing where it was done.
        end_raised(record, error, StopAsyncIteration)
        raise
    return item


def _async_generator(
    function: Callable[P, AsyncGenerator[Item, object]], site: Site, stream: Stream
) -> Callable[P, AsyncGenerator[Item, object]]:
    __class__ = None

    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Item, object]:
        nonlocal __class__
        generator = function(*args, **kwargs)
        del args, kwargs  # As in `_generator`. What is awaited holds what was sent, so that is in a list as well.
        steps: list[Awaitable[Item]] = [generator.__anext__()]
        while True:
            try:
                items = [await _resume_async(steps, site, stream)]
            except StopAsyncIteration:
                return
            try:
                steps = [generator.asend((yield items.pop()))]
            except GeneratorExit:
                await generator.aclose()
                raise
            except BaseException as error:  # Thrown in by the consumer, and handed on.
                steps = [generator.athrow(error)]

    return wrapper


def wrap_again(target: F, site: Site, stream: Stream = None) -> F:
    """Make a stage of what was copied, or unpickled: its stream stays where it was."""
    return stage_of(target, site.name, site.attributes, stream, site.warmup, graph=site.graph, memory=site.memory)
