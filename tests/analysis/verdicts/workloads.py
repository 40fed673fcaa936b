"""
Simulated programs whose bottleneck is known by construction, and what is to be said of each.

A workload lets a `Machine` run its requests; names of stages are only there for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from gpuscope._data.batch import RowFlag

from .simulate import Machine

REQUESTS = 40
Request = Callable[[Machine], None]


class Workload(NamedTuple):
    """A program, the verdict on its requests, and those on its stages; and what asking the GPU changes in these."""

    run: Callable[[Machine], None]
    request: str
    stages: dict[str, str]
    asked: Mapping[str, str] = MappingProxyType({})

    def expected(self, *, asked: bool) -> dict[str, str]:
        """Return the verdicts, by name of the stage."""
        return {"request": self.request, **self.stages, **(self.asked if asked else {})}


def each(request: Request, between: Callable[[Machine], None] = lambda _: None) -> Callable[[Machine], None]:
    """Return the program that runs requests of one kind, one after the other."""

    def run(machine: Machine) -> None:
        for _ in range(REQUESTS):
            with machine.stage("request"):
                request(machine)
            between(machine)

    return run


def fetch(machine: Machine) -> None:
    """Wait for the result and copy it: a few bytes."""
    with machine.stage("fetch"):
        machine.blocking_copy(3)


def infer(machine: Machine, kernels: int, duration: float, cost: float = 6) -> None:
    """Launch kernels in a stage."""
    with machine.stage("infer"):
        for _ in range(kernels):
            machine.launch(duration, cost=cost)


def tiny_kernels(machine: Machine) -> None:
    """Launching takes longer than computing."""
    infer(machine, 500, 2, cost=9)
    fetch(machine)


def large_gemm(machine: Machine) -> None:
    """One kernel of 5 ms."""
    infer(machine, 1, 5000)
    fetch(machine)


def gemm_and_wait_in_one_stage(machine: Machine) -> None:
    """The records are those of a stage that works on the host."""
    with machine.stage("infer"):
        machine.launch(5000)
        machine.wait()


def pageable_copy(machine: Machine) -> None:
    """A large batch from pageable memory: the host waits for the copy."""
    with machine.stage("h2d", bytes=18_000_000):
        machine.blocking_copy(3000)
    infer(machine, 1, 1500)
    fetch(machine)


def pinned_copy(machine: Machine) -> None:
    """The same from pinned memory, faster and without a wait."""
    with machine.stage("h2d", bytes=18_000_000):
        machine.launch(400)
    infer(machine, 1, 1500)
    fetch(machine)


def item_in_a_loop(machine: Machine, kernel: float = 50) -> None:
    """Twenty steps that each launch three kernels, wait for one number, and think about it."""
    for _ in range(20):
        with machine.stage("step"):
            for _ in range(3):
                machine.launch(kernel)
        with machine.stage("item"):
            machine.wait()
        machine.work(90)


def work_before_the_launch(machine: Machine) -> None:
    """
    A stage that first works and then launches has a GPU interval like one that launches all along.

    The host's work differs from call to call, and the GPU's interval with it.
    """
    with machine.stage("infer"):
        machine.work(1300 + 100 * (len(machine.roots) % 5))
        machine.launch(1000)
    fetch(machine)


def item_in_a_loop_in_one_stage(machine: Machine) -> None:
    """Twenty waits of which no record tells."""
    with machine.stage("generate"):
        for _ in range(20):
            machine.work(90)
            machine.launch(150)
            machine.wait()


def heavy_preprocess(machine: Machine) -> None:
    """Decoding on the host takes most of the time."""
    with machine.stage("prep"):
        machine.work(20_000)
    infer(machine, 50, 60)
    fetch(machine)


def gpu_work_for_one_consumer(machine: Machine) -> None:
    """The GPU's part of a loop."""
    infer(machine, 30, 100)
    fetch(machine)


def two_streams(machine: Machine) -> None:
    """Two towers at a time: their GPU intervals add up to twice the time that passes."""
    for stream, name in ((1, "left"), (2, "right")):
        with machine.stage(name, stream=stream):
            machine.launch(3000, stream=stream)
    machine.let_wait(0, 1)
    machine.let_wait(0, 2)
    fetch(machine)


def graph_replay(machine: Machine) -> None:
    """Hundreds of kernels by one launch."""
    infer(machine, 1, 2000, cost=15)
    fetch(machine)


def staged_replay(machine: Machine) -> None:
    """A graph with stages inside, and a third of it in none."""
    with machine.stage("decode"):
        machine.replay(("attention", 800), (None, 700), ("mlp", (("up", 300), (None, 100), ("down", 300))))
    fetch(machine)


def replays_with_work_between(machine: Machine) -> None:
    """The host thinks before each of many short replays."""
    with machine.stage("generate"):
        for _ in range(20):
            machine.work(300)
            machine.replay(("attention", 40), (None, 20), ("mlp", 40))
    fetch(machine)


def compiled_model(machine: Machine) -> None:
    """Few fused kernels, after the guards."""
    with machine.stage("infer"):
        machine.work(60)
        for _ in range(30):
            machine.launch(90)
    fetch(machine)


def small_tensors(machine: Machine) -> None:
    """Tensors made on the host for each call, and copied one by one."""
    with machine.stage("make tensors"):
        for _ in range(60):
            machine.work(8)
            machine.blocking_copy(2)
    infer(machine, 20, 8)
    fetch(machine)


def large_result(machine: Machine, **attributes: int) -> None:
    """A result of 24 MB by `.cpu()`, into pageable memory."""
    infer(machine, 1, 400)
    with machine.stage("d2h", **attributes):
        machine.blocking_copy(4000)


def large_result_of_known_size(machine: Machine) -> None:
    """The same, and the stage says how many bytes it moves."""
    large_result(machine, bytes=24_000_000)


def taking_turns(machine: Machine) -> None:
    """As much host work as GPU work, one after the other."""
    with machine.stage("prep"):
        machine.work(3000)
    infer(machine, 30, 100)
    fetch(machine)


def host_only(machine: Machine) -> None:
    """A program on a machine without a GPU."""
    machine.has_gpu = False
    with machine.stage("prep"):
        machine.work(3000)
    with machine.stage("compute"):
        machine.work(9000)


def overlapped(machine: Machine) -> None:
    """Prepares while the GPU works on the request before, and waits for that one: never for its own."""
    with machine.stage("prep"):
        machine.work(2000)
    before = machine.busy_until.get(0, 0.0)
    infer(machine, 30, 100)
    with machine.stage("collect"):
        machine.now = max(machine.now, before)


def captured(machine: Machine) -> None:
    """Each request captures a graph, of which nothing is known."""
    with machine.stage("capture", flags=RowFlag.CAPTURED, timed=False):
        machine.work(2000)
    infer(machine, 1, 1000)
    fetch(machine)


def slowly_consumed(machine: Machine) -> None:
    """The program writes results before the next request, and the GPU has nothing to do."""
    each(gpu_work_for_one_consumer, between=lambda each_machine: each_machine.work(10_000))(machine)


def seldom_asked(machine: Machine) -> None:
    """Clients send requests when they like."""
    waits = iter([100, 30_000, 2000, 9000, 400, 60_000, 15_000, 700] * REQUESTS)
    each(gpu_work_for_one_consumer, between=lambda each_machine: each_machine.work(next(waits)))(machine)


def staged_blocks(machine: Machine) -> None:
    """A large model at a large batch, in 24 stages: launching takes a quarter of what the GPU takes."""
    with machine.stage("model"):
        for _ in range(24):
            with machine.stage("block"):
                for _ in range(10):
                    machine.launch(180, cost=45)
    fetch(machine)


def one_large_model(machine: Machine) -> None:
    """The same in one stage."""
    infer(machine, 240, 180, cost=45)
    fetch(machine)


def large_model_for_one(machine: Machine) -> None:
    """The same for a batch of one: launching takes as long, and kernels a twelfth."""
    infer(machine, 240, 15, cost=45)
    fetch(machine)


def launches_nearly_as_slow(machine: Machine) -> None:
    """Launching takes nine tenths of the GPU's time, which has work all along."""
    infer(machine, 200, 100, cost=90)
    fetch(machine)


def launches_slower(machine: Machine) -> None:
    """Launching takes four times as long as the work; the last kernels are long."""
    infer(machine, 200, 25, cost=100)
    with machine.stage("head"):
        machine.launch(900)
    fetch(machine)


def synchronised_streams(machine: Machine) -> None:
    """Two streams that the host waits for itself, and nothing on the request's own."""
    for stream, name in ((1, "left"), (2, "right")):
        with machine.stage(name, stream=stream):
            machine.launch(3000, stream=stream)
    with machine.stage("synchronize"):
        machine.wait(stream=1)
        machine.wait(stream=2)


GPU, CPU, PIPELINE, UNKNOWN = "gpu-bound", "cpu-bound", "pipeline-bound", "unknown"
WORKLOADS = {
    "tiny kernels": Workload(each(tiny_kernels), CPU, {"infer": CPU, "fetch": UNKNOWN}),
    "large gemm": Workload(each(large_gemm), GPU, {"infer": GPU, "fetch": GPU}),
    "large gemm, nobody waits": Workload(each(lambda machine: infer(machine, 1, 5000)), GPU, {"infer": GPU}),
    "large gemm, wait inside": Workload(
        each(gemm_and_wait_in_one_stage), UNKNOWN, {"infer": UNKNOWN}, {"request": GPU, "infer": GPU}
    ),
    "pageable copy": Workload(each(pageable_copy), PIPELINE, {"h2d": PIPELINE, "infer": GPU, "fetch": GPU}),
    "pinned copy": Workload(each(pinned_copy), GPU, {"h2d": GPU, "infer": GPU, "fetch": GPU}),
    "item in a loop": Workload(each(item_in_a_loop), PIPELINE, {"step": GPU, "item": GPU}),
    "item in a loop, large kernels": Workload(
        each(lambda machine: item_in_a_loop(machine, 1000)), GPU, {"step": GPU, "item": GPU}
    ),
    "item in a loop, one stage": Workload(
        each(item_in_a_loop_in_one_stage),
        UNKNOWN,
        {"generate": UNKNOWN},  # Answers do not say either whether the host waits inside.
    ),
    "work before the launch": Workload(each(work_before_the_launch), PIPELINE, {"infer": CPU, "fetch": GPU}),
    "heavy preprocess": Workload(each(heavy_preprocess), CPU, {"prep": CPU, "infer": GPU, "fetch": GPU}),
    "large model in stages": Workload(each(staged_blocks), GPU, {"model": GPU, "block": GPU, "fetch": GPU}),
    "large model": Workload(each(one_large_model), GPU, {"infer": GPU, "fetch": GPU}),
    "large model, batch of one": Workload(each(large_model_for_one), CPU, {"infer": CPU}),
    "launches nearly as slow": Workload(
        each(launches_nearly_as_slow), UNKNOWN, {"infer": UNKNOWN, "fetch": GPU}, {"request": GPU, "infer": GPU}
    ),
    "launches slower": Workload(each(launches_slower), CPU, {"infer": CPU, "head": GPU, "fetch": GPU}),
    "two streams, host waits": Workload(
        each(synchronised_streams), GPU, {"left": GPU, "right": GPU, "synchronize": GPU}
    ),
    "slow consumer": Workload(slowly_consumed, PIPELINE, {"infer": GPU, "fetch": GPU}),
    "few requests": Workload(seldom_asked, GPU, {"infer": GPU, "fetch": GPU}),
    "two streams": Workload(each(two_streams), GPU, {"left": GPU, "right": GPU, "fetch": GPU}),
    "graph replay": Workload(each(graph_replay), GPU, {"infer": GPU, "fetch": GPU}),
    "graph with stages": Workload(
        each(staged_replay),
        GPU,
        {"decode": GPU, "attention": GPU, "mlp": GPU, "up": GPU, "down": GPU, "fetch": GPU},
    ),
    "replays with work between": Workload(
        each(replays_with_work_between), CPU, {"generate": CPU, "attention": GPU, "mlp": GPU, "fetch": GPU}
    ),
    "compiled model": Workload(each(compiled_model), GPU, {"infer": GPU, "fetch": GPU}),
    "small tensors": Workload(each(small_tensors), CPU, {"make tensors": CPU}),
    "large result": Workload(each(large_result), UNKNOWN, {"infer": GPU, "d2h": UNKNOWN}, {"request": GPU, "d2h": GPU}),
    "large result, known size": Workload(each(large_result_of_known_size), PIPELINE, {"infer": GPU, "d2h": PIPELINE}),
    "taking turns": Workload(each(taking_turns), PIPELINE, {"prep": CPU, "infer": GPU, "fetch": GPU}),
    "host only": Workload(each(host_only), UNKNOWN, {"prep": UNKNOWN, "compute": UNKNOWN}),
    "overlapped": Workload(each(overlapped), GPU, {"prep": GPU, "infer": GPU}),
    "captured": Workload(each(captured), UNKNOWN, {"capture": UNKNOWN, "infer": GPU, "fetch": GPU}),
}
