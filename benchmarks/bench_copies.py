"""
How fast copies to and from a GPU are through pinned buffers, beside the bare `copy_` and the usual ways to copy.

All ways to copy one size in one direction are interleaved. A sample is one copy or several short ones, each waited for.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from _common import Goal, arguments, has_cuda, interleave, median, save, table

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES_MB = (0.5, 1, 2, 6, 16, 64, 256)
QUICK_SIZES_MB = (0.5, 6)
FROM_MB = 6
"""From here on a copy is bound by the bus, and the helpers are to be as fast as the bare copy."""
SAMPLE_MB = 64
"""How much a sample copies in all, so that a short copy is not lost in the clock's noise."""
HELPER, RAW = "PinnedBuffer", "pinned copy_"


def h2d(count: int) -> dict[str, Callable[[], Any]]:
    """Ways to copy to the GPU; each returns once the copy is done."""
    import torch

    from gpuscope import PinnedBuffer

    pageable = torch.ones(count)
    there = torch.empty(count, device="cuda")
    buffer = PinnedBuffer(count, torch.float32).fill_from(pageable)
    pinned, done = pageable.pin_memory(), torch.cuda.Event()

    def raw() -> None:
        there.copy_(pinned, non_blocking=True)
        done.record()
        done.synchronize()

    def pin_each() -> None:
        pageable.pin_memory().to("cuda", non_blocking=True)
        done.record()
        done.synchronize()

    def into() -> None:
        buffer.to_device("cuda", out=there)
        buffer.wait()

    def new() -> None:
        buffer.to_device("cuda")
        buffer.wait()

    return {
        f"{HELPER}, out=": into,
        HELPER: new,
        RAW: raw,
        ".to(device), pageable": partial(pageable.to, "cuda"),
        "pin_memory().to() each call": pin_each,
    }


def d2h(count: int) -> dict[str, Callable[[], Any]]:
    """Ways to copy from the GPU; each returns once the copy is done."""
    import torch

    from gpuscope import PinnedBuffer

    source = torch.ones(count, device="cuda")
    buffer = PinnedBuffer(count, torch.float32)
    pinned, done = torch.empty(count, pin_memory=True), torch.cuda.Event()
    pageable = torch.zeros(count)

    def raw() -> None:
        pinned.copy_(source, non_blocking=True)
        done.record()
        done.synchronize()

    def helper() -> None:
        buffer.copy_from_device(source).wait()

    return {HELPER: helper, RAW: raw, "copy_, pageable": partial(pageable.copy_, source), ".cpu()": source.cpu}


def sample(copy: Callable[[], Any], copies: int) -> float:
    """Return how long one of several copies in a row took, in seconds."""
    start_ns = time.perf_counter_ns()
    for _ in range(copies):
        copy()
    return (time.perf_counter_ns() - start_ns) / 1e9 / copies


def rates(ways: Callable[[int], dict[str, Callable[[], Any]]], size_mb: float, rounds: int) -> dict[str, list[float]]:
    """Return GB/s by way and round."""
    import torch

    size = int(size_mb * 1e6) // 4 * 4
    copies = max(1, int(SAMPLE_MB / size_mb))
    cases = {name: partial(sample, copy, copies) for name, copy in ways(size // 4).items()}
    torch.cuda.synchronize()
    raw = interleave(cases, rounds, warmup=3)
    return {name: [size / seconds / 1e9 for seconds in values] for name, values in raw.items()}


def ratio(found: dict[str, list[float]]) -> float:
    """Return the helper's speed over that of the bare copy: the median over the rounds, of its slower form."""
    forms = [name for name in found if name.startswith(HELPER)]
    return min(median([ours / bare for ours, bare in zip(found[name], found[RAW], strict=True)]) for name in forms)


def show(direction: str, found: dict[float, dict[str, list[float]]]) -> None:
    """Print a table: one row per way, one column per size."""
    sizes = list(found)
    rows = [[name, *(median(found[size][name]) for size in sizes)] for name in found[sizes[0]]]
    print(table([f"{direction}, GB/s", *(f"{size:g} MB" for size in sizes)], rows), end="\n\n")


def main() -> None:
    options = arguments(__doc__).parse_args()
    if not has_cuda():
        print("bench_copies needs a CUDA device: nothing to measure here.")
        return
    sizes, rounds = (QUICK_SIZES_MB, 5) if options.quick else (SIZES_MB, 31)
    goals, raw = [], {}
    for direction, ways in (("H2D", h2d), ("D2H", d2h)):
        found = {size: rates(ways, size, rounds) for size in sizes}
        show(direction, found)
        least = min(ratio(found[size]) for size in sizes if size >= FROM_MB)
        text = f"{direction} through `{HELPER}` over the bare `copy_`, least from {FROM_MB} MB up"
        goals.append(Goal(text, least, 0.95, at_least=True))
        raw[direction] = {f"{size:g} MB": by_way for size, by_way in found.items()}
    save("copies", options.out, goals=goals, unit="GB/s", raw=raw)


if __name__ == "__main__":
    main()
