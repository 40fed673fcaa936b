"""
`gpuscope report`: shows where the time goes in a recording, with a table, verdicts, and files for viewers and scripts.

Prints and writes; every figure and judgement comes from `gpuscope.analysis`.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._errors import CommandError
from gpuscope.analysis.durations import duration
from gpuscope.commands import _console

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from rich.table import Table

    from gpuscope.analysis._verdicts.findings import Findings, StageVerdict
    from gpuscope.analysis.figures import Distribution, Figures, StageFigures
    from gpuscope.analysis.latency.parts import OfKind
    from gpuscope.analysis.recording import Recording

HELP = "Show where the time goes in recordings: an answer per kind of request, a table, verdicts, a timeline."
EPILOG = "Exit codes: 0 done; 2 bad usage, nothing to read, or a file that cannot be written."
OUTSIDE = "in the graph, outside any stage"
ASKED = (
    "GPU busy: the part of the time in which streams that were asked at random times had work, queued or running, with "
    "the 95 % interval over requests. Kernels ran for less than that: by up to 18 points where they are short, hardly "
    "where they are long. Work of other processes on the GPU is not seen. GPU idle: the rest; without enough answers, "
    "what events show. Host waits: as far as events show that."
)
LOOKED = (
    "In looks: the part of the time in which deep looks, taken now and then, saw the GPU compute or copy; from 10 "
    "requests on, the 95 % interval."
)
OUTPUTS = ("html", "perfetto", "jaeger", "json")
_MOST_NOT_ENDED = 5


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
    parser.add_argument("--run", type=int, metavar="N", help="of several runs in the files, report only this one")
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
    from gpuscope.analysis.latency.explain import Explainer

    console = _console.open_console()
    recording = _one_run(_console.read_recording(options.files), options.run)
    asked_for = {name: path for name in OUTPUTS if (path := getattr(options, name)) is not None}
    outputs = {name: _console.output_of(path) for name, path in asked_for.items()}
    _console.refuse_to_overwrite(options.files, outputs.values())
    figures, findings = _analyse(recording)
    latency = Explainer(recording).by_kind()
    # Files come first, in case whoever reads the output goes away.
    for name, path in outputs.items():
        with _console.writing(path):
            if name == "json":
                parts = [each.as_dict() for each in latency]
                all_of_it = {**figures.as_dict(), "findings": findings.as_dict(), "latency": parts}
                path.write_text(json.dumps(all_of_it, indent=1) + "\n")
            else:
                _draw(name, path, recording, figures, findings)
    if any(map(_console.is_standard_output, outputs.values())):
        return 0  # For another program, which would not know what to make of a table.
    _console.say(findings.summary())
    print()
    _console.say([_headline(recording, figures), *_not_ended(recording), *_runs(recording)])
    print()
    console.print(_table(figures))
    print()
    _console.say(_notes(figures))
    if any(each.busy_range or each.looked for each in (*findings.requests, *findings.stages)):
        print()
        console.print(_busy_table(figures, findings))
        print()
        _console.say([ASKED, *[LOOKED] * any(each.looked for each in (*findings.requests, *findings.stages))])
    print()
    _console.say(_parts(latency))
    print()
    _console.say(findings.details())
    _console.say(f"{name}: {path}" for name, path in outputs.items())
    if "html" not in outputs:
        print("--html timeline.html draws the requests.")
    return 0


def _one_run(recording: Recording, number: int | None) -> Recording:
    from gpuscope.analysis.runs import only, runs_of

    if number is None:
        return recording
    runs = runs_of(recording)
    if not 1 <= number <= len(runs):
        raise CommandError(f"there is no run {number}: the files hold {_console.count(len(runs), 'run')}.")
    return only(recording, runs[number - 1])


def _analyse(recording: Recording) -> tuple[Figures, Findings]:
    from gpuscope.analysis.figures import figures
    from gpuscope.analysis.verdict import judge

    try:
        return figures(recording), judge(recording)
    except ModuleNotFoundError as error:
        raise _console.missing(error) from error


def _draw(name: str, path: Path, recording: Recording, figures: Figures, findings: Findings) -> None:
    if name == "html":
        from gpuscope.analysis.timeline import write_html

        write_html(recording, path, findings, figures=figures)
    elif name == "perfetto":
        from gpuscope.analysis.perfetto import write_perfetto

        write_perfetto(recording, path)
    else:
        from gpuscope.analysis.jaeger import write_jaeger

        write_jaeger(recording, path)


def _headline(recording: Recording, figures: Figures) -> str:
    requests = sum(request.calls for request in figures.requests)
    return (
        f"{_console.count(len(recording.stage), 'stage')} in {_console.count(requests, 'request')} of "
        f"{_console.count(len(figures.processes), 'process')} within {duration(1e3 * figures.seconds)}."
    )


def _not_ended(recording: Recording) -> Iterator[str]:
    """Yield a line on stages that still ran when a flight recorder was read."""
    rows = recording.not_ended.nonzero()[0].tolist()
    if rows:
        took_ns = recording.host_end_ns - recording.host_start_ns
        named = [
            f"{_console.printable(recording.names[recording.stage[row]])} for {duration(took_ns[row] / 1e6)}"
            for row in rows[:_MOST_NOT_ENDED]
        ]
        more = f" and {len(rows) - len(named)} more" if len(rows) > len(named) else ""
        yield f"Not ended, and in no percentile of what has: {', '.join(named)}{more}."


def _runs(recording: Recording) -> Iterator[str]:
    """Yield a line per run, if the files hold several one after the other, since the figures mix them."""
    from gpuscope.analysis.runs import runs_of

    runs = runs_of(recording)
    if len(runs) < 2:  # noqa: PLR2004 - one is not several
        return
    yield f"The files hold {len(runs)} runs, one after the other. All figures are of all of them; --run 1 shows one."
    for number, run in enumerate(runs, 1):
        began = datetime.fromtimestamp(run.start_ns / 1e9, tz=timezone.utc)
        took = f", median {duration(run.median_ms)}" if run.median_ms is not None else ""
        names = _console.printable(", ".join(run.names))
        yield f"  run {number}: {began:%Y-%m-%d %H:%M:%S} UTC, {names}, {_console.count(run.requests, 'request')}{took}"


def _table(figures: Figures) -> Table:
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


def _busy_table(figures: Figures, findings: Findings) -> Table:
    """Return how the time of each stage divides, as far as it is known."""
    verdicts = (*findings.requests, *findings.stages)
    looks = ["in looks\n%", "kernels\nper call"] * any(each.looked for each in verdicts)
    columns = ("GPU busy\n%", "\n95 %", "GPU idle\n%", "host waits\n%", "answers\n")
    table = _console.make_table("stage", *columns, *looks)
    judged: dict[tuple[str, str, bool], StageVerdict] = {}
    judged |= {(each.root, each.name, True): each for each in findings.requests}
    judged |= {(each.root, each.name, False): each for each in findings.stages}
    for stage in figures.stages:
        verdict = judged.get((stage.root, stage.name, not stage.depth))
        if verdict is None:
            continue
        shares = (verdict.busy_share, verdict.idle_share, verdict.wait_share)
        busy, idle, waits = ("-" if share is None else f"{100 * share:.0f}" for share in shares)
        within = " to ".join(f"{100 * end:.0f}" for end in verdict.busy_range or ())
        cells = (busy, within, idle, waits, f"{verdict.answers:,}" if verdict.answers else "")
        table.add_row(_console.indented(stage.name, stage.depth), *cells, *(_looked(verdict) if looks else ()))
    return table


def _looked(verdict: StageVerdict) -> tuple[str, str]:
    """Return what deep looks saw: how much of the time the GPU worked, and how many kernels there are per call."""
    looked = verdict.looked
    if looked is None:
        return "", ""
    ends = looked.range or (looked.share,)
    return " to ".join(f"{100 * end:.0f}" for end in ends), f"{looked.kernels:,.0f}"


def _parts(latency: list[OfKind]) -> Iterator[str]:
    """Yield a sentence per kind of request: what its time is made of."""
    yield "What the time of requests is made of, on average; `gpuscope why` has it of one request:"
    for kind in latency:
        parts = [
            f"{name} {ms / kind.whole_ms:.0%}" for name, ms in kind.parts_ms.items() if ms >= 0.005 * kind.whole_ms > 0
        ]
        yield f"  `{kind.name}`, {duration(kind.whole_ms)}: {', '.join(parts) or 'nothing'}."


def _share(stage: StageFigures) -> float | None:
    return stage.gpu_share if stage.host_share is None else stage.host_share


def _sides(stage: StageFigures, *, on_gpu: bool) -> tuple[str, ...]:
    host, delay = stage.host_ms, stage.launch_to_start_ms
    if on_gpu:
        return *_p50_p99(host), *_p50_p99(stage.gpu_ms), duration(delay.p50 if delay else None)
    return tuple(map(duration, (host.p50, host.p90, host.p99, host.max))) if host else ("-", "-", "-", "-")


def _p50_p99(of: Distribution | None) -> tuple[str, str]:
    return (duration(of.p50), duration(of.p99)) if of else ("-", "-")


def _notes(figures: Figures) -> Iterator[str]:
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
    missing = _console.losses(figures.losses.missing())
    yield f"Missing: {'; '.join(missing)}." if missing else "Nothing is known to be missing."
