"""`overlap` on a GPU against the plain loop: any memory of `infer`, any holder of results, failures at every phase."""

from __future__ import annotations

import dataclasses
import random
import types

import pytest
import torch

import gpuscope

KB = 256
"""Floats in a kilobyte."""
SIZES = (3, 4 * KB, 1024 * KB, 8 * 1024 * KB)
SLEEP = 2_000_000
"""Cycles of about a millisecond, so that the host runs ahead."""


@dataclasses.dataclass
class Detections:
    """A result that PyTorch's trees do not know."""

    boxes: torch.Tensor


class Models:
    """Functions with memory of their own on the GPU; each object is one program."""

    def __init__(self, size):
        self.size = size
        self.out = torch.zeros(size, device="cuda")
        self.state = torch.zeros(size, device="cuda")
        self.previous = torch.zeros(size, device="cuda")
        self.weight = torch.eye(8, device="cuda") * 3
        self.host = torch.zeros(size).pin_memory()
        self.side = torch.cuda.Stream()
        self.graph = None

    def intermediates(self, x):
        """Memory in between is used again by the allocator."""
        y = ((x * 2) + 1) * 3
        torch.cuda._sleep(SLEEP)
        return y

    def static(self, x):
        """The same memory each time."""
        torch.mul(x, 10, out=self.out)
        return self.out

    def views_of_static(self, x):
        """Views of the same memory."""
        torch.mul(x, 10, out=self.out)
        return [self.out[1:], {"first": self.out[:1], "expanded": self.out[:1].expand(5)}]

    def users_graph(self, x):
        """A CUDA graph of the program's own."""
        if self.graph is None:
            self.static_in = torch.zeros(self.size, device="cuda")
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static_out = self.static_in * 2
        self.static_in.copy_(x)
        self.graph.replay()
        return self.static_out

    def pinned_output(self, x):
        """Its own pinned memory on the host."""
        torch.cuda._sleep(SLEEP)
        self.host.copy_(x + 1, non_blocking=True)
        return self.host

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

    def state_beside(self, x):
        """State beside what is returned."""
        self.state = self.state * 0.5 + x
        return self.state + 1

    def difference(self, x):
        """From the input before, which it keeps."""
        y, self.previous = x - self.previous, x
        return y

    def lazy(self, x):
        """Lazily conjugated and negated."""
        z = torch.complex(torch.sin(x) * 2, -x)
        return {"conj": z.conj(), "neg": z.conj().imag, "plain": z}

    def matrix(self, x):
        """A product of matrices."""
        return x[: x.numel() // 8 * 8].view(-1, 8) @ self.weight if x.numel() > 8 else x

    def random(self, x):
        """From the generator of the device."""
        return x + torch.rand_like(x)

    def other_stream(self, x):
        """Memory of a stream of its own, freed when the caller lets go of it."""
        side, current = self.side, torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            y = x * 2
            torch.full_like(x, float("nan"))
        current.wait_stream(side)
        return y


NAMES = [name for name in vars(Models) if not name.startswith("_")]
GRAPHED = {
    "intermediates": "on",
    "static": "on",
    "views_of_static": "on",
    "in_place": "on",
    "view_of_input": "on",
    "state_in_place": "on",
    "lazy": "on",
    "matrix": "on",
    "random": "on",
    "state_anew": "keeps tensors",
    "state_beside": "keeps tensors",
    "difference": "keeps tensors",
    "pinned_output": "a tensor on cpu",
}
"""What the report says of `graph=True`."""


def on_host(outputs):
    """Copies of outputs on the host."""
    return [leaf.cpu().clone() for leaf in torch.utils._pytree.tree_leaves(outputs)]


def once_done(outputs):
    """The same once the GPU is done, because copies that `infer` enqueued may be among them."""
    torch.cuda.synchronize()
    return on_host(outputs)


def plain(infer, batches):
    """The plain loop; each batch is a copy, because `infer` may work in place."""
    torch.manual_seed(0)
    return [once_done(infer(batch.clone().to("cuda"))) for batch in batches]


def same(left, right):
    """Whether lists of outputs are equal, bit for bit, and lie in memory alike."""
    return len(left) == len(right) and all(
        torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype for a, b in zip(left, right, strict=True)
    )


def wrong(results, expected):
    """The numbers of the batches that differ."""
    assert len(results) == len(expected)
    return [i for i, (a, b) in enumerate(zip(results, expected, strict=True)) if not same(a, b)]


def batches_of(count, size, where):
    """Batches that tell which they are, in ordinary, pinned or GPU memory."""
    batches = [torch.arange(size, dtype=torch.float32).remainder_(97) + i for i in range(count)]
    if where == "pinned":
        return [batch.pin_memory() for batch in batches]
    return [batch.cuda() for batch in batches] if where == "cuda" else batches


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_any_memory_of_infer(name, graph):
    """At random sizes, depths, workers and places of batches, every result is the plain loop's, bit for bit."""
    chance = random.Random(f"{name} {graph}")
    for _ in range(8):
        size, where = chance.choice(SIZES), chance.choice(["host", "pinned", "cuda"])
        depth, workers = chance.randint(1, 4), chance.choice([0, 0, 1, 2])
        count = 14 if size < SIZES[-1] else 10
        expected = plain(getattr(Models(size), name), batches_of(count, size, where))
        infer = getattr(Models(size), name)
        torch.manual_seed(0)
        with torch.inference_mode():
            loop = gpuscope.overlap(
                batches_of(count, size, where), infer, on_host, depth=depth, workers=workers, graph=graph
            )
            results = list(loop)
        assert wrong(results, expected) == [], (size, where, depth, workers)
        if graph and name in GRAPHED and where != "cuda":
            assert GRAPHED[name] in loop.report().graph


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("seed", range(6))
def test_failures_at_every_phase_cost_their_own_batch(graph, seed):
    """Before, in and after `infer`, and at outputs that can't be copied, with work of the failed batch under way."""
    chance, size, count = random.Random(seed), 1024 * KB, 24
    fails = {i: chance.choice(["prepare", "infer", "late", "output", "post"]) for i in range(count) if i % 3 == 2}

    def prepare(item):
        number, x = item
        if fails.get(number) == "prepare":
            raise ValueError(number)
        return {"x": x, "phase": fails.get(number, "") if graph else (number, fails.get(number, ""))}

    def infer(inputs):
        phase = inputs["phase"] if graph else inputs["phase"][1]
        x = inputs["x"]
        if phase == "infer":
            raise ValueError(phase)
        y = x + 1
        if phase:
            torch.cuda._sleep(10 * SLEEP)
            x.add_(1000)
        if phase == "late":
            raise ValueError(phase)
        return y.to_sparse() if phase == "output" else {"y": y, "phase": phase}

    def post(outputs):
        if outputs["phase"] == "post":
            raise ValueError("post")
        return float(outputs["y"].min()), float(outputs["y"].max())

    buffer, results = gpuscope.DoubleBuffer(infer, post, prepare=prepare, depth=chance.randint(1, 3), graph=graph), []

    def take():
        try:
            results.append(buffer.get())
        except (ValueError, TypeError):
            results.append(None)

    with buffer:
        for i in range(count):
            buffer.put((i, torch.full((size,), float(i))))
            while buffer.full or (buffer and chance.random() < 0.2):
                take()
        while buffer:
            take()
    assert results == [None if i in fails else (i + 1.0, i + 1.0) for i in range(count)]


HOLDERS = {
    "tensor": (lambda y: y, lambda r: r[0]),
    "dataclass": (Detections, lambda r: r.boxes[0]),
    "namespace": (lambda y: types.SimpleNamespace(b=y), lambda r: r.b[0]),
    "closure": (lambda y: lambda: y, lambda r: r()[0]),
    "memoryview": (lambda y: memoryview(y.numpy()), lambda r: r[0]),
    "long list": (lambda y: list(y.unbind()), lambda r: r[0]),
    "shared memory": (lambda y: y.share_memory_(), lambda r: r[0]),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("holder", HOLDERS)
def test_results_hold_whatever_holds_them(holder, workers):
    """A slot's memory is not used again while a result refers to it."""
    hold, read = HOLDERS[holder]
    batches = [torch.full((2000,), float(i)) for i in range(8)]
    results = list(gpuscope.overlap(batches, lambda x: x + 1, hold, workers=workers))
    assert [float(read(result)) for result in results] == [i + 1.0 for i in range(8)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_source_that_fills_one_pinned_buffer(depth):
    """It is asked for the next batch only when the one before has been read."""
    size, buffer = 8 * 1024 * KB, torch.zeros(8 * 1024 * KB).pin_memory()

    def source():
        for i in range(10):
            buffer.fill_(float(i))
            yield buffer

    def infer(x):
        torch.cuda._sleep(SLEEP)
        return torch.stack([x.min(), x.max()])

    assert buffer.numel() == size
    results = [result.tolist() for result in gpuscope.overlap(source(), infer, depth=depth)]
    assert results == [[float(i)] * 2 for i in range(10)]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_modes_may_change_between_batches(graph):
    """Autocast and inference mode are those of each `put`, also where a graph was captured in others."""
    weight = torch.randn(64, 64, device="cuda")
    batches = [torch.randn(8, 64) for _ in range(24)]

    def modes(i):
        return torch.autocast("cuda", torch.bfloat16, enabled=i // 6 % 2 == 1)

    def infer(x):
        return x @ weight

    expected, results = [], []
    for i, batch in enumerate(batches):
        with torch.no_grad(), modes(i):
            expected.append(infer(batch.cuda()).cpu())
    with gpuscope.DoubleBuffer(infer, graph=graph) as buffer:
        for i, batch in enumerate(batches):
            with torch.no_grad(), modes(i):
                buffer.put(batch)
            if buffer.full:
                results.append(buffer.get())
        while buffer:
            results.append(buffer.get())
        assert buffer.report().graph == ("on" if graph else "off")
    assert [result.dtype for result in results] == [each.dtype for each in expected]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_post_has_the_modes_device_and_stream_of_the_caller(workers):
    """In a worker, too."""
    side = torch.cuda.Stream()

    def post(y):
        return (
            torch.cuda.current_device(),
            torch.cuda.current_stream() == side,
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.is_inference_mode_enabled(),
        )

    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16), torch.cuda.stream(side):
        results = list(gpuscope.overlap([torch.ones(4)] * 4, lambda x: x, post, workers=workers))
    assert results == [(torch.cuda.current_device(), True, True, torch.bfloat16, True)] * 4


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_outputs_that_require_gradients_stay_in_their_graph(graph):
    """Gradients reach the weights, and are the plain loop's; a CUDA graph is refused, with the reason."""
    batches = [torch.randn(16, 16) for _ in range(8)]

    def gradient(results_of):
        weight = torch.ones(16, 16, device="cuda", requires_grad=True)
        results = results_of(lambda x: torch.relu(x @ weight))
        assert all(result.requires_grad and result.device.type == "cpu" for result in results)
        sum(result.sum() for result in results).backward()
        return weight.grad

    loop = None

    def overlapped(infer):
        nonlocal loop
        loop = gpuscope.overlap(batches, infer, graph=graph)
        return list(loop)

    expected = gradient(lambda infer: [infer(batch.cuda()).cpu() for batch in batches])
    torch.testing.assert_close(gradient(overlapped), expected)  # Sums over batches may come in another order.
    assert ("require gradients" in loop.report().graph) == graph


def test_a_capture_that_fails_in_the_middle_of_a_state_is_an_error_and_no_wrong_result():
    """What `infer` kept of the failed capture was never computed, so nothing can go on from it."""
    state = [torch.zeros(8, device="cuda")]

    def infer(x):
        state[0] = state[0] + x
        return state[0] * float(x[0].item())

    results = []
    with pytest.raises(RuntimeError, match="kept tensors of a call whose capture"):
        results.extend(gpuscope.overlap([torch.ones(8)] * 8, infer, graph=True))
    assert [float(result[0]) for result in results] == [1.0, 2.0, 3.0]


def test_a_capture_is_made_of_a_batch_that_counts_once():
    """`infer` is called once per batch until its graphs are there, and not after that."""
    calls = []

    def infer(x):
        calls.append(float(len(calls)))
        return x + 1

    list(gpuscope.overlap([torch.ones(8)] * 12, infer, depth=2, graph=True))
    assert len(calls) == 3 + 2


def test_channels_last_stays():
    """Inputs and outputs lie in memory as in the plain loop, because kernels depend on that."""
    batches = [torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last) for _ in range(6)]
    layer = torch.nn.Conv2d(3, 8, 3).cuda().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = [[layer(batch.cuda()).cpu()] for batch in batches]
        results = [[result] for result in gpuscope.overlap(batches, layer)]
    assert wrong(results, expected) == []


def test_compiled_functions_with_graph_trees():
    """Outputs of `torch.compile(mode="reduce-overhead")`, which its next call overwrites."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    size = 4 * 1024 * KB
    compiled = torch.compile(lambda x: torch.sin(x) * 2 + x, mode="reduce-overhead")
    batches = batches_of(14, size, "host")
    with torch.no_grad():
        expected = plain(lambda x: compiled(x).clone(), batches)
        results = list(gpuscope.overlap(batches, compiled, on_host, depth=3))
    torch._dynamo.reset()
    assert wrong(results, expected) == []


def test_outputs_on_another_gpu():
    """They are complete when they are read, though the other GPU works long after `infer` returned."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")

    def infer(x):
        y = x.to("cuda:1", non_blocking=True)
        with torch.cuda.device(1):
            torch.cuda._sleep(20 * SLEEP)
        return y + 1

    batches = [torch.full((1024 * KB,), float(i)) for i in range(8)]
    results = gpuscope.overlap(batches, infer, lambda y: (float(y.min()), float(y.max())), device="cuda:0")
    assert list(results) == [(i + 1.0, i + 1.0) for i in range(8)]


def test_without_copies_outputs_of_their_own_memory_are_right():
    """`copy_outputs=False`: an ordinary network, whose calls return new memory."""
    batches = batches_of(12, 1024 * KB, "host")
    expected = plain(Models(3).intermediates, batches)
    results = list(gpuscope.overlap(batches, Models(3).intermediates, on_host, depth=3, copy_outputs=False))
    assert wrong(results, expected) == []
