"""Stops an action before each bytecode of some files: where a signal handler, a finalizer or an interrupt may come."""

from __future__ import annotations

import dis
import functools
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

_JUMPS = ("JUMP_BACKWARD", "JUMP_ABSOLUTE", "POP_JUMP_BACKWARD")
_SHIELDS = {"SETUP_FINALLY", "SETUP_WITH", "BEFORE_ASYNC_WITH", "YIELD_FROM"}
"""Python 3.10 looks for no signals before these."""
_QUIET_JUMPS = {"FOR_ITER", "JUMP_FORWARD", "JUMP_IF_FALSE_OR_POP", "JUMP_IF_TRUE_OR_POP", "JUMP_IF_NOT_EXC_MATCH"}


def at_each_step(action: Callable[[], object], files: tuple[str, ...], visit: Callable[..., None]) -> object:
    """
    Run the action; before each bytecode in these files call `visit(frame, signals)`.

    `signals` is "start" or "later" where Python looks for signals at that point, and else "".
    """
    steps = _Steps(files, visit)
    return (_monitored if sys.version_info >= (3, 12) else _traced)(action, steps)


class _Steps:
    def __init__(self, files: tuple[str, ...], visit: Callable[..., None]) -> None:
        self.files, self.visit = files, visit
        self.last: dict[int, int] = {}
        """The offset of each frame's last bytecode; not the frame, which would hold its variables."""

    def step(self, frame: FrameType, offset: int) -> None:
        before = self.last.get(id(frame), -1)
        self.last[id(frame)] = offset
        self.visit(frame, _signals(frame.f_code, before, offset))


def _traced(action: Callable[[], object], steps: _Steps) -> object:
    def trace(frame: FrameType, event: str, _: object) -> object:
        if not frame.f_code.co_filename.startswith(steps.files):
            return None
        if event == "call" and frame.f_lasti < 0:
            steps.last.pop(id(frame), None)
        frame.f_trace_opcodes = True
        if event == "opcode" or (event == "call" and _is_resumption(frame.f_code, frame.f_lasti)):
            steps.step(frame, frame.f_lasti)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        return action()
    finally:
        sys.settrace(before)


def _monitored(action: Callable[[], object], steps: _Steps) -> object:
    monitoring, tool, thread = sys.monitoring, 4, threading.get_ident()
    events = monitoring.events

    def instruction(code: CodeType, offset: int) -> object:
        if not code.co_filename.startswith(steps.files):
            return monitoring.DISABLE
        if threading.get_ident() == thread:
            frame = sys._getframe(1)  # In a variable: by that, what a signal handler has raised is known.
            steps.step(frame, offset)
        return None

    monitoring.use_tool_id(tool, "steps")
    # What a function begins with, or goes on with, is not among the others.
    all_of_them = (events.INSTRUCTION, events.PY_START, events.PY_RESUME)
    for event in all_of_them:
        monitoring.register_callback(tool, event, instruction)
    monitoring.set_events(tool, sum(all_of_them))
    try:
        return action()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


@functools.cache
def _instructions(code: CodeType) -> dict[int, tuple[str, int]]:
    return {each.offset: (each.opname, each.arg or 0) for each in dis.get_instructions(code)}


def _is_resumption(code: CodeType, offset: int) -> bool:
    return _instructions(code).get(offset, ("", 0))[0] == "RESUME"


@functools.cache
def _signals(code: CodeType, before: int, offset: int) -> str:
    """Tell whether Python looks for signals as it comes from one bytecode (-1: from none) to the other."""
    instructions = _instructions(code)
    came_from, comes_to = instructions.get(before, ("", 0))[0], instructions[offset]
    calls = came_from.startswith("CALL") and "INTRINSIC" not in came_from
    if sys.version_info >= (3, 11):
        if comes_to[0] == "RESUME":
            return ("start", "later", "", "")[comes_to[1] & 3]  # Not so within an `await` or a `yield from`.
        raised = "EXC" in comes_to[0]  # The handler begins.
        return "later" if came_from.startswith(_JUMPS) or (calls and not raised) else ""
    if comes_to[0] in _SHIELDS:
        return ""
    if before < 0:
        return "start"
    jumps = offset != before + 2 and came_from not in _QUIET_JUMPS  # Also to a handler of exceptions.
    return "later" if jumps or calls or came_from in ("YIELD_VALUE", "GEN_START") else ""
