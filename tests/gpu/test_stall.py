"""
Stalls on a GPU: a kernel that spins, a launch queue full behind it, one stream of four, a call that keeps the GIL.

One program has them one after another, each with its own part of the file that says it. It takes some 45 s.
"""

from __future__ import annotations

import json
import re

import pytest

PROGRAM = """
import ctypes, json, os, threading, time, traceback
import torch, gpuscope

gpuscope.enable(
    exporters="file", file=os.environ["SPANS"], metrics="none", stall="2s", interval_s=0.5, queue_size=16_384,
    file_max_bytes=1 << 30,
)
stage, pause = gpuscope.stage, threading.Event()
tensor = torch.ones(1 << 16, device="cuda")
usleep = ctypes.PyDLL(None).usleep

def path():
    return gpuscope._runtime.state.engine.recorder.stalls.path

def text():
    return open(path()).read() if os.path.exists(path()) else ""

def rate():
    for cycles in (10_000_000, 400_000_000):  # The first has the clocks go up.
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
    return cycles / begin.elapsed_time(end) * 1e3

cycles_per_s = rate()

def spin(seconds):
    torch.cuda._sleep(int(cycles_per_s * seconds))

def wait_for(condition, limit_s):
    before = time.monotonic()
    while not condition() and time.monotonic() - before < limit_s:
        pause.wait(0.01)
    return time.monotonic() - before

def stalls():
    return dict(gpuscope.statistics().stalls)

for _ in range(6):  # After the warm-up.
    for name in ("left", "waits", "request", "op", "stuck", "healthy", "keeps", "loop"):
        with stage(name):
            tensor.add_(0)
torch.cuda.synchronize()
gpuscope.flush()
found = {}

def left():
    with stage("left"):
        spin(6)
    took = wait_for(stalls, 5)
    torch.cuda.synchronize()
    return took

def waits():
    with stage("waits"):
        spin(4.5)
        torch.cuda.synchronize()

def full_queue():
    with stage("request"):
        spin(4.5)
        for _ in range(3000):
            with stage("op"):
                tensor.add_(0)
        torch.cuda.synchronize()

def streams():
    stuck, *healthy = [torch.cuda.Stream() for _ in range(4)]
    with torch.cuda.stream(stuck):
        with stage("stuck"):
            spin(4.5)
    until = time.monotonic() + 4
    while time.monotonic() < until:
        for stream in healthy:
            with torch.cuda.stream(stream):
                with stage("healthy"):
                    tensor.add_(0)
        pause.wait(0.005)
    torch.cuda.synchronize()
    return [hex(stream.cuda_stream) for stream in (stuck, *healthy)]

def keeps_the_gil():
    with stage("keeps"):
        spin(0.4)
        usleep(5_000_000)

def normal():
    graph, static = torch.cuda.CUDAGraph(), tensor.clone()
    with torch.cuda.graph(graph):
        static.add_(0)
    until = time.monotonic() + 3
    with stage("loop"):
        while time.monotonic() < until:
            with stage("request"):
                graph.replay()
                tensor.add_(0)
                torch.cuda.synchronize()
            pause.wait(0.002)

for run in (left, waits, full_queue, streams, keeps_the_gil, normal):
    before, size = stalls(), len(text())
    try:
        more = run()
    except Exception:
        more = traceback.format_exc()
    torch.cuda.synchronize()
    pause.wait(0.7)  # The watch may have something to say yet.
    gpuscope.flush()
    now = stalls()
    found[run.__name__] = {
        "stalls": {kind: now[kind] - before.get(kind, 0) for kind in now if now[kind] > before.get(kind, 0)},
        "text": text()[size:],
        "more": more,
    }
gpuscope.flush()
account = gpuscope.statistics()
found["account"] = {
    "recorded": account.recorded, "exported": account.exported, "pending": account.pending,
    "dropped": account.dropped, "lost": account.lost, "untimed": account.untimed,
}
print(json.dumps(found))
"""
LIMIT_S = 2.0


@pytest.fixture(scope="module")
def seen(run_program, tmp_path_factory):
    """What the program saw of each stall, with the spans that it exported."""
    folder = tmp_path_factory.mktemp("stalls")
    found = run_program(PROGRAM, SPANS=str(folder / "spans.jsonl"), TMPDIR=str(folder))
    found["spans"] = (folder / "spans.jsonl").read_text()
    return found


def after_s(text):
    """After how many seconds without progress each stall was said."""
    return [float(found) for found in re.findall(r"for (\d+\.\d) s \(limit 2\.0 s\)", text)]


def test_a_kernel_that_spins_after_the_host_has_left(seen):
    """The GPU is not done: stage, GPU and stream, within the limit and a second."""
    left = seen["left"]
    assert left["stalls"] == {"gpu_not_done": 1}, left
    assert left["more"] < LIMIT_S + 1.2
    assert "the host has left stage left, and the GPU is not done" in left["text"]
    assert "GPU 0, stream 0x" in left["text"]
    assert "last done there: " in left["text"]


def test_the_host_waits_for_a_kernel_that_spins(seen):
    """The host never left; what is known of its stream stands there."""
    waits = seen["waits"]
    assert waits["stalls"] == {"host_never_left": 1}, waits
    assert "the host has not left stage waits" in waits["text"]
    assert LIMIT_S <= after_s(waits["text"])[0] <= LIMIT_S + 1.1
    assert "GPU 0, stream 0x" in waits["text"]


def test_a_full_launch_queue_behind_it(seen):
    """The host is kept in a launch or an event, with the GIL or without it: it is found in time all the same."""
    full = seen["full_queue"]
    assert full["more"] is None, full
    assert full["stalls"].get("host_never_left") == 1, full
    host = [line for line in full["text"].splitlines() if line.startswith("host_never_left")]
    assert re.search("the host has not left stage (op|request),", host[0]), host
    assert LIMIT_S <= after_s(host[0])[0] <= LIMIT_S + 1.1


def test_a_stuck_stream_beside_three_healthy_ones(seen):
    """It alone is named as stuck; of each of the others it is said what it does."""
    streams = seen["streams"]
    assert streams["stalls"] == {"gpu_not_done": 1}, streams
    stuck, *healthy = streams["more"]
    assert "the host has left stage stuck, and the GPU is not done" in streams["text"]
    assert f"GPU 0, stream {stuck}" in streams["text"]
    for each in healthy:
        assert f"beside it GPU 0, stream {each}: " in streams["text"], streams["text"]


def test_a_call_that_keeps_the_gil(seen):
    """The thread in C says it while the call lasts: the GPU is done, and the host is not back."""
    keeps = seen["keeps_the_gil"]
    assert keeps["stalls"] == {"host_not_back": 1}, keeps
    in_c, _, in_python = keeps["text"].partition("stacks follow")
    assert "a call keeps the GIL" in in_c
    assert "host_not_back: the GPU has done the work of stage keeps" in in_c
    assert LIMIT_S <= after_s(in_c)[0] <= LIMIT_S + 1.1
    assert "a call kept the GIL" in in_python
    assert "in keeps_the_gil" in in_python


def test_normal_load_is_no_stall(seen):
    """A capture, replays, requests one after another, and a stage around all of them."""
    assert seen["normal"] == {"stalls": {}, "text": "", "more": None}


def test_the_program_goes_on_and_the_account_balances(seen):
    """Every stage is exported, the stalled ones with an event."""
    account = seen["account"]
    missing = sum(account["dropped"].values()) + sum(account["lost"].values())
    assert account["recorded"] == account["exported"] + missing + account["pending"]
    assert (account["pending"], missing) == (0, 0), account
    spans = [json.loads(line) for line in seen["spans"].splitlines()]
    assert len(spans) > 1
    assert seen["spans"].count('"name":"gpuscope.stall"') >= 5
