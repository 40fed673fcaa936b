"""Under OpenTelemetry's `opentelemetry-instrument`: started by the entry point, switched off by their variable."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from gpuscope import _runtime
from gpuscope._instrumentor import GpuscopeInstrumentor

pytest.importorskip("opentelemetry.instrumentation.auto_instrumentation")
pytest.importorskip("opentelemetry.distro")
COMMAND = Path(sys.executable).with_name("opentelemetry-instrument")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a small service under `opentelemetry-instrument`, with the console as exporter."""
    (tmp_path / "app.py").write_text("def infer(images):\n    return len(images)\n")
    (tmp_path / "serve.py").write_text("import app\nprint('answer', app.infer([1, 2]))\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    settings = {
        "OTEL_TRACES_EXPORTER": "console",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "GPUSCOPE_STAGES": "infer=app:infer{batch_size=len(images)}",
    }

    def run(*command, **variables):
        return subprocess.run(
            [str(COMMAND), *(command or (sys.executable, "serve.py"))],
            env={**kept, **settings, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return run


def test_entry_point_is_declared():
    """The package's metadata name the class where OpenTelemetry looks."""
    (found,) = entry_points(group="opentelemetry_instrumentor", name="gpuscope")
    assert found.load() is GpuscopeInstrumentor


def test_starts_with_no_code(run):
    """A service that never heard of gpuscope has spans of the stages that the variable names."""
    done = run()
    assert "answer 2\n" in done.stdout
    assert '"name": "infer"' in done.stdout
    assert '"batch_size": 2' in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("off", [{"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "gpuscope"}, {"GPUSCOPE": "0"}])
def test_can_be_switched_off(run, off):
    """OpenTelemetry's variable leaves gpuscope out, and so does our own."""
    assert run(**off).stdout == "answer 2\n"


def test_around_gpuscope_run(run):
    """The two launchers go together; then the script's own functions can be stages as well."""
    done = run(
        sys.executable, "-m", "gpuscope", "run", "--stage", "app=__main__:app.infer", "serve.py", GPUSCOPE_STAGES=""
    )
    assert '"name": "app"' in done.stdout
    assert done.stdout.count('"name": "app"') == 1


def test_is_shaped_as_an_instrumentor():
    """It has the methods of `BaseInstrumentor`, and undoing stops recording."""
    from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

    ours = GpuscopeInstrumentor()
    assert all(callable(getattr(ours, name)) for name in ("instrument", "uninstrument", "instrumentation_dependencies"))
    assert all(hasattr(BaseInstrumentor, name) for name in vars(GpuscopeInstrumentor) if name[0] != "_")
    assert ours.instrumentation_dependencies() == ()
    ours.uninstrument()
    assert _runtime.state.recorder is None
