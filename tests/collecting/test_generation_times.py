"""What a generation that runs by itself says of the GPU: its steps, and when its first token was there."""

from __future__ import annotations

import pytest

import gpuscope
from gpuscope._collecting.batches.generations import _MAX_WAITING, GenerationTimes
from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.record import Site

from ..exporters.batches import Row, make_batch

GENERATE, PREFILL, DECODE = (Site(name, {}) for name in ("generate", "prefill", "decode"))
SAID = {"gen_ai.operation.name": "text_completion", "new_tokens": 3}
MS = 1_000_000


def generate(span_id=1, **more):
    """The row of a generation of 3 tokens that takes 100 ms on the host."""
    details = SpanDetails(attributes={**SAID, **more})
    return Row(GENERATE, span_id=span_id, host_ns=100 * MS, details=details)


def step(site, number, *, parent_id=1, gpu_ns=20 * MS, **more):
    """The row of a step: 20 ms on the GPU, 5 ms after its launch, at the 30th ms of each number."""
    facts = {"start_ns": make_batch(generate()).host_start_ns[0] + 30 * MS * number, "launch_ns": 5 * MS}
    on_gpu = {"gpu_span_id": 100 + number, "gpu_ns": gpu_ns} if gpu_ns else {}
    return Row(
        site, span_id=10 + number + 100 * parent_id, parent_id=parent_id, host_ns=MS, **{**facts, **on_gpu, **more}
    )


STEPS = step(PREFILL, 0), step(DECODE, 1), step(DECODE, 2)


def said(*batches):
    """What the generations of some batches say in the end, without what they said before."""
    times, found = GenerationTimes(), []
    for rows in batches:
        batch = make_batch(*rows)
        times.look(batch)
        found += [
            {key: value for key, value in each.attributes.items() if key not in SAID} for each in batch.details.values()
        ]
    return found


@pytest.mark.parametrize(
    "batches", [[[*STEPS, generate()]], [STEPS, [generate()]], [STEPS[:1], STEPS[1:], [generate()]]]
)
def test_prefill_and_decode_are_told(batches):
    """The GPU time of both, until the first token, and per further one; steps may come in batches before."""
    assert said(*batches) == [
        {
            "gpuscope.gpu.share.prefill": 20 * MS,
            "gpuscope.gpu.share.decode": 40 * MS,
            "gpuscope.gpu.time_to_first_token": pytest.approx(0.025),
            "gpuscope.gpu.time_per_output_token": pytest.approx(0.030),
        }
    ]


def test_a_prompt_in_pieces():
    """The first token is there when the last piece is done."""
    (found,) = said([step(PREFILL, 0), step(PREFILL, 1), step(DECODE, 2), generate()])
    assert found["gpuscope.gpu.share.prefill"] == 40 * MS
    assert found["gpuscope.gpu.time_to_first_token"] == pytest.approx(0.055)


@pytest.mark.parametrize(
    "rows",
    [
        [generate()],
        [step(PREFILL, 0, gpu_ns=0), generate()],
        [step(DECODE, 1), generate()],
        [step(PREFILL, 0, parent_id=9), generate()],
    ],
    ids=["no steps", "no GPU", "no prefill", "of another"],
)
def test_what_is_not_known_is_not_told(rows):
    """Without a prefill on the GPU there is nothing to say."""
    assert said(rows) == [{}]


def test_steps_without_a_place():
    """Where only durations are known, so are the shares alone."""
    (found,) = said([step(PREFILL, 0, flags=int(RowFlag.UNPLACED)), generate()])
    assert found == {"gpuscope.gpu.share.prefill": 20 * MS, "gpuscope.gpu.share.decode": 0}


def test_it_forgets():
    """Generations that never end are forgotten, the oldest first."""
    times = GenerationTimes()
    for number in range(_MAX_WAITING + 5):
        times.look(make_batch(step(PREFILL, 0, parent_id=1000 + number)))
    assert len(times._open) == _MAX_WAITING
    assert min(times._open) == 1005


def test_it_arrives(make_bench):
    """The attributes are on the exported span of the generation, beside its own."""
    bench = make_bench(delay_ns=MS)
    with gpuscope.stage("generate", attributes=SAID):
        for name in ("prefill", "decode", "decode"):
            with gpuscope.stage(name):
                bench.clock.advance(0.01)
    (span,) = bench.named("generate")
    assert span.attributes["gpuscope.gpu.share.prefill"] == pytest.approx(10 * MS, abs=100)
    assert span.attributes["gpuscope.gpu.share.decode"] == pytest.approx(20 * MS, abs=100)
    assert span.attributes["gpuscope.gpu.time_to_first_token"] == pytest.approx(0.011, abs=1e-6)
    assert span.attributes["gpuscope.gpu.time_per_output_token"] == pytest.approx(0.01, abs=1e-6)
    assert span.attributes["gen_ai.operation.name"] == "text_completion"
