"""`overlap` and `DoubleBuffer` give what the plain loop gives, whatever memory `infer` uses and what holds results."""

from __future__ import annotations

import asyncio
import collections
import ctypes
import dataclasses
import enum
import io
import pickle
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gpuscope
from gpuscope._overlap.buffers import GrowingBuffer

SIZE = 5


@dataclasses.dataclass
class Detections:
    """A result that PyTorch's trees do not know."""

    boxes: torch.Tensor


class Label(str):  # noqa: SLOT000 - as programs have them
    """A text that holds a tensor."""

    def __new__(cls, text, tensor):
        label = super().__new__(cls, text)
        label.tensor = tensor
        return label


class Color(enum.Enum):
    """A value of the program."""

    RED = 1


class Nothing:
    """What a program may have one of, to say that there is no value."""


class Image(torch.Tensor):
    """A tensor subclass."""


class Models:
    """Functions with memory of their own, by name; each object is one program."""

    def __init__(self):
        self.out = torch.zeros(SIZE)
        self.array = np.zeros(SIZE, np.float32)
        self.state = torch.zeros(SIZE)
        self.previous = torch.zeros(SIZE)

    def intermediates(self, x):
        """Memory in between is used again by the allocator."""
        return ((x * 2) + 1) * 3

    def static(self, x):
        """The same memory each time."""
        return torch.mul(x, 10, out=self.out)

    def views_of_static(self, x):
        """Views of the same memory."""
        torch.mul(x, 10, out=self.out)
        return [self.out[1:], {"first": self.out[:1], "same": self.out}]

    def host_array(self, x):
        """An array of its own on the host."""
        np.multiply(x.numpy(), 10, out=self.array)
        return self.array

    def in_place(self, x):
        """The input, changed in place."""
        return x.add_(1)

    def view_of_input(self, x):
        """A view of the input."""
        return x[1:], x

    def state_in_place(self, x):
        """State that is changed in place and returned."""
        return self.state.mul_(0.5).add_(x)

    def state_anew(self, x):
        """State that each call makes anew."""
        self.state = self.state * 0.5 + x
        return self.state

    def difference(self, x):
        """From the input before, which it keeps."""
        y, self.previous = x - self.previous, x
        return y

    def lazy(self, x):
        """Lazily conjugated and negated."""
        return torch.complex(x, -x).conj(), torch.complex(x, x).conj().imag


NAMES = [name for name in vars(Models) if not name.startswith("_")]


def numbers(outputs):
    """All values in outputs, as plain data."""
    return [leaf.tolist() for leaf in torch.utils._pytree.tree_leaves(outputs)]


def batches_of(count):
    """Batches that tell which they are."""
    return [torch.arange(SIZE) * 1.5 + i for i in range(count)]


def plain(infer, batches, post):
    """The plain loop; each batch is a copy, because `infer` may work in place."""
    return [numbers(post(infer(batch.clone()))) for batch in batches]


@pytest.mark.parametrize("name", NAMES)
@given(count=st.integers(0, 7), depth=st.integers(1, 4), workers=st.integers(0, 2), post=st.booleans())
def test_any_memory_of_infer(name, count, depth, workers, post):
    """Static outputs, views, state, kept inputs, arrays, lazy bits: every result is the plain loop's, bit for bit."""
    function = (lambda outputs: [outputs]) if post else None
    results = list(gpuscope.overlap(batches_of(count), getattr(Models(), name), function, depth=depth, workers=workers))
    expected = plain(getattr(Models(), name), batches_of(count), lambda outputs: outputs)
    assert list(map(numbers, results)) == expected


@pytest.mark.parametrize("name", NAMES)
@given(puts=st.lists(st.booleans(), max_size=20), depth=st.integers(1, 3), fails=st.sets(st.integers(0, 9), max_size=3))
def test_any_order_of_put_and_get_and_any_failures(name, puts, depth, fails):
    """A batch that fails costs its own result, and no other's."""
    model, reference = Models(), Models()

    def infer(batch):
        number, x = batch
        if int(number) in fails:
            raise ValueError(int(number))
        return getattr(model, name)(x)

    batches = list(enumerate(batches_of(len(puts))))
    expected = [
        number if number in fails else numbers(getattr(reference, name)(batch.clone())) for number, batch in batches
    ]
    results = []

    def take():
        try:
            results.append(numbers(buffer.get()))
        except ValueError as error:
            results.append(error.args[0])

    with gpuscope.DoubleBuffer(infer, depth=depth) as buffer:
        for batch, put_only in zip(batches, puts, strict=True):
            if buffer.full:
                take()
            buffer.put(batch)
            if not put_only:
                take()
        while buffer:
            take()
    assert results == expected


def long_list(view):
    """More rows than are searched."""
    return list(view.repeat(1)[:0]) + [view[:1] for _ in range(1200)]


HOLDERS = {
    "tensor": (lambda y: y, lambda r: r[0]),
    "dict": (lambda y: {"b": [y]}, lambda r: r["b"][0][0]),
    "dataclass": (Detections, lambda r: r.boxes[0]),
    "namespace": (lambda y: types.SimpleNamespace(b=y), lambda r: r.b[0]),
    "closure": (lambda y: lambda: y, lambda r: r()[0]),
    "generator": (lambda y: (each for each in y), next),
    "memoryview": (lambda y: memoryview(y.numpy()), lambda r: r[0]),
    "array": (lambda y: y.numpy()[:2], lambda r: r[0]),
    "array of objects": (lambda y: np.array([y, None], object), lambda r: r[0][0]),
    "long list": (long_list, lambda r: r[7][0]),
    "storage": (lambda y: y.untyped_storage(), lambda r: torch.tensor(r, dtype=torch.uint8).view(torch.float32)[0]),
    "set": (lambda y: {y}, lambda r: next(iter(r))[0]),
    "shared memory": (lambda y: y.share_memory_(), lambda r: r[0]),
    "capsule": (torch.utils.dlpack.to_dlpack, lambda r: torch.utils.dlpack.from_dlpack(r)[0]),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("copy_outputs", [True, False])
def test_results_hold_whatever_holds_them(holder, copy_outputs):
    """Each result keeps its values while later batches are computed, also where outputs are views of the inputs."""
    hold, read = HOLDERS[holder]
    results = list(gpuscope.overlap(batches_of(6), lambda x: x, hold, copy_outputs=copy_outputs))
    assert [float(read(result)) for result in results] == [float(i) for i in range(6)]


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_used_again_only_when_nobody_refers_to_it(holder):
    """A buffer leaves its memory to whoever holds a view of it, and keeps it once that is gone."""
    hold, read = HOLDERS[holder]
    buffer = GrowingBuffer(torch.device("cpu"))
    buffer.shaped((SIZE,), torch.float32).fill_(7)
    held = hold(buffer.shaped((SIZE,), torch.float32).view(SIZE))
    buffer.let_go()
    buffer.shaped((SIZE,), torch.float32).fill_(9)
    assert float(read(held)) == 7
    address = buffer.shaped((SIZE,), torch.float32).data_ptr()
    buffer.let_go()
    assert buffer.shaped((SIZE,), torch.float32).data_ptr() == address


@pytest.mark.parametrize(
    "wrap",
    [
        Detections,
        lambda x: types.SimpleNamespace(b=x),
        lambda x: lambda: x,
        lambda x: {x},
        lambda x: memoryview(x.numpy()),
        lambda x: (each for each in [x]),
        lambda x: np.array([x, None], object),
        lambda x: bytearray(4),
        lambda x: (ctypes.c_float * 4)(),
        lambda x: np.zeros(2, [("a", "f4")])[0],
        lambda x: x.add,
        weakref.ref,
        lambda x: Label("text", x),
        lambda x: map(abs, x),
        lambda x: torch.nn.Linear(2, 2),
        lambda x: types.SimpleNamespace(many=[[i] for i in range(5000)]),
    ],
)
def test_objects_of_infer_that_may_hold_tensors_are_refused(wrap):
    """Nobody can copy them, and later calls may overwrite what they hold; whoever knows better says so."""
    batches = batches_of(4)
    with pytest.raises(TypeError, match=r"may hold tensors.*copy_outputs=False"):
        list(gpuscope.overlap(batches, wrap))
    assert len(list(gpuscope.overlap(batches, lambda x: [wrap(x)], copy_outputs=False))) == 4


@pytest.mark.parametrize(
    "leaf",
    [
        Color.RED,
        None,
        3,
        "text",
        b"bytes",
        2.5,
        torch.float32,
        torch.Size([2, 3]),
        np.float32(1),
        int,
        len,
        object(),
        Nothing(),
    ],
)
def test_objects_of_infer_that_hold_nothing_pass(leaf):
    """Numbers, texts, types, and what programs compare by identity."""
    results = list(gpuscope.overlap(batches_of(3), lambda x: (x, leaf)))
    assert all(result[1] is leaf for result in results)


@pytest.mark.parametrize(
    "changed",
    [
        (types.SimpleNamespace(), lambda it, n: setattr(it, "n", n)),
        (collections.Counter(), lambda it, n: it.update(n=n)),
        (set(), lambda it, n: it.add(n)),
        (io.StringIO(), lambda it, n: it.write(str(n))),
        (np.array([[0], None], object), lambda it, n: it[0].append(n)),
        (types.SimpleNamespace(many=[]), lambda it, n: it.many.append(n)),
    ],
    ids=lambda changed: type(changed[0]).__name__,
)
def test_objects_that_infer_changes_are_what_they_were(changed):
    """An object that each call returns, and changes, is for each batch what it was after its call."""
    thing, change = changed
    seen = []

    def infer(batch):
        change(thing, len(seen))
        seen.append(pickle.dumps(thing))
        return batch, thing

    assert list(gpuscope.overlap(batches_of(5), infer, lambda outputs: pickle.dumps(outputs[1]))) == seen


def test_objects_that_cannot_be_copied_are_refused():
    """Later calls may change them as well."""
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"`lock`.*cannot be copied.*copy_outputs=False"):
        list(gpuscope.overlap(batches_of(2), lambda x: (x, lock)))


def test_copies_refer_to_what_programs_compare_by_identity():
    """What `infer` returns is copied, but for what came with the batch, and what holds nothing."""
    requests, nothing = [(batch, Detections(batch)) for batch in batches_of(3)], Nothing()
    results = gpuscope.overlap(requests, lambda pair: types.SimpleNamespace(answers=[nothing], of=pair[1].boxes.shape))
    assert all(result.answers[0] is nothing for result in results)
    requests = [(batch, types.SimpleNamespace(id=3)) for batch in batches_of(3)]
    results = gpuscope.overlap(requests, lambda pair: types.SimpleNamespace(answers=[pair[1]]))
    assert all(result.answers[0] is request for result, (_, request) in zip(results, requests, strict=True))


@pytest.mark.parametrize("phase", ["prepare", "infer", "post"])
@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize("is_async", [False, True])
def test_the_end_of_another_iterator_does_not_end_the_loop(phase, kind, is_async):
    """`next()` of something exhausted, within a phase, is an error as in a generator: no batch is lost in silence."""

    def fail(_):
        raise kind

    loop = gpuscope.overlap(batches_of(3), **{"infer": lambda x: x, phase: fail})

    async def read():
        """End the other iterator."""
        return [each async for each in loop]

    with pytest.raises(RuntimeError, match=f"raised {kind.__name__}") as found:
        asyncio.run(read()) if is_async else list(loop)
    assert type(found.value.__cause__) is kind


def test_an_array_that_is_more_than_one_is_refused():
    """A tensor made of a masked array would have the values behind the mask."""
    with pytest.raises(TypeError, match=r"subclass `MaskedArray`.*in `prepare`"):
        list(gpuscope.overlap([np.ma.array([1.0], mask=[True])], lambda x: x))


def test_objects_of_a_batch_pass_through_infer():
    """A request that comes with its batch leaves with it, whatever it holds."""
    requests = [Detections(batch) for batch in batches_of(3)]
    results = list(gpuscope.overlap(requests, lambda request: (request.boxes + 1, request)))
    assert [result[1] for result in results] == requests


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2).as_subclass(Image), "subclass `Image`.*in `prepare`"),
        (torch.ones(2, requires_grad=True), "requires gradients.*detach"),
    ],
)
def test_batches_that_a_copy_would_change_are_refused(batch, message):
    """Subclasses and gradients, with what to do."""
    with pytest.raises(TypeError, match=message):
        list(gpuscope.overlap([batch], lambda x: x))


def test_a_batch_that_requires_gradients_passes_where_none_are_recorded():
    """As in the plain loop under `no_grad`."""
    with torch.no_grad():
        (result,) = gpuscope.overlap([torch.ones(2, requires_grad=True)], lambda x: x + 1)
    assert not result.requires_grad


def test_a_subclass_that_infer_returns_is_refused():
    """Its copy might lose what it adds."""
    with pytest.raises(TypeError, match="outputs of `infer` is of the subclass `Image`"):
        list(gpuscope.overlap(batches_of(2), lambda x: x.as_subclass(Image)))


def test_outputs_that_require_gradients_stay_in_their_graph():
    """Gradients reach the weights through results of the loop, and are those of the plain loop."""
    weights = [torch.ones(SIZE, requires_grad=True) for _ in range(2)]
    sum(result.sum() for result in gpuscope.overlap(batches_of(5), lambda x: x * weights[0])).backward()
    sum((batch * weights[1]).sum() for batch in batches_of(5)).backward()
    assert torch.equal(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 4).t(),
        torch.randn(1, 4).expand(3, 4),
        torch.randn(4, 6)[:, ::2],
        torch.tensor(2.0),
        torch.ones(0, 3),
        torch.view_as_complex(torch.randn(3, 2)).conj(),
        torch.view_as_complex(torch.randn(3, 2)).conj().imag,
    ],
    ids=["channels_last", "transposed", "expanded", "stepped", "scalar", "empty", "conjugate", "negative"],
)
def test_values_and_strides_are_those_of_a_copy(batch):
    """What `infer` gets and what comes out lie in memory as a copy by PyTorch does, because kernels depend on that."""
    seen = []
    (result,) = gpuscope.overlap([batch], lambda x: seen.append((x.clone(), x.stride())) or x)
    copy = torch.empty_like(batch).copy_(batch)
    assert torch.equal(seen[0][0], copy)
    assert torch.equal(result, copy)
    assert seen[0][1] == result.stride() == copy.stride()


def test_arrays_keep_the_order_of_their_dimensions():
    """An array in Fortran's order is given to `infer` in it."""
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    (result,) = gpuscope.overlap([array], lambda x: (x, x.stride()))
    assert result[0].tolist() == array.tolist()
    assert result[1] == torch.from_numpy(array).stride()
