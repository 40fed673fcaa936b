"""
`overlap`: an iterator of results, which overlaps the copies, `infer` and the host's work of several batches.

Only the loop: it starts no copy and waits for no event itself, `DoubleBuffer` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from gpuscope._overlap.double_buffer import DoubleBuffer, Result
from gpuscope._overlap.source import Source
from gpuscope.pinned._memory import survives_forks

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Coroutine, Iterable

    import torch

    from gpuscope._overlap.in_flight import Batch
    from gpuscope._overlap.leaves import Tree
    from gpuscope._overlap.report import OverlapReport

__all__ = ["DoubleBuffer", "Overlap", "overlap"]

_PAUSE_S = 0.0005
"""How long `async for` sleeps before it asks again whether a result is ready."""


class Overlap(Iterator[Result]):
    """What `overlap` returns: an iterator of results, also for `async for`. Once let go, it ends what is under way."""

    def __init__(self, source: Source, buffer: DoubleBuffer) -> None:
        self._source = source
        self._buffer = buffer
        self._ended = False
        survives_forks(self)

    def __next__(self) -> Result:
        """Return the next result."""
        buffer, source = self._buffer, self._source
        if self._ended:
            raise StopIteration
        try:
            buffer.resumed()
            while not buffer.full:
                buffer.wait_for_upload()  # The program may fill the same memory with the next batch.
                if not source.has_more():
                    break
                buffer.put(source.taken())
            if buffer:
                return self._result()
            source.raise_what_ended_it()
        except BaseException:  # Goes on: an iterator that has raised is at its end.
            self.close()
            raise
        self.close()
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[Result]:
        """Return the results. The phases run in the event loop, which goes on while the GPU works."""
        return _AsyncResults(self)

    def report(self) -> OverlapReport:
        """Return where the time goes, how much of it is hidden, and what bounds the loop."""
        return self._buffer.report()

    def close(self) -> None:
        """End the loop: give up the batches in flight, and wait until nothing of them is under way."""
        self._ended = True
        self._source.close()
        self._buffer.close()

    def __del__(self) -> None:
        """Close."""
        self.close()

    def _result(self) -> Result:
        try:
            return self._buffer.get()
        except (StopIteration, StopAsyncIteration) as error:
            # It would end the loop as if there were no more batches. Python does the same for generators.
            raise RuntimeError(f"A phase of the loop raised {type(error).__name__}.") from error

    async def _next_of_async(self) -> Result:
        buffer, source = self._buffer, self._source
        if self._ended:
            raise StopAsyncIteration
        try:
            buffer.resumed()
            while not buffer.full:
                buffer.wait_for_upload()  # The program may fill the same memory with the next batch.
                if not await source.has_more_to_await():
                    break
                buffer.put(source.taken())
            if buffer:
                while not buffer.ready():  # noqa: ASYNC110 - a GPU sets no `asyncio.Event`
                    await asyncio.sleep(_PAUSE_S)
                return self._result()
            source.raise_what_ended_it()
        except BaseException:  # Goes on: an iterator that has raised is at its end.
            self.close()
            raise
        self.close()
        raise StopAsyncIteration


class _AsyncResults(AsyncIterator[Result]):
    """The results for one `async for`, which ends the loop when it is left: an asynchronous generator would later."""

    def __init__(self, loop: Overlap) -> None:
        self._loop = loop

    def __anext__(self) -> Coroutine[Any, Any, Result]:
        return self._loop._next_of_async()

    def __del__(self) -> None:
        self._loop.close()


def overlap(
    batches: Iterable[Batch] | AsyncIterable[Batch],
    infer: Callable[[Tree], Tree],
    post: Callable[[Tree], Result] | None = None,
    *,
    prepare: Callable[[Batch], Tree] | None = None,
    depth: int = 2,
    device: torch.device | str | None = None,
    graph: bool = False,
    copy_outputs: bool = True,
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
        copy_outputs: the same.
        workers: the same.
        name: the same.

    Raises:
        TypeError: if one of the functions can't be called, or `batches` not be iterated over.
        ValueError: for a `depth` below 1 or negative `workers`.

    """
    source = Source(batches)
    buffer = DoubleBuffer(
        infer,
        post,
        prepare=prepare,
        depth=depth,
        device=device,
        graph=graph,
        copy_outputs=copy_outputs,
        workers=workers,
        name=name,
    )
    return Overlap(source, buffer)
