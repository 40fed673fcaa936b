"""
Which changes of the code does no test notice?

Makes random small changes of a module, one at a time (a comparison, a sign, a constant, a condition, a removed
statement, swapped arguments), runs the tests that concern it, and prints those that survive. Whoever reads them
decides: a survivor without any consequence is fine, every other one is a test that is missing.

    python tests/mutants/run.py                             # 24 changes of each module of the table
    python tests/mutants/run.py _cuda/clock.py --count 100  # of one module
    python tests/mutants/run.py _cuda/clock.py --line 86    # all changes of one line

Everything happens in a copy of the package and its tests, in a child process for each change, so nothing here is ever
changed. It takes minutes to hours and is not part of the test suite.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).parent))
from operators import Mutant, mutants

ROOT = Path(__file__).parents[2]
NATIVE = "tests/native/test_device.py"
GRAPHS = "tests/native/test_fences.py tests/native/test_graphs.py tests/cuda/test_replays.py"
COLLECTING = "tests/collecting/test_collector.py"
HTTP = "tests/exporters/test_otlp_http.py tests/exporters/test_otlp_odd_endpoints.py"
ENCODED = "tests/exporters/test_otlp.py tests/exporters/test_otlp_equals_sdk.py"
PROVIDERS = "tests/collecting/test_ends.py::TestProvider tests/collecting/test_metering.py::TestWay"
METRICS = "tests/collecting/test_metrics.py tests/collecting/test_summary.py tests/collecting/test_groups.py"
CLOCKS = "tests/collecting/test_wall_clock.py"
OVERLAP = "tests/overlap"
VERDICTS = "tests/analysis/verdicts"
TESTS = {
    "_cuda/clock.py": "tests/cuda/test_clock.py",
    "_cuda/anchors.py": f"tests/cuda/test_anchors.py {NATIVE}",
    "_cuda/graphs/launch.py": GRAPHS,
    "_cuda/graphs/resolve.py": f"{GRAPHS} {COLLECTING}",
    "_collecting/resolve.py": f"{COLLECTING} {NATIVE}",
    "_collecting/intake.py": f"tests/collecting/test_intake.py tests/recording/test_memory.py {COLLECTING}",
    "_collecting/batch_builder.py": "tests/collecting/test_batch_builder.py",
    "_collecting/collector.py": f"tests/collecting/test_passes.py {COLLECTING} {PROVIDERS}",
    "_collecting/aggregation/groups.py": METRICS,
    "_collecting/aggregation/histograms.py": METRICS,
    "_collecting/aggregation/joined_columns.py": METRICS,
    "_collecting/aggregation/metrics.py": METRICS,
    "_collecting/aggregation/occupancy.py": f"{METRICS} {CLOCKS}",
    "_collecting/aggregation/stage_tree.py": METRICS,
    "_collecting/aggregation/statistics.py": METRICS,
    "_collecting/aggregation/summary.py": METRICS,
    "_collecting/aggregation/tally.py": METRICS,
    "_recording/queue.py": f"tests/recording/test_queue.py tests/recording/test_memory.py {COLLECTING}",
    "_recording/ledger.py": f"tests/recording/test_ledger.py {COLLECTING} tests/collecting/test_passes.py tests/data",
    "_otel/sampling.py": f"{COLLECTING} tests/otel/test_otel.py",
    "_otel/identities.py": "tests/otel/test_identities.py tests/otel/test_otel.py tests/exporters/test_sdk.py",
    "_settings/parsers.py": "tests/settings",
    "_recording/arguments/expressions.py": "tests/instrument/test_expressions.py",
    "exporters/_transport/http.py": f"{HTTP} tests/exporters/test_sender_bounds.py",
    "exporters/_transport/connection.py": HTTP,
    "exporters/_transport/sender.py": "tests/exporters/test_sender_bounds.py tests/exporters/test_otlp_sender.py",
    "exporters/_encoding/otlp_bytes.py": f"{ENCODED} tests/exporters/test_otlp_sender.py",
    "analysis/_busy/estimate.py": "tests/analysis/test_busy.py",
    "analysis/_busy/sampled.py": f"tests/analysis/test_busy.py {VERDICTS}/test_verdict.py",
    "analysis/_busy/slope.py": f"tests/analysis/test_busy.py {VERDICTS}/test_verdict.py",
    "analysis/_verdicts/weigh.py": f"{VERDICTS}/test_decide.py {VERDICTS}/test_calls.py {VERDICTS}/test_verdict.py",
    "analysis/_verdicts/calls.py": f"{VERDICTS}/test_calls.py {VERDICTS}/test_verdict.py",
    "analysis/_verdicts/cold.py": f"{VERDICTS}/test_cold.py",
    "analysis/_verdicts/decide.py": f"{VERDICTS}/test_decide.py {VERDICTS}/test_verdict.py",
    "analysis/_verdicts/evidence.py": f"{VERDICTS}/test_evidence.py {VERDICTS}/test_verdict.py",
    "analysis/_verdicts/fit.py": f"{VERDICTS}/test_fit.py",
    "analysis/compare.py": "tests/analysis/test_compare.py",
    "_overlap/slots.py": OVERLAP,
    "_overlap/in_flight.py": OVERLAP,
    "_overlap/double_buffer.py": OVERLAP,
    "pinned/_blocks.py": "tests/pinned",
}
"""The modules whose mistakes would be silent, and the tests that concern them."""
PRELOADED = ("numpy", "pytest", "hypothesis", "_pytest.assertion.rewrite", "opentelemetry.sdk.trace")
"""Imported once, before the children are made. Nothing of ours, and nothing that would change what the tests see."""


class Copy:
    """A copy of the package and its tests in which one module is changed."""

    def __init__(self, folder: Path, module: str, tests: list[str], limit_s: float) -> None:
        """Copy everything that tests may read."""
        self.folder, self.tests, self.limit_s = folder, tests, limit_s
        ignored = shutil.ignore_patterns(".git", ".*_cache", ".hypothesis", "build", "shared", "node_modules")
        shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True, symlinks=True)
        self.path = folder / "gpuscope" / module
        self.source = self.path.read_text()
        self.twins = (False, True) if re.search(r"\bnative\b", self.source) else (False,)
        """Whether the tests run with the twins in Python, too."""

    def is_noticed(self, source: str) -> bool:
        """Return whether a test fails, or the time is over, with this text of the module."""
        self.path.write_text(source)
        for stale in (self.path.parent / "__pycache__").glob(f"{self.path.stem}.*"):
            stale.unlink()
        return any(self._fails(twins=twins, keeps=source == self.source) for twins in self.twins)

    def _fails(self, *, twins: bool, keeps: bool) -> bool:
        child = os.fork()
        if not child:
            self._run_tests(twins=twins, keeps=keeps)
        return _status(child, self.limit_s) != 0

    def _run_tests(self, *, twins: bool, keeps: bool) -> None:
        code = 3
        try:
            os.setpgid(0, 0)
            os.chdir(self.folder)
            output = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update({"PYTHONPATH": str(self.folder)}, **({"GPUSCOPE_NATIVE": "0"} if twins else {}))
            sys.path[0] = str(self.folder)
            # What the unchanged module compiles serves all changed ones.
            sys.dont_write_bytecode = not keeps
            code = _pytest(self.tests)
        except BaseException:  # Nothing may leave a forked child.
            traceback.print_exc()
        finally:
            os._exit(code)


def _pytest(tests: list[str]) -> int:
    import hypothesis
    import pytest

    # Without shrinking: one example is enough.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, deadline=None)
    options = [
        "-x",
        "-q",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=0",
    ]
    return int(pytest.main([*options, "--hypothesis-profile=mutants", *tests]))


def _status(child: int, limit_s: float) -> int:
    """Wait for a child; end it and what it started when its time is over."""
    ended = os.pidfd_open(child)
    try:
        if not select.select([ended], [], [], limit_s)[0]:
            os.killpg(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    finally:
        os.close(ended)


def chosen(source: str, options: argparse.Namespace) -> list[Mutant]:
    """Return the changes to try, in order of their lines."""
    found = mutants(source)
    if options.line:
        return [mutant for mutant in found if mutant.line in options.line]
    drawn = random.Random(options.seed).sample(range(len(found)), min(options.count, len(found)))
    return [found[number] for number in sorted(drawn)]


def examine(module: str, options: argparse.Namespace) -> None:
    """Try changes of one module, and print which of them survive."""
    tests = options.tests or TESTS[module].split()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        started, copies = time.monotonic(), SimpleQueue()
        first = Copy(Path(folder) / "0", module, tests, limit_s=600)
        if first.is_noticed(first.source):
            sys.exit(f"{module}: its tests fail without any change.\n{(first.folder / 'output.txt').read_text()}")
        limit_s = 10 + options.patience * (time.monotonic() - started)
        copies.put(first)
        first.limit_s = limit_s
        for number in range(1, options.workers):
            copies.put(Copy(Path(folder) / str(number), module, tests, limit_s))

        def survives(mutant: Mutant) -> bool:
            place = copies.get()
            try:
                return not place.is_noticed(mutant.source)
            finally:
                copies.put(place)

        tried = chosen(first.source, options)
        survivors = [mutant for mutant, lives in zip(tried, pool.map(survives, tried), strict=True) if lives]
    print(f"{module}: {len(tried)} changes, {len(tried) - len(survivors)} noticed", flush=True)  # noqa: T201
    for mutant in survivors:
        print(f"  {mutant}", flush=True)  # noqa: T201


def main() -> None:
    """Read the command line, and examine module after module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="paths below gpuscope/; all of the table if there is none")
    parser.add_argument("--tests", nargs="+", help="paths of tests, in place of those of the table")
    parser.add_argument("--count", type=int, default=24, help="how many changes of each module")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--line", type=int, nargs="+", help="all changes of these lines instead")
    parser.add_argument("--workers", type=int, default=2, help="how many at a time")
    parser.add_argument("--patience", type=float, default=3.0, help="longer than so many times the usual is noticed")
    options = parser.parse_args()
    os.environ.update(HYPOTHESIS_STORAGE_DIRECTORY=tempfile.mkdtemp())
    for name in PRELOADED:
        importlib.import_module(name)
    for module in options.modules or TESTS:
        examine(module, options)


if __name__ == "__main__":
    main()
