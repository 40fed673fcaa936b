"""What is installed, and the two commands of the README."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import gpuscope

ROOT = Path(__file__).parents[1]
ENVIRONMENT = "python -m venv .venv && . .venv/bin/activate && pip install "


def test_every_package_is_installed():
    """The packages that are listed for the wheel are all that there are: one left out is missing only for users."""
    tomllib = pytest.importorskip("tomllib", reason="from Python 3.11 on")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "gpuscope").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    # Installed under a name of its own, because importing a part of gpuscope imports gpuscope.
    assert set(listed) == found - {"gpuscope._startup"} | {"_gpuscope_startup", "gpuscope.integrations"}


def test_integrations_are_part_of_the_package():
    """The folder `integrations` at the top is imported as `gpuscope.integrations`."""
    assert importlib.import_module("gpuscope.integrations").__doc__


def test_types_are_declared():
    """The marker by which type checkers use our annotations is installed with them."""
    assert Path(gpuscope.__file__).with_name("py.typed").exists()


@pytest.mark.parametrize("rest", ['".[demo]" && gpuscope demo', '-e ".[test]" && pytest'])
def test_readme_has_both_commands(rest):
    """The README gives the demo and the tests as a line each; `.ci/run` runs the latter from there."""
    assert ENVIRONMENT + rest in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
