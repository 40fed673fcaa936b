"""The flight recorder on a GPU: times of the GPU are in the ring, and memory that runs out is dumped."""

from __future__ import annotations

import pytest

from gpuscope._flight.dumps import copies
from gpuscope.analysis._reading.flight_ring import have_ended, read_flight

OUT_OF_MEMORY = """
import json, os, sys, torch, gpuscope
path = sys.argv[1] if len(sys.argv) > 1 else os.environ["FLIGHT"]
gpuscope.enable(exporters="none", flight=path, interval_s=0.05)
tensor = torch.ones(1 << 20, device="cuda")
for _ in range(20):
    with gpuscope.stage("infer"):
        tensor = tensor * 1.0001
gpuscope.flush()
raised = False
with gpuscope.stage("request"):
    with gpuscope.stage("allocate"):
        try:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            raised = True
gpuscope.flush()
print(json.dumps({"raised": raised}))
gpuscope.shutdown()
"""


@pytest.fixture
def left(run_program, tmp_path):
    """What a program left that asked for more memory than there is, and handled that."""
    said = run_program(OUT_OF_MEMORY, FLIGHT=str(tmp_path / "flight"))
    assert said == {"raised": True}
    return tmp_path / "flight"


def test_memory_that_runs_out_is_dumped(left):
    """Although the program handles the exception; the copy shows the request that asked."""
    ((_, reason, copied),) = copies(left)
    assert reason == "oom"
    ring = read_flight(copied)
    assert "allocate" in ring.names.values()


def test_the_gpus_times_are_in_the_ring(left):
    """Of each stage with work, and which GPU it was."""
    ring = read_flight(left)
    assert have_ended(ring.stages).all()
    assert ring.devices[0][0].startswith("NVIDIA")
    timed = ring.resolved[ring.resolved[:, 5] >> 48 != 0]
    assert len(timed) >= 20
    assert (timed[:, 4] > timed[:, 3]).sum() >= 20
