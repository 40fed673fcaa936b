"""Leaving a loop ends it at once: no thread, no batch and no memory waits for the garbage collector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
import weakref

import pytest
import torch

import gpuscope


class Broken(Exception):
    """What a phase raises."""


class Watched:
    """A program whose batches and functions can be asked whether anybody still refers to them."""

    def __init__(self, fails_in=""):
        self.fails_in = fails_in
        self.refs = []

    def batches(self):
        """Batches; the generator counts as well."""
        for i in range(10):
            batch = torch.ones(4) * i
            self.refs.append(weakref.ref(batch))
            yield batch
            if self.fails_in == "source" and i == 3:
                raise Broken
            del batch

    def loop(self, **options):
        """A loop over the batches, whose functions are watched too."""

        def infer(x):
            if self.fails_in == "infer" and x[0] == 3:
                raise Broken
            return x + 1

        def post(y):
            if self.fails_in == "post" and y[0] == 4:
                raise Broken
            return y

        batches = self.batches()
        self.refs += map(weakref.ref, (infer, post, batches))
        return gpuscope.overlap(batches, infer, post, **options)

    def is_gone(self):
        """Whether nothing is left."""
        return len(self.refs) > 3 and not threads_of_loops() and all(ref() is None for ref in self.refs)


@pytest.fixture(autouse=True)
def _without_the_garbage_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("workers", [0, 2])
def test_after_break(workers):
    """The loop is over when the next line runs."""
    program = Watched()
    for _ in program.loop(workers=workers):
        break
    assert program.is_gone()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("held", [False, True])
def test_after_break_out_of_async_for(workers, held):
    """The same, although the event loop does not get a turn, and although the loop is kept for its report."""

    async def main():
        """Run the loop."""
        program = Watched()
        loop = program.loop(workers=workers)
        if not held:
            iterator, loop = loop.__aiter__(), None
            await anext(iterator)
            del iterator
        else:
            async for _ in loop:
                break
            loop.report()
        return not threads_of_loops() if held else program.is_gone()

    assert asyncio.run(main())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fails_in", ["source", "infer", "post"])
def test_after_an_exception(fails_in, workers):
    """Once the program has dealt with it."""
    program = Watched(fails_in)
    with contextlib.suppress(Broken):
        for _ in program.loop(workers=workers):
            pass
    assert program.is_gone()


def threads_of_loops():
    """The threads that call `post`."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("gpuscope-post")]


def test_after_a_task_was_cancelled():
    """A task that waits in `async for` for its source: its loop has ended when the task has."""

    async def main():
        """Run the loop."""
        waits = asyncio.Event()

        async def source():
            """Give batches."""
            yield torch.ones(2)
            waits.set()
            await asyncio.Event().wait()

        async def use():
            """Take results."""
            async for _ in gpuscope.overlap(source(), lambda x: x, lambda y: y, depth=2, workers=1):
                pass

        task = asyncio.ensure_future(use())
        await waits.wait()
        during = threads_of_loops()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return during, threads_of_loops()

    during, afterwards = asyncio.run(main())
    assert during
    assert not afterwards


def test_a_double_buffer_that_is_let_go():
    """Closes itself, and its threads end."""
    buffer = gpuscope.DoubleBuffer(lambda x: x, lambda y: y, workers=1)
    buffer.put(torch.ones(2))
    ref = weakref.ref(buffer)
    workers = threads_of_loops()
    del buffer
    for worker in workers:
        worker.join(20)
    assert ref() is None
    assert not any(worker.is_alive() for worker in workers)


def test_a_loop_that_is_over_stays_over():
    """Further calls of `next` raise `StopIteration`, as of any iterator."""
    loop = gpuscope.overlap([torch.ones(1)], lambda x: x)
    assert len(list(loop)) == 1
    assert list(loop) == []
    loop.close()
    assert list(loop) == []


def test_an_interrupt_while_a_worker_is_in_post_costs_no_result():
    """The batch stays in flight, because `post` still reads its memory, and its result can be had afterwards."""
    ready, go_on = threading.Event(), threading.Event()

    def post(y):
        if y == 1:
            assert ready.wait(20)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert go_on.wait(20)
        return y.item()

    with gpuscope.DoubleBuffer(lambda x: x, post, workers=1) as buffer:
        buffer.put(torch.tensor(1))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come in either
            ready.set()
            buffer.get()
        go_on.set()
        buffer.put(torch.tensor(2))
        assert [buffer.get(), buffer.get()] == [1, 2]
