"""
What every Python process below `gpuscope run` imports when it starts: this folder is first on its `PYTHONPATH`.

Imports gpuscope, which does what the variables say, and then the `sitecustomize` that this one hides. Raises nothing of
gpuscope's.
"""
# ruff: noqa: INP001 - a folder with one file for Python to find, not a package

import contextlib
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent

with contextlib.suppress(Exception):  # Another Python, which has no gpuscope: its program is not ours to stop.
    import gpuscope  # noqa: F401
    from gpuscope._recording.state import state

    if state.instrumentation is not None:
        state.instrumentation.is_asked = False

_spec = PathFinder.find_spec("sitecustomize", [folder for folder in sys.path if Path(folder).resolve() != _HERE])
if _spec is not None and _spec.loader is not None:
    sys.modules["sitecustomize"] = _module = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
