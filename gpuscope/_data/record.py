"""
`StageRecord`, raw: what the application's thread saw of one run of a stage, and the small objects that it refers to.

Nothing here acts. Imports nothing at run time but `typing`, because this is part of what `import gpuscope` costs, and
`dataclasses` alone would be a third of that. Constructors are the only hand-written methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

FromAbove: TypeAlias = Any
"""
A part of a room above, which cannot be named here. It is only carried, from its maker to its reader.

`Any`, because both know its type and nobody between them looks at it: a protocol would have no methods.
"""
LazySpan: TypeAlias = FromAbove
"""A `LazySpan` of `_otel.lazy_span`."""
Standing: TypeAlias = FromAbove
"""A `Standing` of `_otel.lazy_span`."""


class Site:
    """What is known of a stage before it runs: made once per name and attributes, shared by all its records."""

    __slots__ = (
        *(
            "attributes",
            "calls",
            "code",
            "function",
            "graph",
            "memory",
            "name",
            "nvtx",
            "replays",
            "warms_up",
            "warmup",
        ),
    )

    def __init__(
        self,
        name: str,
        attributes: Mapping[str, object],
        function: str | None = None,
        code: tuple[str, int] | None = None,
    ) -> None:
        self.name = name
        self.attributes = attributes
        self.function = function
        """The qualified name of the decorated function (`code.function.name`), if there is one."""
        self.code = code
        """Its file, as Python has it, and its first line (`code.file.path`, `code.line.number`), where it has them."""
        self.nvtx: object = None
        """What the NVTX door prepared for this name."""
        self.calls = 0
        """Calls resolved so far; the collector counts them for the warm-up flag."""
        self.replays = 0
        """How many CUDA graphs were replayed directly in it; about so many, under threads."""
        self.warmup: int | None = None
        """How many of them are warm-up; None leaves that to the configuration."""
        self.warms_up = False
        """Whether everything inside the stage is warm-up."""
        self.graph = True
        """Whether the stage adds record nodes to CUDA graphs that it is captured into."""
        self.memory = False
        """Whether its memory is measured."""


class UnnamedSite(Site):
    """The site of `stage()` without a name. A function that is decorated with it goes by its own name instead."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("stage", {})


class ThreadInfo:
    """The thread that a stage ran on: its `threading.get_ident()`, which is exported as `thread.id`, and its name."""

    __slots__ = ("ident", "name")

    def __init__(self, ident: int, name: str) -> None:
        self.ident = ident
        self.name = name


class Trace:
    """
    The trace a stage belongs to, shared by a stage and those inside it.

    `sampled` is None until somebody asks; then it is decided once.
    """

    __slots__ = ("parent_id", "remote", "root", "sampled", "state", "trace_id")
    trace_id: int
    parent_id: int
    """Span id of the application's span above the outermost stage; 0 if there is none."""
    remote: bool
    """Whether that span belongs to another process."""
    root: Site
    """The outermost stage of ours."""
    sampled: bool | None
    state: str | None
    """What other vendors say of it, as in the header `tracestate`; plain text, so that it refers to nothing."""


class StageRecord:
    """
    One run of a stage, as the application thread saw it. Times are `time.perf_counter_ns()`.

    What it says of the run never changes once it is queued. It has no `__init__`, which would cost as much as the rest
    of the allocation: `_recording.hot_path.begin` sets every slot but `attributes` and `members`, which its caller
    sets.
    """

    __slots__ = (
        "attributes",
        "before",
        "context_before",
        "end_ns",
        "error",
        "flight",
        "members",
        "outer",
        "pair",
        "place",
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
    recorder: FromAbove
    """The `Recorder`; `begin` and `end` give it its type."""
    outer: StageRecord | None
    """The enclosing stage."""
    before: StageRecord | None
    """What was current at entry, while the stage runs; None where that is `outer`."""
    place: FromAbove
    """Says in which context the stage is current; false once it is not: see `_recording.current_stage`."""
    trace: Trace
    span_id: int
    span: Standing
    """What the stage is in the application's OpenTelemetry contexts; or None. It refers to no record."""
    context_before: FromAbove
    """The OpenTelemetry context to put back, or None."""
    thread: ThreadInfo
    start_ns: int
    end_ns: int
    """0 while the stage runs."""
    timed_stream: FromAbove
    """The device's handle of the stream, or None; without a pair `CAPTURED`, if the stream was captured."""
    pair: FromAbove
    """The start and the end event of the device, or None."""
    range: object
    """The open NVTX range, or None."""
    attributes: dict[str, object] | None
    error: ExceptionInfo | None
    flight: int | None
    """Where it stands in the flight recorder's ring, while it runs; or None."""
    members: FromAbove
    """The `Members` of a batch (`_recording.batches.members`), or None."""


class TimedStreamFields:
    """A stream of a device, and the pool of event pairs that it draws on."""

    __slots__ = ("context", "foreign", "guarded", "handle", "index", "pairs", "raw")
    context: FromAbove
    foreign: bool
    """Whether it may be destroyed: then nothing but its events is asked about later."""
    guarded: bool
    """Whether the device has to ask something before it records an event here."""
    handle: FromAbove
    index: int
    """Of the device."""
    pairs: list[FromAbove]
    raw: int
    """The stream's address."""


class ExceptionInfo(NamedTuple):
    """An exception that left a stage. No reference to it or to its frames is kept, because they may hold GPU memory."""

    type: str
    message: str
    frames: tuple[Frame, ...]
    """Outermost first. `LEFT_OUT` stands for those that were too many."""
    notes: tuple[str, ...] = ()
    """What was added to it (PEP 678)."""
    before: ExceptionInfo | None = None
    """What it was raised from, or while that was handled."""
    is_caused: bool = False
    """Whether `before` is its cause (`raise ... from`)."""
    members: tuple[ExceptionInfo, ...] = ()
    """The exceptions of a group (PEP 654)."""


Frame: TypeAlias = "tuple[str, int, str]"
"""File, line, function."""
LEFT_OUT: Frame = ("...", 0, "...")
