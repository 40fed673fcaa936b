"""
The account of stages: `Statistics` of one moment, as `gpuscope.statistics()` returns it, and `Delivery` of one batch.

Data, and counts for one batch; what the counts come to is the ledger's.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpuscope._data.plain.gpu_use import in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuscope._data.plain.gpu_use import GpuUse


NOT_KEPT, KEEP_FULL, KEEP_NO_END = "not_kept", "keep_full", "keep_no_end"
"""Reasons for which `GPUSCOPE_KEEP` has stages dropped: by a decision, or undecided, because too many waited or the end
of their request did not come."""
ROOM = ("queue_full", "queue_bytes", KEEP_FULL, KEEP_NO_END)
"""Reasons for which stages are dropped because there is no room for them: for one more, for what it was told, or for
those of which it is not known yet whether `GPUSCOPE_KEEP` keeps them."""

MEANINGS = {
    "after_shutdown": "they ended after recording had",
    "buffer_full": "the endpoint took them too slowly",
    "disk": "the file could not be written",
    KEEP_FULL: "too many waited for the end of their requests, which `keep` needs; raise its `rows` if requests end",
    KEEP_NO_END: "the outermost stage of their requests did not come for ten minutes, which `keep` needs",
    "no_exporter": "there was nowhere to send them",
    "no_provider": "the program has set no TracerProvider, which `sdk` needs",
    "no_span": "the program's TracerProvider made no span of them",
    NOT_KEPT: "left out by `keep`",
    "not_recording": "the program's sampler left them out late",
    "provider_shutdown": "the program's TracerProvider had ended",
    "queue_bytes": "their attributes found no room",
    "queue_full": "they came faster than they could be collected",
    "shutdown": "the time at the end ran out",
    "unsampled": "left out by the sampler",
    "unreachable": "nobody answered at the endpoint",
}
"""Reasons for which stages are missing, in words."""
_CRYPTIC = ("no_provider", "no_span", "not_recording")


def explained(counts: Mapping[str, int]) -> str:
    """Return counts by reason as they stand in a sentence, each with what it means."""
    said = (f"{count:,} {reason}" + _in_words(reason) for reason, count in sorted(counts.items()))
    return ", ".join(said)


def _in_words(reason: str) -> str:
    return f" ({MEANINGS[reason]})" if reason in MEANINGS else ""


@dataclass(frozen=True, slots=True)
class LookedStage:
    """
    What the deep looks that are taken now and then saw of one stage, added up over requests.

    A time is from the stage's start on the host to the end of all its work, as without the profiler.
    """

    root: str
    """Name of the outermost stage: the kind of request."""
    stage: str
    requests: int
    calls: int
    time_s: float
    busy_s: float
    """The part of that in which the GPU computed or copied."""
    kernels: float
    time2_s2: float
    """This and the next two are sums over requests: of the squares of both, and of their products."""
    busy2_s2: float
    both_s2: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """
    What became of every stage since recording started: recorded = exported + dropped + lost + pending.

    Counts are of stages; dictionaries count them by reason.
    """

    recorded: int
    exported: int
    pending: int
    dropped: dict[str, int]
    """Never meant to be exported (not sampled, for example), or refused because the queue was full."""
    lost: dict[str, int]
    """Should have been exported and will not be."""
    untimed: dict[str, int]
    """Went out without GPU times although a GPU is in use. They are counted above as well."""
    clock_uncertainty_ns: int | None
    """How far off GPU times may be, plus or minus: half the bracket of the latest anchor, the largest over the GPUs.
    None before the first anchor."""
    exporters: tuple[str, ...]
    route: str = ""
    """Which way spans go, and why, where the application has a TracerProvider; for people."""
    graph_stages: dict[str, int] = field(default_factory=dict)
    """Stages in captures of CUDA graphs: `timed` for those that each replay times, or the reason why it does not."""
    elided: dict[str, int] = field(default_factory=dict)
    """Stages that `torch.compile` left out of what it compiled: how often it traced each, by file, line and function,
    in the whole process. Not part of `recorded`: nothing of them runs."""
    shared_spans: dict[str, int] = field(default_factory=dict)
    """Light spans of batches in the traces of their members, by what became of them: `exported`, `pending`, or why they
    are lost. They are not stages, and so not part of `recorded`."""
    batch_faults: dict[str, int] = field(default_factory=dict)
    """What was wrong with the members and weights of batches, by reason. The batches are counted above as any stage."""
    stalls: dict[str, int] = field(default_factory=dict)
    """Stages in which nothing began or ended for longer than `GPUSCOPE_STALL` allows, by kind."""

    samples: dict[str, int] = field(default_factory=dict)
    """How often streams were asked for work (`asked`), how often they had any, and what came of the answers: given to
    stages, between stages, lost, dropped for want of room, or waiting for stages to end. Then, where there were any:
    refusals of the driver (`errors`), moments left out for captures or because the driver was late, and streams for
    which there was no room (`unwatched`)."""
    event_cost_ns: int | None = None
    """What a pair of events takes of a busy GPU's time, the largest over the GPUs. It was taken off
    stages that the host had left before the GPU came to them. None where it is not known: nothing was taken off."""
    sampler: str = ""
    """How often streams are asked, or why they are not; empty where nobody wants them to be."""
    gpus: tuple[GpuUse, ...] = ()
    """What NVML said of each GPU that stages were on."""
    nvml: str = ""
    """How often NVML is asked, or why it is not; empty where nobody wants that, and before the first stage on a GPU."""

    looks: tuple[LookedStage, ...] = ()
    """What deep looks saw, where `GPUSCOPE_PROFILE_EVERY` has some taken."""
    look_counts: dict[str, int] = field(default_factory=dict)
    """Of these looks, by what became of them: `done`, or why there was nothing to keep."""

    kept: dict[str, int] = field(default_factory=dict)
    """Traces by the first rule of `GPUSCOPE_KEEP` that kept them, `cut_off` for those that had not ended at the end.
    Requests that were left out: `left_out` by the rules, `no_room` because too many stages waited, `no_end`
    because the outermost stage did not come."""

    @property
    def missing(self) -> dict[str, int]:
        """What should have been exported and was not, by reason: the lost, and those that found no room."""
        full = {reason: count for reason, count in self.dropped.items() if reason in ROOM and count}
        return {**self.lost, **full}

    def as_dict(self) -> dict[str, object]:
        """Return the same as plain data."""
        return asdict(self)

    def _repr_html_(self) -> str:
        from gpuscope._data.plain.markup import html_table  # Here, because hardly any program draws one.

        counts = [
            ["recorded", f"{self.recorded:,}"],
            ["exported", f"{self.exported:,}"],
            ["pending", f"{self.pending:,}"],
        ]
        for name in ("dropped", "lost", "untimed", "graph_stages", "shared_spans", "batch_faults", "stalls"):
            reasons: Mapping[str, int] = getattr(self, name)
            counts += [
                [f"{name.replace('_', ' ')}: {reason}", f"{count:,}"] for reason, count in sorted(reasons.items())
            ]
        counts += [
            [f"answers of streams: {name.replace('_', ' ')}", f"{count:,}"] for name, count in self.samples.items()
        ]
        return html_table(["stages", ""], counts, [f"spans go {self.route}"] if self.route else ())

    def __str__(self) -> str:
        """Say it in one line."""
        return ", ".join([*self._of_stages(), *self._of_gpus()])

    def _of_stages(self) -> list[str]:
        parts = [f"recorded {self.recorded}", f"exported {self.exported}", f"pending {self.pending}"]
        for name in ("dropped", "lost", "untimed"):
            counts = getattr(self, name)
            reasons = ", ".join(
                f"{reason} {count}{_in_words(reason) if reason in _CRYPTIC else ''}"
                for reason, count in sorted(counts.items())
            )
            parts.append(f"{name} {sum(counts.values())}" + (f" ({reasons})" if reasons else ""))
        if self.graph_stages:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.graph_stages.items()))
            parts.append(f"in graphs {counts}")
        for name in ("shared_spans", "batch_faults", "stalls", "look_counts", "kept"):
            if counts := getattr(self, name):
                reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
                parts.append(f"{name.replace('_', ' ')} {reasons}")
        if self.elided:
            parts.append(f"compiled away at {len(self.elided)} places")
        return parts

    def _of_gpus(self) -> list[str]:
        parts = []
        if self.sampler:
            counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.samples.items())
            parts.append(f"streams asked for work {self.sampler}" + (f" ({counts})" if counts else ""))
        if self.nvml:
            parts.append(f"NVML asked {self.nvml}" + "".join(f" ({in_words(each)})" for each in self.gpus))
        if self.clock_uncertainty_ns is not None:
            parts.append(f"GPU clock within {self.clock_uncertainty_ns / 1e3:.1f} µs")
        if self.event_cost_ns is not None:
            parts.append(f"events take {self.event_cost_ns / 1e3:.1f} µs per pair")
        if self.route:
            parts.append(f"spans go {self.route}")
        return parts


class Observed(NamedTuple):
    """What was learnt of GPUs: fields of `Statistics`."""

    clock_uncertainty_ns: int | None
    samples: dict[str, int]
    sampler: str
    gpus: tuple[GpuUse, ...]
    nvml: str
    event_cost_ns: int | None
    kept: Mapping[str, int] = {}


NOTHING_OBSERVED = Observed(None, {}, "", (), "", None)


class Delivery:
    """
    One batch on its way through its exporters. Each of them calls `settle` exactly once, from any thread.

    A stage counts as exported when at least one exporter delivered it.

    Args:
        settle: called once, after the last exporter has settled: with the number of stages, how many of them were
            exported, and what the exporters said of the others, by reason.
        stages: the number of stages in the batch.
        exporters: the number of exporters that the batch goes to.

    """

    __slots__ = ("_best", "_lock", "_outstanding", "_reasons", "_settle", "stages")

    def __init__(self, settle: Callable[[int, int, Counter[str]], None], stages: int, exporters: int) -> None:
        self.stages = stages
        self._settle = settle
        self._lock = threading.Lock()
        self._outstanding = exporters
        self._best = 0
        self._reasons: Counter[str] = Counter()

    def settle(self, exported: int, lost: Mapping[str, int] | None = None) -> None:
        """Report how many stages of the batch one exporter delivered, and how many it lost, by reason."""
        with self._lock:
            if not self._outstanding:
                return
            self._outstanding -= 1
            self._best = max(self._best, exported)
            self._reasons.update(lost or {})
            if self._outstanding:
                return
        self._settle(self.stages, min(self._best, self.stages), self._reasons)
