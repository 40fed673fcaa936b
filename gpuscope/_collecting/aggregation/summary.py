"""
The summary: what is known of each stage within each kind of request, as data and as a plain table.

Counts nothing: every figure in the table is one of the summary's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from gpuscope._collecting.aggregation.tally import RECENT_CALLS

OTHER = "(other)"
"""Name of the line that stages beyond the limit share."""
WIDE_MS = 100.0
"""Durations from here on are shown with one decimal place instead of three."""
NAME_WIDTH = 48
"""Longer names are cut: a table that wraps is not a table."""
Column = tuple[str, list[str]]
"""Title, and one cell per row."""


class Percentiles(NamedTuple):
    """Percentiles of durations, in milliseconds."""

    p50: float
    p90: float
    p99: float


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
    """Host time of the stage over the host time of its requests; None until one of them has ended."""
    gpu_share: float | None
    """GPU time of the stage over the host time of its requests; None without GPU times."""


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
            for key in ("host_ms", "gpu_ms"):
                plain[key] = plain[key]._asdict() if plain[key] is not None else None
        return {"recent_calls": self.recent_calls, "stages": stages}

    def __str__(self) -> str:
        return _render(self)


def _render(summary: Summary) -> str:
    """Return the table, and below it the sentences that keep it from being misread."""
    if not summary.stages:
        return "No stages recorded yet."
    groups = [("", _names(summary)), ("", [_counts(summary)]), ("host ms", _host(summary))]
    if any(stage.gpu_ms for stage in summary.stages):
        groups += [("GPU ms", _gpu(summary)), ("", [_delays(summary)])]
    groups.append(("% of request", _shares(summary)))
    if any(stage.errors for stage in summary.stages):
        groups.append(("", [("errors", [str(stage.errors or "") for stage in summary.stages])]))
    return "\n".join([*_aligned(groups), "", *_notes(summary)])


def _names(summary: Summary) -> list[Column]:
    names = []
    for stage in summary.stages:
        name = "".join(letter if letter.isprintable() else "?" for letter in stage.name)
        name = "  " * min(stage.depth, 12) + name + (" *" if stage.only_warmup else "")
        names.append(name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…")
    return [("stage", names)]


def _counts(summary: Summary) -> Column:
    return "calls", [f"{stage.calls:,}" for stage in summary.stages]


def _host(summary: Summary) -> list[Column]:
    return _percentiles([stage.host_ms for stage in summary.stages])


def _gpu(summary: Summary) -> list[Column]:
    return _percentiles([stage.gpu_ms for stage in summary.stages])


def _percentiles(columns: list[Percentiles | None]) -> list[Column]:
    return [
        ("p50", [_ms(each.p50 if each else None) for each in columns]),
        ("p90", [_ms(each.p90 if each else None) for each in columns]),
        ("p99", [_ms(each.p99 if each else None) for each in columns]),
    ]


def _delays(summary: Summary) -> Column:
    return "start +ms", [_ms(stage.launch_to_start_ms) for stage in summary.stages]


def _shares(summary: Summary) -> list[Column]:
    columns = [("host", [_percent(stage.host_share) for stage in summary.stages])]
    if any(stage.gpu_share is not None for stage in summary.stages):
        columns.append(("GPU", [_percent(stage.gpu_share) for stage in summary.stages]))
    return columns


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.3f}" if abs(value) < WIDE_MS else f"{value:,.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


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
    notes = [f"Percentiles cover {recent}, warm-up left out ({_warmups(stages)})."]
    if any(stage.only_warmup for stage in stages):
        notes.append("* has made warm-up calls only, so its figures are of those.")
    if any(stage.gpu_ms for stage in stages):
        notes.append("start +ms: from the start on the host to the start on the GPU, median.")
    if any(stage.host_ms is None for stage in stages):
        notes.append("- under host ms: runs only inside replays of CUDA graphs, which take no host time.")
    if not any(stage.gpu_ms for stage in stages):
        notes.append("No GPU times: these are host times only.")
    return notes


def _warmups(stages: tuple[StageSummary, ...]) -> str:
    most = max(stage.warmup_calls for stage in stages)
    return f"the first {most} of each" if most else "there was none"
