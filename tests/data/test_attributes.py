"""Names of attributes: what is written is what is read, and each name is spelled in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gpuscope._data import attributes
from gpuscope._data.attributes import FLAGS, GPU_FLAGS, HOST_FLAGS
from gpuscope._data.batch import RowFlag
from gpuscope._data.metrics import IN_FILES_ALONE, SPECS
from gpuscope._settings.config import Config
from gpuscope.analysis._viewers.tags import gpu_tags, host_tags
from gpuscope.analysis.read import read
from gpuscope.exporters.file import FileExporter
from gpuscope.exporters.memory import MemoryExporter

from ..exporters.batches import NOW_NS, Delivery, Row, make_batch

PACKAGE = Path(attributes.__file__).parents[1]
NAMES = {value for value in vars(attributes).values() if type(value) is str and value[0].islower() and "." in value}
METRICS = {spec.name for spec in (*SPECS, *IN_FILES_ALONE)}
MODULES = {"gpuscope.__main__", "gpuscope._data.attributes", "gpuscope.analysis", "gpuscope.integrations"}


def new_batch(flag):
    """Return a batch of two stages, of which the one inside has a GPU span and this flag."""
    in_graph = flag is RowFlag.IN_GRAPH
    inside = Row(span_id=5, gpu_span_id=5 if in_graph else 9, parent_id=3, flags=int(flag), start_ns=NOW_NS + 1)
    return make_batch(Row(span_id=3), inside)


@pytest.fixture
def recording(tmp_path):
    """Return a function that has a batch written to a file, and reads it."""

    def recording_of(batch):
        exporter = FileExporter(Config().changed(file=str(tmp_path / "trace.jsonl")), {})
        exporter.export(batch, Delivery(len(batch.site)))
        exporter.shutdown(1)
        return read([tmp_path / "trace.jsonl"])

    return recording_of


@pytest.mark.parametrize("flag", set(RowFlag) - {RowFlag.SHARED})
def test_a_flag_that_is_written_is_read(flag, recording):
    """Each flag of a row is in its recording, and no other; of light spans, which are no stages, nothing is."""
    assert recording(new_batch(flag)).flags.tolist() == [0, flag]


@pytest.mark.parametrize("flag", FLAGS.keys() - {RowFlag.SHARED})
def test_viewers_name_a_flag_as_spans_do(flag, recording):
    """The attribute of a flag is on a span that shows it, and on what viewers show of the same stage."""
    spans = []
    batch = new_batch(flag)
    MemoryExporter(spans).export(batch, Delivery(len(batch.site)))
    shown = {span.kind for span in spans if span.attributes.get(FLAGS[flag]) is True}
    assert shown == {kind for kind, flags in (("host", HOST_FLAGS), ("gpu", GPU_FLAGS)) if flag in flags}
    read_again = recording(batch)
    assert host_tags(read_again, 1)[FLAGS[flag]] is gpu_tags(read_again, 1, {})[FLAGS[flag]] is True


def test_every_flag_has_an_attribute_or_a_field():
    """A new flag gets a name of its own, which some span shows."""
    assert set(FLAGS) == {flag for flag in RowFlag if flag is not RowFlag.REMOTE_PARENT}
    assert len(set(FLAGS.values())) == len(FLAGS)
    assert HOST_FLAGS | GPU_FLAGS == FLAGS


def test_viewers_name_what_is_measured_as_spans_do(recording):
    """All that viewers show of a GPU span is on the span, by the same names."""
    spans = []
    batch = make_batch(Row(gpu_span_id=9))
    MemoryExporter(spans).export(batch, Delivery(len(batch.site)))
    assert gpu_tags(recording(batch), 0, {}).keys() <= spans[1].attributes.keys()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_are_spelled_in_one_place(path):
    """
    No other module has the text of an attribute's name.

    Two kinds of text look alike: names of metrics, of which one is also an attribute's, and names of modules.
    """
    texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    spelled = {text for text in texts if isinstance(text, str) and (text in NAMES or text.startswith("gpuscope."))}
    allowed = {"_data/attributes.py": NAMES, "_data/metrics.py": METRICS}.get(str(path.relative_to(PACKAGE)), MODULES)
    assert spelled <= allowed
