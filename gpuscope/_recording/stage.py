"""
`stage`: the decorator and context manager.

Only decides which of its forms applies. Recording is done in `_recording.hot_path`, functions are wrapped in
`_recording.wrap`.
"""

from __future__ import annotations

import operator
import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from gpuscope._data.native import native
from gpuscope._data.plain.values import as_key, snapshot, snapshot_mapping
from gpuscope._data.record import UnnamedSite
from gpuscope._recording import dynamo
from gpuscope._recording.block import DisabledStage, NoopStage, StageBlock, Told, check_arguments, new_block
from gpuscope._recording.hot_path import begin, current, end, undo
from gpuscope._recording.queue import said_of, tell
from gpuscope._recording.state import MAX_SITES, site_of, state
from gpuscope._recording.wrap import stage_of

F = TypeVar("F", bound="Callable[..., object]")
S = TypeVar("S", bound="Stage")

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import Site, StageRecord
    from gpuscope._recording.batches.members import Said
    from gpuscope._recording.block import StageHandle
    from gpuscope._recording.recorder import Recorder

_MAY_SUSPEND = 1
_quiet: list[tuple[Stage, int, StageRecord | None]] = []
"""Entries while nothing is recorded, that are not left yet: the object, the thread, and its record around the entry."""
_sites = state.sites
_NOTHING_MORE = None, None, None, True, None, None


class IdleStage(DisabledStage):
    """A stage that records nothing yet. A function that it decorates will be recorded once recording is on."""

    __slots__ = ("told",)
    told: Told

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what was said of the stage."""
        return _stage_again, (self.told._replace(stream=None),)

    def __call__(self, function: F) -> F:
        """Wrap the function so that it is recorded once recording is on."""
        told = self.told
        return stage_of(function, *told[:4], graph=told.graph, said=told.said, memory=bool(told.memory))


class Stage(StageBlock):
    """One `with stage(...)` block. When the same object is entered again, by any thread or task, it is a new record."""

    __slots__ = ()

    def __call__(self, function: F) -> F:
        """Wrap the function so that each call of it is a stage."""
        told = self._told()
        return stage_of(function, *told[:4], graph=told.graph, said=told.said, memory=bool(told.memory))

    def _set_uncommon(self, key: str, value: object) -> None:
        if not self.end_ns or self.uses == 0:
            tell(self, {as_key(key): snapshot(value)})

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what was said of the stage; a run of it, and its stream, stay in this process."""
        return _stage_again, (self._told()._replace(stream=None),)

    def __copy__(self) -> object:
        """Return another stage of the same kind."""
        return _stage_again(self._told())

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        """Return another stage of the same kind."""
        return self.__copy__()

    def _told(self, said: Said | None = None) -> Told:
        site = self.site
        name = None if isinstance(site, UnnamedSite) else site.name
        return Told(name, said_of(self.attributes), self.stream, site.warmup, site.graph, said, site.memory or None)

    def _enter_again(self) -> Self:
        if self.uses == 0:  # It has no run of its own.
            self.end_ns = 1
        self.uses = 2
        if (recorder := state.recorder) is None:
            _quiet.append((self, threading.get_ident(), self._innermost()))
            return cast("Self", _DISABLED_STAGE)
        told = self._told()
        inner = _new_stage(Stage, recorder, self.site, told.attributes, self.stream)
        inner.owner, inner.uses = self, 1
        if (said := told.said) is not None:
            said.take(inner)
        try:
            begin(recorder, inner, inner.site, inner.stream, _MAY_SUSPEND)
            self._entries().append(inner)
            return cast("Self", inner)
        except BaseException:  # Nobody leaves what was not entered.
            undo(recorder, inner)
            raise

    def _entries(self) -> list[StageBlock]:
        """Return the records of further entries that have not been left; kept where such a record has its owner."""
        if not hasattr(self, "owner"):
            self.owner = []
        return self.owner  # type: ignore[return-value]

    def _exit_again(self, error: BaseException | None) -> None:
        if not self.uses:  # It was never entered: `ExitStack.push` in place of `enter_context`, say.
            return
        record = self._innermost()
        entry = (self, threading.get_ident(), record)
        if entry in _quiet:
            _quiet.remove(entry)
            return
        if record is None:  # It was entered in another context.
            record = next((each for each in (*reversed(self._entries()), self) if not each.end_ns), None)
        if record is not None:
            end(record, error)
            if record is not self:
                self._entries().remove(record)  # type: ignore[arg-type]  # Found by its owner.

    def _innermost(self) -> StageRecord | None:
        """Return the innermost record of this object that runs in this context."""
        record = current.get()
        while record is not None and (
            record.end_ns or (record is not self and getattr(record, "owner", None) is not self)
        ):
            record = record.outer
        return record


class BatchStage(Stage):
    """One `with stage(..., members=...)` block: each entry reads the members anew."""

    __slots__ = ("said",)
    said: Said

    def __enter__(self) -> Self:
        """Begin the stage."""
        if not self.uses and not self.recorder.paused:
            self.said.take(self)
        return super().__enter__()

    def _told(self, said: Said | None = None) -> Told:
        return super()._told(said or self.said)


def _new_stage(kind: type[S], recorder: Recorder, site: Site, attributes: Any, stream: Stream) -> S:
    stage = new_block(kind, recorder, site)
    stage.stream = stream
    if attributes is not None:
        tell(stage, snapshot_mapping(attributes))
    return stage


def _stage_again(told: Told) -> object:
    """Make what was copied or unpickled: on, idle or off as this process is."""
    said: Any = {} if told.said is None else told.said._asdict()
    return stage(*told[:4], graph=told.graph, memory=told.memory, **said)  # type: ignore[call-overload]


_DISABLED_STAGE = DisabledStage()


@overload
def stage(function: F, /) -> F: ...
@overload
def stage(
    name: str | None = None,
    /,
    *,
    attributes: Mapping[str, object] | None = None,
    stream: Stream = None,
    warmup: int | None = None,
    graph: bool = True,
    members: object = None,
    weights: object = None,
    basis: str | None = None,
    key: str | Callable[[Any], object] | None = None,
    memory: bool = False,
) -> StageHandle: ...
# Options are keyword-only for type checkers alone: their defaults would cost every call a quarter more.
def stage(
    name: Any = None,
    /,
    attributes: Mapping[str, object] | None = None,
    stream: Stream = None,
    warmup: Any = None,
    graph: bool = True,
    *,
    members: object = None,
    weights: object = None,
    basis: Any = None,
    key: Any = None,
    memory: Any = None,
) -> object:
    """
    Name a piece of inference work; as a decorator or as a context manager.

    Each run becomes a host span and, where a GPU is in use, a GPU span: the time between two CUDA events on the
    stream that is current at entry. Nothing waits for the GPU. With recording off for good (`GPUSCOPE` unset or 0), a
    decorated function is the function itself, and a block costs one call. A generator is timed at each resumption.
    Pickle finds a decorated function by its name; `stage(functools.partial(library.run))` can be pickled, too.

    Examples:
        `@stage`, `@stage("preprocess")`, `@stage("inference", attributes={"model": "vit"})`, and
        `with stage("h2d") as s: s.set_attribute("batch_size", 8)`.

    Args:
        name: the stage's name. Use few, because NVTX keeps every one. By default the function's qualified name.
        attributes: attributes of each of the stage's host spans.
        stream: the `torch.cuda.Stream` whose work is timed, not the current one; it has to exist until the end.
        warmup: how many first calls are flagged as warm-up and left out of statistics; by default `GPUSCOPE_WARMUP`.
        graph: whether each replay of a CUDA graph that it is captured into times it, by up to two nodes in the graph.
        members: the requests that a batch works for: their tokens, of `gpuscope.here()`, read when the stage begins;
            for a decorated function, a function or an expression of its arguments. See docs/batches.md.
        weights: a number for each member, by which the GPU time is allotted; given as `members` are. None: all equal.
        basis: what the weights are, such as `tokens`.
        key: finds the token of each member: the name of an attribute or of a dict's item, or a function.
        memory: whether the begin, end and peak of what PyTorch's CUDA allocator gave out are measured.

    Raises:
        TypeError: for an argument of another type than is said above; and at decoration for what can't be a stage.
        ValueError: for a blank name or a negative `warmup`; with `GPUSCOPE_STRICT`, for faults in members and weights.

    """
    # First and alone: see `_recording.wrap`.
    if dynamo.is_dynamo_compiling():
        dynamo.gpuscope_left_out()
        return NoopStage()
    recorder = state.recorder
    if attributes is members is stream is weights is warmup is basis is key is memory is None and graph is True:
        try:
            return state.off_stages[name] if recorder is None else new_block(Stage, recorder, _sites[name])
        except (KeyError, TypeError):  # The first use of a name, or something that is not a name.
            pass
    told = Told(name, attributes, stream, warmup, graph, None, memory)
    if not (members is weights is basis is key is None):
        from gpuscope._recording.batches.members import said_of_batch

        told = told._replace(said=said_of_batch(members, weights, basis, key))
    return _uncommon(recorder, told)


def _uncommon(recorder: Recorder | None, told: Told) -> object:
    name, attributes, stream, warmup, graph, said, memory = told
    if not (type(name) is str and name in _sites and all(map(operator.is_, told[1:], _NOTHING_MORE))):
        check_arguments(told)
    if memory:
        state.measure_memory()
    if name is not None and not isinstance(name, str):
        return stage_of(name, None, attributes, stream, warmup, graph=graph, said=said, memory=bool(memory))
    if recorder is None:
        if name is not None and all(map(operator.is_, told[1:], _NOTHING_MORE)):
            return _off_stage(name)
        return _idle_stage(told)
    if name is not None:
        # `str.__str__`, because the name may be of a subclass, whose own methods nobody shall call.
        site = site_of(str.__str__(name), warmup, graph=graph, memory=bool(memory))
    else:
        site = state.unnamed if warmup is None and graph and not memory else UnnamedSite()
        site.warmup, site.graph, site.memory = warmup, graph, bool(memory)
    if said is None:
        return _new_stage(Stage, recorder, site, attributes, stream)
    batch = _new_stage(BatchStage, recorder, site, attributes, stream)
    batch.said = said
    return batch


def _idle_stage(told: Told) -> DisabledStage:
    if not state.may_toggle:
        return _DISABLED_STAGE
    idle = IdleStage()
    idle.told = told
    return idle


def _off_stage(name: str) -> DisabledStage:
    off = _idle_stage(Told(name, *_NOTHING_MORE))
    if len(kept := state.off_stages) >= MAX_SITES:
        return off
    if native is not None:
        native.keep(off)
    return kept.setdefault(name, off)  # type: ignore[no-any-return]


if not TYPE_CHECKING:
    stage = dynamo.in_c(stage, state, _sites, Stage)
