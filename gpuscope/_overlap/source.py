"""The batches of a loop, one by one, from an iterable or an asynchronous one."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuscope._overlap.in_flight import Batch


class Source:
    """
    The batches. An exception of their iterator is kept until the results before it have been returned.

    Raises:
        TypeError: for what can't be iterated over.

    """

    def __init__(self, batches: Iterable[Batch] | AsyncIterable[Batch]) -> None:
        kind = type(batches)
        if not isinstance(batches, Iterable | AsyncIterable) and not hasattr(kind, "__getitem__"):
            raise TypeError(
                f"`batches` is of type `{kind.__qualname__}`: expected an iterable of batches, or an asynchronous one "
                "for `async for`."
            )
        self.batch: Batch = None
        self._batches: Any = batches
        self._iterator: Iterator[Batch] | None = None
        self._async_iterator: AsyncIterator[Batch] | None = None
        self._error: Exception | None = None
        self._ended = False

    def has_more(self) -> bool:
        """Take the next batch, if there is one, as `batch`."""
        if self._ended:
            return False
        try:
            if self._iterator is None:
                if not isinstance(self._batches, Iterable) and isinstance(self._batches, AsyncIterable):
                    raise TypeError("`batches` are asynchronous: write `async for` instead of `for`.")  # noqa: TRY301
                self._iterator = iter(self._batches)
            self.batch = next(self._iterator)
        except StopIteration:
            self._ended = True
        except Exception as error:  # The program's own; the results before it come first.
            self._ended, self._error = True, error
        return not self._ended

    async def has_more_to_await(self) -> bool:
        """Do the same for either kind of iterable."""
        if self._ended or not isinstance(self._batches, AsyncIterable):
            return self.has_more()
        try:
            if self._async_iterator is None:
                self._async_iterator = aiter(self._batches)
            self.batch = await anext(self._async_iterator)
        except StopAsyncIteration:
            self._ended = True
        except Exception as error:  # The program's own; the results before it come first.
            self._ended, self._error = True, error
        return not self._ended

    def taken(self) -> Batch:
        """Return the batch, and let go of it."""
        batch, self.batch = self.batch, None
        return batch

    def raise_what_ended_it(self) -> None:
        """Raise the exception of the program's iterator, if one ended it."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # It would hold this frame, and this frame it.

    def close(self) -> None:
        """Let go of the program's iterator, which ends a generator."""
        self._ended = True
        self.batch = self._batches = self._iterator = self._async_iterator = self._error = None
