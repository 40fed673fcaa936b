"""
An asyncio batcher, and what each request's trace shows of the batch that served it.

Of gpuscope there are four lines: the stage of a request, `here()` where it is queued, `members=` where its batch runs,
and `capture`, with which this script shows the spans of one request, whatever the environment says. A service exports
them.

    python examples/batching.py
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import gpuscope
from gpuscope import testing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Waiting(NamedTuple):
    """A request that waits for its batch."""

    item: Any
    token: gpuscope.Token
    answer: asyncio.Future[Any]


class Batcher:
    """
    Runs what comes within a few milliseconds as one batch.

    Args:
        run: takes a list of items, and returns as many results; it runs on another thread.
        size: how many items a batch has at most.
        delay_s: how long a batch waits for its second item, in seconds.

    """

    def __init__(self, run: Callable[[Sequence[Any]], Sequence[Any]], *, size: int, delay_s: float) -> None:
        self._run, self._size, self._delay_s = run, size, delay_s
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue()

    async def __call__(self, item: Any) -> Any:
        """Return the result of one item."""
        waiting = Waiting(item, gpuscope.here(), asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(waiting)
        return await waiting.answer

    async def serve(self) -> None:
        """Run batches until the task is cancelled."""
        while True:
            batch = [await self._waiting.get()]
            if self._waiting.qsize() < self._size - 1:
                await asyncio.sleep(self._delay_s)
            while len(batch) < self._size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            # Whoever has given up meanwhile is no member.
            batch = [each for each in batch if not each.answer.done()]
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[Waiting]) -> None:
        try:
            results = await asyncio.to_thread(self._work, batch)
        except Exception as error:  # Of the model: each request of the batch has it.
            for each in batch:
                if not each.answer.done():
                    each.answer.set_exception(error)
            return
        for each, result in zip(batch, results, strict=True):
            if not each.answer.done():
                each.answer.set_result(result)

    def _work(self, batch: list[Waiting]) -> Sequence[Any]:
        with gpuscope.stage("predict", members=[each.token for each in batch]):
            return self._run([each.item for each in batch])


def classifier() -> Callable[[Sequence[torch.Tensor]], list[int]]:
    """Return a small network that tells one of ten kinds of image."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 64), torch.nn.ReLU())
    network.append(torch.nn.Linear(64, 10)).eval()

    @torch.inference_mode()
    def classify(images: Sequence[torch.Tensor]) -> list[int]:
        return network(torch.stack(list(images))).argmax(-1).tolist()

    return classify


async def main() -> None:
    batcher = Batcher(classifier(), size=8, delay_s=0.002)

    @gpuscope.stage("request")
    async def handle(image: torch.Tensor) -> int:
        return await batcher(image)

    serving = asyncio.create_task(batcher.serve())
    requests = []
    for _ in range(60):
        requests.append(asyncio.create_task(handle(torch.rand(3, 32, 32))))
        await asyncio.sleep(random.expovariate(2000))
    await asyncio.gather(*requests)
    serving.cancel()


if __name__ == "__main__":
    with testing.capture() as spans:
        asyncio.run(main())
    light = [span for span in spans if span.name == "predict (shared)"]
    batches = [span for span in spans if span.name == "predict"]
    print(f"{len(light)} requests in {len(batches)} batches; the last request's trace:")
    shown = [span for span in spans if light and span.trace_id == light[-1].trace_id]
    for span in shown:
        said = [f"{key}={span.attributes[key]}" for key in span.attributes if key.startswith("gpuscope.batch.")]
        print(f"  {span.name:18} {span.duration_ns / 1e6:6.2f} ms  {'  '.join(said)}")
