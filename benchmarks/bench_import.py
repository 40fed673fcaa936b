"""
What `import gpuscope` costs, in each of the three states, and what the start-up file adds to a start of Python.

Fresh processes, interleaved. Times the import statement alone, and the CPU time of the start-up file alone, each inside
the new process: the rest of Python's start varies by more than that. The line is beside an empty file of the same kind,
which costs opening and reading it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _common import Goal, arguments, child, interleave, median, save, table

from gpuscope._startup.backend import LINE, NAME

PROGRAM = """
import sys, time
before = time.perf_counter_ns()
import MODULE
after = time.perf_counter_ns()
heavy = sorted(set(sys.modules) & {"torch", "opentelemetry", "numpy", "requests"})
print('{"ns": %d, "modules": %d, "heavy": %s}' % (after - before, len(sys.modules), str(heavy).replace("'", '"')))
"""
START = """
import site, sys, time
before = time.process_time_ns()  # On a busy machine the clock would show the others as well.
site.addpackage(sys.argv[1], sys.argv[2], set())
print('{"ns": %d, "heavy": []}' % (time.process_time_ns() - before))
"""
EMPTY = "empty.pth"
NAMED = {"GPUSCOPE": "1", "GPUSCOPE_STAGES": "infer=app:infer"}
STATES = {"absent": None, "idle": "idle", "on": "1"}


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    rounds = 3 if options.quick else 21

    def fresh(module: str, state: str | None, exporter: str = "none"):
        changes = {"GPUSCOPE": state, "GPUSCOPE_EXPORTER": exporter}
        return lambda: child(["-c", PROGRAM.replace("MODULE", module)], changes)

    cases = {f"gpuscope, {name}": fresh("gpuscope", value) for name, value in STATES.items()}
    cases["for scale: json"] = fresh("json", None)
    cases["for scale: numpy"] = fresh("numpy", None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, NAME).write_text(LINE)
        Path(folder, EMPTY).write_text("\n")

        def start(name: str, **changes: str):
            return lambda: child(["-c", START, folder, name], changes)

        cases["start-up file, nothing set"] = start(NAME)
        cases["for scale: an empty one"] = start(EMPTY)
        cases["start-up file, waiting for a module"] = start(NAME, **NAMED)
        raw = interleave(cases, rounds)

    rows, summary = [], {}
    for name, answers in raw.items():
        times = [answer["ns"] / 1e6 for answer in answers]
        summary[name] = median(times)
        rows.append(
            [
                name,
                *(f"{each:,.3f}" for each in (median(times), min(times), max(times))),
                ", ".join(answers[0]["heavy"]) or "none",
            ]
        )
    print(table(["import", "median ms", "least", "most", "heavy modules loaded"], rows))
    heavy = {module for answer in raw["gpuscope, absent"] for module in answer["heavy"]}
    goals = [
        Goal("import gpuscope, absent", summary["gpuscope, absent"], 30, " ms"),
        Goal(
            "start of Python with the start-up file, nothing set",
            1e3 * summary["start-up file, nothing set"],
            50,
            " us",
        ),
        Goal("heavy modules loaded by it: torch", float("torch" in heavy), 0),
        Goal("heavy modules loaded by it: opentelemetry", float("opentelemetry" in heavy), 0),
    ]
    save("import", options.out, goals=goals, median_ms=summary, raw=raw)


if __name__ == "__main__":
    main()
