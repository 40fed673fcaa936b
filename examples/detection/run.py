"""
Runs the three versions of the detection pipeline in turn, checks that they agree, and reports what gpuscope measured.

    python examples/detection/run.py
    python examples/detection/run.py --quick --device cpu
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _common
import _report
import torch
from as_written import AsWritten
from compiled import Compiled
from with_helpers import WithHelpers

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

FLUSH_TIMEOUT_S = 30.0
AHEAD = 2
"""
Requests at each end of a turn that are not recorded, as many as `overlap` has in flight: while a pipeline fills,
answers come later than from a steady one, and while it runs empty, sooner.
"""
WARM_UP = 5
"""Requests of each version before the first turn, which are not recorded."""
MISSING = 0.01
"""The share of all detections that may lack a match, because rounding decides next to the threshold."""


def main() -> int:
    options = _options()
    if torch.device(options.device).type == "cpu":
        # One busy neighbour slows threads that wait for one another tenfold.
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    size = _common.QUICK if options.quick else _common.BASE
    detector = _common.build(size, options.device)
    frames = _common.photographs(size)
    requests = _common.batches(list(frames.values()), size, options.requests + 2 * AHEAD)
    versions, notes = _versions(detector, compile_stages=options.compile)
    print("".join(f"Note: {note}\n" for note in notes), end="", flush=True)
    answers = _measure(versions, requests, options)
    agreement = _agreement(answers)
    figures = _report.measured({name: _recording(options.out, name) for name in versions})
    device = _device(options.device)
    print("\n".join(_report.lines(figures, device["name"])))
    print(f"\n{_sentence(agreement)}")
    facts = {"device": device, "size": _facts(options, size, frames), "notes": notes}
    _save(options.out, facts | {"versions": figures, "outputs": agreement, "published_ms": _report.PUBLISHED_MS})
    return 0 if agreement["equal"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--requests", type=int, metavar="N", help="requests recorded per turn (50; quick: 15)")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each version (5; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few requests, to see that it runs")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave `torch.compile` out")
    parser.add_argument("--out", type=Path, default=Path("detection-figures"), metavar="FOLDER", help="(%(default)s)")
    options = parser.parse_args()
    options.requests = options.requests or (15 if options.quick else 50)
    options.rounds = options.rounds or (2 if options.quick else 5)
    return options


def _versions(detector: _common.Detector, *, compile_stages: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the versions that can run here, of which the first is the one to compare with, and notes about them."""
    compiled = Compiled(detector, compile_stages=compile_stages)
    versions: dict[str, Any] = {"as_written": AsWritten(detector)}
    notes = []
    if hasattr(gpuscope, "overlap"):
        versions["with_helpers"] = WithHelpers(detector)
    else:
        notes.append("with_helpers is left out: this gpuscope has no `overlap`.")
    if compiled.not_compiled:
        notes.append(f"compiled runs without torch.compile ({compiled.not_compiled}).")
    return versions | {"compiled": compiled}, notes


def _measure(
    versions: dict[str, Any], requests: Sequence[list[np.ndarray]], options: argparse.Namespace
) -> dict[str, list[_common.Answer]]:
    """Record the versions in turn, in a new order each round; return the answers of the last round."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name, version in versions.items():
        _recording(options.out, name).unlink(missing_ok=True)
        list(version.answers(requests[:WARM_UP]))
    order, shuffler = list(versions), random.Random(0)
    answers: dict[str, list[_common.Answer]] = {name: [] for name in versions}
    for _ in range(options.rounds):
        shuffler.shuffle(order)
        for name in order:
            answers[name] = _record(versions[name], requests, _recording(options.out, name))
    return answers


def _record(version: Any, requests: Sequence[list[np.ndarray]], path: Path) -> list[_common.Answer]:
    """Answer all requests, and add what gpuscope saw of them to the file."""
    stream = iter(version.answers(requests))
    answers = list(islice(stream, AHEAD))
    gpuscope.enable(exporters="file", file=str(path), sampler="always_on", warmup=0)
    answers += [_next(stream) for _ in range(len(requests) - 2 * AHEAD)]
    gpuscope.disable()
    answers += stream
    gpuscope.shutdown(FLUSH_TIMEOUT_S)
    return answers


def _next(stream: Any) -> _common.Answer:
    with gpuscope.stage("request"):
        return next(stream)


def _agreement(answers: dict[str, list[_common.Answer]]) -> dict[str, Any]:
    """Return how well each version agrees with the first."""
    first, *others = answers
    total = sum(len(image) for answer in answers[first] for image in answer)
    # A detection that moved lacks a match on both sides, and counts twice.
    missing = {name: _common.without_a_like(answers[first], answers[name]) for name in others}
    return {
        "compared_with": first,
        "detections": total,
        "without_a_like": missing,
        "score_tolerance": _common.SCORE_TOLERANCE,
        "edge_tolerance_px": _common.EDGE_TOLERANCE_PX,
        "equal": total > 0 and all(count <= MISSING * total for count in missing.values()),
    }


def _sentence(agreement: dict[str, Any]) -> str:
    verdict = "Outputs are equal" if agreement["equal"] else "OUTPUTS DIFFER"
    missing = ", ".join(f"{count} in {name}" for name, count in agreement["without_a_like"].items())
    return (
        f"{verdict}: of {agreement['detections']} detections, without a match (same label, score within "
        f"{agreement['score_tolerance']}, edges within {agreement['edge_tolerance_px']:g} px): {missing}."
    )


def _recording(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def _device(name: str) -> dict[str, Any]:
    """Say what the figures were measured on."""
    device, threads = torch.device(name), torch.get_num_threads()
    of_cpu = f"the CPU, {threads} thread{'s' * (threads > 1)} (no GPU times)"
    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else of_cpu,
        "type": device.type,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _facts(options: argparse.Namespace, size: _common.Size, frames: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "tiny RF-DETR" if options.quick else "RF-DETR-base",
        "side": size.side,
        "frame": size.frame,
        "batch": size.batch,
        "photographs": list(frames),
        "requests": options.requests,
        "rounds": options.rounds,
    }


def _save(folder: Path, content: dict[str, Any]) -> None:
    path = folder / "detection.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Figures: {path}")
    print(f"All stages, with intervals: gpuscope compare {folder}/as_written.jsonl {folder}/compiled.jsonl")


if __name__ == "__main__":
    sys.exit(main())
