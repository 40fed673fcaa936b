"""
`Snapshot`, the metrics of one moment: all that exporters of metrics see.

Nothing here acts. Imports nothing at run time but `dataclasses` and `typing`, and has no hand-written method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BOUNDS_S = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    *(1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
"""Upper bounds of the buckets, in seconds, inclusive; the last bucket, above them all, has no bound."""


@dataclass(frozen=True, slots=True)
class InstrumentSpec:
    """What a metric is, apart from its figures. Its kind is one of OpenTelemetry's, its unit is written as in UCUM."""

    name: str
    kind: Literal["histogram", "sum", "gauge"]
    unit: str
    description: str
    bounds_s: tuple[float, ...] = BOUNDS_S
    """Of a histogram: upper bounds of the buckets, as `BOUNDS_S` has them."""


DURATION = InstrumentSpec(
    "gpuscope.stage.duration",
    "histogram",
    "s",
    "Duration of stages after their warm-up: on the host, and between a stage's two events on its GPU stream.",
)
LAUNCH_DELAY = InstrumentSpec(
    "gpuscope.stage.launch_delay",
    "histogram",
    "s",
    "Time from a stage's start on the host to its start on the GPU, after its warm-up.",
)
BUSY = InstrumentSpec(
    "gpuscope.gpu.busy_ratio",
    "gauge",
    "1",
    "Part of the moments of the last interval at which a GPU had work, queued or running, when its streams were asked; "
    "with a stage, of the moments in that.",
)
STREAM_BUSY = InstrumentSpec(
    "gpuscope.gpu.stream_busy_ratio",
    "gauge",
    "1",
    "The same of each stream alone. A GPU whose streams take turns is as busy as all of them together.",
)
OCCUPIED = InstrumentSpec(
    "gpuscope.gpu.occupied_ratio",
    "gauge",
    "1",
    "Part of the last interval in which a stage's events were open on the GPU: at least the part in which stages "
    "kept it busy.",
)
IDLE = InstrumentSpec(
    "gpuscope.gpu.idle_ratio", "gauge", "1", "Part of the last interval in which no stage was on the GPU."
)
RECORDED = InstrumentSpec("gpuscope.stages.recorded", "sum", "{stage}", "Stages that have ended, sampled or not.")
EXPORTED = InstrumentSpec("gpuscope.stages.exported", "sum", "{stage}", "Stages whose spans were delivered.")
DROPPED = InstrumentSpec(
    "gpuscope.stages.dropped", "sum", "{stage}", "Stages never to be exported, or refused by a full queue."
)
LOST = InstrumentSpec("gpuscope.stages.lost", "sum", "{stage}", "Stages that should have been exported and were not.")
UNTIMED = InstrumentSpec(
    "gpuscope.stages.untimed", "sum", "{stage}", "Stages without GPU times though a GPU was in use."
)
STALLS = InstrumentSpec(
    "gpuscope.stalls",
    "sum",
    "{stall}",
    "Stages in which nothing began or ended for longer than `GPUSCOPE_STALL` allows.",
)
UNCERTAINTY = InstrumentSpec(
    "gpuscope.clock.uncertainty", "gauge", "s", "Half the bracket of the latest anchor, the largest over the GPUs."
)
EVENT_COST = InstrumentSpec(
    "gpuscope.gpu.event_cost",
    "gauge",
    "s",
    "What a pair of events takes of a busy GPU's time, the largest over the GPUs; taken off where it is known.",
)
COLLECTIONS = InstrumentSpec(
    "gpuscope.gc.duration",
    "histogram",
    "s",
    "Garbage collections of Python's that were of the oldest generation, or longer than 1 ms: every thread waits.",
)

# What NVML says of each GPU. OpenTelemetry has names for three of these: semantic conventions of hardware.
UTILIZATION = InstrumentSpec(
    "hw.gpu.utilization", "gauge", "1", "Part of the last interval in which a kernel of any process ran, by NVML."
)
POWER = InstrumentSpec("hw.power", "gauge", "W", "Mean power of the GPU in the last interval, by NVML.")
CLOCK = InstrumentSpec(
    "gpuscope.gpu.clock", "gauge", "Hz", "Mean clock of the GPU's multiprocessors in the last interval, by NVML."
)
OTHERS = InstrumentSpec(
    "gpuscope.gpu.other_processes", "gauge", "{process}", "Other processes that compute on the GPU, at least."
)
ENERGY = InstrumentSpec("hw.energy", "sum", "J", "Energy of the GPU while it was watched: readings of its power.")
WATCHED = InstrumentSpec("gpuscope.gpu.watched", "sum", "s", "Time in which NVML was asked about the GPU.")
ACTIVE = InstrumentSpec(
    "gpuscope.gpu.active", "sum", "s", "The part of the time watched in which a kernel of any process ran."
)
THROTTLED = InstrumentSpec(
    "gpuscope.gpu.throttled", "sum", "s", "The part of the time watched in which something held the GPU's clocks down."
)
SHARED = InstrumentSpec(
    "gpuscope.gpu.shared",
    "sum",
    "s",
    "The part of the time watched in which the GPU was shared with other processes, or may have been: by what these "
    "did, as far as it is known.",
)
OF_GPUS = (WATCHED, ACTIVE, ENERGY, THROTTLED, SHARED)
"""What is added up, so that reports have it of a whole recording."""

# What deep looks saw that are taken now and then, by stage and kind of request.
LOOK_REQUESTS = InstrumentSpec("gpuscope.look.requests", "sum", "{request}", "Requests with the stage in deep looks.")
LOOK_CALLS = InstrumentSpec("gpuscope.look.calls", "sum", "{call}", "Calls of the stage in deep looks.")
LOOK_TIME = InstrumentSpec(
    "gpuscope.look.time", "sum", "s", "Time from the stage's start to the end of its work, as without the profiler."
)
LOOK_BUSY = InstrumentSpec("gpuscope.look.busy", "sum", "s", "The part of that in which the GPU computed or copied.")
LOOK_KERNELS = InstrumentSpec("gpuscope.look.kernels", "sum", "{kernel}", "Kernels of the stage in deep looks.")
LOOK_SQUARES = InstrumentSpec(
    "gpuscope.look.squares", "sum", "s2", "Sums of squares over requests, for intervals. In files alone."
)
IN_FILES_ALONE = (LOOK_SQUARES,)
OF_LOOKS = (LOOK_REQUESTS, LOOK_CALLS, LOOK_TIME, LOOK_BUSY, LOOK_KERNELS)

# OpenTelemetry's metrics of model servers, with the bounds that it wants.
REQUEST_DURATION = InstrumentSpec(
    "gen_ai.server.request.duration",
    "histogram",
    "s",
    "Duration of generations, until the host and the GPU are done.",
    (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
TIME_TO_FIRST_TOKEN = InstrumentSpec(
    "gen_ai.server.time_to_first_token",
    "histogram",
    "s",
    "Time from the begin of successful generations until their first token was there.",
    (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
TIME_PER_OUTPUT_TOKEN = InstrumentSpec(
    "gen_ai.server.time_per_output_token",
    "histogram",
    "s",
    "Time of successful generations after their first token, per token of a sequence after that.",
    (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
OF_GENERATIONS = (REQUEST_DURATION, TIME_TO_FIRST_TOKEN, TIME_PER_OUTPUT_TOKEN)
# The same by the GPU's clock.
GPU_TIME_TO_FIRST_TOKEN = InstrumentSpec(
    "gpuscope.gpu.time_to_first_token",
    "histogram",
    "s",
    "Time from the begin of successful generations until what makes their first token was done on the GPU.",
    TIME_TO_FIRST_TOKEN.bounds_s,
)
GPU_TIME_PER_OUTPUT_TOKEN = InstrumentSpec(
    "gpuscope.gpu.time_per_output_token",
    "histogram",
    "s",
    "Time from there until the GPU was done with successful generations, per token after the first one.",
    TIME_PER_OUTPUT_TOKEN.bounds_s,
)
OF_GENERATIONS_ON_GPU = (GPU_TIME_TO_FIRST_TOKEN, GPU_TIME_PER_OUTPUT_TOKEN)
SPECS = (
    *(
        DURATION,
        LAUNCH_DELAY,
        BUSY,
        STREAM_BUSY,
        OCCUPIED,
        IDLE,
        RECORDED,
        EXPORTED,
        DROPPED,
        LOST,
        UNTIMED,
        STALLS,
        UNCERTAINTY,
        EVENT_COST,
        COLLECTIONS,
    ),
    *(UTILIZATION, POWER, CLOCK, OTHERS, *OF_GPUS, *OF_LOOKS),
    *(*OF_GENERATIONS, *OF_GENERATIONS_ON_GPU),
)


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One stage that a histogram counts, and its span."""

    seconds: float
    time_ns: int
    """When it ended, since the epoch."""
    trace_id: int
    span_id: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Seconds, counted since recording started."""

    counts: tuple[int, ...]
    """One per bucket, so one more than the metric's `bounds_s`."""
    sum_s: float
    exemplar: Exemplar | None = None
    """The slowest sampled stage since the previous snapshot."""


@dataclass(frozen=True, slots=True)
class DataPoint:
    """One series of a metric."""

    attributes: Mapping[str, str | int]
    value: int | float | Histogram


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The metrics of one moment. Sums and histograms count from `start_ns`. Times are since the epoch."""

    start_ns: int
    time_ns: int
    points: Mapping[InstrumentSpec, Sequence[DataPoint]]
    """Metrics for which there are no figures yet may be missing or empty."""
