"""
`gpuscope compare`: which stages became faster or slower between two recordings, and whether whole requests show it.

Prints; every figure and judgement comes from `gpuscope.analysis.compare`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._errors import CommandError
from gpuscope.analysis.durations import duration
from gpuscope.commands import _console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from gpuscope.analysis.compare import Change, Comparison, RequestChange, StageChange
    from gpuscope.analysis.recording import Recording

HELP = "Compare two recordings, stage by stage and end to end: faster, slower, or within noise."
EPILOG = (
    "Exit codes: 0 nothing is slower than allowed; 1 with --fail-if-slower, a kind of request is slower; 2 bad usage, "
    "nothing to read, or too few requests, or times too noisy, to answer --fail-if-slower."
)
FASTER, SLOWER = "faster", "slower"
ON_STREAM = "on its stream"
WIDE = 110
"""Columns from which on a table says more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = EPILOG
    parser.add_argument("before", metavar="A", help="the recording to compare with, or a folder of its files")
    parser.add_argument("after", metavar="B", help="the recording that may be faster or slower, or a folder")
    parser.add_argument(
        "--fail-if-slower",
        type=_share,
        metavar="5%",
        help="exit with 1 if a kind of request is slower end to end, beyond noise and by more than this",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the comparison as JSON, for scripts")


def run(options: argparse.Namespace) -> int:
    """Print the comparison; return 1 if something is slower than allowed."""
    from gpuscope.analysis.compare import compare

    console = _console.open_console()
    before, after = _console.read_recording([options.before]), _console.read_recording([options.after])
    comparison = compare(before, after)
    if not comparison.in_common:
        names = [", ".join(f"`{name}`" for name in _kinds(recording)) for recording in (before, after)]
        raise CommandError(f"nothing in common: the requests of A are {names[0]}, those of B {names[1]}.")
    if options.json is not None:
        _console.refuse_to_overwrite([options.before, options.after], [options.json])
        with _console.writing(options.json):
            options.json.write_text(json.dumps(comparison.as_dict(), indent=1) + "\n")
    _console.say(request.answer for request in comparison.requests)
    for request in comparison.requests:
        print()
        stages = [stage for stage in comparison.stages if stage.root == request.name]
        shown = [stage for stage in stages if _is_telling(stage)]
        console.print(_table(request, shown, console.width))
        print()
        if rest := len(stages) - len(shown):
            print(
                f"{_console.count(rest, 'more line')}: within noise, too noisy, too small to matter, or too few calls."
            )
        _console.say(request.remarks)
    _console.say(_notes(before, after))
    return 0 if options.fail_if_slower is None else _gate(comparison, options.fail_if_slower)


def _kinds(recording: Recording) -> list[str]:
    """Return the names of the first kinds of request."""
    roots = dict.fromkeys(recording.stage[recording.parent < 0].tolist())
    return [_console.printable(recording.names[stage]) for stage in roots][:5]


def _gate(comparison: Comparison, allowed: float) -> int:
    """Return the exit code; a request that cannot be judged must not pass as not slower."""
    from gpuscope.analysis.compare import FEW, MIN_CALLS

    # New kinds of request have nothing to be slower than, and a few stray requests on both sides must not stop all.
    kinds = [each for each in comparison.requests if each.change.calls[0] and max(each.change.calls) >= MIN_CALLS]
    few = [_console.printable(request.name) for request in kinds if request.change.verdict == FEW]
    if few or not kinds:
        raise CommandError(
            f"cannot tell whether {', '.join(few) or 'anything'} is slower: each recording needs {MIN_CALLS} requests "
            "after the warm-up; record more."
        )
    slower = [request for request in kinds if request.change.is_slower(allowed)]
    for request in slower:
        print(
            f"FAILED: {_console.printable(request.name)} is {_console.percent(request.change.relative)} % slower "
            "end to end."
        )
    noisy = [request for request in kinds if request.change.may_be_slower(allowed)]
    if noisy and not slower:
        told = ", ".join(f"{_console.printable(each.name)} ({each.change.interval})" for each in noisy)
        raise CommandError(
            f"too noisy to tell whether requests are slower: {told}; record more, or allow more than --fail-if-slower "
            f"{100 * allowed:g}%."
        )
    return 1 if slower else 0


def _is_telling(stage: StageChange) -> bool:
    """Return whether a stage changed, is in one recording alone, or is the request itself."""
    return stage.change.verdict in (FASTER, SLOWER) or not all(stage.change.calls) or stage.depth == 0


def _table(request: RequestChange, shown: list[StageChange], width: int) -> Table:
    """Return the table of one kind of request: in a wide terminal with the calls, and the effect on a request."""
    wide = width >= WIDE
    columns = ["before", "after", "change", "99 % interval", "verdict"]
    table = _console.make_table("stage", *(["calls"] * wide), *columns, *(["per request"] * wide))
    for stage in shown:
        name = stage.name if stage.lane == "host" else ON_STREAM
        name = _console.indented(name, stage.depth + (stage.lane != "host"))
        table.add_row(name, *_cells(stage.change, stage.effect_ms, wide=wide))
    table.add_section()
    table.add_row("end to end", *_cells(request.change, request.change.change_ms, wide=wide))
    return table


def _cells(change: Change, effect_ms: float | None, *, wide: bool) -> list[str]:
    interval = "-"
    if change.low_part is not None and change.high_part is not None:
        interval = f"{_console.percent(change.low_part, '+')} .. {_console.percent(change.high_part, '+')}"
    calls = [" / ".join(f"{calls:,}" for calls in change.calls)]
    cells = [
        duration(change.before_ms),
        duration(change.after_ms),
        "-" if change.relative is None else f"{_console.percent(change.relative, '+')} %",
        interval,
        change.verdict,
    ]
    return [*calls * wide, *cells, *[duration(effect_ms, "+")] * wide]


def _notes(before: Recording, after: Recording) -> Iterator[str]:
    """Yield what one needs to know to read the table rightly."""
    yield "Medians, without warm-up calls. A change of less than 1 % of the request is too small to matter."
    yield (
        "The intervals cover the noise within these recordings. Two runs of one program can differ by more: compare it "
        "with itself first."
    )
    for name, recording in (("A", before), ("B", after)):
        if missing := _console.losses(recording.losses.missing()):
            yield f"Missing from {name}: {'; '.join(missing)}."
        if recording.losses.not_kept:
            yield f"{name} has only the requests that `keep` has kept, most of them slow."


def _share(text: str) -> float:
    """Read `5%` or `5`."""
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage; write for example 5%.")
    return share
