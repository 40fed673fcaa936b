"""
Replaces functions of the program by stages, and puts them back.

What cannot be replaced is logged once, and left. Callers handle names that are missing (`MissingError`), and whatever
the program's own code raises while a name is looked up.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING

from gpuscope._data.plain.tracebacks import traceback_of
from gpuscope._data.plain.values import message_of, shown
from gpuscope._errors import MissingError, UnsuitableError
from gpuscope._interrupts import is_an_interrupt
from gpuscope._log import WarnOnce, logger
from gpuscope._recording.arguments.pre_hook import with_pre_hook
from gpuscope.instrument._wrapping import as_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gpuscope._recording.arguments.pre_hook import Function
    from gpuscope.instrument._targets import Target
    from gpuscope.instrument._wrapping import Member

_NOTHING = object()


@dataclass(eq=False)
class Patch:
    """One attribute that was replaced."""

    owner: object
    name: str
    now: Member
    before: Member
    """What the owner itself had, or `_NOTHING`."""
    found: Member
    """What was made a stage; the owner may inherit it."""
    stage: str | None

    def undo(self) -> None:
        """Put back what was there, unless somebody else has replaced it since."""
        if vars(self.owner).get(self.name) is not self.now:
            return
        if self.before is _NOTHING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


class Patches:
    """All attributes that are replaced, and the classes whose subclasses are watched."""

    def __init__(self) -> None:
        self.all: list[Patch] = []
        self.by_identity: dict[int, Patch] = {}
        self.followed: dict[type, list[tuple[Target, str]]] = {}
        self.yielding: set[Target] = set()
        """Targets that silently give way to what the user named: those of frameworks."""
        self._warnings = WarnOnce()

    def apply(self, target: Target, module: object) -> None:
        """
        Make the target's function a stage, in its module or in what stands for that (`_main_module.Namespace`).

        Raises:
            MissingError: if there is no such name.

        """
        owner, name = _find(module, target.qualified_name)
        self._replace(target, owner, name)
        if target.subclasses and isinstance(owner, type):
            self._follow(target, owner, name)

    def put(self, owner: object, name: str, now: Member, found: Member = None, stage: str | None = None) -> None:
        """Replace an attribute, and remember what was there."""
        if now is found:  # gpuscope is off for good, so `stage` returned what it was given.
            return
        before = vars(owner).get(name, _NOTHING)
        setattr(owner, name, now)
        patch = Patch(owner, name, now, before, found, stage)
        self.all.append(patch)
        self.by_identity[id(now)] = self.by_identity[id(_function(now))] = patch

    def undo(self) -> None:
        """Put everything back, the newest first."""
        while self.all:
            self.all.pop().undo()
        self.by_identity.clear()
        self.followed.clear()

    def say(self, message: str, *arguments: object) -> None:
        """Log a warning, once per text."""
        text = message % arguments
        self._warnings.warn(text, "%s", text)

    def _replace(self, target: Target, owner: object, name: str) -> None:
        found, before = _look_up(owner, name), vars(owner).get(name, _NOTHING)
        known = self.by_identity.get(id(found))
        if known is not None and found is before:
            if known.stage != target.stage and target not in self.yielding:
                self.say("%s is already the stage %r; it cannot be %r as well.", target.path, known.stage, target.stage)
            return
        if known is not None:
            found = known.found
        if getattr(found, "__isabstractmethod__", False):
            return
        try:
            self.put(owner, name, self._stage_of(target, found, name), found, target.stage)
        except UnsuitableError as error:
            self.say("%s cannot be a stage: %s", target.path, error)
        except (TypeError, AttributeError) as error:  # A class written in C, or slots.
            self.say("%s cannot be replaced: %s.", target.path, message_of(error))

    def _stage_of(self, target: Target, found: Member, name: str) -> Member:
        now = as_stage(target, found)
        function, takes_class = _function(found), isinstance(found, classmethod)
        if not target.subclasses or isinstance(found, staticmethod) or not isinstance(function, FunctionType):
            return now
        wrapper = self._outermost_only(function, _function(now), name, takes_class)
        return classmethod(wrapper) if takes_class else wrapper

    def _outermost_only(self, function: Function, stage: Function, name: str, takes_class: bool) -> Function:
        """Return a function that is a stage only where the object's class has it itself, and not below `super()`."""

        def hook(args: tuple[object, ...], _kwargs: dict[str, object]) -> Function:
            kind = (args[0] if takes_class else type(args[0])) if args else None
            called = getattr(kind, name, wrapper)
            called = getattr(called, "__func__", called)  # Of a class method.
            return stage if called is wrapper or id(called) not in self.by_identity else function

        wrapper = with_pre_hook(function, hook)
        return wrapper

    def _follow(self, target: Target, owner: type, name: str) -> None:
        targets = self.followed.setdefault(owner, [])
        if (target, name) in targets:
            return
        if not targets:
            self.put(owner, "__init_subclass__", classmethod(_init_subclass(owner, self._override)))
        targets.append((target, name))
        for subclass in _subclasses(owner):
            self._override(owner, subclass)

    def _override(self, owner: type, subclass: type) -> None:
        for target, name in self.followed.get(owner, ()):
            if name in vars(subclass):
                self._replace(target, subclass, name)


def _init_subclass(owner: type, override: Callable[[type, type], None]) -> Callable[..., None]:
    before = vars(owner).get("__init_subclass__")

    def __init_subclass__(cls: type, **keywords: object) -> None:  # noqa: N807
        if before is None:
            super(owner, cls).__init_subclass__(**keywords)  # type: ignore[arg-type,misc,unused-ignore]
        else:
            before.__get__(None, cls)(**keywords)
        try:
            override(owner, cls)
        except Exception as error:  # The class must come into being as it does without us.
            if is_an_interrupt(error):
                raise
            logger.warning("%s is not instrumented.\n%s", shown(cls), traceback_of(error))

    return __init_subclass__


def _function(attribute: Member) -> Member:
    """Return the function of a class method or static method; anything else as it is."""
    return attribute.__func__ if isinstance(attribute, staticmethod | classmethod) else attribute


def _subclasses(owner: type) -> Iterator[type]:
    subclasses: list[type] = type.__subclasses__(owner)  # Not `owner.__subclasses__`: the owner may be a metaclass.
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)


def _find(module: object, qualified_name: str) -> tuple[object, str]:
    """Return the owner of a name, and the last part of the name."""
    *outer, name = qualified_name.split(".")
    owner = module
    for part in outer:
        owner = _look_up(owner, part, unbound=False)
    _look_up(owner, name)
    return owner, name


def _look_up(owner: object, name: str, *, unbound: bool = True) -> Member:
    """Return an attribute; that of a class unbound, because only this can be put back."""
    if unbound and isinstance(owner, type):
        for kind in owner.__mro__:
            if name in vars(kind):
                return vars(kind)[name]
    if name in getattr(owner, "__dict__", ()):
        return vars(owner)[name]
    try:
        return getattr(owner, name)
    except AttributeError:
        where = getattr(owner, "__name__", type(owner).__name__)
        raise MissingError(f"`{where}` has no `{name}`{closest(name, dir(owner))}") from None


def closest(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence about a missing name."""
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean `{close[0]}`?" if close else "."


def is_being_imported(module: ModuleType) -> bool:
    """Tell whether the module's own code is still running."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False)) and module.__name__ in sys.modules
