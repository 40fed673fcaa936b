"""
The report's table of stages, and the notes below it, within 80 columns.

Lays out figures; computes none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.plain.durations import duration
from gpuscope.commands import _console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from gpuscope.analysis.figures import Distribution, Figures, StageFigures

OUTSIDE = "in the graph, outside any stage"


def stage_table(figures: Figures) -> Table:
    """Return the table: with GPU times fewer percentiles of each side, so that it fits."""
    on_gpu = any(stage.gpu_ms for stage in figures.stages)
    errors = any(stage.errors for stage in figures.stages)
    host, stream = ["host\np50", "\np99"], ["stream\np50", "\np99", "\nstarts"]
    columns = ["calls", *([*host, *stream] if on_gpu else ["host\np50", "\np90", "\np99", "\nmax"]), "%"]
    table = _console.make_table("stage", *columns, *["errors"] * errors)
    for stage in figures.stages:
        cells = [f"{stage.calls:,}", *_sides(stage, on_gpu=on_gpu), _console.percent(_share(stage))]
        cells += [str(stage.errors or "")] * errors
        table.add_row(_console.indented(stage.name, stage.depth, " *" if stage.only_warmup else ""), *cells)
        if stage.outside_ms is not None:
            cells = ["", "-", "-", *_p50_p99(stage.outside_ms), "-", _console.percent(stage.outside_share)]
            table.add_row(_console.indented(OUTSIDE, stage.depth + 1), *cells)
    return table


def _share(stage: StageFigures) -> float | None:
    return stage.gpu_share if stage.host_share is None else stage.host_share


def _sides(stage: StageFigures, *, on_gpu: bool) -> tuple[str, ...]:
    host, delay = stage.host_ms, stage.launch_to_start_ms
    if on_gpu:
        return *_p50_p99(host), *_p50_p99(stage.gpu_ms), duration(delay.p50 if delay else None)
    return tuple(map(duration, (host.p50, host.p90, host.p99, host.max))) if host else ("-", "-", "-", "-")


def _p50_p99(of: Distribution | None) -> tuple[str, str]:
    return (duration(of.p50), duration(of.p99)) if of else ("-", "-")


def notes(figures: Figures) -> Iterator[str]:
    """Yield what one needs to know to read the table rightly."""
    yield "Medians (p50) and other percentiles are without warm-up calls. %: of the requests' time, end to end."
    if any(stage.replayed_calls for stage in figures.stages):
        yield "Stages in a CUDA graph have no host time; what replays do outside any stage has a line of its own."
    if any(stage.only_warmup for stage in figures.stages):
        yield "* made only warm-up calls, so its figures are of those."
    placed = figures.uncertainty_us
    if placed is not None:
        yield "stream: between a stage's two events on its CUDA stream, waiting for the host included."
        within = f"{duration(placed.p50 / 1e3)} (median; at most {duration(placed.max / 1e3)})"
        yield f"starts: so long after its start on the host, median. GPU times are placed within {within}."
    missing = _console.losses(figures.losses)
    yield f"Missing: {'; '.join(missing)}." if missing else "Nothing is known to be missing."
