"""
The clients of `bench_service.py`, in a process of their own: JSON lines in, JSON lines out.

Connections are opened once and kept for all blocks: which worker of several serves which of them is then the same
whether recording is on or off.

In a `closed` block every connection asks again as soon as it was answered, which measures the most that the service
can do. In an `open` block requests fall due at random times at a given rate, whatever the service does, and times count
from when they were due, which measures how long users wait. A closed loop cannot measure that: slow answers make its
clients ask less, and at full load its mean is the number of clients over the throughput.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import sys
import time
from typing import Any

import numpy as np
from PIL import Image


def photograph() -> bytes:
    """A JPEG of 320 by 256 with something in it."""
    waves = np.sin(np.linspace(0, 30, 256)[:, None, None] * np.linspace(1, 2, 320)[None, :, None] + np.arange(3))
    picture = io.BytesIO()
    Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(picture, "jpeg")
    return picture.getvalue()


class Connection:
    """One kept open; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        self._reader, self._writer, self._request = reader, writer, request

    async def ask(self) -> bool:
        """Send the request and read the answer; return whether it was a good one."""
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await self._reader.readexactly(int(length.partition(b":")[2]))
        return b" 200 " in head.partition(b"\r\n")[0]


class Load:
    """The connections, and blocks of requests over them."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections
        self._chance = random.Random(0)

    async def closed(self, seconds: float) -> dict[str, Any]:
        clock, times, good = time.perf_counter_ns, [], []
        start = clock()
        deadline = start + int(seconds * 1e9)

        async def client(connection: Connection) -> None:
            while (asked := clock()) < deadline:
                good.append(await connection.ask())
                times.append((clock() - asked) // 1000)

        await asyncio.gather(*map(client, self._connections))
        return {"us": times, "seconds": (clock() - start) / 1e9, "failed": good.count(False)}

    async def open(self, seconds: float, rate: float) -> dict[str, Any]:
        clock, times, good = time.perf_counter_ns, [], []
        free: asyncio.Queue[Connection] = asyncio.Queue()
        for connection in self._connections:
            free.put_nowait(connection)

        async def one(due: int) -> None:
            connection = await free.get()
            good.append(await connection.ask())
            times.append((clock() - due) // 1000)
            free.put_nowait(connection)

        start = due = clock()
        requests = []
        while (due := due + int(self._chance.expovariate(rate) * 1e9)) < start + seconds * 1e9:
            await asyncio.sleep(max(0.0, (due - clock()) / 1e9))
            requests.append(asyncio.create_task(one(due)))
        await asyncio.gather(*requests)
        return {"us": times, "seconds": (clock() - start) / 1e9, "failed": good.count(False)}


async def main() -> None:
    port, clients = map(int, sys.argv[1:])
    body = photograph()
    request = f"POST /classify HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    load = Load([Connection(*await asyncio.open_connection("127.0.0.1", port), request) for _ in range(clients)])
    print(json.dumps({"ready": clients}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        answer = await getattr(load, command.pop("kind"))(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
