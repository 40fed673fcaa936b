"""A program may import from a framework in its first line, however gpuscope was started, and has its stages."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

FIRST_LINES = {
    "asgi": ["from starlette.applications import Starlette", "from fastapi import FastAPI"],
    "diffusers": [
        "from diffusers import StableDiffusionPipeline",
        "from diffusers.pipelines.pipeline_utils import DiffusionPipeline",
    ],
    "inference_models": ["from inference_models import AutoModel"],
    "litserve": ["from litserve import LitAPI, LitServer"],
    "onnxruntime": ["from onnxruntime import InferenceSession"],
    "ray_serve": ["from ray import serve", "from ray.serve import deployment"],
    "sentence_transformers": [
        "from sentence_transformers import SentenceTransformer",
        "from sentence_transformers.util import cos_sim; from sentence_transformers import SentenceTransformer",
    ],
    "tensorrt": ["from tensorrt import Logger, Runtime"],
    "timm": ["from timm import create_model", "from timm.models import resnet"],
    "torchvision": ["from torchvision.models import resnet18", "from torchvision import models"],
    "transformers": [
        "from transformers import LlamaForCausalLM",
        "from transformers.models.gpt2 import GPT2LMHeadModel",
        "import transformers; transformers.BertModel",
    ],
    "ultralytics": ["from ultralytics import YOLO"],
    "vllm": ["from vllm import LLM"],
}
AFTER = """
import sys
from gpuscope._recording.state import state
made = state.instrumentation
left = [target.path for target, waits in made.waiting.items() if waits and target.module in sys.modules]
undone = [name for name, undo in made.frameworks.items() if undo is None and not made.patches.all]
print("left", left, "undone", undone)
"""
CASES = [(name, line) for name, lines in FIRST_LINES.items() for line in lines]
WAYS = {
    "gpuscope run": lambda name: [sys.executable, "-m", "gpuscope", "run", "--framework", name, "program.py"],
    "opentelemetry-instrument": lambda name: [
        sys.executable,
        "-c",
        "from opentelemetry.instrumentation.auto_instrumentation import run; run()",
        sys.executable,
        "program.py",
    ],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "line"), CASES, ids=[line for _, line in CASES])
def test_what_the_first_line_imports_has_its_stages(tmp_path, way, name, line):
    """Nothing is found half imported, nothing is said, and the program runs."""
    package = line.split()[1].partition(".")[0].rstrip(";")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    if way == "opentelemetry-instrument":
        pytest.importorskip("opentelemetry.instrumentation.auto_instrumentation")
        pytest.importorskip("opentelemetry.distro")
    (tmp_path / "program.py").write_text(line + AFTER)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("GPUSCOPE", "OTEL_"))}
    settings = {
        "GPUSCOPE": "1",
        "GPUSCOPE_EXPORTER": "none",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "GPUSCOPE_FRAMEWORKS": "" if way == "gpuscope run" else name,
    }
    done = subprocess.run(
        WAYS[way](name),
        env={**kept, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "left [] undone []", done.stderr
    assert "not instrumented" not in done.stderr
    assert "does not exist" not in done.stderr
    assert "Traceback" not in done.stderr
