"""The thread that asks streams whether they have work, on a driver that is made of C."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gpuscope import _runtime, stage
from gpuscope._cuda.driver import Driver, Handle
from gpuscope._cuda.stream_sampler import ANSWER, StreamSampler
from gpuscope._cuda.timed_stream import TimedStream
from gpuscope._data.native import native

pytestmark = pytest.mark.skipif(not hasattr(native, "StreamSampler"), reason="nothing is asked without the parts in C")
SAMPLE_HZ = 5000.0
"""Of the fixture `machine`."""
POOL = 0x70
"""A stream of PyTorch's pools."""
CONTEXT = Handle(0x1000)
pause = threading.Event()


def until(condition, what, timeout_s=20):
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        pause.wait(0.001)
    return found


@pytest.fixture
def library(driver_file):
    """The fake driver, with nothing captured and no work."""
    library = ctypes.PyDLL(str(driver_file))
    broken = library.fake_breaks()
    yield library
    library.fake_stream_answer(0)
    library.fake_delay_streams(0)
    library.fake_capture(None)
    assert library.fake_breaks() == broken
    assert library.fake_crashes() == 0


@pytest.fixture
def make(library):
    """Return a function that makes samplers in C; their threads have ended afterwards."""
    made = []

    def new(hz=5000.0, capacity=65_536):
        made.append(native.StreamSampler(*Driver(library).addresses_to_sample(), int(1e9 / hz), capacity))
        return made[-1]

    yield new
    assert all(sampler.stop(10**9) for sampler in made)


def stream(raw=POOL, index=0, *, foreign=False):
    """A stream that stages are timed on."""
    return TimedStream(index, raw, Handle(CONTEXT.value + index), [], foreign=foreign)


class Use:
    """A stage that is open on a stream, as the device begins and ends it."""

    def __init__(self, library, timed_stream):
        self.record = native.StageRecord()
        record = ctypes.cast(Driver(library).event_record, Handle).value
        table = [{timed_stream.raw: timed_stream}]
        pair = [Handle(1)] * 2
        if not timed_stream.pairs:
            new = [Driver(library).new_event() for _ in pair]
            timed_stream.pairs.append(native.EventPair(*new, *(each.value for each in new)))
        self.device = native.EventRecorder(record, record, table, lambda: 0, lambda _: timed_stream.raw, repr, repr, 0)

    def __enter__(self):
        self.device.begin(self.record, None)
        return self

    def __exit__(self, *_):
        self.device.end(self.record)


def answers_of(sampler):
    """What was answered since last time."""
    return np.frombuffer(sampler.take(), ANSWER)


def some_answers(sampler, count=20):
    """Wait for answers."""
    found = []

    def enough():
        found.append(answers_of(sampler))
        return sum(map(len, found)) >= count

    until(enough, "answers")
    return np.concatenate(found)


def test_a_stream_with_work_and_one_without(library, make):
    """Each answer says which stream of which device it is of, whether that had work, and how many stages were open."""
    busy, free = stream(), stream(0x71, 1)
    library.fake_load(ctypes.c_void_p(busy.raw), 1)
    sampler = make()
    assert sampler.watch(busy, CONTEXT.value)
    assert sampler.watch(free, CONTEXT.value + 1)
    with Use(library, busy), Use(library, busy), Use(library, free):
        before_ns = time.perf_counter_ns()
        assert sampler.start()
        found = some_answers(sampler, 100)
        after_ns = time.perf_counter_ns()
    library.fake_load(ctypes.c_void_p(busy.raw), 0)
    assert before_ns < found["at_ns"].min() <= found["at_ns"].max() < after_ns
    seen = {tuple(row) for row in found[["stream", "device", "open", "had_work"]].tolist()}
    assert seen == {(busy.raw, 0, 2, 1), (free.raw, 1, 1, 0)}
    rounds = Counter(found["round"].tolist())
    assert set(rounds.values()) == {2}  # Both at one moment.


def test_the_moments_are_random(library, make):
    """No two intervals need be alike, and none is longer than it should be, so that no rhythm can hide from them."""
    watched, sampler = stream(), make(1000.0)
    sampler.watch(watched, CONTEXT.value)
    with Use(library, watched):
        sampler.start()
        gaps = np.diff(some_answers(sampler, 300)["at_ns"])
    assert np.percentile(gaps, 5) < 900_000
    assert np.percentile(gaps, 95) > 1_300_000
    assert 900_000 < np.median(gaps) < 4_000_000  # On a machine that is idle, 1.0 ms.
    assert len(set((gaps // 10_000).tolist())) > 30


def test_only_streams_that_cannot_go_away_are_asked(library, make):
    """Not one of another library, and no default stream on which recording needs a question; the default one is."""
    raw, sampler = library.fake_new_stream(), make()
    guarded, default = stream(0), stream(0)
    guarded.guarded = True
    assert not sampler.watch(stream(raw, foreign=True), CONTEXT.value)
    assert not sampler.watch(guarded, CONTEXT.value)
    assert sampler.watch(default, CONTEXT.value + 1)
    assert not sampler.watch(default, CONTEXT.value + 1)
    library.fake_destroy_stream(raw, 0)
    library.fake_last_context.restype = ctypes.c_void_p
    with Use(library, default):
        sampler.start()
        assert set(some_answers(sampler)["stream"].tolist()) == {0}
    assert library.fake_last_context() == CONTEXT.value + 1


def test_a_stream_that_is_not_used_is_not_asked(library, make):
    """A stage that is open counts as use, and so does one that has ended a moment ago; nothing before the first one."""
    watched, sampler = stream(), make()
    sampler.watch(watched, CONTEXT.value)
    sampler.start()
    before = library.fake_stream_queries()
    pause.wait(0.05)
    assert library.fake_stream_queries() == before
    with Use(library, watched):
        assert set(some_answers(sampler)["open"].tolist()) == {1}
    until(lambda: 0 in answers_of(sampler)["open"].tolist(), "answers after the stage")


def test_a_stream_is_forgotten(library, make):
    """One that is given up, or whose object is gone, is asked no more; others are."""
    kept, given_up, gone, sampler = stream(), stream(0x71), stream(0x72), make()
    with contextlib.ExitStack() as uses:
        for each in (kept, given_up, gone):
            sampler.watch(each, CONTEXT.value)
            uses.enter_context(Use(library, each))
        sampler.start()
        until(lambda: set(answers_of(sampler)["stream"].tolist()) == {POOL, 0x71, 0x72}, "all")
        assert sampler.unwatch(given_up)
        assert not sampler.unwatch(given_up)
        until(lambda: set(answers_of(sampler)["stream"].tolist()) == {POOL, 0x72}, "two")
    del each, gone
    uses = None
    gc.collect()
    with Use(library, kept):
        until(lambda: set(answers_of(sampler)["stream"].tolist()) == {POOL}, "one")


def test_nothing_is_asked_while_a_stream_is_captured(library, make):
    """Not of the other streams either; after the capture it goes on. What was not asked is counted."""
    captured, other, sampler = stream(), stream(0x71), make()
    with contextlib.ExitStack() as uses:
        for each in (captured, other):
            sampler.watch(each, CONTEXT.value)
            uses.enter_context(Use(library, each))
        native.hold_samplers()  # As PyTorch's captures do.
        library.fake_capture(ctypes.c_void_p(captured.raw))
        native.release_samplers()
        sampler.start()
        until(lambda: sampler.counts()["captures"] > 20, "rounds")
        assert answers_of(sampler).size == sampler.counts()["asked"] == 0
        library.fake_capture(None)
        some_answers(sampler)


def test_captures_that_hold_the_sampler_are_never_broken(library, make):
    """However often one begins while it asks: none begins between its two questions."""
    watched, sampler = stream(), make()
    sampler.watch(watched, CONTEXT.value)
    broken = library.fake_breaks()
    library.fake_delay_streams(50_000)
    with Use(library, watched):
        sampler.start()
        for _ in range(500):
            native.hold_samplers()
            library.fake_capture(ctypes.c_void_p(watched.raw))
            native.release_samplers()
            library.fake_capture(None)
        some_answers(sampler)
    assert library.fake_breaks() == broken


def test_holds_add_up(library, make):
    """With two captures at once nothing is asked until both are over; one release too many does no harm."""
    watched, sampler = stream(), make()
    sampler.watch(watched, CONTEXT.value)
    native.hold_samplers()
    native.hold_samplers()
    with Use(library, watched):
        sampler.start()
        native.release_samplers()
        until(lambda: sampler.counts()["captures"] > 20, "rounds")
        assert sampler.counts()["asked"] == 0
        native.release_samplers()
        native.release_samplers()
        some_answers(sampler)
    native.hold_samplers()
    native.release_samplers()


@pytest.mark.parametrize("code", [4, 400, 700, 709])
def test_a_stream_that_the_driver_refuses_to_tell_of_is_asked_once(library, make, code):
    """It is counted, and others are asked on."""
    watched, sampler = stream(), make()
    sampler.watch(watched, CONTEXT.value)
    library.fake_stream_answer(code)
    with Use(library, watched):
        sampler.start()
        until(lambda: sampler.counts()["errors"], "the refusal")
        before = library.fake_stream_queries()
        pause.wait(0.02)
        assert library.fake_stream_queries() == before
        library.fake_stream_answer(0)
        other = stream(0x71)
        sampler.watch(other, CONTEXT.value)
        with Use(library, other):
            assert set(some_answers(sampler)["stream"].tolist()) == {0x71}
    assert sampler.counts()["errors"] == 1


def test_a_full_ring_drops_the_oldest_and_counts(library, make):
    """What is there are the newest answers; with those that were dropped they are all."""
    watched, sampler = stream(), make(capacity=16)
    sampler.watch(watched, CONTEXT.value)
    with Use(library, watched):
        sampler.start()
        until(lambda: sampler.counts()["dropped"] > 100, "an overflow")
        sampler.stop(10**9)
    found, counts = answers_of(sampler), sampler.counts()
    assert len(found) == 16
    assert counts["asked"] == counts["dropped"] + 16
    rounds = found["round"].tolist()
    assert rounds == list(range(rounds[0], rounds[0] + 16))


def test_a_driver_that_answers_late_is_counted(library, make):
    """A question that takes as long as three intervals stands for rounds that were missed."""
    watched, sampler = stream(), make(1000.0)
    sampler.watch(watched, CONTEXT.value)
    library.fake_delay_streams(5_000_000)
    with Use(library, watched):
        sampler.start()
        some_answers(sampler, 5)
    counts = sampler.counts()
    assert counts["late"] >= 4 * counts["asked"]


def test_it_ends_in_a_moment(library, make):
    """Also where its next question is minutes away; a driver that keeps it is not waited for, and it ends then."""
    watched, sampler = stream(), make(0.001)
    sampler.watch(watched, CONTEXT.value)
    took = []
    with Use(library, watched):
        for _ in range(20):
            assert sampler.start()
            until(lambda: sampler.is_running, "the thread")
            began = time.perf_counter()
            assert sampler.stop(10**9)
            took.append(time.perf_counter() - began)
            assert not sampler.is_running
        assert min(took) < 0.05  # Less than a millisecond on a machine that is idle.
        library.fake_delay_streams(300_000_000)
        asked, held = library.fake_stream_queries(), make()
        held.watch(stream(0x71), CONTEXT.value)
        held_stream = stream(0x72)
        held.watch(held_stream, CONTEXT.value)
        with Use(library, held_stream):
            held.start()
            until(lambda: library.fake_stream_queries() > asked, "a question")
            began = time.perf_counter()
            assert not held.stop(1_000_000)
            assert time.perf_counter() - began < 0.2
            until(lambda: not held.is_running, "its end")


def test_starts_and_stops_from_many_threads(library, make):
    """In whatever order they come, there is one thread at most, and in the end it does what was last said."""
    watched, sampler = stream(), make()
    sampler.watch(watched, CONTEXT.value)

    def toggle(number):
        for turn in range(200):
            (sampler.start if (turn + number) % 2 else lambda: sampler.stop(0))()

    before = threads_named()
    with Use(library, watched):
        threads = [threading.Thread(target=toggle, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sampler.start()
        answers_of(sampler)
        some_answers(sampler)
        assert threads_named() <= before + 1
        assert sampler.stop(10**9)
    until(lambda: threads_named() == before, "its end")


def threads_named():
    """How many threads of the sampler this process has."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text().strip())
    return names.count("gpuscope-sample")


def test_a_sampler_that_is_dropped_while_it_runs(library, make):
    """Its thread ends by itself; records and streams that refer to its part of them go on."""
    before = threads_named()
    for _ in range(50):
        watched = stream()
        sampler = native.StreamSampler(*Driver(library).addresses_to_sample(), 200_000, 64)
        sampler.watch(watched, CONTEXT.value)
        use = Use(library, watched)
        use.__enter__()
        sampler.start()
        del sampler
        use.__exit__()
        with Use(library, watched):
            pass
    until(lambda: threads_named() == before, "the ends")


def test_many_streams_are_asked_less_often(library, make):
    """Sixty-four streams get an eighth of the rounds; for more than there is room it is counted."""
    sampler, streams = make(2000.0), [stream(0x100 + 16 * number) for number in range(300)]
    watched = [sampler.watch(each, CONTEXT.value) for each in streams]
    assert watched.count(True) == 256
    assert sampler.counts()["unwatched"] == 44
    with contextlib.ExitStack() as uses:
        for each in streams[:64]:
            uses.enter_context(Use(library, each))
        sampler.start()
        found = some_answers(sampler, 64 * 20)
    one = np.sort(found["at_ns"][found["stream"] == 0x100])
    assert np.median(np.diff(one)) > 2_000_000


def test_misuse_raises(library, make):
    """Whatever is given that is no stream, no address and no time is an exception."""
    sampler, good = make(), Driver(library).addresses_to_sample()
    for arguments in (
        (),
        good,
        (*good, 10**6),
        (0, *good[1:], 10**6, 16),
        (*good, 0, 16),
        (*good, 10**6, 0),
        (*good, 10**6, 10**9),
        (*good, -1, -1),
        ("a", *good[1:], 1, 1),
        (*good, 1.5, 16),
    ):
        with pytest.raises((TypeError, ValueError)):
            native.StreamSampler(*arguments)
    with pytest.raises(TypeError):
        native.StreamSampler(*good, 10**6, 16, more=1)
    for nonsense in (None, 1, "x", object(), TimedStream):
        with pytest.raises(TypeError):
            sampler.watch(nonsense, 1)
        with pytest.raises(TypeError):
            sampler.unwatch(nonsense)
        with pytest.raises(TypeError):
            sampler.stop(nonsense) if nonsense != 1 else sampler.stop()
    for wrong in (-1, 10**18, 2**70):
        with pytest.raises((ValueError, OverflowError)):
            sampler.stop(wrong)
    bare = native.TimedStreamFields()
    assert sampler.watch(bare, 0)
    assert sampler.unwatch(bare)
    assert sampler.take() == b""


# ---- with recording


@pytest.fixture
def on_c(machine):
    """The fixture `machine`, with the parts in C."""
    if machine.engine.recorder.device.reader is None and _sampling(machine).why_off:
        pytest.skip("nothing is asked without the parts in C")
    broken = machine.library.fake_breaks()
    yield machine
    assert machine.library.fake_breaks() == broken


def _sampling(machine) -> StreamSampler:
    return machine.engine.recorder.device.sampling


def run(name="infer", **options):
    """Run an empty stage."""
    with stage(name, **options):
        pass


def test_the_first_stage_starts_it_and_the_end_of_recording_ends_it(on_c):
    """No thread before; none while recording is off; one again after it is on."""
    before = threads_named()
    run()
    until(lambda: threads_named() == before + 1, "the thread")
    until(lambda: _sampling(on_c).take().size, "answers")
    _runtime.disable()
    until(lambda: threads_named() == before, "the thread's end")
    _runtime.state.switch_to(on_c.engine.recorder)
    on_c.engine.sample(on=True)
    run()
    until(lambda: _sampling(on_c).take().size, "answers")
    on_c.engine.shutdown(1.0)
    until(lambda: threads_named() == before, "the thread's end")


def test_each_stage_has_the_answers_of_its_time(on_c):
    """A stage on a stream with work has had work, the next one on a free stream has not; what is inside has its own."""

    def work(has_work):
        on_c.library.fake_load(ctypes.c_void_p(POOL), has_work)
        asked = on_c.library.fake_stream_queries()
        until(lambda: on_c.library.fake_stream_queries() > asked + 20, "questions")

    run()
    on_c.collect()
    with stage("request"):
        with stage("busy"):
            work(1)
        with stage("free"):
            work(0)
    gpu = {span.name: span.attributes for span in on_c.collect() if span.kind == "gpu"}
    for name, share in (("busy [gpu]", 1.0), ("free [gpu]", 0.0)):
        assert gpu[name]["gpuscope.gpu.samples"] > 15
        assert gpu[name]["gpuscope.gpu.had_work"] == pytest.approx(share, abs=0.3)  # One question is on its way.
    assert gpu["request [gpu]"].get("gpuscope.gpu.samples", 0) < 5
    run("later")
    on_c.collect()
    found = Counter(on_c.engine.statistics().samples)
    assert found["in_stages"] > 40
    assert found["asked"] == sum(found[name] for name in ("in_stages", "between", "lost", "waiting", "dropped"))


def test_a_stage_on_a_side_stream_has_the_answers_of_that(on_c):
    """It is inside a stage on the main stream, which waits: each has its own."""
    side = 0x90

    def asked(most):
        before = on_c.library.fake_stream_queries()
        until(lambda: on_c.library.fake_stream_queries() > before + most, "questions")

    run()
    run(stream=on_c.stream(side))
    on_c.collect()
    on_c.library.fake_load(ctypes.c_void_p(POOL), 0)
    on_c.library.fake_load(ctypes.c_void_p(side), 1)
    with stage("request"):
        asked(10)
        with stage("side", stream=on_c.stream(side)):
            asked(60)
    on_c.library.fake_load(ctypes.c_void_p(side), 0)
    gpu = {span.name: span.attributes for span in on_c.collect() if span.kind == "gpu"}
    for name, share in (("side [gpu]", 1.0), ("request [gpu]", 0.0)):
        assert gpu[name]["gpuscope.gpu.samples"] > 15
        assert gpu[name]["gpuscope.gpu.had_work"] == pytest.approx(share, abs=0.1)
    assert gpu["side [gpu]"]["gpuscope.cuda.stream"] == side


def test_on_the_twins_nothing_is_asked_and_it_is_said_why(machine, caplog):
    """Recording goes on as ever; the log says it once."""
    run()
    if machine.engine.recorder.device.reader is None:
        assert "parts in C" in _sampling(machine).why_off
        assert _sampling(machine).take().size == 0
        assert machine.engine.statistics().sampler == "off: the parts in C are not in use"
        assert machine.engine.statistics().samples == {}
    assert [span.kind for span in machine.collect()] == ["host", "gpu"]
    said = [record for record in caplog.records if "streams are not asked" in record.message]
    assert len(said) == (machine.engine.recorder.device.reader is None)


def test_open_stages_are_counted_whatever_becomes_of_them(on_c):
    """Stages that nest, that fail, whose events are refused, and that are never left."""
    library, sampling = on_c.library, _sampling(on_c)

    def now_open(count):
        sampling.take()
        until(lambda: (found := sampling.take()).size > 3 and set(found["open"].tolist()) == {count}, str(count))

    with stage("outer"):
        with contextlib.suppress(ValueError), stage("inner"):
            now_open(2)
            raise ValueError
        now_open(1)
        library.fake_answer(999, 2)
        run("refused at its begin")
        with stage("refused at its end"):
            library.fake_answer(999, 2)
        now_open(1)
        left = stage("never left")
        left.__enter__()
        now_open(2)
        left.__exit__(None, None, None)
        for make in (lambda: stage("dropped"), native.StageRecord):
            dropped = make()
            on_c.engine.recorder.device.begin(dropped, None)
            now_open(2)
            del dropped
            now_open(1)
    now_open(0)


def test_streams_of_other_libraries_come_and_go_unasked(on_c):
    """A storm of stages on streams that are destroyed right after: nobody asks about any of them."""
    library = on_c.library
    run()
    for number in range(500):
        external = on_c.new_external()
        with stage("outside", stream=external):
            pass
        library.fake_destroy_stream(external.cuda_stream, number % 2)
        if number % 10 == 0:
            on_c.collect()
    until(lambda: _sampling(on_c).counts()["asked"] > 50, "answers")
    assert {POOL} >= set(_sampling(on_c).take()["stream"].tolist())


def test_a_storm_of_graphs_is_not_broken(on_c):
    """PyTorch's graphs are captured and replayed while it asks 5,000 times a second, with stages inside and around."""
    kind = sys.modules["torch.cuda.graphs"].CUDAGraph
    on_c.library.fake_delay_streams(20_000)
    for _ in range(200):
        with stage("around"):
            graph = kind()
            graph.capture_begin()
            with stage("inside"):
                on_c.library.fake_kernel()
            graph.capture_end()
            graph.replay()
        on_c.collect()
    on_c.library.fake_delay_streams(0)
    run()
    until(lambda: _sampling(on_c).counts()["asked"], "answers")


def test_a_capture_that_fails_to_begin_holds_nothing(on_c):
    """Nor does one whose graph goes away without its end."""
    kind = sys.modules["torch.cuda.graphs"].CUDAGraph
    sampling = _sampling(on_c)

    def goes_on():
        run()
        asked = sampling.counts()["asked"]
        until(lambda: sampling.counts()["asked"] > asked, "answers")

    goes_on()
    graph = kind()
    begins = on_c.library.fake_begin_capture
    on_c.library.fake_begin_capture = None
    with pytest.raises(TypeError):
        graph.capture_begin()
    on_c.library.fake_begin_capture = begins
    goes_on()
    graph.capture_begin()
    on_c.library.fake_end_capture()
    captures = sampling.counts()["captures"]
    run()
    until(lambda: sampling.counts()["captures"] > captures, "rounds that are left out")
    del graph
    gc.collect()
    goes_on()


def test_stages_on_many_threads_with_five_thousand_questions_a_second(on_c):
    """Every stage has its GPU times, and what was answered is sound."""
    done = threading.Event()

    def work():
        while not done.is_set():
            with stage("outer"), stage("inner"):
                pass
            pause.wait(0.0005)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    asked, deadline = 0, time.monotonic() + 1.0
    while time.monotonic() < deadline:
        on_c.engine.collector.step()
        found = _sampling(on_c).take()
        asked += found.size
        assert set(found["stream"].tolist()) <= {POOL}
        assert found.size == 0 or 0 <= found["open"].min() <= found["open"].max() <= 8
    done.set()
    for thread in threads:
        thread.join()
    assert asked > 50
    assert {"host", "gpu"} == {span.kind for span in on_c.collect()}


def test_a_forked_child_has_no_such_thread(on_c):
    """The parent's goes on. A sampler of the child's own starts and ends."""
    run()
    until(lambda: _sampling(on_c).take().size, "answers")
    for turn in range(20):
        here, there = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                found = [threads_named(), _sampling(on_c).take().size]
                watched = stream(0x90)
                own = native.StreamSampler(*Driver(on_c.library).addresses_to_sample(), 200_000, 64)
                own.watch(watched, CONTEXT.value)
                with Use(on_c.library, watched):
                    own.start()
                    found.append(some_answers(own, 5)["stream"].tolist()[0])
                found.append(own.stop(10**9))
                if turn % 2:
                    _sampling(on_c).start()
                    _sampling(on_c).stop()
                os.write(there, json.dumps(found).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(there)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert json.loads(os.read(here, 4096)) == [0, 0, 0x90, True]
        os.close(here)
    run()
    _sampling(on_c).take()
    until(lambda: _sampling(on_c).take().size, "answers")
