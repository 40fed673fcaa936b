"""In a notebook: a cell recorded by itself, and results that draw themselves, in a real kernel."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient runs the notebook")
nbformat = pytest.importorskip("nbformat", reason="nbformat is the notebook")
if find_spec("ipykernel") is None:  # Not imported here: this process is not a kernel.
    pytest.skip("needs ipykernel", allow_module_level=True)

IMPORTS = """
import gpuscope
from gpuscope.analysis.compare import compare
from gpuscope.analysis.timeline import Timeline

@gpuscope.stage("infer")
def infer():
    sum(range(20_000))

@gpuscope.stage("request")
def request():
    infer()
"""
CAPTURE = """
with gpuscope.testing.capture(warmup=0) as spans:
    for _ in range(25):
        request()
spans
"""
CELLS = [
    IMPORTS,
    CAPTURE,
    "spans.timeline()",
    "Timeline(spans.recording())",
    "compare(spans.recording(), spans.recording())",
    "gpuscope.measure(infer, request, iterations=3, warmup=1)",
    "gpuscope.enable(exporters='none'); request(); gpuscope.flush(); gpuscope.summary()",
    "gpuscope.statistics()",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each cell of the notebook showed, by mime type."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    kernels = folder / "kernels" / "ours"
    kernels.mkdir(parents=True)
    command = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (kernels / "kernel.json").write_text(f'{{"argv": {command}, "display_name": "ours", "language": "python"}}')
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(folder)
    try:
        nbclient.NotebookClient(notebook, kernel_name="ours", timeout=120).execute()
    finally:
        os.environ.pop("JUPYTER_PATH")
        if before is not None:
            os.environ["JUPYTER_PATH"] = before
    return [
        next((output["data"] for output in cell["outputs"] if "data" in output), None) for cell in notebook["cells"]
    ]


def test_a_cell_is_recorded_by_itself(outputs):
    """What `capture` returns is drawn as a timeline, in a frame whose script reaches nothing of the notebook."""
    html = outputs[1]["text/html"]
    assert html.startswith('<iframe sandbox="allow-scripts allow-modals"')
    assert "infer" in html


@pytest.mark.parametrize("cell", [2, 3])
def test_a_timeline_draws_itself(outputs, cell):
    """As HTML, and as the answer where there is no HTML."""
    assert outputs[cell]["text/html"].startswith("<iframe ")
    assert "`request` takes " in outputs[cell]["text/plain"]


@pytest.mark.parametrize(("cell", "shown"), [(4, "within noise"), (5, "ratio"), (6, "infer"), (7, "recorded")])
def test_results_draw_themselves(outputs, cell, shown):
    """Comparison, measurement, summary and account are tables."""
    html = outputs[cell]["text/html"]
    assert html.startswith("<table>")
    assert shown in html
