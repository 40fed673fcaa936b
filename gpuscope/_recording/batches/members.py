"""
Whom a batch works for: what `stage(..., members=)` was told is read when the batch begins, and kept for the collector.

The thread of the batch pays for one copy of the list. What the members' ids are, and what the weights come to, is found
out by the collector, unless faults are to be told at once (`GPUSCOPE_STRICT`, and always in `gpuscope.testing`).
"""

from __future__ import annotations

from operator import attrgetter, itemgetter
from types import FunctionType, NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuscope._data.native import native
from gpuscope._data.plain.values import shown
from gpuscope._interrupts import is_an_interrupt
from gpuscope._recording.batches.summed import Summed
from gpuscope._recording.batches.token import NOWHERE, Token
from gpuscope._recording.hot_path import current
from gpuscope._recording.queue import hold
from gpuscope._recording.state import state
from gpuscope._settings.names import is_blank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from inspect import Signature

    from gpuscope._data.record import StageRecord
    from gpuscope._recording.arguments.expressions import Reader
    from gpuscope._recording.arguments.pre_hook import Function

_LISTS = frozenset((list, tuple, NoneType))
EQUAL, WEIGHTS = "equal", "weights"
TWICE = "the batch %r has the same member at %d and at %d."
WRONG_WEIGHTS = "the weights of the batch %r have %s: expected finite numbers of 0 or more, one at least above 0."
_token_of = attrgetter("token")
_MEMBER_BYTES = 64
"""What is held of a member while its batch waits: the token, and its place in a list."""


class Said(NamedTuple):
    """What `stage` was told of a batch, as it was given."""

    members: Any
    weights: Any = None
    basis: str | None = None
    key: Any = None

    def take(self, record: StageRecord) -> None:
        """
        Read the members of a block that is about to begin.

        Raises:
            ValueError: for a fault in what was given, where faults are to be told at once.

        """
        for name, given in (("members", self.members), ("weights", self.weights)):
            if type(given) in _LISTS:
                continue
            if isinstance(given, str) or (callable(given) and not hasattr(given, "__iter__")):
                text = f"`{name}` of the stage %r is for a decorated function."
                _fault(record, "unreadable", text, record.site.name)
                return
        _take(record, self, lambda: (self.members, self.weights))


class Members(NamedTuple):
    """Whom one run of a stage works for."""

    tokens: tuple[Token, ...]
    weights: tuple[Any, ...] | None
    """Of as many numbers, which nobody has looked at; None for equal ones."""
    basis: str
    summed: tuple[Any, ...] = ()
    """The members as they were given, where some join many batches."""
    steps: tuple[int | None, ...] | None = None
    """Which of its batches this is for each of those, from 0; None for other members, and where there are none."""


def said_of_batch(members: object, weights: object, basis: object, key: object) -> Said | None:
    """
    Return what was said of a batch, or None for a stage that is none.

    Raises:
        TypeError: for what can't be members, weights, the name of a basis, or a key.
        ValueError: for an expression that is none.

    """
    if members is None:
        if not (weights is basis is key is None):
            raise TypeError("`weights`, `basis` and `key` of a `stage` are about its `members`, which are missing.")
        return None
    if type(members) not in _LISTS or type(weights) not in _LISTS:
        _check_lists(members, weights)
    if basis is not None and (not isinstance(basis, str) or is_blank(basis) or weights is None):
        raise TypeError(f"`basis` of a `stage` must be the name of what its `weights` are, not {shown(basis)}.")
    if not (key is None or isinstance(key, str) or callable(key)):
        raise TypeError(f"`key` of a `stage` must be a name or a function, not {shown(key)}.")
    return Said(members, weights, basis, key)


def _check_lists(members: object, weights: object) -> None:
    if isinstance(members, Token):
        raise TypeError("`members` of a `stage` must be a list of tokens, not one; write `members=[token]`.")
    for name, given in (("members", members), ("weights", weights)):
        if given is None or callable(given):
            continue
        if isinstance(given, str):
            from gpuscope._recording.arguments.expressions import check

            check(given)
        elif not hasattr(given, "__iter__"):
            raise TypeError(
                f"`{name}` of a `stage` must be a list or, where a function is decorated, a function of its arguments "
                f"or an expression, not {shown(given)}."
            )


def as_batch(function: Function, said: Said, name: str) -> Function:
    """
    Return a function that reads the members of each call, in the stage of this name around it.

    Raises:
        TypeError: for what has no single call, or members that are not a function of the arguments.
        ValueError: for an expression of names that the function has no parameters of.

    """
    import inspect

    from gpuscope._recording.arguments.pre_hook import with_pre_hook

    makes_items = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    if type(function) is not FunctionType or makes_items:
        raise TypeError(
            f"`members` can't be given for {shown(function)}: it is not a plain or coroutine function. Write "
            "`with gpuscope.stage(..., members=tokens):` around what works for them."
        )
    signature = inspect.signature(function)
    members = _reader("members", said.members, signature)
    weights = None if said.weights is None else _reader("weights", said.weights, signature)

    def hook(args: tuple[object, ...], kwargs: dict[str, object]) -> Function:
        record = current.get()
        if state.recorder is not None and record is not None and not record.end_ns and record.site.name == name:
            _take(record, said, lambda: (members(args, kwargs), None if weights is None else weights(args, kwargs)))
        return function

    return with_pre_hook(function, hook)


def is_strict() -> bool:
    """Tell whether faults are raised where they are made."""
    return state.engine is not None and state.engine.config.strict


def _reader(name: str, given: Any, signature: Signature) -> Reader:
    if isinstance(given, str):
        from gpuscope._recording.arguments.expressions import reader

        return reader(given, signature)
    if not callable(given):
        raise TypeError(
            f"`{name}` of a decorated function must be a function of its arguments, or an expression, not "
            f"{shown(given)}."
        )
    return lambda args, kwargs: given(*args, **kwargs)


def _take(
    record: StageRecord, said: Said, read: Callable[[], tuple[Iterable[Any] | None, Iterable[Any] | None]]
) -> None:
    try:
        members, weights = read()
        if members is None:  # A function may say that this call is not a batch.
            return
        tokens = tuple(members) if said.key is None else tuple(map(_by_key(said.key), members))
        given = None if weights is None else tuple(weights)
    except Exception as error:  # The program's own lists and objects may raise anything.
        if is_an_interrupt(error) or is_strict():
            raise
        _unreadable(record, error)
        return
    name, count = record.site.name, len(tokens)
    summed: tuple[Any, ...] = ()
    if not count:
        _fault(record, "no_members", "the batch %r has no members.", name)
        return
    if not _are_tokens(tokens):
        tokens, summed = _apart(tokens)
    if summed and not _are_tokens(tokens):
        wrong = sum(type(token) is not Token for token in tokens)
        text = "%d of the %d members of the batch %r are not tokens; `gpuscope.here()` makes them, `key=` finds them."
        _fault(record, "not_tokens", text, wrong, count, name)
        tokens = tuple(token if type(token) is Token else NOWHERE for token in tokens)
    if given is not None and len(given) != count:
        _fault(record, "weights_length", "the batch %r has %d members and %d weights.", name, count, len(given))
        given = None
    if is_strict():
        _look_closer(record, tokens, given)
    if hold(record, _MEMBER_BYTES * count):
        basis = EQUAL if given is None else said.basis or WEIGHTS
        steps = _joined(summed)
        record.members = Members(tokens, given, basis, summed if steps else (), steps)


def _apart(members: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the tokens of members, and the members themselves, of which some may be tokens or anything else."""
    tokens = _tokens_of(members)
    if tokens is None:
        tokens = tuple(each.token if isinstance(each, Summed) else each for each in members)
    return tokens, members


def _tokens_of_in_python(members: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not all(issubclass(kind, Summed) for kind in set(map(type, members))):
        return None
    return tuple(map(_token_of, members))


def _joined_in_python(members: tuple[Any, ...]) -> tuple[int | None, ...] | None:
    """Note that some join one more of many batches, each once; return which of its own that is. None if none does."""
    found: list[int | None] = []
    seen = set()
    for each in members:
        if not isinstance(each, Summed) or each.ended or id(each) in seen:
            found.append(None)
        else:
            seen.add(id(each))
            found.append(each.steps)
            each.steps += 1
    return tuple(found) if seen else None


def _look_closer(record: StageRecord, tokens: tuple[Token, ...], weights: tuple[Any, ...] | None) -> None:
    from gpuscope._recording.batches.weights import fault_in

    places: dict[Token, int] = {}
    for place, token in enumerate(tokens):
        if token and places.setdefault(token, place) != place:
            _fault(record, "twice", TWICE, record.site.name, places[token], place)
    if weights is not None and (place := fault_in(weights)) >= 0:
        _fault(record, "weights", WRONG_WEIGHTS, record.site.name, shown_weight(weights, place))


def shown_weight(weights: tuple[Any, ...], place: int) -> str:
    """Say which weight is wrong, as `fault_in` has it."""
    return f"{shown(weights[place])} at {place}" if place < len(weights) else "nothing above 0"


def _are_tokens_in_python(items: tuple[object, ...]) -> bool:
    return {Token} == set(map(type, items))


_are_tokens: Callable[[tuple[object, ...]], bool] = _are_tokens_in_python if native is None else native.are_tokens
_tokens_of = _tokens_of_in_python if native is None else native.tokens_of
_joined = _joined_in_python if native is None else native.joined


def _by_key(key: Any) -> Callable[[Any], Any]:
    if callable(key):
        return key  # type: ignore[no-any-return]  # It was asked whether it can be called.
    attribute, item = attrgetter(key), itemgetter(key)
    return lambda member: item(member) if isinstance(member, dict) else attribute(member)


def _unreadable(record: StageRecord | None, error: Exception) -> None:
    name = "" if record is None else record.site.name
    _fault(record, "unreadable", "the members of the batch %r can't be read: %s.", name, shown(error))


def _fault(record: StageRecord | None, reason: str, message: str, *arguments: object) -> None:
    """
    Count what is wrong, or raise it.

    Raises:
        ValueError: where faults are to be told at once.

    """
    if is_strict():
        raise ValueError(message % arguments)
    if record is not None:
        record.recorder.ledger.faults.note(reason, message, *arguments)
