"""
`overlap`: uploads, `infer`, downloads and work on the host, of several batches at once, as an iterator of results.

Only the loop; what is in flight is `DoubleBuffer`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from gpuscope._overlap.double_buffer import DoubleBuffer

if TYPE_CHECKING:
    import torch

    from gpuscope._overlap.report import OverlapReport
    from gpuscope._overlap.slots import Tree

__all__ = ["DoubleBuffer", "Overlap", "overlap"]

_PAUSE_S = 0.0005
"""Between two looks of `async for` whether a result is there."""


class Overlap(Iterator[Any]):
    """What `overlap` returns: an iterator of results, also for `async for`. Let go, it ends what is under way."""

    def __init__(self, batches: Iterable[Any] | AsyncIterable[Any], buffer: DoubleBuffer) -> None:
        self._batches = batches
        self._buffer = buffer
        self._results: Any = self._run()

    def __next__(self) -> Any:
        """Return the next result."""
        return next(self._results)

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Yield the results; while the GPU works the event loop goes on. `prepare`, `infer` and `post` run in it."""
        buffer, source = self._buffer, _Source(self._batches)
        try:
            while await source.has_more_to_await():
                buffer.put(source.batch)
                if buffer.full:
                    yield await self._arrived()
                    buffer.resumed()
            while buffer:
                yield await self._arrived()
                buffer.resumed()
            source.raise_what_ended_it()
        finally:
            buffer.close()

    def report(self) -> OverlapReport:
        """Return where the time goes, how much of it is hidden, and what bounds the loop."""
        return self._buffer.report()

    def close(self) -> None:
        """End: give up the batches in flight, and wait until nothing of them is under way."""
        self._results.close()  # Ends what has begun; what has not yet, the next line does.
        self._buffer.close()

    def _run(self) -> Iterator[Any]:
        buffer, source = self._buffer, _Source(self._batches)
        try:
            while source.has_more():
                buffer.put(source.batch)
                if buffer.full:
                    yield buffer.get()
                    buffer.resumed()
            while buffer:
                yield buffer.get()
                buffer.resumed()
            source.raise_what_ended_it()
        finally:
            buffer.close()

    async def _arrived(self) -> Any:
        while not self._buffer.ready():  # noqa: ASYNC110 - a GPU sets no `asyncio.Event`
            await asyncio.sleep(_PAUSE_S)
        return self._buffer.get()


def overlap(
    batches: Iterable[Any] | AsyncIterable[Any],
    infer: Callable[[Tree], Tree],
    post: Callable[[Tree], Any] | None = None,
    *,
    prepare: Callable[[Any], Tree] | None = None,
    depth: int = 2,
    device: torch.device | str | None = None,
    graph: bool = False,
    workers: int = 0,
    name: str = "",
) -> Overlap:
    """
    Return an iterator over `post(infer(prepare(batch)))`, in order, with copies and host work beside the GPU's.

    While the GPU works on a batch, the host does `post` of the one before and `prepare` of the next, and copies go
    over streams of their own. An exception surfaces at its batch, after the results before it, and ends the
    iteration; so does leaving the loop, and then nothing is under way any more. Each phase is a stage. Without a GPU
    the same runs in turn.

    Examples:
        ```
        for boxes in gpuscope.overlap(batches, model, rescale, prepare=resize):
            answer(boxes)
        ```

    Args:
        batches: an iterable, or for `async for` also an asynchronous one. Read at most `depth` batches ahead.
        infer: see `DoubleBuffer`, as for all that follow.
        post: the same.
        prepare: the same.
        depth: the same.
        device: the same.
        graph: the same.
        workers: the same.
        name: the same.

    Raises:
        TypeError: if one of the functions can't be called.
        ValueError: for a `depth` below 1 or negative `workers`.

    """
    buffer = DoubleBuffer(
        infer, post, prepare=prepare, depth=depth, device=device, graph=graph, workers=workers, name=name
    )
    return Overlap(batches, buffer)


class _Source:
    """The batches; what they raise is kept until the results before it have been returned."""

    def __init__(self, batches: Iterable[Any] | AsyncIterable[Any]) -> None:
        self.batch: Any = None
        self._batches: Any = batches
        self._iterator: Any = None
        self._error: Exception | None = None

    def has_more(self) -> bool:
        try:
            if self._iterator is None:
                self._iterator = iter(self._batches)
            self.batch = next(self._iterator)
        except StopIteration:
            return False
        except Exception as error:  # The program's own; its turn comes after the results before it.
            self._error = error
            return False
        return True

    async def has_more_to_await(self) -> bool:
        if not isinstance(self._batches, AsyncIterable):
            return self.has_more()
        try:
            if self._iterator is None:
                self._iterator = aiter(self._batches)
            self.batch = await anext(self._iterator)
        except StopAsyncIteration:
            return False
        except Exception as error:  # The program's own; its turn comes after the results before it.
            self._error = error
            return False
        return True

    def raise_what_ended_it(self) -> None:
        if self._error is not None:
            raise self._error
