"""
All figures of a recording: stages, requests, losses, clock uncertainty. `--json` writes them, and the tables show them.

Counts and divides; judges nothing. Warm-up calls are counted and left out of all other figures. A call is left out if
it or its request is warm-up. Shares leave out late cold requests too, because one of those can take longer than all
others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._structure.kinds import kinds
from gpuscope.analysis._structure.parts import Requests, counted, work_end_ns
from gpuscope.analysis._structure.replays import outside_ns
from gpuscope.analysis._verdicts.cold import find_cold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._data.plain.gpu_use import GpuUse
    from gpuscope.analysis._plain import PlainDict
    from gpuscope.analysis._structure.kinds import StageInRequest
    from gpuscope.analysis.recording import Losses, Recording

SLOWEST = 5
"""So many requests of each kind are named."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """A set of durations, in milliseconds unless the name of the field says otherwise."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class RequestReference:
    """One request, which can be found in other tools by its trace id."""

    trace_id: str
    start_ns: int
    """Since the epoch."""
    end_to_end_ms: float


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """One stage within one kind of request."""

    name: str
    root: str
    """Name of the outermost stage: the kind of request."""
    parent: str | None
    """Name of the stage around its first call."""
    depth: int
    calls: int
    warmup_calls: int
    only_warmup: bool
    """Whether the figures are of warm-up calls, because there are no others."""
    errors: int
    captured: int
    given_up: int
    clamped: int
    replayed_calls: int
    """How many of the calls were inside replays of CUDA graphs, and so have GPU times only."""
    host_ms: Distribution | None
    gpu_ms: Distribution | None
    """Time on the stream between the stage's two events, which is not the time that the GPU was busy."""
    end_to_end_ms: Distribution | None
    """From the start on the host to the end of all its work, on the host or on a GPU; None inside a graph."""
    launch_to_start_ms: Distribution | None
    host_share: float | None
    """The part of the requests' time, end to end, in which the host was in the stage. Calls at one time count once."""
    gpu_share: float | None
    """The part of the same in which a stream was in the stage."""
    outside_ms: Distribution | None
    """For a stage around replays: its time on the stream that no stage inside covers, including launches and the time
    between replays."""
    outside_share: float | None
    """The same as a part of the requests' time, end to end."""


@dataclass(frozen=True, kw_only=True)
class RequestFigures:
    """The requests of one kind: the calls of one outermost stage."""

    name: str
    calls: int
    warmup_calls: int
    only_warmup: bool
    errors: int
    host_ms: Distribution
    end_to_end_ms: Distribution
    """From the start on the host to the last end of anything in the request, on the host or on a GPU."""
    slowest: tuple[RequestReference, ...]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All figures of a recording. Shares are from 0 to 1."""

    stages: tuple[StageFigures, ...]
    """Each kind of request from its root, in the order of their first starts."""
    requests: tuple[RequestFigures, ...]
    processes: tuple[str, ...]
    start_ns: int
    """Start of the first stage, since the epoch; 0 without stages."""
    seconds: float
    """From the first start to the last end."""
    uncertainty_us: Distribution | None
    """Of the place of GPU times on the wall clock, in microseconds."""
    losses: Losses
    gpus: tuple[GpuUse, ...] = ()
    """What NVML said of each GPU, as each process saw it."""

    def as_dict(self) -> PlainDict:
        """Return plain data, as JSON can hold it."""
        return asdict(self)


def figures(recording: Recording) -> Figures:
    """Return all figures of a recording."""
    counting = _Counting(recording)
    stages = list(kinds(recording))
    start_ns = int(recording.host_start_ns.min(initial=2**63 - 1)) if stages else 0
    end_ns = max(int(column.max(initial=start_ns)) for column in (recording.host_end_ns, recording.gpu_end_ns))
    return Figures(
        stages=tuple(counting.stage(kind) for kind in stages),
        requests=tuple(counting.request(kind) for kind in stages if kind.depth == 0),
        processes=tuple(process.name for process in recording.processes),
        start_ns=start_ns,
        seconds=(end_ns - start_ns) / 1e9,
        uncertainty_us=_distribution(recording.uncertainty_ns[recording.stream >= 0], 1e3),
        losses=recording.losses,
        gpus=tuple(use for _, use in recording.gpus),
    )


class _Counts(TypedDict):
    """The fields that the figures of a stage and of a request share."""

    calls: int
    warmup_calls: int
    only_warmup: bool
    errors: int


class _Counting:
    """What the figures of every stage need of a recording, computed once."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._host_ns = recording.host_end_ns - recording.host_start_ns
        self._gpu_ns = recording.gpu_end_ns - recording.gpu_start_ns
        self._delay_ns = recording.gpu_start_ns - recording.host_start_ns
        self._end_ns = work_end_ns(recording)
        self._end_to_end_ns = self._end_ns - recording.host_start_ns
        self._typical = ~recording.around_warmup & ~find_cold(recording).rows
        self._outside_ns = np.full(len(recording.stage), -1)
        for row, ns in outside_ns(recording).items():
            self._outside_ns[row] = ns
        self._requests: dict[str, Requests] = {}
        """The requests that shares are of, by kind. Those of a kind are known once its root has been counted."""

    def stage(self, kind: StageInRequest) -> StageFigures:
        """Return the figures of one stage. A kind's root has to come before the other stages of the kind."""
        recording = self._recording
        if kind.depth == 0:
            self._requests[kind.name] = self._shared(self._outermost(kind))
        timed = kind.rows[recording.measured[kind.rows]]
        hosted = kind.rows[~recording.in_graph[kind.rows]]
        launched, around = timed[~recording.in_graph[timed]], timed[self._outside_ns[timed] >= 0]
        flags = recording.flags[kind.rows]
        return StageFigures(
            name=kind.name,
            root=kind.root,
            parent=kind.parent,
            depth=kind.depth,
            **self._counts(kind.rows),
            captured=int((flags & RowFlag.CAPTURED != 0).sum()),
            given_up=int((flags & RowFlag.GIVEN_UP != 0).sum()),
            clamped=int((flags & RowFlag.CLAMPED != 0).sum()),
            replayed_calls=len(kind.rows) - len(hosted),
            host_ms=self._of(hosted, self._host_ns),
            gpu_ms=self._of(timed, self._gpu_ns),
            end_to_end_ms=self._of(hosted, self._end_to_end_ns),
            launch_to_start_ms=self._of(launched, self._delay_ns),
            host_share=self._part(kind, hosted, recording.host_start_ns, recording.host_end_ns),
            gpu_share=self._part(kind, timed, recording.gpu_start_ns, recording.gpu_end_ns),
            outside_ms=self._of(around, self._outside_ns),
            outside_share=self._outside_part(kind, around),
        )

    def request(self, kind: StageInRequest) -> RequestFigures:
        """Return the figures of the requests of one kind."""
        rows = self._outermost(kind)
        some = counted(self._recording, rows)
        slowest = some[np.argsort(-self._end_to_end_ns[some], kind="stable")[:SLOWEST]]
        return RequestFigures(
            name=kind.name,
            **self._counts(rows),
            host_ms=_some(self._host_ns[some]),
            end_to_end_ms=_some(self._end_to_end_ns[some]),
            slowest=tuple(self._reference(row) for row in slowest.tolist()),
        )

    def _outermost(self, kind: StageInRequest) -> NDArray[np.int64]:
        """Return the rows of a root stage, without calls inside another call of it."""
        return kind.rows[self._recording.parent[kind.rows] < 0]

    def _shared(self, rows: NDArray[np.int64]) -> Requests:
        typical = rows[self._typical[rows]]
        return Requests(self._recording, typical if len(typical) else counted(self._recording, rows), self._end_ns)

    def _of(self, rows: NDArray[np.int64], durations_ns: NDArray[np.int64]) -> Distribution | None:
        return _distribution(durations_ns[counted(self._recording, rows)])

    def _counts(self, rows: NDArray[np.int64]) -> _Counts:
        ended = rows[~self._recording.not_ended[rows]]
        warmup = self._recording.in_warmup_request[ended]
        return {
            "calls": len(rows),
            "warmup_calls": int(warmup.sum()),
            "only_warmup": bool(len(ended) and warmup.all()),
            "errors": int(self._recording.error[rows].sum()),
        }

    def _part(
        self, kind: StageInRequest, rows: NDArray[np.int64], start_ns: NDArray[np.int64], end_ns: NDArray[np.int64]
    ) -> float | None:
        return self._requests[kind.root].part(rows, start_ns, end_ns) if len(rows) else None

    def _outside_part(self, kind: StageInRequest, around: NDArray[np.int64]) -> float | None:
        requests = self._requests[kind.root]
        if not len(around) or not requests.total_ns:
            return None
        return min(1.0, float(self._outside_ns[requests.inside(around)].sum()) / requests.total_ns)

    def _reference(self, row: int) -> RequestReference:
        recording = self._recording
        start_ns, duration_ns = int(recording.host_start_ns[row]), int(self._end_to_end_ns[row])
        return RequestReference(recording.trace_id[row], start_ns, duration_ns / 1e6)


def _distribution(values_ns: NDArray[np.int64], unit_ns: float = 1e6) -> Distribution | None:
    return _some(values_ns, unit_ns) if len(values_ns) else None


def _some(values_ns: NDArray[np.int64], unit_ns: float = 1e6) -> Distribution:
    values = values_ns / unit_ns
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Distribution(len(values), float(values.mean()), p50, p90, p99, float(values.max()))
