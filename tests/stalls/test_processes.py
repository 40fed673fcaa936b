"""Processes that stall, on a CPU alone: a lock, a call that keeps the GIL, forks, ends, and normal load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpuscope._data.native import native

in_c = pytest.mark.skipif(not hasattr(native, "StallWatch"), reason="needs the parts in C")
BEGIN = """
import ctypes, json, os, sys, threading, time
import gpuscope
gpuscope.enable(exporters="none", metrics="none", stall="500ms", warmup=1)
usleep = ctypes.PyDLL(None).usleep
pause = threading.Event()
def request(wait=lambda: None):
    with gpuscope.stage("request"):
        with gpuscope.stage("infer"):
            wait()
for _ in range(3):
    request()
def path():
    return gpuscope._runtime.state.engine.recorder.stalls.path
def stalls():
    return gpuscope.statistics().stalls
def end(**more):
    gpuscope.flush()
    found = gpuscope.statistics()
    text = open(path()).read() if os.path.exists(path()) else ""
    balance = found.recorded == found.exported + sum(found.dropped.values()) + sum(found.lost.values()) + found.pending
    print(json.dumps({"stalls": found.stalls, "text": text, "balance": balance, "recorded": found.recorded, **more}))
"""


@pytest.fixture
def run(run_python, tmp_path):
    """Return a function that runs a program which stalls, and returns what it says at its end."""

    def run(program, *arguments, **environment):
        done = run_python(BEGIN + program, *arguments, TMPDIR=str(tmp_path), **environment)
        assert done.returncode == 0, done.stderr
        return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}

    return run


@pytest.mark.parametrize("parts", ["1", "0"])
def test_a_thread_that_waits_for_a_lock(run, parts):
    """The host never left: which stage, on which thread, and where it is; and the program goes on."""
    said = run(
        """
lock = threading.Lock()
lock.acquire()
def waits_for_ever():
    lock.acquire(timeout=20)
thread = threading.Thread(target=request, args=(waits_for_ever,), name="worker-1")
before = time.monotonic()
thread.start()
while not stalls():
    assert time.monotonic() - before < 15
    pause.wait(0.01)
took = time.monotonic() - before
lock.release()
thread.join()
end(took=took)
""",
        GPUSCOPE_NATIVE=parts,
    )
    assert said["stalls"] == {"host_never_left": 1}
    assert said["took"] < 1.5 + 1  # Slow machines.
    assert said["text"].count("---- stall") == 1
    assert "in waits_for_ever" in said["text"]
    assert "host_never_left: the host has not left stage infer" in said["log"]
    assert "thread worker-1" in said["log"]
    assert said["balance"]
    assert said["recorded"] == 8


@in_c
def test_a_call_that_keeps_the_gil(tmp_path):
    """No thread of Python can say it: the thread in C does, within the limit and a second, while the call lasts."""
    program = tmp_path / "program.py"
    back = tmp_path / "back"
    program.write_text(
        BEGIN
        + f"""
print(path(), flush=True)
request(lambda: usleep(3_000_000))
open({str(back)!r}, "w").close()
while not stalls():
    pause.wait(0.01)
end()
"""
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    process = subprocess.Popen(
        [sys.executable, str(program)], env={**kept, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    path = Path(process.stdout.readline().strip())
    before, pause = time.monotonic(), threading.Event()
    while not path.exists() or "stacks follow" not in path.read_text():
        assert time.monotonic() - before < 20
        pause.wait(0.005)
    took_s, was_back, text = time.monotonic() - before, back.exists(), path.read_text()
    said = json.loads(process.communicate(timeout=60)[0].splitlines()[-1])
    assert not was_back
    assert took_s < 1.5 + 0.5
    assert "a call keeps the GIL" in text
    assert "host_never_left: the host has not left stage infer" in text
    assert "request, thread MainThread" in text
    assert said["stalls"] == {"host_never_left": 1}
    assert "a call kept the GIL" in said["text"]
    assert "the main thread, as it let go of the GIL" in said["text"]
    assert "in <lambda>" in said["text"].partition("as it let go of the GIL")[2].partition("stacks of all")[0]
    assert oct(path.stat().st_mode & 0o777) == "0o600"


@in_c
def test_the_thread_in_c_follows_no_link(run, tmp_path):
    """The stall is counted and logged all the same, and it is said that there is no file."""
    (tmp_path / "theirs").write_text("theirs")
    said = run(
        """
os.symlink("theirs", path())
request(lambda: usleep(1_500_000))
while not stalls():
    pause.wait(0.01)
end()
"""
    )
    assert said["stalls"] == {"host_never_left": 1}
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert "no file could be written" in said["log"]


@pytest.mark.parametrize("parts", ["1", "0"])
def test_normal_load_is_no_stall(run, parts):
    """Threads that run stages all the time, some of them long, and one around all of them."""
    said = run(
        """
until = time.monotonic() + 3
def serve(long):
    with gpuscope.stage("loop"):
        while time.monotonic() < until:
            request(lambda: pause.wait(0.2 if long else 0))
threads = [threading.Thread(target=serve, args=(number == 0,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
end()
""",
        GPUSCOPE_NATIVE=parts,
    )
    assert said["stalls"] == {}
    assert said["text"] == ""
    assert said["balance"]


@pytest.mark.parametrize("parts", ["1", "0"])
def test_a_child_looks_for_itself(run, parts):
    """A fork in the middle of a stage: the parent's stages are not the child's, and each has its own file."""
    said = run(
        """
import signal
with gpuscope.stage("of the parent"):
    child = os.fork()
    if not child:
        for _ in range(3):
            request()
        waits = threading.Thread(target=request, args=(lambda: pause.wait(20),), daemon=True)
        waits.start()
        while not stalls():
            pause.wait(0.01)
        with open("child", "w") as file:
            file.write(json.dumps([stalls(), path()]))
        os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
end(child=json.load(open("child")), own=path())
""",
        GPUSCOPE_NATIVE=parts,
    )
    stalls, path = said["child"]
    assert stalls == {"host_never_left": 1}
    assert path != said["own"]
    assert said["stalls"] == {}


def test_switched_off_and_on(run):
    """While recording is off nobody looks, and no thread is there."""
    said = run(
        """
def threads():
    found = [each.name for each in threading.enumerate()]
    for each in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{each}/comm") as file:
            found.append("in C: " + file.read().strip())
    return [name for name in found if name in ("gpuscope-stalls", "in C: gpuscope-stall")]
until = time.monotonic() + 10
before = threads()
gpuscope.disable()
while threads() and time.monotonic() < until:
    pause.wait(0.01)
off = threads()
request(lambda: pause.wait(1))
gpuscope.enable()
request()
thread = threading.Thread(target=request, args=(lambda: pause.wait(20),), daemon=True)
thread.start()
while not stalls() and time.monotonic() < until + 10:
    pause.wait(0.01)
from gpuscope._data.native import native
end(before=len(before), off=off, again=len(threads()), wanted=2 if hasattr(native, "StallWatch") else 1)
sys.stdout.flush()
os._exit(0)
"""
    )
    assert said["before"] == said["again"] == said["wanted"]
    assert said["off"] == []
    assert said["stalls"] == {"host_never_left": 1}


def test_what_is_not_wanted_is_not_there(run_python):
    """Without the setting nothing of it is imported, and no thread looks."""
    done = run_python(
        "import sys, threading, gpuscope\n"
        "gpuscope.enable(exporters='none', metrics='none')\n"
        "with gpuscope.stage('infer'): pass\n"
        "assert not [name for name in sys.modules if name.startswith('gpuscope._stalls')]\n"
        "assert not [each for each in threading.enumerate() if 'stall' in each.name]\n"
        "assert gpuscope.statistics().stalls == {}\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


ENDS = {
    "return": "",
    "exit": "sys.exit(0)",
    "in a stage": "gpuscope.stage('open').__enter__()",
    "after a shutdown": "gpuscope.shutdown()",
    "while off": "gpuscope.disable()",
    "on and off": "for _ in range(50): gpuscope.disable(); gpuscope.enable(); request()",
    "anew": "for n in range(10):\n gpuscope.enable(exporters='none', metrics='none', stall=f'{n + 1}s'); request()",
    "by libc": "ctypes.CDLL(None).exit(0)",
    "at once": "os._exit(0)",
    "in a child": "pid = os.fork()\nif pid: sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\nrequest()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_as_it_would(run_python, end):
    """Its exit code is its own, and nothing is said."""
    done = run_python(BEGIN + "print('done', flush=True)\n" + ENDS[end])
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_end_waits_for_nobody(run):
    """The watch ends within milliseconds."""
    said = run(
        """
took = []
for _ in range(20):
    before = time.perf_counter()
    gpuscope.disable()
    took.append(time.perf_counter() - before)
    gpuscope.enable()
    pause.wait(0.01)
end(took=sorted(took)[10])
"""
    )
    assert said["took"] < 0.02
