"""The examples, run as a reader runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import gpuscope
from gpuscope._columns import RowFlag
from gpuscope._config import Config
from gpuscope._record import Site
from gpuscope.exporters.file import FileExporter

from .exporters.batches import NOW_NS, Account, Row, make_batch

ROOT = Path(__file__).parents[1]
PACKAGE = Path(gpuscope.__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    """Run an example with some variables, in an empty folder."""

    def run(name, *arguments, **variables):
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("GPUSCOPE", "OTEL_"))}
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
            env=ours | {"PYTHONPATH": str(PACKAGE), "PYTHONUTF8": "1"} | variables,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


def line_with(text, *words):
    """Where the first line is that has the words in it, and its indentation."""
    for number, line in enumerate(text.splitlines()):
        if all(word in line for word in words):
            return number, len(line) - len(line.lstrip())
    raise AssertionError(f"no line with {words} in:\n{text}")


class TestDecorateExisting:
    """`decorate_existing.py`."""

    def test_records_every_stage(self, run, tmp_path):
        """The decorated script prints a summary with its stages in order and writes all spans to a file."""
        done = run("decorate_existing.py", GPUSCOPE="1", GPUSCOPE_EXPORTER="file")
        stages = ("classify", "preprocess", "to device", "infer", "postprocess")
        numbers = [line_with(done.stdout, f"{stage} ", " 30 ")[0] for stage in stages]
        assert numbers == sorted(numbers)
        assert "recorded 150, exported 150" in done.stdout
        assert len(list(tmp_path.glob("gpuscope-*.jsonl"))) == 1
        assert done.stderr == ""

    def test_without_the_variable(self, run, tmp_path):
        """Without the variable the script does its work, records nothing and writes nothing."""
        done = run("decorate_existing.py")
        assert "The last batch is of kinds" in done.stdout
        assert "No stages recorded" in done.stdout
        assert not list(tmp_path.iterdir())


class TestService:
    """`service.py`."""

    def test_stages_and_the_services_spans_are_one_trace(self, run):
        """The service's spans lie around the stages and inside them, in one tree."""
        done = run("service.py", GPUSCOPE="1")
        names = ("client", "POST /classify", "classify", "postprocess", "look up name")
        makers = ("classifier", "classifier", "gpuscope", "gpuscope", "classifier")
        places = [line_with(done.stdout, f"{name} ", f"by {maker}") for name, maker in zip(names, makers, strict=True)]
        assert [indent for _, indent in places] == [0, 2, 4, 6, 8]
        assert [number for number, _ in places] == sorted(number for number, _ in places)
        assert done.stderr == ""

    def test_without_the_variable(self, run):
        """Without the variable the service runs and has its own spans alone."""
        done = run("service.py")
        assert "by classifier" in done.stdout
        assert "by gpuscope" not in done.stdout


class TestDrawRequest:
    """`draw_request.py`."""

    @pytest.fixture
    def spans(self, tmp_path):
        """A file of three requests of 8, 4 (a warm-up) and 6 ms; children come on a line before their roots."""
        exporter = FileExporter(Config().changed(file=str(tmp_path / "spans.jsonl")), {})
        roots, inner = [], []
        stages = ("<b>&'load'", 0, 500_000, 0), ("infer", 500_000, 900_000, 7), ("copy", 1_400_000, 4_500_000, 9)
        for number, (root_ns, flags) in enumerate(((8_000_000, 0), (4_000_000, RowFlag.WARMUP), (6_000_000, 0)), 1):
            start_ns = NOW_NS + number * 10_000_000
            facts = {"trace_id": number, "flags": int(flags)}
            roots.append(Row(Site("answer", {}), span_id=number, start_ns=start_ns, host_ns=root_ns, **facts))
            for each, (name, offset_ns, host_ns, stream) in enumerate(stages, 10 * number):
                ids = {"span_id": each, "parent_id": number, "gpu_span_id": stream and 100 + each}
                times = {"start_ns": start_ns + offset_ns, "host_ns": host_ns, "gpu_ns": 2_000_000}
                inner.append(Row(Site(name, {}), **ids, **times, **facts, stream=stream))
        for rows in (inner, roots):
            batch = make_batch(*rows)
            exporter.export(batch, Account().open(batch))
        exporter.shutdown(1)
        return tmp_path / "spans.jsonl"

    def texts(self, path):
        """What is written in a picture, which must be well-formed."""
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert int(root.get("height")) <= 420
        return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]

    def test_one_request(self, run, spans, tmp_path):
        """The picture has the stages of one request, markup in names escaped, and a lane for each GPU stream."""
        run("draw_request.py", spans, tmp_path / "out.svg")
        texts = self.texts(tmp_path / "out.svg")
        names = ("answer 6.00 ms", "<b>&'load' 0.50 ms", "infer 0.90 ms", "infer [gpu] 2.00 ms", "copy [gpu] 2.00 ms")
        assert set(names) <= set(texts)
        assert [text for text in texts if text.startswith("stream")] == ["stream 7", "stream 9"]
        assert "The median of 2 requests after warm-up." in texts
        assert "NVIDIA H200, GPU times ± 3.5 µs" in texts

    def test_a_part_of_the_slowest_request(self, run, spans, tmp_path):
        """The axis can begin with a stage; the caption then says what lies before it."""
        run("draw_request.py", spans, tmp_path / "out.svg", "--pick", "slowest", "--from", "infer")
        texts = self.texts(tmp_path / "out.svg")
        assert "The slowest of 2 requests after warm-up. Drawn from infer on; before it: <b>&'load' 0.50 ms." in texts
        assert {"infer 0.90 ms", "infer [gpu] 2.00 ms", "copy 4.50 ms", "copy [gpu] 2.00 ms"} <= set(texts)
        assert texts.count("<b>&'load' 0.50 ms") == 0

    def test_without_a_gpu(self, run, tmp_path):
        """What the decorated script wrote on a machine without a GPU is drawn too, with its stages on the host."""
        run("decorate_existing.py", GPUSCOPE="1", GPUSCOPE_EXPORTER="file", CUDA_VISIBLE_DEVICES="")
        (spans,) = tmp_path.glob("gpuscope-*.jsonl")
        run("draw_request.py", spans, tmp_path / "out.svg")
        texts = self.texts(tmp_path / "out.svg")
        for name in ("classify", "preprocess", "to device", "infer", "postprocess"):
            assert any(text.startswith(f"{name} ") for text in texts), name
        assert "no GPU times" in texts
