"""What NVML said, in files and reports: sums that are read back, a line per GPU, and what it does to verdicts."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import gpuscope
from gpuscope import _runtime, stage
from gpuscope.__main__ import main
from gpuscope._cuda.nvml import library
from gpuscope._data.plain.gpu_use import GpuUse
from gpuscope._settings.config import Config
from gpuscope.analysis._busy.watched import sentences, share_of_others
from gpuscope.analysis.read import read, read_lines
from gpuscope.analysis.recording import WatchedGpu
from gpuscope.analysis.runs import only, runs_of
from gpuscope.analysis.verdict import judge
from gpuscope.commands._checks import watching
from gpuscope.testing import FakeDevice, ManualClock, capture

from ..analysis.recordings import Stage, recording, repeat
from ..collecting.test_samples import Source, answer
from .conftest import ME, uuid_of

USE = GpuUse(
    *(0, "uuid-0", "H100", "NVIDIA"),
    watched_s=100.0,
    active_s=93.0,
    energy_j=41_200.0,
    cycles=None,
    throttled_s={"power_cap": 12.0},
    others_s={"alone": 100.0},
    others=None,
)


@pytest.fixture
def file(nvml, until, tmp_path):
    """Return a function that records on the fake GPU while NVML says something, and returns the file."""

    def record(**says):
        nvml.says(**says)
        path, clock = tmp_path / "spans.jsonl", ManualClock()
        settings = {"device": FakeDevice(clock, completes=True), "clock": clock, "warmup": 0, "nvml": True}
        with capture(**settings, exporters="file", file=str(path)):
            with stage("request"):
                pass
            assert gpuscope.flush(10)
            until(lambda: [use for use in gpuscope.statistics().gpus if use.watched_s > 0.3], "readings")
            gpuscope.disable()
            (use,) = gpuscope.statistics().gpus
        return path, use

    return record


def about_equal(one, other):
    """Whether two uses are the same, but for rounding and for what only live ones have."""
    for name in ("watched_s", "active_s", "energy_j", "throttled_s", "others_s"):
        assert getattr(one, name) == pytest.approx(getattr(other, name)), name
    return (one.index, one.uuid, one.model, one.vendor, one.is_part) == (
        other.index,
        other.uuid,
        other.model,
        other.vendor,
        other.is_part,
    )


class TestFiles:
    """The last account of each process has what was added up."""

    def test_what_is_written_is_read(self, nvml, file):
        """All of it, of each GPU."""
        nvml.processes(ME, 1)
        path, use = file(utilization=80, power_w=400.0, reasons=0x4)
        (found,) = read([path]).gpus
        assert found.process == 0
        assert about_equal(found.use, use)
        assert found.use.others_s.keys() == {"idle"}

    def test_alone_and_not_throttled(self, file):
        """What is not in the file was so: a zero tells that from a GPU of which nobody knows."""
        path, use = file()
        (found,) = read([path]).gpus
        assert about_equal(found.use, replace(use, throttled_s={"power_cap": 0.0}))
        assert found.use.others_s.keys() == {"alone"}

    def test_the_newest_counts_whatever_comes_first(self, file):
        """Files may be read in any order, and copies twice."""
        path, use = file()
        lines = path.read_text().splitlines()
        (found,) = read_lines([*lines, *reversed(lines)]).gpus
        assert found.use.watched_s == pytest.approx(use.watched_s)

    def test_it_alone_is_written_once_a_minute(self, nvml, until, tmp_path):
        """Figures that change all the time do not fill the disk of a service that waits for work."""
        path, clock = tmp_path / "spans.jsonl", ManualClock()
        device = FakeDevice(clock, completes=True)
        with capture(device=device, clock=clock, exporters="file", file=str(path), warmup=0, nvml=True):
            with stage("request"):
                pass
            assert gpuscope.flush(10)
            until(lambda: gpuscope.statistics().gpus, "a reading")
            for _ in range(20):
                assert gpuscope.flush(10)
            lines = path.read_text().count("resourceMetrics")
            assert lines <= 2
        assert path.read_text().count("resourceMetrics") <= lines + 2

    @pytest.mark.parametrize("value", ["-1.0", "NaN", '"much"', "{}"])
    def test_what_makes_no_sense_is_counted(self, file, value):
        """The line is malformed, and the rest is read."""
        path, _ = file()
        lines = path.read_text().splitlines()
        bad = []
        for line in lines:
            changed = line
            if "gpuscope.gpu.watched" in line:
                request = json.loads(line)
                for metric in request["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]:
                    if metric["name"] == "gpuscope.gpu.watched":
                        metric["sum"]["dataPoints"][0]["asDouble"] = "VALUE"
                changed = json.dumps(request).replace('"VALUE"', value)
            bad.append(changed)
        found = read_lines(bad)
        assert found.losses.skipped_lines.get("malformed", 0) >= 1
        assert len(found.stage) == 1


REQUEST = Stage("request", 0, 900, gpu=(3, 1898), inside=[Stage("infer", 10, 300, gpu=(15, 1880))])


def recorded(**changes):
    """A recording of a GPU that is behind, with what NVML said of it."""
    found = recording(*repeat(REQUEST, 20, 2000))
    stream = found.streams[0]
    use = replace(USE, index=stream.device, uuid=stream.device_uuid, **changes)
    return replace(found, gpus=(WatchedGpu(stream.process, use),))


class TestReport:
    """Sentences, and what they do to verdicts."""

    def test_a_line_per_gpu(self):
        """How much it was used, at what power, and what held it down for which part of the recording."""
        (said,) = sentences(recorded())
        assert said == (
            "By NVML, GPU 0 (H100): kernels of any process ran for 93% of 100 s; 412 W on average; "
            "throttled for 12% of the recording: power cap."
        )
        assert said in judge(recorded()).notes

    @pytest.mark.parametrize(
        ("held", "said"),
        [
            ({}, ""),
            (None, ""),
            ({"power_cap": 0.0}, ""),
            ({"power_cap": 0.1}, "throttled for less than 1% of the recording: power cap"),
            (
                {"power_cap": 10.0, "hardware_thermal": 30.0},
                "throttled for 40% of the recording: too hot, by the hardware, power cap",
            ),
            ({"something_new": 5.0}, "throttled for 5% of the recording: something_new"),
        ],
    )
    def test_what_held_clocks_down(self, held, said):
        """What most, first; nothing where nothing did."""
        (line,) = sentences(recorded(throttled_s=held))
        assert said in line
        assert ("throttled" in line) == bool(said)

    def test_what_is_not_known_is_not_said(self):
        """A part of a GPU has no utilisation of its own."""
        said = list(sentences(recorded(active_s=None, is_part=True)))
        assert said == [
            "By NVML, GPU 0 (H100): 412 W on average; throttled for 12% of the recording: power cap.",
            "The process had a part of GPU 0 (H100) (MIG). Power and throttling are the whole GPU's.",
        ]
        assert list(sentences(recorded(watched_s=0.0))) == []
        assert list(sentences(recorded(active_s=None, energy_j=None, throttled_s=None))) == []

    @pytest.mark.parametrize(
        ("others", "said"),
        [
            ({"worked": 34.0, "idle": 66.0}, "Other processes worked on GPU 0 (H100) for 34% of the time."),
            (
                {"unknown": 80.0, "alone": 20.0},
                "Other processes were on GPU 0 (H100) for 80% of the time; NVML cannot tell whether they worked.",
            ),
            (
                {"hidden": 100.0},
                "NVML does not show whether other processes were on GPU 0 (H100), as in most containers.",
            ),
        ],
    )
    def test_other_processes_are_said(self, others, said):
        """What they did, or that it is not known."""
        assert list(sentences(recorded(others_s=others)))[1:] == [said]

    @pytest.mark.parametrize(
        ("others", "verdict"),
        [
            ({"alone": 100.0}, "gpu-bound"),
            ({"idle": 100.0}, "gpu-bound"),
            ({"hidden": 100.0}, "gpu-bound"),
            ({"worked": 4.0, "alone": 96.0}, "gpu-bound"),
            ({"worked": 30.0, "idle": 70.0}, "unknown"),
            ({"unknown": 30.0, "alone": 70.0}, "unknown"),
        ],
    )
    def test_beside_another_process_that_works_nothing_is_judged(self, others, verdict):
        """Its work lengthens what events and answers show; that it is there alone does not."""
        found = judge(recorded(others_s=others))
        assert {each.verdict for each in (*found.requests, *found.stages)} == {verdict}
        if verdict == "unknown":
            assert all("nother process" in each.because for each in (*found.requests, *found.stages))
            assert "Record while no other process is on the GPU" in found.requests[0].next_steps[0]
            assert found.requests[0].gain_ms is None

    def test_another_gpu_is_another_matter(self):
        """A process that works on a GPU that these requests do not use takes nothing from them."""
        found = recorded(others_s={"worked": 50.0})
        elsewhere = WatchedGpu(0, replace(found.gpus[0].use, index=1, uuid="another"))
        found = replace(found, gpus=(elsewhere,))
        assert share_of_others(found, found.root) == (0.0, 0.0)
        assert {each.verdict for each in judge(found).requests} == {"gpu-bound"}

    def test_of_two_processes_the_longer_speaks(self):
        """They saw one and the same GPU."""
        found = recorded()
        shorter = WatchedGpu(1, replace(found.gpus[0].use, watched_s=10.0))
        assert list(sentences(replace(found, gpus=(shorter, *found.gpus)))) == list(sentences(found))

    def test_a_run_has_its_own(self):
        """`--run` leaves out what processes of other runs saw."""
        early, late = repeat(REQUEST, 12, 2000), [each.shifted(1e6) for each in repeat(REQUEST, 12, 2000)]
        found = recording(*early, *(replace(each, process="later") for each in late))
        gpus = tuple(WatchedGpu(number, replace(USE, watched_s=1.0 + number)) for number in range(2))
        found = replace(found, gpus=gpus)
        for run in runs_of(found):
            (left,) = only(found, run).gpus
            assert left.process in run.processes

    def test_in_the_printed_report(self, file, capsys):
        """With the sentence of the GPU among the notes."""
        path, _ = file(utilization=80, power_w=400.0, reasons=0x4)
        assert main(["report", str(path)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "By NVML, GPU 0 (Fake GPU): kernels of any process ran for 80% of" in said
        assert "throttled for 100% of the recording: power cap" in said

    def test_in_the_json(self, file, tmp_path):
        """For scripts: figures have them as numbers."""
        path, use = file()
        out = tmp_path / "report.json"
        assert main(["report", str(path), "--json", str(out)]) == 0
        (found,) = json.loads(out.read_text())["gpus"]
        assert found["uuid"] == uuid_of(0)
        assert found["watched_s"] == pytest.approx(use.watched_s)


class Tensor:
    """What stands for a tensor on a GPU."""

    def add_(self, number):
        """Do nothing."""


class TestDoctor:
    """`gpuscope doctor` says whether NVML and the sampler are there, and why not."""

    def findings(self, torch=None, **variables):
        """What it finds, by subject."""
        config = Config.from_env({"GPUSCOPE_NVML": "1", **variables})[0]
        return {each.subject: each for each in watching.watching(config, torch)}

    def on_fake_gpu(self, monkeypatch, **variables):
        """What it finds while its stages run on the fake GPU, with answers of streams where some are wanted."""
        config, clock = Config.from_env({"GPUSCOPE_NVML": "1", **variables})[0], ManualClock()
        device = FakeDevice(clock, completes=True)
        if config.sample_hz:
            device.sampling = Source(answer(5), answer(7))
            device.sampling.hz = config.sample_hz

        def enable(**settings):
            engine.enter_context(_runtime.period(config.changed(**settings, mode="on"), device=device, clock=clock))

        with contextlib.ExitStack() as engine:
            monkeypatch.setattr(gpuscope, "enable", enable)
            torch = SimpleNamespace(zeros=lambda *_, **__: Tensor())
            return {each.subject: each for each in watching.watching(config, torch)}

    def test_nvml_without_a_gpu(self, nvml, monkeypatch):
        """It is there, or it is not."""
        there = self.findings()["NVML"]
        assert (there.verdict, "10 times a second" in there.seen) == ("ok", True)
        monkeypatch.setattr(library, "LIBRARY", "/nowhere/libnvidia-ml.so.1")
        missing = self.findings()["NVML"]
        assert missing.verdict == "ok"
        assert "there is no libnvidia-ml.so.1" in missing.seen
        assert "GPUSCOPE_NVML" in self.findings(GPUSCOPE_NVML="0")["NVML"].seen

    def test_nvml_with_a_gpu(self, nvml, monkeypatch):
        """What it says of the GPU, while stages run."""
        nvml.says(reasons=0x4)
        nvml.processes(7, 8, 9)
        found = self.on_fake_gpu(monkeypatch)["NVML"]
        assert found.verdict == "ok"
        assert found.seen.startswith("asked 10 times a second: GPU 0, at work 50%, 300 W, throttled")
        assert found.seen.endswith("2 other processes")
        nvml.processes()
        assert self.on_fake_gpu(monkeypatch)["NVML"].seen.endswith("other processes not shown")

    def test_no_nvml_beside_a_gpu(self, monkeypatch):
        """That is a warning, with what to do."""
        monkeypatch.setattr(library, "LIBRARY", "/nowhere/libnvidia-ml.so.1")
        found = self.on_fake_gpu(monkeypatch)["NVML"]
        assert (found.verdict, found.seen) == ("warning", "not asked: there is no libnvidia-ml.so.1")
        assert "NVIDIA_DRIVER_CAPABILITIES" in found.advice

    def test_the_sampler(self, nvml, monkeypatch):
        """Off; no GPU; how often; and how many answers there were."""
        assert "GPUSCOPE_SAMPLE_HZ=200" in self.findings(GPUSCOPE_SAMPLE_HZ="0")["sampler"].advice
        monkeypatch.setattr(watching, "native", SimpleNamespace(StreamSampler=None))
        assert "would ask streams 50 times a second" in self.findings(GPUSCOPE_SAMPLE_HZ="50")["sampler"].seen
        found = self.on_fake_gpu(monkeypatch, GPUSCOPE_SAMPLE_HZ="50")["sampler"]
        assert (found.verdict, found.seen) == ("ok", "asks streams 50 times a second; 2 answers in this check")

    def test_why_the_sampler_does_not_run(self, nvml, monkeypatch):
        """Without the parts in C, and where no stream can be asked."""
        monkeypatch.setattr(watching, "native", None)
        found = self.findings(GPUSCOPE_SAMPLE_HZ="50")["sampler"]
        assert (found.verdict, "it needs the parts in C" in found.seen) == ("warning", True)
        monkeypatch.setattr(watching, "native", SimpleNamespace(StreamSampler=None))
        monkeypatch.setattr(Source, "why_off", "no thread was to be had")
        found = self.on_fake_gpu(monkeypatch, GPUSCOPE_SAMPLE_HZ="50")["sampler"]
        assert (found.verdict, found.seen) == ("warning", "does not run: off: no thread was to be had")
