"""Streams asked thousands of times a second: what they say is right, and nothing of the program breaks."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import gpuscope
from gpuscope import _runtime
from gpuscope._data.native import native
from gpuscope.testing import capture

pytestmark = pytest.mark.skipif(not hasattr(native, "StreamSampler"), reason="nothing is asked without the parts in C")
MOST_HZ = 5000.0
pause = threading.Event()


@pytest.fixture
def matrices():
    """Two matrices of which a product takes some milliseconds, and room for it; one has been made."""
    a = torch.randn(6144, 6144, device="cuda").half()
    out = torch.mm(a, a)
    torch.cuda.synchronize()
    return a, out


def share_of(spans, *names):
    """In which part of the samples of some stages the stream had work, and how many there were."""
    sampled = [
        (span.attributes["gpuscope.gpu.samples"], span.attributes["gpuscope.gpu.had_work"])
        for span in spans
        if "gpuscope.gpu.samples" in span.attributes and span.attributes["gpuscope.stage"] in names
    ]
    count = sum(samples for samples, _ in sampled)
    return sum(samples * share for samples, share in sampled) / max(1, count), count


def loop(seconds, request):
    """Run requests for a while."""
    for _ in range(5):
        request()
    torch.cuda.synchronize()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        request()


def test_a_loop_that_the_gpu_bounds_is_busy(matrices):
    """The stream has work nearly always when it is asked."""
    a, out = matrices

    def request():
        with gpuscope.stage("request"), gpuscope.stage("infer"):
            for _ in range(8):
                torch.mm(a, a, out=out)
            out[0, 0].item()

    with capture(sample_hz=1000.0, warmup=5) as spans:
        loop(1.5, request)
        assert gpuscope.flush(20)
        account, table = gpuscope.statistics(), gpuscope.summary()
    share, count = share_of(spans, "request", "infer")
    assert count > 300
    assert share > 0.9
    assert account.samples["asked"] >= count
    assert account.samples.get("errors", 0) == 0
    (busy,) = (stage.busy for stage in table.stages if stage.name == "request")
    assert busy.share > 0.9
    assert busy.low < busy.share <= busy.high


def test_a_loop_that_mostly_sleeps_is_not(matrices):
    """The stage is open on the stream all the time, and events could not tell."""
    a, out = matrices

    def request():
        with gpuscope.stage("request"):
            torch.mm(a[:512, :512], a[:512, :512], out=out[:512, :512])
            pause.wait(0.004)

    with capture(sample_hz=1000.0, warmup=5) as spans:
        loop(1.5, request)
        assert gpuscope.flush(20)
    share, count = share_of(spans, "request")
    assert count > 300
    assert share < 0.4


def test_each_of_two_streams_has_its_own_answers(matrices):
    """One that works and one that waits, at the same time."""
    a, out = matrices
    busy, idle = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (busy, idle):
        stream.wait_stream(torch.cuda.current_stream())
    with capture(sample_hz=2000.0, warmup=0) as spans:
        for _ in range(30):
            with torch.cuda.stream(idle), gpuscope.stage("idle"):
                with torch.cuda.stream(busy), gpuscope.stage("busy"):
                    for _ in range(4):
                        torch.mm(a, a, out=out)
                busy.synchronize()
        assert gpuscope.flush(20)
    assert share_of(spans, "busy")[0] > 0.9
    assert share_of(spans, "busy")[1] > 50
    assert share_of(spans, "idle")[0] < 0.3


def test_captures_survive(until):
    """Hundreds of graphs are captured and replayed right while streams are asked 5,000 times a second."""
    x, y = torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")
    torch.mul(x, 2, out=y)
    y.add_(1)
    torch.cuda.synchronize()
    over = threading.Event()

    def side():
        buffer = torch.zeros(1024, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            while not over.wait(0.0002):
                with gpuscope.stage("side"):
                    buffer.add_(1)

    with capture(sample_hz=MOST_HZ, interval_s=0.002) as spans:
        thread = threading.Thread(target=side)
        thread.start()
        sampling = _runtime.state.engine.recorder.device.sampling
        until(lambda: sampling.counts().get("asked"), "the first answers")
        try:
            for number in range(400):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph), gpuscope.stage("inside"):
                    torch.mul(x, 2, out=y)
                    with gpuscope.stage("nested inside"):
                        y.add_(1)
                with gpuscope.stage("around"):
                    x.fill_(number)
                    graph.replay()
                assert y.unique().tolist() == [2 * number + 1]
        finally:
            over.set()
            thread.join(30)
        counts = sampling.counts()
        assert gpuscope.flush(20)
    assert counts["captures"] > 0
    assert counts["asked"] > 100
    assert counts["errors"] == 0
    assert sum(span.kind == "gpu" and span.name == "nested inside [gpu]" for span in spans) == 400


def test_a_capture_on_a_stream_that_has_been_asked_about(until):
    """The very stream of stages is captured again and again, with the modes that PyTorch knows."""
    x, stream = torch.zeros(1024, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with capture(sample_hz=MOST_HZ, interval_s=0.002), torch.cuda.stream(stream):
        x.add_(1)
        for number in range(300):
            mode = ("global", "thread_local", "relaxed")[number % 3]
            with gpuscope.stage("plain"):
                x.add_(1)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode), gpuscope.stage("inside"):
                x.add_(1)
            graph.replay()
        sampling = _runtime.state.engine.recorder.device.sampling
        until(lambda: sampling.counts()["asked"] > 100, "answers")
        assert sampling.counts()["errors"] == 0
    torch.cuda.synchronize()
    assert x.unique().tolist() == [601.0]


STREAMS = """
import ctypes, json, threading
import torch
import gpuscope
from gpuscope.testing import capture

cuda, x = ctypes.CDLL("libcuda.so.1"), torch.zeros(1 << 20, device="cuda")
torch.cuda.synchronize()
pause = threading.Event()
with capture(interval_s=0.01, sample_hz=5000.0) as spans:
    for i in range(300):
        raw = ctypes.c_void_p()
        assert cuda.cuStreamCreate(ctypes.byref(raw), 1) == 0
        external = torch.cuda.ExternalStream(raw.value)
        with gpuscope.stage("ours"):
            x.add_(1)
        torch.cuda.synchronize()
        with torch.cuda.stream(external), gpuscope.stage("outside"):
            x.add_(1)
        external.synchronize()
        assert cuda.cuStreamDestroy_v2(raw) == 0
        if i % 10 == 0:
            pause.wait(0.01)
    flushed, samples = gpuscope.flush(10), gpuscope.statistics().samples
outside = sum("gpuscope.gpu.samples" in span.attributes for span in spans if span.name == "outside [gpu]")
print(json.dumps([flushed, samples["asked"] > 100, samples.get("errors", 0), outside, x.eq(600).all().item()]))
"""


def test_streams_of_other_libraries_come_and_go_unasked(run_program):
    """A question about one that is gone would end the process."""
    assert run_program(STREAMS, timeout_s=100) == [True, True, 0, 0, True]


FORK = """
import json, os, torch, gpuscope
from pathlib import Path

def threads():
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:
            pass
    return names.count("gpuscope-sample")

x = torch.ones(1024, device="cuda")
def run(name, count, use):
    for _ in range(count):
        with gpuscope.stage(name):
            use()
run("parent", 50, lambda: x.add_(1))
found = []
for _ in range(20):
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        run("child", 5, lambda: None)
        os.write(there, json.dumps([threads(), gpuscope.flush(20)]).encode())
        gpuscope.shutdown(20)
        os._exit(0)
    os.close(there)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found.append([code, *json.loads(os.read(here, 4096))])
    os.close(here)
    run("parent", 50, lambda: x.add_(1))
alive = threads()
gpuscope.flush(20)
samples = gpuscope.statistics().samples
gpuscope.disable()
print(json.dumps([found, alive, threads(), samples["asked"] > 0, samples.get("errors", 0)]))
"""


def test_forked_children_have_no_such_thread(run_program, tmp_path):
    """They record and end as ever; the parent's thread goes on, until recording is off."""
    found, alive, after, asked, errors = run_program(
        FORK,
        GPUSCOPE="1",
        GPUSCOPE_SAMPLE_HZ="5000",
        GPUSCOPE_EXPORTER="file",
        GPUSCOPE_FILE=str(tmp_path / "spans-{pid}.jsonl"),
    )
    assert found == [[0, 0, True]] * 20
    assert (alive, after, asked, errors) == (1, 0, True, 0)


EXIT = """
import json, os, sys, threading, torch, gpuscope
x = torch.ones(1024, device="cuda")
def work():
    for _ in range(300):
        with gpuscope.stage("infer"):
            x.add_(1)
work()
torch.cuda._sleep(20_000_000)
print(json.dumps("done"))
sys.stdout.flush()
"""
ENDS = {
    "return": "",
    "exit": "sys.exit(0)",
    "from a thread": "threading.Thread(target=work).start()",
    "after a shutdown": "gpuscope.shutdown()",
    "while off": "gpuscope.disable()",
    "by libc": "import ctypes; ctypes.CDLL(None).exit(0)",
    "at once": "os._exit(0)",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_while_it_is_asked(run_program, end, tmp_path):
    """In whatever way, three at once, with work on the GPU: the exit code is 0, and nobody waits for long."""

    def run(_):
        began = time.monotonic()
        said = run_program(
            EXIT + ENDS[end],
            timeout_s=100,
            GPUSCOPE="1",
            GPUSCOPE_SAMPLE_HZ="5000",
            GPUSCOPE_EXPORTER="file",
            GPUSCOPE_FILE=str(tmp_path / "spans-{pid}.jsonl"),
        )
        return said, time.monotonic() - began

    with ThreadPoolExecutor() as pool:
        for said, took_s in pool.map(run, range(3)):
            assert said == "done"
            assert took_s < 60


def test_the_file_has_the_counts(tmp_path, matrices):
    """So that reports have them: a whole number, and a part of one."""
    a, out = matrices
    path = tmp_path / "spans.jsonl"
    gpuscope.enable(exporters="file", file=str(path), sample_hz=2000.0)
    for _ in range(20):
        with gpuscope.stage("infer"):
            for _ in range(4):
                torch.mm(a, a, out=out)
            out[0, 0].item()
    gpuscope.shutdown()
    found = [
        {each["key"]: each["value"] for each in span["attributes"]}
        for line in path.read_text().splitlines()
        for resource in json.loads(line).get("resourceSpans", ())
        for span in resource["scopeSpans"][0]["spans"]
    ]
    sampled = [said for said in found if "gpuscope.gpu.samples" in said]
    assert sampled
    for said in sampled:
        assert int(said["gpuscope.gpu.samples"]["intValue"]) >= 1
        assert 0 <= said["gpuscope.gpu.had_work"]["doubleValue"] <= 1
