"""Of which TracerProviders the spans may go past the span processors, and why not of the others."""

from __future__ import annotations

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk import trace
from opentelemetry.sdk.trace import sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator

from gpuscope._otel.provider_end import end_of
from gpuscope._otel.stock import Judge, judge

URL = "http://127.0.0.1:9/v1/traces"


class LikePhoenix(SimpleSpanProcessor):
    """A subclass for its constructor alone."""

    def __init__(self):
        super().__init__(OTLPSpanExporter(URL))


class Scrubbing(SimpleSpanProcessor):
    """Changes spans."""

    def on_end(self, span):
        """Hand on something else."""
        super().on_end(span)


class Baggage(trace.SpanProcessor):
    """Adds attributes at the start."""


class Starting(trace.SpanProcessor):
    """Adds attributes at the start."""

    def on_start(self, span, parent_context=None):
        """Add one."""


class OtherHolder(trace.SynchronousMultiSpanProcessor):
    """Does something of its own at the end."""

    def on_end(self, span):
        """Hand it on to nobody."""


class Renaming(OTLPSpanExporter):
    """Changes what is sent."""

    def export(self, spans):
        """Send something else."""
        return super().export(spans)


class ByName(sampling.Sampler):
    """Looks at names."""

    def should_sample(self, *arguments, **keywords):
        """Keep all."""
        return sampling.SamplingResult(sampling.Decision.RECORD_AND_SAMPLE)

    def get_description(self):
        """Return a name."""
        return "by name"


@pytest.mark.parametrize(
    ("sampler", "keeps"),
    [
        (sampling.ALWAYS_ON, True),
        (sampling.DEFAULT_ON, True),
        (sampling.ParentBased(sampling.ALWAYS_ON, local_parent_not_sampled=sampling.ALWAYS_ON), True),
        (sampling.ALWAYS_OFF, False),
        (sampling.DEFAULT_OFF, False),
        (sampling.TraceIdRatioBased(1.0), False),
        (ByName(), False),
        (sampling.ParentBased(ByName()), False),
        (None, False),
    ],
)
def test_a_sampler_that_keeps_every_root_need_not_be_asked(sampler, keeps):
    """It is known for sure, or the sampler is asked."""
    provider = trace.TracerProvider()
    provider.sampler = sampler
    judge = Judge(lambda: provider, lambda: None)
    assert judge.keeps_roots() is keeps
    provider.sampler = sampling.ALWAYS_OFF
    assert judge.keeps_roots() is False


class Counting(IdGenerator):
    """Makes ids of its own."""

    generate_span_id = generate_trace_id = lambda self: 1


def provider(*processors, **settings):
    """Return a provider with span processors."""
    made = trace.TracerProvider(shutdown_on_exit=False, **settings)
    for processor in processors:
        made.add_span_processor(processor)
    return made


def judged(made):
    """Judge a provider."""
    return judge(made, made.get_tracer("gpuscope"))


def simple():
    """Return a span processor as programs have it."""
    return SimpleSpanProcessor(OTLPSpanExporter(URL))


def replaced():
    """Return one with a method replaced on the object, as Traceloop does."""
    made = simple()
    made.on_start = lambda span, parent_context=None: None
    return made


PARENTS = sampling.ParentBased(sampling.TraceIdRatioBased(0.5))


@pytest.mark.parametrize(
    ("make", "protocols"),
    [
        (lambda: provider(simple()), ["http"]),
        (lambda: provider(SimpleSpanProcessor(GrpcExporter(URL, insecure=True))), ["grpc"]),
        (lambda: provider(BatchSpanProcessor(OTLPSpanExporter(URL))), ["http"]),
        (lambda: provider(LikePhoenix()), ["http"]),
        (lambda: provider(simple(), simple()), ["http", "http"]),
        (lambda: provider(simple(), sampler=PARENTS), ["http"]),
        (lambda: provider(simple(), sampler=sampling.DEFAULT_OFF), ["http"]),
        (lambda: provider(simple(), sampler=sampling._ParentBasedAlwaysOn("")), ["http"]),
        (lambda: provider(simple(), active_span_processor=trace.ConcurrentMultiSpanProcessor(1)), ["http"]),
    ],
)
def test_plain_providers(make, protocols):
    """Stock processors over stock exporters, whoever subclasses them for a constructor, and plain samplers."""
    found = judged(make())
    assert [target.protocol for target in found.targets] == protocols
    assert not found.reason


class Bystander(trace.SpanProcessor):
    """Looks at spans that have ended."""

    def on_end(self, span):
        """See."""


class Ending(trace.SpanProcessor):
    """Changes spans just before their end."""

    def _on_ending(self, span):
        span.set_attribute("late", True)


class NotOfTheSdk:
    """Has the methods, and nothing else that is known of it."""

    def on_start(self, span, parent_context=None):
        """Do nothing."""

    on_end = _on_ending = shutdown = force_flush = on_start


@pytest.mark.parametrize(
    ("make", "finished"),
    [
        (lambda: provider(Scrubbing(OTLPSpanExporter(URL))), True),
        (lambda: provider(simple(), SimpleSpanProcessor(ConsoleSpanExporter())), True),
        (lambda: provider(BatchSpanProcessor(Renaming(URL)), Bystander()), True),
        (lambda: provider(simple(), Bystander()), True),
        (lambda: provider(simple(), replaced()), False),
        (lambda: provider(simple(), Starting()), False),
        (lambda: provider(simple(), NotOfTheSdk()), False),
        (lambda: provider(Bystander(), sampler=ByName()), False),
        (lambda: provider(Bystander(), id_generator=Counting()), False),
        (lambda: provider(Bystander(), active_span_processor=OtherHolder()), False),
        (provider, False),
        (lambda: provider(simple()), False),
    ],
)
def test_providers_whose_processors_wait_for_the_end(make, finished):
    """Only where nobody does anything before it may a span be made then; where bytes may go, they go."""
    found = judged(make())
    assert found.takes_finished is finished
    assert found.makes_ids is not (finished or bool(found.targets))


@pytest.mark.skipif(
    not hasattr(trace.SpanProcessor, "_on_ending"), reason="this version of OpenTelemetry has no such hook"
)
def test_a_processor_that_changes_spans_just_before_their_end():
    """It needs a span that can be changed."""
    assert not judged(provider(simple(), Ending())).takes_finished


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (provider, "no span processor"),
        (lambda: provider(Scrubbing(OTLPSpanExporter(URL))), "test_stock.Scrubbing` may change spans"),
        (lambda: provider(simple(), Baggage()), "test_stock.Baggage` may change spans"),
        (lambda: provider(replaced()), "SimpleSpanProcessor` may change spans"),
        (lambda: provider(SimpleSpanProcessor(ConsoleSpanExporter())), "ConsoleSpanExporter` is not"),
        (lambda: provider(SimpleSpanProcessor(Renaming(URL))), "test_stock.Renaming` is not"),
        (lambda: provider(simple(), sampler=ByName()), "test_stock.ByName` may look"),
        (lambda: provider(simple(), sampler=sampling.ParentBased(ByName())), "ParentBased` may look"),
        (lambda: provider(simple(), id_generator=Counting()), "ids come from a"),
        (lambda: provider(simple(), id_generator=type("Odd", (RandomIdGenerator,), {})()), "ids come from a"),
    ],
)
def test_other_providers(make, said):
    """The reason names what may do something to a span."""
    found = judged(make())
    assert not found.targets
    assert said in found.reason


def test_a_provider_that_is_not_of_the_sdk():
    """Datadog's, say, and one whose parts raise."""

    class Odd(trace.TracerProvider):
        @property
        def id_generator(self):
            raise RuntimeError

        @id_generator.setter
        def id_generator(self, value):
            pass

    assert "the provider is a `builtins.object`" in judge(object(), None).reason
    assert "cannot be looked at (RuntimeError)" in judge(Odd(), provider(simple()).get_tracer("gpuscope")).reason


def test_a_tracer_that_is_disabled(monkeypatch):
    """Nothing is sent for a scope that the program has switched off."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert "its tracer is a" in judged(provider(simple())).reason


def test_processors_of_ours_do_not_count():
    """What takes notice of the provider's end changes no span."""
    made = provider(simple())
    end_of(made)
    assert len(judged(made).targets) == 1


class Replacing(trace.TracerProvider):
    """Takes each processor for a replacement of the one that it has, as Phoenix's does."""

    def add_span_processor(self, span_processor):
        """Replace what is there."""
        self._active_span_processor._span_processors = ()
        super().add_span_processor(span_processor)


def test_processors_of_ours_replace_none():
    """Whatever a provider makes of one that is added to it: its own stays, behind ours, and is flushed."""
    made, processor = Replacing(shutdown_on_exit=False), simple()
    made.add_span_processor(processor)
    end_of(made)
    first, second = made._active_span_processor._span_processors
    assert first.force_flush(1000) is True
    assert second is processor
    assert len(judged(made).targets) == 1


def test_a_judgement_holds_until_something_changes():
    """Another processor is noticed at once, and a replaced method when it is looked at anew."""
    made = provider(simple())
    judge_of = Judge(lambda: made, lambda: made.get_tracer("gpuscope"))
    first = judge_of.judgement()
    assert first.targets
    assert judge_of.judgement() is first
    assert judge_of.judgement(anew=True) is first
    made._active_span_processor._span_processors[0].on_end = print
    assert judge_of.judgement() is first
    assert not judge_of.judgement(anew=True).targets
    made = provider(simple())
    assert judge_of.judgement().targets
    made.add_span_processor(Baggage())
    assert not judge_of.judgement().targets
