"""
Puts stages where the program has functions, and what was there back.

Nothing here raises into the program: what cannot be done is said once, and left.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from gpuscope._errors import MissingError, UnsuitableError
from gpuscope._log import WarnOnce, logger
from gpuscope.instrument._pre_hook import with_pre_hook
from gpuscope.instrument._wrapping import as_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gpuscope.instrument._targets import Target

_NOTHING = object()


@dataclass(eq=False)
class Patch:
    """One attribute that was replaced."""

    owner: Any
    name: str
    now: Any
    before: Any
    """What the owner itself had, or `_NOTHING`."""
    found: Any
    """What was made a stage, which may be inherited."""
    stage: str | None

    def undo(self) -> None:
        """Put back what was; what somebody else has put there since stays."""
        if vars(self.owner).get(self.name) is not self.now:
            return
        if self.before is _NOTHING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


class Patches:
    """All attributes that are replaced, and the classes whose subclasses are followed."""

    def __init__(self) -> None:
        self.all: list[Patch] = []
        self.by_identity: dict[int, Patch] = {}
        self.followed: dict[type, list[tuple[Target, str]]] = {}
        self.yielding: set[Target] = set()
        """Targets that give way to what the user named without a word."""
        self._warnings = WarnOnce()

    def apply(self, target: Target, module: ModuleType) -> None:
        """
        Make the target's function a stage, in a module that is there.

        Raises:
            MissingError: where there is no such name.

        """
        owner, name = _find(module, target.qualified_name)
        self._replace(target, owner, name)
        if target.subclasses and isinstance(owner, type):
            self._follow(target, owner, name)

    def put(self, owner: Any, name: str, now: Any, found: Any = None, stage: str | None = None) -> None:
        """Replace an attribute, and remember what was there."""
        if now is found:  # gpuscope is off for good.
            return
        before = vars(owner).get(name, _NOTHING)
        setattr(owner, name, now)
        patch = Patch(owner, name, now, before, found, stage)
        self.all.append(patch)
        self.by_identity[id(now)] = self.by_identity[id(_function(now))] = patch

    def undo(self) -> None:
        """Restore everything, the newest first."""
        while self.all:
            self.all.pop().undo()
        self.by_identity.clear()
        self.followed.clear()

    def say(self, message: str, *arguments: object) -> None:
        """Log a warning, once per text."""
        text = message % arguments
        self._warnings.warn(text, "%s", text)

    def _replace(self, target: Target, owner: Any, name: str) -> None:
        found, before = _look_up(owner, name), vars(owner).get(name, _NOTHING)
        known = self.by_identity.get(id(found))
        if known is not None and found is before:
            if known.stage != target.stage and target not in self.yielding:
                self.say("%s is the stage %r already, and not %r as well.", target.path, known.stage, target.stage)
            return
        if known is not None:
            found = known.found
        if getattr(found, "__isabstractmethod__", False):
            return
        try:
            self.put(owner, name, self._stage_of(target, found, name), found, target.stage)
        except UnsuitableError as error:
            self.say("%s cannot be a stage: %s", target.path, error)
        except (TypeError, AttributeError) as error:  # A class in C, slots.
            self.say("%s cannot be replaced: %s.", target.path, error)

    def _stage_of(self, target: Target, found: Any, name: str) -> Any:
        now = as_stage(target, found)
        function, takes_class = _function(found), isinstance(found, classmethod)
        if not target.subclasses or isinstance(found, staticmethod) or not isinstance(function, FunctionType):
            return now
        wrapper = self._outermost_only(function, _function(now), name, takes_class)
        return classmethod(wrapper) if takes_class else wrapper

    def _outermost_only(self, function: Any, stage: Any, name: str, takes_class: bool) -> Any:
        """Return the stage as one only where it is what the object's class has: not below `super()`."""

        def prepare(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
            kind = (args[0] if takes_class else type(args[0])) if args else None
            called = getattr(kind, name, wrapper)
            called = getattr(called, "__func__", called)  # Of a class method.
            return stage if called is wrapper or id(called) not in self.by_identity else function

        wrapper = with_pre_hook(function, prepare)
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

    def __init_subclass__(cls: type, **keywords: Any) -> None:  # noqa: N807
        if before is None:
            super(owner, cls).__init_subclass__(**keywords)  # type: ignore[arg-type,misc,unused-ignore]
        else:
            before.__get__(None, cls)(**keywords)
        try:
            override(owner, cls)
        except Exception:  # The class must come into being as it would without us.
            logger.warning("%s is not instrumented.", cls, exc_info=True)

    return __init_subclass__


def _function(attribute: Any) -> Any:
    """Return what a class or static method is made of; anything else as it is."""
    return attribute.__func__ if isinstance(attribute, staticmethod | classmethod) else attribute


def _subclasses(owner: Any) -> Iterator[type]:
    for subclass in type.__subclasses__(owner):
        yield subclass
        yield from _subclasses(subclass)


def _find(module: ModuleType, qualified_name: str) -> tuple[Any, str]:
    """Return the owner of a name, and its last part."""
    *outer, name = qualified_name.split(".")
    owner: Any = module
    for part in outer:
        owner = _look_up(owner, part, unbound=False)
    _look_up(owner, name)
    return owner, name


def _look_up(owner: Any, name: str, *, unbound: bool = True) -> Any:
    """Return an attribute; a class's as it is in the class, for what is bound is not what can be put back."""
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
    """Return the end of a sentence about a name that is not there."""
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean `{close[0]}`?" if close else "."


def is_being_imported(module: ModuleType) -> bool:
    """Tell whether the module's own code is still running."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False)) and module.__name__ in sys.modules
