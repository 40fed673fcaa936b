"""`profile`: the deep look at a program that runs, with the real torch.profiler on the CPU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

import gpuscope
from gpuscope.__main__ import main
from gpuscope._profiling.deep_look import DeepLook
from gpuscope._profiling.on_demand import OnDemand
from gpuscope._profiling.session import ProfilingSession, _OpenRange
from gpuscope._recording.state import state

HERE = Path(gpuscope.__file__).parents[1]
ONES = torch.ones(8, 8)


def request(inner="infer"):
    """One request with a stage in it that calls PyTorch."""
    with gpuscope.stage("request"), gpuscope.stage(inner):
        return ONES @ ONES


def trace_of(look, tmp_path):
    """The trace of a look that has ended."""
    return json.loads(look.save(tmp_path)[0].read_text())


def ranges(trace):
    """The names of the annotations in a trace, in the order of their starts."""
    found = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


class TestLoop:
    """A look at a few requests of a loop."""

    def test_begins_after_the_warmup_and_ends_by_itself(self, bench, tmp_path):
        """So many requests pass, so many are profiled, and the loop goes on without the profiler."""
        done = []
        with gpuscope.profile(requests=2, warmup=3) as look:
            for _ in range(8):
                request()
                done.append((look.done, torch.autograd.profiler._is_profiler_enabled))
        assert done == [(False, False)] * 2 + [(False, True)] * 2 + [(True, False)] * 4
        assert ranges(trace_of(look, tmp_path)) == ["request", "infer"] * 2
        assert {stage.name: stage.calls for stage in look.report.stages} == {"request": 2, "infer": 2}

    def test_how_long_stages_take_before_is_noted(self, bench, tmp_path):
        """In the trace, by request and stage, and of no stage that was watched; so the look can allow for itself."""
        with gpuscope.profile(requests=2, warmup=3) as look:
            for _ in range(5):
                request()
        noted = trace_of(look, tmp_path)["gpuscope"]["unwatched"]
        assert {(root, name) for root, name, _ in noted} == {("request", "request"), ("request", "infer")}
        assert all(ns > 0 for *_, ns in noted)

    def test_without_a_warmup_nothing_is_noted(self, bench, tmp_path):
        """There is nothing before."""
        with gpuscope.profile(requests=1, warmup=0) as look:
            request()
        assert trace_of(look, tmp_path)["gpuscope"]["unwatched"] == []

    def test_every_request_is_recorded_as_always(self, bench):
        """Recording takes no notice: each stage is a span, and each NVTX range is opened and closed."""
        with gpuscope.profile(requests=2, warmup=1):
            for _ in range(5):
                request()
        assert [span.name for span in bench.named("request") if span.kind == "host"] == ["request"] * 5
        assert len(bench.nvtx.log) == 10
        assert bench.nvtx.stack == []
        assert bench.statistics().lost == {}

    def test_nothing_is_left_on_the_hot_path(self, bench):
        """As soon as the last profiled request has ended, recording is as it was before."""
        with gpuscope.profile(requests=1, warmup=1) as look:
            assert bench.engine.recorder.nvtx is not bench.nvtx
            for _ in range(2):
                request()
            assert look.done
            assert bench.engine.recorder.nvtx is bench.nvtx

    def test_recording_switched_off_meanwhile(self):
        """Where another thread switches recording off as a look begins, that is said, and nothing is left on."""
        ended = []
        with contextlib.ExitStack() as period:
            period.callback(ended.append, True)
            look = DeepLook(ProfilingSession(1, 0), lambda _: period)
            with pytest.raises(RuntimeError, match=r"switched off.*call `gpuscope.disable"), look:
                pass
        assert (ended, state.look) == ([True], None)

    def test_a_stage_open_across_the_end_of_a_look_is_closed_rightly(self, bench):
        """A stage that began in the look and ends after it closes its range; only then is the look gone."""
        held = gpuscope.stage("held")
        with gpuscope.profile(requests=1, warmup=0) as look:
            held.__enter__()
            inside = threading.Thread(target=request)
            inside.start()
            inside.join()
            assert look.done
            held.__exit__(None, None, None)
            assert bench.engine.recorder.nvtx is bench.nvtx
        assert bench.nvtx.stack == []
        assert [span.name for span in bench.named("held") if span.kind == "host"] == ["held"]

    def test_a_stage_open_since_before_a_look_is_closed_rightly(self, bench):
        """A stage that began before the look closes the range that it opened, and is no profiled request."""
        with gpuscope.stage("before"):
            look = gpuscope.profile(requests=1, warmup=0)
            look.__enter__()
        assert not look.done
        request()
        assert look.done
        look.__exit__(None, None, None)
        assert bench.nvtx.stack == []
        assert {stage.name for stage in look.report.stages} == {"request", "infer"}

    def test_requests_of_all_threads_are_seen(self, bench):
        """A service's requests run on threads of its own, and their operators are in the trace."""
        with gpuscope.profile(requests=3, warmup=0) as look:
            for name in ("a", "b", "c"):
                thread = threading.Thread(target=request, args=(name,))
                thread.start()
                thread.join()
        assert {stage.name for stage in look.report.stages} == {"request", "a", "b", "c"}

    def test_stages_of_interleaved_tasks(self, bench):
        """Stages of tasks that take turns on a thread all count and all close their ranges."""

        async def task():
            """Give way in the middle of a stage."""
            with gpuscope.stage("task"):
                await asyncio.sleep(0)
                ONES + ONES

        async def both():
            """Let two tasks take turns."""
            await asyncio.gather(task(), task())

        with gpuscope.profile(requests=2, warmup=0) as look:
            asyncio.run(both())
        assert look.done
        assert not look.why
        assert bench.nvtx.started == []

    def test_an_exception_passes_and_counts_as_an_end(self, bench):
        """A request that raises is a request, and the exception is the program's."""
        with gpuscope.profile(requests=1, warmup=0) as look:
            with pytest.raises(KeyError), gpuscope.stage("request"):
                raise KeyError
            assert look.done
        assert [stage.name for stage in look.report.stages] == ["request"]

    def test_warm_up_calls_are_no_requests(self, bench):
        """What `gpuscope.warm_up` runs is not what anybody wants to see profiled."""
        with gpuscope.profile(requests=1, warmup=0) as look:
            gpuscope.warm_up(lambda: None, iterations=3)
            assert not look.done

    def test_records_for_its_length_where_nothing_did(self):
        """With recording off the look switches it on for itself, and off again."""
        assert not gpuscope.is_enabled()
        with gpuscope.profile(requests=1, warmup=1) as look:
            assert gpuscope.is_enabled()
            for _ in range(2):
                request()
        assert not gpuscope.is_enabled()
        assert look.report is not None

    def test_goes_with_recording_that_begins_anew(self, bench):
        """A program that calls `enable` with other settings during a look is still looked at."""
        with gpuscope.profile(requests=1, warmup=1) as look:
            request()
            with gpuscope.testing.capture():
                request()
        assert look.done
        assert not look.why


class TestNoLook:
    """Where there can be none, the program runs as without and a sentence says why."""

    def test_another_profiler_is_on(self, bench, caplog):
        """Another profiler keeps all its events, and the loop runs unprofiled."""
        other = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with other, gpuscope.profile(requests=1, warmup=1) as look:
            for _ in range(4):
                request()
        assert "another profiler is on" in look.why
        assert "another profiler is on" in caplog.text
        assert look.report is None
        assert sum(event.count for event in other.key_averages() if event.key == "aten::matmul") == 4
        assert bench.engine.recorder.nvtx is bench.nvtx

    def test_another_look_is_on(self, bench):
        """Of two looks at a time the second does not happen, and the first is not harmed."""
        with gpuscope.profile(requests=1, warmup=1) as first:
            with gpuscope.profile(requests=1, warmup=1) as second:
                request()
                request()
            request()
        assert "another deep look is on" in second.why
        assert first.report is not None
        assert bench.engine.recorder.nvtx is bench.nvtx

    def test_too_few_requests(self, bench, caplog, tmp_path):
        """A loop that ends within the warm-up is told so, and goes on: nothing is saved, with a warning."""
        with gpuscope.profile(requests=1, warmup=5) as look:
            request()
        assert "1 requests (outermost stages) ended, and 5 are to pass" in str(look)
        assert look.save(tmp_path / "nowhere") == []
        assert not (tmp_path / "nowhere").exists()
        assert "there is no deep look to save: 1 requests" in caplog.text

    def test_what_is_still_on_is_not_saved(self, bench):
        """That is a mistake of whoever wrote it, who is told what to do."""
        with (
            gpuscope.profile(requests=1, warmup=5) as look,
            pytest.raises(RuntimeError, match="still on; leave its `with` block first"),
        ):
            look.save("nowhere")

    def test_fewer_requests_than_asked_for_are_looked_at(self, bench):
        """A loop that ends early has a look at what there was."""
        with gpuscope.profile(requests=5, warmup=1) as look:
            for _ in range(3):
                request()
        assert {stage.calls for stage in look.report.stages} == {2}

    def test_without_torch(self, run_python):
        """A program that has not imported PyTorch runs on."""
        program = (
            "import gpuscope\nwith gpuscope.profile(requests=1, warmup=1) as look:\n"
            "    for _ in range(3):\n        with gpuscope.stage('request'):\n            pass\nprint(look)\n"
        )
        done = run_python(program)
        assert done.stdout == "No deep look: the program has not imported PyTorch.\n"

    def test_torch_may_be_imported_late(self, run_python):
        """A program that imports PyTorch in its first request has its look after that one."""
        program = (
            "import gpuscope\nwith gpuscope.profile(requests=1, warmup=1) as look:\n    for _ in range(3):\n"
            "        with gpuscope.stage('request'):\n            import torch\nprint(look.report.stages[0].name)\n"
        )
        assert run_python(program).stdout == "request\n"

    @pytest.mark.parametrize(
        "arguments", [{"requests": 0}, {"warmup": -1}, {"requests": "3"}, {"requests": 1.5}, {"warmup": None}]
    )
    def test_misuse_raises(self, arguments):
        """Numbers that make no sense are refused at once, with what is allowed."""
        with pytest.raises((TypeError, ValueError), match="expected"):
            gpuscope.profile(**arguments)


SCRIPT = """
import sys
import torch
import gpuscope

@gpuscope.stage("infer")
def infer(x):
    return x @ x

def serve(count):
    for _ in range(count):
        with gpuscope.stage("request"):
            infer(torch.ones(4, 4))

if __name__ == "__main__":
    serve(int(sys.argv[1]))
    def annotated(number: int): pass
    print(sys.argv[1:], __file__, sys.path[0], annotated.__annotations__)
    raise SystemExit(3)
"""
FAILING = "import sys\n\ndef fail():\n    raise ValueError(sys.argv[1])\n\nprint('before')\nfail()\n"


@pytest.fixture
def python(tmp_path):
    """Return a function that runs Python in an empty folder, as a user does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}

    def run(*arguments, **variables):
        environment = kept | {"PYTHONPATH": str(HERE)} | variables
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


class TestCommand:
    """`gpuscope profile`."""

    def test_script_runs_as_without_and_is_looked_at(self, python, tmp_path):
        """Arguments, paths, output and exit code are the script's; the report and the trace are in the folder."""
        (tmp_path / "serve.py").write_text(SCRIPT)
        plain = python("serve.py", "9", "--flag")
        looked = python("-m", "gpuscope", "profile", "--requests", "2", "--out", "here", "serve.py", "9", "--flag")
        assert (looked.stdout, looked.returncode) == (plain.stdout, plain.returncode)
        assert "`infer`" in looked.stderr
        assert (tmp_path / "here/report.txt").read_text() in looked.stderr
        assert ranges(json.loads((tmp_path / "here/trace.json").read_text())) == ["request", "infer"] * 2
        found = json.loads((tmp_path / "here/report.json").read_text())
        assert [(stage["name"], stage["calls"]) for stage in found["stages"]] == [("request", 2), ("infer", 2)]

    def test_traceback_is_as_without(self, python, tmp_path):
        """An exception ends the script with its own traceback and code, and none of our lines in it."""
        (tmp_path / "fail.py").write_text(FAILING)
        plain = python("fail.py", "reason")
        looked = python("-m", "gpuscope", "profile", "fail.py", "reason")
        assert (looked.stdout, looked.returncode) == (plain.stdout, plain.returncode) == ("before\n", 1)
        last = plain.stderr.rindex('File "')
        assert plain.stderr[last:] in looked.stderr
        assert looked.stderr.endswith(plain.stderr)
        assert "commands" not in looked.stderr
        assert "No deep look" in looked.stderr

    def test_module(self, python, tmp_path):
        """`-m` runs a module as Python does."""
        (tmp_path / "package").mkdir()
        (tmp_path / "package/__main__.py").write_text("import sys\nprint(__name__, sys.argv[1:])\nsys.exit('text')\n")
        plain = python("-m", "package", "-x", "1")
        looked = python("-m", "gpuscope", "profile", "-m", "package", "-x", "1")
        assert (looked.stdout, looked.returncode) == (plain.stdout, plain.returncode)
        assert "text" in looked.stderr

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_folder_or_an_archive(self, python, tmp_path, packed):
        """A folder or an archive with a `__main__.py` is a program, which imports what is beside that."""
        program = {"__main__.py": SCRIPT.replace("import sys", "import sys, beside", 1), "beside.py": ""}
        (tmp_path / "app").mkdir()
        with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
            for name, text in program.items():
                (tmp_path / "app" / name).write_text(text)
                archive.writestr(name, text)
        name = "app.zip" if packed else "app"
        plain = python(name, "9")
        looked = python("-m", "gpuscope", "profile", "--requests", "2", name, "9")
        assert (looked.stdout, looked.returncode) == (plain.stdout, plain.returncode) != ("", 3)
        assert "`infer`" in looked.stderr

    def test_interrupt_ends_it_by_signal(self, python, tmp_path):
        """A script that is interrupted dies of SIGINT, as without, and what was seen is said."""
        (tmp_path / "script.py").write_text(SCRIPT.replace("raise SystemExit(3)", "raise KeyboardInterrupt"))
        looked = python("-m", "gpuscope", "profile", "--requests", "2", "script.py", "9")
        assert looked.returncode == -signal.SIGINT
        assert "`infer`" in looked.stderr
        assert looked.stderr.endswith("KeyboardInterrupt\n")

    def test_reads_a_trace_that_is_there(self, bench, tmp_path, capsys):
        """`--trace` says what `profile` said, and writes it on request."""
        with gpuscope.profile(requests=1, warmup=0) as look:
            request()
        look.save(tmp_path)
        assert main(["profile", "--trace", str(tmp_path / "trace.json"), "--out", str(tmp_path / "new")]) == 0
        assert capsys.readouterr().out == f"{look}\n"
        assert (tmp_path / "new/report.txt").read_text() == f"{look}\n"

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ([], "give a script"),
            (["missing.py"], "missing.py"),
            (["--trace", "missing.json"], "missing.json"),
            (["--trace", __file__], "cannot read"),
        ],
    )
    def test_what_cannot_be_done_is_said(self, arguments, says, capsys):
        """Bad usage and unreadable files end with 2 and a sentence."""
        assert main(["profile", *arguments]) == 2
        assert says in capsys.readouterr().err


def wait_for_look(on_demand, recorder):
    """Run requests until the look that was asked for has ended, and return nothing: its folder tells."""
    on_demand.poll(recorder)
    while on_demand._thread is not None and on_demand._thread.is_alive():
        request()


def test_no_request_waits_while_the_profiler_is_prepared():
    """That takes seconds, in a thread of its own; a request that ends meanwhile does not count."""
    session = ProfilingSession(1, 0, when_enough=lambda: None)
    opened, done = _OpenRange(None, request=True), threading.Event()

    def request():
        session.leave(opened)
        done.set()

    with session._lock:  # As `begin` holds it.
        thread = threading.Thread(target=request)
        thread.start()
        assert done.wait(20)
    thread.join()
    assert session.passed == 0
    session.leave(opened)
    assert session.passed == 1


BUSY = """
import sys, threading, torch, gpuscope
from gpuscope import _runtime
from gpuscope._profiling.session import ProfilingSession

gpuscope.enable(exporters="none")
ones, done = torch.ones(8, 8), threading.Event()

def work():
    while not done.is_set():
        with gpuscope.stage("request"), gpuscope.stage("infer"):
            ones @ ones

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
recorder, looks = _runtime.state.recorder, 0
while looks < 8:
    enough = threading.Event()
    session = ProfilingSession(3, 0, when_enough=enough.set)
    session.attach(recorder)
    session.begin()
    if not session.why:
        enough.wait(30)
    session.finish()
    if not session.why:
        looks += 1
        session.save("trace.json")
done.set()
for thread in threads:
    thread.join()
print("alive after", looks)
"""


def test_looks_at_busy_threads_leave_the_program_alive(run_python):
    """PyTorch's profiler, ended while other threads are within, crashes the process now and then: nobody is within."""
    done = run_python(BUSY)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "alive after 8" in done.stdout


class TestOnDemand:
    """A look into a service that runs, when somebody asks for it."""

    def test_by_a_file(self, bench, tmp_path):
        """The file is taken away, its look ends by itself, and trace and report lie beside where it was."""
        wish = tmp_path / "look"
        on_demand = OnDemand(str(wish))
        on_demand.poll(bench.engine.recorder)
        assert on_demand._thread is None
        wish.touch()
        wait_for_look(on_demand, bench.engine.recorder)
        assert not wish.exists()
        (folder,) = tmp_path.iterdir()
        assert {file.name for file in folder.iterdir()} == {"trace.json", "report.txt", "report.json"}
        assert "`request`" in (folder / "report.txt").read_text()
        assert json.loads((folder / "trace.json").read_text())["gpuscope"]["unwatched"]
        assert bench.engine.recorder.nvtx is bench.nvtx

    def test_in_a_folder_where_others_may_write(self, bench, tmp_path, monkeypatch):
        """What somebody put where the result would go is left alone, and what they put into the folder is not run."""
        monkeypatch.chdir(tmp_path)
        victim, wish, taken = tmp_path / "victim", tmp_path / "look", tmp_path / f"look-{os.getpid()}-1"
        victim.write_text("precious")
        taken.mkdir()
        (taken / "trace.json").symlink_to(victim)
        (taken / "report.txt").symlink_to(victim)
        for name in ("gpuscope.py", "json.py", "torch.py"):
            (tmp_path / name).write_text("raise SystemExit('not ours')")
        wish.touch()
        on_demand = OnDemand(str(wish))
        wait_for_look(on_demand, bench.engine.recorder)
        (folder,) = set(tmp_path.glob("look-*")) - {taken}
        assert victim.read_text() == "precious"
        assert "`request`" in (folder / "report.txt").read_text()
        assert folder.stat().st_mode & 0o777 == 0o700

    def test_by_a_signal(self, bench, tmp_path, monkeypatch):
        """SIGUSR2 asks for one look; its result is in the working directory."""
        monkeypatch.chdir(tmp_path)
        before = signal.getsignal(signal.SIGUSR2)
        try:
            on_demand = OnDemand("signal")
            os.kill(os.getpid(), signal.SIGUSR2)
            wait_for_look(on_demand, bench.engine.recorder)
            on_demand.poll(bench.engine.recorder)
            assert not on_demand._thread.is_alive()
        finally:
            signal.signal(signal.SIGUSR2, before)
        assert (tmp_path / f"gpuscope-profile-{os.getpid()}-1/report.json").exists()

    def test_a_handler_of_the_program_stays(self, caplog):
        """A program with a use for SIGUSR2 keeps its handler, and is told what to do instead."""

        def handler(*_):
            """Be the program's."""

        before = signal.signal(signal.SIGUSR2, handler)
        try:
            OnDemand("signal")
            assert signal.getsignal(signal.SIGUSR2) is handler
        finally:
            signal.signal(signal.SIGUSR2, before)
        assert "use the path of a file" in caplog.text

    def test_off_the_main_thread(self, caplog):
        """Where Python lets no handler be set, it says so and goes on."""
        thread = threading.Thread(target=OnDemand, args=("signal",))
        thread.start()
        thread.join()
        assert "main thread" in caplog.text

    def test_another_profiler_is_on(self, bench, tmp_path, caplog):
        """The wish is taken, refused in a sentence, and nothing is written."""
        (tmp_path / "look").touch()
        on_demand = OnDemand(str(tmp_path / "look"))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            wait_for_look(on_demand, bench.engine.recorder)
        assert "another profiler is on" in caplog.text
        assert list(tmp_path.iterdir()) == []

    def test_in_a_process_with_the_variable(self, python, tmp_path):
        """The collector sees the file, and the program ends as ever."""
        (tmp_path / "look").touch()
        program = (
            "import pathlib, torch, gpuscope\nwhile not list(pathlib.Path().glob('look-*/report.txt')):\n"
            "    with gpuscope.stage('request'):\n        torch.ones(4) + 1\nprint('done')\n"
        )
        done = python("-c", program, GPUSCOPE="1", GPUSCOPE_EXPORTER="none", GPUSCOPE_PROFILE="./look")
        assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr

    def test_a_malformed_wish_is_named(self):
        """A value that is neither warns, and there are no looks on demand."""
        config, (complaint,) = gpuscope._settings.config.Config.from_env({"GPUSCOPE_PROFILE": "yes"})
        assert config.profile == ""
        assert "a / in it" in complaint
