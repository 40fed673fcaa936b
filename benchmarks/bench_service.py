"""
What watching costs a web service: FastAPI, ViT-B/16, concurrent clients; with threads, then with workers.

The same server runs with recording off, on, on without asking the streams (`sample_hz=0`), and off again, in a new
random order each round. Clients that ask again at once measure its throughput; requests at six tenths of that measure
how long users wait (`_service_load.py`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import Goal, arguments, environment, has_cuda, median, percentile, save, table
from _receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
VARIANTS = {"off": "off", "off again": "off", "on": "on", "on, streams not asked": "unasked"}
LOAD = 0.6
"""The share of the service's throughput that `open` blocks ask for."""
SIGNALS = {"on": signal.SIGUSR1, "off": signal.SIGUSR2, "unasked": signal.SIGRTMIN}
STARTS_IN_S = 120
SHARE_CLOSED = 0.4
"""The share of a block's time that measures the throughput; the rest measures the times."""


class Server:
    """uvicorn with its workers, as files in a folder show them."""

    def __init__(self, folder: Path, port: int, workers: int, receiver: str) -> None:
        self._folder, self._workers = folder, workers
        options = f"--app-dir {HERE} --host 127.0.0.1 --port {port} --workers {workers} --log-level warning"
        options += f" --no-access-log --timeout-worker-healthcheck {STARTS_IN_S}"
        ours = {"GPUSCOPE": "idle", "OTEL_SERVICE_NAME": "service", "SERVICE_STATE": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "_service_app:app", *options.split()],
            env=environment({**ours, "SERVICE_RECEIVER": receiver}),
        )
        self._wait("off")

    def switch(self, state: str) -> list[dict[str, Any]]:
        """Have every worker record, or not; return their answers."""
        for path in self._states():
            path.unlink()
            os.kill(int(path.name), SIGNALS[state])
        return self._wait(state)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def _states(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name.isdigit()]

    def _wait(self, state: str) -> list[dict[str, Any]]:
        deadline = time.monotonic() + STARTS_IN_S
        while len(paths := self._states()) < self._workers:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SystemExit(f"the service did not reach the state `{state}` within {STARTS_IN_S} s")
            time.sleep(0.01)
        answers = [json.loads(path.read_text()) for path in paths]
        assert all(answer["state"] == state for answer in answers), answers
        return answers


class Clients:
    """The process that asks."""

    def __init__(self, port: int, clients: int) -> None:
        command = [sys.executable, str(HERE / "_service_load.py"), str(port), str(clients)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def block(self, kind: str, **options: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"kind": kind, **options}), file=self._process.stdin, flush=True)
        answer = self._answer()
        if answer["failed"]:
            raise SystemExit(f"{answer['failed']} requests failed")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the clients' process exited with {self._process.wait()}")
        return dict(json.loads(line))


@contextmanager
def running(workers: int, options: Any, receiver: str) -> Iterator[tuple[Server, Clients]]:
    """A server and its clients."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = stack.enter_context(closing(Server(folder, port, workers, receiver)))
        yield server, stack.enter_context(closing(Clients(port, options.clients)))


def measure(workers: int, options: Any, seconds: float, receiver: str) -> dict[str, Any]:
    """Rounds of every variant until the time is up; at least two."""
    order, shuffler = list(VARIANTS), random.Random(0)
    blocks: dict[str, list[Any]] = {name: [] for name in order}
    accounts = []
    with running(workers, options, receiver) as (server, clients):
        clients.block("closed", seconds=options.block / 2)
        most = rate_of(clients.block("closed", seconds=options.block / 2))
        start = time.monotonic()
        while len(blocks["off"]) < 2 or time.monotonic() - start < seconds:
            shuffler.shuffle(order)
            for name in order:
                server.switch(VARIANTS[name])
                # What switching leaves behind, such as the first steps of new threads, stays out of the block.
                clients.block("closed", seconds=0.2)
                closed = clients.block("closed", seconds=options.block * SHARE_CLOSED)
                waits = clients.block("open", seconds=options.block * (1 - SHARE_CLOSED), rate=LOAD * most)
                blocks[name].append(
                    {"requests_a_second": rate_of(closed), "us": waits["us"], "us_at_the_most": closed["us"]}
                )
                accounts += [answer["account"] for answer in server.switch("off")] if name.startswith("on") else []
    return {"rate": LOAD * most, "blocks": blocks, "accounts": accounts}


def rate_of(block: dict[str, Any]) -> float:
    return len(block["us"]) / block["seconds"]


def pooled_ms(blocks: list[Any], which: str, share: float) -> float:
    return percentile(sorted(us / 1e3 for block in blocks for us in block[which]), share)


FIGURES = {
    "requests a second": lambda blocks: median([block["requests_a_second"] for block in blocks]),
    "p50 ms": lambda blocks: pooled_ms(blocks, "us", 0.5),
    "p99 ms": lambda blocks: pooled_ms(blocks, "us", 0.99),
    "p99 ms, at the most": lambda blocks: pooled_ms(blocks, "us_at_the_most", 0.99),
}


def ratio(blocks: dict[str, list[Any]], name: str, figure: str, rounds: list[int]) -> float:
    """A figure of a variant over the same of the rounds without recording; `off again` over `off`."""
    others = ["off"] if name == "off again" else ["off", "off again"]
    base = FIGURES[figure]([blocks[other][i] for other in others for i in rounds])
    return FIGURES[figure]([blocks[name][i] for i in rounds]) / base


def summarise(blocks: dict[str, list[Any]], draws: int) -> dict[str, Any]:
    """Each variant's figures; its ratios, and where they lie in nine of ten redraws of the rounds."""
    drawer, rounds = random.Random(1), range(len(blocks["off"]))
    summary: dict[str, Any] = {}
    for name, own in blocks.items():
        entry: dict[str, Any] = {figure: of(own) for figure, of in FIGURES.items()}
        for figure in FIGURES if name != "off" else ():
            drawn = sorted(ratio(blocks, name, figure, drawer.choices(rounds, k=len(rounds))) for _ in range(draws))
            entry[f"{figure}, ratio"] = ratio(blocks, name, figure, list(rounds))
            entry[f"{figure}, ratio, 90 %"] = [percentile(drawn, 0.05), percentile(drawn, 0.95)]
        summary[name] = entry
    return summary


def show(way: str, summary: dict[str, Any]) -> None:
    def change(entry: dict[str, Any], figure: str) -> str:
        if f"{figure}, ratio" not in entry:
            return "-"
        low, high = entry[f"{figure}, ratio, 90 %"]
        return f"{100 * entry[f'{figure}, ratio'] - 100:+.1f} ({100 * low - 100:+.1f} to {100 * high - 100:+.1f})"

    changes = ("requests a second", "p50 ms", "p99 ms")
    headers = [way, *FIGURES, *(f"{figure}: change, %" for figure in changes)]
    rows = [
        [name, *(entry[figure] for figure in FIGURES), *(change(entry, figure) for figure in changes)]
        for name, entry in summary.items()
    ]
    print(table(headers, rows))


def versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names if find_spec(name)}


def goals_of(way: str, summary: dict[str, Any]) -> list[Goal]:
    on = summary["on"]
    return [
        Goal(f"{way}: throughput against off", on["requests a second, ratio"], 0.99, "x", at_least=True),
        Goal(f"{way}: p99 against off", on["p99 ms, ratio"], 1.03, "x"),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=80, help="of all rounds, for both ways together, without starting"
    )
    parser.add_argument("--block", type=float, default=4, help="seconds of requests in a block")
    parser.add_argument("--clients", type=int, default=16, help="connections")
    parser.add_argument("--workers", type=int, default=4, help="processes in the second way")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.block, options.clients, options.workers = 4, 1.0, 4, 2
    ways, goals = {}, []
    with closing(Receiver()) as receiver:
        for way, workers in {"threads": 1, "workers": options.workers}.items():
            measured = measure(workers, options, options.seconds / 2, receiver.endpoint)
            summary = summarise(measured["blocks"], 50 if options.quick else 400)
            show(way, summary)
            ways[way] = {"processes": workers, "summary": summary, **measured}
            goals += goals_of(way, summary)
        received = receiver.counts()
    accounts = [account for way in ways.values() for account in way["accounts"]]
    losses = [loss for account in accounts for loss in (account["dropped"], account["lost"]) if loss]
    print(f"stages: {sum(a['recorded'] for a in accounts)}, dropped or lost: {losses or 'none'}; received: {received}")
    save(
        "service" if has_cuda() else "service_cpu",
        options.out,
        goals=goals,
        packages=versions("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "transformers"),
        options={name: getattr(options, name) for name in ("seconds", "block", "clients", "workers")},
        ways=ways,
        received=received,
    )


if __name__ == "__main__":
    main()
