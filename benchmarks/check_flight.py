"""
Whether the flight recorder survives: 200 deaths at random moments, and what the ring costs a stage.

Each victim dies by SIGKILL, `abort`, SIGSEGV or, where this process may make a memory cgroup, the kernel's OOM
killer. Then its file is read: every record must fit what the victim ran, and the newest beginning or end of a stage
must be at most 50 ms older than the death. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import _hot_cases as hot
from _common import Goal, arguments, child, environment, interleave, median, percentile, save, table

VICTIM = Path(__file__).with_name("_flight_victim.py")
CGROUPS = Path("/sys/fs/cgroup/memory")
LIMIT_BYTES = 400 << 20
FORMS = ("with", "decorator")


def die_once(number: int, folder: str, how: str) -> dict[str, Any]:
    """Have one victim die, read what it left, and remove that."""
    path, words = Path(folder, f"flight-{number}"), Path(folder, f"words-{number}")
    words.write_bytes(bytes(8))
    after_s = random.Random(number).uniform(0.0, 0.4)
    env = environment({"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "none", "GPUSCOPE_FLIGHT": str(path)})
    command = [sys.executable, "-X", "faulthandler=0", str(VICTIM), how, str(after_s), str(words)]
    group = CGROUPS / f"gpuscope-flight-{os.getpid()}-{number}" if how == "oom" else None
    with contextlib.ExitStack() as stack:
        if group is not None:
            group.mkdir()
            stack.callback(group.rmdir)
            (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        victim = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert victim.stdout is not None
        if group is not None:
            (group / "cgroup.procs").write_text(str(victim.pid))
        if victim.stdout.readline() != b"ready\n":
            raise SystemExit("the victim died too early")
        if how == "kill":
            time.sleep(after_s)
            died_ns = time.perf_counter_ns()
            victim.send_signal(signal.SIGKILL)
        code = victim.wait()
        over_ns = time.perf_counter_ns()
        if how != "kill":  # It notes the time just before, because this process may be told late.
            died_ns = int.from_bytes(words.read_bytes(), "little")
        victim.stdout.close()
        found = examine(path, died_ns, over_ns)
        path.unlink()
        words.unlink()
    return {"how": how, "code": code, **found}


def examine(path: Path, died_ns: int, over_ns: int) -> dict[str, Any]:
    """Return what is in the file, how old the newest of it is, and how many records don't fit."""
    from gpuscope.analysis._reading.flight_ring import durations_ns, have_ended, numbers_of, read_flight

    ring = read_flight(path)
    stages = ring.stages
    starts, took = stages[:, 4].astype("int64"), durations_ns(stages)
    newest_ns = int((starts + took).max())
    names = [ring.names.get(number, "") for number in numbers_of(stages).tolist()]
    known = {row[2]: (row, name) for row, name in zip(stages.tolist(), names, strict=True)}
    wrong = 0
    for row, name in known.values():
        kind, _, number = name.partition("-")
        outer = known.get(row[3])
        fits = number and ring.threads.get(row[6]) == f"server-{number}" and row[4] + (row[5] >> 2) <= over_ns
        if kind == "request":
            fits = fits and row[3] == 0
        elif outer is not None:
            fits = fits and outer[1] == f"request-{number}" and outer[0][:2] == row[:2] and outer[0][4] <= row[4]
        wrong += not fits
    return {
        "stages": len(stages),
        "running": int((~have_ended(stages)).sum()),
        "not_whole": ring.torn,
        "wrong": wrong,
        "age_ms": (died_ns - newest_ns) / 1e6,
    }


def may_limit() -> bool:
    """Tell whether this process may make a memory cgroup."""
    group = CGROUPS / f"gpuscope-flight-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        group.rmdir()
    except OSError:
        return False
    return True


def deaths(count: int) -> list[dict[str, Any]]:
    """Have so many victims die, two at a time."""
    ways = ["kill", "kill", "abort", "segv", *["oom"] * may_limit()]
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    with tempfile.TemporaryDirectory(dir=folder) as inside, ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda number: die_once(number, inside, ways[number % len(ways)]), range(count))
        found = []
        for each in done:
            found.append(each)
            if len(found) % 20 == 0:
                print(f"{len(found)} deaths", file=sys.stderr, flush=True)
        return found


def cost(rounds: int, size: int) -> dict[str, Any]:
    """What stages cost with the ring and without, interleaved, in this process."""
    import gpuscope
    from gpuscope._recording.state import state

    def settle() -> None:
        if not gpuscope.flush(timeout=60):
            raise SystemExit("stages did not settle within a minute")

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        gpuscope.enable(exporters="none", queue_size=65_536, flight=f"{folder}/flight")
        recorder = state.recorder
        assert recorder is not None
        ring = recorder.flight
        assert ring is not None
        loops = {"with": hot.stages(gpuscope.stage), "decorator": hot.calls(gpuscope.stage("y")(lambda: None))}
        crew, lanes = hot.Crew(1), [hot.host_lane(size)]

        def run(case: hot.Case, flight: Any) -> Any:
            recorder.flight = flight
            return crew.run(case, lanes)

        cases: dict[str, Any] = {"loop": lambda: run(hot.Case(hot.empty), None)}
        for form, loop in loops.items():
            case = hot.Case(loop, settle=settle)
            cases[f"{form}, without"] = lambda case=case: run(case, None)
            cases[f"{form}, ring"] = lambda case=case: run(case, ring)
        raw = {name: [astuple(each) for each in samples] for name, samples in interleave(cases, rounds).items()}
        recorder.flight = ring
        gpuscope.shutdown()
    return raw


def more_ns(raw: dict[str, Any], form: str) -> float:
    """Nanoseconds that the ring adds to a stage: the median of the differences of the rounds."""
    pairs = zip(raw[f"{form}, ring"], raw[f"{form}, without"], strict=True)
    return median([ring[0] - without[0] for ring, without in pairs])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--deaths", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--size", type=int, default=2000, help="stages per block")
    parser.add_argument("--cost", action="store_true", help="measure the cost here and print its JSON")
    options = parser.parse_args()
    if options.quick:
        options.deaths, options.rounds = 5, 11
    if options.cost:
        print(json.dumps(cost(options.rounds, options.size)))
        return
    extra = ["--cost", "--rounds", str(options.rounds), "--size", str(options.size)]
    ways = {"C": {}, "Python": {"GPUSCOPE_NATIVE": "0"}}
    nothing = {"GPUSCOPE": "idle", "CUDA_VISIBLE_DEVICES": ""}
    raw = {name: child([__file__, *extra], {**nothing, **variables}) for name, variables in ways.items()}
    found = deaths(options.deaths)
    ages = sorted(each["age_ms"] for each in found)
    print(
        table(
            ["what the ring adds, ns", *FORMS], [[name, *(more_ns(raw[name], form) for form in FORMS)] for name in raw]
        )
    )
    rows = []
    for how in sorted({each["how"] for each in found}):
        own = [each for each in found if each["how"] == how]
        figures = [max(each[key] for each in own) for key in ("age_ms", "running", "not_whole", "wrong")]
        rows.append([how, str(len(own)), f"{figures[0]:.2f}", *map(str, figures[1:])])
    print(table(["death", "times", "age, at most, ms", "running", "not whole", "wrong"], rows))
    goals = [
        *(Goal(f"{form}: what the ring adds to a stage", more_ns(raw["C"], form), 60, " ns") for form in FORMS),
        Goal("deaths after which the ring was read", len(found), options.deaths, at_least=True),
        Goal("records that do not fit", sum(each["wrong"] for each in found), 0),
        Goal("the newest record is older than the death by", ages[-1], 50, " ms"),
    ]
    save("flight", options.out, goals=goals, age_p50_ms=percentile(ages, 0.5), deaths=found, cost=raw)
    if not all(goal.met for goal in goals):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
