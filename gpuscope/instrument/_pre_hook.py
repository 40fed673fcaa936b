"""
A function within or around a stage that does something first: of the same kind, name and signature as the function.

Chooses what is called, each time, and does not record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuscope._recording import dynamo
from gpuscope._recording.functions import by_kind, looking_like

if TYPE_CHECKING:
    from collections.abc import Callable

    Prepare = Callable[[tuple[Any, ...], dict[str, Any]], Callable[..., Any]]
    """Takes a call's arguments, and returns what is to be called with them."""


def with_pre_hook(function: Any, prepare: Prepare) -> Any:
    """Return a function that calls what `prepare` returns; for what Dynamo traces, the function itself."""
    wrapper_for = by_kind(
        function, plain=_plain, coroutine=_coroutine, generator=_generator, async_generator=_async_generator
    )
    return looking_like(function, wrapper_for(function, prepare))


def _plain(function: Any, prepare: Prepare) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if dynamo.is_dynamo_compiling():
            return function(*args, **kwargs)
        return prepare(args, kwargs)(*args, **kwargs)

    return wrapper


def _coroutine(function: Any, prepare: Prepare) -> Any:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        if dynamo.is_dynamo_compiling():
            return await function(*args, **kwargs)
        return await prepare(args, kwargs)(*args, **kwargs)

    return wrapper


def _generator(function: Any, prepare: Prepare) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if dynamo.is_dynamo_compiling():
            return (yield from function(*args, **kwargs))
        return (yield from prepare(args, kwargs)(*args, **kwargs))

    return wrapper


def _async_generator(_function: Any, prepare: Prepare) -> Any:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        generator = prepare(args, kwargs)(*args, **kwargs)
        awaitable = generator.__anext__()
        while True:
            try:
                item = await awaitable
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
