"""
What batches add to their members' traces: links to them, and light spans with their shares and waits, as columns.

The light spans are not stages: they come as a `StageBatch` of their own, with an account of its own. Works in pieces,
between which the caller pauses. A member's ids are settled as those of any stage are, whether it runs or has ended.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuscope._collecting.batches.cells import HAS_STATE, REMOTE, SAMPLED, SOMETHING, cells_of
from gpuscope._collecting.batches.sums import Joined, MemberIds
from gpuscope._data.attributes import BATCH_BASIS, ERROR_TYPE
from gpuscope._data.batch import MemberLinks, RowFlag, SharedColumns, SpanDetails, StageBatch
from gpuscope._data.plain.values import shown
from gpuscope._data.record import Site
from gpuscope._recording.batches.members import EQUAL, TWICE, WRONG_WEIGHTS, shown_weight
from gpuscope._recording.batches.token import state_of
from gpuscope._recording.batches.weights import fault_in, shares, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope._collecting.batches.sums import Sums
    from gpuscope._data.batch import FinishedGeneration
    from gpuscope._data.interfaces import Bridge
    from gpuscope._data.record import ExceptionInfo
    from gpuscope._recording.batches.account import Faults
    from gpuscope._recording.batches.members import Members

    _LookedAt = tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]
    """What is known of all members, each one's batch, and where each batch begins and the last one ends."""

_GPU_BIT, _ODD = np.uint64(1 << 63), np.uint64(0x9E37_79B9_7F4A_7C15)
_PIECE = 2048
"""Members that are looked at before the caller pauses, or a few more: they take some 0.6 ms."""
_SITES = 1024
_SHARED, _REMOTE = np.uint32(RowFlag.SHARED), np.uint32(RowFlag.REMOTE_PARENT)


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
        sums: takes the members that join many batches.
        first_id: the span id of the first light span; the others follow.
        links_only: whether there are no light spans.

    """

    def __init__(self, faults: Faults, sums: Sums, first_id: int, *, links_only: bool) -> None:
        self._faults, self._sums, self._next_id, self._links_only = faults, sums, first_id, links_only
        self._finished: list[FinishedGeneration] = []
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
        if len(self._sums):
            light, finished = self._sums.take(self._next_id)
            self._finished += finished
            if light is not None and not self._links_only:
                self._next_id += len(light.site)
                yield light

    def take_finished(self) -> list[FinishedGeneration]:
        """Return the generations that have become complete since this was last asked."""
        finished, self._finished = self._finished, []
        return finished

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
        is_summed = self._summed(piece)
        if not is_summed.any() and (self._links_only or not kept.any()):
            return None
        position = np.arange(len(cells)) - starts[of]
        total = (batch.gpu_end_ns - batch.gpu_start_ns)[rows]
        share_ns = (total // sizes)[of] + (position < (total % sizes)[of])
        for at, weight in enumerate(weights):
            if weight is not None:
                share_ns[starts[at] : starts[at + 1]] = shares(int(total[at]), len(weight), weight)
        began_ns = np.array([each.began_ns for each in piece])[of]
        if is_summed.any():
            self._sum(batch, piece, (cells, of, starts), kept, share_ns)
            kept &= ~is_summed
            if self._links_only or not kept.any():
                return None
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

    def _summed(self, piece: list[_Batch]) -> NDArray[np.bool_]:
        """Return which members are of many batches."""
        none = [each.members.steps is None for each in piece]
        if all(none):
            return np.zeros(1, np.bool_)
        return np.array(
            [step is not None for each in piece for step in each.members.steps or (None,) * len(each.members.tokens)]
        )

    def _sum(
        self,
        batch: StageBatch,
        piece: list[_Batch],
        members: _LookedAt,
        kept: NDArray[np.bool_],
        share_ns: NDArray[np.int64],
    ) -> None:
        """Hand on the members that are of many batches."""
        cells, _, starts = members
        for each, start, end in zip(piece, starts.tolist(), starts[1:].tolist(), strict=False):
            site = self._site(batch, each.row)
            for position, step in enumerate(each.members.steps or ()):
                if step is None:
                    continue
                member = each.members.summed[position]
                place = start + position
                high, low, span, _, flags = cells[place].item()
                state = state_of(member.token) if flags & HAS_STATE else None
                ids = MemberIds(high, low, span, bool(kept[place]), bool(flags & REMOTE), state)
                joined = Joined(batch, each.row, site, end - start, position, int(share_ns[place]), each.began_ns)
                self._sums.add(member, step, ids, joined)

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
        members = members._replace(tokens=tokens, weights=weights)
        if members.steps is not None:
            summed, steps = (tuple(of[place] for place in places) for of in (members.summed, members.steps))
            members = members._replace(summed=summed, steps=steps)
        return each._replace(members=members)

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
    cells = cells_of(tuple(chain.from_iterable(each.members.tokens for each in piece)), bridge)
    return cells, np.repeat(np.arange(len(piece)), counts), np.cumsum([0, *counts])


def _has_repeated(cells: NDArray[np.void], of: NDArray[np.int64]) -> bool:
    """Tell whether a batch may have a member twice: it has one span id twice, or something of the same hash."""
    hashes = cells["span"] ^ (of.astype(np.uint64) * _ODD)
    ordered = np.sort(hashes[cells["flags"] & SOMETHING != 0])
    return bool((ordered[1:] == ordered[:-1]).any())


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
