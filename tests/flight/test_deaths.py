"""What is left when a process dies or forks: the newest stages, whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from gpuscope._data.native import native
from gpuscope._flight.dumps import copies
from gpuscope.analysis._reading.flight_ring import have_ended, numbers_of, read_flight

DIES = """
import ctypes, os, signal, sys, threading, time
import gpuscope
how = sys.argv[1]
gpuscope.enable(exporters="none", flight="flight")
def serve(number):
    while True:
        with gpuscope.stage(f"request-{number}"):
            with gpuscope.stage(f"inner-{number}"):
                os.sched_yield()
for number in range(2):
    threading.Thread(target=serve, args=(number,), daemon=True).start()
with gpuscope.stage("main"):
    before = time.perf_counter()
    while time.perf_counter() - before < float(sys.argv[2]):
        os.sched_yield()
    with gpuscope.stage("last"):
        pass
    print(time.perf_counter_ns(), flush=True)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "abort":
        os.abort()
    if how == "exit":
        os._exit(3)
    ctypes.string_at(0)
"""
WAYS = {"kill": -signal.SIGKILL, "abort": -signal.SIGABRT, "segv": -signal.SIGSEGV, "exit": 3}


def names_in(ring):
    """The names of the stages, in the order of their beginnings."""
    return [ring.names[number] for number in numbers_of(ring.stages).tolist()]


@pytest.mark.parametrize("parts", ["1", "0"])
@pytest.mark.parametrize("how", WAYS)
def test_the_newest_stages_outlive_the_process(how, parts, run_python, tmp_path):
    """The newest is at most 50 ms old, each fits the one around it, and what ran when the process died is marked."""
    if parts == "1" and native is None:
        pytest.skip("the parts in C are not in use")
    done = run_python(DIES, how, "0.05", GPUSCOPE_NATIVE=parts)
    assert done.returncode == WAYS[how], done.stderr
    ring = read_flight(tmp_path / "flight")
    stages = ring.stages
    newest_ns = int((stages[:, 4] + (stages[:, 5] >> 2)).max())
    assert int(done.stdout) - newest_ns < 50e6
    assert not ring.ended_well
    assert not have_ended(stages)[names_in(ring).index("main")]
    known = {row[2]: (row, name) for row, name in zip(stages.tolist(), names_in(ring), strict=True)}
    for row, name in known.values():
        if name.startswith("inner") and row[3] in known:
            outer, its_name = known[row[3]]
            assert its_name == name.replace("inner", "request")
            assert outer[4] <= row[4]
            assert outer[:2] == row[:2]
    assert ring.torn <= 1


def test_the_next_process_keeps_what_the_dead_one_left(run_python, tmp_path):
    """Under a name that tells when it was written last."""
    run_python(DIES, "kill", "0.01")
    run_python("import gpuscope; gpuscope.enable(exporters='none', flight='flight')")
    ((at_s, reason, copied),) = copies(tmp_path / "flight")
    assert reason == "died"
    assert "main" in names_in(read_flight(copied))
    assert time.time() - at_s < 100
    assert read_flight(tmp_path / "flight").ended_well


SLOW_AND_DEAD = """
import os, signal
from pathlib import Path
import gpuscope
gpuscope.enable(exporters="none", flight="flight", flight_slow_s=0.001, interval_s=0.01)
os.utime("flight", (1e9, 1e9))
with gpuscope.stage("request"):
    for _ in range(10**6):
        pass
while not list(Path(".").glob("flight.slow-*Z")):
    os.sched_yield()
gpuscope.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_name_of_a_dead_one_tells_when_its_process_was_last_there(run_python, tmp_path):
    """Not when the file system saw it change: by that it would stand before its own copies, and go first."""
    before_s = time.time()
    done = run_python(SLOW_AND_DEAD)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run_python("import gpuscope; gpuscope.enable(exporters='none', flight='flight')")
    (_, first, slow), (at_s, second, died) = copies(tmp_path / "flight")
    assert (first, second) == ("slow", "died")
    assert before_s < at_s < time.time()
    assert slow.name.removeprefix("flight.slow-") <= died.name.removeprefix("flight.died-")


FORKS = """
import os, sys
import gpuscope
gpuscope.enable(exporters="none", flight="flight")
with gpuscope.stage("of the parent"):
    for number in range(3):
        child = os.fork()
        if not child:
            if number:
                with gpuscope.stage("of a child"):
                    with gpuscope.stage("inside"):
                        if number == 1:
                            os._exit(0)
                gpuscope.shutdown()
            os._exit(0)
        os.waitpid(child, 0)
        print(child)
with gpuscope.stage("after"):
    pass
os._exit(0)
"""


@pytest.mark.parametrize("parts", ["1", "0"])
def test_no_two_processes_write_one_ring(parts, run_python, tmp_path):
    """A child has a file of its own with its first stage, which goes if it ends well; without stages it has none."""
    done = run_python(FORKS, GPUSCOPE_NATIVE=parts)
    assert done.returncode == 0, done.stderr
    _, dies, _ = done.stdout.split()
    ((_, reason, copied),) = copies(tmp_path / "flight")  # The next child found it.
    assert {path.name for path in tmp_path.glob("flight*")} == {"flight", copied.name}
    parent, child = read_flight(tmp_path / "flight"), read_flight(copied)
    assert reason == "died"
    assert names_in(parent) == ["of the parent", "after"]
    assert names_in(child) == ["of a child", "inside"]
    assert not have_ended(child.stages).any()
    assert child.head["pid"] == int(dies)


FORKS_IN_C = """
import ctypes, os
import gpuscope
gpuscope.enable(exporters="none", flight="flight", interval_s=0.01)
if not ctypes.PyDLL(None).fork():  # Before there is a thread that would be missing in the child.
    with gpuscope.stage("child"):
        pass
    gpuscope.flush()
    gpuscope.shutdown()
    os._exit(0)
os.wait()
with gpuscope.stage("parent"):
    pass
os._exit(0)
"""


@pytest.mark.parametrize("parts", ["1", "0"])
def test_a_child_that_python_did_not_fork_writes_nothing(parts, run_python, tmp_path):
    """A library may fork by itself."""
    done = run_python(FORKS_IN_C, GPUSCOPE_NATIVE=parts)
    assert done.returncode == 0, done.stderr
    ring = read_flight(tmp_path / "flight")
    assert (names_in(ring), ring.ended_well) == (["parent"], False)


def test_workers_started_apart_have_files_of_their_own(tmp_path):
    """The first has the path, the second its id behind it."""
    program = (
        "import os, sys, gpuscope\n"
        "gpuscope.enable(exporters='none', flight='flight')\n"
        "with gpuscope.stage(sys.argv[1]):\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
        "gpuscope.shutdown()"
    )
    workers = []
    for number in range(2):
        command = [sys.executable, "-c", program, f"of {number}"]
        workers.append(
            subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert workers[-1].stdout.readline() == "ready\n"
    own = [tmp_path / "flight", tmp_path / f"flight.{workers[1].pid}"]
    assert [names_in(read_flight(path)) for path in own] == [["of 0"], ["of 1"]]
    for worker in workers:
        worker.communicate()
        assert worker.returncode == 0
    assert [path.exists() for path in own] == [True, False]
    assert os.getpid() not in {worker.pid for worker in workers}
