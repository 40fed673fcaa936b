"""
The summary: what is known of each stage within each kind of request, as data and as a plain table.

Counts nothing: every figure in the table is one of the summary's.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from gpuscope._collecting.aggregation.tally import RECENT_CALLS
from gpuscope._data.plain.durations import duration
from gpuscope._data.plain.markup import html_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope._collecting.aggregation.sampled import Busy

OTHER = "(other)"
"""Name of the line that stages beyond the limit share."""
WIDTH = 80
"""Columns of a table: names are cut to what the figures leave, because a table that wraps is not a table."""
LEAST_NAME_WIDTH = 16
_MOST_LOOKED = 8
Column = tuple[str, list[str]]
"""Title, and one cell per row."""


class Percentiles(NamedTuple):
    """Percentiles of durations, in milliseconds."""

    p50: float
    p90: float
    p99: float


class Looked(NamedTuple):
    """What the deep looks saw of a stage that are taken now and then (`GPUSCOPE_PROFILE_EVERY`)."""

    busy: float
    """The part of the time from its start to the end of its work in which the GPU computed or copied."""
    kernels: float
    """Per call."""
    calls: int
    requests: int
    """In how many requests."""


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """What is known of one stage within one kind of request. Times are in milliseconds, shares are parts of 1."""

    name: str
    root: str
    """Name of the outermost stage, which is the kind of request."""
    parent: str | None
    """Name of the stage around it, learnt from one call; until then the outermost one. None for that itself."""
    depth: int
    """How many stages are around it; 0 for the outermost stage."""
    calls: int
    """All calls, warm-up included."""
    warmup_calls: int
    """How many of the calls were flagged as warm-up."""
    errors: int
    """How many calls ended with an exception or were given the status `ERROR`."""
    measured_calls: int
    """How many calls the percentiles are taken from."""
    only_warmup: bool
    """Whether those are warm-up calls, because there have been no others."""
    host_ms: Percentiles | None
    """None for a stage that has run only inside replays of CUDA graphs."""
    gpu_ms: Percentiles | None
    """Between the stage's two events on its stream; None without GPU times."""
    launch_to_start_ms: float | None
    """Median time from the start of the stage on the host to its start on the GPU; None without both."""
    host_share: float | None
    """Host time of the stage over that of its requests, at most 1 if calls overlap; None until one has ended."""
    gpu_share: float | None
    """Its time on streams over the host time of its requests, likewise at most 1; None without GPU times."""
    busy: Busy | None = None
    """How often its stream had work when asked (`GPUSCOPE_SAMPLE_HZ`); None where it was not asked."""
    looked: Looked | None = None
    """What deep looks saw of it; None where there were none."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """
    Statistics of all stages so far, in the order in which they run. Print it for a table.

    Percentiles are taken from the last `recent_calls` calls of each stage, without warm-up. Counts and shares cover all
    calls; shares assume that the warm-up calls took as long as the others.
    """

    stages: tuple[StageSummary, ...]
    recent_calls: int = RECENT_CALLS

    def as_dict(self) -> dict[str, Any]:
        """Return plain data: dictionaries, lists, strings and numbers."""
        # `Any`, because JSON has no type that a caller could walk through without casts.
        stages = [asdict(stage) for stage in self.stages]
        for plain in stages:
            for key in ("host_ms", "gpu_ms", "busy", "looked"):
                plain[key] = plain[key]._asdict() if plain[key] is not None else None
        return {"recent_calls": self.recent_calls, "stages": stages}

    def __str__(self) -> str:
        return _render(self)

    def _repr_html_(self) -> str:
        return _html(self)


def _render(summary: Summary) -> str:
    """Return the table, and below it the sentences that keep it from being misread."""
    if not summary.stages:
        return "No stages recorded yet."
    groups = _figures(summary)
    taken = sum(max(len(group) + 2, sum(map(_width, columns))) for group, columns in groups)
    room = max(WIDTH - taken, LEAST_NAME_WIDTH - 2 * any(stage.busy for stage in summary.stages))
    names = [_shortened(name, room) for name in _names(summary)]
    return "\n".join([*_aligned([("", [("stage", names)]), *groups]), "", *_notes(summary)])


def _html(summary: Summary) -> str:
    """Return the same for a notebook."""
    if not summary.stages:
        return html_table(["stage"], [], [str(summary)])
    columns = [(f"{group} {title}".strip(), cells) for group, columns in _figures(summary) for title, cells in columns]
    rows = zip(_names(summary), *(cells for _, cells in columns), strict=True)
    return html_table(["stage", *(title for title, _ in columns)], rows, _notes(summary))


def _figures(summary: Summary) -> list[tuple[str, list[Column]]]:
    """Return the groups of columns: with times on streams fewer percentiles of each side, so that all of them fit."""
    on_gpu = any(stage.gpu_ms for stage in summary.stages)
    host = _percentiles([stage.host_ms for stage in summary.stages], few=on_gpu)
    groups = [("", [("calls", [f"{stage.calls:,}" for stage in summary.stages])]), ("host", host)]
    if on_gpu:
        delays = "starts", [duration(stage.launch_to_start_ms) for stage in summary.stages]
        groups.append(("stream", [*_percentiles([stage.gpu_ms for stage in summary.stages], few=True), delays]))
    if any(stage.busy for stage in summary.stages):
        groups.append(("", [("busy", [_busy(stage.busy) for stage in summary.stages])]))
    groups.append(("", [("%", [_percent(_share(stage)) for stage in summary.stages])]))
    if any(stage.errors for stage in summary.stages):
        groups.append(("", [("errors", [str(stage.errors or "") for stage in summary.stages])]))
    return groups


def _names(summary: Summary) -> list[str]:
    return [
        "  " * min(stage.depth, 12)
        + "".join(letter if letter.isprintable() else "?" for letter in stage.name)
        + (" *" if stage.only_warmup else "")
        for stage in summary.stages
    ]


def _shortened(name: str, room: int) -> str:
    """Return a name with its middle left out if it is too long: long names differ at their ends."""
    end = (room - 1) * 2 // 3
    return name if len(name) <= room else f"{name[: room - 1 - end]}…{name[-end:]}"


def _percentiles(columns: list[Percentiles | None], *, few: bool) -> list[Column]:
    shown = ("p50", "p99") if few else ("p50", "p90", "p99")
    return [(name, [duration(getattr(each, name) if each else None) for each in columns]) for name in shown]


def _share(stage: StageSummary) -> float | None:
    """Return the share on the host; of what runs only inside replays, that on the stream."""
    return stage.gpu_share if stage.host_ms is None else stage.host_share


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _busy(busy: Busy | None) -> str:
    """Return the share with how far off it may be, to either side."""
    if busy is None:
        return "-"
    if busy.low is None or busy.high is None:
        return f"{100 * busy.share:.0f}±?"
    return f"{100 * busy.share:.0f}±{math.ceil(100 * max(busy.share - busy.low, busy.high - busy.share) - 1e-9)}"


def _width(column: Column) -> int:
    title, cells = column
    return max(len(title), *map(len, cells)) + 2


def _aligned(groups: list[tuple[str, list[Column]]]) -> list[str]:
    """Return the lines: titles of groups, titles of columns, a rule, and the rows; names left, numbers right."""
    above, titles, rule = [], [], []
    rows: list[list[str]] = [[] for _ in groups[0][1][0][1]]
    for group, columns in groups:
        widths = [max(len(title), *map(len, cells)) for title, cells in columns]
        widths[0] = max(widths[0], len(group) - sum(widths[1:]) - 2 * (len(widths) - 1))
        across = sum(widths) + 2 * (len(widths) - 1)
        above.append(group.center(across, "-") if group else " " * across)
        for (title, cells), width in zip(columns, widths, strict=True):
            align = str.ljust if title == "stage" else str.rjust
            titles.append(align(title, width))
            rule.append("-" * width)
            for row, cell in zip(rows, cells, strict=True):
                row.append(align(cell, width))
    return ["  ".join(cells).rstrip() for cells in (above, titles, rule, *rows)]


def _notes(summary: Summary) -> list[str]:
    stages = summary.stages
    recent = f"at most the last {summary.recent_calls:,} calls of each stage"
    notes = [f"Percentiles cover {recent},", f"warm-up left out ({_warmups(stages)}). %: of the requests' time."]
    if any(stage.depth and _share(stage) == 1.0 for stage in stages):  # Exactly: it would be more.
        notes.append("%: 100.0 of an inner stage is of calls that overlap or outlast their requests;")
        notes.append("reports count only what is within the request, once.")
    if any(stage.only_warmup for stage in stages):
        notes.append("* has made warm-up calls only, so its figures are of those.")
    if any(stage.gpu_ms for stage in stages):
        notes.append("stream: between the stage's two events on it, waiting for the host included.")
        notes.append("starts: so long after its start on the host, median.")
    if any(stage.busy for stage in stages):
        notes.append("busy: % of the times its stream was asked that it had work; ±: 95 % interval.")
    if any(stage.host_ms is None for stage in stages):
        notes.append("- under host: runs only inside replays of CUDA graphs, which take no host time.")
    if not any(stage.gpu_ms for stage in stages):
        notes.append("No GPU times: all times are the host's.")
    return [*notes, *_looks(stages)]


def _looks(stages: tuple[StageSummary, ...]) -> Iterator[str]:
    """Yield a line per stage that deep looks saw, of the first few."""
    looked = [stage for stage in stages if stage.looked is not None]
    if looked:
        yield "Deep looks now and then: in the time of its call the GPU computed or copied for"
    for stage in looked[:_MOST_LOOKED]:
        each = cast("Looked", stage.looked)
        calls = f"{each.calls:,} call{'s' * (each.calls > 1)}"
        said = f"{100 * each.busy:.0f} %, {each.kernels:,.0f} kernels per call ({calls})"
        yield f"  {_shortened(stage.name, WIDTH - len(said) - 4)}: {said}"
    if len(looked) > _MOST_LOOKED:
        yield f"  and {len(looked) - _MOST_LOOKED} more stages: `summary().stages` has them."


def _warmups(stages: tuple[StageSummary, ...]) -> str:
    most = max(stage.warmup_calls for stage in stages)
    return f"up to {most} call{'s' * (most > 1)} of each" if most else "there was none"
