"""What is read of one GPU: figures, what holds clocks down, and other processes."""

from __future__ import annotations

import os

import pytest

from gpuscope._cuda.nvml.library import NOT_SUPPORTED, NoNvmlError, Nvml
from gpuscope._cuda.nvml.readings import Gpu, Others, Reading, own_pids

from .conftest import ME, FakeNvml, uuid_of

GONE = 15
"""`NVML_ERROR_GPU_IS_LOST`."""


@pytest.fixture
def gpu(nvml):
    """The first GPU."""
    return gpu_of(nvml)


def gpu_of(nvml, index=0, pids=frozenset({ME})):
    """A GPU as it is found."""
    library = Nvml(nvml.path)
    return Gpu(library, library.find(uuid_of(index)), pids)


def test_a_reading_has_what_nvml_says(nvml, gpu):
    """In units without a prefix, and parts of 1."""
    nvml.says(utilization=93, clock_mhz=1410, power_w=412.5)
    assert gpu.read() == Reading(0.93, 1.41e9, 412.5, "")


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (0x0, ""),
        (0x1, ""),  # Idle.
        (0x2, ""),  # Clocks that somebody has set.
        (0x4, "power_cap"),
        (0x5, "power_cap"),
        (0x20, "software_thermal"),
        (0x48, "hardware_thermal"),
        (0x88, "power_brake"),
        (0x8, "hardware_slowdown"),
        (0x14, "power_cap"),
        (0x10, "sync_boost"),
        (0x100, ""),  # A display.
    ],
)
def test_one_reason_is_named(nvml, gpu, bits, said):
    """The one that says most, so that reasons add up; what is not throttling has no name."""
    nvml.says(reasons=bits)
    assert gpu.read().throttled == said


def test_an_older_driver_has_other_names(build):
    """Before version 535 the reasons, and the second version of the list of processes, which is laid out alike."""
    old = FakeNvml(build("-DOLD"))
    old.says(reasons=0x4)
    old.processes(ME, 1)
    old.worked({1: 50}, in_s=1)
    gpu = gpu_of(old)
    assert gpu.read() == Reading(0.5, 1.5e9, 300.0, "power_cap")
    assert gpu.others() == Others("worked", 1, 0.5)


def test_what_is_not_supported_is_not_asked_again(nvml, gpu):
    """It is None, and the rest is there."""
    nvml.refuses("nvmlDeviceGetPowerUsage", NOT_SUPPORTED)
    assert gpu.read() == Reading(0.5, 1.5e9, None, "")
    before = nvml.library.fake_calls()
    assert gpu.read().power_w is None
    assert nvml.library.fake_calls() - before == 3
    assert gpu.errors == 0


def test_what_fails_is_asked_again(nvml, gpu):
    """It is None meanwhile, and counted."""
    nvml.refuses("nvmlDeviceGetUtilizationRates", GONE)
    assert gpu.read().utilization is None
    nvml.refuses(None, 0)
    assert gpu.read().utilization == 0.5
    assert gpu.errors == 1


def test_gpus_are_found_by_what_they_are(nvml):
    """Not by their number, which `CUDA_VISIBLE_DEVICES` changes: the only GPU of a process may be NVML's second."""
    nvml.says(1, power_w=71.0)
    assert gpu_of(nvml, 1).read().power_w == 71.0
    assert Nvml(nvml.path).find(uuid_of(9)) is None


def test_an_instance_of_a_gpu_has_the_figures_of_the_whole(nvml):
    """Clock, power and what holds them down; how much an instance is used NVML does not say."""
    nvml.says(1, utilization=80, clock_mhz=1200, power_w=250.0, reasons=0x4)
    gpu = gpu_of(nvml, 2)
    assert gpu.whole is not None
    assert gpu.read() == Reading(None, 1.2e9, 250.0, "power_cap")
    nvml.processes(ME, 1, index=2)
    assert gpu.others() == Others("unknown", 1)


class TestOthers:
    """The other processes on a GPU."""

    def test_alone(self, gpu):
        """This process, and no other."""
        assert gpu.others() == Others("alone", 0)

    def test_there_without_work(self, nvml, gpu):
        """A notebook that is open, say."""
        nvml.processes(ME, 1, 2)
        assert gpu.others() == Others("idle", 2)

    def test_at_work(self, nvml, gpu):
        """What they had of the GPU is added up; what this process had is not in it."""
        nvml.processes(ME, 1, 2)
        nvml.worked({ME: 70, 1: 20, 2: 5, 999: 50}, in_s=1)
        assert gpu.others() == Others("worked", 2, 0.25)
        assert gpu.others() == Others("idle", 2)

    def test_what_they_did_before_does_not_count(self, nvml, gpu):
        """NVML remembers some seconds from before recording began."""
        nvml.processes(ME, 1)
        nvml.worked({1: 90}, in_s=-1)
        assert gpu.others() == Others("idle", 1)

    def test_at_work_or_not(self, nvml, gpu):
        """Where NVML does not say what each process used."""
        nvml.refuses("nvmlDeviceGetProcessUtilization", NOT_SUPPORTED)
        nvml.processes(ME, 1)
        assert gpu.others() == Others("unknown", 1)

    def test_numbers_of_another_world(self, nvml, gpu):
        """In a container: this process is there under a number that it does not know, so all but one are others."""
        nvml.processes(4_000_001, 4_000_002, 4_000_003)
        assert gpu.others() == Others("unknown", 2)

    def test_one_unknown_number_may_be_this_process(self, nvml, gpu):
        """Then nothing is known of others."""
        nvml.processes(4_000_001)
        assert gpu.others() == Others("hidden", None)

    def test_no_process_is_shown(self, nvml, gpu):
        """Not even this one, which is there."""
        nvml.processes()
        assert gpu.others() == Others("hidden", None)

    def test_the_list_is_refused(self, nvml, gpu):
        """By a driver without it, say."""
        nvml.refuses("nvmlDeviceGetComputeRunningProcesses_v3", NOT_SUPPORTED)
        assert gpu.others() == Others("hidden", None)

    def test_more_than_there_is_room_for(self, nvml, gpu):
        """The list is not there, and it is asked again."""
        nvml.processes(*range(1, 301))
        assert gpu.others() == Others("hidden", None)
        nvml.processes(ME)
        assert gpu.others() == Others("alone", 0)

    def test_the_numbers_of_this_process(self, tmp_path, monkeypatch):
        """All that the system tells: that in a container, and those around it."""
        assert os.getpid() in own_pids()
        path = tmp_path / "status"
        monkeypatch.setattr("gpuscope._cuda.nvml.readings._STATUS", path)
        assert own_pids() == {os.getpid()}
        path.write_text("Name:\tpython\nNSpid:\t4000001\t7\nThreads:\t1\n")
        assert own_pids() == {os.getpid(), 4_000_001, 7}


class TestLibrary:
    """The library itself."""

    def test_none(self):
        """What is missing is named."""
        with pytest.raises(NoNvmlError) as raised:
            Nvml("/nowhere/libnvidia-ml.so.1")
        assert raised.value.why == "there is no libnvidia-ml.so.1"

    def test_not_to_be_initialised(self, nvml):
        """In NVML's own words."""
        nvml.refuses("nvmlInit_v2", 9)
        with pytest.raises(NoNvmlError) as raised:
            Nvml(nvml.path)
        assert raised.value.why == "libnvidia-ml.so.1 cannot be initialised (Driver Not Loaded)"

    def test_something_else_of_that_name(self, tmp_path):
        """What is not a library is none."""
        path = tmp_path / "libnvidia-ml.so.1"
        path.write_text("not a library")
        with pytest.raises(NoNvmlError):
            Nvml(str(path))
