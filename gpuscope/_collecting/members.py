"""
What batches add to their members' traces: links to them, and light spans with their shares and waits, as columns.

The light spans are no stages: they come as a `StageBatch` of their own, with an account of its own. Works in pieces,
between which the caller pauses. A member's ids are settled as those of any stage are, whether it runs or has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from gpuscope._data.attributes import BATCH_BASIS, ERROR_TYPE
from gpuscope._data.batch import MemberLinks, RowFlag, SharedColumns, SpanDetails, StageBatch
from gpuscope._data.native import StageRecord
from gpuscope._data.plain.values import shown
from gpuscope._data.record import Site
from gpuscope._recording.batches.members import EQUAL, TWICE, WRONG_WEIGHTS, shown_weight
from gpuscope._recording.batches.weights import fault_in, shares, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuscope._data.interfaces import Bridge
    from gpuscope._recording.batches.account import Faults
    from gpuscope._recording.batches.members import Members

_LOW = (1 << 64) - 1
_GPU_BIT = np.uint64(1 << 63)
_PIECE, _ROWS = 512, 2048
"""Members between two pauses, which take some 0.6 ms; and light spans of one `StageBatch`, or a few more."""
_SITES = 1024
_SHARED, _REMOTE = np.uint32(RowFlag.SHARED), np.uint32(RowFlag.REMOTE_PARENT)

Settle: TypeAlias = "Callable[[StageRecord], tuple[int, int, bool]]"
_sources = attrgetter("_source")
"""Of a token: see `_recording.batches.token`."""


class _Member(NamedTuple):
    """One member whose trace is exported."""

    position: int
    trace_id: int
    span_id: int
    token_ns: int
    is_remote: bool
    state: str | None


@dataclass(slots=True)
class _Rows:
    """Light spans that are not columns yet."""

    batch: list[int] = field(default_factory=list)
    """Each one's row of the batch's stage."""
    member: list[_Member] = field(default_factory=list)
    share_ns: list[int] = field(default_factory=list)
    began_ns: list[int] = field(default_factory=list)
    details: dict[int, SpanDetails] = field(default_factory=dict)


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
        Link the batches to their members, and yield the light spans; None where it is time for a pause.

        A batch with a member that is sampled is sampled, unless the application's provider makes the spans.
        """
        settle: Settle = _own if bridge is None else bridge.settle_member
        rows, looked_at = _Rows(), 0
        for row, details in batch.details.items():
            if details.members is None:
                continue
            of, details.members = details.members, None
            looked_at += len(of[0].tokens)
            try:
                self._add(rows, batch, row, of, settle)
            except Exception as error:  # It costs this batch its links, and no stage.
                self._faults.note("internal_error", "the members of a batch could not be looked at: %s.", shown(error))
            if len(rows.batch) >= _ROWS:
                yield self._columns(rows, batch)
                rows, looked_at = _Rows(), 0
            elif looked_at >= _PIECE:
                yield None
                looked_at = 0
        if rows.batch:
            yield self._columns(rows, batch)

    def _add(self, rows: _Rows, batch: StageBatch, row: int, of: tuple[Members, int], settle: Settle) -> None:
        members, began_ns = of
        name, details = batch.sites[batch.site[row]].name, batch.details[row]
        weights, basis = self._weights(name, members)
        sampled, repeated = _members(members, settle)
        size = len(members.tokens) - len(repeated)
        for first, place in repeated.items():
            self._faults.note("twice", TWICE, name, place, first)
        if repeated and weights is not None:
            weights = [weight for place, weight in enumerate(weights) if place not in repeated]
            weights, basis = (weights, basis) if any(weights) else (None, EQUAL)
        ids = [(member.trace_id >> 64, member.trace_id & _LOW, member.span_id) for member in sampled]
        details.linked = MemberLinks(size, basis, np.array(ids, np.uint64).reshape(-1, 3))
        if sampled and batch.live is None:
            batch.sampled[row] = True
        if self._links_only or not sampled:
            return
        allotted = shares(int(batch.gpu_end_ns[row] - batch.gpu_start_ns[row]), size, weights)
        first = len(rows.batch)
        rows.batch += [row] * len(sampled)
        rows.began_ns += [began_ns] * len(sampled)
        rows.member += sampled
        rows.share_ns += [allotted[member.position] for member in sampled]
        if details.error is not None or any(member.state for member in sampled):
            rows.details |= {first + at: _details(details, member.state) for at, member in enumerate(sampled)}

    def _weights(self, name: str, members: Members) -> tuple[list[int] | None, str]:
        """Return whole numbers, or None for equal weights, and the name of the basis."""
        if members.weights is None:
            return None, EQUAL
        place = fault_in(members.weights)
        if place >= 0:
            self._faults.note("weights", WRONG_WEIGHTS, name, shown_weight(members.weights, place))
            return None, EQUAL
        return whole(members.weights), members.basis

    def _columns(self, rows: _Rows, batch: StageBatch) -> StageBatch:
        """Return light spans as a batch: each has the times of its batch's stage, below the span of its member."""
        at = np.array(rows.batch)
        sites: dict[Site, int] = {}
        site_at = {row: sites.setdefault(self._site(batch, row), len(sites)) for row in dict.fromkeys(rows.batch)}
        position, trace_id, parent_id, token_ns, remote, _ = zip(*rows.member, strict=True)
        site = np.array([site_at[row] for row in rows.batch], np.int32)
        span_id = np.arange(self._next_id, self._next_id + len(at), dtype=np.uint64)
        self._next_id += len(at)
        flags = batch.flags[at] & ~_REMOTE | _SHARED | np.where(remote, _REMOTE, np.uint32(0))
        links = {row: batch.details[row].linked for row in site_at}
        return StageBatch(
            sites=tuple(sites),
            threads=batch.threads,
            devices=batch.devices,
            site=site,
            root=site,
            thread=batch.thread[at],
            trace_high=np.array([each >> 64 for each in trace_id], np.uint64),
            trace_low=np.array([each & _LOW for each in trace_id], np.uint64),
            span_id=span_id,
            parent_id=np.array(parent_id, np.uint64),
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
            details=rows.details,
            shared=SharedColumns(
                size=np.array([links[row].size for row in rows.batch], np.int64),  # type: ignore[union-attr]
                position=np.array(position, np.int64),
                wait_s=np.maximum(np.array(rows.began_ns, np.int64) - np.array(token_ns, np.int64), 0) / 1e9,
                share_ns=np.array(rows.share_ns, np.int64),
                batch_trace_high=batch.trace_high[at],
                batch_trace_low=batch.trace_low[at],
                batch_span_id=batch.span_id[at],
            ),
        )

    def _site(self, batch: StageBatch, row: int) -> Site:
        of, linked = batch.sites[batch.site[row]], batch.details[row].linked
        key = of, EQUAL if linked is None else linked.basis
        if key not in self._sites:
            if len(self._sites) >= _SITES:
                self._sites.clear()
            self._sites[key] = Site(f"{of.name} (shared)", {BATCH_BASIS: key[1]})
        return self._sites[key]


def _members(members: Members, settle: Settle) -> tuple[list[_Member], dict[int, int]]:
    """Return the members whose traces are exported, and those places where a member is for the second time."""
    found: list[_Member] = []
    seen: dict[tuple[int, int], int] = {}
    repeated: dict[int, int] = {}
    for place, (token, source) in enumerate(zip(members.tokens, map(_sources, members.tokens), strict=True)):
        if isinstance(source, StageRecord):
            trace_id, span_id, sampled = settle(source)
            remote, state = False, source.trace.state
        elif type(source) is str:
            continue  # A token of nothing.
        else:
            trace_id, span_id, sampled = source.trace_id, source.span_id, bool(source.trace_flags & 1)
            remote, state = source.is_remote, source.trace_state
        first = seen.setdefault((trace_id, span_id), place)
        if first != place:
            repeated[place] = first
        elif sampled and span_id:
            found.append(_Member(place - len(repeated), trace_id, span_id, token.time_ns, remote, _text_of(state)))
    return found, repeated


def _text_of(state: Any) -> str | None:
    return None if not state else state if isinstance(state, str) else str(state.to_header())


def _own(record: StageRecord) -> tuple[int, int, bool]:
    """Return ids and sampling of a stage without a bridge to OpenTelemetry; it may still run."""
    return record.trace.trace_id, record.span_id, record.trace.sampled is not False


def _details(batch: SpanDetails, state: Any) -> SpanDetails:
    """Return what a light span tells of a batch that has failed, and of its own trace."""
    if batch.error is None:
        return SpanDetails(trace_state=state)
    kind = batch.error.type
    failed = "ERROR", f"{kind.rpartition('.')[2]}: {batch.error.message}"
    return SpanDetails({ERROR_TYPE: kind}, status=failed, trace_state=state)
