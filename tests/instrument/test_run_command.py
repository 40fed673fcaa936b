"""`gpuscope run`: programs behave as without it, and their functions are stages."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import pytest

from gpuscope.__main__ import main

ROOT = Path(__file__).parents[2]
WORKERS = """
import multiprocessing, pickle, sys

def outer(x):
    return inner(x) + 1

def inner(x):
    return x

class Model:
    def forward(self, images):
        return len(images)

def work(results):
    results.put((sys.argv[1:], outer(3)))

if __name__ == "__main__":
    Model().forward([1, 2])
    assert pickle.loads(pickle.dumps(outer)) is outer
    assert type(pickle.loads(pickle.dumps(Model()))) is Model
    context = multiprocessing.get_context(sys.argv[1])
    results = context.SimpleQueue()
    process = context.Process(target=work, args=(results,))
    process.start()
    print(results.get())
    process.join()
"""


SERVICE = """
def infer():
    return b"ran"

async def asgi(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": infer()})

def wsgi(environ, start_response):
    start_response("200 OK", [])
    return [infer()]

app = PROTOCOL
"""
CLOSES_DOWN = """
import gpuscope, os, signal, sys
number, (stopped, stop) = int(sys.argv[1]), os.pipe()
os.set_blocking(stop, False)
signal.set_wakeup_fd(stop)  # A handler in Python may come too late for the `read`.
signal.signal(number, lambda *_: None)
with gpuscope.stage("request"):
    pass
print("ready", flush=True)
os.read(stopped, 1)
print("closed down", flush=True)
signal.signal(number, signal.SIG_DFL)
signal.raise_signal(number)
"""
CLOSES_DOWN_IN_ASYNCIO = """
import asyncio, gpuscope, os, signal, sys
number = int(sys.argv[1])

async def serve():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with gpuscope.stage("request"):
        print("ready", flush=True)
        await stop.wait()
    print("closed down", flush=True)

asyncio.run(serve())
signal.signal(number, signal.SIG_DFL)
os.kill(os.getpid(), number)
"""
WAITS = """
import gpuscope, os, signal, sys
signal.signal(int(sys.argv[1]), signal.SIG_DFL)
with gpuscope.stage("request"):
    pass
gpuscope.flush()
print("ready", flush=True)
signal.pause()
"""

DEFINITIONS = """'The docstring.'
from __future__ import annotations
import asyncio
import app as module
import gpuscope
from app import *
def twice(): pass
twice()
def twice(): return 1
twice()
for _ in range(3):
    def looped(): pass
    looped()
if __doc__ == 'The docstring.':
    def chosen(): pass
else:
    chosen = None
try:
    import nothing
except ImportError:
    def handled(): pass
assigned = lambda: 1
async def asynchronous(): pass
class A:
    class B:
        @classmethod
        def inner(cls): pass
    def own(self): pass
for function in (chosen, handled, starred, assigned, module.attribute, A.B.inner, A().own):
    function()
asyncio.run(asynchronous())
gpuscope.flush()
print(sorted((stage.name, stage.calls) for stage in gpuscope.summary().stages))
"""


@pytest.fixture
def python(tmp_path):
    """Return a function that runs the interpreter in an empty folder, with given variables."""

    def python(*arguments, **variables):
        return subprocess.run(
            [sys.executable, *arguments],
            env={**own_environment(), "GPUSCOPE_EXPORTER": "none", **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return python


@pytest.fixture
def run(python):
    """Return a function that runs a program by `gpuscope run`, which says nothing of its own."""

    def run(*arguments, **variables):
        return python("-m", "gpuscope", "run", *arguments, **{"GPUSCOPE_QUIET": "1", **variables})

    return run


def own_environment():
    """The variables of a process of its own: none of gpuscope's or OpenTelemetry's, whatever this process has."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    return {**kept, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def to_files(folder):
    """Variables that have each process write its spans to a file."""
    return {"GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": str(folder / "{pid}.jsonl")}


def stages_in(folder):
    """The names of the spans in each file."""
    return [stages_of(path) for path in folder.glob("*.jsonl")]


def stages_of(path):
    """The names of the spans in a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scopes = [scope for line in lines for resource in line.get("resourceSpans", ()) for scope in resource["scopeSpans"]]
    return [span["name"] for scope in scopes for span in scope["spans"]]


class TestAsWithoutIt:
    """Output, exit code and state are those of `python`."""

    @pytest.mark.parametrize(
        "program",
        [
            "import sys; print(sys.argv, sys.path, sys.flags, sorted(globals()), __name__, __file__, __spec__)",
            "import sys; sys.exit(7)",
            "import sys; sys.exit('goodbye')",
            "def f():\n    1 / 0\nf()",
            "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('b') from e",
            "raise KeyboardInterrupt",
            "raise BrokenPipeError('mine')",
            "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
            "import signal, __main__ as m; print(signal.getsignal(2), signal.getsignal(15), vars(m) is globals())",
            "x = = 1",
            "import sys\nsys.excepthook = lambda kind, _, trace: print(kind, trace.tb_frame.f_code.co_name)\n1 / 0",
            "import atexit, threading\natexit.register(print, 'last')\nthreading.Timer(0.05, print, ['first']).start()",
            "# -*- coding: latin-1 -*-\nimport __main__, inspect; print(inspect.getsource(__main__))",
        ],
    )
    def test_script(self, run, python, write, program):
        """Standard output, standard error and the exit code are the same, to the byte."""
        write("script.py", program)
        traced, plain = run("script.py", "-a", "--report", "b"), python("script.py", "-a", "--report", "b")
        assert (traced.returncode, traced.stdout, traced.stderr) == (plain.returncode, plain.stdout, plain.stderr)

    def test_main_functions_that_are_stages_keep_their_lines(self, run, write):
        """A traceback through the program shows its own lines, with the stage's frame between them."""
        write("script.py", "import sys\n\ndef f(x):\n    return 1 / x\n\nf(0)\n")
        done = run("--stage", "f=__main__:f", "script.py", GPUSCOPE_EXPORTER="none")
        assert "line 6, in <module>\n    f(0)" in done.stderr
        assert "line 4, in f\n    return 1 / x" in done.stderr
        assert done.stderr.count("gpuscope") == 1

    @pytest.mark.parametrize(
        "arguments", [("-m", "package", "a"), ("-m", "package.part"), ("-c", "import sys; print(sys.argv)", "a")]
    )
    def test_modules_and_code(self, run, python, write, arguments):
        """`-m` and `-c` mean what they mean to `python`."""
        show = "import sys\nprint(sys.argv, sys.path[0], __name__, __file__, __spec__.name, __package__)\n"
        write("package/__init__.py", "")
        write("package/__main__.py", show)
        write("package/part.py", show)
        traced, plain = run(*arguments), python(*arguments)
        assert (traced.returncode, traced.stdout, traced.stderr) == (0, plain.stdout, "")

    def test_a_folder(self, run, python, write):
        """A folder with a `__main__.py` is a program."""
        write("folder/__main__.py", "import sys, beside; print(sys.argv, sys.path[0], __file__)")
        write("folder/beside.py", "")
        assert run("folder", "a").stdout == python("folder", "a").stdout != ""

    def test_a_module_that_is_not_there(self, run):
        """The sentence is Python's, and so is the exit code."""
        done = run("-m", "no_such_module")
        assert done.returncode == 1
        assert done.stderr.endswith(": No module named no_such_module\n")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("missing.py",), "cannot read 'missing.py'"),
            (("--stage", "a=b", "missing.py"), "Invalid stage 'a=b': expected"),
            (("--framework", "nothing", "missing.py"), "Unknown framework 'nothing': expected one of"),
            (("--report", "nowhere/r.html", "-c", "1"), "there is no folder"),
            ((), "PROGRAM"),
        ],
    )
    def test_mistakes_in_the_command(self, run, arguments, said):
        """A mistake in the command ends it before the program begins, with exit code 2."""
        done = run(*arguments)
        assert done.returncode == 2
        assert said in done.stderr

    def test_interrupt_ends_it_by_signal(self, tmp_path, write):
        """A program that is interrupted dies of SIGINT, so that a shell knows."""
        write("script.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsignal.pause()\n")
        done = subprocess.run(
            [sys.executable, "-m", "gpuscope", "run", "script.py"],
            cwd=tmp_path,
            env=own_environment() | {"GPUSCOPE_EXPORTER": "none"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == -signal.SIGINT
        assert done.stderr.endswith("KeyboardInterrupt\n")

    def test_help_names_the_command(self, capsys):
        """The command line knows it."""
        with pytest.raises(SystemExit):
            main(["run", "--help"])
        assert "--framework NAME" in capsys.readouterr().out


class TestStages:
    """Functions named from outside."""

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_main_module_and_children_of_multiprocessing(self, run, write, tmp_path, method):
        """What a script defines is a stage in it and in its children, called by name or by another function."""
        write("script.py", WORKERS)
        more = "inner=script:inner, forward=__main__:Model.forward"
        done = run("--stage", "outer=__main__:outer", "--stage", more, "script.py", method, **to_files(tmp_path))
        assert (done.stdout, done.stderr) == (f"(['{method}'], 4)\n", "")
        assert sorted(map(sorted, stages_in(tmp_path))) == [["forward"], ["inner", "outer"]]

    def test_processes_below(self, run, write, tmp_path):
        """A Python that the program starts by itself learns of the stages, and imports its own `sitecustomize`."""
        write("app.py", "def f():\n    return 1\n")
        write("site/sitecustomize.py", "print('customized')\n")
        write("child.py", "import app\napp.f()\n")
        write("script.py", "import subprocess, sys, app\napp.f()\nsubprocess.run([sys.executable, 'child.py'])\n")
        path = os.pathsep.join([str(ROOT), str(tmp_path / "site")])
        done = run("--stage", "f=app:f", "script.py", PYTHONPATH=path, **to_files(tmp_path))
        assert (done.stdout, done.stderr) == ("customized\ncustomized\n", "")
        assert stages_in(tmp_path) == [["f"], ["f"]]

    def test_what_a_script_defines_in_any_way(self, run, write):
        """A name is a stage as soon as the script has bound it, however it did."""
        write("app.py", "def starred(): pass\ndef attribute(): pass\n")
        write("script.py", DEFINITIONS)
        names = ["twice", "looped", "chosen", "handled", "starred", "assigned", "asynchronous"]
        stages = {**{name: name for name in names}, "module": "module.attribute", "inner": "A.B.inner", "own": "A.own"}
        done = run("--stage", ",".join(f"{stage}=__main__:{path}" for stage, path in stages.items()), "script.py")
        counts = dict.fromkeys(stages, 1) | {"twice": 2, "looped": 3}
        assert (done.stdout, done.stderr) == (f"{sorted(counts.items())}\n", "")

    def test_names_that_a_script_does_not_define(self, run, write):
        """A typo is said before the program runs, or when its class is there; once, with the closest name."""
        write("script.py", "class Model:\n    def forward(self): pass\ndef serve(): pass\n")
        done = run("--stage", "a=__main__:server", "--stage", "b=__main__:Model.forwrd", "script.py")
        assert done.stderr.splitlines() == [
            "gpuscope: __main__:server does not exist: the program has no `server`; did you mean `serve`?",
            "gpuscope: __main__:Model.forwrd does not exist: `Model` has no `forwrd`; did you mean `forward`?",
        ]

    def test_a_module_as_program(self, run, write):
        """A module that is run by `-m` is found by its own name and as `__main__`."""
        write("package/__init__.py", "")
        write(
            "package/serve.py",
            """
            import gpuscope
            def f(): pass
            def g(): pass
            f(), g(), gpuscope.flush()
            print(gpuscope.statistics().recorded)
            """,
        )
        assert run("--stage", "f=package.serve:f, g=__main__:g", "-m", "package.serve").stdout == "2\n"

    def test_off_means_off(self, run, write):
        """`GPUSCOPE=0` runs the program, and replaces nothing."""
        write("script.py", "def f(): pass\nprint(hasattr(f, '__wrapped__'))")
        assert run("--stage", "f=__main__:f", "script.py", GPUSCOPE="0").stdout == "False\n"


class TestWords:
    """What is said of a run, on standard error: where stages go, and at the end a table."""

    def test_a_run_says_where_stages_go_and_prints_the_table(self, run, write, tmp_path):
        """Also off a terminal, because somebody asked for it; standard output is the program's."""
        write("script.py", "def f(): pass\nfor _ in range(5): f()\nprint('ran')\n")
        done = run("--stage", "f=__main__:f", "script.py", **to_files(tmp_path), GPUSCOPE_QUIET="0")
        assert done.stdout == "ran\n"
        lines = done.stderr.splitlines()
        assert lines[0].startswith("gpuscope: recording; stages go to the file ")
        assert sum(line.split()[:2] == ["f", "5"] for line in lines) == 1
        assert lines[-1].startswith("gpuscope: 5 stages recorded, 5 exported to ")
        assert lines[-1].endswith(" shows more.")

    def test_the_table_comes_before_a_signal_ends_the_program(self, run, write):
        """As when a server has closed down and raises the signal again."""
        write("script.py", "import os, signal\ndef f(): pass\nf()\nsignal.raise_signal(signal.SIGTERM)\n")
        done = run("--stage", "f=__main__:f", "script.py", GPUSCOPE_EXPORTER="none", GPUSCOPE_QUIET="0")
        assert done.returncode == -signal.SIGTERM
        assert "gpuscope: 1 stage recorded, exported nowhere." in done.stderr.splitlines()

    def test_a_file_that_was_asked_for_is_there_beside_the_report(self, run, write, tmp_path):
        """`--report` records into files of its own, and hands them on."""
        pytest.importorskip("rich")
        write("script.py", "def f(): pass\nf()\n")
        (tmp_path / "kept.jsonl").write_text("{}\n")
        for at in (1, 2):
            done = run("--stage", "f=__main__:f", "--report", "out.html", "script.py", GPUSCOPE_FILE="kept.jsonl")
            assert done.stderr.endswith(f"out.html, the recording {tmp_path / 'kept.jsonl'}\n")
            assert stages_of(tmp_path / "kept.jsonl") == ["f"] * at
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.jsonl", "out.html", "script.py"]


class TestReport:
    """`--report`."""

    @pytest.mark.parametrize(
        ("end", "code"),
        [
            ("sys.exit(3)", 3),
            ("raise KeyboardInterrupt", -signal.SIGINT),
            ("os._exit(5)", 5),
            ("os.abort()", -signal.SIGABRT),
            ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
            ("signal.signal(1, signal.SIG_DFL); signal.raise_signal(signal.SIGHUP)", -signal.SIGHUP),
            ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ],
    )
    def test_is_written_however_the_program_ends(self, run, write, tmp_path, end, code):
        """One line says where it is and whether it is whole; the exit code is the program's, and nothing is left."""
        pytest.importorskip("rich")
        write("script.py", f"import os, signal, sys\ndef f(): pass\nf()\n{end}\n")
        done = run("--stage", "f=__main__:f", "--report", "out.html", "script.py", TMPDIR=str(tmp_path))
        assert done.returncode == code
        said = done.stderr.splitlines()[-1]
        assert said.startswith(f"gpuscope run: the report is {tmp_path / 'out.html'}")
        assert ("may be missing" in said) is end.startswith(("os", "signal"))
        assert '"f"' in (tmp_path / "out.html").read_text()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "script.py"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("program", [CLOSES_DOWN, CLOSES_DOWN_IN_ASYNCIO, WAITS])
    def test_is_written_when_the_program_is_ended_by_a_signal(self, tmp_path, write, program, number):
        """A server that closes down, puts the default back and raises the signal again has a report of all it did."""
        pytest.importorskip("rich")
        write("script.py", program)
        process = subprocess.Popen(
            [sys.executable, "-m", "gpuscope", "run", "--report", "out.html", "script.py", str(int(number))],
            cwd=tmp_path,
            env=own_environment() | {"GPUSCOPE_METRICS": "none"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (-number, "closed down\n" if program != WAITS else "")
        assert f"gpuscope run: the report is {tmp_path / 'out.html'}" in err
        assert '"request"' in (tmp_path / "out.html").read_text()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "script.py"]

    @pytest.mark.parametrize(
        "server", [("uvicorn", "svc:app", "--workers", "1"), ("gunicorn", "svc:app", "--worker-class", "gthread")]
    )
    def test_is_written_when_a_real_server_is_ended(self, tmp_path, write, server):
        """SIGTERM, as `docker stop` sends it: the server closes down, and the report has its requests."""
        pytest.importorskip("rich")
        pytest.importorskip(server[0])
        write("svc.py", SERVICE.replace("PROTOCOL", "asgi" if server[0] == "uvicorn" else "wsgi"))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        at = ("--port", str(port)) if server[0] == "uvicorn" else ("--bind", f"127.0.0.1:{port}")
        command = ("-m", "gpuscope", "run", "--stage", "infer=svc:infer", "--report", "out.html", "-m", *server, *at)
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=own_environment() | {"GPUSCOPE_METRICS": "none"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = iter(process.stderr.readline, "")
        assert any("running on" in line.lower() or "Listening at" in line for line in lines)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            assert answer.read() == b"ran"
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert f"gpuscope run: the report is {tmp_path / 'out.html'}" in said
        assert "never imported" not in said
        assert '"infer"' in (tmp_path / "out.html").read_text()

    def test_what_watches_the_program_is_out_of_its_sight(self, run, python, write):
        """The program has no child that it did not start, and its signals are as without."""
        pytest.importorskip("rich")
        write(
            "script.py",
            """
            import os, signal
            print([signal.getsignal(number) for number in range(1, 32)])
            try:
                os.wait()
            except ChildProcessError as error:
                print(error)
            print(signal.signal(signalnum=signal.SIGTERM, handler=signal.SIG_DFL))
            """,
        )
        assert run("--report", "out.html", "script.py").stdout == python("script.py").stdout != ""

    @pytest.mark.parametrize(("out", "said"), [("typo/out.html", "there is no folder"), (".", "it is a folder")])
    def test_what_cannot_be_written_is_said_first(self, run, tmp_path, out, said):
        """The program does not run, and no folder is made."""
        done = run("--report", out, "-c", "print('ran')")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert said in done.stderr
        assert not list(tmp_path.iterdir())

    def test_has_all_processes(self, run, write, tmp_path):
        """Children that a program starts are in the report, which is written once."""
        pytest.importorskip("rich")
        write("script.py", WORKERS)
        stages = "outer=__main__:outer, forward=__main__:Model.forward"
        done = run("--stage", stages, "--report", "out.html", "script.py", "spawn")
        assert done.stderr.count("the report is") == 1
        page = (tmp_path / "out.html").read_text()
        assert '"outer"' in page
        assert '"forward"' in page

    def test_without_a_stage(self, run, write):
        """A program without a stage has no report, and a line says why."""
        pytest.importorskip("rich")
        write("script.py", "print('done')")
        done = run("--report", "out.html", "script.py")
        assert (done.returncode, done.stdout) == (0, "done\n")
        assert "no report, because no stage was recorded: name functions by `--stage`" in done.stderr

    def test_does_not_overwrite_the_program(self, run, write):
        """It is refused before the program runs."""
        pytest.importorskip("rich")
        write("script.py", "print('done')")
        done = run("--report", "script.py", "script.py")
        assert (done.returncode, done.stdout) == (2, "")
        assert "is the program, which would be overwritten" in done.stderr
