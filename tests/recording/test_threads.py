"""What a stage knows of its thread: also where that is odd, about to end, or a greenlet. And what could not begin."""

from __future__ import annotations

import json
import threading

import pytest

from gpuscope import stage
from gpuscope._recording.state import state


def test_a_thread_without_a_name_costs_nothing(bench):
    """A thread whose name is a property that raises has its stages exported, and so have those beside it."""

    class Odd(threading.Thread):
        broken = False

        @property
        def name(self):
            if self.broken:
                raise RuntimeError("no name")
            return "odd"

        @name.setter
        def name(self, value):
            pass

        def run(self):
            self.broken = True
            with stage("odd"):
                pass
            self.broken = False

    with stage("good"):
        pass
    thread = Odd()
    thread.start()
    thread.join()
    (odd,) = [span for span in bench.named("odd") if span.kind == "host"]
    assert odd.attributes["thread.name"] == f"Thread-{odd.attributes['thread.id']}"
    assert bench.named("good")


@pytest.mark.parametrize("part", ["thread", "trace", "site"])
def test_a_record_that_is_not_whole_costs_itself(bench, part):
    """Those that go to the collector with it are exported, and counted as calls once."""
    name = f"beside one without {part}"
    for _ in range(3):
        with stage(name):
            pass
    with stage("broken") as broken:
        pass
    delattr(broken, part)
    for _ in range(3):
        with stage(name):
            pass
    assert len([span for span in bench.named(name) if span.kind == "host"]) == 6
    assert bench.statistics().lost == {"internal_error": 1}
    assert state.sites[name].calls == 6


IN_FINALIZERS = """
import json, threading, gpuscope
from gpuscope.testing import capture

mine, before = threading.local(), threading.active_count()


class Client:
    def __del__(self):
        junk = [type(f"A{i}", (), {}) for i in range(3)]
        with gpuscope.stage("close"):
            pass


def run():
    with gpuscope.stage("work"):
        pass
    mine.client = Client()


with capture() as spans:
    for _ in range(30):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    gpuscope.flush(5)
    known = threading.active_count()
names = [span.name for span in spans]
print(json.dumps([names.count("work"), names.count("close"), known - before]))
"""


@pytest.mark.parametrize("native", ["0", "1"])
def test_a_stage_while_its_thread_ends(run_python, native):
    """It is recorded, reads nothing that is freed, and leaves no thread behind that Python knows of."""
    done = run_python(IN_FINALIZERS, GPUSCOPE_NATIVE=native)
    assert done.returncode == 0, done.stderr
    works, closes, more = json.loads(done.stdout)
    assert (works, closes) == (30, 30)
    assert more <= 1  # The collector's.


IN_GREENLETS = """
import gevent.monkey; gevent.monkey.patch_all()
import collections, json, os, gevent, gpuscope

kinds, keep = collections.Counter(), []


class Facts:
    __slots__ = ("a", "b")


def work():
    with gpuscope.stage("x") as running:
        pass
    kinds[type(running.thread).__name__] += 1


gpuscope.enable(exporters="none", metrics="none")
for i in range(100):
    greenlet = gevent.spawn(work)
    greenlet.join()
    del greenlet
    gevent.idle() if i % 20 else gevent.sleep(0.1)
    for _ in range(3):
        facts = Facts()
        facts.a = facts.b = i
        keep.append(facts)
print(json.dumps(kinds), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("native", ["0", "1"])
def test_greenlets_have_facts_of_their_own(run_python, native):
    """Below gevent a stage's record never points at what is freed."""
    pytest.importorskip("gevent")
    done = run_python(IN_GREENLETS, GPUSCOPE_NATIVE=native)
    assert json.loads(done.stdout) == {"ThreadInfo": 100}, done.stderr
