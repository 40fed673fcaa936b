"""
`gpuscope why`: where the time of one request went, its batches included, as a table and a bar.

Prints; every figure comes from `gpuscope.analysis.latency`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from gpuscope._errors import CommandError
from gpuscope.analysis.durations import duration
from gpuscope.commands import _console

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from gpuscope.analysis.latency.explain import Explainer
    from gpuscope.analysis.latency.parts import Latency

HELP = "Show why one request took as long as it did: queue, batch, GPU, copies, host, as parts that add up."
EPILOG = "Exit codes: 0 done; 2 bad usage, nothing to read, or no such request."
_MOST_KINDS = 8
MOST_STAGES = 6
"""Stages of the host that have a line of their own."""
_TRACE = re.compile(r"[0-9a-fA-F]{4,32}")
_MARKS = ".qbGostHgc>-?"
"""One letter per part, in the order of `PARTS`, for terminals without colours and for pipes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = EPILOG
    parser.add_argument(
        "operands",
        nargs="+",
        metavar="[TRACE] FILE",
        help="the trace's id or its beginning, unless an option chooses the request; then recordings, folders of them, "
        "or - for standard input",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--slowest",
        action="store_true",
        help="the slowest request that reports judge: without warm-up or a late cold call",
    )
    chosen.add_argument("--p99", action="store_true", help="of those, the request that 99 of 100 are not slower than")
    chosen.add_argument("--median", action="store_true", help="the one in the middle")
    parser.add_argument("--kind", metavar="NAME", help="of these, only requests whose outermost stage has this name")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, for scripts")


def run(options: argparse.Namespace) -> int:
    """Explain the request that was asked for."""
    from gpuscope.analysis.latency.explain import Explainer

    console = _console.open_console()
    trace, files = _operands(options)
    explainer = Explainer(_console.read_recording(files))
    row, remark = _chosen(explainer, options, trace)
    latency = explainer.explain(row)
    if options.json:
        print(json.dumps(latency.as_dict(), indent=1))
        return 0
    _console.say([_headline(latency), *remark])
    print()
    _console.say([_bar(latency)])
    print()
    console.print(_table(latency))
    _console.say(_notes(latency))
    return 0


def _operands(options: argparse.Namespace) -> tuple[str | None, Sequence[str]]:
    if options.slowest or options.p99 or options.median:
        return None, options.operands
    trace, *files = options.operands
    if not _TRACE.fullmatch(trace):
        raise CommandError(
            f"which request? {trace!r} is not a trace id; give one, or at least its first 4 digits, before the files, "
            "or --slowest, --p99 or --median."
        )
    if not files:
        raise CommandError(f"no file is named; write `gpuscope why {trace} FILE`.")
    return trace, files


def _chosen(explainer: Explainer, options: argparse.Namespace, trace: str | None) -> tuple[int, list[str]]:
    """Return the row of the request, and what is to be said about the choice."""
    if trace is None:
        percentile = 100.0 if options.slowest else 99.0 if options.p99 else 50.0
        found = explainer.at(percentile, options.kind)
        if found is None:
            raise CommandError(_no_such_kind(explainer, options.kind))
        return found, [] if options.median else _not_judged(explainer, found, options.kind)
    rows = explainer.of_trace(trace)
    names, stage = explainer.recording.names, explainer.recording.stage
    rows = [row for row in rows if options.kind in (None, names[stage[row]])]
    if not rows:
        raise CommandError(f"no request has a trace id that begins with {trace!r}; `gpuscope report` names some.")
    if len(rows) == 1:
        return rows[0], []
    return rows[0], [f"{_console.count(len(rows) - 1, 'more request')} with such a trace id took less time."]


def _no_such_kind(explainer: Explainer, kind: str) -> str:
    from gpuscope.analysis.latency.choice import batch_names

    recording = explainer.recording
    members = batch_names(recording).get(kind)
    if members:
        return f"{kind!r} is a batch; choose one of its members: {' or '.join(f'--kind {each}' for each in members)}."
    kinds = dict.fromkeys(recording.names[stage] for stage in recording.stage[explainer.requests()].tolist())
    names = [*map(repr, kinds)]
    more = f" and {len(names) - _MOST_KINDS} more" if len(names) > _MOST_KINDS else ""
    return f"no request begins with the stage {kind!r}; some do with {', '.join(names[:_MOST_KINDS])}{more}."


def _not_judged(explainer: Explainer, row: int, kind: str | None) -> list[str]:
    """Return what is to be said of requests that took longer than this one, and that reports do not judge."""
    from gpuscope.analysis.latency.choice import slower_apart

    rows = explainer.of_kind(kind)
    slower = slower_apart(explainer.recording, rows, explainer.duration_ns(rows), row)
    if not slower:
        return []
    longest, took_ns = slower[0]
    more, trace = _console.count(len(slower), "more request"), explainer.recording.trace_id[longest]
    why = "with warm-up or a late cold call inside, which the report does not judge"
    return [f"{more} took longer, {why}: up to {duration(took_ns / 1e6)} (trace {trace})."]


def _headline(latency: Latency) -> str:
    return f"`{latency.name}` took {duration(latency.whole_ns / 1e6)} (trace {latency.trace_id})."


def _bar(latency: Latency) -> str:
    """Return one letter per hundredth or so of the request; what is smaller than that is in the table alone."""
    from gpuscope.analysis.latency.parts import PARTS

    wide = min(_console.width(), 100) - 2
    whole = max(1, latency.whole_ns)
    ends, so_far = [], 0
    for part in PARTS:
        so_far += latency.parts[part]
        ends.append(round(wide * so_far / whole))
    letters = [mark * (end - start) for mark, start, end in zip(_MARKS, [0, *ends], ends, strict=False)]
    return f"[{''.join(letters)}]"


def _table(latency: Latency) -> Table:
    from gpuscope.analysis.latency.parts import HOST, MEANS, PARTS, UNEXPLAINED

    table = _console.make_table("part", "time", "%")
    table.add_column("", overflow="fold")
    whole = max(1, latency.whole_ns)
    for mark, part in zip(_MARKS, PARTS, strict=True):
        ns = latency.parts[part]
        if not ns and part != UNEXPLAINED:
            continue
        table.add_row(f"{mark} {part}", duration(ns / 1e6), _console.percent(ns / whole), MEANS[part])
        inside = latency.stages if part == HOST else latency.unclear if part == UNEXPLAINED else {}
        for name, of_stage in [*inside.items()][:MOST_STAGES]:
            why = "host or GPU: events cannot tell" if part == UNEXPLAINED else ""
            shown = _console.indented(name, 2)
            table.add_row(shown, duration(of_stage / 1e6), _console.percent(of_stage / whole), why)
        if len(inside) > MOST_STAGES:
            table.add_row(f"    {len(inside) - MOST_STAGES} more", "", "", "")
    table.add_row("whole", duration(latency.whole_ns / 1e6), _console.percent(1.0), "until host and GPU were done")
    return table


def _notes(latency: Latency) -> Iterator[str]:
    """Yield what each batch was."""
    if latency.batches:
        yield ""
    for batch in latency.batches:
        many = f"{batch.runs:,} runs of `{batch.name}`, of up to {batch.size:,}" if batch.runs > 1 else ""
        what = many or f"`{batch.name}`, a batch of {batch.size:,}"
        if batch.gpu_ms:
            share = f"{batch.share_ms / batch.gpu_ms:.1%}"
            yield f"{what}: {duration(batch.gpu_ms)} on the GPU, of which {share} is allotted to this request."
        else:
            yield f"{what}: without GPU times."
    if any(batch.gpu_ms for batch in latency.batches):
        yield "Shares are an allotment by the batch's weights, and no measurement."
