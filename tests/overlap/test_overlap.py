"""`overlap` and `DoubleBuffer` without a GPU: the results of the sequential loop, in its order, whatever happens."""

from __future__ import annotations

import asyncio
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gpuscope
from gpuscope._overlap.report import Phases, PhaseTotals

PHASES = ("prepare", "infer", "post", "source")
Pair = namedtuple("Pair", "first second")  # noqa: PYI024 - a container that callers have


class Broken(Exception):
    """What a phase raises."""


class Program:
    """A pipeline over batches of random sizes that counts what it does, and fails where it is told to."""

    def __init__(self, sizes, fails_in=None, fails_at=0):
        self.sizes, self.fails_in, self.fails_at = sizes, fails_in, fails_at
        self.seen = dict.fromkeys(PHASES, 0)
        self.lock = threading.Lock()

    def note(self, phase, number):
        """Count a call of a phase, and fail in the one that is to."""
        with self.lock:
            self.seen[phase] += 1
        if phase == self.fails_in and number == self.fails_at:
            raise Broken(phase, number)

    def batches(self):
        """The source."""
        for number, size in enumerate(self.sizes):
            self.note("source", number)
            yield number, torch.arange(size, dtype=torch.float32) + number

    def prepare(self, batch):
        """Containers of tensors and arrays, and things that are neither."""
        number, values = batch
        self.note("prepare", number)
        return {"x": values * 2, "more": [values.numpy() + 1, number, "text"]}

    def infer(self, inputs):
        """Work on tensors only, some of it in place."""
        number = inputs["more"][1]
        self.note("infer", number)
        inputs["x"].add_(1)
        return Pair(inputs["x"] * torch.as_tensor(inputs["more"][0]), (number, inputs["x"]))

    def post(self, outputs):
        """Return a tensor that is new, and one that is not."""
        number = outputs.second[0]
        self.note("post", number)
        return number, outputs.first.sum(), outputs.second[1]

    def sequential(self):
        """The results up to the failure, and the failure."""
        results = []
        try:
            results.extend(self.post(self.infer(self.prepare(batch))) for batch in self.batches())
        except Broken as error:
            return results, error.args
        return results, None

    def overlapped(self, **options):
        """The same by `overlap`."""
        results = []
        try:
            results.extend(gpuscope.overlap(self.batches(), self.infer, self.post, prepare=self.prepare, **options))
        except Broken as error:
            return results, error.args
        return results, None


def same(left, right):
    """Whether results are equal, bit for bit."""
    return len(left) == len(right) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(left, right, strict=True)
    )


programs = {
    "sizes": st.lists(st.integers(0, 7), max_size=9),
    "fails_in": st.sampled_from([None, *PHASES]),
    "fails_at": st.integers(0, 8),
}
options = st.fixed_dictionaries({"depth": st.integers(1, 4), "workers": st.integers(0, 3)})


@given(**programs, options=options)
def test_same_results_as_in_sequence(sizes, fails_in, fails_at, options):
    """In order, bit for bit, up to the batch that fails, if one does; and no thread is left."""
    expected, failure = Program(sizes, fails_in, fails_at).sequential()
    program = Program(sizes, fails_in, fails_at)
    results, seen_failure = program.overlapped(**options)
    assert same(results, expected)
    assert seen_failure == failure
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpuscope-post")]
    assert program.seen["infer"] <= len(results) + options["depth"]


@given(**programs, asynchronous=st.booleans(), options=options)
def test_async_for_gives_the_same(sizes, fails_in, fails_at, asynchronous, options):
    """From an iterable, and from an asynchronous one."""
    expected, failure = Program(sizes, fails_in, fails_at).sequential()
    program = Program(sizes, fails_in, fails_at)

    async def source():
        """The same batches, asynchronously."""
        for batch in program.batches():
            yield batch

    async def run():
        """The results up to the failure, and the failure."""
        results = []
        batches = source() if asynchronous else program.batches()
        try:
            loop = gpuscope.overlap(batches, program.infer, program.post, prepare=program.prepare, **options)
            async for result in loop:
                results.append(result)  # noqa: PERF401 - those before a failure count
        except Broken as error:
            return results, error.args
        return results, None

    results, seen_failure = asyncio.run(run())
    assert same(results, expected)
    assert seen_failure == failure


def test_traceback_is_that_of_the_phase():
    """Who debugs sees the line that raised."""
    program = Program([3, 3], "infer", 1)
    with pytest.raises(Broken) as raised:
        list(gpuscope.overlap(program.batches(), program.infer, program.post, prepare=program.prepare))
    assert [entry.name for entry in raised.traceback][-2:] == ["infer", "note"]


def test_source_is_read_no_further_than_depth_ahead():
    """Memory is bounded: at most `depth` batches were taken whose results were not returned."""
    taken = []
    source = (taken.append(i) or torch.tensor([i]) for i in range(20))
    for number, _ in enumerate(gpuscope.overlap(source, lambda x: x, depth=3), start=1):
        assert len(taken) <= number + 2


def test_results_outlive_their_slots():
    """What `post` returns of the outputs is still right after later batches used the same memory."""
    batches = [np.full(3, i, np.float32) for i in range(6)]
    tensors = list(gpuscope.overlap(batches, lambda x: x))
    arrays = list(gpuscope.overlap(batches, lambda x: x, lambda y: [y.numpy()[1:]]))
    assert [tensor.tolist() for tensor in tensors] == [[i] * 3 for i in range(6)]
    assert [array[0].tolist() for array in arrays] == [[i] * 2 for i in range(6)]


def test_the_callers_data_is_never_written_to():
    """`infer` may work in place: what it gets is a copy."""
    batch = torch.zeros(3)
    (result,) = gpuscope.overlap([batch], lambda x: x.add_(1))
    assert (batch.tolist(), result.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_no_new_memory_in_steady_state():
    """Slots are allocated for the largest batch, and then reused."""
    addresses = set()

    def infer(x):
        addresses.add(x.data_ptr())
        return x + 1

    list(gpuscope.overlap([torch.ones(size) for size in (8, 8, 3, 8, 1, 8, 5, 8)], infer, depth=2))
    assert len(addresses) == 2


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_caller_hold(mode):
    """Inference mode and autocast are what they are around the loop, and slots work inside and outside of them."""
    weight = torch.eye(3, requires_grad=True)
    seen = []

    def infer(x):
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return x @ weight

    with mode():
        inside = seen[0] if list(gpuscope.overlap([torch.ones(2, 3)] * 3, infer)) else None
        now = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    assert inside == now


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", enabled=False),
        lambda: torch.device("meta"),
    ],
)
def test_modes_of_the_caller_hold_in_workers(mode):
    """`post` in a thread makes what it makes in the caller's."""

    def post(y):
        product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
        return (
            product.dtype,
            product.device,
            product.requires_grad,
            product.is_inference(),
            torch.is_autocast_enabled("cpu"),
        )

    with mode():
        expected = post(None)
        results = list(gpuscope.overlap([torch.ones(2, 2, device="cpu")] * 3, lambda x: x, post, workers=1))
    outside = list(gpuscope.overlap([torch.ones(2, 2)] * 3, lambda x: x, post, workers=1))
    assert results == [expected] * 3
    assert outside == [post(None)] * 3


def test_workers_call_post_at_once():
    """Two workers are in `post` at the same time: each waits for the other there."""
    barrier = threading.Barrier(2, timeout=20)

    def post(x):
        barrier.wait()
        return x.item()

    results = list(gpuscope.overlap([torch.tensor([i]) for i in range(6)], lambda x: x, post, depth=2, workers=2))
    assert results == list(range(6))


def test_a_loop_that_drives_itself():
    """`put` and `get` by hand; what comes out is in order, and `ready` tells."""
    with gpuscope.DoubleBuffer(lambda x: x * 2, lambda y: y.item(), depth=2) as buffer:
        assert not buffer.ready()
        buffer.put(torch.tensor([1]))
        buffer.put(torch.tensor([2]))
        assert (buffer.full, len(buffer), buffer.ready()) == (True, 2, True)
        assert (buffer.get(), buffer.get(), len(buffer)) == (2, 4, 0)


def test_a_failed_batch_does_not_end_a_double_buffer():
    """Its `get` raises; the slot is free again."""
    with gpuscope.DoubleBuffer(lambda x: 1 / x, depth=1) as buffer:
        buffer.put(0)
        with pytest.raises(ZeroDivisionError):
            buffer.get()
        buffer.put(2)
        assert buffer.get() == 0.5


def test_an_interrupt_passes_at_once_and_the_slot_is_free():
    """What is no `Exception` is not kept for later, and costs no slot."""

    def infer(x):
        if x is None:
            raise KeyboardInterrupt
        return x

    with gpuscope.DoubleBuffer(infer, depth=1) as buffer:
        with pytest.raises(KeyboardInterrupt):
            buffer.put(None)
        buffer.put(5)
        assert buffer.get() == 5


def test_wrong_order_of_calls_is_said():
    """Too many `put`, a `get` too many, and both after `close`."""
    buffer = gpuscope.DoubleBuffer(lambda x: x, depth=1)
    with pytest.raises(RuntimeError, match="No batch is in flight"):
        buffer.get()
    buffer.put(1)
    with pytest.raises(RuntimeError, match="All 1 slots"):
        buffer.put(2)
    buffer.close()
    buffer.close()
    with pytest.raises(RuntimeError, match="closed"):
        buffer.put(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"infer": None}, "`infer` is None"),
        ({"post": 3}, "`post` is 3"),
        ({"prepare": "x"}, "`prepare` is 'x'"),
        ({"infer": [torch.ones(1)]}, "`infer` is \\[<Tensor shape=\\(1,\\) .*expected a function of one argument"),
        ({"infer": asyncio.sleep}, "`infer` is a coroutine function: expected one that returns its result"),
        ({"depth": 0}, "`depth` is 0"),
        ({"depth": "2"}, "`depth` is '2': expected a whole number"),
        ({"depth": 1.5}, "`depth` is 1.5: expected a whole number"),
        ({"depth": None}, "`depth` is None: expected a whole number"),
        ({"depth": True}, "`depth` is True: expected a whole number"),
        ({"workers": -1}, "`workers` is -1"),
        ({"workers": "2"}, "`workers` is '2': expected a whole number"),
        ({"graph": "no"}, "`graph` is 'no': expected True or False"),
        ({"copy_outputs": None}, "`copy_outputs` is None: expected True or False"),
        ({"name": 3}, "`name` is 3: expected a text"),
        ({"device": "gpu"}, "`device` is 'gpu': expected \"cpu\", or a GPU"),
        ({"device": "meta"}, '`device` is meta: expected "cpu", or a GPU'),
        ({"device": "cuda:99"}, "`device` is cuda:99"),
        ({"batches": 3}, "`batches` is of type `int`: expected an iterable"),
        ({"batches": None}, "`batches` is of type `NoneType`"),
    ],
)
def test_wrong_arguments_are_said_before_anything_runs(options, message):
    """What was seen and what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        gpuscope.overlap(**{"batches": [], "infer": abs, **options})


def test_asynchronous_batches_in_a_plain_loop():
    """The sentence says what to write instead."""

    async def batches():
        """One batch."""
        yield torch.ones(1)

    with pytest.raises(TypeError, match="`batches` are asynchronous: write `async for` instead of `for`"):
        list(gpuscope.overlap(batches(), abs))


@pytest.mark.parametrize("batch", [np.array(["text"]), torch.ones(2, 2).to_sparse()])
def test_data_that_cannot_be_copied_is_an_error_of_its_batch(batch):
    """Arrays of text and sparse tensors."""
    with pytest.raises(TypeError, match=r"in a batch"):
        list(gpuscope.overlap([batch], lambda x: x))


def test_each_phase_is_a_stage():
    """With recording on every phase of every batch is in the trace."""
    with gpuscope.testing.capture() as spans:
        list(gpuscope.overlap([torch.ones(2)] * 3, lambda x: x, lambda y: y, prepare=lambda x: x, name="detect"))
    names = [span.name for span in spans if span.kind == "host"]
    assert {name: names.count(name) for name in names} == {
        f"detect.{phase}": 3 for phase in ("prepare", "pin", "infer", "post")
    }


def test_without_a_gpu_there_is_no_graph():
    """`graph=True` runs as ever, and the report says why there is none."""
    loop = gpuscope.overlap([torch.ones(2)] * 5, lambda x: x + 1, graph=True)
    assert len(list(loop)) == 5
    report = loop.report()
    assert report.graph == "there is no GPU"
    assert (report.batches, report.bound, report.overlap_ratio) == (3, "cpu-bound", 0.0)
    assert "3 batches" in str(report)


def account(batches, *, wall_ms, **phases):
    """The report of batches that took so long each."""
    now = [10**9]
    made = PhaseTotals(1, lambda: now[0])
    made.add(Phases(**phases))
    for _ in range(batches):
        now[0] += int(wall_ms * 1e6)
        made.add(Phases(**phases))
    return made.report(graph="off")


@pytest.mark.parametrize(
    ("wall_ms", "phases", "bound", "ratio"),
    [
        (10, {"compute": 10, "post": 6, "upload": 2}, "gpu-bound", 1.0),
        (18, {"compute": 10, "post": 6, "upload": 2}, "gpu-bound", 0.0),
        (14, {"compute": 10, "post": 6, "upload": 2}, "gpu-bound", 0.5),
        (20, {"compute": 10, "post": 15, "prepare": 5}, "cpu-bound", 0.5),
        (12, {"compute": 10, "upload": 12, "download": 3}, "transfer-bound", 13 / 15),
    ],
)
def test_report_says_how_much_is_hidden(wall_ms, phases, bound, ratio):
    """All of it where a step takes no longer than the GPU's part, none where it takes the sum."""
    report = account(4, wall_ms=wall_ms, **phases)
    assert report.bound == bound
    assert report.overlap_ratio == pytest.approx(ratio)
