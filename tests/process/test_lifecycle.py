"""On, off, exit, fork: what is exported when a process ends, and that nothing can hold it up."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

HEAD = """
import os, sys, json, gpuscope, threading, signal
from gpuscope import stage
@stage("work")
def work(n=1):
    for _ in range(n):
        with stage("inner"):
            pass
def report(where="out"):
    open(where, "w").write(json.dumps(gpuscope.statistics().as_dict()))
"""
ON = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": "spans-{pid}.jsonl", "GPUSCOPE_INTERVAL": "30"}


def names(folder: Path) -> dict[str, list[str]]:
    """Names of the spans in each file, by process."""
    found = {}
    for path in sorted(folder.glob("spans-*.jsonl")):
        spans = []
        for line in path.read_text().splitlines():
            for resource in json.loads(line).get("resourceSpans", ()):
                for scope in resource["scopeSpans"]:
                    spans.extend(span["name"] for span in scope["spans"])
        found[path.name] = sorted(spans)
    return found


class TestModes:
    """Absent, idle and on."""

    def test_unset_and_zero_leave_functions_as_they_are(self, run_python):
        """Without the variable, or with 0, a decorated function is the function, and a block does nothing."""
        program = HEAD + (
            "def f(): return 1\n"
            "assert stage(f) is f and stage('x')(f) is f and stage('x', attributes={'a': 1})(f) is f\n"
            "c = classmethod(f); assert stage(c) is c\n"
            "with stage('x') as s: s.set_attribute('a', 1)\n"
            "work(3); assert not gpuscope.is_enabled() and gpuscope.statistics().recorded == 0\n"
            "assert gpuscope.flush() and gpuscope.shutdown() and threading.active_count() == 1\n"
            "print(gpuscope.summary()); print(gpuscope.statistics()); print('ok')\n"
        )
        for environment in ({}, {"GPUSCOPE": "0"}, {"GPUSCOPE": "off"}):
            result = run_python(program, **environment)
            assert result.stdout.endswith("ok\n"), result.stderr

    def test_what_cannot_be_a_stage_is_refused_when_off_too(self, run_python):
        """Switching recording on must not be the day on which a program fails at import."""
        result = run_python(HEAD + "@stage\nclass A: pass\n")
        assert "Decorate its methods instead" in result.stderr

    def test_idle_records_once_enabled(self, run_python):
        """With `idle` decorated functions can be switched on and off at run time."""
        program = HEAD + (
            "assert not gpuscope.is_enabled(); work(); gpuscope.enable(exporters='none'); work(2); gpuscope.disable()\n"
            "work(5); gpuscope.enable(); work(); gpuscope.flush(); report(); print(gpuscope.statistics().recorded)\n"
        )
        result = run_python(program, GPUSCOPE="idle")
        assert result.stdout == "5\n", result.stderr

    def test_enable_at_run_time_without_the_variable(self, run_python):
        """`enable()` works in any mode for blocks and for functions decorated after it."""
        program = HEAD + (
            "gpuscope.enable(exporters='none')\n"
            "@stage\ndef late(): pass\n"
            "late(); work(2); gpuscope.flush(); print(gpuscope.statistics().recorded)\n"
        )
        assert run_python(program).stdout == "3\n"

    def test_summary_is_up_to_date(self, run_python):
        """`summary()` has every stage that has ended, also those of a moment ago, and sends nothing for it."""
        program = HEAD + (
            "work(3); text = str(gpuscope.summary()); assert 'inner' in text and 'work' in text, text\n"
            "print(gpuscope.statistics().recorded)\n"
        )
        result = run_python(program, **{**ON, "GPUSCOPE_EXPORTER": "none"})
        assert result.stdout == "4\n", result.stderr

    def test_other_settings_begin_a_new_period(self, run_python):
        """Enabling with other settings exports what was recorded first."""
        program = HEAD + (
            "gpuscope.enable(exporters='file', file='spans-a.jsonl'); work(1)\n"
            "gpuscope.enable(exporters='file', file='spans-b.jsonl'); work(2); assert gpuscope.flush()\n"
        )
        result = run_python(program, GPUSCOPE="idle")
        folder = Path(result.args[3]).parent
        assert {name: len(spans) for name, spans in names(folder).items()} == {"spans-a.jsonl": 2, "spans-b.jsonl": 3}

    def test_bad_settings_are_refused_at_once(self, run_python):
        """`enable` raises for what can't be, before anything is recorded."""
        program = HEAD + (
            "for bad in ({'exporters': 'pigeon'}, {'queue': 1}, {'exporters': 'file', 'file': '/nowhere/x'}):\n"
            "    try: gpuscope.enable(**bad)\n"
            "    except (TypeError, ValueError) as error: print(error)\n"
        )
        lines = run_python(program).stdout.splitlines()
        assert ["pigeon" in lines[0], "not a setting" in lines[1], "no directory" in lines[2]] == [True] * 3

    def test_malformed_variable_warns_once_and_the_program_runs(self, run_python):
        """A typo in a variable never stops a program."""
        result = run_python(HEAD + "work(); print('ran')", **{**ON, "GPUSCOPE_QUEUE_SIZE": "lots"})
        assert result.stdout == "ran\n"
        assert result.stderr.count("GPUSCOPE_QUEUE_SIZE") == 1

    def test_one_line_when_recording_starts(self, run_python):
        """The start says where spans go."""
        program = "import logging; logging.basicConfig(level='INFO')\n" + HEAD + "work()"
        result = run_python(program, **ON)
        assert result.stderr.count("recording starts: exporter file") == 1


class TestExit:
    """The ways in which a process ends."""

    @pytest.mark.parametrize(
        ("ending", "code"),
        [
            ("", 0),
            ("sys.exit(3)", 3),
            ("raise ValueError('uncaught')", 1),
            ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); os.kill(os.getpid(), signal.SIGTERM)", 4),
            ("threading.Thread(target=work, args=(3,)).start()", 0),
        ],
    )
    def test_every_stage_is_exported_at_exit(self, run_python, tmp_path, ending, code):
        """However the interpreter ends, what was recorded is exported, and the exit code is the program's."""
        result = run_python(HEAD + "work(3)\n" + ending, **ON)
        assert result.returncode == code, result.stderr
        ((_, spans),) = names(tmp_path).items()
        assert spans[:4] == ["inner"] * 3 + (["inner"] if "Thread" in ending else ["work"])
        assert "gpuscope" not in result.stderr

    def test_shutdown_twice_and_stages_after_it_are_harmless(self, run_python):
        """After `shutdown` nothing is recorded and nothing fails."""
        program = HEAD + "work(); assert gpuscope.shutdown() and gpuscope.shutdown(); work(9); report(); print('ok')"
        result = run_python(program, **ON)
        assert result.stdout == "ok\n"
        assert json.loads((Path(result.args[3]).parent / "out").read_text())["recorded"] == 2

    @pytest.mark.parametrize("how", ["hangs", "refuses"])
    def test_endpoint_cannot_hold_the_exit(self, run_python, how):
        """An endpoint that hangs or refuses costs at most the deadline, and the loss is said."""
        program = HEAD + (
            "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0))\n"
            f"if {how == 'hangs'}: s.listen()\n"
            "gpuscope.enable(exporters='otlp', otlp_endpoint=f'http://127.0.0.1:{s.getsockname()[1]}/v1/traces')\n"
            "work(5)\n"
        )
        started = time.monotonic()
        result = run_python(program, GPUSCOPE="idle", GPUSCOPE_SHUTDOWN_TIMEOUT="1")
        assert result.returncode == 0
        assert "some stages were not exported" in result.stderr
        assert time.monotonic() - started < 12


SDK = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
def provide():
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter(formatter=lambda span: span.name + "\\n")))
    trace.set_tracer_provider(provider)
"""


class TestProviderAtExit:
    """The application's provider ends with the program, too."""

    @pytest.mark.parametrize("order", ["provide(); work()", "work(); provide(); work()"])
    def test_stages_reach_the_provider_before_it_shuts_down(self, run_python, order):
        """A provider shuts itself down at exit; what was recorded a moment before is with it by then."""
        result = run_python(HEAD + SDK + order, **{**ON, "GPUSCOPE_EXPORTER": "sdk"})
        assert result.returncode == 0, result.stderr
        names = result.stdout.split()
        assert names.count("work") == order.count("work")
        assert "inner" in names
        assert "not exported" not in result.stderr


class TestChildren:
    """Processes that a recording process starts."""

    @pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
    def test_fork_starts_the_child_clean_and_leaves_the_parent_alone(self, run_python, tmp_path):
        """The child exports its own stages only, as a process of its own; the parent goes on."""
        program = HEAD + (
            "work(2)\n"
            "with stage('around'):\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        work(1)\n"
            "if child == 0:\n"
            "    assert gpuscope.flush(); report('child'); gpuscope.shutdown(); os._exit(0)\n"
            "work(1); assert os.waitpid(child, 0)[1] == 0; assert gpuscope.flush(); report('parent')\n"
        )
        result = run_python(program, **ON)
        assert result.returncode == 0, result.stderr
        assert sorted(names(tmp_path).values()) == sorted(
            [
                ["inner", "work"],
                ["around", "inner", "inner", "inner", "work", "work"],
            ]
        )
        assert json.loads((tmp_path / "child").read_text())["recorded"] == 2
        assert json.loads((tmp_path / "parent").read_text())["recorded"] == 6

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_multiprocessing_children_export_what_they_recorded(self, run_python, tmp_path, method):
        """A child of `multiprocessing` exports at its end, by either method of starting."""
        program = HEAD + (
            "import multiprocessing\n"
            "if __name__ == '__main__':\n"
            f"    context = multiprocessing.get_context('{method}')\n"
            "    work(1)\n"
            "    children = [context.Process(target=work, args=(2,)) for _ in range(2)]\n"
            "    [child.start() for child in children]; [child.join() for child in children]\n"
            "    assert [child.exitcode for child in children] == [0, 0]\n"
        )
        result = run_python(program, **ON)
        assert result.returncode == 0, result.stderr
        assert sorted(names(tmp_path).values()) == [["inner", "inner", "work"]] * 2 + [["inner", "work"]]

    @pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
    def test_what_a_child_of_multiprocessing_does_after_its_work_is_exported(self, run_python, tmp_path, method):
        """Its threads and the finalizers of the program come after the function that it was made for."""
        program = HEAD + (
            "import multiprocessing, multiprocessing.util\n"
            "def last(over):\n"
            "    over.wait(); work(1)\n"
            "def child():\n"
            "    over = threading.Event(); threading.Thread(target=last, args=(over,)).start(); work(1)\n"
            "    multiprocessing.util.Finalize(None, work, (1,), exitpriority=-5)\n"
            # From Python 3.14 on a child waits for its threads first.
            "    multiprocessing.util.Finalize(None, over.set, exitpriority=-(1 << 31))\n"
            "    if sys.version_info >= (3, 14): over.set()\n"
            "if __name__ == '__main__':\n"
            f"    process = multiprocessing.get_context('{method}').Process(target=child)\n"
            "    process.start(); process.join()\n"
            "    assert process.exitcode == 0\n"
        )
        result = run_python(program, **ON)
        assert result.returncode == 0, result.stderr
        (spans,) = names(tmp_path).values()
        assert spans == ["inner"] * 3 + ["work"] * 3

    def test_subprocess_inherits_the_variables_and_exports_its_own(self, run_python, tmp_path):
        """A subprocess is a process like any other."""
        child = tmp_path / "child.py"
        child.write_text(HEAD + "work(1)")
        program = HEAD + f"import subprocess; work(2); subprocess.run([{sys.executable!r}, 'child.py'], check=True)"
        result = run_python(program, **ON)
        assert result.returncode == 0, result.stderr
        assert sorted(names(tmp_path).values()) == [["inner", "inner", "work"], ["inner", "work"]]

    def test_trace_ids_differ_though_everybody_seeds_alike(self, run_python, tmp_path):
        """Ids do not come from the global generator, which frameworks seed identically on all ranks."""
        program = "import random; random.seed(0)\n" + HEAD + "random.seed(0); work()"
        ids = set()
        for _ in range(2):
            assert run_python(program, **ON).returncode == 0
        for path in tmp_path.glob("spans-*.jsonl"):
            spans = json.loads(path.read_text().splitlines()[0])["resourceSpans"][0]["scopeSpans"][0]["spans"]
            ids |= {span["traceId"] for span in spans}
        assert len(ids) == 2


def test_signals_are_the_application_s():
    """Nothing of ours installs a signal handler."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    from gpuscope import testing

    with testing.capture():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_no_secret_is_in_the_log(run_python):
    """Whatever its level, the log shows neither user, password and query of the endpoint's URL, nor headers."""
    program = (
        "import logging; logging.basicConfig(level=1)\nimport gpuscope\nwith gpuscope.stage('a'):\n    pass\n"
        "gpuscope.flush(5); print(gpuscope.statistics())"
    )
    url = "http://user:hunter2@127.0.0.1:1"
    for endpoint in (f"{url}/v1/traces?token=hunter2", f"{url}/hunter?2@x", "http://user:hunter2#3@127.0.0.1:1"):
        done = run_python(
            program,
            GPUSCOPE="1",
            GPUSCOPE_SHUTDOWN_TIMEOUT="1",
            OTEL_EXPORTER_OTLP_TIMEOUT="1",
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=endpoint,
            OTEL_EXPORTER_OTLP_HEADERS="key=hunter2,hunter2,k=hunter2%0A",
        )
        assert "lost 1" in done.stdout
        assert "cannot export to" in done.stderr
        assert "hunter" not in (done.stdout + done.stderr).replace("127.0.0.1:1/hunter", "")


EXIT = """
import atexit, sys, weakref
EARLY
import gpuscope
from gpuscope import stage
PROVIDER
class Thing: pass
def drain(name):
    with stage(name): pass
thing = Thing()
weakref.finalize(thing, drain, "finalizer")
atexit.register(drain, "handler")
with stage("body"): pass
"""
PROVIDER = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
PROVIDER = TracerProvider()
PROVIDER.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter(formatter=lambda s: "span " + s.name + chr(10))))
trace.set_tracer_provider(PROVIDER)
"""


def test_stages_of_handlers_at_exit_are_exported(run_python):
    """What the program records when it ends, in `atexit` and in finalizers, is in the file."""
    result = run_python(EXIT.replace("EARLY", "").replace("PROVIDER", ""), **ON)
    (spans,) = names(Path(result.args[3]).parent).values()
    assert spans == ["body", "finalizer", "handler"], result.stderr


@pytest.mark.parametrize("where", ["threading.Thread(target=last).start()", "pool.submit(last); pool.submit(last)"])
def test_first_stages_after_the_main_thread_are_exported(run_python, where):
    """Threads of the program go on after its last line, and may be the first to record."""
    program = HEAD + (
        "import concurrent.futures.thread\n"
        "def last():\n"
        "    while not concurrent.futures.thread._shutdown: pass\n"
        "    work(1)\n"
        "pool = concurrent.futures.ThreadPoolExecutor(2)\n"
        f"{where}\n"
    )
    result = run_python(program, **ON)
    (spans,) = names(Path(result.args[3]).parent).values()
    assert set(spans) == {"work", "inner"}, result.stderr
    assert "not exported" not in result.stderr


def test_stages_of_handlers_that_outlive_recording_are_counted(run_python):
    """A handler that was registered before gpuscope was imported runs after its end: its stages are counted."""
    early = "def last():\n    with stage('last'): pass\n    print(gpuscope.statistics())\natexit.register(last)"
    result = run_python(EXIT.replace("EARLY", early).replace("PROVIDER", ""), **ON)
    assert "recorded 4, exported 3, pending 0, dropped 1 (after_shutdown 1), lost 0" in result.stdout, result.stderr


def test_a_provider_that_ends_at_exit_gets_what_there_is(run_python):
    """Stages before the provider's own handler go through it; of those after it, the log says that they are lost."""
    program = EXIT.replace("EARLY", "").replace("PROVIDER", PROVIDER, 1)
    result = run_python(program, GPUSCOPE="1", GPUSCOPE_METRICS="none")
    assert result.stdout.split("\n").count("span body") == 1, result.stderr
    # Both handlers were registered after the provider's, and so run before it.
    assert {"span handler", "span finalizer"} <= set(result.stdout.split("\n"))
    early = "import atexit\natexit.register(lambda: drain('late'))\n"
    program = EXIT.replace("EARLY", "").replace("PROVIDER", early + PROVIDER, 1)
    result = run_python(program, GPUSCOPE="1", GPUSCOPE_METRICS="none")
    assert "span late" not in result.stdout
    assert "1 provider_shutdown" in result.stderr


def test_threads_that_never_stop_do_not_keep_the_end_from_ending(run_python):
    """Daemon threads that are always in stages cost nothing of what was recorded before, nor the exit its time."""
    program = HEAD + (
        "work(3); go = threading.Event()\n"
        "def load():\n"
        "    while True:\n        with stage('load'): go.set()\n"
        "threading.Thread(target=load, daemon=True).start(); go.wait()\n"
    )
    began = time.monotonic()
    result = run_python(program, **{**ON, "GPUSCOPE_QUEUE_SIZE": "100000"}, GPUSCOPE_SHUTDOWN_TIMEOUT="30")
    assert time.monotonic() - began < 30
    (spans,) = names(Path(result.args[3]).parent).values()
    assert spans.count("work") == 1, result.stderr
    assert "shutdown" not in result.stderr


@pytest.mark.parametrize("mode", ["", "0"])
@pytest.mark.parametrize("switch", ["gpuscope.enable(exporters='none', metrics='none')", "gpuscope.testing.capture()"])
def test_what_was_decorated_too_early_is_named_once(run_python, mode, switch):
    """Functions that gpuscope left alone while it was off for good are named when recording starts, with what to do."""
    program = (
        "import gpuscope\n"
        "@gpuscope.stage('a')\ndef infer(): pass\n"
        "class Model:\n    @gpuscope.stage\n    def forward(self): pass\n"
        "gpuscope.instrument.instrument('dump=json:dumps')\n"
        f"for _ in range(2): context = {switch}; context and context.__enter__()\n"
        "@gpuscope.stage('later')\ndef later(): pass\n"
    )
    said = run_python(program, GPUSCOPE=mode).stderr.splitlines()
    assert len([line for line in said if "GPUSCOPE=idle" in line]) == 1, said
    assert said[0].startswith("gpuscope: `infer`, `Model.forward`, `json:dumps` will not be recorded")


def test_names_of_what_was_decorated_too_early_are_few(run_python):
    """Five are named, and the rest are a number."""
    program = (
        "import gpuscope\nfor i in range(30): exec(f'@gpuscope.stage\\ndef f{i}(): pass')\n"
        "gpuscope.enable(exporters='none', metrics='none')\n"
    )
    assert "`f4` and 25 more will not be recorded" in run_python(program).stderr


class TestImportedAgain:
    """gpuscope is imported more than once in a process; its parts in C are there once."""

    def test_stages_of_an_earlier_import_go_on(self, run_python):
        """After `sys.modules` was purged, what was decorated before and what is decorated now are both recorded."""
        program = (
            "import sys, gpuscope\nold = gpuscope\n"
            # An import that has begun in the collector's thread is not purged under its feet.
            "@old.stage('f')\ndef f(): return 1\nf(); assert old.flush(20)\n"
            "for name in [name for name in sys.modules if name.split('.')[0] == 'gpuscope']: del sys.modules[name]\n"
            "import gpuscope as new\nassert new is not old\n"
            "@new.stage('g')\ndef g():\n    with old.stage('block'): return f()\n"
            "assert g() == 1\n"
            "with old.stage('outer'), new.stage('inner'), old.stage('innermost'): f()\n"
            "for each in (old, new):\n    each.flush(20); account = each.statistics()\n"
            "    print(account.recorded, sum(account.lost.values()))\n"
        )
        result = run_python(program, GPUSCOPE="1", GPUSCOPE_EXPORTER="none", GPUSCOPE_METRICS="none")
        assert result.stdout == "6 0\n2 0\n", result.stdout + result.stderr
        assert result.returncode == 0

    @pytest.mark.parametrize("isolated", [True, False])
    @pytest.mark.parametrize("mode", ["1", "idle", "0"])
    def test_a_sub_interpreter_changes_nothing_here(self, run_python, mode, isolated):
        """There the import succeeds, whatever is recorded there, and the main interpreter's stages go on."""
        renamed = sys.version_info >= (3, 13)
        module = "_interpreters" if renamed else "_xxsubinterpreters"
        pytest.importorskip(module)
        kind = repr("isolated" if isolated else "legacy") if renamed else f"isolated={isolated}"
        program = (
            f"import gpuscope, {module} as interpreters\nwith gpuscope.stage('before'): pass\n"
            "code = 'import gpuscope\\nwith gpuscope.stage(\"s\"): pass\\n'\n"
            "code += 'assert gpuscope.stage(\"f\")(abs)(-1) == 1'\n"
            f"there = interpreters.create({kind})\nassert interpreters.run_string(there, code) is None\n"
            "@gpuscope.stage('f')\ndef f(): pass\nf()\ngpuscope.flush(20)\n"
            # Without an end: it would be that of the other interpreter, whose threads that module takes for its own.
            "import os; print(gpuscope.statistics().recorded, flush=True); os._exit(0)\n"
        )
        result = run_python(program, GPUSCOPE=mode, GPUSCOPE_EXPORTER="none", GPUSCOPE_METRICS="none")
        assert result.stdout == ("2\n" if mode == "1" else "0\n"), result.stdout + result.stderr


def test_statistics_in_finalizers_at_the_end_of_the_interpreter(run_python):
    """The account answers where nothing can be imported any more."""
    ended = run_python(
        """
import builtins, os, gpuscope
class Late:
    def __del__(self, gpuscope=gpuscope, write=os.write):
        write(1, str(gpuscope.statistics().recorded).encode())
builtins.late = Late()
gpuscope.enable(exporters="none")
with gpuscope.stage("a"):
    pass
gpuscope.flush()
"""
    )
    assert (ended.stdout.strip(), ended.stderr) == ("1", "")
