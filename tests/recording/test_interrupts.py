"""What the program raises at any step of ours reaches it: Ctrl-C, and the exceptions of its own signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import gpuscope
from gpuscope import stage
from gpuscope._data.native import native
from gpuscope._recording.hot_path import current
from gpuscope._recording.nvtx import Nvtx

from ..steps import at_each_step

PACKAGE = Path(gpuscope.__file__).parent
OURS = tuple(
    str(PACKAGE / name)
    for name in ("_data", "_recording", "_otel", "_collecting/engine.py", "_collecting/collector.py")
)
BODY = "the body ran"
UNGUARDED = {"__exit__", "end_raised_in_python"}
"""The very start of these is in no `try` of ours; in C they have none."""


class DeadlineError(Exception):
    """What a program's signal handler raises."""


def handler(number, frame):
    """Be the program's signal handler."""
    raise DeadlineError


class Interrupt:
    """Runs an action, and interrupts it at one step of ours."""

    def __init__(self, step, kind, files=OURS):
        """Raise at the step of this number: where Python looks for signals, in one of the files."""
        self.left, self.kind, self.files, self.where = step, kind, files, ""

    def visit(self, frame, signals):
        """Count steps."""
        if not signals or (signals == "start" and frame.f_code.co_name in UNGUARDED):
            return
        self.left -= 1
        if self.left == 0:
            self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
            if self.kind is KeyboardInterrupt:
                raise KeyboardInterrupt
            handler(signal.SIGALRM, frame)

    def run(self, action):
        """Run the action, and return what it raised."""
        try:
            at_each_step(action, self.files, self.visit)
        except (KeyboardInterrupt, DeadlineError) as error:
            return error
        return None


def block(ran):
    """Run a block."""
    with stage("a"):
        ran.append(BODY)


def telling(ran):
    """Run a block that is told something."""
    with stage("a", attributes={"shape": [1, 2]}) as running:
        running.set_attribute("sizes", {"in": [1, 2]})
        ran.append(BODY)


def decorated(ran):
    """Return a decorated function."""
    return stage("a")(lambda: ran.append(BODY))


def coroutine(ran):
    """Return a decorated coroutine function, run without an event loop."""

    @stage("a")
    async def work():
        """Run within a stage."""
        ran.append(BODY)

    def run():
        started = work()
        with contextlib.closing(started), contextlib.suppress(StopIteration):
            started.send(None)

    return run


def generator(ran):
    """Return a decorated generator function, exhausted."""

    @stage("a")
    def work():
        yield ran.append(BODY)

    return lambda: list(work())


def failing(ran):
    """Return a decorated function that raises."""

    @stage("a")
    def work():
        ran.append(BODY)
        raise LookupError

    def run():
        with contextlib.suppress(LookupError):
            work()

    return run


def failing_coroutine(ran):
    """Return a decorated coroutine function that raises, run without an event loop."""

    @stage("a")
    async def work():
        """Raise within a stage."""
        ran.append(BODY)
        raise LookupError

    def run():
        started = work()
        with contextlib.closing(started), contextlib.suppress(LookupError):
            started.send(None)

    return run


def asynchronous_generator(ran):
    """Return a decorated asynchronous generator function, exhausted without an event loop."""

    @stage("a")
    async def work():
        """Yield within a stage."""
        yield ran.append(BODY)

    def run():
        items = work()
        for _ in range(2):
            step = items.__anext__()
            with contextlib.suppress(StopIteration, StopAsyncIteration):
                step.send(None)

    return run


FORMS = {
    "block": lambda ran: lambda: block(ran),
    "block that is told something": lambda ran: lambda: telling(ran),
    "function": decorated,
    "coroutine": coroutine,
    "generator": generator,
    "failing function": failing,
    "failing coroutine": failing_coroutine,
    "asynchronous generator": asynchronous_generator,
}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, DeadlineError])
@pytest.mark.parametrize("provided", [False, True], ids=["alone", "with a provider"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_at_any_step(make_bench, form, provided, kind):
    """It reaches the program, nothing stays open or current, all that began is exported or counted."""
    bench = make_bench()
    recorder = bench.engine.recorder
    assert recorder.open_bridge()
    if provided:
        provider = TracerProvider()
        recorder.look_for_provider = recorder.bridge.look_for_provider = lambda: provider
    action, step, interrupted = FORMS[form]([]), 0, True
    action()
    while interrupted:
        step += 1
        interrupt = Interrupt(step, kind)
        before = bench.statistics()
        error = interrupt.run(action)
        interrupted = bool(interrupt.where)
        assert (type(error) is kind) is interrupted, interrupt.where
        assert current.get() is None, interrupt.where
        assert not trace.get_current_span().get_span_context().is_valid, interrupt.where
        assert bench.nvtx.stack == bench.nvtx.started == [], interrupt.where
        bench.collect()
        after = bench.statistics()
        assert after.recorded - before.recorded <= (2 if "generator" in form else 1), interrupt.where
        assert after.recorded == after.exported + sum(after.lost.values()), interrupt.where
        assert set(after.lost) <= {"interrupted", "stage_error"}
    # A block in C has no step at which Python looks for signals, where no provider is asked.
    in_c = 0 if form == "block" and not provided else 1
    assert step > (in_c if native else 10)
    gc.collect()  # Python says of what was interrupted that it was never awaited.
    with stage("later"):
        pass
    assert len(bench.named("later")) == 1
    assert not bench.named("later")[0].parent_id


@pytest.mark.parametrize("kind", [KeyboardInterrupt, DeadlineError])
def test_first_stage_interrupted_at_any_step(kind):
    """An interrupt while the first stage starts the collector costs no later stage."""
    step, interrupted = 0, True
    while interrupted:
        step += 1
        interrupt = Interrupt(step, kind)
        with gpuscope.testing.capture() as spans:
            error = interrupt.run(lambda: block([]))
            interrupted = bool(interrupt.where)
            assert (type(error) is kind) is interrupted, interrupt.where
            with stage("later"):
                pass
            done, statistics = gpuscope.flush(60), gpuscope.statistics()
            assert done is not bool(statistics.lost), interrupt.where
            assert set(statistics.lost) <= {"interrupted", "stage_error"}, interrupt.where
            assert statistics.pending == 0, interrupt.where
        assert [span.name for span in spans if span.name == "later"] == ["later"], interrupt.where


@pytest.mark.parametrize("kind", [KeyboardInterrupt, DeadlineError])
def test_first_stage_interrupted_while_looking_for_stalls_begins(kind):
    """It reaches the program, and the next stage is looked at all the same."""
    files = (*OURS, *(str(PACKAGE / name) for name in ("_stalls", "_flight")))
    step, interrupted, steps = 0, True, set()
    with gpuscope.testing.capture(stall="60s"):  # What is made once per process is made.
        block([])
    while interrupted:
        step += 1
        interrupt = Interrupt(step, kind, files)
        with gpuscope.testing.capture(stall="60s") as spans:
            error = interrupt.run(lambda: block([]))
            interrupted = bool(interrupt.where)
            assert (type(error) is kind) is interrupted, interrupt.where
            assert current.get() is None, interrupt.where
            with stage("later"):
                stalls = gpuscope._runtime.state.recorder.stalls
                assert stalls._has_begun, interrupt.where
                assert stalls._thread is None or stalls._thread.is_alive(), interrupt.where
            steps.add(interrupt.where.partition(":")[0])
            gpuscope.flush(60)
        assert [span.name for span in spans if span.name == "later"] == ["later"], interrupt.where
    assert {"begin", "_make_ring", "_follow", "_start"} <= steps


@pytest.mark.parametrize("kind", [KeyboardInterrupt, DeadlineError])
def test_first_stage_of_a_thread_interrupted_at_any_step(bench, kind):
    """Also where the thread is asked for its name, which is code of Python's, it reaches the program."""
    step, interrupted = 0, True
    while interrupted:
        step += 1
        interrupt, errors = Interrupt(step, kind, (*OURS, threading.__file__)), []

        def run(interrupt=interrupt, errors=errors):
            errors.append(interrupt.run(lambda: block([])))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        interrupted = bool(interrupt.where)
        assert (type(errors[0]) is kind) is interrupted, interrupt.where
    assert step > 2
    assert bench.nvtx.stack == []
    bench.collect()
    after = bench.statistics()
    assert after.recorded == after.exported + sum(after.lost.values())


@pytest.mark.skipif(native is None, reason="the twin of a block's `__exit__` can be interrupted at its very start")
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="any `with` can be interrupted before its block there")
def test_a_deadline_by_a_timer_is_never_swallowed(make_bench):
    """The usual way: `SIGALRM`, and a handler that raises."""
    open_ranges: list[object] = []
    domain = SimpleNamespace(
        get_event_attributes=lambda message: message,
        push_range=open_ranges.append,
        pop_range=open_ranges.pop,
        start_range=None,
        end_range=None,
    )
    bench = make_bench(nvtx=Nvtx(domain))
    armed = [False]

    def ring(number, frame):
        if armed[0]:
            armed[0] = False
            raise DeadlineError

    before = signal.signal(signal.SIGALRM, ring)
    work = stage("decorated")(lambda: sum(range(50)))

    def serve():
        # Not in the `try`, whose table from Python 3.11 on leaves out the jump back of a loop.
        deadline = time.monotonic() + 10
        while armed[0] and time.monotonic() < deadline:
            with stage("a"):
                work()

    gc.disable()  # Hypothesis has a callback in Python there, and what is raised in one Python swallows.
    try:
        for attempt in range(300):
            seen = False
            try:
                armed[0] = True
                signal.setitimer(signal.ITIMER_REAL, 2e-5 + attempt % 30 * 1e-5)
                serve()
            except DeadlineError:
                seen = True
            assert seen
            assert current.get() is None
            assert open_ranges == []
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, before)
    bench.collect()
    after = bench.statistics()
    assert after.recorded == after.exported + sum(after.lost.values()) + sum(after.dropped.values())


def test_cancelled_tasks_and_errors_of_parts_are_told_apart(bench):
    """A part's failure stays ours, although the program has signal handlers."""

    async def serve():
        """Serve one request."""
        with stage("request"):
            await asyncio.sleep(60)

    async def main():
        """Run them all."""
        task = asyncio.create_task(serve())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(bench.named("request")) == 1


class AcceleratorError(RuntimeError):
    """What PyTorch raises where the GPU has failed."""

    __module__ = "torch"


def test_what_pytorch_raises_within_ours_is_a_part_s_failure(make_bench):
    """Its functions of C have no frame: what they raise seems to come up in our own files, and costs GPU times only."""
    bench = make_bench()
    begun = bench.device.begin
    code = compile("def begin(record, stream):\n    raise AcceleratorError", "cuda_device.py", "exec")
    names = {"__name__": "gpuscope._cuda.cuda_device", "AcceleratorError": AcceleratorError}
    exec(code, names)
    bench.device.begin = names["begin"]
    with stage("a"):
        pass
    bench.device.begin = begun
    assert len(bench.named("a")) == 1
    assert bench.statistics().untimed == {"begin_failed": 1}


def test_a_deadline_while_an_argument_is_read_is_the_program_s(bench, tmp_path, monkeypatch):
    """A property that an expression reads may take a while: the program's handler ends the call."""
    (tmp_path / "served.py").write_text("def infer(images):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    gpuscope.instrument.instrument("infer=served:infer{size=images.size}")
    served = importlib.import_module("served")

    class Slow:
        @property
        def size(self):
            signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(DeadlineError):
            served.infer(Slow())
    finally:
        signal.signal(signal.SIGALRM, before)
        gpuscope.instrument.uninstrument()
    assert current.get() is None
    assert len(bench.named("infer")) == 1
