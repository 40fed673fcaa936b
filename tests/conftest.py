"""Fixtures for all tests: a recorder on fake parts, whose collector works when it is told to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest

from gpuscope import _runtime
from gpuscope._collecting.engine import Engine
from gpuscope._log import forget_what_waits
from gpuscope._settings.config import Config
from gpuscope.exporters.memory import CapturedSpan, MemoryExporter
from gpuscope.testing import FakeDevice, ManualClock

# A machine that others use as well is slow for a moment, and a test is not wrong because of that.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@dataclass
class FakeNvtx:
    """Keeps the open ranges: a stack a thread for pushed ones, a list for start/end ones."""

    stacks: dict[int, list[str]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)

    def _stack(self) -> list[str]:
        return self.stacks.setdefault(threading.get_ident(), [])

    @property
    def stack(self) -> list[str]:
        """All ranges that are pushed and not popped."""
        return [name for stack in self.stacks.values() for name in stack]

    def begin(self, site: Any, suspends: int) -> Any:
        """Open a range."""
        kind = "start" if suspends else "push"
        (self.started if suspends else self._stack()).append(site.name)
        self.log.append((kind, site.name))
        return kind, site.name

    def end(self, opened: Any) -> None:
        """Close a range: a pushed one must be the top of the stack."""
        kind, name = opened
        if kind == "push":
            assert self._stack().pop() == name
        else:
            self.started.remove(name)


@dataclass
class Bench:
    """Everything fake, and the steps of the collector by hand."""

    engine: Engine
    clock: ManualClock
    device: FakeDevice
    nvtx: FakeNvtx
    spans: list[CapturedSpan]

    def collect(self) -> list[CapturedSpan]:
        """Let the collector do all it can without waiting, and return every span so far."""
        while self.engine.collector.step():
            pass
        return self.spans

    def named(self, name: str) -> list[CapturedSpan]:
        """Collect, and return the spans of this name."""
        return [span for span in self.collect() if span.name == name]

    def statistics(self) -> Any:
        """Return the account."""
        return self.engine.statistics()


@pytest.fixture(autouse=True)
def _off_for_good_as_before():
    """A test that records leaves nothing for later tests: no function to switch on, nothing to measure or to say."""
    state = _runtime.state
    before = state.may_toggle, state.measures_memory
    yield
    state.may_toggle, state.measures_memory = before
    forget_what_waits()


@pytest.fixture
def make_bench():
    """Return a function that makes a bench with settings of its own; its collector's thread is never started."""
    stack = contextlib.ExitStack()

    def make(
        *,
        exporters: tuple[Any, ...] = (),
        completes: bool = True,
        delay_ns: int = 0,
        event_cost_ns: int = 0,
        device: Any = None,
        nvtx: Any = None,
        **settings: Any,
    ) -> Bench:
        clock = ManualClock()
        spans: list[CapturedSpan] = []
        device = device or FakeDevice(clock, completes=completes, delay_ns=delay_ns, event_cost_ns=event_cost_ns)
        nvtx = nvtx or FakeNvtx()
        config = Config().changed(**{"mode": "on", "exporters": "none", "warmup": 0, **settings})
        engine = stack.enter_context(
            _runtime.period(
                config, exporters=(MemoryExporter(spans), *exporters), device=device, nvtx=nvtx, clock=clock
            )
        )
        # The collector is stepped by hand.
        engine.recorder.accept(engine.queue)
        return Bench(engine, clock, device, nvtx, spans)

    with stack:
        yield make


@pytest.fixture
def bench(make_bench) -> Bench:
    """A bench with the usual settings."""
    return make_bench()


@pytest.fixture
def run_python(tmp_path):
    """Return a function that runs a program in a fresh interpreter, with the given environment variables."""

    def run(program: str, *arguments: str, timeout: float = 100, **environment: str) -> subprocess.CompletedProcess:
        script = tmp_path / "program.py"
        script.write_text(program)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
        return subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", str(script), *arguments],
            env={**kept, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def fake_nvtx() -> FakeNvtx:
    """An NVTX door that remembers its open ranges."""
    return FakeNvtx()
