"""
A process that runs stages on three threads until it dies: the victim of `check_flight.py`.

Thread `k` runs requests `request-k` of short stages and one that waits, so that whoever reads the ring knows what
must be in it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import threading
import time
from pathlib import Path

import gpuscope

THREADS = 3


def serve(number: int) -> None:
    """Run requests for ever, a few thousand a second."""
    request, first, second = f"request-{number}", f"first-{number}", f"second-{number}"
    while True:
        with gpuscope.stage(request):
            for _ in range(20):
                with gpuscope.stage(first):
                    pass
            with gpuscope.stage(second):
                time.sleep(0.0002)


def die(how: str, last_words: mmap.mmap) -> None:
    """End this process, or wait until somebody does; note the time until then."""
    held = []
    while True:
        struct.pack_into("=q", last_words, 0, time.perf_counter_ns())
        if how == "abort":
            os.abort()
        elif how == "segv":
            ctypes.string_at(0)
        elif how == "oom":
            held.append(bytearray(1 << 22))
        else:
            threading.Event().wait()


def main() -> None:
    how, after_s, words = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    with Path(words).open("r+b") as file:
        last_words = mmap.mmap(file.fileno(), 8)
    for number in range(THREADS):
        threading.Thread(target=serve, args=(number,), daemon=True, name=f"server-{number}").start()
    time.sleep(0.3)
    print("ready", flush=True)
    time.sleep(after_s)
    die(how, last_words)


if __name__ == "__main__":
    main()
