"""What people are told: on a terminal, at the start and at the end; and who is left in peace."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import threading

import pytest

from gpuscope._log import LastResort, logger, say, shows_information

HEAD = "import gpuscope, os, sys\n@gpuscope.stage('infer')\ndef infer(): pass\n"
WORK = f"{HEAD}for _ in range(5): infer()\n"
PROCESS = """
if __name__ == "__main__":
    import multiprocessing
    process = multiprocessing.get_context("METHOD").Process(target=infer)
    process.start(); process.join()
"""
ON = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": "spans.jsonl", "GPUSCOPE_METRICS": "none"}


@pytest.fixture
def on_a_terminal(tmp_path):
    """Return a function that runs a program with a terminal as its standard error; it returns both outputs."""

    def run(program: str, *, stdout: int = subprocess.PIPE, **variables: str) -> tuple[str, str]:
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
        (tmp_path / "program.py").write_text(program)
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "program.py"], cwd=tmp_path, env=kept | variables, stdout=stdout, stderr=theirs
        )
        os.close(theirs)
        seen = bytearray()

        def read() -> None:
            while True:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # The other side is closed.
                    return
                if not part:
                    return
                seen.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        out, _ = process.communicate(timeout=100)
        reader.join()
        os.close(ours)
        return (out or b"").decode(), seen.decode().replace("\r\n", "\n")

    return run


class TestOnATerminal:
    """A person sits there."""

    def test_where_stages_go_and_the_table_are_said_once(self, on_a_terminal):
        """The first line comes at the start, the table and the file's name at the end; nothing to standard output."""
        out, said = on_a_terminal(WORK + "sys.stderr.write('between\\n')\n", **ON)
        first, between, *table, last = said.splitlines()
        assert out == ""
        assert (first, between) == ("gpuscope: recording; stages go to the file spans.jsonl.", "between")
        assert [line.split()[:2] for line in table].count(["infer", "5"]) == 1
        assert last == (
            "gpuscope: 5 stages recorded, 5 exported to spans.jsonl. `gpuscope report spans.jsonl` shows more."
        )

    def test_an_install_without_a_compiler_is_said(self, on_a_terminal):
        """Not only by `gpuscope doctor`; and not to those who asked for it."""
        hidden = f"import sys\nsys.modules['gpuscope._native'] = None\n{WORK}"
        first = on_a_terminal(hidden, **ON)[1].splitlines()[0]
        assert first.endswith(
            "Each costs three times as much as it could: the parts in C were not built (`gpuscope doctor`)."
        )
        assert "three times" not in on_a_terminal(hidden, **ON, GPUSCOPE_NATIVE="0")[1]

    def test_enabling_says_so_again_for_another_place(self, on_a_terminal):
        """And not for the same."""
        program = (
            f"{HEAD}for _ in range(2): gpuscope.enable(exporters='none')\ngpuscope.enable(file='a', exporters='file')"
        )
        _, said = on_a_terminal(program, GPUSCOPE="idle")
        starts = [line for line in said.splitlines() if line.startswith("gpuscope: recording")]
        assert starts == [
            "gpuscope: recording; stages go nowhere; `gpuscope.summary()` has their figures.",
            "gpuscope: recording; stages go to the file a.",
        ]

    def test_what_became_of_the_others_is_said(self, on_a_terminal):
        """Stages that the sampler left out are no loss, and not silent."""
        _, said = on_a_terminal(WORK, **ON, OTEL_TRACES_SAMPLER="always_off")
        assert "0 exported to spans.jsonl; not exported: 5 unsampled (left out by the sampler)." in said

    def test_that_keep_has_kept_nothing_is_said(self, on_a_terminal, tmp_path):
        """Then a report has nothing to show, and says why."""
        _, said = on_a_terminal(WORK, **ON, GPUSCOPE_KEEP="slower=1h")
        last = said.splitlines()[-1]
        assert last == "gpuscope: 5 stages recorded, none exported to spans.jsonl: keep has kept none of 5."
        command = [sys.executable, "-m", "gpuscope", "report", "spans.jsonl"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, "(5 not_kept)" in done.stderr) == (2, False)
        assert "no stages in 'spans.jsonl': keep has kept none of 5; see GPUSCOPE_KEEP of the program." in done.stderr

    def test_what_captures_took_is_recorded(self, on_a_terminal):
        """A program that records by `capture()` alone has stages."""
        program = f"{HEAD}import gpuscope.testing\nwith gpuscope.testing.capture() as spans: infer()\nprint(len(spans))"
        out, said = on_a_terminal(program, **ON)
        assert int(out) > 0
        assert "no stage was recorded" not in said

    @pytest.mark.parametrize(
        ("change", "variables"),
        [
            ("", {"GPUSCOPE_QUIET": "1"}),
            ("import logging; logging.getLogger('gpuscope').setLevel(logging.ERROR)\n", {}),
            ("import _pytest.config\n", {}),
            ("", {"LOCAL_RANK": "3"}),
        ],
    )
    def test_those_who_want_nothing_hear_nothing(self, on_a_terminal, change, variables):
        """By a variable, by the log's level, under pytest, and in all ranks but the first."""
        assert on_a_terminal(change + WORK, **ON, **variables) == ("", "")

    def test_a_program_with_a_log_sees_it_there_and_not_twice(self, on_a_terminal):
        """With the level `INFO` each line is a record."""
        _, said = on_a_terminal(f"import logging; logging.basicConfig(level='INFO')\n{WORK}", **ON)
        assert said.count("5 stages recorded") == said.count("recording starts") == 1
        assert "gpuscope: recording;" not in said

    @pytest.mark.parametrize(
        "child",
        [
            "if os.fork() == 0: infer(); sys.exit()\nos.wait()\n",
            PROCESS.replace("METHOD", "fork"),
            PROCESS.replace("METHOD", "spawn"),
        ],
    )
    def test_children_say_nothing(self, on_a_terminal, child):
        """They have stages of their own; their parent speaks."""
        program = f"{HEAD}if __name__ == '__main__': infer()\n{child}"
        _, said = on_a_terminal(program, **{**ON, "GPUSCOPE_FILE": "spans-{pid}.jsonl"})
        assert said.count("gpuscope: recording") == 1
        assert said.count("stages of this process") == 1

    def test_a_parent_without_stages_is_not_scolded(self, on_a_terminal):
        """A launcher leaves the work to its children."""
        _, said = on_a_terminal(f"{HEAD}if os.fork() == 0: infer(); sys.exit()\nos.wait()\n", **ON)
        assert "no stage" not in said

    @pytest.mark.parametrize(
        "close", ["sys.stderr.close()", "sys.stderr = None", "os.close(2)", "sys.stderr = object()"]
    )
    def test_a_closed_standard_error_does_no_harm(self, on_a_terminal, close):
        """The program ends as it would."""
        out, said = on_a_terminal(f"{WORK}{close}\nprint('ran')\nimport atexit; atexit.register(print, 'end')", **ON)
        assert out == "ran\nend\n"
        assert "Traceback" not in said

    def test_an_error_of_the_programs_is_the_last_but_not_blamed(self, on_a_terminal):
        """A program that fails before its first stage hears nothing of stages."""
        _, said = on_a_terminal(f"{HEAD}raise ValueError('mine')", **ON, PYTHON_COLORS="0")
        assert said.rstrip().endswith("ValueError: mine")


IN_VAIN = {
    "slow": ({"GPUSCOPE_FLIGHT_SLOW": "250ms"}, "GPUSCOPE_FLIGHT_SLOW has no effect: GPUSCOPE_FLIGHT names no file"),
    "stall": ({"GPUSCOPE_STALL": "90s"}, "GPUSCOPE_STALL (90 s) is longer than GPUSCOPE_EVENT_DEADLINE (60 s)"),
    "reply": ({"GPUSCOPE_TRACE_HEADER": "x-trace-id"}, "GPUSCOPE_TRACE_HEADER had no effect: no request's headers"),
    "header": ({"GPUSCOPE_KEEP": "share=1, header=x-force"}, "`header=` of GPUSCOPE_KEEP had no effect: no request's"),
}


@pytest.mark.parametrize("what", IN_VAIN)
def test_a_setting_in_vain_is_said_once(what, run_python):
    """Where nothing comes of it beside the other settings, or in this program."""
    variables, expected = IN_VAIN[what]
    done = run_python(WORK + "gpuscope.enable(warmup=7)\ninfer()\n", **ON, **variables)
    assert done.stderr.count(expected) == 1, done.stderr


@pytest.mark.parametrize("variables", [{"GPUSCOPE_FLIGHT": "flight"}, {"GPUSCOPE_EVENT_DEADLINE": "100"}])
def test_a_setting_that_has_what_it_needs_is_not_said(variables, run_python):
    """The slow requests are copied, the stalls are seen, and headers are read."""
    program = f"{WORK}with gpuscope.extract({{}}): infer()\n"
    asked = {"GPUSCOPE_TRACE_HEADER": "x-trace-id", "GPUSCOPE_KEEP": "share=1, header=x-force"}
    asked["GPUSCOPE_FLIGHT_SLOW" if "GPUSCOPE_FLIGHT" in variables else "GPUSCOPE_STALL"] = "90s"
    assert run_python(program, **ON, **asked, **variables).stderr == ""


class TestLog:
    """The handler of last resort."""

    def test_each_line_says_who_speaks(self, capsys, monkeypatch):
        """Also of a text of several lines; letters that the terminal lacks become question marks."""
        say("one\ntwo")
        assert capsys.readouterr().err == "gpuscope: one\ngpuscope: two\n"
        say("first\ntable", every_line=False)
        assert capsys.readouterr().err == "gpuscope: first\ntable\n"

    def test_it_leaves_the_programs_handlers_alone(self, capsys):
        """Where there is one, ours is silent; here it is pytest's."""
        record = logging.LogRecord("gpuscope", logging.WARNING, "", 1, "said", (), None)
        LastResort().emit(record)
        assert capsys.readouterr().err == ""

    def test_there_is_one_of_it(self):
        """However often the package is imported."""
        assert [type(handler).__name__ for handler in logger.handlers].count("LastResort") == 1
        assert not shows_information() or logger.isEnabledFor(logging.INFO)
