"""The examples, run as a reader runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpuscope

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
        assert "Kinds in the last batch:" in done.stdout
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


class TestBatching:
    """`batching.py`."""

    def test_shows_a_request_and_its_batch(self, run):
        """Each request is in a batch, and its trace has the light span with its wait."""
        done = run("batching.py")
        assert done.stdout.startswith("60 requests in ")
        request, light = (line_with(done.stdout, word)[0] for word in ("request  ", "predict (shared)"))
        assert request < light
        line_with(done.stdout, "predict (shared)", "gpuscope.batch.wait=")
        assert done.stderr == ""


class TestDrawTimeline:
    """`draw_timeline.py`."""

    def test_picture_of_a_request(self, run, tmp_path):
        """What the decorated script wrote becomes a picture."""
        pytest.importorskip("playwright", reason="needs the extra `browser`")
        if not shutil.which("chromium"):
            pytest.skip("needs Chromium")
        run("decorate_existing.py", GPUSCOPE="1", GPUSCOPE_EXPORTER="file", CUDA_VISIBLE_DEVICES="")
        (spans,) = tmp_path.glob("gpuscope-*.jsonl")
        run("draw_timeline.py", spans, tmp_path / "out.png", "--from", "infer", "--select", "infer")
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


class TestDetection:
    """`detection/run.py`: three versions of one pipeline."""

    QUICK = ("detection/run.py", "--quick", "--device", "cpu", "--out", ".")
    STAGES = ("preprocess", "inference", "postprocess")

    @pytest.fixture(autouse=True)
    def rf_detr(self):
        """Skip where this transformers has no RF-DETR."""
        transformers = pytest.importorskip("transformers")
        if not hasattr(transformers, "RfDetrConfig"):
            pytest.skip("needs a newer transformers")

    def test_outputs_are_equal_and_every_stage_is_reported(self, run, tmp_path):
        """The compiled version finds what the first one found; the report has the stages of both and the whole."""
        done = run(*self.QUICK)
        for version in ("as_written", "compiled"):
            numbers = [line_with(done.stdout, version, stage)[0] for stage in self.STAGES]
            assert numbers == sorted(numbers)
        line_with(done.stdout, "compiled", "99 % interval", "from 30 and 30 requests")
        line_with(done.stdout, "Outputs are equal", "0 in compiled")
        figures = json.loads((tmp_path / "detection.json").read_text())
        assert figures["device"]["type"] == "cpu"
        assert figures["outputs"]["detections"] > 100
        assert list(figures["versions"]["compiled"]["stages"]) == list(self.STAGES)

    def test_without_a_compiler(self, run, tmp_path):
        """Where `torch.compile` finds no compiler, the third version says why and runs without."""
        missing = {"CXX": str(tmp_path / "c++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        done = run(*self.QUICK, "--requests", 3, "--rounds", 1, **missing)
        line_with(done.stdout, "Note: compiled runs without torch.compile (", "Error")
        line_with(done.stdout, "Outputs are equal", "0 in compiled")
        line_with(done.stdout, "compiled", "too few, from 3 and 3 requests")

    @pytest.mark.skipif(not hasattr(gpuscope, "overlap"), reason="needs `gpuscope.overlap`")
    def test_with_helpers(self, run, tmp_path):
        """Handed to `overlap`, the functions as they were written find the same in the same photographs."""
        done = run(*self.QUICK, "--no-compile", "--requests", 3, "--rounds", 1)
        line_with(done.stdout, "Note: compiled runs without torch.compile (--no-compile)")
        numbers = [line_with(done.stdout, "with_helpers", stage)[0] for stage in self.STAGES]
        assert numbers == sorted(numbers)
        line_with(done.stdout, "Outputs are equal", "0 in with_helpers")
        assert json.loads((tmp_path / "detection.json").read_text())["outputs"]["without_a_like"]["with_helpers"] == 0
