"""
`warm_up` and `measure`: run something before it counts, and compare two ways to do it quickly.

For the workbench: unlike a stage, both wait for the GPU, once, at their end. They use public events of PyTorch only.
"""

from __future__ import annotations

import functools
import operator
import sys
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gpuscope._data.plain.values import shown
from gpuscope._data.record import Site
from gpuscope._recording.hot_path import end, start
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    class Event(Protocol):
        """A `torch.cuda.Event`, as far as it is used here."""

        def record(self) -> object:
            """Record it on the current stream."""

        def elapsed_time(self, end: Event) -> float:
            """Return the milliseconds from this event to another."""


_WARM_UP = Site("warm-up", {})
_WARM_UP.warms_up = True


class Spread(NamedTuple):
    """Quartiles of a duration, in milliseconds."""

    p25: float
    median: float
    p75: float


class Measurement(NamedTuple):
    """What one function took, call by call."""

    name: str
    iterations: int
    host_ms: Spread
    """From the call to its return."""
    gpu_ms: Spread | None
    """Between two CUDA events around the call, including the GPU's waiting for the host; None without a GPU."""


class Measurements(tuple[Measurement, ...]):
    """The measurements, in the order of the functions. Print them for a table."""

    __slots__ = ()

    def __str__(self) -> str:
        titles, rows = self._table()
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        lines = []
        for first, *others in (titles, *rows):
            cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from gpuscope._data.plain.markup import html_table

        return html_table(*self._table())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return titles and rows."""
        on_gpu = self[0].gpu_ms is not None
        titles = ["function", "calls", "host", "p25 to p75", *(["stream", "p25 to p75"] if on_gpu else []), "ratio"]
        first = (self[0].gpu_ms or self[0].host_ms).median
        rows = []
        for each in self:
            spreads = [_cells(spread) for spread in (each.host_ms, each.gpu_ms) if spread]
            ratio = (each.gpu_ms or each.host_ms).median / first if first else float("nan")
            rows.append(
                [each.name, f"{each.iterations:,}", *(cell for cells in spreads for cell in cells), f"{ratio:.2f}"]
            )
        return titles, rows


def _cells(spread: Spread) -> tuple[str, str]:
    from gpuscope._data.plain.durations import duration  # Here, because hardly any program prints one.

    return duration(spread.median), f"{duration(spread.p25)} to {duration(spread.p75)}"


def warm_up(function: Callable[..., object], /, *args: object, iterations: int = 20, **kwargs: object) -> None:
    """
    Call a function before it counts, so that allocations, autotuning, compilation and captures of graphs are done.

    All stages inside are flagged as warm-up and stand under a stage named `warm-up`. Waits for the GPU at the end. What
    the function raises passes through.

    Args:
        function: what to call; its result is dropped.
        args: arguments of the function.
        iterations: how often to call it.
        kwargs: keyword arguments of the function.

    Raises:
        TypeError: if the function can't be called.
        ValueError: for fewer than one iteration.

    """
    _check([function], iterations=iterations)
    recorder = state.recorder
    record = start(recorder, _WARM_UP, None, 0) if recorder is not None else None
    error: BaseException | None = None
    try:
        for _ in range(iterations):
            function(*args, **kwargs)
        _wait_for_gpu()
    except BaseException as raised:  # Goes on, after the stage has noted it.
        error = raised
        raise
    finally:
        if record is not None:
            end(record, error)


def measure(*functions: Callable[[], object], iterations: int = 100, warmup: int = 10) -> Measurements:
    """
    Time functions beside each other, on the host and on the GPU: the quick A/B.

    They run interleaved, in a new random order each round, so that a busy moment of the machine hits all alike. Every
    call stands between two CUDA events of its own, and `measure` waits for the GPU once, after the last call. Stages
    inside are flagged as warm-up. For what a change does to a whole request, compare recordings: `gpuscope compare`.

    Args:
        functions: called without arguments; use `functools.partial` or a lambda to give some.
        iterations: how many calls of each function count.
        warmup: how many calls of each come before those.

    Returns:
        Medians and quartiles in milliseconds, one `Measurement` per function. Print them for a table.

    Raises:
        TypeError: without a function, or for one that can't be called.
        ValueError: for fewer than one iteration, or a negative `warmup`.

    """
    _check(functions, iterations=iterations, warmup=warmup)
    torch = _torch_on_gpu()
    calls = [_Calls(function, torch, iterations) for function in functions]

    import random  # Here, because it would be a tenth of what `import gpuscope` costs.

    def rounds() -> None:
        order, shuffler = list(calls), random.Random(0)  # noqa: S311 - an order, not a secret
        for number in range(-warmup, iterations):
            shuffler.shuffle(order)
            for each in order:
                each.run(number)

    warm_up(rounds, iterations=1)
    return Measurements(each.result() for each in calls)


class _Calls:
    """The calls of one function."""

    def __init__(self, function: Callable[[], object], torch: ModuleType | None, iterations: int) -> None:
        self._function = function
        self._host_ns = [0] * iterations
        # Made and recorded before they count, because an event is created when it is first recorded.
        self._events = [_pair(torch) for _ in range(iterations)] if torch is not None else []
        self._spare = _pair(torch) if torch is not None else None

    def run(self, number: int) -> None:
        """Call the function; a negative number does not count."""
        events = self._events[number] if self._events and number >= 0 else self._spare
        start_ns = time.perf_counter_ns()
        if events is not None:
            events[0].record()
        self._function()
        if events is not None:
            events[1].record()
        if number >= 0:
            self._host_ns[number] = time.perf_counter_ns() - start_ns

    def result(self) -> Measurement:
        """Return what they took. By now the GPU has done them all."""
        return Measurement(
            name=_name_of(self._function),
            iterations=len(self._host_ns),
            host_ms=_spread([ns / 1e6 for ns in self._host_ns]),
            gpu_ms=_spread([first.elapsed_time(last) for first, last in self._events]) if self._events else None,
        )


def _pair(torch: ModuleType) -> tuple[Event, Event]:
    pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for event in pair:
        event.record()
    return pair


def _spread(durations_ms: list[float]) -> Spread:
    import numpy as np

    return Spread(*np.percentile(durations_ms, (25, 50, 75)).tolist())


def _name_of(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__).rpartition("<locals>.")[2]


def _torch_on_gpu() -> ModuleType | None:
    # A program whose functions use a GPU has imported PyTorch; whether it has used the GPU yet does not matter here.
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def _wait_for_gpu() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _check(functions: Sequence[object], *, iterations: int, warmup: int = 0) -> None:
    if not functions:
        raise TypeError("`measure` needs a function: `measure(old, new)`.")
    for function in functions:
        if not callable(function):
            raise TypeError(f"{shown(function)} can't be called; give the function itself, not what it returns.")
    check_count("iterations", iterations, 1)
    check_count("warmup", warmup, 0)


def check_count(name: str, count: object, least: int) -> None:
    """
    Refuse what is not a number of calls.

    Raises:
        TypeError: for another type.
        ValueError: for too few.

    """
    if not hasattr(count, "__index__") or isinstance(count, bool):
        raise TypeError(f"`{name}` is of type `{type(count).__name__}`: expected a whole number.")
    if operator.index(count) < least:
        raise ValueError(f"`{name}` is {count}: expected {least} or more.")
