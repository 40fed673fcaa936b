"""`inject` and `extract`: one trace over several processes, whichever provider there is, and none."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

import gpuscope
from gpuscope.testing import capture

TRACE_ID, SPAN_ID = 0xA1 << 120, 0xB2 << 56
REMOTE = {"traceparent": f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-00"}


@pytest.fixture(params=["no provider", "provider"])
def provider(request, monkeypatch):
    """The application's TracerProvider, or None: stages stand in the application's context only where there is one."""
    made = TracerProvider() if request.param == "provider" else None
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", made)
    return made


@pytest.fixture(autouse=True)
def clean_context():
    """Each test starts without a span and must end without one."""
    yield
    left = trace.get_current_span()
    context.attach(context.Context())
    assert left is trace.INVALID_SPAN


def carrier() -> dict[str, str]:
    """What is sent to another process from here."""
    fields: dict[str, str] = {}
    gpuscope.inject(fields)
    return fields


def ids(fields: dict[str, str]) -> tuple[int, int, int]:
    """Trace id, span id and flags in a carrier."""
    _, trace_id, span_id, flags = fields["traceparent"].split("-")
    return int(trace_id, 16), int(span_id, 16), int(flags, 16)


def by_name(spans) -> dict:
    """Host spans by name."""
    assert gpuscope.flush()
    return {span.name: span for span in spans if span.kind == "host"}


@pytest.mark.usefixtures("provider")
class TestInject:
    """What is sent."""

    def test_the_current_stage_is_the_parent_elsewhere(self):
        """The ids in the carrier are those that the innermost stage is exported with, which is sampled."""
        with capture() as spans, gpuscope.stage("outer"), gpuscope.stage("inner"):
            sent = carrier()
        inner = by_name(spans)["inner"]
        assert ids(sent) == (inner.trace_id, inner.span_id, 1)

    def test_after_a_stage_nothing_of_it_is_left(self):
        """A stage that has ended is nobody's parent."""
        with capture():
            with gpuscope.stage("over"):
                pass
            assert carrier() == {}

    def test_what_a_stage_started_is_sent_as_its_child_though_it_has_ended(self):
        """A task that outlives the stage that it was started in belongs to that stage, as stages begun in it do."""
        with capture() as spans:
            with gpuscope.stage("start"):
                task = contextvars.copy_context()
            sent = task.run(carrier)
        start = by_name(spans)["start"]
        assert ids(sent)[:2] == (start.trace_id, start.span_id)

    def test_baggage_goes_along(self):
        """What else is in the application's context is written by its own propagators."""
        with capture(), gpuscope.stage("s"):
            before = context.get_current()
            context.attach(baggage.set_baggage("tenant", "7"))
            sent = carrier()
            context.attach(before)
        assert sent["baggage"] == "tenant=7"

    def test_a_setter_writes_to_any_carrier(self):
        """As in OpenTelemetry, a setter says how a field is written: to a list of pairs of bytes, for one."""

        class Pairs:
            def set(self, carrier, key, value):
                carrier.append((key.encode(), value.encode()))

        headers: list[tuple[bytes, bytes]] = []
        with capture(), gpuscope.stage("s"):
            gpuscope.inject(headers, setter=Pairs())
        assert [key for key, _ in headers] == [b"traceparent"]

    def test_off_it_passes_the_applications_context_on(self):
        """With recording off the application's span is written, and without one nothing."""
        assert carrier() == {}
        with gpuscope.extract(REMOTE), gpuscope.stage("off"):
            assert carrier() == REMOTE

    def test_a_stage_that_nothing_exports_is_no_parent(self):
        """Where stages go nowhere, what is above them is passed on: nobody would ever see their ids."""
        config = gpuscope._runtime.state.config.changed(mode="on", exporters="none", metrics="none")
        with gpuscope._runtime.period(config), gpuscope.extract(REMOTE), gpuscope.stage("s"):
            assert carrier() == REMOTE


class TestInjectWithSpans:
    """Stages between spans of the application's own."""

    def test_the_innermost_of_spans_and_stages_is_sent(self, monkeypatch):
        """Inside a span of the application's that span is sent, inside a stage in it that stage."""
        provider = TracerProvider()
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        tracer = provider.get_tracer("application")
        with capture() as spans, gpuscope.stage("outer"), tracer.start_as_current_span("query") as query:
            span_sent = carrier()
            with gpuscope.stage("inner"):
                stage_sent = carrier()
        inner = by_name(spans)["inner"]
        assert ids(span_sent)[1] == query.get_span_context().span_id
        assert ids(stage_sent)[1] == inner.span_id
        assert ids(span_sent)[0] == ids(stage_sent)[0] == inner.trace_id

    def test_a_span_is_not_replaced_by_a_stage_that_only_a_file_knows(self, monkeypatch, tmp_path):
        """Where the application's spans go elsewhere than stages, its trace is passed on as it is."""
        provider = TracerProvider()
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        config = gpuscope._runtime.state.config.changed(
            mode="on", exporters="file", metrics="none", file=str(tmp_path / "spans.jsonl")
        )
        with (
            gpuscope._runtime.period(config),
            provider.get_tracer("application").start_as_current_span("request") as request,
            gpuscope.stage("s"),
        ):
            assert ids(carrier())[1] == request.get_span_context().span_id


@pytest.mark.usefixtures("provider")
class TestExtract:
    """What is received."""

    def test_stages_are_children_of_the_remote_span(self):
        """Stages in the block belong to the remote trace; those after it do not."""
        with capture() as spans:
            with gpuscope.extract(REMOTE), gpuscope.stage("worker"), gpuscope.stage("infer"):
                pass
            with gpuscope.stage("after"):
                pass
        found = by_name(spans)
        assert (found["worker"].trace_id, found["worker"].parent_id) == (TRACE_ID, SPAN_ID)
        assert found["infer"].parent_id == found["worker"].span_id
        assert found["after"].parent_id == 0
        assert found["after"].trace_id != TRACE_ID

    def test_a_stage_around_the_block_does_not_come_between(self):
        """A worker's loop may be a stage: what it works on belongs to the requests, and the loop goes on after them."""
        with capture() as spans, gpuscope.stage("loop"):
            with gpuscope.extract(REMOTE), gpuscope.stage("request"):
                sent = carrier()
            with gpuscope.stage("idle"):
                pass
        found = by_name(spans)
        assert (found["request"].trace_id, found["request"].parent_id) == (TRACE_ID, SPAN_ID)
        assert ids(sent)[:2] == (TRACE_ID, found["request"].span_id)
        assert found["idle"].parent_id == found["loop"].span_id

    @pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, {"traceparent": "00-0-0-00"}])
    def test_a_carrier_without_a_trace_changes_nothing(self, headers):
        """A stage stays a child of the stage around it."""
        with capture() as spans, gpuscope.stage("loop"), gpuscope.extract(headers), gpuscope.stage("request"):
            pass
        found = by_name(spans)
        assert found["request"].parent_id == found["loop"].span_id

    @pytest.mark.parametrize("value", [3, b"00-", object(), {}, [], [4], iter(int, 1), float("nan")], ids=type)
    def test_a_field_that_is_no_text_is_no_trace(self, value):
        """A field of another type is passed over: it is neither printed nor iterated, and nothing is raised."""
        with capture() as spans, gpuscope.extract({"traceparent": value, "baggage": value}), gpuscope.stage("s"):
            pass
        assert spans[0].parent_id == 0

    def test_a_carrier_that_cannot_be_read_changes_nothing(self):
        """The request is served, as one without a trace."""
        with capture() as spans, gpuscope.extract(None), gpuscope.stage("s"):
            pass
        assert spans[0].parent_id == 0

    @pytest.mark.parametrize(
        "value",
        [b"\xff\x00", None, 5, ["x"], [None, b"y"], (), {}, object(), "nonsense", f"00-{0:032x}-{SPAN_ID:016x}-01"],
    )
    @pytest.mark.parametrize("field", ["traceparent", "tracestate", "baggage"])
    def test_a_value_that_is_no_trace_fails_no_request(self, field, value):
        """Whatever a client sends in whichever field, the block is entered, and stages inside are recorded."""
        with capture() as spans, gpuscope.extract({**REMOTE, field: value}), gpuscope.stage("request"):
            pass
        assert by_name(spans)["request"].trace_id == TRACE_ID or field == "traceparent"

    def test_bytes_are_text(self):
        """Headers as an ASGI scope has them go on with the trace."""
        headers = {name: value.encode() for name, value in REMOTE.items()}
        with capture() as spans, gpuscope.extract(headers), gpuscope.stage("request"):
            pass
        assert by_name(spans)["request"].trace_id == TRACE_ID

    @pytest.mark.parametrize("carrier", [None, [], [(b"traceparent", b"x")], 3])
    def test_a_carrier_that_is_no_mapping_is_no_trace(self, carrier, caplog):
        """What cannot be read is said once, and the block changes nothing."""
        with gpuscope.extract(carrier), gpuscope.extract(carrier):
            assert trace.get_current_span() is trace.INVALID_SPAN
        assert len(caplog.messages) <= 1

    def test_what_was_not_sampled_there_is_not_exported_here(self):
        """The flag of the remote trace holds, and is passed on: a trace is whole in all processes, or in none."""
        with capture() as spans, gpuscope.extract(UNSAMPLED), gpuscope.stage("worker"):
            sent = carrier()
        assert by_name(spans) == {}
        assert ids(sent)[0::2] == (TRACE_ID, 0)

    def test_a_trace_that_is_left_out_here_is_left_out_elsewhere(self):
        """A stage of a trace that this process does not sample says so in what it sends."""
        with capture(sampler="always_off") as spans, gpuscope.stage("root"):
            sent = carrier()
        if trace._TRACER_PROVIDER is None:  # Otherwise sampling is the provider's.
            assert by_name(spans) == {}
            assert ids(sent)[2] == 0
        else:
            assert ids(sent)[2] == 1

    def test_it_is_an_opentelemetry_context(self):
        """What is returned can be handed to OpenTelemetry's own functions."""
        remote = gpuscope.extract(REMOTE)
        assert isinstance(remote, context.Context)
        assert trace.get_current_span(remote).get_span_context().span_id == SPAN_ID

    def test_a_getter_reads_any_carrier(self):
        """As in OpenTelemetry, a getter says how a field is read."""

        class Pairs(Getter):
            def get(self, carrier, key):
                return [value.decode() for name, value in carrier if name == key.encode()] or None

            def keys(self, carrier):
                return [name.decode() for name, _ in carrier]

        headers = [(key.encode(), value.encode()) for key, value in REMOTE.items()]
        with capture() as spans, gpuscope.extract(headers, getter=Pairs()), gpuscope.stage("worker"):
            pass
        assert by_name(spans)["worker"].parent_id == SPAN_ID

    def test_off_the_application_still_goes_on_with_the_trace(self):
        """With recording off the block makes the remote span the application's current one."""
        with gpuscope.extract(REMOTE):
            assert trace.get_current_span().get_span_context().span_id == SPAN_ID
        assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.usefixtures("provider")
@pytest.mark.usefixtures("provider")
class TestTokens:
    """`extract` of a token."""

    def test_a_token_is_continued(self):
        """A stage in the block is a child of the stage that the token was made in, wherever it runs."""
        with capture() as spans:
            with gpuscope.stage("request"):
                token = gpuscope.here()
            with gpuscope.stage("worker"), gpuscope.extract(token), gpuscope.stage("decode"):
                pass
        found = by_name(spans)
        assert found["decode"].parent_id == found["request"].span_id
        assert found["decode"].trace_id == found["request"].trace_id

    @pytest.mark.parametrize("around", [lambda: gpuscope.stage("around"), lambda: gpuscope.extract(REMOTE)])
    def test_a_token_of_nothing_continues_nothing(self, around):
        """In its block a stage begins a trace of its own, though a stage or a remote span is current around it."""
        with capture() as spans, around():
            with gpuscope.extract(gpuscope.Token()), gpuscope.stage("batch"):
                pass
            with gpuscope.stage("after"):
                pass
        found = by_name(spans)
        assert not found["batch"].parent_id
        assert found["batch"].trace_id not in {found["after"].trace_id, f"{TRACE_ID:032x}"}
        assert found["after"].parent_id


class TestLeaving:
    """The block puts back what was, whoever else is in it."""

    def test_one_context_serves_many_threads(self):
        """Threads that are in the block of one object at once each get back what was theirs."""
        remote, inside, results = gpuscope.extract(REMOTE), threading.Barrier(3), []

        def work(number):
            own = trace.set_span_in_context(NonRecordingSpan(SpanContext(1, number, False, TraceFlags(1))))
            context.attach(own)
            with remote:
                inside.wait(10)
                results.append(trace.get_current_span().get_span_context().span_id)
                inside.wait(10)
            results.append(context.get_current() is own)

        with capture():
            threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
        assert sorted(results) == [True] * 3 + [SPAN_ID] * 3

    def test_one_context_serves_many_tasks(self):
        """The same for tasks of one thread that take turns in the block, and for blocks within each other."""
        remote = gpuscope.extract(REMOTE)

        async def work():
            """Be in the block, twice, while others are."""
            with remote:
                await asyncio.sleep(0)
                with remote:
                    await asyncio.sleep(0)
                assert trace.get_current_span().get_span_context().span_id == SPAN_ID
            return trace.get_current_span() is trace.INVALID_SPAN

        async def main():
            """Run three at once."""
            return await asyncio.gather(*(work() for _ in range(3)))

        with capture():
            assert asyncio.run(main()) == [True] * 3

    def test_a_stage_that_another_task_ended_is_not_left_behind(self):
        """A stage begun in the block may end in another task, as a response does; the block then takes it away."""
        with capture() as spans:
            with gpuscope.extract({}):
                request = gpuscope.stage("request")
                request.__enter__()
                contextvars.copy_context().run(request.__exit__, None, None, None)
            with gpuscope.stage("after"):
                pass
        found = by_name(spans)
        assert found["after"].parent_id == 0
        assert found["after"].trace_id != found["request"].trace_id


def test_names_cost_nothing_until_they_are_used(run_python):
    """`import gpuscope` does not import OpenTelemetry for them, and they work before anything else did."""
    program = (
        "import sys, gpuscope\nassert 'opentelemetry' not in sys.modules\n"
        "fields = {}\ngpuscope.inject(fields)\nassert fields == {}\n"
        "with gpuscope.extract({}), gpuscope.stage('s'): gpuscope.inject(fields)\n"
        "print(len(fields))\n"
    )
    assert run_python(program).stdout == "0\n"
    recorded = run_python(program, GPUSCOPE="1", GPUSCOPE_EXPORTER="file")
    assert recorded.stdout == "1\n", recorded.stderr
