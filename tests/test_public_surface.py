"""What users can import, and what importing costs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import gpuscope

ROOT = Path(__file__).parents[1]


def test_all_is_the_public_names():
    """`__all__` names what is public in the package, no more and no less."""
    # Submodules become attributes once somebody has imported them.
    public = {name for name, value in vars(gpuscope).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert public | set(gpuscope._LAZY) == set(gpuscope.__all__) - {"__version__"}
    assert set(dir(gpuscope)) >= set(gpuscope.__all__)
    assert all(getattr(gpuscope, name).__doc__ for name in gpuscope.__all__)


def test_submodules_are_attributes(run_python):
    """`gpuscope.testing.capture()` and the like need no second import, and cost nothing until somebody asks."""
    program = (
        "import sys, gpuscope\nassert 'gpuscope.testing' not in sys.modules\n"
        "for name in ('analysis', 'exporters', 'instrument', 'integrations', 'pinned', 'testing'):\n"
        "    assert name in dir(gpuscope) and getattr(gpuscope, name) is sys.modules['gpuscope.' + name]\n"
        "with gpuscope.testing.capture() as spans, gpuscope.stage('s'): pass\n"
        "assert [span.name for span in spans] == ['s']\n"
        "try: gpuscope.nosuch\nexcept AttributeError as error: print(error)\n"
    )
    result = run_python(program, GPUSCOPE="idle")
    assert result.stdout == "module 'gpuscope' has no attribute 'nosuch'\n", result.stderr


def test_import_is_light(run_python):
    """`import gpuscope` imports neither torch nor OpenTelemetry nor numpy, and starts no thread."""
    program = (
        "import sys, threading, gpuscope\n"
        "heavy = {'torch', 'numpy', 'opentelemetry', 'nvtx', 'requests', 'google'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert threading.active_count() == 1\nprint('ok')\n"
    )
    for environment in ({}, {"GPUSCOPE": "0"}, {"GPUSCOPE": "idle"}):
        result = run_python(program, **environment)
        assert result.stdout == "ok\n", result.stderr


def test_import_takes_under_30_milliseconds(run_python, tmp_path):
    """The best of several fresh interpreters, the first of which compiles, stays under the bound."""
    program = "import time; t = time.perf_counter(); import gpuscope; print(time.perf_counter() - t)\n"
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    assert min(float(run_python(program, **compiled).stdout) for _ in range(5)) < 0.030


def test_version_is_one(run_python):
    """The command line, the package and the changelog agree on the version."""
    assert f"## [{gpuscope.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    result = run_python("import sys; from gpuscope.__main__ import main; sys.exit(main(['--version']))")
    assert gpuscope.__version__ in result.stdout


def test_statistics_are_plain_data(bench):
    """`statistics()` and `summary()` can be printed and dumped as JSON."""
    with gpuscope.stage("s"):
        pass
    bench.collect()
    assert json.loads(json.dumps(gpuscope.statistics().as_dict()))["recorded"] == 1
    assert json.dumps(gpuscope.summary().as_dict())
    assert "recorded 1, exported 1, pending 0" in str(gpuscope.statistics())
    assert re.search(r"\bs\b", str(gpuscope.summary()))
