"""The memory of a batch in flight, and the figures of a loop, as the program sees them."""

from __future__ import annotations

import enum
import gc
import itertools
import os
import time
import weakref

import numpy as np
import pytest
import torch

import gpuscope
from gpuscope._overlap import graphed
from gpuscope._overlap.in_flight import InFlightBatch
from gpuscope._overlap.leaves import taken_apart
from gpuscope._overlap.slots import Slot

CPU = torch.device("cpu")
DTYPES = (torch.int64, torch.float32, torch.float64, torch.int32, torch.bool)
MUCH_MS = 1000
"""More than a busy machine adds to some milliseconds, and much less than an error of the arithmetic would."""


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("pair", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_batches_of_one_shape_keep_their_dtypes(pair, depth):
    """Memory that is used again for another kind of number is read as that: values are never cast."""
    batches = [torch.tensor([0, 1, number]).to(pair[number % 2]) for number in range(8)]
    results = list(gpuscope.overlap(iter(batches), lambda x: x.clone(), depth=depth))
    assert [result.dtype for result in results] == [batch.dtype for batch in batches]
    assert all(torch.equal(result, batch) for result, batch in zip(results, batches, strict=True))


@pytest.mark.parametrize(
    "change",
    [lambda x: x.unsqueeze_(0), lambda x: x.t_(), lambda x: x.squeeze_(1)],
    ids=["one more", "turned", "one less"],
)
@pytest.mark.parametrize("given", [torch.Tensor, torch.Tensor.numpy], ids=["tensors", "arrays"])
def test_infer_may_change_the_shape_of_its_input(change, given):
    """The next batch in the same memory has its own shape again."""
    batches = [torch.arange(3.0).reshape(3, 1) + number for number in range(6)]
    seen = []

    def infer(x):
        seen.append(tuple(x.shape))
        change(x)
        return x.clone()

    results = list(gpuscope.overlap(map(given, batches), infer, depth=1))
    assert seen == [(3, 1)] * 6
    assert all(torch.equal(result, change(batch.clone())) for result, batch in zip(results, batches, strict=True))


def test_what_is_not_on_the_host_goes_to_infer_as_it_is():
    """A tensor that lies elsewhere, as one without any memory does, is not copied on its way."""
    batches = [{"host": torch.ones(2), "elsewhere": torch.ones(3, device="meta")} for _ in range(3)]
    seen = []
    list(gpuscope.overlap(iter(batches), lambda batch: seen.append(batch["elsewhere"])))
    assert all(ours is theirs["elsewhere"] for ours, theirs in zip(seen, batches, strict=True))


@torch.no_grad()
def test_a_parameter_that_infer_returns_requires_gradients():
    """As in the plain loop, though the copy of it is made where nothing records any."""
    weight = torch.nn.Parameter(torch.ones(2))
    results = list(gpuscope.overlap([torch.ones(2)] * 3, lambda x: (weight, weight + x)))
    assert [(first.requires_grad, second.requires_grad) for first, second in results] == [(True, False)] * 3


def test_a_slot_knows_what_lies_in_its_memory():
    """A batch is the program's own where any part of it is, and what lies in the slot is copied out of it."""
    slot, own = Slot(CPU), torch.zeros(2)
    pinned = slot.pin([torch.ones(2), torch.ones(3)])
    assert not slot.borrows(pinned)
    assert slot.borrows(taken_apart([pinned.leaves[0], own]))
    lent = pinned.leaves[0]
    tensor, array, other, other_array = slot.apart([lent, lent.numpy(), own, own.numpy()])
    lent.fill_(7)
    own.fill_(8)
    assert [tensor.tolist(), array.tolist()] == [[1, 1], [1, 1]]
    assert other is own
    assert other_array.tolist() == [8, 8]


def test_a_slot_has_memory_where_infer_runs():
    """It is used again as long as it suffices, and said to be new if any of it is; what lies elsewhere needs none."""
    slot, elsewhere = Slot(CPU), torch.ones(3, device="meta")
    for sizes, is_new in (((2, 3), True), ((2, 3), False), ((2, 5), True), ((1, 1), False)):
        pinned = slot.pin([elsewhere, *(torch.full((size,), 1.5 * size) for size in sizes)])
        assert slot.reserve(pinned) is is_new
        first, *there = slot.upload(pinned)
        assert first is elsewhere
        for host, uploaded in zip(pinned.leaves[1:], there, strict=True):
            assert torch.equal(host, uploaded)
            assert host.data_ptr() != uploaded.data_ptr()
            uploaded.unsqueeze_(0)  # As `infer` may do.
        del host, uploaded, there, pinned


def test_a_closed_buffer_holds_no_memory():
    """Of the batches that it had, and of those that were in flight."""
    buffer = gpuscope.DoubleBuffer(lambda x: x, lambda y: y.sum())
    for _ in range(2):
        buffer.put(torch.ones(2))
    held = [weakref.ref(batch.slot) for batch, _ in buffer._in_flight]
    buffer.get()
    buffer.close()
    assert [ref() for ref in held] == [None, None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "make",
    [
        lambda: gpuscope.DoubleBuffer(abs),
        lambda: gpuscope.overlap([], abs),
        lambda: InFlightBatch(CPU, None, str),
    ],
    ids=["a buffer", "a loop", "a batch in flight"],
)
def test_a_child_after_a_fork_keeps_what_may_hold_events(make):
    """Events of PyTorch that a child destroys abort it, so there what has them outlives every reference."""
    made = make()
    ref = weakref.ref(made)
    child = os.fork()
    del made
    if not child:
        gc.collect()
        os._exit(5 if ref() is not None else 6)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    assert ref() is None


def spin(milliseconds):
    """Keep the host busy."""
    until_ns = time.perf_counter_ns() + milliseconds * 1_000_000
    while time.perf_counter_ns() < until_ns:
        pass


def test_phases_have_the_time_that_was_spent_in_them():
    """Each phase of the host has its own mean, in milliseconds."""
    spent = {"prepare": 3, "infer": 7, "post": 12}

    def phase(name):
        def work(batch):
            spin(spent[name])
            return batch

        return work

    loop = gpuscope.overlap(
        iter([torch.zeros(1)] * 8), phase("infer"), phase("post"), prepare=phase("prepare"), depth=2
    )
    for _ in loop:
        spin(5)
    report = loop.report()
    assert report.batches == 6
    assert 3 <= report.prepare_ms < MUCH_MS
    assert 7 <= report.compute_ms < MUCH_MS
    assert 12 <= report.post_ms < MUCH_MS
    assert 0 < report.pin_ms < MUCH_MS
    assert 5 <= report.elsewhere_ms < MUCH_MS
    assert report.launch_ms == report.upload_ms == report.download_ms == 0
    assert report.wall_ms >= 7 + 12 + 3  # What the first of them took before is not in it.


def test_without_a_gpu_nothing_is_hidden():
    """Then `infer` is the host's work, however much of the time it takes."""
    loop = gpuscope.overlap([torch.zeros(1)] * 6, lambda x: spin(5))
    assert list(loop) == [None] * 6
    assert (loop.report().bound, loop.report().overlap_ratio) == ("cpu-bound", 0.0)


class Own(enum.Enum):
    """The program says how its members are shown; one holds a tensor."""

    PLAIN = 1
    TENSOR = torch.full((1,), 7.0)

    def __repr__(self):
        raise AssertionError("printed")

    __str__ = __repr__


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.0, -0.0),
        (complex(0.0, 1), complex(-0.0, 1)),
        (10**5000, 10**5000 + 1),
        (range(0), range(1, 1)),
        (range(10**5000), range(10**5000 + 1)),
        (1, True),
        ("a", b"a"),
        (np.float32(1), np.float64(1)),
        (np.datetime64("2020", "Y"), np.datetime64("2020-01-01", "D")),
        (Own.PLAIN, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_inputs_that_are_not_alike_have_graphs_of_their_own(one, other):
    """Numbers and texts are compared by type and bits, and a value without an end in its text is not printed."""
    keys = [graphed._kind_of(value) for value in (one, other)]
    assert keys[0] != keys[1]
    assert keys == [graphed._kind_of(value) for value in (one, other)]


def test_a_value_that_is_not_a_number_is_like_itself():
    """A NaN equals nothing, and yet the same graph is for it."""
    assert graphed._kind_of(float("nan")) == graphed._kind_of(float("nan"))
    assert graphed._kind_of(np.float32("nan")) == graphed._kind_of(np.float32("nan"))


def test_a_member_of_an_enum_that_holds_a_tensor_may_change():
    """It is not taken for a plain value."""
    assert graphed._kind_of(Own.TENSOR) is None
    assert graphed._kind_of(Own.PLAIN) is not None
