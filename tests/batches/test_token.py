"""`gpuscope.here()`: where a request is, in a form that may be carried anywhere."""

from __future__ import annotations

import asyncio
import copy
import pickle
import queue
import threading

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import gpuscope
from gpuscope._otel.lazy_span import settled_ids
from gpuscope._recording.batches import host, token
from gpuscope.testing import ManualClock, capture


@pytest.fixture
def tracer(monkeypatch):
    """A tracer of the application's provider, which makes spans and sends them nowhere."""
    provider = TracerProvider()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return provider.get_tracer("app")


def ids_of(span):
    """The ids of a captured span, or of a span of OpenTelemetry's."""
    context = span.get_span_context() if hasattr(span, "get_span_context") else span
    return context.trace_id, context.span_id


def test_a_token_has_the_ids_of_the_innermost_stage():
    """The token of a stage is of its span, and its time is that of the call, between start and end."""
    clock = ManualClock()
    with capture(clock=clock) as spans, gpuscope.stage("outer"):
        before_ns = clock()
        with gpuscope.stage("inner"):
            here = gpuscope.here()
        after_ns = clock()
    assert ids_of(here) == ids_of(next(span for span in spans if span.name == "inner"))
    assert before_ns < here.time_ns < after_ns
    assert here
    assert here.sampled


def test_the_applications_span_counts_where_it_is_the_innermost(tracer):
    """Whatever a stage that began here would be a child of: that is where the code is."""
    with capture(), tracer.start_as_current_span("request") as request:
        assert ids_of(gpuscope.here()) == ids_of(request)
        with gpuscope.stage("stage"):
            assert ids_of(gpuscope.here()) != ids_of(request)
            with tracer.start_as_current_span("query") as query:
                assert ids_of(gpuscope.here()) == ids_of(query)
            assert ids_of(gpuscope.here()) == ids_of(trace.get_current_span())


@pytest.mark.usefixtures("tracer")
def test_a_span_that_is_none_leaves_the_stage():
    """A context with an invalid span says nothing, so the stage around it counts."""
    with capture(), gpuscope.stage("stage"):
        here = gpuscope.here()
        with trace.use_span(trace.INVALID_SPAN):
            assert gpuscope.here() in (here, token.NOWHERE)


def test_both_twins_say_the_same(tracer):
    """What is done in C is done by the function in Python as well."""
    in_python = getattr(gpuscope.here, "__wrapped__", gpuscope.here)

    def agree():
        first, second = gpuscope.here(), in_python()
        assert first == second
        assert bool(first) == bool(second)
        return first

    assert agree() is token.OFF
    with capture():
        assert agree() is token.NOWHERE
        with gpuscope.stage("a"), gpuscope.extract({"traceparent": f"00-{7:032x}-{9:016x}-01"}):
            assert ids_of(agree()) == (7, 9)
            with gpuscope.stage("b"), tracer.start_as_current_span("span"):
                assert agree()
                with gpuscope.stage("c"):
                    assert agree()


def test_nothing_is_settled_until_somebody_asks(bench, tracer):
    """A call of `here` is cheap, because ids and sampling are the collector's business."""
    with gpuscope.stage("stage"), tracer.start_as_current_span("before"):
        pass
    with gpuscope.stage("stage") as record:
        here = gpuscope.here()
        assert "stage" in repr(here)
        assert settled_ids(record) is None
        assert here.span_id
        assert settled_ids(record) is not None
    bench.collect()


def test_a_token_of_nothing_is_false_and_says_why():
    """With recording off, and where nothing is current, there is a token that does nothing."""
    off = gpuscope.here()
    assert not off
    assert "recording is off" in repr(off)
    assert (off.trace_id, off.span_id, off.sampled, off.traceparent) == (0, 0, False, "")
    with capture():
        nowhere = gpuscope.here()
        assert not nowhere
        assert "no stage" in repr(nowhere)
    for each in (off, nowhere):
        assert pickle.loads(pickle.dumps(each)) is each
    assert gpuscope.Token() is nowhere


def test_a_token_can_be_carried_anywhere():
    """By queues, threads, tasks, copies and pickles; it stays equal, and has one hash."""
    with capture(), gpuscope.stage("stage"):
        here = gpuscope.here()
        waiting = queue.Queue()
        thread = threading.Thread(target=lambda: waiting.put(copy.deepcopy(here)))
        thread.start()
        thread.join()

        async def task():
            return copy.copy(here)

        carried = [waiting.get(), asyncio.run(task()), pickle.loads(pickle.dumps(here))]
        assert set(carried) == {here}
        assert carried[2].time_ns == here.time_ns
        assert gpuscope.here() == here  # The same place, at another time.
        with gpuscope.stage("other"):
            assert gpuscope.here() != here
        assert here != 5


def test_a_token_never_changes():
    """Neither what it is of nor its time can be set."""
    with capture(), gpuscope.stage("stage"):
        here = gpuscope.here()
    for name in ("time_ns", "_made_of", "span_id", "more"):
        with pytest.raises(AttributeError):
            setattr(here, name, 1)


def test_headers_go_round():
    """`inject` and `traceparent` write the same, and what is read is equal."""
    with capture(), gpuscope.stage("stage"):
        headers = {}
        gpuscope.inject(headers)
        here = gpuscope.here()
        assert headers["traceparent"] == here.traceparent
        assert gpuscope.Token.from_traceparent(here.traceparent) == here
        with gpuscope.extract(headers):
            assert gpuscope.here() == here


VALID = f"00-{1:032x}-{2:016x}-01"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        VALID[:-1],
        VALID.upper().replace("0", "O"),
        f"00-{0:032x}-{2:016x}-01",
        f"00-{1:032x}-{0:016x}-01",
        f"ff-{1:032x}-{2:016x}-01",
        VALID + "-more",
        None,
        b"00",
    ],
)
def test_headers_that_are_not_valid_are_of_nothing(text):
    """Clients may send anything."""
    assert not gpuscope.Token.from_traceparent(text)


def test_a_later_version_of_the_header_is_read():
    """W3C: later versions only add to the end."""
    found = gpuscope.Token.from_traceparent("01" + VALID[2:] + "-more")
    assert ids_of(found) == (1, 2)
    assert found.sampled


def test_times_of_another_host_go_by_the_clock_of_the_world(monkeypatch):
    """Monotonic clocks of two hosts have nothing to do with each other."""
    with capture(), gpuscope.stage("stage"):
        here = gpuscope.here()
        written = pickle.dumps(here)
    monkeypatch.setattr(host, "host_id", lambda: "another")
    monkeypatch.setattr(token.time, "perf_counter_ns", lambda: here.time_ns + 10**15)
    monkeypatch.setattr(token.time, "time_ns", lambda: 10**18)
    function, (ids, _, epoch_ns, where) = pickle.loads(written).__reduce__()
    assert where == "another"
    again = function(ids, 123, 10**18 - 5_000_000, "a third")
    assert again.time_ns == here.time_ns + 10**15 - 5_000_000
    assert function(ids, 123, epoch_ns, "another").time_ns == 123


def test_a_host_is_known_by_its_boot(monkeypatch, tmp_path):
    """One boot with one namespace of clocks is one host; where neither is known, each process is one."""
    host.host_id.cache_clear()
    try:
        monkeypatch.setattr(host, "_BOOT", tmp_path / "boot")
        unknown = host.host_id()
        host.host_id.cache_clear()
        assert host.host_id() != unknown
        (tmp_path / "boot").write_text("one\n")
        monkeypatch.setattr(host, "_CLOCKS", tmp_path / "clocks")
        host.host_id.cache_clear()
        assert host.host_id() == "one"
        (tmp_path / "clocks").write_text("")
        host.host_id.cache_clear()
        assert host.host_id().startswith("one/")
    finally:
        host.host_id.cache_clear()


def test_the_sampler_is_asked_where_somebody_asks(bench, make_bench):
    """A token says whether its trace is exported."""
    bench = make_bench(sampler="always_off")
    with gpuscope.stage("stage"):
        here = gpuscope.here()
        assert not here.sampled
        assert here.traceparent.endswith("-00")
    assert bench.collect() == []
