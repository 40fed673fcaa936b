"""
`Generation`: a request whose tokens come from many batches, one step after the other, as with continuous batching.

It is a stage that may begin on one thread and end on another, and a member of the batches in between.
"""

from __future__ import annotations

from contextlib import ExitStack
from contextvars import copy_context
from typing import TYPE_CHECKING, NoReturn

from gpuscope._data.attributes import OPERATION, OUTPUT_TOKENS, PROVIDER, REQUEST_MODEL
from gpuscope._data.plain.descriptions import full_name_of
from gpuscope._recording.batches.summed import Summed
from gpuscope._recording.batches.token import here
from gpuscope._recording.stage import stage
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self


class Generation(Summed):
    """
    A request that takes part in many batches, from now until `end`.

    It is a stage below the current one, which it does not become: what the caller does next is not inside it. Give it
    to each batch among the members: `gpuscope.stage("step", members=[generation, ...], weights=tokens)`. Of all these
    batches it gets one light span, with the sums of its waits and of its shares. Any thread may call its methods, one
    at a time.

    Args:
        name: of its stage.
        attributes: of its stage, such as `gen_ai.request.model`.

    Examples:
        `generation = gpuscope.Generation("generate", attributes={"gen_ai.usage.input_tokens": len(prompt)})`

    """

    __slots__ = ("_block", "_context", "_stage")

    def __init__(self, name: str = "generate", *, attributes: Mapping[str, object] | None = None) -> None:
        self._context, self._block = copy_context(), ExitStack()
        self._stage = self._context.run(self._block.enter_context, stage(name, attributes=attributes))
        given = dict(attributes or {})
        told = {key: str(given[key]) for key in (OPERATION, PROVIDER, REQUEST_MODEL) if isinstance(given.get(key), str)}
        super().__init__(self._context.run(here), told)

    def prefilled(self) -> None:
        """Say that the next batch makes the first token. Otherwise it is the last one joined before `had_tokens`."""
        if self.first_step is None:
            self.first_step = self.steps

    def had_tokens(self, count: int = 1) -> None:
        """Note that there are so many tokens more, now: call it where each token reaches whoever reads the answer."""
        recorder = state.recorder
        if count < 1 or recorder is None:
            return
        self.last_token_ns = recorder.clock()
        if not self.tokens:
            self.first_token_ns = self.last_token_ns
            if self.first_step is None:
                self.first_step = max(0, self.steps - 1)
        self.tokens += count

    def set_attribute(self, key: str, value: object) -> None:
        """Add an attribute to its stage, unless it has ended; values are as for `stage`."""
        self._stage.set_attribute(key, value)

    def end(self, error: BaseException | None = None) -> None:
        """
        End it: it joins no more batches. To do so twice is harmless.

        Args:
            error: what has made it fail; None where it is complete, or was given up.

        """
        if self.ended:
            return
        if error is not None:
            self.error_type = full_name_of(type(error))
        self.ended = True  # First: the collector looks once the stage has come.
        if self.tokens:
            self.set_attribute(OUTPUT_TOKENS, self.tokens)
        for name, seconds in self.times_s().items():
            self.set_attribute(name, seconds)
        kind = None if error is None else type(error)
        self._context.run(self._block.__exit__, kind, error, None if error is None else error.__traceback__)

    def __copy__(self) -> Self:
        """Return the generation itself."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the generation itself."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse: its stage ends in this process."""
        raise TypeError("a `Generation` can't be pickled; send its `token`, and end it here.")
