"""
The calls of one stage in one kind of request, and the figures of theirs that a verdict is made from.

Picks, adds up and takes medians; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._busy.sampled import Sampled
from gpuscope.analysis._busy.slope import Slope, slope_of
from gpuscope.analysis._structure.ancestors import ancestors
from gpuscope.analysis._structure.kinds import kinds
from gpuscope.analysis._structure.own_time import collected_ns, own_ns
from gpuscope.analysis._structure.parts import Requests, counted
from gpuscope.analysis._structure.unmeasured import why_unmeasured
from gpuscope.analysis._verdicts.evidence import Activity
from gpuscope.analysis.latency.in_batches import BatchTimes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from gpuscope.analysis._busy.estimate import Share
    from gpuscope.analysis._busy.looked import LookedAt
    from gpuscope.analysis._verdicts.cold import Cold
    from gpuscope.analysis._verdicts.evidence import Evidence
    from gpuscope.analysis.recording import Recording

KEPT_BUSY = 0.8
"""A stream that had work for this part of a stage hardly waited for launches: the host may have waited for the work."""


@dataclass(frozen=True)
class Material:
    """All that there is to judge from: a recording, the evidence in it, and which calls were cold."""

    recording: Recording
    evidence: Evidence
    cold: Cold
    looked: Mapping[tuple[str, str], LookedAt] = field(default_factory=dict)
    """What deep looks saw, by kind of request and stage."""

    def name(self, row: int) -> str:
        """Return the stage of a row."""
        return self.recording.names[int(self.recording.stage[row])]

    @cached_property
    def own_ns(self) -> NDArray[np.int64]:
        """What each row takes on the host itself, without the stages inside and without garbage collections."""
        return own_ns(self.recording) - self.collected_ns

    @cached_property
    def collected_ns(self) -> NDArray[np.int64]:
        """What garbage collections took in each row itself."""
        return collected_ns(self.recording)

    @cached_property
    def in_batches(self) -> BatchTimes:
        """What requests spend in batches and waiting for them."""
        return BatchTimes(self.recording)

    @cached_property
    def duration_ns(self) -> NDArray[np.int64]:
        """Time from each row's start on the host to the end of all its work, at least 1."""
        ns: NDArray[np.int64] = np.maximum(self.evidence.end_ns - self.recording.host_start_ns, 1)
        return ns

    def requests(self, kind: int) -> Requests:
        """Return the requests that parts are parts of: those without warm-up and cold calls, if there are any."""
        if kind not in self._requests:
            recording = self.recording
            rows = np.flatnonzero((recording.parent < 0) & (recording.stage == kind))
            typical = rows[~recording.around_warmup[rows] & ~self.cold.rows[rows]]
            some = typical if len(typical) else counted(recording, rows)
            self._requests[kind] = Requests(recording, some, self.evidence.end_ns)
        return self._requests[kind]

    def request_ms(self, kind: int) -> float:
        """Return the median duration of the requests of a kind, which is the one that the figures have."""
        rows = np.flatnonzero((self.recording.parent < 0) & (self.recording.stage == kind))
        took_ns = self.evidence.end_ns - self.recording.host_start_ns
        return float(np.median(took_ns[counted(self.recording, rows)])) / 1e6

    @cached_property
    def sampled(self) -> Sampled:
        """The answers of streams that were asked whether they had work; not in copies that the host waits for."""
        evidence = self.evidence
        copies = np.zeros(len(self.recording.stage), np.bool_)
        copies[evidence.segments.owner[evidence.kind == Activity.COPIES]] = True
        return Sampled(self.recording, copies)

    def slope(self, rows: NDArray[np.int64]) -> Slope | None:
        """Return how the GPU interval of a stage's calls moves with their host time."""
        recording = self.recording
        key = rows.tobytes()
        if key not in self._slopes:
            host_ns = recording.host_end_ns[rows] - recording.host_start_ns[rows]
            self._slopes[key] = slope_of(host_ns, recording.gpu_end_ns[rows] - recording.gpu_start_ns[rows])
        return self._slopes[key]

    @cached_property
    def _slopes(self) -> dict[bytes, Slope | None]:
        return {}

    @cached_property
    def _requests(self) -> dict[int, Requests]:
        return {}

    def calls(self) -> Iterator[CallsOfStage]:
        """Yield the calls of each stage in each kind of request: kinds by total judged time, stages in their order."""
        recording = self.recording
        codes = recording.stage[recording.root].astype(np.int64) * len(recording.names) + recording.stage
        order = np.argsort(codes, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []
        # A stage may also run inside itself, or be outermost in one place and inner, or in a graph, in another.
        place = np.where(recording.parent < 0, 0, np.where(recording.in_graph, 2, 1))
        split = [rows[place[rows] == each] for rows in groups for each in range(3)]
        found = [CallsOfStage(self, rows) for rows in split if len(rows)]
        host_ns = recording.host_end_ns - recording.host_start_ns
        whole = {calls.root: int(host_ns[calls.judged].sum()) for calls in found if calls.outermost}
        order_of = {(kind.root, kind.name): place for place, kind in enumerate(kinds(recording))}
        yield from sorted(
            found,
            key=lambda calls: (-whole[calls.root], calls.root, not calls.outermost, order_of[calls.root, calls.name]),
        )


@dataclass(frozen=True, eq=False)
class CallsOfStage:
    """The calls of one stage in one kind of request."""

    material: Material
    rows: NDArray[np.int64]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.material.name(int(self.rows[0]))

    @property
    def root(self) -> str:
        """The kind of request: the name of its outermost stage."""
        return self.material.name(int(self.material.recording.root[self.rows[0]]))

    @property
    def outermost(self) -> bool:
        """Whether these are the requests themselves."""
        return bool(self.material.recording.parent[self.rows[0]] < 0)

    @property
    def replayed(self) -> bool:
        """Whether these ran inside replays of CUDA graphs."""
        return bool(self.material.recording.in_graph[self.rows[0]])

    @cached_property
    def warmup(self) -> NDArray[np.bool_]:
        """Which of the rows are warm-up calls, contain one, or are in a warm-up request: all of that is slow."""
        recording = self.material.recording
        return recording.around_warmup[self.rows] | recording.in_warmup_request[self.rows]

    @cached_property
    def judged(self) -> NDArray[np.int64]:
        """The rows that are neither warm-up nor cold, contain no such call, and are in no warm-up request."""
        return self.rows[~self.warmup & ~self.material.cold.rows[self.rows]]

    @cached_property
    def timed(self) -> NDArray[np.int64]:
        """The judged rows whose GPU times can be relied on."""
        return self.judged[self.material.recording.measured[self.judged]]

    @property
    def kind(self) -> int:
        """The stage number of the outermost stage."""
        return int(self.material.recording.stage[self.material.recording.root[self.rows[0]]])

    @property
    def requests(self) -> Requests:
        """The requests that these calls are compared with."""
        return self.material.requests(self.kind)

    @cached_property
    def total_ns(self) -> int:
        """The sum of the durations of the judged rows."""
        return int(self.material.duration_ns[self.judged].sum())

    def share(self, value_ns: NDArray[np.int64]) -> float:
        """Return the sum of a column of times over the judged rows, as a part of their durations; 0 without rows."""
        return float(value_ns[self.judged].sum()) / self.total_ns if self.total_ns else 0.0

    def median_ms(self, value_ns: NDArray[np.int64], *, timed: bool = False) -> float | None:
        """Return the median of a column of times, which is the one that the figures have; None without rows."""
        rows = self.rows[self.material.recording.measured[self.rows]] if timed else self.rows
        rows = counted(self.material.recording, rows)
        return float(np.median(value_ns[rows])) / 1e6 if len(rows) else None

    @cached_property
    def busy(self) -> Share | None:
        """The part of their time in which the GPU was found to have work, by asking it; None with too few answers."""
        evidence, sampled = self.material.evidence, self.material.sampled
        if not sampled.any:
            return None
        copies_ns = evidence.copy_idle_ns[self.judged].sum()
        known_ns = self.total_ns - (evidence.idle_ns + evidence.unproven_ns)[self.judged].sum()
        return sampled.busy(self.within, self.total_ns, int(copies_ns), int(known_ns))

    def gain_ms(self, part: float) -> float:
        """
        Return what a request gains in these calls, from the part that each gains: never more than they or it take.

        It is that part of the median call, times the calls of a request.
        """
        part = min(1.0, part)
        often = len(self.requests.inside(self.judged)) / max(1, len(self.requests.rows))
        median_ms = self.median_ms(self.material.duration_ns) or 0.0
        return min(part * median_ms * often, self.material.request_ms(self.kind))

    @cached_property
    def within(self) -> NDArray[np.int64]:
        """The judged rows and all rows inside them."""
        recording = self.material.recording
        chosen = np.zeros(len(recording.stage), np.bool_)
        chosen[self.judged] = True
        inside = chosen.copy()
        for rows, above in ancestors(recording.parent):
            inside[rows] |= chosen[above]
        return np.flatnonzero(inside)

    def kept_busy(self) -> tuple[float, str | None]:
        """
        Return where the host may wait though it seems to set the pace, by the answers of streams.

        Returns:
            The part of the time that it is in stages whose streams nearly always had work and were not behind at the
            end, as in one that waits inside; and the stage with most work of that and of all other such time.

        """
        recording, evidence = self.material.recording, self.material.evidence
        rows, count = self.material.sampled.usable(self.within), len(recording.names)
        had_work = np.bincount(recording.stage[rows], recording.had_work[rows], count)
        asked = np.bincount(recording.stage[rows], recording.samples[rows], count)
        share = had_work / np.maximum(asked, 1)
        inside = np.zeros(len(recording.stage), np.bool_)
        inside[self.within] = True
        owner = evidence.segments.owner
        paced = np.flatnonzero((evidence.kind == Activity.PACED) & inside[owner])
        host_ns = (evidence.segments.host_end_ns - evidence.segments.host_start_ns)[paced]
        took_ns = np.bincount(recording.stage[owner[paced]], host_ns, count)
        busy_ns = float(took_ns[share >= KEPT_BUSY].sum())
        most = int(np.argmax(took_ns * share)) if len(paced) else -1
        return busy_ns / max(1, self.total_ns), recording.names[most] if most >= 0 else None

    def segments(self) -> NDArray[np.int64]:
        """Return the segments that the judged rows own; if they are requests, all segments of these requests."""
        owner = self.material.evidence.segments.owner
        chosen = np.zeros(len(self.material.recording.stage), np.bool_)
        chosen[self.judged] = True
        return np.flatnonzero(chosen[self.material.recording.root[owner] if self.outermost else owner])

    def waits_for(self) -> str | None:
        """Return the stage whose GPU work the host waits longest for in these calls; None without a wait."""
        recording, awaited = self.material.recording, self.material.evidence.awaited
        here = np.isin(awaited.segment, self.segments())
        if not here.any():
            return None
        took_ns = np.bincount(recording.stage[awaited.owner[here]], awaited.ns[here])
        return recording.names[int(np.argmax(took_ns))]

    def share_of_caller(self) -> float:
        """Return the time of these calls as a part of the stream time of the stages that launched their graphs."""
        recording = self.material.recording
        gpu_ns = recording.gpu_end_ns - recording.gpu_start_ns
        launched = np.unique(recording.callers[self.timed])
        return float(gpu_ns[self.timed].sum()) / max(1.0, float(gpu_ns[launched].sum()))

    def launched_by(self) -> str:
        """Return the stage that launched the graph of the first of these calls."""
        return self.material.name(int(self.material.recording.callers[self.rows[0]]))

    def without_gpu_times(self) -> str:
        """Return why GPU times are missing in these calls: of the stage that has most time without them."""
        recording, evidence = self.material.recording, self.material.evidence
        chosen = np.isin(recording.root, self.requests.rows) & ~self.material.recording.measured
        rows = np.flatnonzero(chosen)
        if len(rows) and not self.material.recording.measured[self.judged].all():
            rows = self.judged[~self.material.recording.measured[self.judged]]
        if not len(rows):
            return "GPU times are missing"
        row = int(rows[np.argmax(evidence.untimed_ns[rows])])
        return f"`{self.material.name(row)}` {why_unmeasured(int(recording.flags[row]))}"
