"""
Whether gpuscope's verdicts are right: programs whose bottleneck is known by construction, judged twice.

Each runs on a real GPU: once recorded to a file, for the verdicts of `gpuscope report`, and once under the deep look.
The table has what was expected beside what was said. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from _common import Goal, arguments, has_cuda, save, table

import gpuscope

if TYPE_CHECKING:
    from _verdict_cases import Case, Request

WARMUP, LOOKED_AT = 3, 5


class Said(NamedTuple):
    """One stage of one program."""

    case: str
    stage: str
    method: str
    expected: str
    said: str
    because: str
    witness: str = ""
    """What a verdict of the report rests on."""
    busy_share: float | None = None
    """The part of the time in which streams had work when they were asked."""

    @property
    def right(self) -> bool:
        return self.said == self.expected


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="run only the programs with this in their names")
    parser.add_argument("--requests", type=int, default=60, help="of each program that is judged from records")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the recordings and the profiles in this folder"
    )
    options = parser.parse_args()
    from _verdict_cases import CASES, WITHOUT_GPU

    cases = CASES if has_cuda() else WITHOUT_GPU
    if cases is WITHOUT_GPU:
        print("Without a GPU nothing can be judged; this runs one program, to see that it works.")
    chosen = {name: case for name, case in cases.items() if options.only in name}
    rows, failed, requests = [], {}, 20 if options.quick else options.requests
    for name, case in chosen.items():
        if options.quick and name == "compiled model":
            print(f"{name}: left out, because its compilation takes longer than all the rest")
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.keep or Path(temporary)) / re.sub(r"\W+", "-", name).strip("-")
            try:
                rows += run(name, case, requests, folder)
            except Exception as error:  # one program that cannot run here must not hide the others
                failed[name] = repr(error)
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    show(rows, chosen)
    for name, error in failed.items():
        print(f"could not run `{name}`: {error}")
    goals = [
        Goal("wrong verdicts of `gpuscope report`", sum(not row.right for row in rows if row.method == "report"), 0),
        Goal("wrong answers of the deep look", sum(not row.right for row in rows if row.method == "look"), 0),
        Goal("programs that could not run", len(failed), 0),
    ]
    save("verdicts", options.out, goals=goals, rows=[row._asdict() for row in rows], failed=failed)
    sys.exit(0 if all(goal.met for goal in goals) else 1)


def run(name: str, case: Case, requests: int, folder: Path) -> list[Said]:
    """Run a program both ways; return what was said of each stage that something is expected of."""
    folder.mkdir(parents=True)
    request = case.make()
    for _ in range(WARMUP):  # compiles and allocates
        request()
    findings, look = record(request, case, requests, folder), examine(request, case, folder)
    verdicts = {each.name: each for each in (*findings.requests, *findings.stages)}
    looks = {each.name: each for each in look.stages}
    asked = any(each.answers for each in verdicts.values())
    expected_of = {**case.verdicts, **(case.asked if asked else {})}
    rows = [
        Said(
            name,
            stage,
            "report",
            expected,
            verdicts[stage].verdict,
            verdicts[stage].because,
            verdicts[stage].witness,
            verdicts[stage].busy_share,
        )
        for stage, expected in expected_of.items()
    ]
    rows += [
        Said(name, stage, "look", expected, looks[stage].bound, looks[stage].because)
        for stage, expected in case.looks.items()
    ]
    between = next((note for note in look.notes if note.startswith("Between requests")), "")
    busy, idle = "no long gaps", "long gaps"
    rows.append(Said(name, "between", "look", idle if case.idle_between else busy, idle if between else busy, between))
    return rows


def serve(request: Request, case: Case, count: int) -> None:
    for _ in range(count):
        with gpuscope.stage("request"):
            request()
        case.between()


def record(request: Request, case: Case, requests: int, folder: Path) -> Any:
    """Record a program as in production, and return the verdicts."""
    from gpuscope.analysis.read import read
    from gpuscope.analysis.verdict import judge

    path = folder / "spans.jsonl"
    gpuscope.enable(exporters="file", file=str(path), warmup=WARMUP)
    serve(request, case, requests)
    gpuscope.shutdown()
    return judge(read([path]))


def examine(request: Request, case: Case, folder: Path) -> Any:
    """Have a deep look at a program, and return what it says."""
    with gpuscope.profile(requests=LOOKED_AT, warmup=WARMUP) as look:
        serve(request, case, WARMUP + LOOKED_AT)
    if look.report is None:
        raise RuntimeError(str(look))
    look.save(str(folder / "profile"))
    return look.report


def show(rows: list[Said], cases: dict[str, Case]) -> None:
    """Print what was expected beside what was said, and the reasons where they differ."""
    by_stage: dict[tuple[str, str], dict[str, Said]] = {}
    for row in rows:
        by_stage.setdefault((row.case, row.stage), {})[row.method] = row
    lines, before = [], ""
    for (case, stage), said in by_stage.items():
        cells = [case if case != before else "", stage]
        for method in ("report", "look"):
            row = said.get(method)
            cells += [row.expected, row.said + ("" if row.right else " <-- WRONG")] if row else ["", ""]
        lines.append(cells)
        before = case
    print(table(["program", "stage", "report: expected", "said", "look: expected", "said"], lines))
    for name, case in cases.items():
        if case.why_unknown:
            print(f"`{name}` is unknown from events alone: {case.why_unknown}.")
    for row in rows:
        if not row.right:
            print(f"WRONG: {row.case}, {row.stage} ({row.method}): {row.said}, not {row.expected}. {row.because}")


if __name__ == "__main__":
    main()
