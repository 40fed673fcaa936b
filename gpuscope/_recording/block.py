"""
One `with stage(...)` block: a record that begins when it is entered. This is the twin of the block in C.

Knows the first entry only; what happens when an object is entered again is left to `_recording.stage`. Also what stands
for a block where nothing is recorded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from gpuscope._data.native import StageRecord, native
from gpuscope._data.plain.values import shown
from gpuscope._recording.hot_path import begin, end, undo
from gpuscope._recording.queue import FEW, SMALL_BYTES
from gpuscope._recording.wrap import stage_of
from gpuscope._settings.names import is_blank

F = TypeVar("F", bound="Callable[..., object]")

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, TracebackType

    from typing_extensions import Self

    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import Site
    from gpuscope._recording.batches.members import Said
    from gpuscope._recording.recorder import Recorder

    class StageHandle(Protocol):
        """What `stage(...)` returns: a decorator and a context manager."""

        def __call__(self, function: F, /) -> F:
            """Make each call of the function a stage."""

        def __enter__(self) -> Self:
            """Begin the stage."""

        def __exit__(self, *exception: object) -> None:
            """End the stage."""

        def set_attribute(self, key: str, value: object) -> None:
            """Add an attribute to this run's host span."""


_SUSPENDS = 0x20 | 0x80 | 0x200
"""`CO_GENERATOR`, `CO_COROUTINE` and `CO_ASYNC_GENERATOR` of `inspect`, whose import would cost 5 ms."""
_ON_BEHALF = ("enter_context", "__enter__")
_getframe = sys._getframe


def _suspends(code: CodeType) -> int:
    """
    Tell whether what enters a block may be suspended before it leaves it.

    A function's code says so. One that enters on behalf of another, as `ExitStack.enter_context` does, does not know.
    """
    return 1 if code.co_name in _ON_BEHALF else code.co_flags & _SUSPENDS


class NoopStage:
    """A stage that records nothing, for `torch.compile`. Some versions of Dynamo can't trace through an `__init__`."""

    __slots__ = ()

    def __call__(self, function: F) -> F:
        """Return the function itself; what can't be a stage is refused, as it is while recording is on."""
        return stage_of(function, None, None, None, None)

    def __enter__(self) -> Self:
        """Do nothing."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing."""

    def set_attribute(self, key: str, value: object) -> None:
        """Do nothing."""


if TYPE_CHECKING or native is None:

    class DisabledStage(NoopStage):
        """What is handed out while nothing is recorded."""

        __slots__ = ()

else:

    class DisabledStage(native.NoopBlock, NoopStage):
        """The same, entered and left in C."""

        __slots__ = ()


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
            recorder = self.recorder
            if self.uses or recorder.paused:
                return self._enter_again()
            self.uses = 1
            try:
                suspends = 0 if recorder.nvtx is None else _suspends(_getframe(1).f_code)
                begin(recorder, self, self.site, self.stream, suspends)
                return self
            except BaseException:  # Nobody leaves what was not entered.
                undo(recorder, self)
                raise

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None:
            """
            End the stage; an exception is noted and passes through.

            Python looks for signals as the first step of each function of Python, before any `try` of ours. What a
            handler raises right there reaches the program, and the stage stays open until the one around it ends, as a
            lock would stay locked. The block in C has no such step.
            """
            try:
                if self.uses == 1:
                    end(self, error)
                else:
                    self._exit_again(error)
            except BaseException:  # An interrupt: it goes on.
                if self.uses == 1:
                    end(self, error)  # Does nothing where the interrupt came after it.
                raise

        def set_attribute(self, key: str, value: object) -> None:
            """
            Add an attribute to this run's host span, unless the run has ended.

            Args:
                key: the attribute's name, e.g. `batch_size`.
                value: a `str`, `bool`, `int`, `float` or a sequence of one of them. The attribute has the value of this
                    moment, whatever becomes of the object. Built-in containers and small arrays of numpy are copied; a
                    tensor is described and never read, and any other object is named by its type.

            """
            attributes = self.attributes
            if type(key) is not str or not _is_small(value) or (attributes is not None and len(attributes) >= FEW):
                self._set_uncommon(key, value)
            elif not self.end_ns or self.uses == 0:
                if attributes is None:
                    self.attributes = {key: value}
                else:
                    attributes[key] = value

        def _set_uncommon(self, key: str, value: object) -> None:
            raise NotImplementedError

        def _enter_again(self) -> Self:
            raise NotImplementedError

        def _exit_again(self, error: BaseException | None) -> None:
            raise NotImplementedError

    def _is_small(value: object) -> bool:
        kind = type(value)
        if kind is int:
            return -(2**63) <= value < 2**63  # type: ignore[operator]  # Its type has been looked at.
        if kind is str or kind is bytes:
            return len(value) < SMALL_BYTES  # type: ignore[arg-type]
        return value is None or kind is float or kind is bool

    Block = TypeVar("Block", bound=StageBlock)

    def new_block(kind: type[Block], recorder: Recorder, site: Site) -> Block:
        """Return a block of the given class, ready to be entered."""
        block = kind()
        block.recorder, block.site, block.uses, block.end_ns = recorder, site, 0, 0
        block.stream = block.attributes = block.members = None
        return block

else:
    StageBlock, new_block = native.StageBlock, native.new_block


class Told(NamedTuple):
    """What `stage` was told; anything until it is checked."""

    name: Any
    attributes: Any
    stream: Any
    warmup: Any
    graph: Any
    said: Said | None = None
    memory: Any = None


def check_arguments(told: Told) -> None:
    """
    Refuse what can't be the arguments of a stage.

    Raises:
        TypeError: for values of another type.
        ValueError: for a blank name, or a `warmup` that is not a count.

    """
    name, attributes, stream, warmup, graph, _, memory = told
    if not (name is None or callable(name) or isinstance(name, str | staticmethod | classmethod | property)):
        raise TypeError(f'The name of a `stage` must be a `str`, not {shown(name)}; write `stage("decode")`.')
    if isinstance(name, str) and is_blank(name):
        raise ValueError(f'The name of a `stage` is {name!r}: expected one that is not blank, as in `stage("decode")`.')
    if attributes is not None and not hasattr(attributes, "items"):
        raise TypeError(f"`attributes` of a `stage` must be a mapping of names to values, not {shown(attributes)}.")
    if stream is not None and not (hasattr(stream, "cuda_stream") and hasattr(stream, "device_index")):
        raise TypeError(f"`stream` of a `stage` must be a `torch.cuda.Stream`, not {shown(stream)}.")
    if not isinstance(warmup, int | None) or isinstance(warmup, bool):
        raise TypeError(f"`warmup` of a `stage` must be a number of calls, not {shown(warmup)}.")
    if not 0 <= (warmup or 0) < 2**63:
        raise ValueError(f"`warmup` of a `stage` is {shown(warmup)}: expected 0 or more calls, and less than 2**63.")
    if not isinstance(graph, bool):
        raise TypeError(f"`graph` of a `stage` must be True or False, not {shown(graph)}.")
    if memory is not None and not isinstance(memory, bool):
        raise TypeError(f"`memory` of a `stage` must be True or False, not {shown(memory)}.")
