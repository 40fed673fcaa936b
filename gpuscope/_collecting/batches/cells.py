"""
What is known of the members of batches: ids, sampling, and when each token was made, settled for good.

A member's ids are settled as those of any stage are, whether it runs or has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.native import StageRecord, native
from gpuscope._recording.batches.token import source_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._data.interfaces import Bridge
    from gpuscope._recording.batches.token import Token

_LOW = (1 << 64) - 1
MEMBER = np.dtype([("high", "u8"), ("low", "u8"), ("span", "u8"), ("token_ns", "i8"), ("flags", "i8")])
"""What is known of a member. Its twin is `Member` in `csrc/pack.c`, as are these flags."""
SOMETHING, SAMPLED, REMOTE, HAS_STATE, TO_ASK = 1, 2, 4, 8, 16
_ASK, _DECIDED, _OWN, _KEPT = range(4)
"""When a stage's ids are its own: see `csrc/pack.c`."""


def cells_of(tokens: tuple[Token, ...], bridge: Bridge | None) -> NDArray[np.void]:
    """Return what is known of members once each stage among them is settled."""
    own = _OWN if bridge is None else _ASK if bridge.sdk else _KEPT if bridge.keeps_roots() else _DECIDED
    packed = cells_in_python(tokens) if native is None else native.members(tokens, own)
    cells = np.frombuffer(bytearray(packed), MEMBER)
    for place in np.flatnonzero(cells["flags"] & TO_ASK).tolist():
        *ids, flags = _asked(tokens[place], bridge)
        cells[place] = (*ids, tokens[place].time_ns, flags)
    return cells


def cells_in_python(tokens: tuple[Token, ...]) -> bytes:
    """Return the same as what is done in C where nothing is known without asking."""
    flags = [SOMETHING | TO_ASK if token else 0 for token in tokens]
    return np.array(
        [(0, 0, 0, token.time_ns, flag) for token, flag in zip(tokens, flags, strict=True)], MEMBER
    ).tobytes()


def _asked(token: Token, bridge: Bridge | None) -> tuple[int, int, int, int]:
    """Return both halves of the trace's id, the span's id, and the flags."""
    source = source_of(token)
    if isinstance(source, StageRecord):
        trace_id, span_id, sampled = _own(source) if bridge is None else bridge.settle_member(source)
        remote, state = False, source.trace.state
    else:
        trace_id, span_id, sampled = source.trace_id, source.span_id, source.trace_flags & 1
        remote, state = source.is_remote, source.trace_state
    flags = SOMETHING | SAMPLED * bool(sampled) | REMOTE * bool(remote) | HAS_STATE * bool(state)
    return trace_id >> 64, trace_id & _LOW, span_id, flags


def _own(record: StageRecord) -> tuple[int, int, bool]:
    """Return ids and sampling of a stage without a bridge to OpenTelemetry; it may still run."""
    return record.trace.trace_id, record.span_id, record.trace.sampled is not False
