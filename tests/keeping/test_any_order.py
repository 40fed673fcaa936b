"""Whatever requests do, and whenever they are collected: traces are whole or not there, and the account adds up."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuscope import _runtime, stage
from gpuscope._settings.config import Config
from gpuscope.exporters.memory import MemoryExporter
from gpuscope.testing import FakeDevice, ManualClock

STREAMS = st.sampled_from([None, SimpleNamespace(device_index=0, cuda_stream=8)])
INNER = st.lists(st.tuples(STREAMS, st.sampled_from([0.001, 0.2])), max_size=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("request"), INNER, st.booleans()),
        st.tuples(st.just("complete"), st.integers(1, 5), st.none()),
        st.tuples(st.just("collect"), st.none(), st.none()),
    ),
    max_size=25,
)


def fail():
    """Raise."""
    raise KeyError


def serve(clock, device, collect, inner, *, fails):
    """Run a request; collect after its first stage."""
    try:
        with stage("request"):
            for number, (stream, took_s) in enumerate(inner):
                with stage("inner", stream=stream):
                    clock.advance(took_s)
                if number == 0:
                    collect()
            if fails:
                fail()
    except KeyError:
        pass


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, rules=st.sampled_from(["slower=250ms", "error, slower=300ms", "share=0.5", "error, share=0.3"]))
def test_traces_are_whole(steps, rules):
    """Each has all its stages with their GPU spans, and those that a rule keeps are there."""
    clock, spans = ManualClock(), []
    device = FakeDevice(clock)
    config = Config().changed(mode="on", exporters="none", warmup=0, keep=rules)
    wanted, sizes = Counter(), []
    with _runtime.period(config, exporters=(MemoryExporter(spans),), device=device, clock=clock) as engine:
        engine.recorder.accept(engine.queue)
        collector = engine.collector
        collector._breathe = lambda: None

        def collect():
            """Collect, and look whether the account adds up."""
            while collector.step():
                pass
            account = engine.statistics()
            fates = account.exported + sum(account.dropped.values()) + account.pending
            assert (account.recorded, account.lost) == (fates, {})

        for what, detail, fails in steps:
            if what == "request":
                began_ns = clock()
                serve(clock, device, collect, detail, fails=fails)
                sizes.append(1 + len(detail))
                took_s = (clock() - began_ns) / 1e9
                is_slow = "slower" in rules and took_s > (0.3 if "300" in rules else 0.25)
                if is_slow or ("error" in rules and fails):
                    wanted[1 + len(detail)] += 1
            elif what == "complete":
                device.complete(detail)
            else:
                collect()
        device.complete()
        collect()
        collect()
        account = engine.statistics()
        assert account.pending == 0
    stages, gpu = Counter(), Counter()
    for span in spans:
        (gpu if span.kind == "gpu" else stages)[span.trace_id] += 1
    assert stages == gpu
    exported = Counter(stages.values())
    assert wanted <= exported <= Counter(sizes)
    if "share" not in rules:
        assert exported == wanted
    assert account.dropped == (
        {"not_kept": sum(sizes) - sum(stages.values())} if sum(sizes) > sum(stages.values()) else {}
    )
