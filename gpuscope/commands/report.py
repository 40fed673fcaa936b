"""
`gpuscope report`: shows where the time goes in a recording, with a table, verdicts, and files for viewers and scripts.

Prints and writes; every figure and judgement comes from `gpuscope.analysis`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope.commands import _console

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from rich.table import Table

    from gpuscope.analysis._verdicts.findings import Findings
    from gpuscope.analysis.figures import Distribution, Figures, RequestFigures
    from gpuscope.analysis.recording import Recording

HELP = "Show where the time goes in files of the `file` exporter: a table, verdicts, a timeline, traces for viewers."
EPILOG = "Exit codes: 0 done; 2 bad usage, nothing to read, or a file that cannot be written."
OUTPUTS = ("html", "perfetto", "jaeger", "json")
OUTSIDE = "in the graph, outside any stage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = EPILOG
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a recording (its rotated files are read too), a folder of recordings, or - for standard input",
    )
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="write a timeline: one HTML file that needs no network"
    )
    parser.add_argument("--perfetto", type=Path, metavar="OUT", help="write a Chrome trace for https://ui.perfetto.dev")
    parser.add_argument("--jaeger", type=Path, metavar="OUT", help="write a file to upload in the Jaeger UI")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write all figures and verdicts as JSON, for scripts; - for standard output, in place of the report",
    )


def run(options: argparse.Namespace) -> int:
    """Print the report and write what was asked for."""
    console = _console.open_console()
    recording = _console.read_recording(options.files)
    asked_for = {name: path for name in OUTPUTS if (path := getattr(options, name)) is not None}
    outputs = {name: _console.output_of(path) for name, path in asked_for.items()}
    _console.refuse_to_overwrite(options.files, outputs.values())
    figures, findings = _analyse(recording)
    # Files come first, in case whoever reads the output goes away.
    for name, path in outputs.items():
        with _console.writing(path):
            _write(name, path, recording, figures, findings)
    if any(map(_console.is_standard_output, outputs.values())):
        return 0  # For another program, which would not know what to make of a table.
    print(_headline(recording, figures))
    console.print(_table(figures))
    print("\n".join(_notes(figures)), end="\n\n")
    print("\n".join(map(_console.printable, str(findings).split("\n"))), end="\n\n")
    for name, path in outputs.items():
        print(f"{name}: {path}")
    return 0


def _analyse(recording: Recording) -> tuple[Figures, Findings]:
    from gpuscope.analysis.figures import figures
    from gpuscope.analysis.verdict import judge

    try:
        return figures(recording), judge(recording)
    except ModuleNotFoundError as error:
        raise _console.missing(error) from error


def _write(name: str, path: Path, recording: Recording, figures: Figures, findings: Findings) -> None:
    if name == "html":
        from gpuscope.analysis.timeline import write_html

        write_html(recording, path, findings, figures=figures)
    elif name == "perfetto":
        from gpuscope.analysis.perfetto import write_perfetto

        write_perfetto(recording, path)
    elif name == "jaeger":
        from gpuscope.analysis.jaeger import write_jaeger

        write_jaeger(recording, path)
    else:
        path.write_text(json.dumps({**figures.as_dict(), "findings": findings.as_dict()}, indent=1) + "\n")


def _headline(recording: Recording, figures: Figures) -> str:
    requests = sum(request.calls for request in figures.requests)
    return (
        f"{len(recording.stage):,} stages in {requests:,} requests of "
        f"{_console.count(len(figures.processes), 'process')} within {figures.seconds:,.1f} s"
    )


def _table(figures: Figures) -> Table:
    on_gpu = any(stage.gpu_ms for stage in figures.stages)
    errors = any(stage.errors for stage in figures.stages)
    columns = ["calls", "host p50", "p90", "p99"]
    columns += ["GPU p50", "p90", "p99", "start +ms", "% host", "% GPU"] if on_gpu else ["% host"]
    table = _console.make_table("stage", *columns, *["errors"] * errors)
    for stage in figures.stages:
        cells = [f"{stage.calls:,}", *_percentiles(stage.host_ms)]
        if on_gpu:
            delay = stage.launch_to_start_ms
            cells += [*_percentiles(stage.gpu_ms), _console.ms(delay.p50 if delay else None)]
        cells += [_console.percent(share) for share in (stage.host_share, stage.gpu_share)[: 1 + on_gpu]]
        cells += [str(stage.errors or "")] * errors
        table.add_row(_console.indented(stage.name, stage.depth, " *" if stage.only_warmup else ""), *cells)
        if stage.outside_ms is not None:
            cells = ["", *_percentiles(None), *_percentiles(stage.outside_ms), "-", "-"]
            table.add_row(_console.indented(OUTSIDE, stage.depth + 1), *cells, _console.percent(stage.outside_share))
    return table


def _percentiles(of: Distribution | None) -> tuple[str, str, str]:
    return (_console.ms(of.p50), _console.ms(of.p90), _console.ms(of.p99)) if of else ("-", "-", "-")


def _notes(figures: Figures) -> Iterator[str]:
    """Yield what one needs to know to read the table rightly."""
    yield from map(_request, figures.requests)
    yield "Times are milliseconds, without warm-up calls; % is of the requests' time on the host."
    if any(stage.replayed_calls for stage in figures.stages):
        yield "Stages in a CUDA graph have only GPU times; what a replay does outside any stage has a line of its own."
    if any(stage.only_warmup for stage in figures.stages):
        yield "* made only warm-up calls, so its figures are of those."
    placed = figures.uncertainty_us
    if placed is None:
        yield "No GPU times: these are host times only."
    else:
        yield "GPU: time on the stream between a stage's two events, including any waiting for the host in between."
        yield "start +ms: from the start on the host to the start on the GPU, median."
        yield f"GPU times are placed within {placed.p50:.1f} us (median; at most {placed.max:.1f} us)."
    missing = _console.losses(figures.losses)
    yield f"Missing: {'; '.join(missing)}." if missing else "Nothing is known to be missing."


def _request(request: RequestFigures) -> str:
    counted, slowest = request.end_to_end_ms, request.slowest[0]
    return (
        f"{_console.printable(request.name)}, end to end: p50 {_console.ms(counted.p50)}, "
        f"p90 {_console.ms(counted.p90)}, p99 {_console.ms(counted.p99)} ms over "
        f"{_console.count(counted.count, 'request')}; "
        f"slowest {_console.ms(slowest.end_to_end_ms)} ms in trace {slowest.trace_id}"
    )
