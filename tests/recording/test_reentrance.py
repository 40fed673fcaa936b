"""Code of the program's that comes while its own thread is in ours: signal handlers, finalizers, weakref callbacks."""

from __future__ import annotations

import faulthandler
from pathlib import Path

import pytest

import gpuscope
from gpuscope import stage
from gpuscope._cuda.graphs.replay import ReplayQueue
from gpuscope._data.native import StageRecord
from gpuscope._recording.ledger import Ledger
from gpuscope._recording.queue import RecordQueue

from .. import steps

PACKAGE = str(Path(gpuscope.__file__).parent)


@pytest.fixture(autouse=True)
def _no_hang():
    """End the run, with tracebacks, instead of hanging."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def at_each_step(action, handler):
    """Run the action, and the handler before each bytecode of ours in it, as a signal handler may run."""
    return steps.at_each_step(action, (PACKAGE,), lambda *_: handler())


def test_statistics_may_be_asked_for_within_statistics(bench):
    """A signal handler that asks for the account gets it, wherever its thread is."""
    with stage("a"):
        pass
    answers = []
    assert at_each_step(gpuscope.statistics, lambda: answers.append(gpuscope.statistics().recorded)).recorded == 1
    assert len(answers) > 100
    assert set(answers) == {1}
    assert bench.statistics().recorded == 1


def test_failures_noted_within_the_account_are_all_counted(bench):
    """What a handler's stages lose while its own thread counts is counted as well, once."""
    noted = []

    def lose():
        noted.append(bench.engine.ledger.fail("stage_error"))

    bench.engine.ledger.fail("stage_error")
    at_each_step(gpuscope.statistics, lose)
    assert bench.statistics().lost == {"stage_error": len(noted) + 1}


def test_summary_may_be_asked_for_within_summary(bench):
    """The same holds for the summary."""
    with stage("a"):
        pass
    bench.collect()
    found = []
    at_each_step(bench.engine.summary.summary, lambda: found.append(str(bench.engine.summary.summary())))
    assert set(found) == {str(bench.engine.summary.summary())}


def test_first_stage_may_come_within_the_first_stage():
    """Both may start the collector; it is one, and no stage is lost."""
    with gpuscope.testing.capture() as spans:

        def handler():
            with stage("inner"):
                pass

        engine = gpuscope._runtime.state.engine
        record = stage("outer")
        record.__enter__()
        ran = []

        def count():
            ran.append(handler())

        at_each_step(lambda: record.__exit__(None, None, None), count)
        assert ran
        assert engine.flush(60)
        assert gpuscope.statistics().recorded == len(ran) + 1
    assert {span.name for span in spans} == {"outer", "inner"}


def test_stages_and_statistics_may_come_while_recording_starts_and_ends(tmp_path):
    """A handler's stages and questions never wait, in `enable`, `flush` and `shutdown` neither."""
    asked = []

    def handler():
        with stage("in a handler"):
            pass
        asked.append(gpuscope.statistics().recorded)

    gpuscope.enable(exporters="file", file=str(tmp_path / "spans.jsonl"), metrics="none")
    try:
        handler()
        at_each_step(lambda: gpuscope.flush(5), handler)
        at_each_step(lambda: gpuscope.shutdown(5), handler)
    finally:
        gpuscope._runtime.reset()
    assert asked


def test_wake_and_gate_are_opened_within_themselves():
    """Opening takes no lock: it may come at any step of opening and of waiting."""
    from gpuscope._collecting.gates import Gate, Wake

    wake, gate = Wake(), Gate()
    at_each_step(wake.set, wake.set)
    at_each_step(lambda: wake.wait(0), wake.set)
    assert wake.wait(0)
    assert not wake.wait(0)
    assert not gate.wait(0)
    at_each_step(lambda: gate.wait(60), gate.open)
    assert gate.wait(0)


class Replayed:
    """Stands for a replay with one stage inside, and for its graph."""

    events = None

    @property
    def graph(self):
        """Return itself."""
        return self

    def __len__(self):
        return 1

    def give_back(self, events):
        """Take events back."""


def test_the_account_may_be_closed_while_it_is_closed():
    """A handler that asks for statistics while the account is being closed: each stage is lost once."""
    step, steps = 0, [0]
    while step <= steps[0]:
        step, steps = step + 1, [0]
        ledger, queue, replays = Ledger(), RecordQueue(8), ReplayQueue(lambda: None)
        for _ in range(3):
            queue.put(StageRecord())
            replays.put([None, Replayed()])

        def handler(step=step, steps=steps, close=ledger.close, queues=(queue, replays)):
            steps[0] += 1
            if steps[0] == step:
                close("shutdown", *queues)

        at_each_step(lambda close=ledger.close, queues=(queue, replays): close("shutdown", *queues), handler)
        assert ledger.statistics(queue, replays).lost == {"shutdown": 6}, step
    assert step > 10


DURING_IMPORTS = """
import sys
import gpuscope

seen = []

def ask(frame, event, argument):
    if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.endswith(("ledger.py", "_data/statistics.py")):
        found = gpuscope.statistics()
        seen.append((found.recorded, found.missing))
        return ask

sys.settrace(ask)
gpuscope.enable(exporters="none")
sys.settrace(None)
assert len(seen) > 5 and seen == [(0, {})] * len(seen), seen
"""


def test_the_account_may_be_asked_for_while_it_is_imported(run_python):
    """By a signal handler that comes within the first `enable()`: there is nothing to tell yet."""
    done = run_python(DURING_IMPORTS, GPUSCOPE="idle")
    assert done.returncode == 0, done.stderr


ALL_DURING_IMPORTS = """
import itertools, sys
import gpuscope
from gpuscope import stage

def run():
    with stage("in a handler"):
        pass

calls = itertools.cycle((
    run, gpuscope.enable, lambda: gpuscope.enable(exporters="none", warmup=7), gpuscope.statistics,
    lambda: str(gpuscope.summary()), lambda: gpuscope.flush(0), gpuscope.is_enabled,
))
done = []

def handle(frame, event, argument):
    if frame.f_code.co_name == "<module>":
        next(calls)()
        done.append(frame.f_code.co_filename)
        return handle

sys.settrace(handle)
gpuscope.enable(exporters="none", warmup=3)
gpuscope.enable(exporters="none", warmup=7)
sys.settrace(None)
for expected in EXPECTED:
    assert any(each.endswith(expected) for each in done), done[:5]
assert gpuscope.is_enabled()
run()
assert gpuscope.flush()
assert "in a handler" in str(gpuscope.summary())
assert gpuscope.statistics().recorded > 0
"""


@pytest.mark.parametrize(("mode", "expected"), [("idle", ["engine.py"]), ("0", ["config.py", "engine.py"])])
def test_everything_may_be_called_while_the_first_enable_imports(run_python, mode, expected):
    """By signal handlers, between any two lines of modules. What they want to switch on comes after the imports."""
    done = run_python(f"EXPECTED = {expected}\n{ALL_DURING_IMPORTS}", GPUSCOPE=mode)
    assert done.returncode == 0, done.stderr
