"""
The LitServe service of `bench_batches.py`.

`python _batch_service.py PORT FOLDER SIZE` serves until it is ended. It notes when it is about to queue each request.
"""

from __future__ import annotations

import json
import sys
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import litserve
from _batch_client import HOST
from _batch_model import Model, use_gpu

NUMBER: ContextVar[int] = ContextVar("number")
"""Of the request that is being read."""


class Numbered:
    """Says which request it is; an ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for name, value in scope.get("headers", ()):
            if name == b"x-number":
                NUMBER.set(int(value))
        await self._app(scope, receive, send)


class Noting(litserve.Callback):
    """Notes when the server is about to queue a request, by the monotonic clock."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def on_request(self, *_: object, **__: object) -> None:
        line = json.dumps({"number": NUMBER.get(), "asked_ns": time.monotonic_ns()})
        with self._log.open("a") as log:
            log.write(line + "\n")


class Api(litserve.LitAPI):
    """Each step but the model's passes on what it is given."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    def setup(self, device: str) -> None:
        use_gpu()
        self._model = Model(self._folder / "batches.log", device)

    def decode_request(self, request: dict[str, int]) -> int:
        return request["number"]

    def batch(self, inputs: list[int]) -> list[int]:
        self._began_ns = time.monotonic_ns()
        return inputs

    def predict(self, numbers: list[int]) -> list[tuple[int, int]]:
        return self._model(numbers, self._began_ns)

    def unbatch(self, output: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return output

    def encode_response(self, output: tuple[int, int]) -> dict[str, tuple[int, int]]:
        return {"answer": output}


def main() -> None:
    port, folder, size = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    api = Api(folder, max_batch_size=size, batch_timeout=0.005)
    noting = {"middlewares": [Numbered], "callbacks": [Noting(folder / "asked.log")]}
    server = litserve.LitServer(api, accelerator="auto", devices=1, **noting)
    server.run(host=HOST, port=port, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    main()
