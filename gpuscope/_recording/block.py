"""
One `with stage(...)` block: a record that begins when it is entered. This is the twin of the block in C.

Knows the first entry only; what happens when an object is entered again is left to `_recording.stage`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

from gpuscope._data.native import StageRecord, native
from gpuscope._recording.hot_path import begin, end, undo

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import Site
    from gpuscope._recording.recorder import Recorder

_SUSPENDS = 0x20 | 0x80 | 0x200
"""`CO_GENERATOR`, `CO_COROUTINE` and `CO_ASYNC_GENERATOR` of `inspect`, whose import would cost 5 ms."""
_getframe = sys._getframe

if TYPE_CHECKING or native is None:

    class StageBlock(StageRecord):
        """A block, which is its own record: one allocation instead of two."""

        __slots__ = ("owner", "stream", "uses")
        stream: Stream
        uses: int
        """0: not entered yet; 1: entered; 2: entered again, and each further entry has a record of its own."""
        owner: StageBlock | list[StageBlock]
        """Of such a record: the object that was entered; of that object: such records that have not ended."""

        def __enter__(self) -> Self:
            """Begin the stage."""
            if self.uses:
                return self._enter_again()
            self.uses = 1
            recorder = self.recorder
            suspends = 0 if recorder.nvtx is None else _getframe(1).f_code.co_flags & _SUSPENDS
            try:
                begin(recorder, self, self.site, self.stream, suspends)
                return self
            except BaseException:  # Nobody leaves what was not entered.
                undo(recorder, self)
                raise

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None:
            """End the stage; an exception is noted and passes through."""
            try:
                if self.uses == 1:
                    end(self, error)
                else:
                    self._exit_again(error)
            except BaseException:
                if self.uses == 1:
                    end(self, error)  # Does nothing where the interrupt came after it.
                raise

        def _enter_again(self) -> Self:
            raise NotImplementedError

        def _exit_again(self, error: BaseException | None) -> None:
            raise NotImplementedError

    Block = TypeVar("Block", bound=StageBlock)

    def new_block(kind: type[Block], recorder: Recorder, site: Site) -> Block:
        """Return a block of the given class, ready to be entered."""
        block = kind()
        block.recorder, block.site, block.uses = recorder, site, 0
        block.stream = block.attributes = None
        return block

else:
    StageBlock, new_block = native.StageBlock, native.new_block
