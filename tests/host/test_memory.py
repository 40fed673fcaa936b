"""Memory by stage, on an allocator that is made of Python and behaves as PyTorch's does."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuscope
from gpuscope import stage
from gpuscope._data.attributes import MEMORY_BEGIN, MEMORY_END, MEMORY_MALLOCS, MEMORY_PEAK, MEMORY_RETRIES, OF_ONE_RUN
from gpuscope._host import memory
from gpuscope._host.memory import Peaks, Probe
from gpuscope._recording.state import state
from gpuscope.testing import capture

torch = pytest.importorskip("torch")
KINDS = ("allocated_bytes", "reserved_bytes")


class Allocator:
    """Two devices; each statistic has what is current and its peak since the last reset."""

    def __init__(self, *, counts=True):
        self.counts = counts
        self.current = [dict.fromkeys(KINDS, 0) for _ in range(2)]
        self.peak = [dict.fromkeys(KINDS, 0) for _ in range(2)]
        self.mallocs, self.retries, self.device = [0, 0], [0, 0], 0

    def give(self, size, device=0):
        """Give out so many bytes, or take them back."""
        for kind in KINDS:
            if kind == KINDS[0] or size > 0:  # What is reserved stays.
                self.current[device][kind] += size
                self.peak[device][kind] = max(self.peak[device][kind], self.current[device][kind])
        self.mallocs[device] += size > 0

    def statistics(self, device):
        """As `torch._C._cuda_memoryStats` returns them."""
        found = {
            kind: {"all": {"current": self.current[device][kind], "peak": self.peak[device][kind], "allocated": 5}}
            for kind in KINDS
        }
        found["num_alloc_retries"] = self.retries[device]
        if self.counts:
            found["num_device_alloc"] = self.mallocs[device]
        else:
            found["segment"] = {"all": {"current": 0, "peak": 0, "allocated": self.mallocs[device]}}
        return found

    def reset(self, device):
        """As `torch._C._cuda_resetPeakMemoryStats` does."""
        self.peak[device] = dict(self.current[device])


class Library:
    """What stands for `torch._C`."""

    def __init__(self, allocator):
        self._cuda_memoryStats = self._accelerator_getDeviceStats = allocator.statistics
        self._cuda_resetPeakMemoryStats = self._accelerator_resetPeakStats = allocator.reset
        self._cuda_getDevice = lambda: allocator.device


@pytest.fixture
def allocator(monkeypatch):
    """The allocator, as the one that PyTorch has; nothing else of it stays."""
    made = Allocator()
    library = Library(made)
    for name in vars(library):
        monkeypatch.setattr(torch._C, name, getattr(library, name), raising=False)
    for module in (torch.cuda, torch.cuda.memory):
        monkeypatch.setattr(module, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_get_device_index", lambda device, **_: device)
    monkeypatch.setattr(memory, "peaks", Peaks())
    monkeypatch.setattr(state, "measures_memory", False)
    return made


def of(spans, name):
    """Begin, end and peak of a stage."""
    (found,) = (span.attributes for span in spans if span.name == name)
    return tuple(found.get(key) for key in (MEMORY_BEGIN, MEMORY_END, MEMORY_PEAK))


def test_a_stage_has_begin_end_and_peak(allocator):
    """Nested stages have each its own, and the program sees its own peak."""
    allocator.give(100)
    allocator.give(-50)
    with capture() as spans:
        with stage("outer", memory=True):
            allocator.give(10)
            with stage("first", memory=True):
                allocator.give(70)
                allocator.give(-70)
            with stage("second", memory=True):
                allocator.give(5)
            with stage("plain"):
                allocator.give(20)
                allocator.give(-20)
        gpuscope.flush()
    assert of(spans, "outer") == (50, 65, 130)
    assert of(spans, "first") == (60, 60, 130)
    assert of(spans, "second") == (60, 65, 65)
    assert of(spans, "plain") == (None, None, None)
    assert torch._C._cuda_memoryStats(0)["allocated_bytes"]["all"]["peak"] == 130
    assert torch.cuda.max_memory_allocated(0) == 130


def test_retries_and_mallocs_are_counted(allocator):
    """Those within the stage."""
    allocator.give(1)
    allocator.retries[0] = 3
    with capture() as spans:
        with stage("request", memory=True):
            allocator.give(1)
            allocator.give(1)
            allocator.retries[0] += 1
        gpuscope.flush()
    assert (spans[0].attributes[MEMORY_RETRIES], spans[0].attributes[MEMORY_MALLOCS]) == (1, 2)


def test_versions_without_a_count_of_mallocs(monkeypatch):
    """There, the number of segments says it."""
    allocator = Allocator(counts=False)
    peaks = Peaks()
    peaks._stand_between(Library(allocator))
    monkeypatch.setattr(peaks, "_device", lambda: 0)
    opened = peaks.enter()
    allocator.give(1)
    assert peaks.leave(opened)[MEMORY_MALLOCS] == 1


def test_functions_have_it_too(allocator):
    """Plain, asynchronous, methods, generators by resumption; also copied and pickled blocks."""
    with capture() as spans:

        @stage("function", memory=True)
        def function():
            allocator.give(10)
            allocator.give(-10)

        class Model:
            @stage("method", memory=True)
            def method(self):
                allocator.give(20)

            @staticmethod
            @stage("static", memory=True)
            def static():
                allocator.give(1)

        function()
        Model().method()
        Model.static()
        for block in (copy.copy(stage("again", memory=True)), pickle.loads(pickle.dumps(stage("more", memory=True)))):
            with block:
                allocator.give(2)
        stage("object", memory=True)(function)()
        gpuscope.flush()
    assert of(spans, "method") == (0, 20, 20)
    assert of(spans, "static") == (20, 21, 21)
    assert of(spans, "again") == (21, 23, 23)
    assert of(spans, "more") == (23, 25, 25)
    assert of(spans, "object") == (25, 25, 35)


def test_the_setting_measures_outermost_stages(allocator):
    """Those inside are measured where they ask for it."""
    with capture(memory=True) as spans:
        with stage("request"):
            allocator.give(10)
            with stage("asked", memory=True):
                allocator.give(5)
            with stage("inner"):
                allocator.give(-15)
        gpuscope.flush()
    assert of(spans, "request") == (0, 0, 15)
    assert of(spans, "asked") == (10, 15, 15)
    assert of(spans, "inner") == (None, None, None)


def test_a_stage_that_is_made_before_recording(allocator):
    """It is measured once recording is on."""
    before = state.may_toggle
    state.may_toggle = True
    try:
        later = stage("later", memory=True)(lambda: allocator.give(3))
    finally:
        state.may_toggle = before
    with capture() as spans:
        later()
        gpuscope.flush()
    assert of(spans, "later") == (0, 3, 3)


def test_the_programs_own_resets_lose_nothing(allocator):
    """A stage keeps the peak from before, and the program sees the one since."""
    with capture() as spans:
        with stage("request", memory=True):
            allocator.give(100)
            allocator.give(-100)
            torch._C._cuda_resetPeakMemoryStats(0)
            allocator.give(30)
            with stage("inner", memory=True):
                allocator.give(-30)
        gpuscope.flush()
    assert of(spans, "request") == (0, 0, 100)
    assert of(spans, "inner") == (30, 0, 30)
    assert torch.cuda.max_memory_allocated(0) == 30
    assert torch._C._accelerator_getDeviceStats(0)["allocated_bytes"]["all"]["peak"] == 30


def test_devices_are_apart(allocator):
    """A stage is about the device that is current where it begins."""
    with capture() as spans:
        with stage("on the first", memory=True):
            allocator.device = 1
            with stage("on the second", memory=True):
                allocator.give(7, device=1)
                allocator.give(9)
            allocator.device = 0
        gpuscope.flush()
    assert of(spans, "on the first") == (0, 9, 9)
    assert of(spans, "on the second") == (0, 7, 7)


def test_a_block_that_is_entered_again_has_nothing_of_its_first_run(allocator):
    """As an outermost stage it is measured, and inside another it is not."""
    with capture(memory=True) as spans:
        again = stage("again", attributes={"user": 7})
        with again:
            allocator.give(9)
        with stage("request"), again:
            pass
        gpuscope.flush()
    first, second = (span.attributes for span in spans if span.name == "again")
    assert first["user"] == second["user"] == 7
    assert MEMORY_PEAK in first
    assert OF_ONE_RUN.isdisjoint(second)


def test_threads_share_the_allocator(allocator):
    """What another thread takes meanwhile counts: there is one memory."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with stage("other", memory=True):
            entered.set()
            leave.wait(10)

    with capture() as spans:
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
        with stage("here", memory=True):
            allocator.give(40)
            allocator.give(-40)
        leave.set()
        thread.join()
        gpuscope.flush()
    assert of(spans, "here") == (0, 0, 40)
    assert of(spans, "other") == (0, 0, 40)


def test_a_program_that_begins_to_use_its_gpu_in_a_stage(allocator, monkeypatch):
    """Before, there was nothing; without a GPU there is nothing to say."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with capture() as spans:
        with stage("without", memory=True):
            pass
        with stage("first", memory=True):
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
            allocator.give(12)
            allocator.give(-2)
            with stage("second", memory=True):
                allocator.give(1)
        gpuscope.flush()
    assert of(spans, "without") == (None, None, None)
    assert of(spans, "first") == (0, 11, 12)
    assert of(spans, "second") == (10, 11, 11)


def test_faults_cost_the_figures_alone(allocator, monkeypatch):
    """The stage goes out, whatever the allocator says."""

    def broken(_device):
        raise RuntimeError("no statistics")

    monkeypatch.setattr(torch._C, "_cuda_memoryStats", broken)
    with capture() as spans:
        with stage("request", memory=True, attributes={"user": 7}):
            pass
        gpuscope.flush()
    assert of(spans, "request") == (None, None, None)
    assert spans[0].attributes["user"] == 7


def test_an_exception_leaves_nothing_open(allocator):
    """What ran out of memory says how much it had."""
    with capture() as spans:
        with contextlib.suppress(torch.OutOfMemoryError), stage("request", memory=True):
            allocator.give(80)
            raise torch.OutOfMemoryError("CUDA out of memory")
        gpuscope.flush()
    assert of(spans, "request") == (0, 80, 80)
    assert memory.peaks._open == []
    assert spans.recording().stalls.out_of_memory == (0,)


@pytest.mark.parametrize("moment", ["enter", "leave"])
@pytest.mark.parametrize("ring", [False, True])
def test_an_interrupt_within_reaches_the_program(allocator, monkeypatch, tmp_path, moment, ring):
    """The account balances, no stage stays current, and the next one has its memory."""
    flight = {"flight": str(tmp_path / "ring")} if ring else {}
    with capture(memory=True, **flight) as spans:
        with monkeypatch.context() as patch:

            def interrupted(*_):
                patch.undo()
                raise KeyboardInterrupt

            patch.setattr(memory.peaks, moment, interrupted)
            with pytest.raises(KeyboardInterrupt), stage("request"):
                pass
        with stage("next"):
            allocator.give(4)
        gpuscope.flush()
        found = gpuscope.statistics()
    assert of(spans, "next") == (0, 4, 4)
    assert found.recorded == found.exported + sum(found.dropped.values()) + sum(found.lost.values()) + found.pending
    assert [span.parent_id for span in spans if span.name == "next"] == [0]


def test_nothing_stands_in_the_way_where_nobody_asks(allocator):
    """Without a stage that is measured there is no probe, and PyTorch's functions are its own."""
    with capture():
        with stage("request"):
            pass
        assert state.recorder.flight is None
    assert torch._C._cuda_memoryStats == allocator.statistics


def test_the_flight_recorder_goes_on_below(allocator, tmp_path):
    """Both want to know of begins and ends."""
    with capture(flight=str(tmp_path / "ring"), memory=True) as spans:
        probe = state.recorder.flight
        assert isinstance(probe, Probe)
        assert probe.inner is not None
        with stage("request"):
            allocator.give(6)
            assert state.recorder.flight is probe
        gpuscope.flush()
        copies = (tmp_path / "ring").read_bytes()
    assert of(spans, "request") == (0, 6, 6)
    assert b"request" in copies


@pytest.mark.parametrize("wrong", [1, "yes", 0])
def test_what_is_neither_yes_nor_no_is_refused(wrong):
    """At decoration and in a block."""
    with pytest.raises(TypeError, match="`memory` of a `stage` must be True or False"):
        stage("request", memory=wrong)


def test_a_program_without_pytorch(run_python):
    """Nothing is imported for it, and nothing said."""
    done = run_python(
        "import gpuscope, sys\n"
        "with gpuscope.stage('request', memory=True): pass\n"
        "gpuscope.flush()\n"
        "print('torch' in sys.modules)",
        GPUSCOPE="1",
        GPUSCOPE_EXPORTER="none",
        GPUSCOPE_MEMORY="1",
    )
    assert done.stdout.strip() == "False", done.stderr


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("give"), st.integers(1, 100), st.integers(0, 1)),
        st.tuples(st.just("take"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("enter"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("leave"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("reset"), st.integers(0, 1), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_peaks_are_exact_whatever_is_nested_in_what(steps):
    """Stages that overlap in any way have the peaks of a log of all sizes; the program sees those of one alone."""
    allocator, alone, peaks = Allocator(), Allocator(), Peaks()
    library = Library(allocator)
    peaks._stand_between(library)
    peaks._device = lambda: allocator.device
    blocks, opened, sizes = [[], []], [], [[0], [0]]
    for what, first, second in steps:
        if what == "give":
            blocks[second].append(first)
            for each in (allocator, alone):
                each.give(first, second)
        elif what == "take" and blocks[first]:
            size = blocks[first].pop()
            for each in (allocator, alone):
                each.give(-size, first)
        elif what == "enter":
            allocator.device = first
            opened.append((peaks.enter(), first, len(sizes[first]) - 1))
        elif what == "leave" and opened:
            one, device, since = opened.pop(first % len(opened))
            found = peaks.leave(one)
            assert found[MEMORY_PEAK] == max(sizes[device][since:])
            assert (found[MEMORY_BEGIN], found[MEMORY_END]) == (sizes[device][since], sizes[device][-1])
        elif what == "reset":
            library._cuda_resetPeakMemoryStats(first)
            alone.reset(first)
        for device in range(2):
            sizes[device].append(allocator.current[device][KINDS[0]])
            assert library._cuda_memoryStats(device) == alone.statistics(device)


def test_it_is_one_module(allocator):
    """The probe and the stages share one account."""
    assert sys.modules["gpuscope._host.memory"].peaks is memory.peaks
