"""GPUs watched while stages run: what is added up, when the thread is there, what it never does."""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import time

import pytest

import gpuscope
from gpuscope import _runtime, stage
from gpuscope._cuda.nvml import library
from gpuscope._cuda.nvml.library import Nvml
from gpuscope._cuda.nvml.readings import Gpu
from gpuscope._cuda.nvml.watch import GpuWatch, Totals
from gpuscope._data.batch import DeviceInfo
from gpuscope._data.metrics import ACTIVE, CLOCK, ENERGY, OTHERS, POWER, SHARED, THROTTLED, UTILIZATION, WATCHED
from gpuscope._settings.config import Config
from gpuscope.testing import FakeDevice, ManualClock, capture

from .conftest import ME, uuid_of

NAME = "gpuscope-nvml"
INFO = DeviceInfo(0, "Fake GPU", uuid_of(0))


def threads():
    """The threads that ask NVML."""
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture
def totals(nvml):
    """The first GPU, with its readings added up."""
    found = Nvml(nvml.path)
    return Totals(INFO, Gpu(found, found.find(INFO.uuid), frozenset({ME})))


class TestTotals:
    """Readings added up: each stands for the time since the last."""

    def test_time_energy_and_reasons(self, nvml, totals):
        """Of readings at 0.1 and 0.3 s."""
        nvml.says(utilization=100, power_w=400.0, reasons=0x4)
        totals.read(100.0, 0.1)
        nvml.says(utilization=50, power_w=200.0, clock_mhz=1000, reasons=0x40)
        totals.read(100.3, 0.3)
        use = totals.use
        assert (use.index, use.uuid, use.model, use.vendor) == (0, INFO.uuid, "Fake GPU", "NVIDIA")
        assert use.watched_s == pytest.approx(0.4)
        assert use.active_s == pytest.approx(0.25)
        assert use.energy_j == pytest.approx(100.0)
        assert use.cycles == pytest.approx(0.1 * 1.5e9 + 0.3 * 1e9)
        assert use.throttled_s == {"power_cap": pytest.approx(0.1), "hardware_thermal": pytest.approx(0.3)}
        assert use.others_s == {"alone": pytest.approx(0.4)}
        assert not use.is_part

    def test_others_are_asked_for_once_a_second(self, nvml, totals):
        """What they did counts by its part, and the rest of the time they were idle; parts add up to the whole."""
        for number in range(40):
            if number == 20:
                nvml.processes(ME, 1)
                nvml.worked({1: 40}, in_s=1)
            totals.read(100.0 + number / 10, 0.1)
        use = totals.use
        assert sum(use.others_s.values()) == pytest.approx(use.watched_s) == pytest.approx(4.0)
        assert use.others_s["worked"] == pytest.approx(0.4, abs=0.05)
        assert use.others_s["idle"] == pytest.approx(1.6, abs=0.11)
        assert use.others == 1

    def test_what_nvml_does_not_tell_is_none(self, nvml, totals):
        """Not zero."""
        nvml.refuses("nvmlDeviceGetPowerUsage", library.NOT_SUPPORTED)
        totals.read(100.0, 0.1)
        assert totals.use.energy_j is None
        assert totals.use.active_s is not None


class Bench:
    """Stages on the fake GPU, which completes their work at once."""

    def __init__(self, *, index=0):
        self.clock = ManualClock()
        self.device = FakeDevice(self.clock, completes=True)
        self.stream = type("Stream", (), {"device_index": index, "cuda_stream": 7})()

    def capture(self, **settings):
        """Record."""
        return capture(**{"device": self.device, "clock": self.clock, "warmup": 0, "nvml": True, **settings})

    def request(self):
        """One stage, exported."""
        with stage("request", stream=self.stream):
            pass
        assert gpuscope.flush(10)


def watched():
    """What is known of GPUs now."""
    return gpuscope.statistics().gpus


class TestRecording:
    """In a period of recording."""

    def test_from_the_first_stage_on_a_gpu_to_the_end(self, nvml, until):
        """And no longer; nothing is asked before."""
        bench = Bench()
        with bench.capture():
            assert not threads()
            assert gpuscope.statistics().nvml == ""
            bench.request()
            (use,) = until(watched, "a reading")
            assert len(threads()) == 1
            until(lambda: watched()[0].watched_s > 0.5, "half a second")
            assert gpuscope.statistics().nvml == "10 times a second"
            assert "NVML asked 10 times a second (GPU 0, at work 50%, 300 W)" in str(gpuscope.statistics())
        assert not threads()
        assert use.uuid == uuid_of(0)

    def test_about_ten_times_a_second(self, nvml, until):
        """A reading asks four questions, and once a second for processes."""
        bench = Bench()
        with bench.capture():
            bench.request()
            until(watched, "a reading")
            began, calls, before = time.monotonic(), nvml.library.fake_calls(), watched()[0].watched_s
            until(lambda: watched()[0].watched_s > before + 1.5, "readings for a while")
            asked = nvml.library.fake_calls() - calls
            assert 0.4 * 40 < asked / (time.monotonic() - began) < 2 * 40

    def test_stages_without_a_gpu_ask_nothing(self, nvml, make_bench):
        """The library is not even loaded."""
        before = nvml.library.fake_initialisations()
        with capture(nvml=True):
            with stage("host"):
                pass
            assert gpuscope.flush(10)
            assert (threads(), gpuscope.statistics().nvml) == ([], "")
        assert nvml.library.fake_initialisations() == before

    @pytest.mark.parametrize("off", [{"nvml": False}])
    def test_switched_off(self, nvml, off):
        """There is no thread."""
        bench = Bench()
        with bench.capture(**off):
            bench.request()
            assert (threads(), gpuscope.statistics().nvml, watched()) == ([], "", ())

    def test_while_recording_is_off_nothing_is_asked(self, nvml, until):
        """`disable()` ends the thread, and after `enable()` the next stage starts one; sums go on."""
        bench = Bench()
        with bench.capture():
            bench.request()
            (before,) = until(watched, "a reading")
            gpuscope.disable()
            assert not threads()
            gpuscope.enable()
            assert not threads()
            bench.request()
            until(lambda: watched()[0].watched_s > before.watched_s, "another reading")
            assert len(threads()) == 1

    def test_several_gpus(self, nvml, until):
        """Each on its own, those that come later too; not those that no stage is on."""
        bench, other = Bench(), Bench(index=1)
        nvml.says(1, power_w=70.0)
        with bench.capture():
            bench.request()
            until(watched, "a reading")
            assert [use.index for use in watched()] == [0]
            other.request()
            until(lambda: len(watched()) == 2, "the other GPU")
            first, second = watched()
        assert first.energy_j / first.watched_s == pytest.approx(300)
        assert second.energy_j / second.watched_s == pytest.approx(70)

    def test_a_gpu_that_nvml_does_not_know(self, nvml, until):
        """It is said which, and the others are watched."""
        bench, other = Bench(), Bench(index=5)
        with bench.capture():
            bench.request()
            other.request()
            until(lambda: "not of GPU 5" in gpuscope.statistics().nvml, "the account")
            assert [use.index for use in watched()] == [0]

    def test_a_part_of_a_gpu(self, nvml, until):
        """What is not known is said."""
        bench = Bench(index=2)
        with bench.capture():
            bench.request()
            (use,) = until(watched, "a reading")
            said = gpuscope.statistics().nvml
        assert said == "10 times a second; of GPU 2, which is a part of one (MIG), not how much it is used"
        assert (use.is_part, use.active_s, use.energy_j is None) == (True, None, False)

    def test_without_the_library(self, monkeypatch, until):
        """Stages go out as ever, and it is said once asked."""
        monkeypatch.setattr(library, "LIBRARY", "/nowhere/libnvidia-ml.so.1")
        bench = Bench()
        with bench.capture() as spans:
            bench.request()
            until(lambda: gpuscope.statistics().nvml, "the account")
            until(lambda: not threads(), "the end of the thread")
            bench.request()
            assert not threads()
            assert gpuscope.statistics().nvml == "not at all: there is no libnvidia-ml.so.1"
        assert [span.kind for span in spans] == ["host", "gpu"] * 2

    def test_a_library_that_hangs_holds_up_nobody(self, nvml, until):
        """Each answer takes half a second: stages, the account and the end do not wait for it."""
        bench = Bench()
        with bench.capture():
            bench.request()
            until(watched, "a reading")
            nvml.library.fake_slow(500_000)
            calls = nvml.library.fake_calls()
            until(lambda: nvml.library.fake_calls() > calls, "a slow question")
            began = time.monotonic()
            for _ in range(20):
                bench.request()
            watched()
            gpuscope.shutdown()
            assert time.monotonic() - began < 2
        nvml.library.fake_slow(0)
        until(lambda: not threads(), "the end of the thread")

    def test_while_it_is_asked_others_run(self, nvml):
        """An answer that takes 200 ms does not keep the GIL."""
        nvml.library.fake_slow(200_000)
        found = []
        asking = threading.Thread(target=lambda: found.append(Nvml(nvml.path).find(uuid_of(0))))
        asking.start()
        count = 0
        while asking.is_alive():
            count += 1
        asking.join()
        assert found[0] is not None
        assert count > 10_000

    def test_a_failure_of_ours_costs_these_figures_alone(self, nvml, until, monkeypatch):
        """It is in the account, with its reason."""

        def fail(*_):
            raise ValueError("no reading")

        monkeypatch.setattr(Gpu, "read", fail)
        bench = Bench()
        with bench.capture() as spans:
            bench.request()
            until(lambda: "asking it failed" in gpuscope.statistics().nvml, "the account")
            bench.request()
        assert [span.kind for span in spans] == ["host", "gpu"] * 2

    def test_no_thread_is_to_be_had(self, nvml, monkeypatch):
        """It is said, and stages go out as ever."""

        def fail(thread):
            raise RuntimeError("can't start new thread")

        bench = Bench()
        with bench.capture() as spans:
            with stage("request", stream=bench.stream):
                pass
            watch = _runtime.state.engine.collector.watch
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(threading.Thread, "start", fail)
                watch.follow({0: INFO})
            bench.request()
            assert gpuscope.statistics().nvml == "not at all: no thread was to be had"
        assert [span.kind for span in spans] == ["host", "gpu"] * 2

    def test_the_programs_random_numbers_stay_as_they_are(self, nvml, until):
        """A program that has seeded them gets the same ones."""
        random.seed(7)
        expected = [random.random() for _ in range(3)]
        random.seed(7)
        bench = Bench()
        with bench.capture(profile_every_s=600):
            bench.request()
            until(lambda: watched() and watched()[0].watched_s > 0.3, "readings")
            assert [random.random() for _ in range(3)] == expected


class TestMetrics:
    """As metrics: sums of the whole, and means of the last interval."""

    def snapshot(self):
        """What is handed on now."""
        pipeline = _runtime.state.engine.collector.metrics_pipeline
        pipeline._end_interval()
        return pipeline.snapshot().points

    def test_names_and_values(self, nvml, until):
        """OpenTelemetry's where it has any; who the GPU is, is said of each."""
        nvml.says(utilization=80, power_w=410.0, clock_mhz=1400, reasons=0x4)
        nvml.processes(ME, 1)
        bench = Bench()
        with bench.capture():
            bench.request()
            until(lambda: watched() and watched()[0].watched_s > 0.2, "readings")
            points = self.snapshot()
            gpuscope.disable()
            sums = self.snapshot()
        of_gpu = {
            "gpuscope.device.index": 0,
            "hw.id": uuid_of(0),
            "hw.type": "gpu",
            "hw.model": "Fake GPU",
            "hw.vendor": "NVIDIA",
        }
        means = {spec: points[spec][0] for spec in (UTILIZATION, POWER, CLOCK, OTHERS)}
        assert all(point.attributes == of_gpu for point in means.values())
        values = {spec.name: point.value for spec, point in means.items()}
        assert values == pytest.approx(
            {
                "hw.gpu.utilization": 0.8,
                "hw.power": 410.0,
                "gpuscope.gpu.clock": 1.4e9,
                "gpuscope.gpu.other_processes": 1,
            }
        )
        (watched_s,) = sums[WATCHED]
        (throttled,), (shared,) = sums[THROTTLED], sums[SHARED]
        assert watched_s.attributes == of_gpu
        assert throttled.attributes == {**of_gpu, "gpuscope.reason": "power_cap"}
        assert shared.attributes == {**of_gpu, "gpuscope.reason": "idle"}
        assert throttled.value == shared.value == pytest.approx(watched_s.value)
        assert sums[ACTIVE][0].value == pytest.approx(0.8 * watched_s.value)
        assert sums[ENERGY][0].value == pytest.approx(410 * watched_s.value)

    def test_a_mean_is_of_its_interval(self, nvml, until):
        """And not of the whole."""
        bench = Bench()
        with bench.capture():
            bench.request()
            until(watched, "a reading")
            self.snapshot()
            nvml.says(power_w=100.0)
            now = watched()[0].watched_s
            until(lambda: watched()[0].watched_s > now + 0.2, "readings")
            self.snapshot()
            now = watched()[0].watched_s
            until(lambda: watched()[0].watched_s > now + 0.2, "readings")
            assert self.snapshot()[POWER][0].value == pytest.approx(100)

    def test_without_a_gpu_there_are_none(self):
        """No metric without a figure."""
        with capture(nvml=True):
            with stage("host"):
                pass
            assert gpuscope.flush(10)
            points = self.snapshot()
        assert not points.keys() & {WATCHED, UTILIZATION, POWER, SHARED, ENERGY}


@pytest.mark.parametrize(("text", "wanted"), [("1", True), ("off", False), ("0", False)])
def test_the_setting(text, wanted):
    """It is off unless it is switched on."""
    assert not Config().nvml
    assert Config.from_env({"GPUSCOPE_NVML": text})[0].nvml is wanted


def test_a_wrong_setting_raises():
    """At set-up."""
    with pytest.raises(ValueError, match="GPUSCOPE_NVML"):
        Config().changed(GPUSCOPE_NVML="sometimes")


PROGRAM = """
import json, os, threading, time
import gpuscope
from gpuscope import stage
from gpuscope.testing import FakeDevice, ManualClock
from gpuscope._runtime import period, state

def threads():
    return sum(thread.name == "gpuscope-nvml" for thread in threading.enumerate())

clock = ManualClock()
with period(state.config, device=FakeDevice(clock, completes=True), clock=clock):
    def request():
        with stage("request"):
            pass
        assert gpuscope.flush(10)
    request()
    pause = threading.Event()
    while not gpuscope.statistics().gpus:
        pause.wait(0.01)
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        with stage("child"):
            pass
        os.write(there, json.dumps([threads(), gpuscope.flush(10), gpuscope.statistics().nvml]).encode())
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, json.loads(os.read(here, 4096)), threads(), gpuscope.statistics().gpus[0].uuid]))
"""


def test_by_the_systems_own_search_and_across_a_fork(run_python, nvml_file):
    """The library is found as any is; a child has no such thread, and the parent keeps its own."""
    done = run_python(
        PROGRAM,
        GPUSCOPE="1",
        GPUSCOPE_NVML="1",
        GPUSCOPE_EXPORTER="none",
        LD_LIBRARY_PATH=str(nvml_file.parent),
        GPUSCOPE_METRICS="none",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, [0, True, ""], 1, uuid_of(0)]


def test_nothing_but_python_is_imported(nvml):
    """No package that talks to NVML is needed, nor used."""
    assert not any("pynvml" in name for name in sys.modules)


def test_it_costs_the_program_next_to_nothing(nvml):
    """A reading takes well under a millisecond of CPU time, besides what NVML itself takes."""
    found = Nvml(nvml.path)
    totals = Totals(INFO, Gpu(found, found.find(INFO.uuid), frozenset({ME})))
    totals.read(0.0, 0.1)
    began = time.thread_time()
    for number in itertools.islice(itertools.count(1), 200):
        totals.read(number / 10, 0.1)
    assert (time.thread_time() - began) / 200 < 1e-3


def test_a_watch_that_is_off_follows_nothing(nvml):
    """Rate 0."""
    watch = GpuWatch(0.0)
    watch.follow({0: INFO})
    assert (watch.uses, watch.state, threads()) == ((), "", [])
