"""
A watch for hidden synchronisations: while it is on, methods of tensors are wrapped and PyTorch tells where it waits.

Of all that was tried only this sees every thread: a mode for dispatched operators (`TorchDispatchMode`) belongs to one
thread, and makes each operator there several times as expensive; here only the wrapped methods cost more. What the
program had is put back when the watch ends: methods, PyTorch's debug mode, and filters of warnings. Only tests touch
the last two: a program's warnings belong to it.

While `torch.compile` traces nothing is wrapped, and while a stream is captured nothing is noted. Where compiled code
breaks its graph at a method, Dynamo is told to leave what stands for that alone: it would compile it, in a request.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Protocol

from gpuscope._data.attributes import SYNC_BYTES, SYNC_COUNT, SYNCS
from gpuscope._data.plain.values import shown
from gpuscope._host.compiling import compilations
from gpuscope._host.sync_calls import COPIES, COUNTED, SCALARS, UNNAMED, WAIT, WAITS, WHOLE, Move, move_of, place
from gpuscope._host.sync_warnings import SyncWarnings
from gpuscope._interrupts import instead_of, is_the_programs
from gpuscope._log import WarnOnce, later
from gpuscope._recording import dynamo
from gpuscope._recording.current_stage import find_current, running_stage

if TYPE_CHECKING:
    from gpuscope._data.record import StageRecord

    class Taker(Protocol):
        """Wants to know what is found: `syncs.Syncs`."""

        listens: bool
        """Whether PyTorch is to warn of waits, too."""

        def take(self, found: tuple[Any, ...]) -> None:
            """Put one call down, on any thread."""


_MOST_OF_A_STAGE = 16
_EVAL_FRAME, _DYNAMO = "torch._C._dynamo.eval_frame", "torch._dynamo"


class _Thread(threading.local):
    inside: list[bool] | None = None
    """While a wrapped method runs: whether PyTorch told of a wait within."""


class _Method:
    """
    Stands for a method, or a function, and notes what its calls do.

    It is equal to what it stands for: subclasses of tensors find by that what they are asked to do.
    """

    def __init__(self, watch: SyncWatch, original: Any, name: str) -> None:
        functools.update_wrapper(self, original)
        self._watch, self._original, self._name = watch, original, name

    def __get__(self, instance: object, owner: type | None = None) -> object:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if dynamo.is_dynamo_compiling() or self._watch.thread.inside is not None or self._watch.is_quiet():
            return self._original(*args, **keywords)
        began_ns = time.perf_counter_ns()
        self._watch.thread.inside = waited = [False]
        try:
            result = self._original(*args, **keywords)
        finally:
            self._watch.thread.inside = None
        self._watch.look(self._name, args, keywords, result, time.perf_counter_ns() - began_ns, told=waited[0])
        return result

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._original == other)

    def __hash__(self) -> int:
        return hash(self._original)

    def __reduce__(self) -> Any:
        owner = getattr(self._original, "__objclass__", None)
        return self._original.__qualname__ if owner is None else (getattr, (owner, self._original.__name__))


def is_left_alone() -> bool:
    """
    Have Dynamo compile neither what stands for a method nor what that calls; return whether it does not.

    PyTorch from 2.7 on knows such a mark of code. By it nothing that is compiled is looked at anew.
    """
    if _DYNAMO not in sys.modules:
        return True
    dynamo_in_c: Any = sys.modules.get(_EVAL_FRAME)
    try:
        skip = dynamo_in_c._FrameAction.SKIP
        alone = dynamo_in_c._FrameExecStrategy(skip, skip)
        for each in vars(_Method).values():
            if isinstance(each, FunctionType):
                dynamo_in_c.set_code_exec_strategy(each.__code__, alone)
        dynamo_in_c.set_code_exec_strategy(SyncWarnings.match.__code__, alone)
    except Exception as error:  # Another version of PyTorch.
        return instead_of(error, False)
    return True


class SyncWatch:
    """
    What is wrapped, and who wants to know; one per process.

    Args:
        kind: the type of the devices that count as GPUs.

    """

    def __init__(self, kind: str = "cuda") -> None:
        self.thread = _Thread()
        self._kind = kind
        self._lock = threading.RLock()
        self._lists: tuple[Taker, ...] = ()
        self._wrapped: list[tuple[Any, str, object]] = []
        """Owner, name, and what the owner itself had under it; None where it inherits that."""
        self._heard = SyncWarnings(self._hear)
        self._warnings = WarnOnce(say=later)

    # ---- on and off

    def start(self, syncs: Taker) -> None:
        """Note what is found in this list, too."""
        with self._lock:
            compilations.follow()
            compilations.attach()
            compilations.before, compilations.after = self._unwrap, self._wrap
            listens, self._lists = self._listens(), (*self._lists, syncs)
            if "torch" in sys.modules:
                if self._listens() and not listens:
                    self._heard.begin()
                if not compilations.is_on:
                    self._wrap()

    def stop(self, syncs: Taker) -> None:
        """Note nothing more in it; the last one puts back what the program had."""
        with self._lock:
            before, self._lists = self._lists, tuple(each for each in self._lists if each is not syncs)
            if not self._listens():
                self._heard.end()
            if not self._lists and before:
                compilations.before = compilations.after = None
                self._unwrap()

    def forget(self) -> None:
        """Put all back, and listen no more: this process is the child of a fork."""
        self._lock, on, self._lists = threading.RLock(), self._lists, ()
        if on:
            compilations.before = compilations.after = None
            self._unwrap()
            self._heard.end()

    def _listens(self) -> bool:
        return any(each.listens for each in self._lists)

    def _wrap(self) -> None:
        with self._lock:
            torch: Any = sys.modules.get("torch")
            if self._wrapped or not self._lists or torch is None:
                return
            if not is_left_alone():
                self._warnings.warn(
                    "dynamo",
                    "synchronisations by methods of tensors are not found once `torch._dynamo` is imported: this "
                    "PyTorch would compile what stands for them. PyTorch 2.7 and newer can be told not to.",
                )
                return
            targets = [(torch.Tensor, name) for name in (*SCALARS, *WHOLE, *COPIES, *COUNTED)]
            targets += [(torch.cuda.Stream, WAITS), (torch.cuda.Event, WAITS), (torch.cuda, WAITS)]
            for owner, name in targets:
                if (original := getattr(owner, name, None)) is not None:
                    self._wrapped.append((owner, name, vars(owner).get(name)))
                    setattr(owner, name, _Method(self, original, name))

    def _unwrap(self) -> None:
        with self._lock:
            wrapped, self._wrapped = self._wrapped, []
            for owner, name, before in reversed(wrapped):
                if isinstance(vars(owner).get(name), _Method):  # Else the program has put another in its place.
                    if before is None:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, before)

    # ---- what happens

    def is_quiet(self) -> bool:
        """Whether nothing is noted: this stream is being captured, something is compiled, or nobody listens."""
        cuda: Any = sys.modules["torch"].cuda
        return (
            not self._lists or compilations.is_on > 0 or (cuda.is_initialized() and cuda.is_current_stream_capturing())
        )

    def look(
        self, name: str, args: tuple[Any, ...], keywords: dict[str, Any], result: object, took_ns: int, *, told: bool
    ) -> None:
        """Note a call that has returned, if it waited or copied pageable memory."""
        try:
            move = WAIT if name == WAITS else move_of(name, args, keywords, result, kind=self._kind)
            if move is not None:
                self._note(name.strip("_") if name != "copy_" else name, move, took_ns)
            elif told:
                self._note(UNNAMED, WAIT, took_ns)
        except Exception as error:  # A tensor of another kind, say; the program has its result.
            if is_the_programs(error):
                raise
            self._warnings.warn("look", "a call was not looked at for synchronisations: %s.", shown(error))

    def _hear(self) -> None:
        """Note a wait that PyTorch has warned of."""
        try:
            if self.thread.inside is not None:
                self.thread.inside[0] = True
            elif not self.is_quiet():
                self._note(UNNAMED, WAIT, 0)
        except Exception as error:  # It is asked for within the program's call, which goes on.
            if is_the_programs(error):
                raise
            self._warnings.warn("hear", "a synchronisation was not noted: %s.", shown(error))

    def _note(self, operation: str, move: Move, took_ns: int) -> None:
        record = running_stage(find_current())
        name = None if record is None else record.site.name
        found = (*place(), name, operation, *move, took_ns)
        for each in self._lists:
            each.take(found)
        if record is not None and getattr(record, "recorder", None) is not None:
            _tell(record, found)


def _tell(record: StageRecord, found: tuple[Any, ...]) -> None:
    """Tell the stage, whose thread this is."""
    file, line, _, operation, direction, pinned, count, _ = found
    attributes = record.attributes = {} if record.attributes is None else record.attributes
    memory = {True: " pinned", False: " pageable", None: ""}[pinned]
    text = f"{file}:{line} {operation} {direction}{memory}{'' if count is None else f' {count} bytes'}".rstrip()
    texts: Any = attributes.get(SYNCS, ())
    if isinstance(texts, tuple) and text not in texts and len(texts) < _MOST_OF_A_STAGE:
        attributes[SYNCS] = (*texts, text)
    for name, more in ((SYNC_COUNT, 1), (SYNC_BYTES, count or 0)):
        before = attributes.get(name, 0)
        attributes[name] = (before if isinstance(before, int) else 0) + more
