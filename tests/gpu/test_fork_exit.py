"""Forks after CUDA, and exits while the GPU hangs."""

from __future__ import annotations

import json

FORK = """
import gc, json, multiprocessing, os, sys, torch, gpuscope
x = torch.ones(1024, device="cuda")
def run(name, count, use):
    for _ in range(count):
        with gpuscope.stage(name):
            use()
def account():
    s = gpuscope.statistics()
    return [s.recorded, s.exported, s.pending, s.dropped, s.lost, s.untimed]
def child(to):
    run("child", 5, lambda: None)
    flushed = gpuscope.flush(20)
    gc.collect()
    os.write(to, json.dumps([flushed, account()]).encode())
    gpuscope.shutdown(20)
def forked(way):
    here, there = os.pipe()
    if way == "os.fork":
        pid = os.fork()
        if pid == 0:
            child(there)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else:
        process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
        process.start()
        process.join(60)
        code = process.exitcode
    os.close(there)
    return [code, json.loads(os.read(here, 65536))]
run("parent", 50, lambda: x.add_(1))
children = [forked("os.fork"), forked("multiprocessing")]
run("parent", 50, lambda: x.add_(1))
flushed = gpuscope.flush(20)
print(json.dumps([children, flushed, account()]))
"""

HUNG = """
import json, os, time, torch, gpuscope
torch.cuda._sleep(1)
torch.cuda.synchronize()
with gpuscope.stage("fine"):
    torch.cuda._sleep(1000)
torch.cuda.synchronize()
assert gpuscope.flush(20)
with gpuscope.stage("hung"):
    torch.cuda._sleep(16_000_000_000)
start = time.monotonic()
flushed = gpuscope.flush(0.5)
flush_s = time.monotonic() - start
start = time.monotonic()
gpuscope.shutdown()
shutdown_s = time.monotonic() - start
s = gpuscope.statistics()
print(json.dumps([flushed, flush_s, shutdown_s, [s.recorded, s.exported, s.pending, s.dropped, s.lost, s.untimed]]))
import sys
sys.stdout.flush()
os._exit(0)  # the driver's own teardown would wait for the kernel
"""


def spans_by_file(folder):
    """The names of the spans in each file that the `file` exporter wrote."""
    found = {}
    for path in folder.glob("spans-*"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        scopes = [
            scope for line in lines for resource in line.get("resourceSpans", ()) for scope in resource["scopeSpans"]
        ]
        found[path.name] = [span["name"] for scope in scopes for span in scope["spans"]]
    return found


def test_a_fork_after_cuda_is_clean_on_both_sides(run_program, tmp_path):
    """
    A child forked after CUDA's start records host spans and exits with 0; the parent goes on with GPU times.

    The child survives a garbage collection, and neither exports the other's stages.
    """
    children, flushed, account = run_program(
        FORK, GPUSCOPE="1", GPUSCOPE_EXPORTER="file", GPUSCOPE_FILE=str(tmp_path / "spans-{pid}.jsonl")
    )
    for code, (child_flushed, child_account) in children:
        assert code == 0
        assert child_flushed is True
        assert child_account == [5, 5, 0, {}, {}, {}]
    assert flushed is True
    assert account == [100, 100, 0, {}, {}, {}]
    names = sorted(spans_by_file(tmp_path).values(), key=len)
    assert names[:2] == [["child"] * 5, ["child"] * 5]
    assert sorted(names[2]) == ["parent"] * 100 + ["parent [gpu]"] * 100


def test_a_hung_stream_holds_nothing_up(run_program, tmp_path):
    """
    While a kernel runs on and on, `flush` and `shutdown` return within their deadlines.

    The stage around the kernel is exported with host times only.
    """
    flushed, flush_s, shutdown_s, account = run_program(
        HUNG,
        GPUSCOPE="1",
        GPUSCOPE_EXPORTER="file",
        GPUSCOPE_FILE=str(tmp_path / "spans-{pid}.jsonl"),
        GPUSCOPE_SHUTDOWN_TIMEOUT="1",
    )
    assert flushed is False
    assert flush_s < 1.5
    assert shutdown_s < 2
    assert account == [2, 2, 0, {}, {}, {"given_up": 1}]
    (names,) = spans_by_file(tmp_path).values()
    assert sorted(names) == ["fine", "fine [gpu]", "hung"]
