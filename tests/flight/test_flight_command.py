"""`gpuscope flight`: a file becomes a recording, and what it ended with is said."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gpuscope import __main__ as program
from gpuscope import stage
from gpuscope._data import flight as layout
from gpuscope._flight.dumps import Dumps
from gpuscope.analysis.figures import figures
from gpuscope.analysis.read import read

from ..exporters.receiver import Receiver


@pytest.fixture
def path(make_bench, tmp_path):
    """The file of a process that has served 20 requests, and hangs in the next one."""
    path = tmp_path / "flight"
    bench = make_bench(flight=str(path), flight_bytes=layout.LEAST_BYTES)
    for _ in range(20):
        with stage("request"):
            bench.clock.advance(0.01)
            with stage("infer"):
                bench.clock.advance(0.03)
    bench.collect()
    request, infer = stage("request"), stage("infer")
    request.__enter__()
    bench.clock.advance(1)
    infer.__enter__()
    bench.clock.advance(5)
    bench.engine.recorder.poll_flight()
    yield path
    infer.__exit__(None, None, None)
    request.__exit__(None, None, None)


def test_a_file_becomes_a_recording(path, tmp_path, capsys):
    """All stages of the host and of the GPU; those that have not ended are marked, and end with the last moment."""
    assert program.main(["flight", str(path), "--output", str(tmp_path / "out.jsonl")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "42 stages" in said
    assert "which still runs" in said
    assert "- request > infer: for 5.00 s, thread MainThread, trace " in said
    recording = read([tmp_path / "out.jsonl"])
    assert (len(recording.stage), int(recording.not_ended.sum())) == (42, 2)
    took = (recording.host_end_ns - recording.host_start_ns)[recording.not_ended]
    assert took.tolist() == pytest.approx([6e9, 5e9], abs=100)
    assert not sum(recording.losses.skipped_lines.values())
    assert int(recording.measured.sum()) == 40


def test_a_copy_of_a_process_that_went_on_says_so(path, tmp_path, capsys):
    """Whether that ended well was not known when it was made."""
    with path.open("rb") as file:
        data = bytearray(file.read())
    copy = Dumps(tmp_path / "copied", data).make("slow")
    assert program.main(["flight", str(copy), "--output", str(tmp_path / "out.jsonl")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "which ran on when this copy was made. This copy was made because of: slow." in said


def test_what_runs_counts_in_no_percentile(path, tmp_path):
    """It is a call, and neither warm-up nor of a known duration."""
    program.main(["flight", str(path), "--output", str(tmp_path / "out.jsonl")])
    (request,) = figures(read([tmp_path / "out.jsonl"])).requests
    assert (request.calls, request.warmup_calls, request.only_warmup) == (21, 0, False)
    assert request.host_ms.count == 20
    assert request.host_ms.max == pytest.approx(40)


def test_a_report_and_a_timeline_are_made_of_it(path, tmp_path, capsys):
    """What runs is named."""
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    program.main(["flight", str(path), "--output", str(out)])
    assert program.main(["report", str(out), "--html", str(page), "--json", str(tmp_path / "out.json")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Not ended, and in no percentile of what has: request for 6.00 s, infer for 5.00 s." in said
    assert json.loads((tmp_path / "out.json").read_text())["requests"][0]["calls"] == 21
    assert page.stat().st_size > 10_000


def test_a_report_of_a_first_request_that_hangs(make_bench, tmp_path, capsys, monkeypatch):
    """There is nothing else to say of it. Unless told otherwise, the recording is written here, not beside the file."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    bench = make_bench(flight=str(tmp_path / "flight"), flight_bytes=layout.LEAST_BYTES)
    with stage("request"):
        bench.clock.advance(2)
        bench.engine.recorder.poll_flight()
        program.main(["flight", str(tmp_path / "flight")])
    assert program.main(["report", str(tmp_path / "here" / "flight.jsonl")]) == 0
    assert "takes 2.00 s so far (1 not ended)" in " ".join(capsys.readouterr().out.split())


def test_it_is_sent(path, tmp_path):
    """To an endpoint, as what the `file` exporter wrote is."""
    program.main(["flight", str(path), "--output", str(tmp_path / "out.jsonl")])
    receiver = Receiver()
    done = subprocess.run(
        [sys.executable, "-m", "gpuscope", "send", str(tmp_path / "out.jsonl"), "--endpoint", receiver.endpoint],
        capture_output=True,
        text=True,
        check=False,
    )
    receiver.close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 42 stages" in done.stdout


def test_standard_output_is_a_file_too(path, capfd):
    """Nothing else is printed then."""
    assert program.main(["flight", str(path), "--output", "-"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert len(json.loads(line)["resourceSpans"]) == 1


def test_what_cannot_be_read_is_said(tmp_path, capsys):
    """One sentence, and 2."""
    (tmp_path / "other").write_text("something")
    for name, why in (("nowhere", "No such file"), ("other", "not the file of a flight recorder")):
        assert program.main(["flight", str(tmp_path / name)]) == 2
        assert why in capsys.readouterr().err


def test_a_file_without_stages_is_said(make_bench, tmp_path, capsys):
    """There is nothing to show."""
    make_bench(flight=str(tmp_path / "flight"), flight_bytes=layout.LEAST_BYTES)
    assert program.main(["flight", str(tmp_path / "flight")]) == 2
    assert "no stage is in" in capsys.readouterr().err


def test_our_commands_make_no_file(run_python, tmp_path):
    """With the variables of the service in the shell they read its file; `gpuscope run` makes one for its program."""
    flight = str(tmp_path / "flight")
    program_of_users = "import gpuscope\nwith gpuscope.stage('request'): pass\n"
    (tmp_path / "serve.py").write_text(program_of_users)
    environ = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "none", "GPUSCOPE_FLIGHT": flight}

    def command(*arguments):
        text = "import runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_module('gpuscope', run_name='__main__')"
        return run_python(text, str(tmp_path / "gpuscope"), *arguments, **environ)

    assert command("flight", flight).returncode == 2
    assert not (tmp_path / "flight").exists()
    assert command("run", str(tmp_path / "serve.py")).returncode == 0
    inode = (tmp_path / "flight").stat().st_ino
    done = command("flight", flight)
    assert (done.returncode, "1 stage of" in done.stdout) == (0, True), done.stderr
    assert (tmp_path / "flight").stat().st_ino == inode


def test_the_file_itself_is_not_overwritten(path, capsys):
    """By whatever name it is given."""
    before = path.read_bytes()
    assert program.main(["flight", str(path), "--output", str(path.parent / "." / "flight")]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert path.read_bytes()[layout.RING_AT :] == before[layout.RING_AT :]


@pytest.mark.parametrize("command", [["report"], ["why", "--slowest"], ["send"]])
def test_other_commands_say_what_the_file_is(path, capsys, command):
    """And how it becomes a recording."""
    assert program.main([*command, str(path)]) == 2
    assert f"is a flight recorder's file: `gpuscope flight {path}` makes a recording of it." in capsys.readouterr().err
