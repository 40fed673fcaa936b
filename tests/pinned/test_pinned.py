"""`PinnedBuffer` and `PinnedPool` where there is no GPU: contents, bounds, errors."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from gpuscope import PinnedBuffer, PinnedPool, PoolExhaustedError

WAIT_S = 30
"""Longer than anything here takes."""
DTYPES = (
    *(torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64),
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="copies go to a GPU here")


def numbers(shape, dtype, seed=0):
    """Return a tensor with contents that differ from element to element and seed to seed."""
    count = int(np.prod(shape, dtype=np.int64))
    return ((torch.arange(count, dtype=torch.float64) * 7 + seed) % 61).to(dtype).reshape(shape)


class TestContents:
    """What goes in comes out."""

    @given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 60))
    def test_every_shape_and_dtype_keeps_its_contents(self, shape, dtype, seed):
        """Zero-size and 0-d ones too; shape, dtype and number of bytes are those of the tensor."""
        data = numbers(shape, dtype, seed)
        with PinnedBuffer(shape, dtype) as buffer:
            assert buffer.fill_from(data) is buffer
            assert (buffer.shape, buffer.dtype, buffer.nbytes) == (shape, dtype, data.nbytes)
            assert torch.equal(buffer.tensor, data)
            assert torch.equal(buffer.result(), data)
            assert buffer.ready()

    @given(shape=SHAPES, dtype=st.sampled_from(["?", "u1", "i4", "f2", "f8", "c16"]), order=st.sampled_from("CF"))
    def test_numpy_arrays_of_any_strides_are_copied(self, shape, dtype, order):
        """Also backwards, in Fortran's order and read-only, which PyTorch itself refuses or warns of."""
        array = np.asarray(numbers(shape, torch.int64).numpy().astype(dtype), order=order)
        array = array[(..., *(slice(None, None, -1),) * len(shape))]
        array.flags.writeable = False
        with PinnedBuffer(shape, np.dtype(dtype)) as buffer:
            np.testing.assert_array_equal(buffer.fill_from(array).array, array)

    def test_strided_tensors_and_those_with_gradients_are_copied(self):
        """A source may have any strides, and autograd does not learn of the copy."""
        source = torch.arange(12.0, requires_grad=True).reshape(3, 4).T
        buffer = PinnedBuffer((4, 3), torch.float32).fill_from(source)
        assert torch.equal(buffer.tensor, source)
        assert not buffer.tensor.requires_grad

    def test_array_shares_the_memory(self):
        """`array` and `numpy.asarray` show what is in the tensor, without a copy."""
        buffer = PinnedBuffer((2, 3), np.float32)
        buffer.array[:] = 5
        assert buffer.tensor.eq(5).all()
        assert np.shares_memory(np.asarray(buffer), buffer.array)
        assert not np.shares_memory(np.array(buffer), buffer.array)
        assert np.asarray(buffer, dtype=np.float64).dtype == np.float64

    def test_conversion_without_a_copy_is_refused(self):
        """An array of another dtype can only be a copy, so asking for none is an error."""
        with pytest.raises(ValueError, match="can only be copied"):
            PinnedBuffer(3, torch.float32).__array__(np.dtype("f8"), copy=False)

    @pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, "int16"), (torch.float8_e4m3fn, "uint8")])
    def test_dtypes_that_numpy_lacks_say_what_to_do(self, dtype, bits):
        """The error names a way to the bits, and the way works."""
        buffer = PinnedBuffer(4, dtype)
        with pytest.raises(TypeError, match=rf"numpy has no {dtype}.*view\(torch\.{bits}\)"):
            _ = buffer.array
        assert buffer.tensor.view(getattr(torch, bits)).numpy().shape == (4,)

    def test_a_buffer_made_in_inference_mode_can_be_filled_outside(self):
        """Where it was made does not matter."""
        with torch.inference_mode():
            buffer = PinnedBuffer(3, torch.float32)
        assert buffer.fill_from(torch.ones(3)).tensor.eq(1).all()
        with torch.inference_mode():
            assert buffer.fill_from(torch.zeros(3)).tensor.eq(0).all()

    @pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("f4"), float, torch.float32])
    def test_dtypes_of_numpy_are_converted(self, dtype):
        """In whatever way numpy accepts them."""
        assert PinnedBuffer(1, dtype).dtype == (torch.float64 if dtype is float else torch.float32)


@without_cuda
class TestWithoutGpu:
    """The fallback: the same calls, copied at once."""

    def test_copies_are_made_at_once(self):
        """`to_device("cpu")` is a copy of its own, `copy_from_device` takes a tensor on the CPU, and all is ready."""
        buffer = PinnedBuffer((2, 2), torch.float32).fill_from(np.ones((2, 2), np.float32))
        there = buffer.to_device("cpu")
        out = torch.zeros(2, 2)
        assert buffer.to_device("cpu", out=out) is out
        buffer.array[:] = 2
        assert there.eq(1).all()
        assert out.eq(1).all()
        assert buffer.copy_from_device(there * 3) is buffer
        assert buffer.ready()
        assert buffer.result().eq(3).all()
        assert not buffer.is_pinned

    def test_a_cuda_device_is_refused(self):
        """With what is possible instead."""
        with pytest.raises(ValueError, match=r'no CUDA device can be used here: expected "cpu"'):
            PinnedBuffer(1, torch.float32).to_device("cuda")

    def test_warns_once(self, run_python):
        """However many buffers there are, one line says that they are pageable."""
        program = (
            "import gpuscope, torch\n"
            "with gpuscope.PinnedPool(3, torch.float32, step=4) as pool:\n"
            "    pool.acquire(), gpuscope.PinnedBuffer(2, torch.uint8)\n"
        )
        result = run_python(program)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("pageable memory") == 1

    def test_import_leaves_torch_alone(self, run_python):
        """Until one of the names is asked for; an unknown name is an ordinary error."""
        program = (
            "import sys, gpuscope\nassert 'PinnedPool' in dir(gpuscope) and not hasattr(gpuscope, 'Pinned')\n"
            "assert 'torch' not in sys.modules\nfrom gpuscope import PinnedPool\nassert 'torch' in sys.modules\n"
        )
        result = run_python(program)
        assert result.returncode == 0, result.stderr


REFUSED_SOURCES = [
    (lambda: torch.ones(2, 3, dtype=torch.float64), TypeError, r"torch\.float64, the buffer of torch\.float32"),
    (lambda: np.ones((2, 3)), TypeError, r"torch\.float64, the buffer of torch\.float32"),
    (lambda: np.ones((2, 3), ">f4"), TypeError, "numpy's '>f4'"),
    (lambda: np.full((2, 3), "a"), TypeError, "numpy's '<U1'"),
    (lambda: torch.ones(3, 2), ValueError, r"shape \(3, 2\), the buffer \(2, 3\): reshape"),
    (lambda: np.ones((1, 3), np.float32), ValueError, r"shape \(1, 3\), the buffer \(2, 3\): use a buffer"),
    (lambda: torch.ones(2, 3).to_sparse(), ValueError, "to_dense"),
    (lambda: torch.ones(2, 3, device="meta"), ValueError, "on meta"),
    (lambda: [[1.0] * 3] * 2, TypeError, "`list`.*numpy.asarray"),
]
REFUSED_FROM_DEVICE = [
    (lambda: torch.ones(2, 3, dtype=torch.float16), TypeError, r"torch\.float16, the buffer of torch\.float32"),
    (lambda: torch.ones(3, 2), ValueError, "reshape"),
    (lambda: torch.ones(3, 2).T, ValueError, r"strides \(1, 2\).*contiguous\(\)"),
    (lambda: torch.ones(2, 3).to_sparse(), ValueError, "to_dense"),
    (lambda: torch._neg_view(torch.ones(2, 3)), ValueError, "resolve_neg"),
    (lambda: torch.ones(2, 3, device="meta"), ValueError, "on meta: expected a device"),
    (lambda: np.ones((2, 3), np.float32), TypeError, "`ndarray`: expected a `torch.Tensor`"),
]


class TestErrors:
    """What is refused, with what was seen and what to do, before anything is copied."""

    @pytest.fixture
    def buffer(self):
        """A buffer full of sevens, which it has to be afterwards."""
        buffer = PinnedBuffer((2, 3), torch.float32).fill_from(torch.full((2, 3), 7.0))
        yield buffer
        assert buffer.tensor.eq(7).all()

    @pytest.mark.parametrize(("make", "error", "message"), REFUSED_SOURCES)
    def test_fill_from(self, buffer, make, error, message):
        """Wrong dtype, shape, layout, device or type."""
        with pytest.raises(error, match=message):
            buffer.fill_from(make())

    @pytest.mark.parametrize(("make", "error", "message"), REFUSED_FROM_DEVICE)
    def test_copy_from_device(self, buffer, make, error, message):
        """The same, and memory that is not contiguous."""
        with pytest.raises(error, match=message):
            buffer.copy_from_device(make())

    @without_cuda
    @pytest.mark.parametrize(("make", "error", "message"), REFUSED_FROM_DEVICE)
    def test_to_device_into(self, buffer, make, error, message):
        """`out` is held to the same, and is left as it was."""
        out = make()
        with pytest.raises(error, match=message.replace(": expected a device", "")):
            buffer.to_device("cpu", out=out)

    @pytest.mark.parametrize("device", ["nowhere", "meta", 1.5, None])
    def test_devices(self, buffer, device):
        """What is not a device, or not one that a copy can go to."""
        with pytest.raises(ValueError, match="`device` is"):
            buffer.to_device(device)

    @without_cuda
    def test_streams(self, buffer):
        """What is not a stream."""
        with pytest.raises(TypeError, match=r"`stream` is of type `int`: expected a `torch\.cuda\.Stream` or None"):
            buffer.to_device("cpu", 0)
        with pytest.raises(TypeError, match="`stream`"):
            buffer.copy_from_device(torch.zeros(2, 3), stream="fast")

    @pytest.mark.parametrize("make", [PinnedBuffer, PinnedPool])
    @pytest.mark.parametrize(
        ("shape", "dtype", "error", "message"),
        [
            ((2, -1), torch.float32, ValueError, r"`shape` is \(2, -1\)"),
            ((2, 1.5), torch.float32, TypeError, "`shape` is"),
            (None, torch.float32, TypeError, "`shape` is None"),
            ("ab", torch.float32, TypeError, "`shape` is 'ab'"),
            (1, None, TypeError, "`dtype` is None"),
            (1, object, TypeError, "`dtype` is <class 'object'>"),
            (1, "nonsense", TypeError, "`dtype` is 'nonsense'"),
            (1, ">f4", TypeError, "byte order"),
            (1, torch.uint1, TypeError, r"`dtype` is torch\.uint1"),
        ],
    )
    def test_what_is_no_shape_or_dtype(self, make, shape, dtype, error, message):
        """Said when the buffer or the pool is made."""
        with pytest.raises(error, match=message):
            make(shape, dtype)

    @pytest.mark.parametrize(
        "use",
        [
            lambda buffer: buffer.tensor,
            lambda buffer: buffer.array,
            np.asarray,
            lambda buffer: buffer.fill_from(torch.ones(2)),
            lambda buffer: buffer.to_device("cpu"),
            lambda buffer: buffer.copy_from_device(torch.ones(2)),
            PinnedBuffer.ready,
            PinnedBuffer.wait,
            PinnedBuffer.result,
            PinnedBuffer.release,
            PinnedBuffer.__enter__,
        ],
    )
    @pytest.mark.parametrize("pooled", [False, True])
    def test_use_after_release(self, use, pooled):
        """Any use, a second release included, is an error, also once somebody else has the memory."""
        pool = PinnedPool(2, torch.float32, max_buffers=1)
        buffer = pool.acquire() if pooled else PinnedBuffer(2, torch.float32)
        buffer.release()
        other = pool.acquire().fill_from(torch.zeros(2))
        with pytest.raises(RuntimeError, match="was released"):
            use(buffer)
        assert other.tensor.eq(0).all()
        assert pool.statistics().in_use == 1
        assert "released" in repr(buffer)

    def test_leaving_the_block_after_a_release_is_fine(self):
        """The context manager releases what is not released yet."""
        pool = PinnedPool(2, torch.float32)
        with pool.acquire() as buffer:
            buffer.release()
        assert pool.statistics().in_use == 0

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_buffers": 0},
            {"step": 0},
            {"step": 1.5},
            {"when_exhausted": "wait"},
            {"timeout_s": -1},
            {"timeout_s": 1, "when_exhausted": "raise"},
        ],
    )
    def test_settings_of_a_pool(self, wrong):
        """Numbers that make no pool, and a timeout that would do nothing."""
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            PinnedPool(1, torch.float32, **wrong)


class TestPool:
    """Bounded and reused."""

    def test_nothing_is_allocated_until_it_is_needed(self):
        """Then `step` at a time, up to the bound."""
        pool = PinnedPool((4, 4), torch.float32, max_buffers=5, step=3)
        assert pool.statistics() == (0,) * 7
        held = [pool.acquire()]
        assert pool.statistics() == (3, 1, 0, 1, 1, 0, 3 * 64)
        held += [pool.acquire() for _ in range(4)]
        assert pool.statistics() == (5, 5, 0, 5, 5, 0, 5 * 64)
        while held:
            held.pop().release()
        assert pool.statistics() == (5, 0, 0, 5, 5, 0, 5 * 64)

    def test_memory_is_reused(self):
        """The same block comes back, contents and all."""
        pool = PinnedPool(8, torch.uint8, max_buffers=1)
        with pool.acquire() as buffer:
            address = buffer.fill_from(torch.full((8,), 9, dtype=torch.uint8)).tensor.data_ptr()
        with pool.acquire() as buffer:
            assert buffer.tensor.data_ptr() == address
            assert buffer.tensor.eq(9).all()

    def test_exhausted_and_told_to_raise(self):
        """The error counts who has what."""
        pool = PinnedPool(1, torch.float32, max_buffers=2, when_exhausted="raise")
        held = [pool.acquire(), pool.acquire()]
        with pytest.raises(PoolExhaustedError, match=r"All 2 buffers.*: 2 in use, 0 released.*max_buffers"):
            pool.acquire()
        held[0].release()
        pool.acquire().release()
        assert pool.statistics()[3:6] == (2, 3, 0)

    @pytest.mark.parametrize("timeout_s", [0, 0.01])
    def test_exhausted_and_nothing_comes_in_time(self, timeout_s):
        """The error says how long it waited."""
        pool = PinnedPool(1, torch.float32, max_buffers=1, timeout_s=timeout_s)
        with pool.acquire(), pytest.raises(TimeoutError, match=f"None came free in {timeout_s} s"):
            pool.acquire()
        assert pool.statistics() == (1, 0, 0, 1, 1, 1, 4)

    def test_a_waiting_thread_gets_what_is_released(self, until_waiting):
        """`acquire` returns once somebody releases."""
        pool = PinnedPool(1, torch.float32, max_buffers=1, timeout_s=WAIT_S)
        held = pool.acquire().fill_from(torch.tensor([3.0]))
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(pool.acquire)
            until_waiting(pool)
            held.release()
            assert waiting.result(WAIT_S).tensor.item() == 3

    def test_a_waiting_thread_is_told_of_close(self, until_waiting):
        """It does not wait for ever for what no longer comes."""
        pool = PinnedPool(1, torch.float32, max_buffers=1)
        held = pool.acquire()
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(pool.acquire)
            until_waiting(pool)
            pool.close()
            with pytest.raises(RuntimeError, match="closed"):
                waiting.result(WAIT_S)
        held.release()

    def test_buffers_that_are_let_go_do_not_count(self):
        """One that was garbage-collected makes room, and its memory is nobody else's while an array of it is held."""
        pool = PinnedPool(4, torch.float32, max_buffers=1, timeout_s=WAIT_S)
        array = pool.acquire().fill_from(torch.ones(4)).array
        gc.collect()
        assert pool.statistics()[:2] == (0, 0)
        with pool.acquire() as other:
            other.array[:] = 2
        assert (array == 1).all()

    def test_a_waiting_thread_gets_the_room_of_a_buffer_let_go(self, until_waiting):
        """Also while it waits."""
        pool = PinnedPool(1, torch.float32, max_buffers=1, timeout_s=WAIT_S)
        held = [pool.acquire()]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(pool.acquire)
            until_waiting(pool)
            held.clear()
            gc.collect()
            waiting.result(WAIT_S).release()

    def test_trim_gives_idle_memory_back(self):
        """What is in use stays; more is allocated again when it is needed."""
        pool = PinnedPool(16, torch.uint8, max_buffers=4, step=4)
        with pool.acquire() as buffer:
            assert pool.trim() == 3 * 16
            assert pool.statistics().allocated_bytes == 16
            buffer.fill_from(torch.zeros(16, dtype=torch.uint8))
            pool.acquire().release()
        assert pool.trim() == 4 * 16
        assert pool.statistics()[:3] == (0, 0, 0)

    def test_close_gives_all_back(self):
        """What is in use can be used on and goes when it is released; `acquire` is an error."""
        with PinnedPool(16, torch.uint8) as pool:
            buffer = pool.acquire()
        assert pool.statistics()[:2] == (1, 1)
        with pytest.raises(RuntimeError, match="The pool is closed"):
            pool.acquire()
        buffer.array[:] = 1
        memory = weakref.ref(buffer._memory)
        buffer.release()
        assert memory() is None
        assert pool.statistics()[:2] == (0, 0)
        pool.close()

    def test_an_allocation_that_fails_is_not_counted(self):
        """The error is the allocator's, and the bound is as it was."""
        pool = PinnedPool(2**50, torch.float64, max_buffers=1, when_exhausted="raise")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="alloc"):
                pool.acquire()
        assert pool.statistics() == (0,) * 7

    @pytest.mark.parametrize("size", [1, 3])
    def test_threads_that_contend_get_buffers_of_their_own(self, size):
        """Eight threads and fewer buffers: no one sees what another wrote, and everyone gets on."""
        pool = PinnedPool(64, torch.int64, max_buffers=size, timeout_s=WAIT_S)

        def work(number):
            for turn in range(200):
                with pool.acquire() as buffer:
                    buffer.tensor.fill_(number * 1000 + turn)
                    assert buffer.tensor.eq(number * 1000 + turn).all()

        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(work, number) for number in range(8)]:
                done.result(2 * WAIT_S)
        found = pool.statistics()
        assert found.acquired == 8 * 200
        assert found.in_use == 0
        assert found.peak_in_use <= found.allocated <= size

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_child_after_a_fork_keeps_what_it_inherits(self, run_python):
        """Events of PyTorch that a child destroys abort it, so the memory that has them outlives every reference."""
        program = (
            "import gc, os, weakref, gpuscope, torch\n"
            "buffer = gpuscope.PinnedBuffer(3, torch.float32)\n"
            "memory = weakref.ref(buffer._memory)\n"
            "child = os.fork()\n"
            "del buffer\ngc.collect()\n"
            "if not child:\n    os._exit(5 if memory() is not None else 6)\n"
            "assert memory() is None\n"
            "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        )
        result = run_python(program)
        assert result.stdout == "5\n", result.stderr


@pytest.fixture
def until_waiting():
    """Return a function that returns once an `acquire` of the pool waits."""
    pause = threading.Event()

    def wait(pool):
        for _ in range(WAIT_S * 1000):
            if pool.statistics().waited:
                return
            pause.wait(0.001)
        pytest.fail("nobody waits")

    return wait


class PoolMachine(RuleBasedStateMachine):
    """Any order of acquire, use, release, letting go and trim, on one pool."""

    buffers = Bundle("buffers")

    def __init__(self):
        super().__init__()
        self.pool = None
        self.held: dict[int, tuple[PinnedBuffer, torch.Tensor | None]] = {}
        self.names = 0

    @precondition(lambda self: self.pool is None)
    @rule(shape=SHAPES, dtype=st.sampled_from(DTYPES), most=st.integers(1, 5), step=st.integers(1, 4))
    def make(self, shape, dtype, most, step):
        """Make the pool."""
        self.most = most
        self.pool = PinnedPool(shape, dtype, max_buffers=most, step=step, when_exhausted="raise")

    @precondition(lambda self: self.pool is not None)
    @rule(target=buffers)
    def acquire(self):
        """Acquire: a buffer that nobody has, or an error exactly when all are in use."""
        self.names += 1
        if len(self.held) == self.most:
            with pytest.raises(PoolExhaustedError):
                self.pool.acquire()
            return -1
        buffer = self.pool.acquire()
        assert all(buffer._memory is not other._memory for other, _ in self.held.values())
        self.held[self.names] = (buffer, None)
        return self.names

    @rule(name=buffers, seed=st.integers(0, 60))
    def fill(self, name, seed):
        """Fill one."""
        if name in self.held:
            buffer, _ = self.held[name]
            data = numbers(buffer.shape, buffer.dtype, seed)
            self.held[name] = (buffer.fill_from(data), data)

    @rule(name=consumes(buffers))
    def release(self, name):
        """Release one."""
        if name in self.held:
            self.held.pop(name)[0].release()

    @rule(name=consumes(buffers))
    def let_go(self, name):
        """Let one go without a release."""
        self.held.pop(name, None)

    @precondition(lambda self: self.pool is not None)
    @rule()
    def trim(self):
        """Give back what is idle."""
        self.pool.trim()
        assert self.pool.statistics().allocated == len(self.held)

    @invariant()
    def nothing_is_mixed_up(self):
        """Everyone's contents are their own, and the account is right."""
        for buffer, data in self.held.values():
            assert data is None or torch.equal(buffer.tensor, data)
        if self.pool is not None:
            found = self.pool.statistics()
            assert found.in_use == len(self.held) <= found.allocated <= self.most
            assert found.peak_in_use <= self.most


TestAnyOrder = PoolMachine.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
