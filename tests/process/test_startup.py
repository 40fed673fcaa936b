"""Python's start: stages by name in a program that nobody changed, and nothing at all for everybody else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("pip")
ROOT = Path(__file__).parents[2]
FILE = "gpuscope-startup.pth"
ON = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": "spans-{pid}.jsonl", "GPUSCOPE_METRICS": "none"}
APP = "def infer(n):\n    return n\n"
MAIN = "import app\nfor n in range(3): app.infer(n)\nprint('ran')\n"
SCRIPT = '''"""A program."""
from __future__ import annotations
import os, sys

def infer(n: int) -> int:
    """Infer."""
    return n

if __name__ == "__main__":
    for n in range(3):
        infer(n)
    print(sys.argv, sys.path[0], __name__, __file__, __spec__, __package__, __doc__, sys.modules["__main__"].infer)
    assert infer.__doc__ == "Infer."
    sys.exit(int(sys.argv[1]) if sys.argv[1:] else 0)
'''


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command without our variables but these."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_", "PYTEST"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def environment_with(folder: Path, *install: object) -> Path:
    """Make an environment that has gpuscope by pip, and all else from where these tests run; return its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "zz_others.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path) + "\n")
    command = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    done = run(*command, "--no-build-isolation", *install, cwd=folder, CC="false")
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What pip needs of the repository, to build it without leaving anything there."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("gpuscope", "integrations"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """The wheel, without its part in C, which would take longer to build."""
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, checkout)
    done = run(*command, cwd=folder, CC="false")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("gpuscope-*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of a fresh environment that has the wheel."""
    return environment_with(tmp_path_factory.mktemp("fresh"), wheel)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with programs."""
    package = tmp_path / "package"
    package.mkdir()
    for name, text in {
        "app.py": APP,
        "main.py": MAIN,
        "serve.py": SCRIPT,
        "package/__init__.py": "",
        "package/serve.py": SCRIPT,
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def stages(folder: Path) -> list[str]:
    """The names of all stages in the recordings."""
    return sorted(
        span["name"]
        for path in folder.glob("spans-*.jsonl")
        for line in path.read_text().splitlines()
        for resource in json.loads(line).get("resourceSpans", ())
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    )


class TestInstalled:
    """The file in `site-packages`."""

    def test_a_wheel_has_the_file_and_lists_it(self, wheel):
        """So that pip removes it with the rest."""
        with ZipFile(wheel) as archive:
            assert FILE in archive.namelist()
            (record,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("RECORD")]
        assert sum(line.startswith(f"{FILE},sha256=") for line in record.splitlines()) == 1

    def test_an_editable_install_has_it_too_and_pip_removes_it(self, checkout, folder, tmp_path_factory):
        """A program without a change has stages, until gpuscope is uninstalled."""
        python = environment_with(tmp_path_factory.mktemp("editable"), "-e", checkout)
        assert run(python, "main.py", cwd=folder, **ON, GPUSCOPE_STAGES="x=app:infer").stdout == "ran\n"
        assert stages(folder) == ["x"] * 3
        run(sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y", "gpuscope", cwd=folder)
        assert not list(python.parents[1].glob(f"lib/python*/site-packages/{FILE}"))


class TestPrograms:
    """Programs that do not import gpuscope, started as ever."""

    @pytest.mark.parametrize(
        ("command", "named"),
        [
            (["main.py"], "x=app:infer"),
            (["-m", "main"], "x=app:infer"),
            (["-I", "-c", "import sys; sys.path.insert(0, ''); import main"], "x=app:infer"),
            (["serve.py"], "x=serve:infer"),
            (["./serve.py", "3"], "x=__main__:infer"),
            (["-P" if sys.version_info >= (3, 11) else "-s", "serve.py"], "x=serve:infer"),
            (["-m", "package.serve", "3"], "x=package.serve:infer"),
            (["-mserve"], "x=__main__:infer"),
        ],
    )
    def test_functions_that_are_named_are_stages(self, python, folder, command, named):
        """And the program sees what it sees without."""
        plain = run(python, *command, cwd=folder)
        traced = run(python, *command, cwd=folder, **ON, GPUSCOPE_STAGES=named)
        assert traced.stderr == plain.stderr
        outputs = [text.partition("ModuleSpec")[0].partition("<function")[0] for text in (traced.stdout, plain.stdout)]
        assert (traced.returncode, outputs[0]) == (plain.returncode, outputs[1])
        assert stages(folder) == ["x"] * 3

    def test_children_of_multiprocessing_have_stages(self, python, folder):
        """Also those that run the main module again, under another name, and are told nothing of `gpuscope`."""
        (folder / "pool.py").write_text(
            f"import multiprocessing\n{APP}"
            "if __name__ == '__main__':\n"
            "    for method in ('spawn', 'forkserver', 'fork'):\n"
            "        process = multiprocessing.get_context(method).Process(target=infer, args=(1,))\n"
            "        process.start(); process.join()\n"
            "        assert process.exitcode == 0\n"
        )
        done = run(python, "pool.py", cwd=folder, **ON, GPUSCOPE_STAGES="x=pool:infer")
        assert (done.returncode, done.stderr) == (0, "")
        assert stages(folder) == ["x"] * 3

    def test_names_in_a_file_and_frameworks_are_followed(self, python, folder):
        """A file of stages, and frameworks whose modules never come, which is said."""
        (folder / "stages.toml").write_text('frameworks = ["vllm"]\n[stages]\nx = "app:infer"\n')
        done = run(python, "main.py", cwd=folder, **ON, GPUSCOPE_STAGES_FILE="stages.toml", GPUSCOPE_FRAMEWORKS="timm")
        assert done.stdout == "ran\n"
        assert all("nothing of the framework" in said for said in done.stderr.splitlines())
        assert "framework timm is" in done.stderr
        assert stages(folder) == ["x"] * 3

    @pytest.mark.parametrize("module", ["json:dumps", "numpy:zeros", "opentelemetry.trace:get_tracer"])
    def test_what_gpuscope_itself_imports_may_be_named(self, python, folder, module):
        """It is imported once, and not while it is being imported."""
        name, _, function = module.partition(":")
        arguments = {"dumps": "1", "zeros": "1", "get_tracer": "'x'"}[function]
        program = f"import {name}\nassert {name}.{function}({arguments}) is not None\nprint('ran')"
        done = run(python, "-c", program, cwd=folder, **ON, GPUSCOPE_STAGES=f"x={module}")
        assert (done.stdout, done.stderr) == ("ran\n", "")
        assert "x" in stages(folder)

    def test_beside_gpuscope_run_a_function_is_one_stage(self, python, folder):
        """The command sees to it; Python's start stands aside."""
        command = (python, "-m", "gpuscope", "run", "main.py")
        done = run(*command, cwd=folder, **ON, GPUSCOPE_STAGES="x=app:infer", GPUSCOPE_QUIET="1")
        assert (done.stdout, done.stderr) == ("ran\n", "")
        assert stages(folder) == ["x"] * 3

    def test_an_error_is_the_programs(self, python, folder):
        """Its last lines are as without, and so is the exit code."""
        (folder / "serve.py").write_text(f"{APP}infer(1)\nraise ValueError('mine')\n")
        plain = run(python, "serve.py", cwd=folder)
        traced = run(python, "serve.py", cwd=folder, **ON, GPUSCOPE_STAGES="x=serve:infer")
        assert (traced.returncode, traced.stderr.splitlines()[-3:]) == (1, plain.stderr.splitlines()[-3:])
        (folder / "serve.py").write_text("def infer(:\n")
        assert "SyntaxError" in run(python, "serve.py", cwd=folder, **ON, GPUSCOPE_STAGES="x=serve:infer").stderr


def test_a_program_that_nobody_asked_is_told_at_its_end(python, folder):
    """With GPUSCOPE=1 and no stage, a program that uses PyTorch; one that does not, and a tool, are none of ours."""
    (folder / "torch.py").write_text("")
    (folder / "main.py").write_text("import torch\nprint('ran')\n")
    done = run(python, "main.py", cwd=folder, **ON)
    assert done.stderr.startswith("gpuscope: GPUSCOPE is set, and nothing is recorded: ")
    assert "GPUSCOPE_STAGES=name=module:function" in done.stderr
    for command in (["-c", "import torch"], ["-c", "pass"], ["app.py"], ["-m", "torch"]):
        assert run(python, *command, cwd=folder, **ON).stderr == ""
    assert run(python, "main.py", cwd=folder, **{**ON, "GPUSCOPE_STARTUP": "0"}).stderr == ""
    done = run(python, "main.py", cwd=folder, **ON, GPUSCOPE_STAGES="x=model:infer")
    assert done.stderr == "gpuscope: `model` of GPUSCOPE_STAGES was never imported, so nothing in it is a stage.\n"
    done = run(python, "main.py", cwd=folder, **ON, GPUSCOPE_FRAMEWORKS="transformers")
    assert done.stderr == (
        "gpuscope: `transformers` of GPUSCOPE_FRAMEWORKS was never imported, so nothing in it is a stage.\n"
    )
    assert run(python, "main.py", cwd=folder, **ON, GPUSCOPE_FRAMEWORKS="all").stderr == ""


class TestEverybodyElse:
    """Tools, and programs that do not want it."""

    SEES = "import sys; print(sorted(name for name in sys.modules if 'gpuscope' in name or name == 'torch'))"

    def test_without_a_variable_nothing_is_imported(self, python, folder):
        """Whatever is set besides: the line in `site-packages` looks at two names."""
        assert run(python, "-c", self.SEES, cwd=folder, GPUSCOPE_FILE="x").stdout == "[]\n"

    @pytest.mark.parametrize(
        "variables",
        [
            {**ON},
            {**ON, "GPUSCOPE_STAGES": "x=app:infer", "GPUSCOPE_STARTUP": "0"},
            {**ON, "GPUSCOPE_STAGES": "x=app:infer", "GPUSCOPE": "0"},
            {**ON, "GPUSCOPE_STAGES": "x=app:infer"},
            {**ON, "GPUSCOPE_FRAMEWORKS": "all"},
            {**ON, "GPUSCOPE_STAGES_FILE": "nowhere.toml"},
        ],
    )
    def test_gpuscope_is_not_imported_until_a_module_comes(self, python, folder, variables):
        """Nor is torch; and nothing is said."""
        done = run(python, "-c", self.SEES, cwd=folder, **variables)
        assert "'gpuscope'" not in done.stdout
        assert "torch" not in done.stdout
        assert done.stderr == ""

    @pytest.mark.parametrize("switch", [{"GPUSCOPE_STARTUP": "0"}, {"GPUSCOPE": "0"}])
    def test_it_can_be_switched_off(self, python, folder, switch):
        """Then the module comes and nothing happens."""
        done = run(python, "main.py", cwd=folder, **{**ON, "GPUSCOPE_STAGES": "x=app:infer", **switch})
        assert (done.stdout, done.stderr, stages(folder)) == ("ran\n", "", [])
        done = run(python, "-S", "main.py", cwd=folder, **ON, GPUSCOPE_STAGES="x=app:infer")
        assert (done.stdout, done.stderr, stages(folder)) == ("ran\n", "", [])

    @pytest.mark.parametrize("named", ["x=app:infer", "x=__main__:infer", "nonsense", "=:,{", "x=__main__:infer,y=é:f"])
    @pytest.mark.parametrize("tool", [["-m", "pip", "--version"], ["-m", "json.tool", "--help"], ["-m", "this"]])
    def test_tools_print_what_they_print(self, python, folder, tool, named):
        """Whatever a shell exports, it is for programs."""
        plain = run(python, *tool, cwd=folder)
        traced = run(python, *tool, cwd=folder, **ON, GPUSCOPE_STAGES=named)
        assert (traced.returncode, traced.stdout, traced.stderr) == (plain.returncode, plain.stdout, plain.stderr)

    def test_a_gpuscope_that_cannot_be_imported_stops_nobody(self, python, folder):
        """The program runs without it."""
        broken = folder / "gpuscope"
        broken.mkdir()
        (broken / "__init__.py").write_text("raise RuntimeError('broken')")
        done = run(python, "main.py", cwd=folder, **ON, GPUSCOPE_STAGES="x=app:infer", PYTHONPATH=str(folder))
        assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")

    def test_another_interpreter_in_the_process_goes_on(self, python, folder):
        """It starts as the first one does."""
        program = (
            "import app, sys\nprint(app.infer(1), flush=True)\n"
            "try: import _interpreters as interpreters\n"
            "except ImportError: import _xxsubinterpreters as interpreters\n"
            "made = interpreters.create()\n"
            "interpreters.run_string(made, 'print(1 + 1, flush=True)')\ninterpreters.destroy(made)\n"
        )
        done = run(python, "-c", program, cwd=folder, **ON, GPUSCOPE_STAGES="x=app:infer")
        assert (done.returncode, done.stdout) == (0, "1\n2\n"), done.stderr

    def test_it_costs_next_to_nothing_where_nothing_is_set(self, python, folder):
        """Less than a millisecond, on a busy machine; `benchmarks/bench_import.py` has the figure."""
        program = (
            "import site, time, glob, os, sys\n"
            "path, *_ = [found for each in sys.path for found in glob.glob(each + '/gpuscope-startup.pth')]\n"
            "took = []\n"
            "for _ in range(20):\n"
            "    began = time.perf_counter(); site.addpackage(*os.path.split(path), set())\n"
            "    took.append(time.perf_counter() - began)\n"
            "print(min(took))\n"
        )
        assert float(run(python, "-c", program, cwd=folder).stdout) < 1e-3
