"""The file exporter: whole lines of OTLP JSON, whatever the disk does."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import resource
import signal
import threading

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gpuscope._settings.config import Config
from gpuscope._version import __version__
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder
from gpuscope.exporters._encoding.otlp_json import JsonEncoder
from gpuscope.exporters._transport.line_file import LineFile
from gpuscope.exporters.file import FileExporter
from gpuscope.exporters.otlp import Envelope

from .batches import Row, batches, make_batch

RESOURCE = {"service.name": "tests", "host.name": "h\u00f4te"}
_IDS = ("traceId", "spanId", "parentSpanId")


def parse(line):
    """A line as the message it stands for: protobuf's JSON has base64 where OTLP's has hexadecimal ids."""

    def fix(node):
        if isinstance(node, list):
            return [fix(item) for item in node]
        if not isinstance(node, dict):
            return node
        return {
            key: base64.b64encode(bytes.fromhex(value)).decode() if key in _IDS else fix(value)
            for key, value in node.items()
        }

    return json_format.ParseDict(fix(json.loads(line)), ExportTraceServiceRequest())


def normal(request):
    """A request as text, whatever the order of a span's attributes."""
    spans = request.resource_spans[0].scope_spans[0].spans
    for span in spans:
        ordered = sorted(span.attributes, key=str)
        del span.attributes[:]
        span.attributes.extend(ordered)
    return str(request)


@pytest.fixture
def make_exporter(tmp_path):
    """Return a function that makes an exporter of `trace.jsonl`."""
    made = []

    def make(**settings):
        path = str(tmp_path / "trace.jsonl")
        made.append(FileExporter(Config().changed(**{"file": path, **settings}), RESOURCE))
        return made[-1]

    yield make
    for exporter in made:
        exporter.shutdown(1)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_json_says_what_protobuf_says(batch):
    """A line decodes to the very message that the `otlp` exporter sends."""
    binary = Envelope(RESOURCE, __version__).wrap([SpanEncoder().encode(batch)])
    line = JsonEncoder(RESOURCE, __version__).encode(batch)
    assert "\n" not in line
    assert normal(parse(line)) == normal(ExportTraceServiceRequest.FromString(binary))


def test_lines_can_be_read_while_the_file_is_written(make_exporter, tmp_path, account):
    """After each batch the file holds one more whole line, with nothing held back."""
    exporter = make_exporter()
    for number in (1, 2, 3):
        batch = make_batch(Row(span_id=number))
        exporter.export(batch, account.open(batch))
        lines = (tmp_path / "trace.jsonl").read_text().splitlines()
        assert len(lines) == number
        assert parse(lines[-1]).resource_spans[0].resource.attributes[0].value.string_value == "tests"
    assert exporter.flush(0)
    assert account.exported == 3


def test_a_batch_without_rows_writes_nothing(make_exporter, tmp_path, account):
    """An empty batch is settled and makes no line."""
    make_exporter().export(make_batch(), account.open(0))
    account.check()
    assert not (tmp_path / "trace.jsonl").exists()


def test_pid_in_the_path(make_exporter, tmp_path, account):
    """`{pid}` becomes the process id; nothing is made before the first batch."""
    exporter = make_exporter(file=str(tmp_path / "t-{pid}.jsonl"))
    assert not list(tmp_path.iterdir())
    exporter.export(make_batch(Row()), account.open(1))
    assert (tmp_path / f"t-{os.getpid()}.jsonl").exists()


def test_no_folder_is_made(make_exporter, tmp_path, account, caplog):
    """A mistyped folder is a loss that is said, and does not come to be."""
    exporter = make_exporter(file=str(tmp_path / "mistyped" / "t.jsonl"))
    exporter.export(make_batch(Row()), account.open(1))
    assert account.lost == {"disk": 1}
    assert not list(tmp_path.iterdir())
    assert "No such file or directory" in caplog.text


@pytest.mark.parametrize("shared", [True, False])
def test_a_link_is_followed_where_nobody_else_can_make_one(make_exporter, tmp_path, account, shared):
    """In a folder where anybody may write, a link could point at any file of ours; elsewhere it is the user's."""
    (tmp_path / "target").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o1777 if shared else 0o755)
    (tmp_path / "folder" / "t.jsonl").symlink_to(tmp_path / "target")
    exporter = make_exporter(file=str(tmp_path / "folder" / "t.jsonl"))
    exporter.export(make_batch(Row()), account.open(1))
    assert (account.exported, bool((tmp_path / "target").read_text())) == ((0, False) if shared else (1, True))


@pytest.mark.parametrize("there", [True, False])
def test_a_path_is_one_line_of_the_log(make_exporter, tmp_path, account, caplog, there):
    """A path that holds line ends, or bytes that are no text, neither forges a line nor breaks a handler."""
    folder = tmp_path / "a\nb\udcff"
    if there:
        folder.mkdir()
    with caplog.at_level("INFO", "gpuscope"):
        make_exporter(file=str(folder / "t.jsonl")).export(make_batch(Row()), account.open(1))
    assert account.exported == there
    (record,) = caplog.records
    assert record.getMessage().isprintable()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a link away")
@pytest.mark.parametrize(
    "case",
    [
        (0o775, 0, 12345, False),
        (0o775, 0, 0, True),
        (0o755, 12345, 12345, False),
        (0o755, 12345, 0, True),
        (0o755, 0, 12345, True),
    ],
)
def test_links_of_others_are_not_followed(make_exporter, tmp_path, account, case):
    """Who may write into the folder, as its group or as its owner, does not choose what we write to."""
    mode, owner, links_owner, follows = case
    (tmp_path / "target").write_text("")
    (tmp_path / "trace.jsonl").symlink_to(tmp_path / "target")
    os.chown(tmp_path / "trace.jsonl", links_owner, links_owner, follow_symlinks=False)
    tmp_path.chmod(mode)
    os.chown(tmp_path, owner, owner)
    make_exporter().export(make_batch(Row()), account.open(1))
    assert (account.exported, bool((tmp_path / "target").read_text())) == ((1, True) if follows else (0, False))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a file away")
def test_a_file_of_another_user_in_a_shared_folder_is_left_alone(make_exporter, tmp_path, account):
    """Who made the file could read what we write into it."""
    tmp_path.chmod(0o1777)
    (tmp_path / "trace.jsonl").write_text("")
    os.chown(tmp_path / "trace.jsonl", 12345, 12345)
    make_exporter().export(make_batch(Row()), account.open(1))
    assert account.lost == {"disk": 1}
    assert (tmp_path / "trace.jsonl").read_text() == ""


def test_writers_of_one_path_lose_nothing_to_each_other(tmp_path):
    """However the rotations of several fall together, each line is there once, and whole."""
    path, writers = tmp_path / "t.jsonl", 4
    begin = threading.Barrier(writers)

    def write(writer):
        file = LineFile(str(path), 4096, 1000)
        begin.wait()
        for number in range(300):
            file.write(f"{writer} {number} ".encode() + b"x" * 300)
        file.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert sorted(line.split(" x")[0] for line in lines) == sorted(
        f"{writer} {number}" for writer in range(writers) for number in range(300)
    )
    assert all(line.endswith("x" * 300) for line in lines)


def test_a_writer_that_was_stopped_stops_nobody(tmp_path):
    """While another holds the lock, lines are written all the same, and the file is not moved."""
    path = tmp_path / "t.jsonl"
    file = LineFile(str(path), 4096, 3)
    file.write(b"first" * 1000)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        file.write(b"second")
        assert path.read_bytes().endswith(b"\nsecond\n")
    file.write(b"third")
    file.close()
    assert path.read_bytes() == b"third\n"


@pytest.mark.parametrize(
    ("backups", "left"), [(2, ["trace.jsonl", "trace.jsonl.1", "trace.jsonl.2"]), (0, ["trace.jsonl"])]
)
def test_rotation_keeps_the_newest(make_exporter, tmp_path, account, backups, left):
    """Full files move on to the next number, the oldest goes, and each that is left can be read alone."""
    exporter = make_exporter(file_max_bytes=4096, file_backups=backups)
    for number in range(1, 41):
        exporter.export(make_batch(Row(span_id=number)), account.open(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    ids = []
    for name in reversed(left):
        text = (tmp_path / name).read_text()
        assert len(text) <= 4096
        ids += [
            span.span_id for line in text.splitlines() for span in parse(line).resource_spans[0].scope_spans[0].spans
        ]
    assert ids == [number.to_bytes(8, "big") for number in range(41 - len(ids), 41)]


def test_a_line_longer_than_the_limit_is_written(make_exporter, tmp_path, account):
    """A batch that alone exceeds the size of a file is written and not lost."""
    exporter = make_exporter(file_max_bytes=4096)
    exporter.export(make_batch(*(Row(span_id=number) for number in range(1, 60))), account.open(59))
    assert account.exported == 59
    assert (tmp_path / "trace.jsonl").stat().st_size > 4096


def test_a_file_that_was_moved_or_removed_is_made_anew(make_exporter, tmp_path, account):
    """When another program rotates the file, what follows goes to the path again."""
    exporter = make_exporter()
    exporter.export(make_batch(Row(span_id=1)), account.open(1))
    (tmp_path / "trace.jsonl").rename(tmp_path / "old")
    exporter.export(make_batch(Row(span_id=2)), account.open(1))
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 1


def test_a_torn_end_of_another_process_stays_alone(tmp_path):
    """A part of a line that a dead process left does not spoil the first line of the next."""
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"whole\nto")
    file = LineFile(str(path), 4096, 1)
    file.write(b"line")
    file.close()
    assert path.read_bytes() == b"whole\nto\nline\n"


def test_a_path_that_cannot_be_written_is_a_counted_loss(make_exporter, tmp_path, account, caplog):
    """A disk error loses the batch with the reason `disk`, is logged once, and nothing is raised."""
    (tmp_path / "file").write_text("")
    exporter = make_exporter(file=str(tmp_path / "file" / "trace.jsonl"))
    for _ in range(2):
        exporter.export(make_batch(Row(), Row()), account.open(2))
    assert account.lost == {"disk": 4}
    account.check()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot write to" in caplog.text


def test_a_full_device_is_a_counted_loss(make_exporter, account):
    """A device without room loses the batch with the reason `disk`."""
    exporter = make_exporter(file="/dev/full")
    exporter.export(make_batch(Row()), account.open(1))
    assert account.lost == {"disk": 1}


def test_a_pipe_that_nobody_reads_does_not_hold_the_collector(make_exporter, tmp_path, account):
    """Opening a named pipe without a reader is refused at once."""
    os.mkfifo(tmp_path / "pipe")
    exporter = make_exporter(file=str(tmp_path / "pipe"))
    exporter.export(make_batch(Row()), account.open(1))
    assert account.lost == {"disk": 1}


@contextlib.contextmanager
def small_files(size):
    """
    Limit the size of files, as a full disk would.

    For a few lines and not as a fixture: the limit is the process's, and the tests' own output may go to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_half_way_leaves_no_half_line(tmp_path):
    """When the disk is full in the middle of a line, the file ends with the line before, and goes on from there."""
    path = tmp_path / "trace.jsonl"
    file = LineFile(str(path), 4096, 1)
    file.write(b"a" * 60)
    with small_files(100), pytest.raises(OSError, match="large"):
        file.write(b"b" * 60)
    assert path.read_bytes() == b"a" * 60 + b"\n"
    file.write(b"c" * 60)
    file.close()
    assert path.read_bytes() == b"a" * 60 + b"\n" + b"c" * 60 + b"\n"
