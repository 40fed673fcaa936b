"""What a batch is as spans, seen through the exporter that keeps objects."""

from __future__ import annotations

import pytest

from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.record import ExceptionInfo, Site
from gpuscope.exporters.memory import MemoryExporter

from .batches import DEVICE, NOW_NS, SITE, THREAD, Row, make_batch


@pytest.fixture
def capture(account):
    """Return a function that gives a batch's spans."""

    def spans_of(*rows, **keywords):
        spans = []
        batch = make_batch(*rows, **keywords)
        MemoryExporter(spans).export(batch, account.open(batch))
        return spans

    return spans_of


def test_a_stage_without_a_gpu_part_is_one_host_span(capture, account):
    """A row without a GPU span id gives the host span alone, with its duration and what is known of its site."""
    (span,) = capture(Row(parent_id=5))
    assert (span.name, span.kind, span.parent_id) == ("infer", "host", 5)
    assert (span.start_ns, span.duration_ns) == (NOW_NS, 1_000_000)
    assert span.attributes == {
        "code.file.path": "/app/model.py",
        "code.function.name": "app.model.infer",
        "code.line.number": 12,
        "gpuscope.host.duration": 0.001,
        "gpuscope.stage": "infer",
        "model": "vit",
        "thread.id": THREAD.ident,
        "thread.name": "MainThread",
    }
    assert account.exported == 1


def test_a_gpu_part_is_a_child_span_with_its_own_times(capture):
    """A row with a GPU span id gives a second span, child of the first, placed by the GPU's times."""
    host, gpu = capture(Row(gpu_span_id=9))
    assert (gpu.name, gpu.kind, gpu.parent_id, gpu.trace_id) == ("infer [gpu]", "gpu", host.span_id, host.trace_id)
    assert (gpu.start_ns, gpu.duration_ns) == (NOW_NS + 20_000, 5_000_000)
    assert gpu.attributes == {
        "gpuscope.clock.uncertainty": 3.5e-6,
        "gpuscope.cuda.stream": 7,
        "gpuscope.device.index": 0,
        "gpuscope.gpu.duration": 0.005,
        "gpuscope.launch_to_start": 2e-5,
        "gpuscope.stage": "infer",
        "hw.id": DEVICE.uuid,
        "hw.model": "NVIDIA H200",
        "hw.vendor": "NVIDIA",
        "hw.type": "gpu",
        "thread.id": THREAD.ident,
        "thread.name": "MainThread",
    }
    assert host.attributes["gpuscope.gpu.duration"] == 0.005
    assert host.attributes["gpuscope.launch_to_start"] == 2e-5


def test_flags_show_only_where_they_hold(capture):
    """Each flag is an attribute of the span that it concerns, and absent elsewhere."""
    flags = RowFlag.WARMUP | RowFlag.CLAMPED | RowFlag.CAPTURED | RowFlag.GIVEN_UP
    host, gpu, plain, plain_gpu = capture(Row(flags=flags, gpu_span_id=9), Row(gpu_span_id=9))

    def shown(span):
        return {key for key, value in span.attributes.items() if value is True}

    assert shown(host) == {"gpuscope.warmup", "gpuscope.captured", "gpuscope.given_up"}
    assert shown(gpu) == {"gpuscope.warmup", "gpuscope.clamped"}
    assert shown(plain) == shown(plain_gpu) == set()


def test_an_unknown_device_costs_its_description_only(capture):
    """A GPU span of a device that nobody described lacks the description and nothing else."""
    _, gpu = capture(Row(gpu_span_id=9, device=3))
    assert gpu.attributes["gpuscope.device.index"] == 3
    assert "hw.id" not in gpu.attributes


def test_a_runs_attributes_are_its_own(capture):
    """What a run sets replaces the site's value for that run, and does not leak to its neighbours."""
    first, second = capture(Row(details=SpanDetails(attributes={"model": "other", "batch_size": 8})), Row())
    assert (first.attributes["model"], first.attributes["batch_size"]) == ("other", 8)
    assert second.attributes["model"] == "vit"
    assert "batch_size" not in second.attributes


def test_values_that_are_equal_but_not_the_same_stay_apart(capture):
    """1, True and 1.0 hash alike and yet keep their types."""
    spans = capture(*(Row(details=SpanDetails(attributes={"x": value})) for value in (1, True, 1.0)))
    assert [type(span.attributes["x"]) for span in spans] == [int, bool, float]


@pytest.mark.parametrize("where", ["site", "run"])
def test_what_is_measured_cannot_be_replaced(capture, where):
    """An attribute of the application's with the name of a measurement gives way; other names are its own."""
    attributes = {"gpuscope.host.duration": "x", "thread.name": "mine"}
    row = Row(site=Site("s", attributes)) if where == "site" else Row(details=SpanDetails(attributes=attributes))
    (span,) = capture(row)
    assert span.attributes["gpuscope.host.duration"] == 0.001
    assert span.attributes["thread.name"] == "mine"


def test_an_error_is_status_event_and_type(capture):
    """A stage left by an exception has what the SDK would give it."""
    info = ExceptionInfo("ValueError", "bad image", (("app.py", 3, "main"), ("model.py", 7, "infer")))
    host, gpu = capture(Row(gpu_span_id=9, details=SpanDetails(error=info)))
    assert (host.status, host.description, host.error) == ("ERROR", "ValueError: bad image", info)
    assert host.attributes["error.type"] == "ValueError"
    ((name, at_ns, attributes),) = host.events
    assert (name, at_ns) == ("exception", host.end_ns)
    assert attributes == {
        "exception.type": "ValueError",
        "exception.message": "bad image",
        "exception.stacktrace": 'Traceback (most recent call last):\n  File "app.py", line 3, in main\n'
        '  File "model.py", line 7, in infer\nValueError: bad image\n',
    }
    assert (gpu.status, gpu.events) == ("UNSET", ())


def test_the_status_names_an_error_in_short(capture):
    """As the SDK does, so that who groups by it finds both together; `error.type` has the whole name."""
    (host,) = capture(Row(details=SpanDetails(error=ExceptionInfo("myapp.errors.Oops", "bad", ()))))
    assert (host.description, host.attributes["error.type"]) == ("Oops: bad", "myapp.errors.Oops")


def test_a_status_of_ok_is_final(capture):
    """A status of OK that the application set outlasts an exception; an error's description goes with errors only."""
    error = ExceptionInfo("E", "m", ())
    spans = capture(
        Row(details=SpanDetails(error=error, status=("OK", "ignored"))),
        Row(details=SpanDetails(status=("ERROR", "mine"))),
        Row(details=SpanDetails(status=("UNSET", "ignored"))),
    )
    assert [(span.status, span.description) for span in spans] == [("OK", ""), ("ERROR", "mine"), ("UNSET", "")]


def test_a_new_name_names_both_spans(capture):
    """A span renamed through OpenTelemetry has its GPU span renamed with it; the stage stays what it was."""
    host, gpu, other = capture(Row(gpu_span_id=9, details=SpanDetails(name="renamed")), Row())
    assert (host.name, gpu.name, other.name) == ("renamed", "renamed [gpu]", "infer")
    assert host.attributes["gpuscope.stage"] == "infer"


def test_events_and_links_pass(capture):
    """Events and links of the application's are those of the host span."""
    details = SpanDetails(events=(("token", NOW_NS + 5, {"n": 1}),), links=((1, 2, {"why": "batched"}),))
    (span,) = capture(Row(details=details))
    assert span.events == (("token", NOW_NS + 5, {"n": 1}),)
    assert span.links == ((1, 2, {"why": "batched"}),)


def test_templates_hold_across_batches(account):
    """An exporter that has seen one batch does not take another's sites and threads for those it knows."""
    spans = []
    exporter = MemoryExporter(spans)
    for batch in (make_batch(Row(), Row(site=Site("a", {}))), make_batch(Row(site=Site("b", {})), Row(site=SITE))):
        exporter.export(batch, account.open(batch))
    assert [span.name for span in spans] == ["infer", "a", "b", "infer"]


def test_more_groups_than_are_remembered(account):
    """When there are more groups than the cache holds, spans are still right."""
    spans = []
    exporter = MemoryExporter(spans)
    rows = [Row(site=Site(f"s{number}", {})) for number in range(2500)]
    for first in range(0, len(rows), 500):
        batch = make_batch(*rows[first : first + 500])
        exporter.export(batch, account.open(batch))
    assert [span.name for span in spans] == [row.site.name for row in rows]
    assert len(exporter._templates) <= 2048
