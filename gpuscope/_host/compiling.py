"""
Compilations as stages in the request that waits for one: `torch.compile`, its recompilations, graphs that are recorded.

PyTorch calls both functions here, on the thread that compiles, for the outermost of what it does and in no other case:
so nothing is paid while nothing is compiled. Never imports PyTorch, and never raises into a compilation.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from gpuscope._data.attributes import COMPILE_ID, COMPILE_KIND, COMPILE_SPAN
from gpuscope._data.plain.values import shown
from gpuscope._interrupts import is_the_programs
from gpuscope._log import WarnOnce, later
from gpuscope._recording.current_stage import find_current, running_stage
from gpuscope._recording.hot_path import end, start
from gpuscope._recording.state import site_of, state

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import StageRecord

MODULE = "torch._dynamo.callback"
_KINDS = {
    "DYNAMO": "compile",
    "LAZY_BACKWARD": "backward",
    "TRITON_AUTOTUNING": "autotuning",
    "CUDAGRAPH_RECORDING": "graph_recording",
}
_MOST_OPEN = 64


class Compilations:
    """One per process: PyTorch's list of callbacks is as well."""

    def __init__(self) -> None:
        self._open: dict[int, list[StageRecord]] = {}
        """Compilations that have not ended, by thread."""
        self._is_hooked = False
        self.is_on = 0
        """How many compilations are going on, as far as PyTorch tells."""
        self.before: Callable[[], None] | None = None
        self.after: Callable[[], None] | None = None
        """What else is called before the first and after the last of them."""
        self._handler: object = None
        self._warnings = WarnOnce(say=later)

    def follow(self) -> None:
        """Have PyTorch tell of compilations, now or when the program imports what compiles; once."""
        if not self._is_hooked:
            self._is_hooked = True
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self.forget)
            import wrapt

            wrapt.when_imported(MODULE)(lambda _: self.attach())

    def attach(self) -> None:
        """Be among the callbacks, also after `torch._dynamo.reset`, which takes all of them out."""
        if (module := sys.modules.get(MODULE)) is None:
            return
        try:
            handler = module.callback_handler
            if self.begin not in handler.start_callbacks:
                handler.register_start_callback(self.begin)
            if self.end not in handler.end_callbacks:
                handler.register_end_callback(self.end)
            if self._handler is not handler:
                self._handler, handler.clear = handler, self._stays_after(handler.clear)
        except Exception as error:  # Another version of PyTorch: stages go on, without compilations.
            if is_the_programs(error):
                raise
            self._warnings.warn("attach", "compilations are not recorded: %s.", shown(error))

    def _stays_after(self, clear: Callable[[], None]) -> Callable[[], None]:
        def clear_others() -> None:
            clear()
            self.attach()

        return clear_others

    def begin(self, told: Any = None) -> None:
        """Begin a stage for a compilation, inside the one that runs; without one nobody waits in a request of ours."""
        self.is_on += 1
        if self.before is not None:
            self._guarded(self.before)
        self._guarded(self._begin, told)

    def end(self, told: Any = None) -> None:  # noqa: ARG002 - PyTorch's signature; the one before 2.7 has none
        """End it."""
        self._guarded(self._end)
        self.is_on = max(0, self.is_on - 1)
        if self.after is not None and not self.is_on:
            self._guarded(self.after)

    def _begin(self, told: Any) -> None:
        recorder = state.recorder
        if recorder is None or running_stage(find_current()) is None or len(self._open) >= _MOST_OPEN:
            return
        # The first ones are what one wants to see, and so not warm-up. They are not nodes of a graph that is recorded.
        record = start(recorder, site_of(COMPILE_SPAN, 0, graph=False), None, 0)
        self._open.setdefault(threading.get_ident(), []).append(record)
        recorder.device.give_back(record)  # What the stream does meanwhile is not the compiler's.
        record.pair = record.timed_stream = None
        record.attributes = {COMPILE_KIND: kind_of(told), **_compile_id(told)}

    def _end(self) -> None:
        # The last of several that overlap calls this, which may be on another thread than the first.
        ident = threading.get_ident()
        ident = ident if ident in self._open else next(iter(self._open), 0)
        records = self._open.get(ident)
        if records:
            record = records.pop()
            if not records:
                del self._open[ident]
            end(record, None)

    def _guarded(self, action: Callable[..., None], *told: object) -> None:
        try:
            action(*told)
        except BaseException as error:  # The compilation goes on; what the program raises goes to the program.
            if is_the_programs(error):
                raise
            self._warnings.warn("compile", "a compilation is not recorded: %s.", shown(error))

    def forget(self) -> None:
        """Touch none of the parent's stages: this process is the child of a fork."""
        self._open, self.is_on = {}, 0


def kind_of(told: Any) -> str:
    """Return what is compiled, by what PyTorch tells; it tells nothing before 2.7."""
    kind = _KINDS.get(getattr(getattr(told, "callback_trigger", None), "name", "DYNAMO"), "compile")
    return "recompile" if kind == "compile" and _compiled_before(getattr(told, "compile_id", "")) else kind


def _compiled_before(compile_id: object) -> bool:
    """Tell whether a frame was compiled before: the id ends in `frame/times`, and perhaps `_restart`."""
    times = str(compile_id).rpartition("/")[2].partition("_")[0]
    return times.isdigit() and int(times) > 0


def _compile_id(told: Any) -> dict[str, object]:
    compile_id = getattr(told, "compile_id", None)
    return {} if compile_id is None else {COMPILE_ID: str(compile_id)}


compilations = Compilations()
