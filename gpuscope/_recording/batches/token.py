"""
`here` and `Token`: where a request is in its trace, to be carried to the batch that it will be part of.

A token that is made here holds the current stage itself, or the ids of the application's current span. Nothing of it is
worked out before somebody asks. What a token says of another process is settled: it has been written down.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from gpuscope._data.native import StageRecord, native
from gpuscope._interrupts import instead_of
from gpuscope._recording import dynamo
from gpuscope._recording.current_stage import before, find_current, is_left_behind
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import FromAbove
    from gpuscope._recording.recorder import Recorder

Ids: TypeAlias = Any
"""What has `trace_id`, `span_id` and `trace_flags`: a `SpanContext` of OpenTelemetry, or `Written`."""
_OFF, _NOWHERE = "recording is off", "no stage and no span is current"
_SAMPLED = 1
_TRACEPARENT = r"(?!ff)([\da-f]{2})-(?!0{32})([\da-f]{32})-(?!0{16})([\da-f]{16})-([\da-f]{2})(-.*)?"
"""W3C's header of that name, of this version and later ones, which only add to its end."""


if TYPE_CHECKING or native is None:

    class TokenFields:
        """What a token holds. Never changed once it is made."""

        __slots__ = ("_made_of", "time_ns")
        _made_of: FromAbove
        """A `StageRecord`; a `SpanContext` of OpenTelemetry or `Written`; or, of nothing, the text that says why."""
        time_ns: int

    _set_source: Any = vars(TokenFields)["_made_of"].__set__
    _set_time: Any = vars(TokenFields)["time_ns"].__set__

    def _new_token(kind: type[Token], source: object, time_ns: int) -> Token:
        token = object.__new__(kind)
        _set_source(token, source)
        _set_time(token, time_ns)
        return token

else:
    TokenFields, _new_token = native.TokenFields, native.new_token


class Written(NamedTuple):
    """What was written down of a stage or a span, by a pickle or a header; in the order of a `SpanContext`."""

    trace_id: int
    span_id: int
    is_remote: bool
    trace_flags: int
    trace_state: None = None
    is_valid: bool = True


class Token(TokenFields):
    """
    Where a request is: its trace, the span in it, whether that is sampled, and when `here()` was called.

    It never changes. It may be copied, put into queues, used by any thread or task, and pickled for another process.
    A token of nothing is false. Two tokens are equal if they are of the same span.
    """

    __slots__ = ()

    def __new__(cls) -> Token:  # noqa: PYI034 - not even of a subclass
        """Return a token of nothing; `gpuscope.here()` makes the others."""
        return NOWHERE

    @classmethod
    def from_traceparent(cls, text: str) -> Token:
        """
        Return the token of a span that another process wrote into the W3C header `traceparent`; its time is now.

        Args:
            text: the header's value. One that is not valid gives a token of nothing, because clients may send anything.

        """
        import re

        found = re.fullmatch(_TRACEPARENT, text.strip()) if isinstance(text, str) else None
        if found is None or (found[1] == "00" and found[5]):
            return NOWHERE
        written = Written(int(found[2], 16), int(found[3], 16), True, int(found[4], 16) & _SAMPLED)
        return _new_token(Token, written, time.perf_counter_ns())

    @property
    def trace_id(self) -> int:
        """The trace's id, of 128 bits; 0 of nothing."""
        return int(self._ids().trace_id)

    @property
    def span_id(self) -> int:
        """The span's id, of 64 bits; 0 of nothing."""
        return int(self._ids().span_id)

    @property
    def sampled(self) -> bool:
        """Whether the trace is exported. The sampler decides now, if it has not yet."""
        return bool(self._ids().trace_flags & _SAMPLED)

    @property
    def traceparent(self) -> str:
        """The same as the value of W3C's header `traceparent`, which has no time; empty of nothing."""
        ids = self._ids()
        return f"00-{ids.trace_id:032x}-{ids.span_id:016x}-{ids.trace_flags & _SAMPLED:02x}" if ids.span_id else ""

    def _ids(self) -> Ids:
        """Return the ids, settled for good."""
        source = self._made_of
        if not isinstance(source, StageRecord):
            return _NO_IDS if type(source) is str else source
        recorder: Recorder = source.recorder
        recorder.open_bridge()
        if recorder.bridge is not None:
            return recorder.bridge.ids_of_member(source)
        return Written(source.trace.trace_id, source.span_id, False, _SAMPLED)

    def __bool__(self) -> bool:
        """Tell whether it is a token of something."""
        return type(self._made_of) is not str

    def __eq__(self, other: object) -> bool:
        """Tell whether another token is of the same span."""
        if not isinstance(other, Token):
            return NotImplemented
        return self is other or (self.span_id, self.trace_id) == (other.span_id, other.trace_id)

    def __hash__(self) -> int:
        """Return a number that equal tokens share."""
        ids = self._ids()
        return hash((ids.trace_id, ids.span_id))

    def __copy__(self) -> Token:
        """Return the token itself, which never changes."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Token:
        """Return the token itself, which never changes."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Token], tuple[object, ...]]:
        """Write down the ids, the time by the clock of this host and that of the world, and which host it is."""
        if not self:
            return _nothing_again, (self._made_of,)
        from gpuscope._recording.batches.host import host_id

        ids, ago_ns = self._ids(), time.perf_counter_ns() - self.time_ns
        written = ids.trace_id, ids.span_id, True, ids.trace_flags & _SAMPLED
        return _token_again, (written, self.time_ns, time.time_ns() - ago_ns, host_id())

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse: a token never changes."""
        raise AttributeError(f"a `Token` never changes; `{name}` cannot be set.")

    def __repr__(self) -> str:
        """Show where it is or why it is of nothing; settle nothing."""
        if not self:
            return f"<Token of nothing: {self._made_of}>"
        source = self._made_of
        if isinstance(source, StageRecord):
            return f"<Token in the stage {source.site.name!r}>"
        return f"<Token of the span {source.trace_id:032x}-{source.span_id:016x}>"


def source_of(token: Token) -> FromAbove:
    """Return what the token was made of: a `StageRecord`, ids, or of nothing a text."""
    return token._made_of  # noqa: SLF001 - of this file


def state_of(token: Token) -> str | None:
    """Return what other vendors say of the trace, as in the header `tracestate`, if anything."""
    source = source_of(token)
    state = source.trace.state if isinstance(source, StageRecord) else getattr(source, "trace_state", None)
    return None if not state else state if isinstance(state, str) else str(state.to_header())


_NO_IDS = Written(0, 0, False, 0)
OFF, NOWHERE = (_new_token(Token, why, 0) for why in (_OFF, _NOWHERE))


def _nothing_again(why: str) -> Token:
    return OFF if why == _OFF else NOWHERE


def _token_again(ids: tuple[int, int, bool, int], time_ns: int, epoch_ns: int, host: str) -> Token:
    """Make what was unpickled. Of another host only the clock of the world is comparable with ours."""
    from gpuscope._recording.batches.host import host_id

    if host != host_id():
        time_ns = time.perf_counter_ns() - (time.time_ns() - epoch_ns)
    return _new_token(Token, Written(*ids), time_ns)


def here() -> Token:
    """
    Return where the calling code is: a token of the current stage or, inside a span of the application's, of that span.

    It costs a fraction of a microsecond. Hand it on with the request, to whatever puts requests into batches, and
    give a batch's tokens to `gpuscope.stage(name, members=tokens)`: see docs/batches.md. It may cross threads, tasks
    and queues as it is, and processes as a pickle; `token.traceparent` is for headers, as is `gpuscope.inject`.

    Returns:
        A token; one of nothing, which is false, where recording is off or nothing is current. `repr` says which.

    Examples:
        `queue.put((request, gpuscope.here()))`

    """
    # First and alone: see `_recording.wrap`.
    if dynamo.is_dynamo_compiling():
        return NOWHERE
    try:
        return _here(state.recorder)
    except Exception as error:  # Of the application's context, or of its provider.
        return _failed(error)


def _failed(error: Exception) -> Token:
    return instead_of(error, NOWHERE)


def _here(recorder: Recorder | None) -> Token:
    """Return a token of where the calling code is."""
    if recorder is None:
        return OFF
    stage = find_current()
    while stage is not None and is_left_behind(stage):
        stage = before(stage)
    source: Any = stage if stage is not None and stage.recorder is recorder else None
    look = recorder.look_for_provider
    if look is not None and recorder.bridge is not None and (source is None or look() is not None):
        source = recorder.bridge.here(source)
    return NOWHERE if source is None else _new_token(Token, source, recorder.clock())


if native is not None:
    native.prepare_tokens(Token, OFF, NOWHERE, _failed)
if not TYPE_CHECKING:
    here = dynamo.here_in_c(here, state)
