"""Memory by stage on a real GPU: byte for byte what PyTorch's allocator says of the same program alone."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext

import pytest
import torch

import gpuscope
from gpuscope._data.attributes import MEMORY_BEGIN, MEMORY_END, MEMORY_MALLOCS, MEMORY_PEAK, MEMORY_RETRIES
from gpuscope.analysis.verdict import judge
from gpuscope.testing import capture

MB = 1 << 20
PEAK = "allocated_bytes.all.peak"


@pytest.fixture(autouse=True)
def _fresh():
    """Each test begins with an empty cache, and peaks that are what there is."""
    program(nullcontext)  # cuBLAS takes its workspace.
    start_anew()


def start_anew():
    """Empty the cache: what it holds decides how much more than was asked for is given out."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def take(megabytes):
    """Take so much memory of the GPU."""
    return torch.empty(megabytes * MB, dtype=torch.uint8, device="cuda")


def program(around):
    """Nested stages: large and short, small and long, with what stays."""
    with around("request"):
        kept = take(20)
        with around("prefill"):
            for size in (64, 3, 17):
                take(size)
        with around("decode"):
            more = take(5)
            with around("sample"):
                take(1)
            with around("nothing"):
                pass
        with around("free"):
            del kept
            take(2)
        with around("kernels"):
            a = torch.randn(700, 700, device="cuda")
            (a @ a).softmax(0).sum()
        del more, a


class Alone:
    """What the allocator says of one stage: the program runs for it alone, and its peak is reset where that begins."""

    def __init__(self, wanted):
        self.wanted, self.found = wanted, None

    def __call__(self, name):
        return self._Block(self) if name == self.wanted else nullcontext()

    class _Block:
        def __init__(self, owner):
            self.owner = owner

        def __enter__(self):
            torch.cuda.reset_peak_memory_stats()
            self.begin = torch.cuda.memory_allocated()

        def __exit__(self, *_):
            self.owner.found = self.begin, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def of(span):
    """Begin, end and peak."""
    return tuple(span.attributes[name] for name in (MEMORY_BEGIN, MEMORY_END, MEMORY_PEAK))


def hosts(spans):
    """The host spans by name."""
    return {span.name: span for span in spans if span.kind == "host"}


def test_peaks_are_those_of_the_allocator_alone():
    """Each stage, nested or not, byte for byte."""
    expected = {}
    for name in ("request", "prefill", "decode", "sample", "nothing", "free", "kernels"):
        alone = Alone(name)
        start_anew()
        program(alone)
        expected[name] = alone.found
    start_anew()
    with capture() as spans:
        program(lambda name: gpuscope.stage(name, memory=True))
        gpuscope.flush(20)
    assert {name: of(span) for name, span in hosts(spans).items()} == expected
    assert expected["prefill"][2] - expected["prefill"][0] >= 64 * MB


def test_the_programs_own_statistics_are_unchanged():
    """All of them: `memory_stats` after the program is the same with stages and without."""
    seen = []
    for around in (nullcontext, lambda name: gpuscope.stage(name, memory=True)):
        start_anew()
        before = torch.cuda.memory_stats()
        with capture():
            program(around)
            after = torch.cuda.memory_stats()
            gpuscope.flush(20)
        seen.append(
            {
                name: value if name.endswith(("peak", "current")) else value - before[name]
                for name, value in after.items()
            }
        )
    assert seen[0] == seen[1]
    assert seen[0][PEAK] > 80 * MB


def test_the_programs_resets_are_its_own():
    """After `reset_peak_memory_stats` within a stage the program sees the peak since, and the stage its own."""
    with capture() as spans:
        with gpuscope.stage("request", memory=True):
            begin = torch.cuda.memory_allocated()
            take(50)
            torch.cuda.reset_peak_memory_stats()
            take(10)
            seen = torch.cuda.max_memory_allocated()
            with gpuscope.stage("inner", memory=True):
                pass
            assert torch.cuda.max_memory_allocated() == seen == begin + 10 * MB
        gpuscope.flush(20)
    assert of(hosts(spans)["request"])[2] == begin + 50 * MB


def test_mallocs_are_those_of_the_allocator():
    """What the cache has costs none; what it has not costs one."""
    with capture() as spans:
        with gpuscope.stage("first", memory=True):
            take(30)
        with gpuscope.stage("second", memory=True):
            take(30)
        gpuscope.flush(20)
    found = hosts(spans)
    assert found["first"].attributes[MEMORY_MALLOCS] == 1
    assert found["second"].attributes[MEMORY_MALLOCS] == 0
    assert found["first"].attributes[MEMORY_RETRIES] == 0


def test_threads_see_one_allocator():
    """The peak of a stage that waits includes what another thread took meanwhile."""
    entered, leave = threading.Event(), threading.Event()

    def wait():
        with gpuscope.stage("waits", memory=True):
            entered.set()
            leave.wait(20)

    with capture() as spans:
        thread = threading.Thread(target=wait)
        thread.start()
        entered.wait(20)
        with gpuscope.stage("takes", memory=True):
            take(40)
        leave.set()
        thread.join()
        gpuscope.flush(20)
    found = hosts(spans)
    assert of(found["waits"])[2] - of(found["waits"])[0] == 40 * MB
    assert of(found["takes"])[2] - of(found["takes"])[0] == 40 * MB


def test_out_of_memory_is_told_with_stage_request_and_peaks():
    """The report names the stage, the request, and who had most; the program goes on."""

    def serve():
        with gpuscope.stage("serve"):
            with gpuscope.stage("load", memory=True):
                kept = take(100)
            with gpuscope.stage("attend", memory=True):
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return kept

    with capture(memory=True) as spans:
        with pytest.raises(torch.OutOfMemoryError):
            serve()
        gpuscope.flush(20)
        said = [note for note in judge(spans.recording()).notes if "memory ran out" in note]
    assert len(said) == 1
    assert "in `attend` of request `serve`" in said[0]
    assert "Largest peaks: " in said[0]
    assert "`load`" in said[0]
    attributes = hosts(spans)["attend"].attributes
    assert attributes[MEMORY_RETRIES] >= 1
    take(1)


def test_it_does_not_wait_for_the_gpu():
    """With PyTorch's debug mode at `error` nothing of ours synchronises."""
    take(1)
    with capture() as spans:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                with gpuscope.stage("request", memory=True):
                    take(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        gpuscope.flush(20)
    assert len(hosts(spans)) == 1
