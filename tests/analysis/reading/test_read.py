"""Reading: files of the real exporter, whole and damaged, into one recording."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuscope._data.batch import DeviceInfo, RowFlag, SpanDetails
from gpuscope._data.record import ExceptionInfo, Site, ThreadInfo
from gpuscope._settings.config import Config
from gpuscope.analysis.read import list_files, read
from gpuscope.analysis.recording import Losses
from gpuscope.exporters.file import FileExporter

from ...exporters.batches import NOW_NS, Delivery, Row, make_batch

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3) | st.just("stringValue"), inner, max_size=2)
    ),
    max_leaves=4,
)
REQUEST, INFER = Site("request", {}), Site("infer", {"model": "vit"})
TRACE = 0xABC
FIRST_ID = 0x1234_5678_9ABC_0000


def request_rows(number=0, **facts):
    """The rows of one request as the collector sees them: the inner stage first."""
    first, start_ns = FIRST_ID + 2 * number, NOW_NS + number * 10_000_000
    inner = Row(INFER, span_id=first + 1, parent_id=first, gpu_span_id=1, start_ns=start_ns + 1000, trace_id=TRACE)
    outer = Row(REQUEST, span_id=first, start_ns=start_ns, host_ns=9_000_000, trace_id=TRACE)
    for row in (inner, outer):
        for name, value in facts.items():
            setattr(row, name, value)
    return inner, outer


def in_graph(inner, number, *, parent_id=FIRST_ID + 1):
    """The row of a stage with attributes inside a graph that an inner stage launched."""
    span_id = FIRST_ID + number
    place = {"span_id": span_id, "gpu_span_id": span_id, "parent_id": parent_id, "trace_id": TRACE}
    return Row(INFER, **place, start_ns=inner.start_ns + 5, host_ns=0, launch_ns=0, flags=RowFlag.IN_GRAPH)


def resource(name="server", pid=7, host="a"):
    """The attributes of a process."""
    return {"service.name": name, "process.pid": pid, "host.name": host, "service.instance.id": f"{name}-{pid}-{host}"}


@pytest.fixture
def write(tmp_path):
    """Return a function that has the file exporter write batches of rows, each a line, and returns the path."""

    def write(*batches, name="trace.jsonl", of=None, devices=None, **config):
        path = tmp_path / name
        exporter = FileExporter(Config().changed(file=str(path), **config), of or resource())
        for rows in batches:
            exporter.export(make_batch(*rows, devices=devices), Delivery(len(rows)))
        exporter.shutdown(1)
        return path

    return write


def metrics_line(figures, *, at=1, of=None, scope="gpuscope"):
    """A line with the account of losses of a process; `figures` by (kind, reason)."""
    attributes = [{"key": key, "value": {"stringValue": str(value)}} for key, value in (of or resource()).items()]
    metrics = [
        {
            "name": f"gpuscope.stages.{kind}",
            "sum": {
                "aggregationTemporality": 2,
                "isMonotonic": True,
                "dataPoints": [
                    {
                        "attributes": [{"key": "gpuscope.reason", "value": {"stringValue": reason}}],
                        "timeUnixNano": str(at),
                        "asInt": str(stages),
                    }
                ],
            },
        }
        for (kind, reason), stages in figures.items()
    ]
    scopes = [{"scope": {"name": scope}, "metrics": metrics}]
    return json.dumps({"resourceMetrics": [{"resource": {"attributes": attributes}, "scopeMetrics": scopes}]}) + "\n"


class TestRows:
    """What a row of the recording says."""

    def test_host_and_gpu_span_are_one_row(self, write):
        """A stage's two spans become one row with the very nanoseconds that were exported."""
        inner, outer = request_rows()
        recording = read([write([inner, outer])])
        assert [recording.names[stage] for stage in recording.stage] == ["request", "infer"]
        assert recording.host_start_ns.tolist() == [outer.start_ns, inner.start_ns]
        assert recording.host_end_ns.tolist() == [outer.start_ns + outer.host_ns, inner.start_ns + inner.host_ns]
        gpu_start_ns = inner.start_ns + inner.launch_ns
        assert recording.gpu_start_ns.tolist() == [0, gpu_start_ns]
        assert recording.gpu_end_ns.tolist() == [0, gpu_start_ns + inner.gpu_ns]
        assert recording.uncertainty_ns.tolist() == [0, inner.uncertainty_ns]
        assert recording.stream.tolist() == [-1, 0]
        assert recording.streams == ((0, 0, "NVIDIA H200", "GPU-01234567-89ab-cdef-0123-456789abcdef", 7),)
        assert recording.threads == ((0, 140_000_000_000_123, "MainThread"),)
        assert recording.trace_id == (f"{TRACE:032x}",) * 2
        assert recording.span_id == (f"{FIRST_ID:016x}", f"{FIRST_ID + 1:016x}")
        assert recording.losses == Losses()

    def test_flags_errors_and_attributes(self, write):
        """Flags of both spans, an exception, and the application's attributes reach the row; ours do not repeat."""
        error = SpanDetails(attributes={"batch_size": 8, "shape": [1, 2]}, error=ExceptionInfo("ValueError", "no", ()))
        rows = [
            Row(span_id=1, gpu_span_id=1, flags=RowFlag.WARMUP | RowFlag.CLAMPED, details=error),
            Row(span_id=2, flags=RowFlag.CAPTURED, start_ns=NOW_NS + 1),
            Row(span_id=3, flags=RowFlag.GIVEN_UP | RowFlag.REMOTE_PARENT, parent_id=9, start_ns=NOW_NS + 2),
        ]
        recording = read([write(rows)])
        assert recording.flags.tolist() == [5, 2, 24]
        assert recording.error.tolist() == [True, False, False]
        own = {"batch_size": 8, "shape": [1, 2], "model": "vit", "error.type": "ValueError"}
        assert recording.attributes == {0: own, 1: {"model": "vit"}, 2: {"model": "vit"}}

    def test_a_place_in_the_source_is_ours(self, write):
        """Where a stage's function is does not show as an attribute of the application's, in a graph or not."""
        site = Site("infer", {}, "app.infer", ("/app.py", 3))
        inner, outer = request_rows()
        inner.site = site
        graphed = in_graph(inner, 2)
        graphed.site = site
        assert read([write([inner, outer, graphed])]).attributes == {}

    def test_earlier_names_of_a_gpu_are_read(self, write):
        """Files in which a GPU's model was its name tell the same streams."""
        path = write([*request_rows()])
        expected = read([path]).streams
        text = path.read_text()
        assert '"hw.model"' in text
        path.write_text(text.replace('"hw.model"', '"hw.name"').replace('"hw.vendor"', '"hw.gpu.task"'))
        assert read([path]).streams == expected

    def test_a_recording_without_stages(self, write):
        """An empty file is an empty recording, with columns that have the usual types."""
        path = write([])
        path.touch()
        recording = read([path])
        assert (len(recording.stage), recording.names, recording.losses) == (0, (), Losses())
        assert recording.parent.dtype == recording.host_start_ns.dtype == np.int64

    def test_rows_are_ordered_by_host_start(self, write):
        """Whatever the order of lines and files, rows are ordered by their start, outer before inner."""
        later, earlier = request_rows(1), request_rows(0)
        recording = read([write(later), write(earlier, name="other.jsonl")])
        assert recording.host_start_ns.tolist() == sorted(recording.host_start_ns.tolist())
        assert recording.parent.tolist() == [-1, 0, -1, 2]
        same = [Row(INFER, span_id=2, parent_id=1, host_ns=5), Row(REQUEST, span_id=1, host_ns=9)]
        assert read([write(same, name="same.jsonl")]).parent.tolist() == [-1, 0]

    def test_threads_streams_and_devices_are_told_apart(self, write):
        """Two threads, two streams of one device and a stream of another are two threads and three streams."""
        device = DeviceInfo(1, "NVIDIA H200", "GPU-1")
        rows = [
            Row(span_id=1, gpu_span_id=1, stream=0),
            Row(span_id=2, gpu_span_id=1, stream=9, thread=ThreadInfo(5, "worker"), start_ns=NOW_NS + 1),
            Row(span_id=3, gpu_span_id=1, stream=0, device=1, start_ns=NOW_NS + 2),
        ]
        recording = read([write(rows, devices={0: DeviceInfo(0, "NVIDIA H200", "GPU-0"), 1: device})])
        assert recording.thread.tolist() == [0, 1, 0]
        assert recording.stream.tolist() == [0, 1, 2]
        assert [(stream.device, stream.handle) for stream in recording.streams] == [(0, 0), (0, 9), (1, 0)]


class TestTree:
    """Parents, roots and orphans."""

    def test_root_is_the_outermost_stage(self, write):
        """Each stage's root is the stage at the top of its chain, however long."""
        rows = [Row(span_id=n + 1, parent_id=n, start_ns=NOW_NS + n) for n in range(40)]
        recording = read([write(rows)])
        assert recording.parent.tolist() == list(range(-1, 39))
        assert set(recording.root.tolist()) == {0}

    def test_parent_in_another_line_or_file(self, write):
        """A parent is found wherever it was written, as the outer stage ends later than the inner."""
        inner, outer = request_rows()
        recording = read([write([inner]), write([outer], name="rest.jsonl")])
        assert recording.parent.tolist() == [-1, 0]
        assert recording.losses.orphans == 0

    def test_the_same_span_id_in_another_trace_is_no_parent(self, write):
        """Ids of spans are looked for within their trace only."""
        inner, outer = request_rows()
        outer.trace_id += 1
        assert read([write([inner, outer])]).parent.tolist() == [-1, -1]

    @pytest.mark.parametrize(
        ("parent_id", "flags", "orphans"),
        [(FIRST_ID + 1, 0, 1), (0xFFFF_0000_0000_0001, 0, 0), (FIRST_ID + 1, RowFlag.REMOTE_PARENT, 0)],
        ids=["ours", "the application's", "another process's"],
    )
    def test_a_parent_that_is_missing(self, write, parent_id, flags, orphans):
        """A stage under a span that is not there is a root; only if that span was a stage of ours is it an orphan."""
        rows = [Row(span_id=FIRST_ID), Row(span_id=FIRST_ID + 2, parent_id=parent_id, flags=flags)]
        recording = read([write(rows)])
        assert recording.parent.tolist() == [-1, -1]
        assert recording.root.tolist() == [0, 1]
        assert recording.losses.orphans == orphans

    def test_a_circle_of_parents(self, write):
        """Spans that a damaged file puts inside each other or themselves are roots, and reading ends."""
        circle = [Row(span_id=n, parent_id=1 + n % 3, start_ns=NOW_NS + n) for n in (1, 2, 3)]
        rows = [*circle, Row(span_id=4, parent_id=4, start_ns=NOW_NS + 4), Row(span_id=5, start_ns=NOW_NS + 5)]
        recording = read([write([*rows, Row(span_id=6, parent_id=5, start_ns=NOW_NS + 6)])])
        assert recording.parent.tolist() == [-1, -1, -1, -1, -1, 4]


class TestFiles:
    """Which files are read, and that none counts twice."""

    def test_processes(self, write):
        """Files of several processes are one recording; names say what tells the processes apart, and no more."""
        one = write(request_rows(), name="1.jsonl", of=resource(pid=1))
        two = write(request_rows(1), name="2.jsonl", of=resource(pid=2))
        three = write(request_rows(2), name="3.jsonl", of=resource("proxy", 3, "b"))
        assert [process.name for process in read([one]).processes] == ["server"]
        assert [process.name for process in read([one, two]).processes] == ["server 1", "server 2"]
        recording = read([one, two, three])
        assert [process.name for process in recording.processes] == ["server 1 on a", "server 2 on a", "proxy on b"]
        assert recording.thread.tolist() == [0, 0, 1, 1, 2, 2]
        assert recording.processes[2].resource["process.pid"] == 3

    def test_rotated_files_come_with_the_current_one(self, write):
        """Naming the current file reads those that were rotated, too, and naming those again changes nothing."""
        path = write(*([row] for n in range(20) for row in request_rows(n)), file_max_bytes=4096, file_backups=30)
        backups = [file for file in path.parent.iterdir() if file != path]
        assert len(backups) > 2
        assert len(read([path]).stage) == len(read([path, path, *backups]).stage) == 40
        assert len(read([path.parent]).stage) == 40

    def test_copies_of_a_file_do_not_count_twice(self, write, tmp_path):
        """A copy and a link of a file add no stage."""
        path = write(request_rows())
        (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
        (tmp_path / "link.jsonl").symlink_to(path)
        assert len(list_files([tmp_path])) == 2
        assert len(read([tmp_path]).stage) == 2

    def test_what_is_not_there(self, tmp_path):
        """A file that does not exist, and a folder without a recording, are errors of the system's kind."""
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
            read([tmp_path / "none.jsonl"])
        with pytest.raises(FileNotFoundError, match="file in this folder"):
            read([tmp_path])

    def test_progress(self, write):
        """Progress is told after each line, in bytes, and ends with all of them."""
        path = write(request_rows(), request_rows(1))
        told = []
        read([path], progress=lambda done, total: told.append((done, total)))
        size = path.stat().st_size
        assert told == [(len(path.read_bytes().splitlines(keepends=True)[0]), size), (size, size)]


class TestDamage:
    """Lines that are not as they should be are counted, and never more than that."""

    def test_truncated_last_line(self, write):
        """A last line that was cut short is counted, and all before it are read."""
        path = write(request_rows(0), request_rows(1))
        os.truncate(path, path.stat().st_size - 9)
        recording = read([path])
        assert len(recording.stage) == 2
        assert recording.losses.skipped_lines == {"truncated": 1}

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("2024-01-01 INFO started\n", "foreign"),
            ('{"level": "info", "message": "started"}\n', "foreign"),
            ("[1, 2]\n", "foreign"),
            ('{"resourceLogs": []}\n', "foreign"),
            ('{"resourceSpans": [{"resource": {}, }\n', "malformed"),
            ('{"resourceSpans": 7}\n', "malformed"),
            ('{"resourceSpans": [{"scopeSpans": null}]}\n', "malformed"),
            ("[" * 100_000 + "\n", "foreign"),
            ('{"a":' * 100_000 + "}\n", "malformed"),
        ],
    )
    def test_lines_that_are_not_ours(self, write, line, reason):
        """A line of something else is counted by its reason, and those around it are read."""
        path = write(request_rows(0))
        path.write_text(line + path.read_text() + "\n" + line)
        recording = read([path])
        assert len(recording.stage) == 2
        assert recording.losses.skipped_lines == {reason: 2}

    def test_spans_of_others(self, write):
        """Spans of another scope, as a shared OpenTelemetry Collector mixes them in, are counted."""
        path = write(request_rows())
        path.write_text(path.read_text().replace('"scope":{"name": "gpuscope"', '"scope":{"name": "flask"'))
        recording = read([path])
        assert len(recording.stage) == 0
        assert recording.processes == ()
        assert recording.losses.skipped_lines == {"foreign spans": 3}

    def test_one_bad_span_spoils_no_other(self, write):
        """A span without a number where one belongs is counted, and the others of its line are read."""
        path = write([*request_rows(0), *request_rows(1)])
        path.write_text(path.read_text().replace(f'"{NOW_NS}"', '"yesterday"'))
        recording = read([path])
        assert len(recording.stage) == 3
        assert recording.losses.skipped_lines == {"malformed spans": 1}
        assert recording.losses.orphans == 1

    def test_device_without_a_name(self, write):
        """A GPU whose name is not known has an empty one."""
        recording = read([write([Row(gpu_span_id=1)], devices={})])
        assert recording.streams == ((0, 0, "", "", 7),)

    def test_gpu_span_alone(self, write):
        """A GPU span whose host span cannot be read has no row, and is counted."""
        path = write(request_rows())
        path.write_text(path.read_text().replace(f'"{NOW_NS + 1000}"', '"-5"'))
        recording = read([path])
        assert [recording.names[stage] for stage in recording.stage] == ["request"]
        assert recording.losses.skipped_lines == {"malformed spans": 1, "GPU spans without a host span": 1}

    def test_a_stage_inside_a_graph_whose_parent_is_missing(self, write):
        """It has no row, nor have its attributes; it is counted as a GPU span without a host span."""
        inner, outer = request_rows()
        path = write([in_graph(inner, 3, parent_id=FIRST_ID + 7), inner, outer])
        recording = read([path])
        assert [recording.names[stage] for stage in recording.stage] == ["request", "infer"]
        assert recording.attributes == {1: {"model": "vit"}}
        assert recording.losses.skipped_lines == {"GPU spans without a host span": 1}
        alone = read([write([in_graph(inner, 3)], name="alone.jsonl")])
        assert (len(alone.stage), alone.attributes) == (0, {})

    def test_stages_inside_each_other_in_a_graph(self, write):
        """Stages inside a graph that a damaged file puts inside each other have no row, nor have their attributes."""
        inner, _ = request_rows()
        circle = [in_graph(inner, 3, parent_id=FIRST_ID + 4), in_graph(inner, 4, parent_id=FIRST_ID + 3)]
        recording = read([write(circle)])
        assert (len(recording.stage), recording.attributes) == (0, {})
        assert recording.losses.skipped_lines == {"GPU spans without a host span": 2}

    @pytest.mark.parametrize("seconds", [1e30, -1e30])
    def test_a_launch_outside_time(self, write, seconds):
        """A stage inside a graph and a launch before or after all time is a malformed span, and spoils no other."""
        inner, outer = request_rows()
        path = write([in_graph(inner, 3), inner, outer])
        launch = '"gpuscope.launch_to_start","value":{"doubleValue":'
        text = path.read_text()
        assert text.count(launch + "0.0}") == 1
        path.write_text(text.replace(launch + "0.0}", f"{launch}{seconds!r}}}"))
        recording = read([path])
        assert len(recording.stage) == 2
        assert recording.losses.skipped_lines == {"malformed spans": 1}

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_damage_is_survived(self, write, data):
        """However a file is cut and whichever of its bytes are changed, reading it ends and its columns agree."""
        path = self.whole(write)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 30))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        self.check(read([path]))

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_json_is_survived(self, write, data):
        """Whatever stands where a value is expected, reading ends and its columns agree."""
        path = self.whole(write)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for _ in range(data.draw(st.integers(1, 4))):
            node, key = lines, data.draw(st.integers(0, len(lines) - 1))
            while isinstance(node[key], dict | list) and node[key] and data.draw(st.integers(0, 9)):
                node = node[key]
                key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            node[key] = data.draw(ANYTHING)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.check(read([path]))

    def whole(self, write):
        """A recording of nine stages, three of them in graphs, and an account of losses, written anew."""
        for path in write(name="whole.jsonl").parent.iterdir():
            path.unlink()
        requests = [request_rows(n) for n in range(3)]
        replayed = [in_graph(rows[0], 100 + n, parent_id=rows[0].span_id) for n, rows in enumerate(requests)]
        path = write(*([*rows, row] for rows, row in zip(requests, replayed, strict=True)), name="whole.jsonl")
        with path.open("a") as file:
            file.write(metrics_line({("lost", "disk"): 3}))
        return path

    def check(self, recording):
        """Check that all columns of a damaged recording can be used together."""
        rows = len(recording.stage)
        assert rows <= 9
        for name, column in asdict(recording).items():
            if isinstance(column, np.ndarray):
                assert len(column) == rows, name
        assert len(recording.trace_id) == len(recording.span_id) == rows
        assert (recording.stage < max(len(recording.names), 1)).all()
        assert (recording.parent < rows).all()
        assert (recording.parent[recording.root] == -1).all()
        assert (recording.host_end_ns >= recording.host_start_ns).all()
        assert all(isinstance(name, str) for name in recording.names)
        json.dumps([recording.names, recording.attributes, recording.threads, asdict(recording.losses)]).encode()


class TestLosses:
    """The account of losses that comes as metrics."""

    def test_the_last_account_of_each_process_counts(self, write):
        """Figures are cumulative: of a process the newest counts, wherever it stands, and processes add up."""
        path = write(request_rows())
        with path.open("a") as file:
            file.write(metrics_line({("dropped", "queue_full"): 9, ("lost", "disk"): 2}, at=20))
            file.write(metrics_line({("dropped", "queue_full"): 4}, at=10))
            file.write(metrics_line({("dropped", "queue_full"): 1, ("untimed", "deadline"): 5}, of=resource(pid=8)))
        recording = read([path])
        assert recording.losses == Losses(
            dropped={"queue_full": 10}, lost={"disk": 2}, untimed={"deadline": 5}, skipped_lines={}
        )
        assert len(recording.processes) == 2

    def test_metrics_of_others(self, write):
        """Metrics of another scope, and ours of another name, change nothing."""
        path = write(request_rows())
        with path.open("a") as file:
            file.write(metrics_line({("dropped", "theirs"): 9}, scope="flask"))
            file.write(metrics_line({("other", "ours"): 9}))
        assert read([path]).losses == Losses()

    @pytest.mark.parametrize("figure", ["-4", "many", "1e400"])
    def test_an_account_that_cannot_be_read(self, write, figure):
        """A figure that is no count is a malformed line, and no loss."""
        path = write(request_rows())
        with path.open("a") as file:
            file.write(metrics_line({("dropped", "queue_full"): figure}))
        assert read([path]).losses == Losses(skipped_lines={"malformed": 1})
