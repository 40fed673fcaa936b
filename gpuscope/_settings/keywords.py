"""
Settings given as keyword arguments: each is checked as its variable would be.

Shows no value that may hold a credential, and of objects only their type, because their `repr` is the program's code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from gpuscope._settings.names import closest
from gpuscope._settings.parsers import EXPORTERS, PartlyError, is_header, path
from gpuscope._settings.shown import shown_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from dataclasses import Field

_ALLOWED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: f"a text or a list of texts, of {', '.join(EXPORTERS)}",
    dict: "a text or a mapping of texts",
}


def checked(settings: Iterable[Field[Any]], keywords: Mapping[str, object]) -> dict[str, object]:
    """
    Return the values of settings that were given as these.

    A setting may go by its variable's name as well, which is the other of its two spellings in the README's table; then
    the value has the variable's unit.

    Raises:
        TypeError: for a name that is not a setting, and for a setting that is given twice.
        ValueError: for a value that is not allowed.

    """
    settings = list(settings)
    given: dict[str, tuple[int, str]] = {}
    for name in keywords:
        for rank, each in meant(settings, name):
            before = given.get(each.name)
            if before is not None and before[0] == rank:
                raise TypeError(f"`{before[1]}` and `{name}` are one setting; give one of them.")
            if before is None or rank < before[0]:  # A variable for spans alone comes before one for all.
                given[each.name] = rank, name
    known = {each.name: each for each in settings}
    return {setting: _checked(known[setting], name, keywords[name]) for setting, (_, name) in given.items()}


def meant(settings: Iterable[Field[Any]], name: str) -> list[tuple[int, Field[Any]]]:
    """
    Return the settings that a name stands for, each with the place of that name among the setting's own.

    Raises:
        TypeError: for a name that is not a setting.

    """
    settings = list(settings)
    found = [(0, each) for each in settings if name == each.name]
    if not found:
        variable = name.upper()
        found = [
            (each.metadata["variables"].index(variable), each)
            for each in settings
            if variable in each.metadata["variables"]
        ]
    if found:
        return found
    names = ", ".join(sorted(each.name for each in settings))
    variables = [variable for each in settings for variable in each.metadata["variables"]]
    close = closest(name.upper(), variables) if name.isupper() else closest(name, [each.name for each in settings])
    raise TypeError(f"`{name}` is not a setting of gpuscope{close} The settings are {names}.")


def _checked(setting: Field[Any], name: str, value: object) -> object:
    if isinstance(value, Mapping) and setting.default_factory is dict:
        return _headers(name, value)
    text = _as_text(setting, name, value)
    parse = setting.metadata["parse" if name.upper() in setting.metadata["variables"] else "keyword"]
    try:
        return parse(text)
    except PartlyError as error:
        raise ValueError(f"`{name}`: expected {error}.") from None
    except ValueError as error:
        raise ValueError(f"`{name}`{_seen(setting, value)}: expected {error}.") from None


def _as_text(setting: Field[Any], name: str, value: object) -> str:
    """Return what a variable would say."""
    kind = dict if setting.default_factory is dict else type(setting.default)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, os.PathLike) and kind is str:
        return os.fsdecode(value)
    takes_bool = kind is not str or setting.metadata["keyword"] not in (str, str.strip, path)
    if isinstance(value, Real) and (kind in (bool, int, float) or (isinstance(value, bool) and takes_bool)):
        return str(value)
    if kind is tuple and isinstance(value, list | tuple | set | frozenset):
        odd = [each for each in value if not isinstance(each, str)]
        if not odd:
            return ",".join(value)
        seen = f"has {'None' if odd[0] is None else f'a `{type(odd[0]).__name__}`'} in it"
    else:
        seen = f"is {_type(value)}"
    raise ValueError(f"`{name}` {seen}: expected {_ALLOWED[kind]}.")


def _headers(name: str, value: Mapping[object, object]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for number, (header, content) in enumerate(value.items(), 1):
        if not isinstance(header, str) or not isinstance(content, str) or not is_header(header, content):
            raise ValueError(f"`{name}`: expected texts that HTTP allows as a header, unlike number {number}.")
        pairs[header] = content
    return pairs


def _seen(setting: Field[Any], value: object) -> str:
    if not setting.repr:  # It may hold a credential.
        return ""
    if isinstance(value, str):
        return f" is {shown_text(value)}"
    if isinstance(value, list | tuple | set | frozenset):
        return f" is [{', '.join(shown_text(each) for each in value)}]"
    return f" is {value!r}"


def _type(value: object) -> str:
    return "None" if value is None else f"of type `{type(value).__name__}`"
