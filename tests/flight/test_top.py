"""`gpuscope top`: a live table of a service, in a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import unicodedata

import numpy as np
import pytest

from gpuscope import __main__ as program
from gpuscope import stage
from gpuscope._data import flight as layout
from gpuscope.commands._top.screen import fit, lines_of
from gpuscope.commands._top.sources import LinesSource, RingSource
from gpuscope.commands._top.view import SORTS, View, rows_of

SERVES = """
import os, sys, threading
import gpuscope
gpuscope.enable(exporters="none", flight="flight", interval_s=0.05)
pause = threading.Event()
def serve():
    while True:
        with gpuscope.stage("request"):
            with gpuscope.stage("infer"):
                pause.wait(0.002)
threading.Thread(target=serve, daemon=True).start()
with gpuscope.stage("hangs"):
    print("ready", flush=True)
    sys.stdin.read()
os._exit(0)
"""
DEADLINE_S = 60


@pytest.fixture
def service(tmp_path):
    """A service that runs."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVES], cwd=tmp_path, env=kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.communicate()


class Terminal:
    """`gpuscope top` in a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments):
        self.ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 80, 0, 0))
        self.before = termios.tcgetattr(self._theirs)
        command = [sys.executable, "-m", "gpuscope", "top", *arguments]
        self.process = subprocess.Popen(command, stdin=self._theirs, stdout=self._theirs, stderr=self._theirs)
        self.seen = ""

    def until(self, text):
        """Wait until the last picture has this text, and return it."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            pictures = [each for each in self.seen.split("\x1b[H")[1:] if each.endswith("\x1b[J")]
            if pictures and re.search(text, pictures[-1]):
                return pictures[-1].replace("\x1b[K", "").replace("\x1b[J", "").split("\r\n")
            assert time.monotonic() < deadline, (text, self.seen[-2000:])
            self.seen += os.read(self.ours, 1 << 16).decode()

    def press(self, keys):
        """Press keys."""
        os.write(self.ours, keys.encode())

    def end(self):
        """Return the exit code and what was written last, once it has ended."""
        code = self.process.wait(DEADLINE_S)
        after = termios.tcgetattr(self._theirs)
        os.close(self._theirs)
        try:
            while part := os.read(self.ours, 1 << 16):
                self.seen += part.decode()
        except OSError:  # All is read.
            pass
        os.close(self.ours)
        return code, after


@pytest.fixture
def watch():
    """Return a function that starts `gpuscope top` in a terminal of its own."""
    started = []

    def start(*arguments):
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def test_a_service_is_watched(service, watch, tmp_path):
    """Rates, percentiles and what hangs; keys change the order, and `q` ends it and leaves the terminal as it was."""
    terminal = watch(str(tmp_path / "flight"), "--interval", "0.1")
    lines = terminal.until(r"request +[1-9]")
    assert lines[0].startswith(f"process {service.pid} runs: ")
    assert "nothing lost" in lines[1]
    assert all(len(line) <= 80 for line in lines)
    (hangs,) = (line for line in lines if line.startswith("hangs"))
    assert re.search(r"0\.0 +- +- +- +- +1 +\d+(\.\d+)?(ms|s)$", hangs)
    assert lines[-1].startswith("by rate;")
    terminal.press("o")
    lines = terminal.until("by open;")
    assert lines[4].startswith("hangs")
    terminal.press("xn")
    lines = terminal.until("by name;")
    assert [line.split()[0] for line in lines[4:7]] == ["hangs", "infer", "request"]
    terminal.press("q")
    code, after = terminal.end()
    assert (code, after) == (0, terminal.before)
    assert terminal.seen.endswith("\x1b[?25h\x1b[?1049l")


def test_an_interrupt_leaves_the_terminal_as_it_was(service, watch, tmp_path):
    """Ctrl-C is as good as `q`, but for the exit code."""
    terminal = watch(str(tmp_path / "flight"))
    terminal.until("request")
    terminal.process.send_signal(2)
    code, after = terminal.end()
    assert (code, after) == (130, terminal.before)
    assert terminal.seen.rstrip().endswith("\x1b[?25h\x1b[?1049l")


def test_the_end_of_a_service_is_seen(service, watch, tmp_path):
    """Its last ten seconds stay."""
    terminal = watch(str(tmp_path / "flight"), "--interval", "0.1")
    terminal.until(r"request +[1-9]")
    service.kill()
    lines = terminal.until("did not end well")
    assert any(line.startswith("request") for line in lines)
    terminal.press("q")
    assert terminal.end()[0] == 0


def test_a_file_that_goes_is_said(service, watch, tmp_path):
    """After the screen is as before."""
    terminal = watch(str(tmp_path / "flight"), "--interval", "0.1")
    terminal.until("request")
    (tmp_path / "flight").unlink()
    assert terminal.end()[0] == 2
    assert "any more" in terminal.seen.partition("\x1b[?1049l")[2]


def test_a_pipe_gets_one_table(make_bench, tmp_path, capsys):
    """Of a process that has ended, the last seconds before its end."""
    bench = make_bench(flight=str(tmp_path / "flight"), flight_bytes=layout.LEAST_BYTES)
    for _ in range(10):
        with stage("request"):
            bench.clock.advance(0.2)
            with stage("infer"):
                bench.clock.advance(0.3)
    bench.collect()
    bench.engine.shutdown(1)
    assert program.main(["top", str(tmp_path / "flight"), "--sort", "p50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ended well" in lines[0]
    assert [line.split()[:6] for line in lines[-2:]] == [
        ["request", "2.0", "500ms", "500ms", "500ms", "100.0"],
        ["infer", "2.0", "300ms", "300ms", "300ms", "60.0"],
    ]


def test_lines_of_the_exporter_are_followed(make_bench, tmp_path):
    """As they come, also into a new file; each stage counts once. What is lost and how busy streams are is known."""
    path = tmp_path / "trace.jsonl"
    source = None
    for number in range(3):
        program_of_users = (
            "import gpuscope, sys\n"
            f"gpuscope.enable(exporters='file', file={str(path)!r})\n"
            f"for _ in range(5):\n    with gpuscope.stage('request {number}'): pass\n"
            "gpuscope.flush()"
        )
        subprocess.run([sys.executable, "-c", program_of_users], check=True)
        source = source or LinesSource(str(path))
        rows = {row.name: row for row in rows_of(source.look(), "n")}
        assert rows.keys() == {f"request {earlier}" for earlier in range(number + 1)}
        if number == 1:
            path.rename(path.with_suffix(".1"))
    again = source.look()
    assert np.bincount(again.stage).tolist() == [5, 5, 5]


def test_busy_is_that_of_the_window(make_bench, tmp_path):
    """Of all answers at first, and then of new ones."""
    bench = make_bench(flight=str(tmp_path / "flight"), flight_bytes=layout.LEAST_BYTES)
    with stage("request"):
        pass
    file, source = bench.engine.recorder.flight_recorder._file, RingSource(str(tmp_path / "flight"))
    assert source.look().busy is None
    file.add("asked", 100)
    file.add("had_work", 80)
    assert source.look().busy == 0.8
    file.add("asked", 100)
    assert source.look().busy == 0.4


@pytest.mark.parametrize("path", ["nowhere", "/dev/shm"])
def test_what_cannot_be_read_is_said(path, capsys):
    """One sentence, and 2."""
    assert program.main(["top", path]) == 2
    assert "cannot read" in capsys.readouterr().err


def view_of(*names, **facts):
    """A view with 50 stages of each name."""
    count = 50 * len(names)
    usual = {
        "seconds": 0.0001,
        "account": dict.fromkeys(("waiting", "dropped", "lost", "untimed", "refused_dumps"), 10**9),
    }
    return View(
        state="process 1 runs",
        names=names,
        stage=np.repeat(np.arange(len(names)), 50),
        took_ns=np.full(count, 10**18),
        gpu_ns=np.full(count, 10**18),
        failed=np.ones(count, np.bool_),
        running=dict.fromkeys(names, (12345, 10**18)),
        **{**usual, **facts},
    )


def columns(line):
    """How many columns of a terminal a line takes."""
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else not unicodedata.combining(letter) for letter in line
    )


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("sort", SORTS)
def test_no_line_is_wider_than_the_terminal(width, sort):
    """Whatever the names and the figures are; control codes do not get through."""
    names = ("推論" * 40, "a\x1b[2J\n\tb", "é" * 100, "x" * 300, "")
    lines = lines_of(view_of(*names), "/path/" * 50, sort, (width, 24))
    assert {columns(line) for line in lines if line} <= {width}
    assert all(letter.isprintable() for line in lines for letter in line)


def test_what_has_no_room_is_counted():
    """The last line stays that of the keys."""
    lines = lines_of(view_of(*(f"stage {number}" for number in range(100))), "flight", "n", (80, 20))
    assert len(lines) == 20
    assert lines[-2].rstrip() == "and 86 more"
    assert lines[-1].startswith("by name;")


def test_text_is_cut_between_letters():
    """A letter that takes two columns is not halved."""
    assert fit("推論推論", 6) == "推論… "
    assert fit("abc", 5) == "abc  "


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "{}\n", '{"events": []}\n', "[1]", "\0\1\2"])
def test_another_file_is_no_recording(tmp_path, capsys, text):
    """A table of zeros would say that nothing happens. An empty file may become one."""
    (tmp_path / "file").write_text(text)
    assert program.main(["top", "--once", str(tmp_path / "file")]) == 2
    assert "is not a recording: neither a flight recorder's file nor lines" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert program.main(["top", "--once", str(tmp_path / "file")]) == 0


def test_dumps_that_were_not_made_are_a_phrase():
    """Of the account, each number has its word; over how long a rate is stands beside the rate."""
    account = {"waiting": 0, "dropped": 2, "refused_dumps": 13}
    view = view_of("request", account=account, seconds=9.0)
    assert lines_of(view, "flight", "n", (200, 24))[1].rstrip() == (
        "6 stages per s in 9.0 s, busy -, queue 0, dropped 2, 13 dumps not made, too soon or without room"
    )
