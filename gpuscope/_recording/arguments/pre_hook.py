"""
A pre-hook: a function that runs before each call of another one, and chooses what is called.

The wrapper has the kind, name and signature of the wrapped function. Records nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from gpuscope._recording import dynamo
from gpuscope._recording.functions import by_kind, looking_like

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Generator

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
Y = TypeVar("Y")

Function: TypeAlias = Callable[..., Any]
"""A function of the program. `Any`, because nothing is known of its arguments and results before it is called."""
PreHook: TypeAlias = "Callable[[tuple[object, ...], dict[str, object]], Callable[P, R]]"
"""Takes a call's `args` and `kwargs`, and returns what is called with them."""


def with_pre_hook(function: Function, hook: PreHook[..., Any]) -> Function:
    """Return a function that calls what the hook returns; while Dynamo traces, it calls `function` itself."""
    wrapper: Function = looking_like(function, by_kind(function, **_WRAPPERS)(function, hook))
    return wrapper


def _plain(function: Callable[P, R], hook: PreHook[P, R]) -> Callable[P, R]:
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if dynamo.is_dynamo_compiling():
            return function(*args, **kwargs)
        return hook(args, kwargs)(*args, **kwargs)

    return wrapper


def _coroutine(function: Callable[P, Awaitable[R]], hook: PreHook[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if dynamo.is_dynamo_compiling():
            return await function(*args, **kwargs)
        return await hook(args, kwargs)(*args, **kwargs)

    return wrapper


def _generator(
    function: Callable[P, Generator[Y, S, R]], hook: PreHook[P, Generator[Y, S, R]]
) -> Callable[P, Generator[Y, S, R]]:
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Generator[Y, S, R]:
        if dynamo.is_dynamo_compiling():
            return (yield from function(*args, **kwargs))
        generator = hook(args, kwargs)(*args, **kwargs)
        del args, kwargs  # As in `_recording.wrap`, here and below: nothing is held while the consumer works.
        return (yield from generator)

    return wrapper


def _async_generator(_function: object, hook: PreHook[P, AsyncGenerator[Y, S]]) -> Callable[P, AsyncGenerator[Y, S]]:
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Y, S]:
        generator = hook(args, kwargs)(*args, **kwargs)
        del args, kwargs
        steps = [generator.__anext__()]
        while True:
            try:
                items = [await steps.pop()]
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


_WRAPPERS: dict[str, Callable[[Function, PreHook[..., Any]], Function]] = {
    "plain": _plain,
    "coroutine": _coroutine,
    "generator": _generator,
    "async_generator": _async_generator,
}
