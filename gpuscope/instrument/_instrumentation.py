"""
Stages by name: functions of programs and frameworks become stages from outside, when their module is imported.

`instrument` is loud about what it is given, and quiet afterwards: it warns once of what turns out to be missing, and
never raises into an import.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import sys
from typing import TYPE_CHECKING, Any

import wrapt

from gpuscope._data.plain.tracebacks import traceback_of
from gpuscope._data.plain.values import message_of, shown
from gpuscope._errors import MissingError
from gpuscope._interrupts import is_an_interrupt
from gpuscope._log import logger
from gpuscope._recording.state import state
from gpuscope.instrument import _frameworks, _main_module
from gpuscope.instrument._import_hooks import when_complete, when_over
from gpuscope.instrument._patching import Patches, closest, is_being_imported
from gpuscope.instrument._targets import FORM, Target, names_of, read_file, split, targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from types import ModuleType

__all__ = ["Target", "instrument", "uninstrument"]


def instrument(
    stages: str | Iterable[Target] | Mapping[str, str] = (),
    *,
    file: str | Path | None = None,
    frameworks: str | Iterable[str] = (),
) -> None:
    """
    Make stages of functions by their names: now if their module is imported, otherwise when it is.

    A name that does not exist brings a warning that names the closest one that does. Copies that `from x import f` has
    made already stay as they are. With gpuscope off for good (`GPUSCOPE` unset or 0), the arguments are only checked.

    Args:
        stages: `"infer=app:Model.forward{batch_size=len(images)}, ..."`, a mapping of stages to paths, or `Target`s.
        file: path of a TOML file with a table `stages` and a list `frameworks`.
        frameworks: names of files in `gpuscope.integrations`, as a list or separated by commas; `all` for every one.

    Raises:
        TypeError: for stages or frameworks of another type.
        ValueError: for malformed stages or files, and for unknown frameworks.
        OSError: for a file that cannot be read.

    """
    targets = targets_of(stages)
    names = names_of(frameworks)
    if file is not None:
        more, more_names = read_file(file)
        targets += more
        names += more_names
    modules = _frameworks.modules_of(filter(None, names))
    if state.recorder is None and not state.may_toggle:
        state.left_plain.update(dict.fromkeys([*(target.path for target in targets), *modules]))
        return
    current = _instrumentation()
    # What the user names comes first, because a function is one stage only.
    for target in targets:
        current.add(target)
    for name, module in modules.items():
        current.add_framework(name, module)
    if "all" not in names:
        current.named.update(modules)


def uninstrument() -> None:
    """Put back every function that `instrument` replaced, and forget those whose module is not imported yet."""
    if state.instrumentation is not None:
        state.instrumentation.undo()
        state.instrumentation = None


def follow_environment() -> None:
    """Do what the environment variables say; a mistake in one costs that part, and brings a warning."""
    config = state.config
    parts: list[tuple[str, dict[str, Any]]] = [
        *((f"number {at} of GPUSCOPE_STAGES", {"stages": each}) for at, each in enumerate(split(config.stages), 1)),
        ("GPUSCOPE_STAGES_FILE", {"file": config.stages_file or None}),
        *(
            (f"number {at} of GPUSCOPE_FRAMEWORKS", {"frameworks": each})
            for at, each in enumerate(names_of(config.frameworks), 1)
        ),
    ]
    for part, argument in parts:
        try:
            instrument(**argument)
        except Exception as error:  # Whatever it is: `import gpuscope` goes on.
            logger.warning("ignoring %s: %s", part, _without_value(error, part))


def _without_value(error: Exception, part: str) -> str:
    """Return what is wrong; of a variable's own text, which may be a credential, only what was expected instead."""
    said = message_of(error)
    if "GPUSCOPE_STAGES_FILE" in part or not isinstance(error, ValueError):
        return said
    _, sign, expected = said.rpartition(": expected ")
    return f"expected {expected}" if sign else f"expected {FORM}."


class Instrumentation:
    """The targets, and what has become of them. There is one at a time; `uninstrument` ends it."""

    def __init__(self) -> None:
        self.patches = Patches()
        self.waiting: dict[Target, bool] = {}
        """Every target, and whether it is still to be found."""
        self.frameworks: dict[str, Callable[[], None] | None] = {}
        """What undoes each framework's file, if it has been imported and has something to undo."""
        self.named: dict[str, str] = {}
        """The modules of frameworks that were named one by one."""
        self._of_main: set[Target] = set()
        """Targets that named the main module, of which `__main__` tells nothing any more at exit."""
        self.active = True
        self.is_asked = True
        """Whether the program itself, or its command, asked; not a parent for all its children."""
        wrapt.when_imported("multiprocessing.spawn")(self._follow_children)

    def add(self, target: Target) -> None:
        """Make the target a stage, now or later; again if its module has been reloaded."""
        is_new = target not in self.waiting
        self.waiting.setdefault(target, True)
        error = None
        if _main_module.means_main(target.module):
            self._of_main.add(target)
            error = self._look_in_main(target)
        if target.module == _main_module.MAIN:
            if error is not None:
                self._say_that_main_lacks(target, error)
        elif (module := sys.modules.get(target.module)) is not None:
            self._imported(target, module, is_complete=not is_being_imported(module))
        elif is_new:
            wrapt.when_imported(target.module)(functools.partial(self._imported, target))

    def add_framework(self, name: str, module: str) -> None:
        """Use a framework's file once the framework is imported."""
        if name not in self.frameworks:
            self.frameworks[name] = None
            when_over(module, functools.partial(self._framework_imported, name))

    def undo(self) -> None:
        """Put back everything that was replaced."""
        self.active = False
        for name, undo in reversed(self.frameworks.items()):  # Two may have replaced the same thing.
            try:
                if undo is not None:
                    undo()
            except Exception as error:  # A framework's own way of undoing.
                logger.warning("%s is still instrumented: undoing it failed.\n%s", name, traceback_of(error))
        self.patches.undo()

    def names_in_main(self) -> set[str]:
        """Return the names that the main module must define for its targets."""
        return {target.first_name for target in self._in_main()}

    def look_in_main(self) -> None:
        """Make stages of what the main module has defined so far."""
        for target in self._in_main():
            error = self._look_in_main(target)
            if (
                error is not None
                and hasattr(sys.modules[_main_module.MAIN], target.first_name)
                and not _main_module.is_child()
            ):
                self._say_missing(target, error)

    def say_what_main_lacks(self, names: Iterable[str]) -> None:
        """Warn of targets that the main module will not have: `names` are all that it defines."""
        for target in self._in_main():
            if target.module == _main_module.MAIN and (name := target.first_name) not in names:
                self._say_missing(target, MissingError(f"the program has no `{name}`{closest(name, names)}"))

    def say_what_never_came(self) -> None:
        """Warn, at exit, of what was not found, and of modules that were never imported but resemble one that was."""
        for target in [
            target for target, is_waiting in list(self.waiting.items()) if is_waiting and not target.optional
        ]:
            close = difflib.get_close_matches(target.module, sys.modules, 1, 0.85)
            if target.module == _main_module.MAIN:
                error = self._look_in_main(target)
                if error is not None:
                    self._say_that_main_lacks(target, error)
            elif _main_module.means_main(target.module) and target.module not in sys.modules:
                error = self._look_in_main(target)
                if error is not None:
                    self._say_missing(target, error)
            elif target.module not in sys.modules and (close or self._is_asked_for(target)):
                hint = f"; did you mean `{close[0]}`?" if close else f", so `{target.path}` is not a stage."
                self.patches.say("%s was never imported%s", target.module, hint)
        asks = self.is_asked and not state.has_launched
        for name in [name for name, module in self.named.items() if asks and module not in sys.modules]:
            self.patches.say(
                "%s was never imported, so nothing of the framework %s is a stage.", self.named[name], name
            )

    def _is_asked_for(self, target: Target) -> bool:
        asks = self.is_asked and not state.has_launched  # Else the module is for the workers.
        return asks and target not in self.patches.yielding and target not in self._of_main

    def _in_main(self) -> list[Target]:
        # A copy, made in one step, because another thread may import a framework.
        return [target for target in list(self.waiting) if _main_module.means_main(target.module)]

    def _look_in_main(self, target: Target) -> MissingError | None:
        missing = None
        for module in _main_module.namespaces():
            try:
                self._apply(target, module)
            except MissingError as error:
                missing = error
        return missing

    def _say_that_main_lacks(self, target: Target, error: MissingError) -> None:
        if _main_module.has_begun():
            advice = "Call `instrument` below its definition, or start with `gpuscope run`."
            self._say_missing(target, MissingError(f"{error} {advice}"))

    def _say_missing(self, target: Target, error: MissingError) -> None:
        self.waiting[target] = False
        if not target.optional:
            self.patches.say("%s does not exist: %s", target.path, error)

    def _imported(self, target: Target, module: ModuleType, *, is_complete: bool = True) -> None:
        if not self.active:
            return
        try:
            self._apply(target, module)
        except MissingError as error:
            if is_complete:
                self._say_missing(target, error)
            else:
                # It called `instrument` before it defined what is named.
                when_complete(module, functools.partial(self._imported, target, module))

    def _apply(self, target: Target, module: object) -> None:
        try:
            self.patches.apply(target, module)
        except MissingError:
            raise
        except Exception as error:  # A lookup may run any code of the program, whose import must go on.
            if is_an_interrupt(error):
                raise
            self.patches.say("%s is not instrumented: %s", target.path, shown(error))
        self.waiting[target] = False

    def _follow_children(self, spawn: ModuleType) -> None:
        """In a child of multiprocessing, look in the main module once it has been run again there."""
        for name in ("prepare", "import_main_path") if self.active else ():
            self.patches.put(spawn, name, _main_module.then(getattr(spawn, name), self.look_in_main))

    def _framework_imported(self, name: str, _module: object) -> None:
        if not self.active:
            return
        try:
            file = _frameworks.load(name)
            self.patches.yielding.update(file.TARGETS)
            for target in file.TARGETS:
                self.add(target)
            if hasattr(file, "install"):
                self.frameworks[name] = file.install()
        except Exception as error:  # The file may be written for other versions; the program goes on with this one.
            if is_an_interrupt(error):
                raise
            logger.warning("%s is not instrumented.\n%s", name, traceback_of(error))


def _instrumentation() -> Instrumentation:
    if state.instrumentation is None:
        state.instrumentation = Instrumentation()
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
    current: Instrumentation = state.instrumentation
    return current


def _at_exit() -> None:
    if state.instrumentation is not None and not _main_module.is_child():
        state.instrumentation.say_what_never_came()
