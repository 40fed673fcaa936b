"""Commands that read files: from pipes, compressed, damaged or of another kind, and shown on any terminal."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpuscope
from gpuscope.__main__ import main
from gpuscope._data.record import Site
from gpuscope._settings.config import Config
from gpuscope.exporters.file import FileExporter

from ..exporters.batches import NOW_NS, Delivery, Row, make_batch

ROOT = str(Path(gpuscope.__file__).parents[1])
ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
NAME = "détection 🚀"
TRACE = {"traceEvents": [{"ph": "X", "cat": "user_annotation", "name": NAME, "pid": 1, "tid": 1, "ts": 1, "dur": 2}]}


@pytest.fixture
def recording(tmp_path):
    """A recording of thirty requests."""
    path = tmp_path / "a.jsonl"
    write(path, requests=30)
    return path


def write(path, *, requests, names=(NAME,)):
    """Have the file exporter write a line for each request."""
    exporter = FileExporter(Config().changed(file=path), {"service.name": "server"})
    for number in range(requests):
        row = Row(
            Site(names[number % len(names)], {}),
            span_id=number + 1,
            trace_id=number + 1,
            start_ns=NOW_NS + number * 1_000_000,
        )
        exporter.export(make_batch(row), Delivery(1))
    exporter.shutdown(1)


def command(*arguments, **more):
    """Run a command in a process of its own, and see that whatever it says is no traceback."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    done = subprocess.run(
        [sys.executable, "-m", "gpuscope", *map(str, arguments)],
        env=environ | {"PYTHONPATH": ROOT} | more.pop("env", {}),
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
        **({"stdout": subprocess.PIPE} | more),
    )
    done.stderr = done.stderr.decode()
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def refused(capsys):
    """Return a function that sees that a command ends with one sentence, in this process."""

    def refused(said, *arguments):
        assert main([*map(str, arguments)]) == 2
        seen = capsys.readouterr().err
        assert said in seen
        assert seen.count("\n") == 1

    return refused


def fails(said, *arguments, **more):
    """See that a command ends with one sentence."""
    done = command(*arguments, **more)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


class TestPipes:
    """What has no name of its own."""

    @pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_standard_input(self, recording, name, compressed):
        """A recording that another program writes is read as it comes."""
        content = recording.read_bytes()
        done = command("report", name, input=gzip.compress(content) if compressed else content)
        assert b"\n30 stages in 30 requests" in done.stdout

    def test_descriptors(self, recording):
        """Two pipes of a shell's process substitution are two recordings."""
        ends = []
        for _ in range(2):
            ours, theirs = os.pipe()
            assert os.write(theirs, recording.read_bytes()[:30_000]) > 10_000
            os.close(theirs)
            ends.append(ours)
        done = command("compare", *(f"/dev/fd/{end}" for end in ends), pass_fds=ends)
        for end in ends:
            os.close(end)
        assert done.returncode == 0
        assert b"is as fast as before: 1.00 ms before, 1.00 ms after" in done.stdout

    def test_a_file_that_was_removed(self, recording):
        """Only the descriptor leads to it."""
        with recording.open("rb") as opened:
            recording.unlink()
            done = command("report", "-", stdin=opened)
        assert b"\n30 stages" in done.stdout

    def test_a_trace(self):
        """`profile --trace -` reads standard input."""
        done = command("profile", "--trace", "-", input=json.dumps(TRACE).encode())
        assert (done.returncode, b"no GPU work" in done.stdout) == (0, True)

    def test_nothing(self):
        """An empty pipe and no standard input at all are said."""
        fails("no stages in '-' (the files are empty)", "report", "-", input=b"")
        fails("cannot read '/dev/stdin'", "report", "-", preexec_fn=lambda: os.close(0))
        fails("it is empty", "profile", "--trace", "-", input=b"")


class TestCompressed:
    """By gzip, whatever the name says."""

    def test_as_whole_as_it_was(self, recording, tmp_path):
        """Also a file that is called so and is not, one that is and is not called so, and one in several parts."""
        content = recording.read_bytes()
        half = content.index(b"\n", len(content) // 2) + 1
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
        (tmp_path / "c.gz").write_bytes(content)
        (tmp_path / "d.jsonl").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
        for name in ("b.jsonl.gz", "c.gz", "d.jsonl"):
            assert b"\n30 stages" in command("report", tmp_path / name).stdout

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda content: content[: len(content) // 2], "truncated"),
            (lambda content: content[:-3], "truncated"),
            (lambda content: content + b"something else", "damaged"),
        ],
    )
    def test_what_is_left_of_it(self, recording, damage, reason):
        """A file that was cut short, or goes on as something else, is read up to there, and that is said."""
        done = command("report", "-", input=damage(gzip.compress(recording.read_bytes())))
        assert done.returncode == 0
        assert f"Missing: 1 skipped in the files ({reason}: 1).".encode() in done.stdout

    def test_nothing_is_left_of_it(self, recording, tmp_path):
        """One sentence says so."""
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(recording.read_bytes())[:15])
        fails("(1 skipped in the files (truncated: 1))", "report", tmp_path / "b.jsonl.gz")
        fails("(1 skipped in the files (truncated: 1))", "compare", recording, tmp_path / "b.jsonl.gz")

    def test_in_folders_and_rotations(self, recording, tmp_path):
        """Files that were compressed after rotation come with the current one, and those of a folder with it."""
        lines = recording.read_bytes().splitlines(keepends=True)
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
        recording.write_bytes(b"".join(lines[20:]))
        (tmp_path / "a.jsonl.1").write_bytes(b"".join(lines[10:20]))
        (tmp_path / "a.jsonl.2.gz").write_bytes(gzip.compress(b"".join(lines[:10])))
        assert b"\n30 stages" in command("report", recording).stdout
        (folder / "sub.jsonl").mkdir()
        assert b"\n30 stages" in command("report", folder).stdout


class TestOtherFiles:
    """What is not a recording."""

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "the files are empty"),
            (b"\n\n", "the files are empty"),
            (b"\0" * 100_000, "(binary: 1)"),
            (b"\x80\x02ctorch\n\xff\xfe\n", "(foreign: 2)"),
            (b"[1, 2]\n{}\n", "(foreign: 2)"),
            (b"[" * 100_000, "(foreign: 1)"),
        ],
    )
    def test_content(self, refused, tmp_path, content, said):
        """Empty, binary and foreign files are said to be so."""
        (tmp_path / "x").write_bytes(content)
        refused(said, "report", tmp_path / "x")

    def test_what_has_no_end(self, refused):
        """A device that never ends a line is left alone."""
        refused("(binary: 1)", "report", "/dev/zero")

    def test_paths(self, refused, tmp_path):
        """Folders, links to themselves, names that are too long, and what the system refuses to read."""
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        refused("cannot read ''", "report", "")
        refused("no `*.jsonl` file in this folder", "report", tmp_path)
        refused("Too many levels of symbolic links", "report", tmp_path / "loop")
        refused("File name too long", "report", "x" * 300)
        refused("Input/output error", "report", "/proc/self/mem")
        refused("Is a directory", "profile", "--trace", tmp_path)
        refused("cannot read '/proc/self/mem'", "profile", "--trace", "/proc/self/mem")

    def test_outputs(self, refused, recording, tmp_path):
        """What cannot be written is named, and no folder is made for it."""
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        (tmp_path / "t.json").write_text(json.dumps(TRACE))
        for option in ("--html", "--json", "--perfetto", "--jaeger"):
            for path in (tmp_path / "typo/out", tmp_path, tmp_path / "loop"):
                refused(f"cannot write '{path}'", "report", recording, option, path)
        refused("cannot write", "compare", recording, recording, "--json", tmp_path / "typo/out")
        refused("cannot write", "profile", "--trace", tmp_path / "t.json", "--out", tmp_path / "typo/out")
        refused("cannot write", "profile", "--trace", tmp_path / "t.json", "--out", recording)
        (tmp_path / "s.py").write_text("print('ran')")
        for out in (tmp_path / "typo/out", recording):
            refused("cannot write", "profile", "--out", out, tmp_path / "s.py")
        assert not (tmp_path / "typo").exists()


class TestTerminals:
    """Where the output goes."""

    @pytest.mark.parametrize("terminal", [ASCII, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
    def test_what_an_encoding_lacks(self, recording, tmp_path, terminal):
        """Letters that cannot be shown are question marks; files have them all."""
        page = tmp_path / "out.html"
        done = command("report", recording, "--html", page, env=terminal)
        assert done.returncode == 0
        assert b"tection ?" in done.stdout
        assert NAME in page.read_text(encoding="utf-8") or json.dumps(NAME).strip('"') in page.read_text("utf-8")
        assert command("compare", recording, recording, env=terminal).returncode == 0
        (tmp_path / "t.json").write_text(json.dumps(TRACE))
        assert command("profile", "--trace", tmp_path / "t.json", env=terminal).returncode == 0
        assert command("doctor", env=terminal | {"GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": NAME}).stdout

    def test_names_that_are_no_text(self, recording, tmp_path):
        """Half a surrogate pair, which JSON may hold, spoils no report."""
        text = recording.read_text(encoding="utf-8")
        shown = NAME if NAME in text else json.dumps(NAME).strip('"')
        recording.write_text(text.replace(shown, r"\ud800\u001b[2J"), encoding="utf-8")
        outputs = {name: tmp_path / name for name in ("html", "json", "perfetto", "jaeger")}
        done = command("report", recording, *(text for name, path in outputs.items() for text in (f"--{name}", path)))
        assert done.returncode == 0
        assert b"??[2J" in done.stdout
        assert all(path.stat().st_size for path in outputs.values())
        trace = {"traceEvents": [{**TRACE["traceEvents"][0], "name": "\ud800\x1b[2J"}]}
        done = command("profile", "--trace", "-", "--out", tmp_path / "out", input=json.dumps(trace).encode())
        assert (done.returncode, b"\x1b" in done.stdout) == (0, False)

    @pytest.mark.parametrize("names", [(NAME,), tuple(f"stage {number}" for number in range(400))])
    def test_a_reader_that_goes_away(self, recording, names):
        """However much there is to say, a closed pipe ends it with the exit code of one."""
        write(recording, requests=400, names=names)
        for arguments in (["report", recording], ["compare", recording, recording]):
            ours, theirs = os.pipe()
            os.close(ours)
            done = command(*arguments, stdout=theirs)
            os.close(theirs)
            assert (done.returncode, done.stderr) == (141, "")

    def test_a_full_disk(self, recording):
        """It is said, and the exit code is not that of success."""
        with Path("/dev/full").open("wb") as full:
            fails("cannot write to standard output: No space left on device", "report", recording, stdout=full)

    def test_no_standard_output(self, recording, tmp_path):
        """Files are written all the same."""
        out = tmp_path / "out.json"
        done = command("report", recording, "--json", out, preexec_fn=lambda: os.close(1))
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(out.read_text())["stages"]
