"""Stages inside CUDA graphs through the application's TracerProvider."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gpuscope._data.batch import RowFlag
from gpuscope.exporters.sdk import SdkExporter

from .batches import Account, Row, make_batch

IN_GRAPH = {"host_ns": 0, "flags": int(RowFlag.IN_GRAPH)}


def test_inner_stages_become_spans_of_the_provider():
    """Each is a child of the stage around the replay, or of the stage around it in the graph, whose id the SDK made."""
    spans, provider, account = InMemorySpanExporter(), TracerProvider(), Account()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    rows = [
        Row(span_id=11, gpu_span_id=11, parent_id=3, **IN_GRAPH),
        Row(span_id=12, gpu_span_id=12, parent_id=11, **IN_GRAPH),
    ]
    batch = dataclasses.replace(make_batch(*rows), live=(None, None))
    exporter = SdkExporter(
        SimpleNamespace(tracer=provider.get_tracer("gpuscope"), provider=provider, provider_has_ended=lambda: False)
    )
    for _ in exporter.export(batch, account.open(batch)):
        pass
    exporter.shutdown(1)
    account.check()
    assert account.exported == 2
    outer, inner = spans.get_finished_spans()
    assert outer.parent.span_id == 3
    assert inner.parent.span_id == outer.context.span_id
    assert outer.context.trace_id == inner.context.trace_id == rows[0].trace_id
    assert outer.name == "infer [gpu]"
    assert outer.attributes["gpuscope.graph"] is True
    assert (outer.start_time, outer.end_time) == (int(batch.gpu_start_ns[0]), int(batch.gpu_end_ns[0]))
