"""
What batches add to their members' traces: links to them, and light spans with their shares and waits, as columns.

The light spans are not stages: they come as a `StageBatch` of their own, with an account of its own. Works in pieces,
between which the caller pauses. A member's ids are settled as those of any stage are, whether it runs or has ended.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuscope._data.attributes import BATCH_BASIS, ERROR_TYPE
from gpuscope._data.batch import MemberLinks, RowFlag, SharedColumns, SpanDetails, StageBatch
from gpuscope._data.native import StageRecord, native
from gpuscope._data.plain.values import shown
from gpuscope._data.record import Site
from gpuscope._recording.batches.members import EQUAL, TWICE, WRONG_WEIGHTS, shown_weight
from gpuscope._recording.batches.token import source_of, state_of
from gpuscope._recording.batches.weights import fault_in, shares, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope._data.interfaces import Bridge
    from gpuscope._data.record import ExceptionInfo
    from gpuscope._recording.batches.account import Faults
    from gpuscope._recording.batches.members import Members
    from gpuscope._recording.batches.token import Token

    _LookedAt = tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]
    """What is known of all members, each one's batch, and where each batch begins and the last one ends."""

_LOW = (1 << 64) - 1
_GPU_BIT, _ODD = np.uint64(1 << 63), np.uint64(0x9E37_79B9_7F4A_7C15)
_PIECE = 2048
"""Members that are looked at before the caller pauses, or a few more: they take some 0.6 ms."""
_SITES = 1024
_SHARED, _REMOTE = np.uint32(RowFlag.SHARED), np.uint32(RowFlag.REMOTE_PARENT)

MEMBER = np.dtype([("high", "u8"), ("low", "u8"), ("span", "u8"), ("token_ns", "i8"), ("flags", "i8")])
"""What is known of a member. Its twin is `Member` in `csrc/pack.c`, as are these flags."""
SOMETHING, SAMPLED, REMOTE, HAS_STATE, TO_ASK = 1, 2, 4, 8, 16
_ASK, _DECIDED, _OWN, _KEPT = range(4)
"""When a stage's ids are its own: see `csrc/pack.c`."""


class _Batch(NamedTuple):
    """A batch to be looked at: its row, whom it works for, and when it began on the records' clock."""

    row: int
    members: Members
    began_ns: int


class BatchMembers:
    """
    Looks at the members of the batches among resolved stages.

    Args:
        faults: counts what is wrong with them.
        first_id: the span id of the first light span; the others follow.
        links_only: whether there are no light spans.

    """

    def __init__(self, faults: Faults, first_id: int, *, links_only: bool) -> None:
        self._faults, self._next_id, self._links_only = faults, first_id, links_only
        self._sites: dict[tuple[Site, str], Site] = {}

    def look(self, batch: StageBatch, bridge: Bridge | None) -> Iterator[StageBatch | None]:
        """
        Link the batches to their members, and yield the light spans of some; None where there are none.

        A batch with a member that is sampled is sampled, unless the application's provider makes the spans.
        """
        piece: list[_Batch] = []
        waiting = 0
        for row, details in batch.details.items():
            if details.members is not None:
                piece.append(_Batch(row, *details.members))
                details.members = None
                waiting += len(piece[-1].members.tokens)
                if waiting >= _PIECE:
                    yield from self._try(batch, piece, bridge)
                    piece, waiting = [], 0
        if piece:
            yield from self._try(batch, piece, bridge)

    def _try(self, batch: StageBatch, piece: list[_Batch], bridge: Bridge | None) -> Iterator[StageBatch | None]:
        """Look at all at once or, where one fails, at each on its own, so that it costs itself and no other."""
        try:
            yield self._look(batch, piece, bridge)
        except Exception as error:  # It costs its links, and no stage.
            if len(piece) > 1:
                for each in piece:
                    yield from self._try(batch, [each], bridge)
            else:
                self._faults.note("internal_error", "the members of a batch can't be looked at: %s.", shown(error))

    def _look(self, batch: StageBatch, piece: list[_Batch], bridge: Bridge | None) -> StageBatch | None:
        cells, of, starts = _looked_at(piece, bridge)
        if _has_repeated(cells, of):
            piece = [self._unique(batch, each, bridge) for each in piece]
            cells, of, starts = _looked_at(piece, bridge)
        kept = (cells["flags"] & SAMPLED != 0) & (cells["span"] != 0)
        rows, sizes = np.array([each.row for each in piece]), np.diff(starts)
        weights = [self._weights(batch, each) for each in piece]
        ids = np.stack([cells["high"], cells["low"], cells["span"]], axis=1)
        for each, weight, (start, end) in zip(piece, weights, pairwise(starts.tolist()), strict=True):
            basis = EQUAL if weight is None else each.members.basis
            batch.details[each.row].linked = MemberLinks(end - start, basis, ids[start:end][kept[start:end]])
        if batch.live is None:
            batch.sampled[rows[of[kept]]] = True
        if self._links_only or not kept.any():
            return None
        position = np.arange(len(cells)) - starts[of]
        total = (batch.gpu_end_ns - batch.gpu_start_ns)[rows]
        share_ns = (total // sizes)[of] + (position < (total % sizes)[of])
        for at, weight in enumerate(weights):
            if weight is not None:
                share_ns[starts[at] : starts[at + 1]] = shares(int(total[at]), len(weight), weight)
        began_ns = np.array([each.began_ns for each in piece])[of]
        shared = SharedColumns(
            size=sizes[of][kept],
            position=position[kept],
            wait_s=np.maximum(began_ns - cells["token_ns"], 0)[kept] / 1e9,
            share_ns=share_ns[kept],
            batch_trace_high=batch.trace_high[rows[of[kept]]],
            batch_trace_low=batch.trace_low[rows[of[kept]]],
            batch_span_id=batch.span_id[rows[of[kept]]],
        )
        found = self._columns(batch, rows, of[kept], cells[kept], shared)
        _add_details(found, batch, piece, np.flatnonzero(kept), (cells, of, starts))
        return found

    def _unique(self, batch: StageBatch, each: _Batch, bridge: Bridge | None) -> _Batch:
        """Return a batch with each member once: where it was for the first time."""
        members, (cells, *_) = each.members, _looked_at([each], bridge)
        first: dict[tuple[int, ...], int] = {}
        places = []
        for place, (high, low, span, _, flags) in enumerate(cells.tolist()):
            seen = first.setdefault((high, low, span), place) if flags & SOMETHING else place
            if seen == place:
                places.append(place)
            else:
                self._faults.note("twice", TWICE, batch.sites[batch.site[each.row]].name, seen, place)
        weights = None if members.weights is None else tuple(members.weights[place] for place in places)
        tokens = tuple(members.tokens[place] for place in places)
        return each._replace(members=members._replace(tokens=tokens, weights=weights))

    def _weights(self, batch: StageBatch, each: _Batch) -> list[int] | None:
        """Return whole numbers, or None for equal weights."""
        weights = each.members.weights
        if weights is None:
            return None
        place = fault_in(weights)
        if place < 0:
            return whole(weights)
        name = batch.sites[batch.site[each.row]].name
        self._faults.note("weights", WRONG_WEIGHTS, name, shown_weight(weights, place))
        return None

    def _columns(
        self,
        batch: StageBatch,
        rows: NDArray[np.int64],
        of: NDArray[np.int64],
        cells: NDArray[np.void],
        shared: SharedColumns,
    ) -> StageBatch:
        """Return light spans as a batch: each has the times of its batch's stage, below the span of its member."""
        at, sites = rows[of], dict[Site, int]()
        site = np.array([sites.setdefault(self._site(batch, row), len(sites)) for row in rows.tolist()], np.int32)
        span_id = np.arange(self._next_id, self._next_id + len(at), dtype=np.uint64)
        self._next_id += len(at)
        flags = batch.flags[at] & ~_REMOTE | _SHARED | np.where(cells["flags"] & REMOTE, _REMOTE, np.uint32(0))
        return StageBatch(
            sites=tuple(sites),
            threads=batch.threads,
            devices=batch.devices,
            site=site[of],
            root=site[of],
            thread=batch.thread[at],
            trace_high=cells["high"].copy(),
            trace_low=cells["low"].copy(),
            span_id=span_id,
            parent_id=cells["span"].copy(),
            gpu_span_id=np.where(batch.gpu_span_id[at] != 0, span_id ^ _GPU_BIT, np.uint64(0)),
            sampled=np.ones(len(at), np.bool_),
            host_start_ns=batch.host_start_ns[at],
            host_end_ns=batch.host_end_ns[at],
            gpu_start_ns=batch.gpu_start_ns[at],
            gpu_end_ns=batch.gpu_end_ns[at],
            uncertainty_ns=batch.uncertainty_ns[at],
            device=batch.device[at],
            stream=batch.stream[at],
            flags=flags.astype(np.uint32),
            details={},
            shared=shared,
        )

    def _site(self, batch: StageBatch, row: int) -> Site:
        of, linked = batch.sites[batch.site[row]], batch.details[row].linked
        key = of, EQUAL if linked is None else linked.basis
        if key not in self._sites:
            if len(self._sites) >= _SITES:
                self._sites.clear()
            self._sites[key] = Site(f"{of.name} (shared)", {BATCH_BASIS: key[1]})
        return self._sites[key]


def _looked_at(piece: list[_Batch], bridge: Bridge | None) -> _LookedAt:
    counts = [len(each.members.tokens) for each in piece]
    cells = _cells(tuple(chain.from_iterable(each.members.tokens for each in piece)), bridge)
    return cells, np.repeat(np.arange(len(piece)), counts), np.cumsum([0, *counts])


def _has_repeated(cells: NDArray[np.void], of: NDArray[np.int64]) -> bool:
    """Tell whether a batch may have a member twice: it has one span id twice, or something of the same hash."""
    hashes = cells["span"] ^ (of.astype(np.uint64) * _ODD)
    ordered = np.sort(hashes[cells["flags"] & SOMETHING != 0])
    return bool((ordered[1:] == ordered[:-1]).any())


def _cells(tokens: tuple[Token, ...], bridge: Bridge | None) -> NDArray[np.void]:
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


def _add_details(
    light: StageBatch, batch: StageBatch, piece: list[_Batch], kept: NDArray[np.int64], members: _LookedAt
) -> None:
    """Add what few light spans have: that the batch has failed, and what other vendors say of the member's trace."""
    cells, of, _ = members
    failed = np.array([batch.details[each.row].error is not None for each in piece])
    few = np.flatnonzero(failed[of[kept]] | (cells["flags"][kept] & HAS_STATE != 0)).tolist()
    tokens = list(chain.from_iterable(each.members.tokens for each in piece)) if few else []
    details: Any = light.details
    for row in few:
        place = int(kept[row])
        state = state_of(tokens[place]) if cells["flags"][place] & HAS_STATE else None
        details[row] = _failed(batch.details[piece[of[place]].row].error, state)


def _failed(error: ExceptionInfo | None, state: str | None) -> SpanDetails:
    if error is None:
        return SpanDetails(trace_state=state)
    status = "ERROR", f"{error.type.rpartition('.')[2]}: {error.message}"
    return SpanDetails({ERROR_TYPE: error.type}, status=status, trace_state=state)
