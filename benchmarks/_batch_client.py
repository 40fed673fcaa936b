"""
A client of the service of `bench_batches.py`, and which trace each of its requests is in.

Each request has a connection of its own, so that one that is given up disturbs no other.
"""

from __future__ import annotations

import asyncio
import json

HOST = "127.0.0.1"


def trace_of(number: int) -> str:
    """Return the id of a request's trace."""
    return f"{number + 1:032x}"


def traceparent(number: int) -> str:
    """Return the header that puts a request into its trace."""
    return f"00-{trace_of(number)}-{1:016x}-01"


async def ask(port: int, number: int) -> str:
    """Send one request, on a connection of its own; return the word of its answer, or the status if it is none."""
    body = json.dumps({"number": number})
    head = f"POST /predict HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += f"traceparent: {traceparent(number)}\r\nx-number: {number}\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write((head + body).encode())
        answer = (await reader.read()).decode()
    finally:
        writer.close()
    status = answer.split(" ", 2)[1]
    if status != "200":
        return status
    given, _ = json.loads(answer.partition("\r\n\r\n")[2])["answer"]
    return "answered" if given == number else "another's answer"
