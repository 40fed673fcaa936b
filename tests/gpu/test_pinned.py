"""Pinned buffers and pools on a GPU: copies beside the program, in the right order, waiting for their own only."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from gpuscope import PinnedBuffer, PinnedPool, PoolExhaustedError

SIZE = 1 << 20
SLOW_CYCLES = 200_000_000
"""About a tenth of a second on the GPU."""
VERY_SLOW_CYCLES = 2_000_000_000
"""About a second: still running when all else is done."""
BRIEF_CYCLES = 100_000
"""Some 50 µs: longer than a small copy."""

ONE_DEVICE = """
import ctypes, json, torch, gpuscope
torch.cuda.set_device({index})
x = torch.ones(8, device="cuda")
with gpuscope.PinnedPool(8, torch.float32) as pool:
    with pool.acquire() as buffer:
        y = buffer.copy_from_device(x).result().sum().item()
        z = buffer.to_device("cuda", torch.cuda.Stream()).sum().item()
cuda, active = ctypes.CDLL("libcuda.so.1"), []
for index in range(2):
    device, flags, state = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(state))
    active.append(state.value)
print(json.dumps([active, y, z]))
"""
FORKED = """
import gc, json, os, sys, torch, gpuscope
pool = gpuscope.PinnedPool(8, torch.float32)
with pool.acquire() as buffer:
    kept = buffer.to_device("cuda")
alone = gpuscope.PinnedBuffer(8, torch.float32).copy_from_device(kept)
alone.wait()
del kept
child = os.fork()
if not child:
    del pool, buffer, alone
    gc.collect()
    sys.exit(0)
print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.fixture(autouse=True)
def _idle_gpu():
    """Begin and end each test with a GPU that has nothing to do, and kernels that are loaded."""
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


@pytest.fixture(params=["current", "given", "as current"])
def stream_of(request):
    """How a copy gets its stream: that stream, what to pass, and the context to call in."""
    own = torch.cuda.Stream()
    return {
        "current": (torch.cuda.current_stream(), None, contextlib.nullcontext),
        "given": (own, own, contextlib.nullcontext),
        "as current": (own, None, lambda: torch.cuda.stream(own)),
    }[request.param]


def hold_up(stream, cycles=SLOW_CYCLES):
    """Give a stream a kernel that runs for long, and return the event behind it."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)
        return stream.record_event()


def filled(value, size=SIZE):
    """Return a buffer that is full of a value."""
    return PinnedBuffer(size, torch.float32).fill_from(torch.full((size,), float(value)))


class TestMemory:
    """What a buffer is."""

    def test_it_is_pinned_and_numpy_shares_it(self):
        """PyTorch finds the memory pinned, and the array is the same memory."""
        buffer = PinnedBuffer((4, 5), np.float32)
        assert buffer.is_pinned
        assert buffer.tensor.is_pinned()
        assert buffer.array.__array_interface__["data"][0] == buffer.tensor.data_ptr()
        buffer.array[:] = 3
        assert buffer.to_device("cuda").eq(3).all()

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7, 5, 3)])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64])
    def test_round_trip(self, shape, dtype):
        """To the GPU and back, for every kind of shape and dtype."""
        count = int(np.prod(shape, dtype=np.int64))
        data = (torch.arange(count) % 11).to(dtype).reshape(shape)
        there = PinnedBuffer(shape, dtype).fill_from(data).to_device("cuda")
        back = PinnedBuffer(shape, dtype).copy_from_device(there)
        assert torch.equal(back.result(), data)

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_gradients_and_inference_mode_do_not_matter(self, mode):
        """A model's output that requires gradients, and one of inference mode, are copied as they are."""
        with mode():
            source = torch.ones(8, device="cuda") * 2
        if mode is torch.enable_grad:
            source = (source.requires_grad_() * 1).clone()
        assert PinnedBuffer(8, torch.float32).copy_from_device(source, torch.cuda.Stream()).result().eq(2).all()


class TestOrder:
    """Copies start and end when they should, and the host waits for nothing else."""

    def test_to_device_does_not_wait(self, stream_of):
        """Behind a slow kernel, a copy is not ready at once; it is after `wait`, and what arrives is right."""
        stream, given, context = stream_of
        buffer = filled(5)
        hold_up(stream)
        with context():
            result = buffer.to_device("cuda", given)
        assert not buffer.ready()
        buffer.wait()
        assert buffer.ready()
        assert result.eq(5).all()

    def test_copy_from_device_does_not_wait(self, stream_of):
        """The same in the other direction."""
        stream, given, context = stream_of
        source, buffer = torch.full((SIZE,), 5.0, device="cuda"), filled(-1)
        torch.cuda.synchronize()
        hold_up(stream)
        with context():
            buffer.copy_from_device(source, given)
        assert not buffer.ready()
        assert buffer.result().eq(5).all()
        assert buffer.ready()

    def test_both_directions_are_no_synchronisation(self, stream_of):
        """PyTorch, told to raise where it synchronises, does not."""
        stream, given, context = stream_of
        buffer, back = filled(5), filled(-1)
        out = torch.empty(SIZE, device="cuda")
        hold_up(stream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with context():
                result = buffer.to_device("cuda", given)
                buffer.to_device("cuda", given, out=out)
                back.copy_from_device(result, given)
            back.wait()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert back.tensor.eq(5).all()
        assert out.eq(5).all()

    def test_round_trips_on_several_streams(self):
        """Out on one stream, used on the current one, back on another, four at a time and without the host waiting."""
        streams = [torch.cuda.Stream() for _ in range(4)]
        buffers = [(filled(number), filled(-1)) for number in range(4)]
        for number, (there, back) in enumerate(buffers):
            hold_up(streams[number], BRIEF_CYCLES)
            result = there.to_device("cuda", streams[number])
            back.copy_from_device(result * 10 + 1, streams[number - 1])
        for number, (_, back) in enumerate(buffers):
            assert back.result().eq(number * 10 + 1).all()

    def test_a_copy_on_its_own_stream_runs_beside_the_current_one(self):
        """It is done while the current stream's kernel still runs."""
        buffer, stream = filled(5), torch.cuda.Stream()
        buffer.to_device("cuda", stream)
        torch.cuda.synchronize()
        busy = hold_up(torch.cuda.current_stream(), VERY_SLOW_CYCLES)
        result = buffer.to_device("cuda", stream)
        buffer.wait()
        assert not busy.query()
        assert result.eq(5).all()

    def test_waiting_is_for_the_own_copy_only(self):
        """`wait`, `fill_from` and `ready` of one buffer do not wait for another stream, nor for what comes behind."""
        buffer, stream = filled(5), torch.cuda.Stream()
        result = buffer.to_device("cuda", stream)
        busy = [hold_up(stream, VERY_SLOW_CYCLES), hold_up(torch.cuda.current_stream(), VERY_SLOW_CYCLES)]
        buffer.fill_from(torch.zeros(SIZE))
        assert buffer.ready()
        assert not any(event.query() for event in busy)
        assert result.eq(5).all()

    def test_fill_from_waits_for_the_own_copy(self):
        """What is on its way is not overwritten."""
        buffer = filled(5)
        hold_up(torch.cuda.current_stream())
        result = buffer.to_device("cuda")
        buffer.fill_from(torch.zeros(SIZE))
        assert result.eq(5).all()

    def test_the_result_can_be_used_at_once(self):
        """The current stream waits for the copy on the given one."""
        buffer, stream = filled(5), torch.cuda.Stream()
        hold_up(stream)
        assert (buffer.to_device("cuda", stream) + 1).eq(6).all()

    def test_a_given_tensor_is_not_overwritten_while_it_is_read(self):
        """A copy to `out` on another stream starts behind what the current one does with it."""
        buffer, out = filled(5), torch.ones(SIZE, device="cuda")
        hold_up(torch.cuda.current_stream())
        before = out.clone()
        assert buffer.to_device("cuda", torch.cuda.Stream(), out=out) is out
        assert before.eq(1).all()
        assert out.eq(5).all()

    def test_a_source_is_copied_once_it_is_computed(self):
        """A copy on another stream starts behind what the current one has been given."""
        source, buffer = torch.zeros(SIZE, device="cuda"), filled(-1)
        hold_up(torch.cuda.current_stream())
        source.add_(5)
        assert buffer.copy_from_device(source, torch.cuda.Stream()).result().eq(5).all()

    @pytest.mark.parametrize("keeps_buffer", [True, False])
    def test_a_source_can_be_let_go_at_once(self, keeps_buffer):
        """Its memory is nobody else's until the copy is done, also if the buffer is let go."""
        source, buffer, stream = torch.full((SIZE,), 5.0, device="cuda"), filled(-1), torch.cuda.Stream()
        tensor = buffer.tensor
        hold_up(stream)
        buffer.copy_from_device(source, stream)
        del source
        if not keeps_buffer:
            del buffer
        for _ in range(4):
            torch.full((SIZE,), 9.0, device="cuda")
        stream.synchronize()
        assert tensor.eq(5).all()

    def test_a_result_can_be_let_go_at_once(self):
        """Its memory, which is the copy stream's, is not reused there while the current stream reads it."""
        buffer, stream = filled(5), torch.cuda.Stream()
        result = buffer.to_device("cuda", stream)
        hold_up(torch.cuda.current_stream())
        twice = result * 2
        del result
        with torch.cuda.stream(stream):
            for _ in range(4):
                torch.full((SIZE,), 9.0, device="cuda")
        assert twice.eq(10).all()

    def test_copies_of_one_buffer_follow_each_other(self):
        """In from one stream and out on another: the second waits for the first on the GPU, not on the host."""
        source, buffer = torch.full((SIZE,), 5.0, device="cuda"), filled(-1)
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        hold_up(first)
        buffer.copy_from_device(source, first)
        result = buffer.to_device("cuda", second)
        assert not buffer.ready()
        assert result.eq(5).all()


class TestPool:
    """Nothing is handed out while it is being copied."""

    def test_a_buffer_in_flight_is_not_handed_out(self):
        """It counts as copying; once its copy is done it is handed out."""
        pool = PinnedPool(SIZE, torch.float32, max_buffers=1, when_exhausted="raise")
        with pool.acquire() as buffer:
            buffer.fill_from(torch.full((SIZE,), 5.0))
            done = hold_up(torch.cuda.current_stream())
            result = buffer.to_device("cuda")
        with pytest.raises(PoolExhaustedError, match="0 in use, 1 released"):
            pool.acquire()
        assert pool.statistics()[:3] == (1, 0, 1)
        done.synchronize()
        result.sum().item()
        with pool.acquire() as buffer:
            buffer.tensor.fill_(-1)
        assert result.eq(5).all()

    def test_acquire_waits_for_a_copy(self):
        """With "block" it returns as soon as the copy is done, while what is behind the copy still runs."""
        pool = PinnedPool(SIZE, torch.float32, max_buffers=1, timeout_s=20)
        with pool.acquire() as buffer:
            buffer.fill_from(torch.full((SIZE,), 5.0))
            hold_up(torch.cuda.current_stream())
            result = buffer.to_device("cuda")
        behind = hold_up(torch.cuda.current_stream(), VERY_SLOW_CYCLES)
        with pool.acquire() as buffer:
            assert not behind.query()
            buffer.tensor.fill_(-1)
        assert result.eq(5).all()
        assert pool.statistics().waited == 1

    def test_acquire_waits_no_longer_than_it_may(self):
        """A copy that takes too long is a TimeoutError."""
        pool = PinnedPool(SIZE, torch.float32, max_buffers=1, timeout_s=0.01)
        with pool.acquire() as buffer:
            hold_up(torch.cuda.current_stream())
            buffer.to_device("cuda")
        with pytest.raises(TimeoutError, match="1 released but still copying"):
            pool.acquire()

    def test_a_free_buffer_is_preferred_to_waiting(self):
        """One whose copy is done is handed out before an older one whose copy is not."""
        pool = PinnedPool(SIZE, torch.float32, max_buffers=2, when_exhausted="raise")
        slow, quick = pool.acquire(), pool.acquire()
        address = quick.tensor.data_ptr()
        hold_up(torch.cuda.current_stream())
        slow.to_device("cuda")
        slow.release()
        quick.release()
        assert pool.acquire().tensor.data_ptr() == address

    def test_a_thousand_rounds_with_poisoned_buffers(self):
        """Poison written at once into whatever is handed out is never seen on the GPU, whichever stream copies."""
        pool = PinnedPool(4096, torch.float32, max_buffers=3, timeout_s=20)
        streams = [None, *(torch.cuda.Stream() for _ in range(3))]
        results = []
        for number in range(1000):
            stream = streams[number % len(streams)]
            hold_up(stream or torch.cuda.current_stream(), BRIEF_CYCLES)
            with pool.acquire() as buffer:
                buffer.tensor.fill_(-1)
                buffer.fill_from(torch.full((4096,), float(number)))
                results.append(buffer.to_device("cuda", stream))
        expected = torch.arange(1000.0, device="cuda")[:, None]
        assert torch.stack(results).eq(expected).all()
        assert pool.statistics()[3] <= 3

    def test_a_thousand_rounds_back(self):
        """What comes back is what was sent, though every buffer had something else in it."""
        pool = PinnedPool(4096, torch.float32, max_buffers=3, timeout_s=20)
        streams = [None, torch.cuda.Stream(), torch.cuda.Stream()]
        source = torch.zeros(4096, device="cuda")
        waiting = []
        for number in range(1000):
            buffer = pool.acquire()
            buffer.tensor.fill_(-1)
            source.fill_(number)
            waiting.append((number, buffer.copy_from_device(source.clone(), streams[number % 3])))
            if len(waiting) == 3:
                first, buffer = waiting.pop(0)
                assert buffer.result().eq(first).all()
                buffer.release()

    def test_trim_and_close_give_memory_back(self):
        """Trim leaves what is being copied, close takes it too; both may wait for the GPU, as the driver does."""
        pool = PinnedPool(SIZE, torch.float32, max_buffers=2, step=2)
        with pool.acquire() as buffer:
            hold_up(torch.cuda.current_stream())
            result = buffer.fill_from(torch.full((SIZE,), 5.0)).to_device("cuda")
        assert pool.trim() == 4 * SIZE
        assert pool.statistics()[:2] == (1, 0)
        pool.close()
        assert pool.statistics()[:3] == (0, 0, 0)
        assert result.eq(5).all()


class TestErrors:
    """Said before anything is copied."""

    @pytest.mark.parametrize(
        ("use", "error", "message"),
        [
            (lambda b: b.to_device("cpu"), ValueError, "`device` is cpu: expected a CUDA device"),
            (lambda b: b.to_device("cuda:99"), ValueError, "`device` is cuda:99"),
            (lambda b: b.to_device("cuda", out=torch.ones(4, 4)), ValueError, "`out` is on cpu"),
            (lambda b: b.to_device("cuda", out=torch.ones(8, 4, device="cuda")[::2]), ValueError, "strides"),
            (lambda b: b.to_device("cuda", 0), TypeError, "`stream` is of type `int`"),
            (lambda b: b.copy_from_device(torch.ones(4, 4)), ValueError, "on cpu.*`fill_from`"),
            (lambda b: b.copy_from_device(torch.ones(4, 8, device="cuda")[:, ::2]), ValueError, "strides"),
            (lambda b: b.fill_from(torch.ones(4, 4, device="cuda")), ValueError, "`copy_from_device`"),
        ],
    )
    def test_what_is_refused(self, use, error, message):
        """Wrong device, layout or stream, and the contents stay."""
        buffer = PinnedBuffer((4, 4), torch.float32).fill_from(torch.full((4, 4), 7.0))
        with pytest.raises(error, match=message):
            use(buffer)
        assert buffer.result().eq(7).all()

    def test_a_copy_during_a_capture_is_refused_and_the_capture_goes_on(self):
        """The graph that is being captured can be replayed afterwards."""
        buffer, x = filled(5), torch.zeros(8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
            with pytest.raises(RuntimeError, match="captured into a CUDA graph"):
                buffer.to_device("cuda")
        graph.replay()
        assert x.eq(1).all()
        assert buffer.to_device("cuda").eq(5).all()

    def test_a_child_after_a_fork_is_not_aborted(self, run_program):
        """It may let go of what it inherited, and exits as it wants."""
        assert run_program(FORKED) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
class TestTwoDevices:
    """Each copy is on the device that it goes to or comes from."""

    def test_one_buffer_goes_to_both(self):
        """Whichever device is the current one; it stays that."""
        buffer = filled(5)
        for index in (0, 1, 0):
            hold_up(torch.cuda.current_stream(index))
            assert buffer.to_device(f"cuda:{index}").eq(5).all()
            assert buffer.to_device(f"cuda:{index}", torch.cuda.Stream(index)).eq(5).all()
        assert torch.cuda.current_device() == 0

    def test_from_one_to_the_other(self):
        """Through the buffer, without the host waiting."""
        source, buffer = torch.full((SIZE,), 5.0, device="cuda:1"), filled(-1)
        hold_up(torch.cuda.current_stream(1))
        result = buffer.copy_from_device(source).to_device("cuda:0")
        assert not buffer.ready()
        assert result.eq(5).all()

    def test_a_stream_of_the_other_device_is_refused(self):
        """With both devices named."""
        with pytest.raises(ValueError, match="`stream` belongs to cuda:1, the copy to cuda:0"):
            filled(5).to_device("cuda:0", torch.cuda.Stream(1))

    @pytest.mark.parametrize("index", [0, 1])
    def test_the_unused_device_gets_no_context(self, run_program, index):
        """Pinning and copying leave it alone."""
        assert run_program(ONE_DEVICE.format(index=index)) == [[int(number == index) for number in range(2)], 8.0, 8.0]
