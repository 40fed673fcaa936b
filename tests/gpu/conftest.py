"""
Fixtures for the tests that need a GPU.

They also run without the project's pytest settings and plugins, as on a machine lent for the purpose:
`python -m pytest -c /dev/null --rootdir . tests/gpu`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def pytest_configure(config):
    """Register the marker, for runs without the project's settings."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder, and skip them where there is no GPU."""
    mine = [item for item in items if HERE in Path(item.path).parents]
    if not mine:
        return
    usable = _cuda_is_usable()
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        # PyTorch's, about prototypes and its own deprecations: which ones come depends on its version.
        for kind in ("UserWarning", "FutureWarning", "DeprecationWarning"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
        if not usable:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _cuda_is_usable() -> bool:
    """Ask PyTorch, which creates no context for the answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torch
        except ImportError:
            return False
        return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    """End each test with recording off and nothing remembered."""
    yield
    from gpuscope import _runtime

    _runtime.reset()


@pytest.fixture(scope="session")
def cupti():
    """The benchmarks' module that asks CUPTI, loaded from its file: `benchmarks` is not a package."""
    path = ROOT / "benchmarks" / "_cupti.py"
    spec = importlib.util.spec_from_file_location("gpuscope_benchmarks_cupti", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gpu_of():
    """Return a function that gives the GPU span of each host span, by the host span's id."""
    return lambda spans: {span.parent_id: span for span in spans if span.kind == "gpu"}


@pytest.fixture(scope="session")
def until():
    """Return a function that waits for a condition; it fails the test when the condition does not come."""
    pause = threading.Event()

    def wait(condition, what, timeout_s=20):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
            pause.wait(0.001)

    return wait


@pytest.fixture(scope="session")
def run_program():
    """Return a function that runs a program in a fresh process and returns its last line as JSON."""

    def run(program, *, timeout_s=150, **variables):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPUSCOPE", "OTEL_"))}
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=kept | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
