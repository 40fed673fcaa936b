"""Whose turn it is to settle ids, which provider counts, and where a stage lies in the epoch."""

from __future__ import annotations

import threading
import time

import pytest
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import ProxyTracerProvider

from gpuscope._data.native import StageRecord
from gpuscope._data.wall_clock import WallClock
from gpuscope._otel.bridge import Bridge
from gpuscope._otel.contexts import UNKNOWN
from gpuscope._settings.config import Config
from gpuscope.testing import ManualClock


@pytest.fixture
def bridge():
    """A bridge whose clocks stand, and whose provider can't be looked up cheaply."""
    return Bridge(Config(), clock=lambda: 50, epoch_clock=lambda: 1_000, get_provider=lambda: UNKNOWN)


def test_a_provider_that_only_stands_in_for_one_is_none(bridge, monkeypatch):
    """Until the application sets one, OpenTelemetry has a proxy."""
    monkeypatch.setattr(api, "get_tracer_provider", ProxyTracerProvider)
    assert bridge.provider is None
    assert bridge.tracer is None
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(api, "get_tracer_provider", lambda: provider)
    assert bridge.provider is provider
    assert bridge.tracer is bridge.tracer
    assert bridge.tracer is not None


def test_a_turn_is_not_given_twice_to_one_thread(bridge):
    """What the application's sampler asks for, while it is asked itself, is answered at once, and as unknown."""
    began = time.monotonic()
    with bridge._turn() as first, bridge._turn() as second:
        assert (first, second) == (True, False)
    assert time.monotonic() - began < 0.9
    with bridge._turn() as again:
        assert again


def test_a_turn_that_another_thread_keeps_is_not_waited_for_for_ever(bridge):
    """After a second the ids are answered without it, and the other thread still has its turn."""
    given = []

    def ask():
        with bridge._turn() as turn:
            given.append(turn)

    with bridge._turn() as mine:
        other = threading.Thread(target=ask)
        other.start()
        other.join(60)
        assert (mine, given) == (True, [False])
        assert bridge._lock._is_owned()
    ask()
    assert given == [False, True]


def test_stages_lie_in_the_epoch_as_their_batch_does(bridge):
    """With the batch's offset where there is one, else by the clocks of now; without a time of its own it is now."""
    assert bridge._epoch_ns(None, 30) == 980
    assert bridge._epoch_ns(None, 0) == 1_000
    assert bridge._epoch_ns(None, 1) == 951
    bridge.offset_ns = 7
    assert bridge._epoch_ns(None, 30) == 37
    assert bridge._epoch_ns(None, 0) == 1_000


def test_a_stage_of_a_request_that_began_before_a_step_of_the_wall_clock_is_placed_by_the_clock_of_then(bridge):
    """Those of later requests by the clock of now."""
    clock, epoch = ManualClock(0), [10**18]
    bridge.wall = WallClock(clock, lambda: clock.now_ns + epoch[0])
    before, after = StageRecord(), StageRecord()
    before.outer = after.outer = None
    before.start_ns = clock()
    bridge.offset_ns = bridge.wall.read()
    assert bridge._epoch_ns(before, 30) == bridge.offset_ns + 30
    epoch[0] -= 10**12
    clock.advance(1)
    bridge.offset_ns = bridge.wall.read()
    after.start_ns = clock()
    offsets = [bridge._epoch_ns(record, 30) - 30 for record in (before, after)]
    assert offsets == [pytest.approx(10**18, abs=10), pytest.approx(10**18 - 10**12, abs=10)]
