"""
What looking for stalls costs a stage, beside no ring and beside a ring alone, and how long switching it off takes.

The watch has its thread running meanwhile, and finds nothing. Writes `results/stalls.json`.
"""

from __future__ import annotations

import json
import mmap
import time
from dataclasses import astuple
from typing import Any

import _hot_cases as hot
from _common import Goal, arguments, child, interleave, median, percentile, save, table

FORMS = "with", "decorator"
_RING_BYTES = 2 << 20


def cost(rounds: int, size: int) -> dict[str, Any]:
    """What stages cost without a ring, with one, and with one that is watched, interleaved, in this process."""
    import gpuscope
    from gpuscope._flight.ring import make_ring
    from gpuscope._recording.state import state

    def settle() -> None:
        if not gpuscope.flush(timeout=60):
            raise SystemExit("stages did not settle within a minute")

    gpuscope.enable(exporters="none", queue_size=65_536, stall="10s, 20x")
    with gpuscope.stage("first"):
        pass
    recorder = state.recorder
    assert recorder is not None
    rings = {"none": None, "ring": make_ring(mmap.mmap(-1, _RING_BYTES), 0), "watched": recorder.flight}
    assert rings["watched"] is not None
    loops = {"with": hot.stages(gpuscope.stage), "decorator": hot.calls(gpuscope.stage("y")(lambda: None))}
    crew, lanes = hot.Crew(1), [hot.host_lane(size)]

    def run(case: hot.Case, flight: Any) -> Any:
        recorder.flight = flight
        return crew.run(case, lanes)

    cases: dict[str, Any] = {}
    for form, loop in loops.items():
        case = hot.Case(loop, settle=settle)
        for name, ring in rings.items():
            cases[f"{form}, {name}"] = lambda case=case, ring=ring: run(case, ring)
    raw = {name: [astuple(each) for each in samples] for name, samples in interleave(cases, rounds).items()}
    recorder.flight = rings["watched"]
    found = gpuscope.statistics().stalls
    off = []
    for _ in range(100):
        before = time.perf_counter()
        recorder.stalls.stop()
        off.append((time.perf_counter() - before) * 1e3)
        recorder.stalls.start()
    gpuscope.shutdown()
    return {"raw": raw, "stalls": found, "off_ms": sorted(off)}


def more_ns(raw: dict[str, Any], form: str, before: str, after: str) -> float:
    """Nanoseconds that one more part adds to a stage: the median of the differences of the rounds."""
    pairs = zip(raw[f"{form}, {after}"], raw[f"{form}, {before}"], strict=True)
    return median([one[0] - other[0] for one, other in pairs])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--size", type=int, default=2000, help="stages per block")
    parser.add_argument("--cost", action="store_true", help="measure the cost here and print its JSON")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 11
    if options.cost:
        print(json.dumps(cost(options.rounds, options.size)))
        return
    extra = ["--cost", "--rounds", str(options.rounds), "--size", str(options.size)]
    ways = {"C": {}, "Python": {"GPUSCOPE_NATIVE": "0"}}
    nothing = {"GPUSCOPE": "idle", "CUDA_VISIBLE_DEVICES": ""}
    found = {name: child([__file__, *extra], {**nothing, **variables}) for name, variables in ways.items()}
    steps = {"the ring": ("none", "ring"), "that it is watched": ("ring", "watched")}
    rows = [
        [f"{way}: {what} adds, ns", *(more_ns(each["raw"], form, *step) for form in FORMS)]
        for way, each in found.items()
        for what, step in steps.items()
    ]
    print(table(["", *FORMS], rows))
    in_c = found["C"]
    goals = [
        *(Goal(f"{form}: what the ring adds", more_ns(in_c["raw"], form, "none", "ring"), 60, " ns") for form in FORMS),
        *(
            Goal(f"{form}: what the watch adds", more_ns(in_c["raw"], form, "ring", "watched"), 10, " ns")
            for form in FORMS
        ),
        Goal("stalls that were found", sum(in_c["stalls"].values()), 0),
        Goal("switching it off takes, half of the times", percentile(in_c["off_ms"], 0.5), 1, " ms"),
    ]
    save("stalls", options.out, goals=goals, cost=found)


if __name__ == "__main__":
    main()
