"""
What `overlap` wins over the sequential loop and over the deque loop that everybody writes, without and with a graph.

ViT-B/16 on photographs, with real uploads and downloads, and work on the host of 0.25, 1 and 2 times the GPU's time.
All in one process, interleaved. A figure is the wall time of a loop divided by its steps, the first ones left out.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import Goal, arguments, has_cuda, interleave, median, save, table

import gpuscope

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    import torch

SHARES = (0.25, 1.0, 2.0)
FIRST = 7
"""Steps of each loop that do not count, because they allocate memory and capture graphs."""
SEQUENTIAL, DEQUE, OVERLAP, GRAPH = "sequential", "deque", "overlap", "overlap, graph"
PINNED = "overlap, graph, pinned"
"""The same with batches that are already in pinned memory, as from a `DataLoader` with `pin_memory=True`."""


class Workload:
    """A vision transformer, batches of photographs, and work on the host of a given length."""

    def __init__(self, size: int, batch: int, steps: int) -> None:
        import torch

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self.model = self._model().to(self.device).eval()
        images = photographs(batch, size)
        self.batches = [torch.from_numpy(images + np.float32(step % 3) / 8) for step in range(steps)]
        self.pinned = [batch.pin_memory() for batch in self.batches] if self.device == "cuda" else self.batches
        self.post_ms = 0.0
        self.ended_s: list[float] = []
        """When each step's work on the host ended."""

    def _model(self) -> torch.nn.Module:
        if self.device == "cpu":
            return self.torch.nn.Sequential(self.torch.nn.Flatten(), self.torch.nn.LazyLinear(10))
        from torchvision.models import vit_b_16

        return vit_b_16(weights=None)

    def infer(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Class scores, and the images as they would be shown."""
        return {"scores": self.model(images).softmax(-1), "images": images * 0.25 + 0.5}

    def post(self, outputs: dict[str, torch.Tensor]) -> float:
        """Look at what came back until the time is over."""
        end = time.perf_counter() + self.post_ms / 1e3
        scores, pixels = outputs["scores"].numpy(), outputs["images"].numpy().reshape(-1)[:4096]
        answer = float(scores.max())
        while time.perf_counter() < end:
            answer += float(np.sort(pixels)[0]) * 0
        self.ended_s.append(time.perf_counter())
        return answer

    def batch_bytes(self) -> int:
        """Inputs and outputs of one batch."""
        with self.torch.inference_mode():
            outputs = self.infer(self.batches[0].to(self.device))
        return self.batches[0].nbytes + sum(each.nbytes for each in outputs.values())


def photographs(count: int, size: int) -> Any:
    """Real ones where scikit-learn is installed; floats of `[count, 3, size, size]`, between 0 and 1."""
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except ImportError:
        images = [np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)]
    crops = [images[i % len(images)][9 * i : 9 * i + size, 20 * i : 20 * i + size] for i in range(count)]
    # In C order, as a decoder gives them; `stack` would keep the order of the transposed.
    return np.ascontiguousarray(np.stack([crop.transpose(2, 0, 1) for crop in crops]), np.float32) / 255


def sequential(work: Workload) -> list[float]:
    """Infer, wait for the device, fetch, work on the host."""
    results = []
    for batch in work.batches:
        outputs = work.infer(batch.to(work.device))
        if work.device == "cuda":
            work.torch.cuda.synchronize()
        results.append(work.post({name: value.cpu() for name, value in outputs.items()}))
    return results


def with_deque(work: Workload) -> list[float]:
    """Append the new outputs, work on the oldest meanwhile, wait for the device each step."""
    results, waiting = [], deque[Any]()

    def finish() -> None:
        results.append(work.post({name: value.cpu() for name, value in waiting.popleft().items()}))

    for batch in work.batches:
        waiting.append(work.infer(batch.to(work.device)))
        if len(waiting) == 2:
            finish()
        if work.device == "cuda":
            work.torch.cuda.synchronize()
    while waiting:
        finish()
    return results


class Overlapped:
    """`overlap`; the last loop's own report is kept."""

    def __init__(self, *, depth: int, graph: bool, pinned: bool = False, copies: bool = True) -> None:
        self.depth, self.graph, self.pinned = depth, graph, pinned
        self.more = {} if copies else {"copy_outputs": False}
        self.report: Any = None

    def __call__(self, work: Workload) -> list[float]:
        batches = work.pinned if self.pinned else work.batches
        loop = gpuscope.overlap(batches, work.infer, work.post, depth=self.depth, graph=self.graph, **self.more)
        results = list(loop)
        self.report = loop.report()
        return results


def timed(function: Callable[[Workload], list[float]], work: Workload) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        cuda = work.torch.cuda
        if work.device == "cuda":
            gc.collect()
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
        work.ended_s.clear()
        with work.torch.inference_mode():
            results = function(work)
        counted = work.ended_s[FIRST:]
        sample = {
            "step_ms": (counted[-1] - counted[0]) * 1e3 / (len(counted) - 1),
            "peak_bytes": cuda.max_memory_allocated() if work.device == "cuda" else 0,
            "results": results,
        }
        if isinstance(function, Overlapped):
            sample["report"] = function.report._asdict()
        return sample

    return run


def gpu_ms(work: Workload) -> float:
    """The GPU's time per step, in milliseconds: `infer` replayed as a CUDA graph, between two events."""
    work.post_ms = 0.0
    replayed = Overlapped(depth=2, graph=True)
    with work.torch.inference_mode():
        replayed(work)
    return float(replayed.report.compute_ms)


def limit_ms(name: str, sample: dict[str, Any], gpu: float) -> float:
    """The longer of the GPU's time and the host's in that round; with a graph only `post` counts as the host's."""
    report = sample["report"]
    launching = 0 if name != OVERLAP else report["prepare_ms"] + report["pin_ms"] + report["launch_ms"]
    return max(gpu, launching + report["post_ms"])


def measure(work: Workload, share: float, gpu: float, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all ways, with work on the host of `share` times the GPU's; check that they agree."""
    work.post_ms = share * gpu
    ways = {
        SEQUENTIAL: sequential,
        DEQUE: with_deque,
        OVERLAP: Overlapped(depth=options.depth, graph=False, copies=not options.no_copies),
        GRAPH: Overlapped(depth=options.depth, graph=True),
        PINNED: Overlapped(depth=options.depth, graph=True, pinned=True),
    }
    raw = interleave({name: timed(way, work) for name, way in ways.items()}, options.rounds)
    expected = raw[SEQUENTIAL][0]["results"]
    for name, samples in raw.items():
        for sample in samples:
            if not np.allclose(sample.pop("results"), expected, atol=1e-4):
                raise SystemExit(f"{name}: its results differ from those of the sequential loop")
            if "report" in sample:
                sample["limit_ms"] = limit_ms(name, sample, gpu)
    return {"gpu_ms": gpu, "post_ms": work.post_ms, "raw": raw}


def medians(figures: dict[str, Any], what: str) -> dict[str, float]:
    """By way, the median over the rounds."""
    raw = figures["raw"]
    return {name: median([sample[what] for sample in samples]) for name, samples in raw.items() if what in samples[0]}


def over(figures: dict[str, Any], name: str, other: str | None = None) -> float:
    """The median over the rounds: a step divided by its limit, or by another way's step of the same round."""
    raw = figures["raw"]
    rivals = [sample["step_ms"] for sample in raw[other]] if other else [each["limit_ms"] for each in raw[name]]
    return median([sample["step_ms"] / rival for sample, rival in zip(raw[name], rivals, strict=True)])


def goals(figures: dict[str, Any], what: str, one_batch: int, depth: int) -> list[Goal]:
    peak = medians(figures, "peak_bytes")
    return [
        Goal(f"{what}: {OVERLAP} over its limit", over(figures, OVERLAP), 1.05, "x"),
        Goal(f"{what}: {OVERLAP} over {DEQUE}", over(figures, OVERLAP, DEQUE), 1.0, "x"),
        Goal(f"{what}: {GRAPH} over its limit", over(figures, GRAPH), 1.05, "x"),
        Goal(f"{what}: {PINNED} over its limit", over(figures, PINNED), 1.05, "x"),
        Goal(f"{what}: memory over {SEQUENTIAL}, batches", (peak[OVERLAP] - peak[SEQUENTIAL]) / one_batch, depth),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--depth", type=int, default=2, help="batches in flight; 3 where host and GPU take equally long"
    )
    parser.add_argument("--no-copies", action="store_true", help=f"`{OVERLAP}` with `copy_outputs=False`")
    options = parser.parse_args()
    cuda = has_cuda()
    if not cuda:
        print("Without a GPU nothing overlaps; this is a small run, to see that it works.")
    small = options.quick or not cuda
    options.rounds, steps, size = (2, FIRST + 3, 224 if cuda else 32) if small else (options.rounds, 40, 224)
    found, wanted, rows = {}, [], []
    for batch in (10, 1):
        work = Workload(size, batch, steps)
        one_batch, gpu = work.batch_bytes(), gpu_ms(work)
        for share in SHARES:
            what = f"batch {batch}, post {share:g}x"
            figures = found[what] = measure(work, share, gpu, options)
            limits = medians(figures, "limit_ms")
            rows.append([f"{batch}", f"{share:g}x", gpu, *medians(figures, "step_ms").values(), *limits.values()])
            wanted += goals(figures, what, one_batch, options.depth) if cuda else []
    heads = ["batch", "post", "GPU", SEQUENTIAL, DEQUE, OVERLAP, GRAPH, PINNED, "limit", "limit, graph", "pinned"]
    print("ms per step, median over the rounds")
    print(table(heads, rows))
    save("overlap", options.out, goals=wanted, depth=options.depth, steps=steps, cases=found)


if __name__ == "__main__":
    main()
