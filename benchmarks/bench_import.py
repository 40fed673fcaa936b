"""
What `import gpuscope` costs: fresh processes, interleaved, in each of the three states.

Times the import statement alone, inside the new process; the start of Python is not in the figures.
"""

from __future__ import annotations

from _common import Goal, arguments, child, interleave, median, save, table

PROGRAM = """
import sys, time
before = time.perf_counter_ns()
import MODULE
after = time.perf_counter_ns()
heavy = sorted(set(sys.modules) & {"torch", "opentelemetry", "numpy", "requests"})
print('{"ns": %d, "modules": %d, "heavy": %s}' % (after - before, len(sys.modules), str(heavy).replace("'", '"')))
"""
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
    raw = interleave(cases, rounds)

    rows, summary = [], {}
    for name, answers in raw.items():
        times = [answer["ns"] / 1e6 for answer in answers]
        summary[name] = median(times)
        rows.append([name, median(times), min(times), max(times), ", ".join(answers[0]["heavy"]) or "none"])
    print(table(["import", "median ms", "least", "most", "heavy modules loaded"], rows))
    heavy = {module for answer in raw["gpuscope, absent"] for module in answer["heavy"]}
    goals = [
        Goal("import gpuscope, absent", summary["gpuscope, absent"], 30, " ms"),
        Goal("heavy modules loaded by it: torch", float("torch" in heavy), 0),
        Goal("heavy modules loaded by it: opentelemetry", float("opentelemetry" in heavy), 0),
    ]
    save("import", options.out, goals=goals, median_ms=summary, raw=raw)


if __name__ == "__main__":
    main()
