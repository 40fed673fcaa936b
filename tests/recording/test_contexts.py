"""What was current before a stage is current after it, whatever was entered inside and how it was left."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import gpuscope
from gpuscope import stage
from gpuscope._recording.hot_path import current


@pytest.fixture(params=[False, True], ids=["alone", "with a provider"])
def provided(request, bench, monkeypatch):
    """Recording, without and with a TracerProvider of the application's."""
    recorder = bench.engine.recorder
    assert recorder.open_bridge()
    if request.param:
        provider = TracerProvider()
        recorder.look_for_provider = recorder.bridge.look_for_provider = lambda: provider
    yield bench
    assert current.get() is None
    assert not trace.get_current_span().get_span_context().is_valid


def tokens():
    """Yield inside a stage."""
    with stage("generate"):
        yield 1
        yield 2


async def stream():
    """Yield inside a stage, in a coroutine."""
    with stage("generate"):
        yield 1
        yield 2


def roots(bench, name="request"):
    """Return the traces of these requests, which must all be roots."""
    found = bench.named(name)
    assert all(not span.parent_id for span in found)
    return len({span.trace_id for span in found})


def read_one():
    """Return a generator that has given one item."""
    generator = tokens()
    next(generator)
    return generator


class TestLeftEarly:
    """Stages that are still open when the one around them ends, or that are never left, chain nothing."""

    def test_kept_generators(self, provided):
        """Each request is a trace of its own, though generators of all of them are still open."""
        kept = []
        for _ in range(4):
            with stage("request"):
                kept.append(read_one())
        for generator in kept:
            generator.close()
        with stage("request"):
            pass
        assert roots(provided) == 5
        assert all(span.parent_id for span in provided.named("generate"))

    def test_stages_that_are_never_left(self, provided):
        """A block that was entered by hand and never left ends with the request around it, as far as others see."""
        for _ in range(4):
            with stage("request"):
                stage("open").__enter__()
        assert roots(provided) == 4

    def test_stopped_async_iteration(self, provided):
        """A consumer that breaks off leaves no stage behind in its task."""

        async def serve():
            """Serve one request."""
            for _ in range(4):
                with stage("request"):
                    async for _item in stream():
                        break
                await asyncio.sleep(0)

        asyncio.run(serve())
        assert roots(provided) == 4

    def test_generators_closed_in_another_thread(self, provided):
        """A stage that ends elsewhere is no longer current where it was entered, with and without one around it."""
        for _ in range(3):
            generator = read_one()
            thread = threading.Thread(target=generator.close)
            thread.start()
            thread.join()
            with stage("request"):
                assert len(contextvars.copy_context()) >= 1
        assert roots(provided) == 3

    def test_what_was_left_behind_is_recognised_after_it_was_exported(self, provided):
        """The collector lets go of the contexts of a stage, and the context in which it is left still has it."""

        def leave_behind():
            generator = read_one()
            thread = threading.Thread(target=generator.close)
            thread.start()
            thread.join()
            provided.collect()

        for _ in range(3):
            leave_behind()
            with stage("request"):
                leave_behind()
                with stage("inside"):
                    pass
        assert roots(provided) == 3
        requests = {span.span_id for span in provided.named("request")}
        assert {span.parent_id for span in provided.named("inside")} == requests

    def test_generators_of_two_requests_at_once(self, provided):
        """Generators that end in the order in which they began leave neither current."""
        first, second = read_one(), read_one()
        first.close()
        second.close()
        assert current.get() is None
        with stage("request"):
            pass
        assert roots(provided) == 1

    def test_a_stage_closed_by_a_task_that_it_started(self, provided):
        """The task's end of it reaches the context where it was entered."""

        async def serve():
            """Serve one request."""
            for _ in range(3):
                request = stage("request")
                request.__enter__()

                async def respond(request=request):
                    """Answer in a task."""
                    request.__exit__(None, None, None)

                await asyncio.create_task(respond())

        asyncio.run(serve())
        assert roots(provided) == 3


class TestTasks:
    """What is started inside a stage stays in its trace."""

    def test_stages_after_the_stage_that_started_the_task(self, provided):
        """All of them do, not only the first."""

        async def job():
            """Run stages later."""
            for name in ("first", "second", "third"):
                with stage(name):
                    await asyncio.sleep(0)

        async def serve():
            """Serve one request."""
            with stage("handler"):
                task = asyncio.create_task(job())
            await task

        asyncio.run(serve())
        (handler,) = provided.named("handler")
        jobs = [span for span in provided.collect() if span.name in ("first", "second", "third")]
        assert {(span.trace_id, span.parent_id) for span in jobs} == {(handler.trace_id, handler.span_id)}
        assert len(jobs) == 3

    def test_threads_with_a_copied_context(self, provided):
        """The same for `asyncio.to_thread`, and whatever else copies the context."""
        with stage("handler"):
            copied = contextvars.copy_context()
        for _ in range(3):
            copied.run(lambda: stage("job").__enter__().__exit__(None, None, None))
        (handler,) = provided.named("handler")
        assert {span.parent_id for span in provided.named("job")} == {handler.span_id}


@pytest.mark.parametrize("around", [0, 2])
@pytest.mark.parametrize("provided", [True], indirect=True)
def test_a_stage_that_is_open_in_a_span_that_has_ended_encloses_nothing(provided, around):
    """The end of the application's span puts its own context back, whatever was never left inside."""
    tracer = provided.engine.recorder.look_for_provider().get_tracer("test")
    with tracer.start_as_current_span("span"), contextlib.ExitStack() as stack:
        for _ in range(around):
            stack.enter_context(stage("around"))
        kept = read_one()
    with stage("request"), stage("inside"):
        pass
    kept.close()
    (generate,), (request,), (inside,) = map(provided.named, ("generate", "request", "inside"))
    assert (request.parent_id, inside.parent_id) == (0, request.span_id)
    assert request.trace_id == inside.trace_id != generate.trace_id


def test_a_kept_block_left_in_another_context_is_recorded(bench):
    """It may be entered and left anywhere: each entry is one stage in the account."""
    kept = stage("kept")
    with kept:
        pass
    for _ in range(3):
        contextvars.copy_context().run(kept.__enter__)
        kept.__exit__(None, None, None)
    assert len(bench.named("kept")) == 4


def test_extracted_context_left_open_ends_with_the_stage(provided):
    """A remote trace that a generator continues, and that is never left, does not take in later requests."""

    def remote():
        with gpuscope.extract({"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}), stage("inner"):
            yield

    kept = []
    for _ in range(3):
        with stage("request"):
            kept.append(remote())
            next(kept[-1])
    assert roots(provided) == 3
    for generator in kept:
        generator.close()


class Finalized:
    """Runs a stage when it is collected."""

    def __init__(self, outcome):
        """Be garbage that only the collector finds."""
        self.me, self.outcome = self, outcome

    def __del__(self):
        """Note what is current, in a stage inside another."""
        with stage("finalizer"), stage("inner"):
            self.outcome.append(trace.get_current_span())


def test_stages_of_finalizers_change_no_context(provided):
    """They are recorded, nested and closed; the context of what the garbage collector interrupted is not touched."""
    outcome = []
    with stage("request") as request:
        Finalized(outcome)
        gc.collect()
        assert current.get() is request
    assert len(outcome) == 1
    (finalizer,), (inner,) = provided.named("finalizer"), provided.named("inner")
    assert inner.parent_id == finalizer.span_id
    assert finalizer.parent_id == provided.named("request")[0].span_id


def test_finalizers_within_context_variables_do_not_crash(run_python):
    """Python before 3.12 collects garbage within `ContextVar.set`, that of the program's own variables included."""
    done = run_python(
        "import contextvars, gc, sys, gpuscope\n"
        "variables = [contextvars.ContextVar(str(n)) for n in range(64)]\n"
        "class Client:\n"
        "    def __init__(self): self.me = self\n"
        "    @gpuscope.stage('close')\n"
        "    def __del__(self): pass\n"
        "for threshold in (10, 11, 13, 50, 97):\n"
        "    gc.set_threshold(threshold)\n"
        "    for n in range(2000):\n"
        "        with gpuscope.stage('request'):\n"
        "            Client()\n"
        "            variables[n % 64].set(n)\n"
        "print(gpuscope.statistics().recorded)\n",
        GPUSCOPE="1",
        GPUSCOPE_EXPORTER="none",
        GPUSCOPE_METRICS="none",
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 10_000


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="garbage is collected between bytecodes only")
def test_collections_are_watched_once(bench):
    """However many periods of recording there are, `gc` tells of a collection once."""
    from gpuscope._recording.current_stage import note_collection, watch_collections

    watch_collections()
    assert gc.callbacks.count(note_collection) == 1


class TestBind:
    """`gpuscope.bind`: work for other threads."""

    def test_stages_of_a_pool_are_below_the_stage_that_handed_the_work_over(self, provided):
        """Each call, at once or not, runs in the context of `bind`; what the thread had before is there afterwards."""
        barrier = threading.Barrier(2, timeout=10)

        def work(item):
            with stage("work"):
                barrier.wait()
            return item

        with ThreadPoolExecutor(2) as pool, stage("request"):
            bound = gpuscope.bind(work)
            assert list(pool.map(bound, range(4))) == [0, 1, 2, 3]
            assert pool.submit(current.get).result() is None
        provided.collect()
        (request,) = provided.named("request")
        assert [span.parent_id for span in provided.named("work")] == [request.span_id] * 4

    def test_it_looks_like_the_function_and_keeps_what_it_returns_and_raises(self):
        """With recording off, too."""

        def divide(one, by=1):
            """Divide."""
            return one / by

        bound = gpuscope.bind(divide)
        assert (bound.__name__, bound.__doc__, bound(6, by=3)) == ("divide", "Divide.", 2)
        with pytest.raises(ZeroDivisionError):
            bound(1, by=0)
        assert gpuscope.bind(functools.partial(divide, 6))(by=2) == 3

    def test_what_it_cannot_bind_is_refused(self):
        """Clearly, and at once."""

        async def coroutine():
            """Wait for nothing."""

        for odd in (None, "name", coroutine):
            with pytest.raises(TypeError, match="`bind` takes"):
                gpuscope.bind(odd)
