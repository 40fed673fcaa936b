"""Attributes and exceptions that hold tensors: nobody waits for the GPU, and no memory of it is kept."""

from __future__ import annotations

import contextlib

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from gpuscope import stage
from gpuscope.testing import capture

LONG_CYCLES = 1_000_000_000
"""About half a second on the GPU: whoever waits for that finds it done."""
MIB = 1 << 20
SIZE = 64 * MIB


class Rejected(Exception):
    """What a program raises and never prints."""


def in_block(tensor):
    """Leave a block by an exception that holds a tensor."""
    with stage("block"):
        raise Rejected(tensor)


@stage("decorated")
def decorated(tensor):
    """Leave a function by one."""
    raise Rejected("scores out of range", tensor)


def in_a_container(tensor):
    """Leave a block by an exception with a tensor deep inside."""
    with stage("list"):
        raise ValueError([tensor, {"logits": tensor}])


def by_an_assertion(tensor):
    """Leave a block by a failed assertion."""
    with stage("assert"):
        assert False, tensor  # noqa: B011, PT015 - as programs do


def told(tensor):
    """Tell the stage and the current span of a tensor in every way."""
    with stage("told", attributes={"t": tensor}) as s:
        s.set_attribute("logits", [tensor, {"a": tensor}])
        span = trace.get_current_span()
        span.set_attribute("t2", tensor)
        span.add_event("e", {"t": tensor})
        span.record_exception(Rejected(tensor), {"t": tensor})
        span.update_name(tensor)


@pytest.mark.parametrize("leave", [in_block, decorated, in_a_container, by_an_assertion, told])
def test_nothing_waits_for_a_tensor(leave, monkeypatch):
    """The program is back while the GPU still works; and PyTorch, asked to forbid it, sees nothing wait."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider())
    tensor = torch.zeros(1024, device="cuda")
    with capture() as spans:
        with stage("warm"):
            tensor.add_(1)
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG_CYCLES)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with contextlib.suppress(Rejected, ValueError, AssertionError):
                leave(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        still_busy = not torch.cuda.current_stream().query()
        torch.cuda.synchronize()
    assert still_busy
    texts = str([(span.name, span.attributes, span.events) for span in spans])
    assert "shape=(1024,) dtype=torch.float32 device=cuda:0" in texts


def test_no_memory_is_kept():
    """A loop whose tensors become attributes needs as much memory as one whose tensors do not."""

    def peak(tell):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(50):
            with stage("infer") as s:
                x = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
                if tell:
                    s.set_attribute("logits", x)
                    s.set_attribute("all", [x])
            with stage("more", attributes={"logits": x} if tell else None):
                pass
            del x
        return torch.cuda.max_memory_allocated() - before

    with capture(interval_s=1.0):
        assert peak(tell=True) <= peak(tell=False)


def test_a_capture_is_not_broken_by_a_tensor():
    """An attribute and an exception with a tensor leave a capture that is going on alone."""
    tensor, graph = torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()
    with capture():
        with stage("warm"):
            tensor.add_(1)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            tensor.add_(1)
            told(tensor)
            with contextlib.suppress(Rejected):
                in_block(tensor)
        before = tensor.clone()
        graph.replay()
        assert torch.equal(tensor, before + 1)
