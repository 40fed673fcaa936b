"""
`Target`, a function that is to become a stage, and the three ways to write several: text, mapping, TOML file.

Pure: never imports the modules that are named, nor looks at them.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuscope._data.plain.values import shown
from gpuscope._recording.arguments import expressions
from gpuscope._recording.batches.members import said_of_batch
from gpuscope._settings.names import is_blank

FORM = "`stage=package.module:function` or `stage=package.module:Class.method`, several separated by commas"
_PATH = re.compile(r"([\w.]+):([\w.]+)")
_NAMED = re.compile(r"(?s)([^=]+)=([^{]+)(?:\{(.*)\})?")
_KEYS = {"path": str, "attributes": dict, "subclasses": bool, "optional": bool} | dict.fromkeys(
    ("members", "weights", "basis", "key"), str
)
_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Target:
    """
    A function that is to become a stage, by its name.

    Args:
        stage: name of the stage.
        path: `package.module:function` or `package.module:Class.method`; `__main__:function` is in the program itself.
        attributes: attributes of its spans by name, each an expression over the call's arguments, such as
            `len(images)`, `self.model.name`, `inputs[0].shape`.
        subclasses: whether methods of subclasses that override it become stages too, whenever the subclass is made.
            What such a method calls by `super()` is not a second stage.
        optional: whether to give no warning if the function does not exist, as in other versions of a framework.
        members: whom a call works for, as for `stage`: an expression over its arguments, or a function of them. One
            that returns None says that this call is not a batch.
        weights: what their shares are by, likewise.
        basis: what the weights are.
        key: how to find the token of a member.

    Raises:
        TypeError: if the name or the path is not a text, the attributes are not a mapping of texts, or the members,
            weights, basis or key can't be such.
        ValueError: if the name is blank, or the path or an expression is malformed.

    """

    stage: str
    path: str
    attributes: Mapping[str, str] = field(default_factory=dict, hash=False)
    subclasses: bool = False
    optional: bool = False
    members: str | Callable[..., object] | None = None
    weights: str | Callable[..., object] | None = None
    basis: str | None = None
    key: str | Callable[[Any], object] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stage, str) or not isinstance(self.path, str):
            raise TypeError(f"A `Target` is {self.stage!r}, {self.path!r}: expected two texts, a name and a path.")
        if is_blank(self.stage) or not _PATH.fullmatch(self.path):
            raise ValueError(f"Invalid stage {f'{self.stage}={self.path}'!r}: expected {FORM}.")
        if not isinstance(self.attributes, Mapping) or not all(
            isinstance(each, str) for item in self.attributes.items() for each in item
        ):
            raise TypeError(f"`attributes` of the stage {self.stage!r}: expected a mapping of names to expressions.")
        for expression in self.attributes.values():
            expressions.check(expression)
        said_of_batch(self.members, self.weights, self.basis, self.key)

    @property
    def module(self) -> str:
        """The module's name."""
        return self.path.partition(":")[0]

    @property
    def qualified_name(self) -> str:
        """The function's name within the module."""
        return self.path.partition(":")[2]

    @property
    def first_name(self) -> str:
        """The part of it that the module itself defines: the function, or the outermost class."""
        return self.qualified_name.partition(".")[0]


def targets_of(stages: str | Iterable[Target] | Mapping[str, str]) -> list[Target]:
    """
    Return the targets of a text, a mapping or a list.

    Raises:
        TypeError: for items of a list that are not a `Target`.
        ValueError: for a malformed text.

    """
    if isinstance(stages, str):
        return [_parse(item) for item in split(stages)]
    if isinstance(stages, Mapping):
        return [_parse(f"{stage}={path}") for stage, path in stages.items()]
    if not isinstance(stages, Iterable):
        raise TypeError(
            f"`stages` is of type `{type(stages).__name__}`: expected a text, a mapping or a list of `Target`s."
        )
    targets = list(stages)
    for target in targets:
        if not isinstance(target, Target):
            raise TypeError(
                f"Expected a `Target`, got {shown(target)}; write `Target('infer', 'app.vision:Detector.forward')`."
            )
    return targets


def names_of(frameworks: str | Iterable[str]) -> list[str]:
    """
    Return the names in a text or a list.

    Raises:
        TypeError: for anything else.

    """
    if isinstance(frameworks, str):
        return [name.strip() for name in frameworks.split(",")]
    names = list(frameworks) if isinstance(frameworks, Iterable) else [frameworks]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"`frameworks` has a `{type(name).__name__}`: expected names, as a text or a list of texts."
            )
    return names


def _parse(item: str) -> Target:
    match = _NAMED.fullmatch(item.strip())
    if match is None:
        raise ValueError(f"Invalid stage {item!r}: expected {FORM}; attributes follow as `{{batch_size=len(images)}}`.")
    stage, path, attributes = match.groups(default="")
    return Target(stage.strip(), path.strip(), dict(map(_attribute, split(attributes))))


def _attribute(item: str) -> tuple[str, str]:
    name, sign, expression = item.partition("=")
    if not sign or not name.strip():
        raise ValueError(f"Invalid attribute {item!r}: expected `name=expression`, as in `batch_size=len(images)`.")
    return name.strip(), expression.strip()


def split(text: str) -> list[str]:
    """Return the items of a text: it is split at commas and line ends, except within brackets and quotes."""
    parts, quote, depth = [""], "", 0
    for letter in text:
        if letter in ",\n" and not depth and not quote:
            parts.append("")
            continue
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        else:
            depth += (letter in _OPENING) - (letter in _CLOSING)
        parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def read_file(path: str | Path) -> tuple[list[Target], list[str]]:
    """
    Return the targets and the names of frameworks in a TOML file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is malformed.

    """
    tables = _toml(Path(path).read_text(encoding="utf-8"))
    stages, frameworks = tables.pop("stages", {}), tables.pop("frameworks", [])
    if tables:
        raise ValueError(f"Unknown keys {', '.join(tables)}: expected a table `stages` and a list `frameworks`.")
    if not isinstance(stages, dict) or not isinstance(frameworks, list):
        raise ValueError(  # noqa: TRY004 - whatever a file says wrong is one kind of error
            f"`stages` is {stages!r} and `frameworks` is {frameworks!r}: expected a table and a list."
        )
    targets = []
    for stage, entries in stages.items():
        targets += [_entry(stage, entry) for entry in (entries if isinstance(entries, list) else [entries])]
    return targets, [str(name) for name in frameworks]


def _toml(text: str) -> dict[str, object]:
    try:
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise ValueError(
            "Reading TOML needs Python 3.11 or later, or the package `tomli`; install one of them."
        ) from None
    return dict(toml.loads(text))


def _entry(stage: str, entry: object) -> Target:
    if isinstance(entry, str):
        return _parse(f"{stage}={entry}")
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError(
            f"Invalid stage {shown(stage)} with {shown(entry)}: expected a path, or a table with the key `path`."
        )
    bad = {key: value for key, value in entry.items() if not isinstance(value, _KEYS.get(key, ()))}
    if bad:
        allowed = ", ".join(f"`{key}` ({kind.__name__})" for key, kind in _KEYS.items())
        raise ValueError(f"Invalid stage {shown(stage)} with {shown(bad)}: expected {allowed}.")
    return Target(stage, **entry)
