"""`gpuscope report` and `gpuscope compare`: what they print, write and return, and how they fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import gpuscope
from gpuscope.__main__ import main
from gpuscope._data.batch import RowFlag
from gpuscope._data.record import Site
from gpuscope._settings.config import Config
from gpuscope.exporters.file import FileExporter

from ..exporters.batches import NOW_NS, Delivery, Row, make_batch

REQUEST, INFER, PREP = Site("request", {}), Site("infer", {"batch_size": 8}), Site("prep", {})
MS = 1_000_000


def rows_of(number, infer_ms):
    """A request of 10 ms and what `infer` differs from 5 ms, with some spread; the first two are warm-up."""
    first, start = 10 * number + 1, NOW_NS + number * 20 * MS
    spread = (number * 7919 % 100) * 1000
    infer = round(infer_ms * MS) + spread
    shared = {"trace_id": number + 1, "flags": int(RowFlag.WARMUP) * (number < 2)}
    return [
        Row(PREP, span_id=first + 1, parent_id=first, start_ns=start + MS, host_ns=2 * MS, **shared),
        Row(
            INFER,
            span_id=first + 2,
            parent_id=first,
            start_ns=start + 3 * MS,
            host_ns=infer,
            gpu_span_id=first + 3,
            gpu_ns=infer,
            **shared,
        ),
        Row(REQUEST, span_id=first, start_ns=start, host_ns=infer + 5 * MS, **shared),
    ]


@pytest.fixture
def record(tmp_path):
    """Return a function that has the file exporter write a recording, and returns its path."""

    def record(name="trace.jsonl", *, requests=40, infer_ms=5.0, site=None):
        exporter = FileExporter(Config().changed(file=str(tmp_path / name)), {"service.name": "server"})
        for number in range(requests):
            rows = rows_of(number, infer_ms)
            if site is not None:
                rows[1].site = site
            exporter.export(make_batch(*rows), Delivery(3))
        exporter.shutdown(1)
        return str(tmp_path / name)

    return record


def answered(path, samples, had_work):
    """Let the stream of each stage in a file have been asked so often, and return the file."""
    lines = []
    for line in Path(path).read_text().splitlines():
        content = json.loads(line)
        for resource in content.get("resourceSpans", ()):
            for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                if any(each["key"] == "gpuscope.clock.uncertainty" for each in span["attributes"]):
                    span["attributes"] += [
                        {"key": "gpuscope.gpu.samples", "value": {"intValue": str(samples)}},
                        {"key": "gpuscope.gpu.had_work", "value": {"doubleValue": had_work}},
                    ]
        lines.append(json.dumps(content))
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def failure(capsys, *arguments):
    """Run a command that cannot do what it was asked, and return what it says."""
    assert main(arguments) == 2
    return capsys.readouterr().err


class TestReport:
    """`gpuscope report`."""

    def test_table(self, record, capsys):
        """The table has a line for each stage, inner ones below outer ones, with counts, percentiles and shares."""
        assert main(["report", record()]) == 0
        out = capsys.readouterr().out
        assert "\n120 stages in 40 requests of 1 process within 790 ms.\n" in out
        rows = [
            re.split(r"\s{2,}", line.strip())
            for line in out.splitlines()
            if re.match(r" *(request|prep|infer) {2}", line)
        ]
        assert [row[:2] for row in rows[:3]] == [["request", "40"], ["prep", "40"], ["infer", "40"]]
        assert rows[1][2:4] == ["2.00 ms", "2.00 ms"]
        assert rows[0][-1] == "100.0"
        assert "GPU times are placed within 3.50 µs" in " ".join(out.split())
        assert "Nothing is known to be missing." in out

    def test_verdicts(self, record, capsys):
        """First come the answers of the analysis, below the table its verdicts, word for word."""
        from gpuscope.analysis.read import read
        from gpuscope.analysis.verdict import judge

        path = record()
        main(["report", path])
        words, findings = " ".join(capsys.readouterr().out.split()), judge(read([path]))
        assert words.startswith(" ".join(" ".join(findings.summary()).split()))
        assert " ".join(" ".join(findings.details()).split()) in words

    def test_what_streams_answered(self, record, capsys, tmp_path):
        """A table says how busy each stage had the GPU, in which interval, and what such an answer is."""
        path = answered(record(), samples=4, had_work=0.25)
        assert main(["report", path, "--json", str(tmp_path / "out.json")]) == 0
        printed = capsys.readouterr().out
        line = next(line for line in printed.splitlines() if re.match(r" +infer +\d+ +\d+ to", line))
        assert re.match(r" +infer +25 +2\d to 3\d +75 +0 +152$", line)
        assert "had work, queued or running" in " ".join(printed.split())
        assert all(len(line) <= 80 for line in printed.splitlines())
        (infer,) = (
            s for s in json.loads((tmp_path / "out.json").read_text())["findings"]["stages"] if s["name"] == "infer"
        )
        assert (infer["busy_share"], infer["answers"]) == (pytest.approx(0.25, abs=0.005), 152)
        assert infer["busy_range"][0] < 0.25 < infer["busy_range"][1]

    def test_without_answers_nothing_is_said_of_them(self, record, capsys):
        """Nor is there a table without figures."""
        main(["report", record()])
        assert "queued or running" not in capsys.readouterr().out

    def test_fits_eighty_columns(self, record, capsys):
        """Every line, however long the sentences are."""
        main(["report", record()])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80

    def test_the_same_figure_is_written_the_same(self, record, capsys):
        """The median of a request in the answer is the one in its line of the table."""
        main(["report", record()])
        out = capsys.readouterr().out
        (told,) = re.findall(r"takes? (\S+ \S+) \(median", " ".join(out.split()))
        assert re.search(rf"^request +40 +{told} ", out, re.MULTILINE)

    def test_without_a_gpu(self, tmp_path, capsys):
        """One line says that there is none; then the host tells what dominates, the spread, and the slowest."""
        exporter = FileExporter(Config().changed(file=str(tmp_path / "host.jsonl")), {"service.name": "server"})
        for number in range(20):
            request, prep, infer = rows_of(number, 5.0)[2], *rows_of(number, 5.0)[:2]
            infer = replace(infer, gpu_span_id=0, gpu_ns=0, host_ns=infer.host_ns * (2 if number == 15 else 1))
            request = replace(request, host_ns=infer.host_ns + 5 * MS)
            exporter.export(make_batch(prep, infer, request), Delivery(3))
        exporter.shutdown(1)
        main(["report", str(tmp_path / "host.jsonl")])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "No GPU in this recording: all times are the host's."
        words = " ".join(" ".join(lines).split())
        assert re.search(
            r"`request` takes 10\.\d ms \(median of 18 requests\)\. Most of it is `infer`: 5\.\d\d ms \(5\d%\)", words
        )
        assert "per unit of" not in words  # All batches are of one size.
        assert re.search(
            r"The slowest took 15\.\d ms \(trace \w+\): the host was \S+ ms longer than usual in `infer`", words
        )
        assert "unknown" not in words
        assert words.count("GPU") == 1

    def test_runs_are_told_apart(self, record, tmp_path, capsys):
        """Of files of several runs each is named, and one can be shown alone."""
        path = tmp_path / "runs.jsonl"
        for pid, start, requests in ((1, 0, 30), (2, 10**9 * 60, 20)):
            exporter = FileExporter(Config().changed(file=str(path)), {"service.name": "server", "process.pid": pid})
            for number in range(requests):
                rows = [
                    replace(row, start_ns=row.start_ns + start, trace_id=pid * 1000 + number)
                    for row in rows_of(number, 5.0)
                ]
                exporter.export(make_batch(*rows), Delivery(3))
            exporter.shutdown(1)
        main(["report", str(path)])
        out = capsys.readouterr().out
        assert "The files hold 2 runs, one after the other." in out
        assert re.search(r"run 1: .* UTC, server 1, 30 requests, median 10\.\d ms", out)
        main(["report", str(path), "--run", "2"])
        assert "60 stages in 20 requests" in capsys.readouterr().out
        assert "there is no run 3: the files hold 2 runs." in failure(capsys, "report", str(path), "--run", "3")

    def test_losses_are_said(self, record, capsys):
        """What the files lack is said with its reasons."""
        path = record()
        with Path(path).open("a") as file:
            file.write("something else\n")
            file.write('{"resourceSpans": [')
        main(["report", path])
        assert "Missing: 2 skipped in the files (foreign: 1, truncated: 1)." in capsys.readouterr().out

    def test_names_cannot_steer_the_terminal(self, record, capsys):
        """Control codes and markup in a stage's name are shown and not obeyed."""
        assert main(["report", record(site=Site("\x1b[2J[bold]x[/bold]", {}))]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "?[2J[bold]x[/bold]" in out

    def test_files(self, record, tmp_path, capsys):
        """Each output is written where asked, holds the recording, and is named at the end."""
        wanted = {name: tmp_path / f"out.{name}" for name in ("html", "perfetto", "jaeger", "json")}
        options = [text for name, path in wanted.items() for text in (f"--{name}", str(path))]
        assert main(["report", record(), *options]) == 0
        out = capsys.readouterr().out
        assert all(f"{name}: {path}" in out for name, path in wanted.items())
        assert wanted["html"].read_text().lower().startswith("<!doctype html>")
        events = json.loads(wanted["perfetto"].read_text())["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == 160
        assert len(json.loads(wanted["jaeger"].read_text())["data"]) == 40
        figures = json.loads(wanted["json"].read_text())
        assert [stage["calls"] for stage in figures["stages"]] == [40, 40, 40]
        assert {"requests", "losses", "uncertainty_us", "findings"} <= figures.keys()

    def test_several_files_are_one_report(self, record, tmp_path, capsys):
        """Files and folders are read together, and none twice."""
        path = record()
        main(["report", path, str(tmp_path)])
        assert "\n120 stages in" in capsys.readouterr().out

    def test_what_cannot_be_read(self, record, tmp_path, capsys):
        """A file that is missing or has no stage in it ends the command with what was seen and what to do."""
        assert "cannot read" in failure(capsys, "report", str(tmp_path / "none.jsonl"))
        (tmp_path / "log.jsonl").write_text("started\n")
        message = failure(capsys, "report", str(tmp_path / "log.jsonl"))
        assert "no stages in" in message
        assert "(1 skipped in the files (foreign: 1))" in message
        assert "GPUSCOPE_EXPORTER=file" in message

    def test_what_cannot_be_written(self, record, tmp_path, capsys):
        """A path that cannot be written is an error of one sentence."""
        message = failure(capsys, "report", record(), "--json", str(tmp_path / "no" / "folder.json"))
        assert "No such file or directory; name another file" in message

    def test_a_recording_is_never_overwritten(self, record, tmp_path, capsys):
        """An output that is one of the inputs, or twice the same, is refused before anything is written."""
        path = record()
        before = Path(path).read_bytes()
        assert "would be overwritten" in failure(capsys, "report", path, "--json", path)
        twice = str(tmp_path / "out.json")
        assert "would be overwritten" in failure(capsys, "report", path, "--json", twice, "--jaeger", twice)
        assert Path(path).read_bytes() == before
        assert not Path(twice).exists()

    def test_without_the_extra(self, record, tmp_path):
        """Where a library of the extra is missing, one sentence says how to get it."""
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "rich.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')"
        )
        path = os.pathsep.join([str(tmp_path / "hidden"), str(Path(gpuscope.__file__).parents[1])])
        done = subprocess.run(
            [sys.executable, "-m", "gpuscope", "report", record()],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr == 'gpuscope report: `rich` is missing; pip install "gpuscope[report]" brings it.\n'

    def test_progress_on_a_terminal(self, record):
        """Where standard error is a terminal a bar is shown on it while files are read, and nothing on a pipe."""
        ours, theirs = os.openpty()
        done = subprocess.run(
            [sys.executable, "-m", "gpuscope", "report", record()],
            env={**os.environ, "PYTHONPATH": str(Path(gpuscope.__file__).parents[1]), "TERM": "xterm"},
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            check=True,
        )
        os.close(theirs)
        shown = os.read(ours, 65536).decode()
        os.close(ours)
        assert "reading" in shown
        assert "reading" not in done.stdout

    def test_reader_that_goes_away(self, record):
        """Output into a pipe that is closed early, as `head` does it, ends the command without a traceback."""
        ours, theirs = os.pipe()
        os.close(ours)
        done = subprocess.run(
            [sys.executable, "-m", "gpuscope", "report", record()],
            env={**os.environ, "PYTHONPATH": str(Path(gpuscope.__file__).parents[1])},
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(theirs)
        assert (done.returncode, done.stderr) == (141, "")

    def test_needs_no_torch(self, record):
        """A report is made without torch and without OpenTelemetry, and is silent where there is no terminal."""
        program = (
            "import sys; from gpuscope.__main__ import main; main(sys.argv[1:]); "
            "print(sorted({'torch', 'opentelemetry'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, "report", record()],
            env={**os.environ, "PYTHONPATH": str(Path(gpuscope.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "[]"
        assert done.stderr == ""


class TestCompare:
    """`gpuscope compare`."""

    def test_table(self, record, capsys):
        """After a sentence each stage that changed has a line with medians, interval and verdict; the whole is last."""
        assert main(["compare", record("a.jsonl"), record("b.jsonl", infer_ms=6)]) == 0
        out = capsys.readouterr().out
        assert re.match(r"`request` is 10\.0% slower: 10\.\d ms before, 11\.\d ms after", out)
        assert "The largest change is in `infer`: +1.00 ms per request" in " ".join(out.split())
        (infer,) = (line for line in out.splitlines() if re.match(r" *infer ", line))
        assert re.search(r"5\.\d+ ms +6\.\d+ ms +\+\d+\.\d % +\+\d+\.\d \.\. \+\d+\.\d +slower", infer)
        (whole,) = (line for line in out.splitlines() if line.startswith("end to end"))
        assert whole.rstrip().endswith("slower")
        assert "1 more line: within noise" in out
        assert "compare it with itself first" in " ".join(out.split())
        assert max(map(len, out.splitlines())) <= 80

    def test_nothing_in_common(self, record, tmp_path, capsys):
        """Recordings of different programs are not compared, and it is said what is in them."""
        exporter = FileExporter(Config().changed(file=str(tmp_path / "other.jsonl")), {"service.name": "server"})
        exporter.export(make_batch(Row(Site("stray", {}), span_id=5_000)), Delivery(1))
        exporter.shutdown(1)
        message = failure(capsys, "compare", record("a.jsonl"), str(tmp_path / "other.jsonl"))
        assert "nothing in common: the requests of A are `request`, those of B `stray`." in message

    @pytest.mark.parametrize(
        ("infer_ms", "allowed", "code"), [(5.0, "5%", 0), (6.0, "5%", 1), (6.0, "50%", 0), (4.0, "0", 0), (6.0, "0", 1)]
    )
    def test_exit_code(self, record, infer_ms, allowed, code, capsys):
        """The exit code is 1 only for requests that are slower beyond noise and by more than allowed."""
        paths = record("a.jsonl"), record("b.jsonl", infer_ms=infer_ms)
        assert main(["compare", *paths, "--fail-if-slower", allowed]) == code
        assert ("FAILED: request is" in capsys.readouterr().out) == bool(code)

    def test_slower_without_a_limit(self, record):
        """Without a limit, being slower is no failure."""
        assert main(["compare", record("a.jsonl"), record("b.jsonl", infer_ms=9)]) == 0

    def test_too_few_to_tell(self, record, capsys):
        """A limit on what cannot be judged is an error, so that a run with too few requests does not pass."""
        paths = record("a.jsonl", requests=10), record("b.jsonl")
        message = failure(capsys, "compare", *paths, "--fail-if-slower", "5%")
        assert "cannot tell whether request is slower: each recording needs 20 requests after" in message
        paths = record("c.jsonl", requests=10), record("d.jsonl", requests=10)
        assert "cannot tell whether anything is slower" in failure(capsys, "compare", *paths, "--fail-if-slower", "5%")

    def test_too_noisy_to_tell(self, tmp_path, capsys):
        """Requests that take 10 or 36 ms are not said to be as fast as before; a limit that wide lets them pass."""
        path = tmp_path / "a.jsonl"
        exporter = FileExporter(Config().changed(file=str(path)), {"service.name": "server"})
        for number in range(60):
            request = replace(rows_of(number, 5.0)[2], host_ns=(10 if number * 7 % 13 < 6 else 36) * MS)
            exporter.export(make_batch(replace(request, gpu_span_id=0, gpu_ns=0)), Delivery(1))
        exporter.shutdown(1)
        message = failure(capsys, "compare", str(path), str(path), "--fail-if-slower", "5%")
        assert "too noisy to tell whether requests are slower: request (-7" in message
        assert "allow more than --fail-if-slower 5%." in message
        assert main(["compare", str(path), str(path), "--fail-if-slower", "300%"]) == 0
        assert "is too noisy to tell whether it became faster or slower" in " ".join(capsys.readouterr().out.split())

    def test_a_stray_stage_does_not_stop_the_rest(self, record, tmp_path):
        """A stage or two outside all requests, as a process that ended early leaves them, are not judged."""
        paths = record("a.jsonl"), record("b.jsonl", infer_ms=6)
        for path in paths:
            exporter = FileExporter(Config().changed(file=path), {"service.name": "server"})
            exporter.export(make_batch(Row(Site("stray", {}), span_id=5_000)), Delivery(1))
            exporter.shutdown(1)
        assert main(["compare", *paths, "--fail-if-slower", "5%"]) == 1

    def test_json(self, record, tmp_path):
        """The comparison is written for scripts."""
        out = tmp_path / "out.json"
        main(["compare", record("a.jsonl"), record("b.jsonl", infer_ms=6), "--json", str(out)])
        (request,) = json.loads(out.read_text())["requests"]
        assert (request["name"], request["change"]["verdict"]) == ("request", "slower")

    @pytest.mark.parametrize("text", ["much", "-5%", "nan", "inf%"])
    def test_a_limit_that_is_none(self, record, text, capsys):
        """A limit that is not a percentage is a usage error that shows how to write one."""
        with pytest.raises(SystemExit) as caught:
            main(["compare", "a", "b", f"--fail-if-slower={text}"])
        assert caught.value.code == 2
        assert "is not a percentage; write for example 5%." in capsys.readouterr().err
