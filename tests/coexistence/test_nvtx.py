"""A program with NVTX ranges of its own, seen by a tool (`nvtx_log.c`) that writes every range down."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("nvtx")

PROGRAM = """
import asyncio
import nvtx
import gpuscope


@gpuscope.stage("decode")
async def decode(entered, may_leave):
    entered.set()
    await may_leave.wait()


async def interleaved():
    events = [asyncio.Event() for _ in range(4)]
    first, second = (asyncio.create_task(decode(*pair)) for pair in (events[:2], events[2:]))
    await events[2].wait()
    events[1].set()
    await first
    with nvtx.annotate("between", domain="app"):
        events[3].set()
    await second


with nvtx.annotate("request", domain="app"):
    with gpuscope.stage("infer"):
        nvtx.push_range("attention", domain="app")
        try:
            with gpuscope.stage("fails"):
                raise ValueError
        except ValueError:
            pass
        nvtx.pop_range(domain="app")
    asyncio.run(interleaved())
"""
THEIRS = [
    "app push request",
    "app push attention",
    "app pop",
    "app push between",
    "app pop",
    "app pop",
]
BOTH = [
    "app push request",
    "gpuscope push infer",
    "app push attention",
    "gpuscope push fails",
    "gpuscope pop",
    "app pop",
    "gpuscope pop",
    "gpuscope start decode",
    "gpuscope start decode",
    "gpuscope end decode",
    "app push between",
    "app pop",
    "gpuscope end decode",
    "app pop",
]


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    """The tool, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("nvtx") / "libnvtx_log.so"
    source = Path(__file__).with_name("nvtx_log.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, source], check=True)
    return path


@pytest.mark.parametrize(("recording", "ranges"), [("0", THEIRS), ("1", BOTH)])
def test_ranges_of_both_nest(run_python, tool, tmp_path, recording, ranges):
    """
    A tool sees the program's pushes and pops as they are without gpuscope, and ours, in their own domain, between.

    Ours are popped on the way out of an error too; stages of tasks that take turns are start/end ranges, not pushes.
    """
    log = tmp_path / "ranges.log"
    settings = {"GPUSCOPE": recording, "GPUSCOPE_EXPORTER": "none", "NVTX_LOG": str(log)}
    done = run_python(PROGRAM, NVTX_INJECTION64_PATH=str(tool), **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert log.read_text().splitlines() == ranges
