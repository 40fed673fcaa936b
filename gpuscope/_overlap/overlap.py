"""
`overlap`: an iterator of results, which overlaps the copies, `infer` and the host's work of several batches.

Only the loop: it starts no copy and waits for no event itself, `DoubleBuffer` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from gpuscope._overlap.double_buffer import DoubleBuffer, Result

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch

    from gpuscope._overlap.in_flight import Batch
    from gpuscope._overlap.report import OverlapReport
    from gpuscope._overlap.slots import Tree

__all__ = ["DoubleBuffer", "Overlap", "overlap"]

_PAUSE_S = 0.0005
"""How long `async for` sleeps before it asks again whether a result is ready."""


class Overlap(Iterator[Result]):
    """What `overlap` returns: an iterator of results, also for `async for`. Once let go, it ends what is under way."""

    def __init__(self, batches: Iterable[Batch] | AsyncIterable[Batch], buffer: DoubleBuffer) -> None:
        self._batches = batches
        self._buffer = buffer
        self._results = self._run()

    def __next__(self) -> Result:
        """Return the next result."""
        return next(self._results)

    async def __aiter__(self) -> AsyncIterator[Result]:
        """Yield the results. `prepare`, `infer` and `post` run in the event loop, which goes on while the GPU works."""
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
        """End the loop: give up the batches in flight, and wait until nothing of them is under way."""
        self._results.close()  # Does nothing to a loop that has not begun; the next line covers that.
        self._buffer.close()

    def _run(self) -> Generator[Result, None, None]:
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

    async def _arrived(self) -> Result:
        while not self._buffer.ready():  # noqa: ASYNC110 - a GPU sets no `asyncio.Event`
            await asyncio.sleep(_PAUSE_S)
        return self._buffer.get()


def overlap(
    batches: Iterable[Batch] | AsyncIterable[Batch],
    infer: Callable[[Tree], Tree],
    post: Callable[[Tree], Result] | None = None,
    *,
    prepare: Callable[[Batch], Tree] | None = None,
    depth: int = 2,
    device: torch.device | str | None = None,
    graph: bool = False,
    workers: int = 0,
    name: str = "",
) -> Overlap:
    """
    Return an iterator over `post(infer(prepare(batch)))`, in order, with copies and host work beside the GPU's work.

    While the GPU works on a batch, the host does `post` of the previous one and `prepare` of the next, and copies use
    streams of their own. An exception surfaces at its batch, after the results before it. It ends the iteration, as
    leaving the loop does, and then nothing is under way any more. Each phase is a stage. Without a GPU the phases run
    one after another.

    Examples:
        ```
        for boxes in gpuscope.overlap(batches, model, rescale, prepare=resize):
            answer(boxes)
        ```

    Args:
        batches: an iterable; for `async for` it may be asynchronous. It is read at most `depth` batches ahead.
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
    """The batches. An exception of their iterator is kept until the results before it have been returned."""

    def __init__(self, batches: Iterable[Batch] | AsyncIterable[Batch]) -> None:
        self.batch: Batch = None
        self._batches: Any = batches  # `Any`: a plain `for` leaves it to `iter` to refuse asynchronous ones.
        self._iterator: Iterator[Batch] | None = None
        self._async_iterator: AsyncIterator[Batch] | None = None
        self._error: Exception | None = None

    def has_more(self) -> bool:
        try:
            if self._iterator is None:
                self._iterator = iter(self._batches)
            self.batch = next(self._iterator)
        except StopIteration:
            return False
        except Exception as error:  # The program's own; the results before it come first.
            self._error = error
            return False
        return True

    async def has_more_to_await(self) -> bool:
        if not isinstance(self._batches, AsyncIterable):
            return self.has_more()
        try:
            if self._async_iterator is None:
                self._async_iterator = aiter(self._batches)
            self.batch = await anext(self._async_iterator)
        except StopAsyncIteration:
            return False
        except Exception as error:  # The program's own; the results before it come first.
            self._error = error
            return False
        return True

    def raise_what_ended_it(self) -> None:
        if self._error is not None:
            raise self._error
