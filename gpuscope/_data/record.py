"""
`StageRecord`, raw: what the application's thread saw of one run of a stage, and the small facts it refers to.

Nothing here acts. Imports nothing at run time but `typing`: it is part of what `import gpuscope` costs, and
`dataclasses` alone would be a third of that. Constructors are the only hand-written methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Site:
    """What is known of a stage before it runs: made once per name and attributes, shared by all its records."""

    __slots__ = ("attributes", "calls", "function", "graph", "name", "nvtx", "warms_up", "warmup")

    def __init__(self, name: str, attributes: Mapping[str, Any], function: str | None = None) -> None:
        self.name = name
        self.attributes = attributes
        self.function = function
        """The qualified name of the decorated function (`code.function.name`), if there is one."""
        self.nvtx: Any = None
        """What the NVTX door prepared for this name."""
        self.calls = 0
        """Resolved calls so far; counted by the collector, for the warm-up flag."""
        self.warmup: int | None = None
        """How many of them are warm-up, where that is not left to the configuration."""
        self.warms_up = False
        """Whether everything inside it is warm-up."""
        self.graph = True
        """Whether it adds nodes to CUDA graphs that it is captured into."""


class UnnamedSite(Site):
    """The stage of `stage()` without a name, which a function that it decorates does not take over."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("stage", {})


class ThreadInfo:
    """The thread that a stage ran on: `threading.get_ident()`, which is `thread.id`, and its name."""

    __slots__ = ("ident", "name")

    def __init__(self, ident: int, name: str) -> None:
        self.ident = ident
        self.name = name


class Trace:
    """
    The trace a stage belongs to, shared by a stage and those inside it.

    `sampled` is None until somebody asks; then it is decided once.
    """

    __slots__ = ("parent_id", "remote", "root", "sampled", "trace_id")
    trace_id: int
    parent_id: int
    """Span id of the application's span above the outermost stage; 0 if there is none."""
    remote: bool
    """Whether that span belongs to another process."""
    root: Site
    """The outermost stage of ours."""
    sampled: bool | None


class StageRecord:
    """
    One run of a stage, as the application thread saw it. Times are `time.perf_counter_ns()`.

    Its facts never change once it is queued. Made without `__init__`, which would cost as much as the rest
    of the allocation; `_recording.stage.begin` sets every slot.
    """

    __slots__ = (
        "attributes",
        "context_before",
        "end_ns",
        "error",
        "outer",
        "pair",
        "range",
        "recorder",
        "site",
        "span",
        "span_id",
        "start_ns",
        "thread",
        "timed_stream",
        "trace",
    )
    site: Site
    recorder: Any
    """The `Recorder`, which is built on this file: hence `Any`; `begin` and `end` give it its type."""
    outer: StageRecord | None
    """The enclosing stage."""
    trace: Trace
    span_id: int
    span: Any
    """The lazy span that stands for this stage in the application's OpenTelemetry context, or None."""
    context_before: Any
    """The OpenTelemetry context to put back, or None."""
    thread: ThreadInfo
    start_ns: int
    end_ns: int
    """0 while the stage runs."""
    timed_stream: Any
    """The device door's handle of (device, stream), or None; without a pair `CAPTURED`, if the stream was."""
    pair: Any
    """The device door's start and end event, or None."""
    range: Any
    """The open NVTX range, or None."""
    attributes: dict[str, Any] | None
    error: ExceptionInfo | None


class TimedStreamFields:
    """A stream of a device, and the pool of event pairs that it draws on."""

    __slots__ = ("context", "foreign", "guarded", "handle", "index", "pairs", "raw")
    context: Any
    foreign: bool
    """Whether it may be destroyed: then nothing but its events is asked about later."""
    guarded: bool
    """Whether recording needs a question first."""
    handle: Any
    index: int
    """Of the device."""
    pairs: list[Any]
    raw: int
    """The stream's address."""


class ExceptionInfo(NamedTuple):
    """An exception that left a stage: no reference to it or to its frames is kept, they may hold GPU memory."""

    type: str
    message: str
    frames: tuple[tuple[str, int, str], ...]
    """(file, line, function), outermost first."""
