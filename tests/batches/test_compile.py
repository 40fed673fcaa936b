"""Tokens and batches where `torch.compile` traces: neither breaks a graph."""

from __future__ import annotations

import pytest
import torch

import gpuscope
from gpuscope.testing import capture

pytestmark = pytest.mark.skipif(not hasattr(torch, "compile"), reason="needs torch.compile")


def test_a_token_in_compiled_code_is_of_nothing():
    """Where the code runs is not known when it is traced."""

    def function(x):
        return x + 1 if gpuscope.here() else x - 1

    with capture(), gpuscope.stage("stage"):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert compiled(torch.ones(1)).item() == 0


def test_a_batch_in_compiled_code_is_left_out():
    """As any stage that is compiled away, also one that decorates a function."""
    with capture() as spans:
        tokens = [gpuscope.here()]

        @gpuscope.stage("decorated", members=lambda x: tokens)
        def inner(x):
            return x * 2

        def function(x):
            with gpuscope.stage("block", members=tokens):
                return inner(x)

        compiled = torch.compile(function, backend="eager", fullgraph=True)
        with gpuscope.stage("whole"):
            assert compiled(torch.ones(1)).item() == 2
    assert [span.name for span in spans] == ["whole", "torch.compile"]
