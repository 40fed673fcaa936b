"""`gpuscope.testing.capture` records the same whatever the environment says."""

from __future__ import annotations

import pytest

import gpuscope
from gpuscope._recording.state import state
from gpuscope._settings.config import Config
from gpuscope.testing import capture


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GPUSCOPE_KEEP", "error"),
        ("GPUSCOPE_TRACE_HEADER", "x-trace-id"),
        ("OTEL_TRACES_SAMPLER", "always_off"),
        ("GPUSCOPE_MEMORY", "1"),
        ("GPUSCOPE_METRICS", "otlp"),
        ("GPUSCOPE_GPU_SPANS", "all"),
        ("GPUSCOPE_BATCH_SPANS", "links"),
        ("GPUSCOPE_PROFILE", "signal"),
        ("GPUSCOPE_PROFILE_EVERY", "90s"),
        ("GPUSCOPE_FLIGHT", "flight"),
        ("GPUSCOPE_STALL", "10s"),
        ("GPUSCOPE_SYNCS", "1s/60s"),
    ],
)
def test_the_environment_decides_neither_what_is_captured_nor_what_is_done_besides(monkeypatch, name, value):
    """Spans come, they say the same, and the setting is the usual one."""
    config, complaints = Config.from_env({name: value})
    assert not complaints
    changed = {each for each, usual in vars(Config()).items() if vars(config)[each] != usual}
    assert changed
    monkeypatch.setattr(state, "_config", config)
    with capture() as spans:
        used = vars(state.engine.config)
        assert {each: used[each] for each in changed} == {each: vars(Config())[each] for each in changed}
        assert not gpuscope.extract({}).reply
        with gpuscope.stage("request"):
            pass
    assert [span.name for span in spans] == ["request"]
    assert {key for key in spans[0].attributes if "memory" in key} == set()


def test_what_a_test_asks_for_holds():
    """The settings that are given go before."""
    with capture(keep="error") as spans, gpuscope.stage("request"):
        pass
    assert not spans
