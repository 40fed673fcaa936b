"""
Whether a batch belongs to all its requests: an asyncio batcher and LitServe under load, checked against the program.

A vision transformer with random weights, batches of up to 8, requests at Poisson arrivals, of which some are given up
and some make their batch fail. Without a GPU, gpuscope sees a stand-in whose work is done at once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _batch_checks import Found, unexplained, waits
from _batch_client import HOST, ask, traceparent
from _batch_model import Model, batches_in, use_gpu
from _common import ROOT, Goal, arguments, environment, has_cuda, save, table

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

SIZE = 8
GIVEN_UP = 0.1
"""The part of the requests whose client may lose patience."""
STARTS_IN_S = 180
SERVED = ("recorded", "exported", "lost", "dropped", "pending")


async def load(ask_one: Callable[[int], Awaitable[str]], requests: int, rate: float) -> Counter[str]:
    """Send requests at Poisson arrivals, and count what came of them."""
    chance, tasks = random.Random(3), []
    due = time.monotonic()
    for number in range(requests):
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(task := asyncio.create_task(ask_one(number)))
        if chance.random() < GIVEN_UP:
            asyncio.get_running_loop().call_later(chance.expovariate(rate / 4), task.cancel)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    return Counter(each if isinstance(each, str) else type(each).__name__ for each in done)


async def with_batcher(folder: Path, requests: int, rate: float) -> dict[str, Any]:
    """Run the batcher of `examples/batching.py` in this process."""
    spec = importlib.util.spec_from_file_location("batching_example", ROOT / "examples" / "batching.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = Model(folder / "batches.log", "cuda" if has_cuda() else "cpu")
    model([0] * SIZE)
    (folder / "batches.log").unlink()
    batcher, asked_ns = example.Batcher(model, size=SIZE, delay_s=0.002), {}

    async def ask_one(number: int) -> str:
        with gpuscope.extract({"traceparent": traceparent(number)}), gpuscope.stage("request"):
            asked_ns[number] = time.monotonic_ns()
            given, _ = await batcher(number)
        return "answered" if given == number else "another's answer"

    gpuscope.enable(exporters="file", file=folder / "spans.jsonl", queue_size=65536)
    with gpuscope.extract(gpuscope.Token()):  # The batcher's task is in no request.
        serving = asyncio.create_task(batcher.serve())
    came = await load(ask_one, requests, rate)
    serving.cancel()
    gpuscope.shutdown(timeout=30)
    statistics = gpuscope.statistics()
    account = {name: getattr(statistics, name) for name in SERVED}
    return {"came": came, "asked_ns": asked_ns, "account": account, "batch": "predict"}


@contextmanager
def litserve(folder: Path) -> Iterator[int]:
    """Run the service in processes of its own; yield its port."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    said = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": str(folder / "spans-{pid}.jsonl")}
    said |= {"GPUSCOPE_INTERVAL": "0.1", "GPUSCOPE_FRAMEWORKS": "asgi,litserve"}
    command = [sys.executable, str(Path(__file__).with_name("_batch_service.py")), str(port), str(folder), str(SIZE)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment(said), stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    try:
        deadline = time.monotonic() + STARTS_IN_S
        while not _is_there(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"LitServe did not start:\n{(folder / 'server.log').read_text()[-3000:]}")
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def _is_there(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=5) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(100)
    except OSError:
        return False


def with_litserve(folder: Path, requests: int, rate: float) -> dict[str, Any]:
    """Ask the service."""
    with litserve(folder) as port:
        came = asyncio.run(load(lambda number: ask(port, number), requests, rate))
        time.sleep(2)  # A request that was given up may still be in a batch; then an interval, and its export.
    lines = map(json.loads, (folder / "asked.log").read_text().splitlines())
    asked_ns = {line["number"]: line["asked_ns"] for line in lines}
    return {"came": came, "asked_ns": asked_ns, "account": None, "batch": "litserve.run_batch"}


def judge(way: str, folder: Path, run: dict[str, Any]) -> tuple[dict[str, Any], list[Goal]]:
    """Hold what the files say against what the program did."""
    ran, found = batches_in(folder / "batches.log"), Found(folder, run["batch"])
    faults, near, parts = found.faults(ran), waits(found, run["asked_ns"], ran), unexplained(folder)
    lost = sum(sum(run["account"][name].values()) for name in ("lost", "dropped")) if run["account"] else 0
    result = {
        "came": dict(run["came"]),
        "batches": len(ran),
        "with_gpu_times": len(found.gpu),
        "members": sum(len(batch["items"]) for batch in ran),
        "faults": faults,
        "waits": near,
        "parts": parts,
        "account": run["account"],
    }
    goals = [
        *(Goal(f"{way}: {what}", count, 0) for what, count in faults.items()),
        Goal(f"{way}: batches without GPU times", len(ran) - len(found.gpu), 0),
        Goal(f"{way}: stages lost or dropped", lost, 0),
        Goal(f"{way}: answers that are another's", run["came"]["another's answer"], 0),
        Goal(f"{way}: waits within 1 ms of the program's own clock", 100 * near["near"], 99, " %", at_least=True),
        Goal(f"{way}: unexplained", 100 * parts["unexplained"], 2, " %"),
    ]
    return result, goals


def show(results: dict[str, dict[str, Any]]) -> None:
    rows = [
        [
            way,
            *(str(each[name]) for name in ("members", "batches", "with_gpu_times")),
            *(each["waits"][f"p{share}_us"] for share in (50, 90, 99, 100)),
        ]
        for way, each in results.items()
    ]
    print(table(["way", "members", "batches", "with GPU times", *(f"off, µs p{n}" for n in (50, 90, 99, 100))], rows))
    for way, each in results.items():
        print(f"{way}: {', '.join(f'{name} {count}' for name, count in sorted(each['came'].items()))}")
        print("  " + ", ".join(f"{name} {part:.1%}" for name, part in each["parts"].items() if part >= 0.0005))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="of each way")
    parser.add_argument(
        "--rates", type=float, nargs=2, default=(800, 150), help="a second, of the batcher and LitServe"
    )
    options = parser.parse_args()
    requests = 120 if options.quick else options.requests
    ways = {"asyncio": lambda folder: asyncio.run(with_batcher(folder, requests, options.rates[0]))}
    if importlib.util.find_spec("litserve"):
        ways["LitServe"] = lambda folder: with_litserve(folder, requests, options.rates[1])
    else:
        print("LitServe is not installed: the asyncio batcher alone")
    results, goals, device = {}, [], use_gpu()
    for way, run in ways.items():
        with tempfile.TemporaryDirectory() as name:
            results[way], of_way = judge(way, Path(name), run(Path(name)))
            goals += of_way
    show(results)
    left_out = [] if "LitServe" in ways else ["LitServe"]
    name = "batches" if has_cuda() else "batches_cpu"
    save(name, options.out, goals=goals, gpu=device, requests=requests, left_out=left_out, ways=results)


if __name__ == "__main__":
    main()
