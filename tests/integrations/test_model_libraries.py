"""What holds for every file of a model library: it comes with its framework, never before, and says its version."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import gpuscope.integrations

FRAMEWORKS = {
    "diffusers": "diffusers",
    "inference_models": "inference-models",
    "sentence_transformers": "sentence-transformers",
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "ultralytics": "ultralytics",
}
UNUSED = """
import sys
from gpuscope.instrument import instrument
instrument(frameworks=sys.argv[1])
print([name for name in sys.modules if sys.argv[1] in name])
"""
GENERATE = """
import gpuscope
import torch
from transformers import GPT2Config, GPT2LMHeadModel
size = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64, "vocab_size": 8}
model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=2, eos_token_id=None, pad_token_id=0)).eval()
model.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=3, do_sample=False)
"""


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_nothing_is_imported_before_the_framework(name, run_python):
    """A framework that the program does not import is not imported for it, nor the file; at the end that is said."""
    done = run_python(UNUSED, name, GPUSCOPE="idle")
    assert done.stdout.strip() == "[]"
    (said,) = done.stderr.splitlines()
    assert f"nothing of the framework {name} is a stage" in said


@pytest.mark.parametrize(("name", "package"), FRAMEWORKS.items())
def test_its_version_is_stated(name, package):
    """Each file says against which version of its package it was run."""
    text = Path(gpuscope.integrations.__path__[0], f"{name}.py").read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text))
    assert f"Run against {package} " in said


def test_by_the_environment_alone(run_python, tmp_path):
    """With two variables a program that knows nothing of stages has those of `generate`."""
    pytest.importorskip("transformers")
    done = run_python(
        GENERATE,
        GPUSCOPE="1",
        GPUSCOPE_FRAMEWORKS="transformers",
        GPUSCOPE_EXPORTER="file",
        GPUSCOPE_FILE=str(tmp_path / "spans.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    requests = map(json.loads, (tmp_path / "spans.jsonl").read_text().splitlines())
    spans = [
        span["name"]
        for request in requests
        for resource in request.get("resourceSpans", [])
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]
    assert [name for name in spans if "[gpu]" not in name].count("decode") == 2
