"""
Why one request took as long as it did: a part for each nanosecond of it, those of the batches that worked for it too.

At each instant the first of these that holds says what it was: a copy or a compilation in a batch of its, the batch
on the GPU (which is divided by share), the batch's work waiting for the GPU, the batch on the host, a stage of its
own, its own work on the GPU, waiting for a batch, before and after that. What the host spent on garbage collection is
taken out of where it happened. The rest is `unexplained`, so that the parts add up to the request.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.batch import NO_WORK_NS, NO_WORK_TRIMMED_NS, RowFlag
from gpuscope.analysis._busy.known import BEHIND_NS
from gpuscope.analysis._structure.intervals import Intervals, intersection
from gpuscope.analysis._structure.parts import counted, some_of
from gpuscope.analysis._verdicts.evidence import Activity, gather
from gpuscope.analysis.latency._crossing import Crossings
from gpuscope.analysis.latency._host import HostTime
from gpuscope.analysis.latency._sweep import Claim, given_out
from gpuscope.analysis.latency._worked import Work
from gpuscope.analysis.latency.choice import preferred
from gpuscope.analysis.latency.parts import (
    AFTER,
    BATCH,
    BEFORE,
    COMPILE,
    COPIES,
    GPU,
    HOST,
    OTHERS,
    OWN,
    PARTS,
    QUEUE,
    UNEXPLAINED,
    InBatch,
    Latency,
    OfKind,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope.analysis.latency._worked import Run, Worked
    from gpuscope.analysis.recording import Recording

MOST = 200
"""Requests of a kind that a mean is of."""
FEW_ANSWERS = 10
_LAST = 9.0

Said = tuple[object, ...]
"""A part, and what it is about: the name of a stage, or the place of a batch."""


class Explainer:
    """
    Explains requests of a recording.

    Args:
        recording: any recording.

    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._evidence = gather(recording)
        self._work = Work(recording)
        self._host, self._crossings = HostTime(recording), Crossings(recording)
        self._by_root = np.argsort(recording.root, kind="stable")
        self._bounds = np.searchsorted(recording.root[self._by_root], np.arange(len(recording.stage) + 1))
        owners = recording.root[self._evidence.segments.owner]
        self._segments = np.argsort(owners, kind="stable")
        self._segment_bounds = np.searchsorted(owners[self._segments], np.arange(len(recording.stage) + 1))
        inside = np.zeros(len(recording.stage), np.bool_)
        inside[recording.parent[(recording.parent >= 0) & recording.measured]] = True
        # Two events with nothing between: the stage launched nothing, however late the stream came to them.
        limit_ns = np.where(recording.flags & RowFlag.TRIMMED, NO_WORK_TRIMMED_NS, NO_WORK_NS)
        worked = recording.gpu_end_ns - recording.gpu_start_ns > limit_ns
        self._gpu_leaf = recording.measured & ~inside & worked

    def requests(self) -> NDArray[np.int64]:
        """Return the rows of requests: outermost stages that are not batches, or all outermost ones if all are."""
        roots = np.flatnonzero(self.recording.parent < 0)
        real = roots[~np.isin(roots, list(self._work.batch_rows))]
        return real if len(real) else roots

    def duration_ns(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how long requests took, until host and GPU were done."""
        taken: NDArray[np.int64] = self._evidence.end_ns[rows] - self.recording.host_start_ns[rows]
        return taken

    def of_trace(self, text: str) -> list[int]:
        """Return the requests whose trace id begins with a text, the longest first."""
        recording, wanted = self.recording, text.lower()
        rows = [row for row in self.requests().tolist() if recording.trace_id[row].startswith(wanted)]
        return sorted(rows, key=lambda row: -int(self.duration_ns(np.array([row]))[0]))

    def of_kind(self, name: str | None) -> NDArray[np.int64]:
        """Return the rows of requests whose outermost stage has this name; of all, for None."""
        recording, rows = self.recording, self.requests()
        if name is None:
            return rows
        return np.array([row for row in rows.tolist() if recording.names[recording.stage[row]] == name], np.int64)

    def at(self, percentile: float, name: str | None = None) -> int | None:
        """Return the request at a percentile of the durations of those that are judged; 100 is the slowest."""
        rows = self.of_kind(name)
        if not len(rows):
            return None
        rows = preferred(self.recording, rows)
        order = rows[np.argsort(self.duration_ns(rows), kind="stable")]
        return int(order[int(np.ceil(percentile / 100 * len(order))) - 1])

    def by_kind(self) -> list[OfKind]:
        """Return the means of each kind of request, kinds in the order of their first one."""
        recording, rows = self.recording, self.requests()
        found = []
        for stage in dict.fromkeys(recording.stage[rows].tolist()):
            some = some_of(counted(recording, rows[recording.stage[rows] == stage]), MOST)
            all_parts = [self.explain(row) for row in some.tolist()]
            parts = {part: sum(each.parts[part] for each in all_parts) / 1e6 / len(some) for part in PARTS}
            whole_ms = sum(each.whole_ns for each in all_parts) / 1e6 / len(some)
            found.append(OfKind(recording.names[stage], len(some), whole_ms, parts))
        return found

    def explain(self, row: int) -> Latency:
        """
        Return where the time of a request went.

        Args:
            row: of its outermost stage.

        """
        recording = self.recording
        start_ns, end_ns = int(recording.host_start_ns[row]), int(self._evidence.end_ns[row])
        members = self._work.members_in(row)
        by_member = {member: self._work.for_member(member) for member in members}
        worked = [each for some in by_member.values() for each in some]
        claims = [*self._of_batches(worked), *self._of_stages(row, members)]
        claims += [claim for member, some in by_member.items() for claim in self._around(member, some)]
        claims += self._host.pauses(row, start_ns, end_ns, _LAST)
        claims += () if members else self._crossings.claims(row)
        raw = given_out(start_ns, end_ns, claims, (UNEXPLAINED,))
        parts, stages, unclear = Counter[str](), Counter[str](), Counter[str]()
        for said, ns in raw.items():
            for part, name, some_ns in self._divided(said, ns, worked):  # type: ignore[arg-type]  # As claimed here.
                parts[part] += some_ns
                if part == HOST:
                    stages[name] += some_ns
                elif part == UNEXPLAINED and name:
                    unclear[name] += some_ns
        return Latency(
            row,
            recording.names[recording.stage[row]],
            recording.trace_id[row],
            start_ns,
            end_ns - start_ns,
            {part: parts[part] for part in PARTS},
            dict(stages.most_common()),
            dict(unclear.most_common()),
            tuple(
                InBatch(each.name, each.size, len(each.runs), each.gpu_ns / 1e6, each.share_ns / 1e6) for each in worked
            ),
        )

    def _divided(self, said: Said, ns: int, worked: list[Worked]) -> Iterator[tuple[str, str, int]]:
        """Yield (part, stage, nanoseconds) of what was given out: batches by share, stages by their answers."""
        part, *about = said
        if part == OTHERS:  # A batch on the GPU.
            each = worked[about[0]]  # type: ignore[call-overload]  # Its place.
            own_ns = min(ns, ns * each.share_ns // each.gpu_ns) if each.gpu_ns else 0
            yield OWN, "", own_ns
            yield (OTHERS if each.is_whole else UNEXPLAINED), "", ns - own_ns
        elif part == OWN and about:  # A stage in which streams were asked.
            row = int(about[0])  # type: ignore[call-overload]  # The row.
            own_ns = ns * int(self.recording.had_work[row]) // int(self.recording.samples[row])
            yield OWN, "", own_ns
            yield HOST, self.recording.names[self.recording.stage[row]], ns - own_ns
        else:
            yield str(part), str(about[0]) if about else "", ns

    def _of_batches(self, worked: list[Worked]) -> Iterator[Claim]:
        for place, each in enumerate(worked):
            last_ns = each.waits_from_ns
            for run in each.runs:
                behind = run.gpu_end_ns and run.gpu_start_ns - run.start_ns > BEHIND_NS
                yield from self._of_batch_host(run)
                if run.gpu_end_ns:
                    yield Claim(run.gpu_start_ns, run.gpu_end_ns, (2,), (OTHERS, place))
                if behind:
                    yield Claim(run.start_ns, run.gpu_start_ns, (3,), (GPU,))
                yield Claim(run.start_ns, run.end_ns, (4,), (HOST, each.name))
                yield from self._host.pauses(run.row, run.start_ns, run.end_ns, 4)
                if last_ns < run.start_ns:
                    yield Claim(last_ns, run.start_ns, (8.5,), (BATCH,))
                    wait = Intervals(np.array([last_ns]), np.array([run.start_ns]))
                    busy = intersection(wait, self._work.others(run))
                    for start_ns, end_ns in zip(busy.start.tolist(), busy.end.tolist(), strict=True):
                        yield Claim(start_ns, end_ns, (8,), (QUEUE,))
                last_ns = max(last_ns, run.end_ns, run.gpu_end_ns)

    def _of_batch_host(self, run: Run) -> Iterator[Claim]:
        """Yield what the host did in a batch while the GPU waited for it, though it is between the batch's events."""
        for start_ns, end_ns in self._work.copies(run.row):
            yield Claim(start_ns, end_ns, (1,), (COPIES,))
        if run.row < 0:
            return
        recording, segments = self.recording, self._evidence.segments
        for segment in self._segments_of(int(recording.root[run.row])):
            start_ns, end_ns = int(segments.host_start_ns[segment]), int(segments.host_end_ns[segment])
            start_ns, end_ns = max(start_ns, run.start_ns), min(end_ns, run.end_ns)
            if start_ns >= end_ns:
                continue
            if self._host.is_compile(int(segments.owner[segment])):
                yield Claim(start_ns, end_ns, (1.5,), (COMPILE,))
            if self._evidence.kind[segment] == Activity.PACED:
                yield from self._host.pauses(run.row, start_ns, end_ns, 1.5)

    def _around(self, member: int, worked: list[Worked]) -> Iterator[Claim]:
        """Yield when the stage that waited for batches had no token yet, and when the last of them had ended."""
        recording = self.recording
        tokens = [each.token_ns for each in worked if each.token_ns is not None]
        if len(tokens) == len(worked):
            yield Claim(int(recording.host_start_ns[member]), min(tokens), (_LAST,), (BEFORE,))
        if all(each.is_whole for each in worked):
            last_ns = max(max(run.end_ns, run.gpu_end_ns) for each in worked for run in each.runs)
            yield Claim(last_ns, int(recording.host_end_ns[member]), (_LAST,), (AFTER,))

    def _segments_of(self, root: int) -> list[int]:
        found: list[int] = self._segments[self._segment_bounds[root] : self._segment_bounds[root + 1]].tolist()
        return found

    def _of_stages(self, root: int, members: list[int]) -> Iterator[Claim]:
        """Yield what the request's own stages say. A stage that waits for a batch says nothing by itself."""
        recording, waiting = self.recording, set(members)
        for member in members:
            around = int(recording.parent[member])
            while around >= 0:
                waiting.add(around)
                around = int(recording.parent[around])
        rows = self._by_root[self._bounds[root] : self._bounds[root + 1]].tolist()
        if len(rows) > 1:
            waiting.add(root)
        for row in rows:
            if row not in waiting and self._gpu_leaf[row]:
                launched_ns, from_ns = int(recording.host_start_ns[row]), int(recording.gpu_start_ns[row])
                yield Claim(from_ns, int(recording.gpu_end_ns[row]), (6,), (OWN,))
                if from_ns - launched_ns > BEHIND_NS:
                    yield Claim(launched_ns, from_ns, (6.5,), (GPU,))
        if self._evidence.tangled[root]:
            yield from self._of_rows(rows, waiting)
        else:
            yield from self._of_segments(root, waiting, has_batches=bool(members))

    def _of_segments(self, root: int, waiting: set[int], *, has_batches: bool) -> Iterator[Claim]:
        recording, segments = self.recording, self._evidence.segments
        for segment in self._segments_of(root):
            owner = int(segments.owner[segment])
            if owner in waiting:
                continue
            kind, name = self._evidence.kind[segment], recording.names[recording.stage[owner]]
            rank: float = 5
            said: Said = self._host.said(owner)
            if self._host.is_compile(owner):  # Whatever events leave open, the host had something to do.
                rank = 7 if kind == Activity.AHEAD else 5
            elif kind == Activity.COPIES:
                said = (COPIES,)
            elif kind == Activity.UNCLEAR and not has_batches:  # Otherwise its GPU work is known to be elsewhere.
                said = (OWN, owner) if recording.samples[owner] >= FEW_ANSWERS else (UNEXPLAINED, name)
            elif kind == Activity.WAITS:
                rank, said = 7, (GPU,)
            elif kind in (Activity.AHEAD, Activity.LAGS):
                rank = 7
            span = int(segments.host_start_ns[segment]), int(segments.host_end_ns[segment])
            yield Claim(*span, (rank,), said)
            if kind != Activity.WAITS:
                yield from self._host.pauses(owner, *span, rank)

    def _of_rows(self, rows: list[int], waiting: set[int]) -> Iterator[Claim]:
        """Yield the stages of a request that run at the same time: the innermost first."""
        recording = self.recording
        depth: dict[int, int] = {}
        for row in rows:  # Outer stages come first, but for damaged files.
            depth[row] = depth.get(int(recording.parent[row]), 0) + 1
            if row not in waiting and not recording.in_graph[row]:
                said = (COPIES,) if "bytes" in recording.attributes.get(row, ()) else self._host.said(row)
                span = int(recording.host_start_ns[row]), int(recording.host_end_ns[row])
                yield Claim(*span, (7, -depth[row]), said)
                yield from self._host.pauses(row, *span, 7)
