"""Batches as exporters get them: resolved, linked, and with their light spans."""

from __future__ import annotations

import json

import pytest

import gpuscope

from ..keeps_batches import KeepsBatches


@pytest.fixture
def resolved(make_bench):
    """Return a function that runs one batch of so many members, and returns it, its light spans, and all spans."""

    def run(count, *, fails=False, **said):
        keeps = KeepsBatches()
        bench = make_bench(exporters=(keeps,))
        tokens = [
            gpuscope.Token.from_traceparent(f"00-{number:032x}-{number:016x}-01") for number in range(1, count + 1)
        ]
        try:
            with gpuscope.stage("predict", members=tokens, **said) as batch:
                batch.set_attribute("model", "vit")
                bench.clock.advance(0.001_234_567)
                json.loads("" if fails else "{}")
        except json.JSONDecodeError:
            pass
        spans = bench.collect()
        stages, light = keeps.batches
        return stages, light, spans

    return run
