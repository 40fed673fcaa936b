"""
Hidden synchronisations on a real GPU: seeded programs are found at the right line, their clean twins are not.

The bytes are those that CUPTI saw copied.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import gpuscope
from gpuscope._data.attributes import SYNC_BYTES, SYNC_COUNT, SYNCS
from gpuscope._host.sync_warnings import debug_mode
from gpuscope.testing import capture

TO_HOST, TO_GPU = "device to host", "host to device"
N = 1000


class Tensors:
    """What the programs work with: on the GPU, pageable and pinned; made once."""

    def __init__(self):
        self.gpu = torch.arange(N, dtype=torch.float32, device="cuda")
        self.one = torch.ones((), device="cuda")
        self.number = torch.ones((), dtype=torch.int64, device="cuda")
        self.flags = torch.ones((), dtype=torch.bool, device="cuda")
        self.mask = self.gpu > N / 2
        self.pageable = torch.empty(N, dtype=torch.float32)
        self.pinned = torch.empty(N, dtype=torch.float32, pin_memory=True)
        self.other = torch.empty(N, dtype=torch.float32, device="cuda")
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def t():
    """The tensors, after everything in the programs has run once."""
    tensors = Tensors()
    for _, seeded, _, clean in PROGRAMS:
        seeded(tensors)
        clean(tensors)
    torch.cuda.synchronize()
    return tensors


PROGRAMS = [
    # Operation; the seeded program; direction, pinned and bytes; the clean twin.
    ("item", lambda t: t.one.item(), (TO_HOST, None, 4), lambda t: t.one * 2),
    ("bool", lambda t: t.gpu if t.flags else None, (TO_HOST, None, 1), lambda t: torch.where(t.flags, t.gpu, t.other)),
    ("float", lambda t: float(t.one), (TO_HOST, None, 4), lambda t: t.one.float()),
    ("int", lambda t: int(t.number), (TO_HOST, None, 8), lambda t: t.number.int()),
    ("tolist", lambda t: t.gpu.tolist(), (TO_HOST, False, 4 * N), lambda t: t.gpu.clone()),
    ("cpu", lambda t: t.gpu.cpu(), (TO_HOST, False, 4 * N), lambda t: t.gpu.to("cpu", non_blocking=True)),
    ("to", lambda t: t.gpu[::2].to("cpu"), (TO_HOST, False, 2 * N), lambda t: t.gpu[::2].to("cuda")),
    ("numpy", lambda t: t.gpu.numpy(force=True), (TO_HOST, False, 4 * N), lambda t: t.gpu.detach()),
    (
        "copy_",
        lambda t: t.pageable.copy_(t.gpu),
        (TO_HOST, False, 4 * N),
        lambda t: t.pinned.copy_(t.gpu, non_blocking=True),
    ),
    (
        "cuda",
        lambda t: t.pageable.cuda(),
        (TO_GPU, False, 4 * N),
        lambda t: t.pinned.cuda(non_blocking=True),
    ),
    (
        "to",
        lambda t: t.pageable.to("cuda", non_blocking=True),
        (TO_GPU, False, 4 * N),
        lambda t: t.pinned.to("cuda", non_blocking=True),
    ),
    (
        "copy_",
        lambda t: t.other.copy_(t.pinned),
        (TO_GPU, True, 4 * N),
        lambda t: t.other.copy_(t.pinned, non_blocking=True),
    ),
    (
        "to",
        lambda t: t.pageable.to("cuda", torch.float64),
        (TO_GPU, False, 8 * N),
        lambda t: t.pinned.to("cuda", torch.float64, non_blocking=True),
    ),
    (
        "to",
        lambda t: t.gpu.to("cpu", torch.float64),
        (TO_HOST, False, 4 * N),
        lambda t: t.gpu.to(torch.float64),
    ),
    ("nonzero", lambda t: t.gpu.nonzero(), ("", None, None), lambda t: t.gpu != 0),
    ("masked_select", lambda t: t.gpu.masked_select(t.mask), ("", None, None), lambda t: t.gpu * t.mask),
    ("synchronisation", lambda t: t.gpu[t.mask], ("", None, None), lambda t: torch.where(t.mask, t.gpu, t.other)),
    (
        "synchronisation",
        lambda t: torch.tensor([1.0], device="cuda"),
        ("", None, None),
        lambda t: torch.full((1,), 1.0, device="cuda"),
    ),
    ("synchronize", lambda t: torch.cuda.synchronize(), ("", None, None), lambda t: torch.cuda.current_stream()),
]
"""Where a type changes as well, what waits converts on the host: before it copies to the GPU, after it comes back."""


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_seeded_programs_are_found_and_their_twins_are_not(t, number):
    """At the line where it stands, with what was copied from where."""
    operation, seeded, (direction, pinned, size), clean = PROGRAMS[number]
    line = seeded.__code__.co_firstlineno
    with gpuscope.watch_syncs() as found:
        seeded(t)
    assert [(sync.file, sync.line, sync.operation) for sync in found] == [(__file__, line, operation)]
    (sync,) = found
    assert (sync.direction, sync.pinned, sync.bytes) == (direction, pinned, size)
    assert sync.calls == 1 or operation == "synchronisation"
    with gpuscope.watch_syncs() as found:
        for _ in range(3):
            clean(t)
    assert found == []


def test_bytes_are_those_that_cupti_sees(t, tmp_path):
    """In both directions, over all the programs whose bytes are known."""
    copies = [seeded for _, seeded, (_, _, size), _ in PROGRAMS if size is not None]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with gpuscope.watch_syncs() as found:
            for seeded in copies:
                seeded(t)
        torch.cuda.synchronize()
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [each for each in json.loads(path.read_text())["traceEvents"] if each.get("cat") == "gpu_memcpy"]
    for direction, word in ((TO_HOST, "DtoH"), (TO_GPU, "HtoD")):
        seen = [each["args"]["bytes"] for each in events if word in each["name"]]
        known = [sync.bytes for sync in found if sync.direction == direction]
        assert sorted(seen) == sorted(known), direction
    assert len(found) == len(copies)


def test_what_the_program_had_is_put_back(t):
    """The debug mode, and who shows warnings; a wait after the watch is silent."""
    before = debug_mode(), warnings.showwarning, list(warnings.filters), dict(vars(torch.Tensor))
    with gpuscope.watch_syncs():
        assert debug_mode() == 1
        t.one.item()
    assert (debug_mode(), warnings.showwarning, list(warnings.filters), dict(vars(torch.Tensor))) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t.one.item()


def test_stages_have_them(t):
    """The innermost stage says which lines waited in it."""
    with capture() as spans:
        with gpuscope.watch_syncs(), gpuscope.stage("request"), gpuscope.stage("decode"):
            for _ in range(3):
                t.one.item()
            t.gpu[t.mask].size()
        gpuscope.flush(20)
    told = next(span.attributes for span in spans if span.name == "decode" and span.kind == "host")
    assert told[SYNC_COUNT] >= 4
    assert told[SYNC_BYTES] == 12
    assert [text.rpartition(":")[2].partition(" ")[2].split()[0] for text in told[SYNCS]] == ["item", "synchronisation"]


def test_a_capture_goes_on_under_the_watch(t):
    """Nothing is noted in it, and its replay computes what it would."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    out = torch.empty(N, dtype=torch.float32, device="cuda")
    t.pinned.fill_(3.0)
    with gpuscope.watch_syncs() as found:
        with torch.cuda.graph(graph, stream=stream):
            out.copy_(t.pinned, non_blocking=True)
            out.mul_(2)
        graph.replay()
    # PyTorch synchronises before it captures.
    assert {sync.operation for sync in found} <= {"synchronize", "synchronisation"}
    assert torch.all(out == 6.0).item()


def test_compiling_goes_on_under_the_watch(t):
    """As a whole, and with equal results."""
    torch._dynamo.reset()

    def f(x):
        return (x.to(torch.float64) * 2).sum()

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    with gpuscope.watch_syncs() as found:
        result = compiled(t.gpu)
    assert found == []
    assert torch.equal(result, f(t.gpu))
    torch._dynamo.reset()
