"""The HTML timeline's data and page, without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._verdicts.findings import RequestVerdict
from gpuscope.analysis._viewers.timeline_data import timeline_data
from gpuscope.analysis._viewers.timeline_lanes import MAX_ROWS, gpu_rows, host_rows
from gpuscope.analysis.figures import figures
from gpuscope.analysis.timeline import render, write_html

from ..recordings import Stage, recording, repeat

NASTY = '</script><img src=x onerror="alert(1)"><!-- & &lt; \u2028 \ud800 <!--gpuscope:script-->'

REQUEST = Stage(
    "request",
    0,
    900,
    gpu=(3, 898),
    attributes={"batch_size": 8},
    inside=[
        Stage("infer", 10, 300, gpu=(15, 880)),
        Stage("copy", 300, 890, gpu=(880, 888)),
    ],
)


class Page(HTMLParser):
    """What a browser would see: the tags in order, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Note the tag."""
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        """Leave the tag."""
        self.inside = ""

    def handle_data(self, data):
        """Keep the text of scripts and styles."""
        if self.inside in self.texts:
            self.texts[self.inside][-1] += data

    @property
    def data(self):
        """What the page's script is given."""
        return json.loads(self.texts["script"][0])


def times(data):
    """Return the four columns of times that the page's script makes of the data, since the recording's start."""
    columns = {name: np.array(column) for name, column in data["columns"].items()}
    start = columns["step"].cumsum()
    gpu_start = start + columns["delay"]
    return start, start + columns["host"], gpu_start, gpu_start + columns["gpu"]


def test_nothing_is_loaded():
    """The page names no address, and its policy forbids the browser to load anything."""
    page = Page(render(recording(REQUEST)))
    text = "".join(page.texts["script"][1:] + page.texts["style"]).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w|url\(|@import|import\(|fetch\(|XMLHttpRequest|WebSocket", text)
    assert not [tag for tag, attributes in page.tags if {"src", "href", "onclick"} & attributes.keys()]
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';")


def test_policy_lets_the_script_run():
    """The policy has the digests of the script and of the style exactly as they stand in the page."""
    page = Page(render(recording(REQUEST)))
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    for text in (page.texts["script"][1], page.texts["style"][0]):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_markup_stays_text():
    """Markup in the names of stages, threads and processes and in attributes is data, and adds no tag to the page."""
    plain = Page(render(recording(REQUEST)))
    nasty = Stage(NASTY, 0, 9, thread=NASTY, process=NASTY, attributes={NASTY: NASTY})
    page = Page(render(recording(nasty)))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.data["names"] == list(page.data["attributes"]["0"]) == [NASTY]
    assert page.data["threads"][0]["name"] == page.data["processes"][0]["name"] == NASTY
    assert page.texts["script"][1] == plain.texts["script"][1]
    assert not set("<>&") & set(page.texts["script"][0])


@settings(max_examples=25)
@given(st.text())
def test_any_name_arrives(name):
    """Any text at all comes out of the page as it was, and leaves the page's ASCII data block intact."""
    text = render(recording(Stage(name, 0, 9)))
    assert Page(text).data["names"] == [name]


def test_times_arrive_exactly():
    """Host and GPU times are those of the recording to the nanosecond, warm-up or not, with or without a GPU part."""
    stages = recording(*repeat(REQUEST, 3, 1000.001), Stage("late", 1e12, 1e12 + 0.001))
    columns = (stages.host_start_ns, stages.host_end_ns, stages.gpu_start_ns, stages.gpu_end_ns)
    data = Page(render(stages)).data
    timed = stages.stream >= 0
    for place, (arrived, expected) in enumerate(zip(times(data), columns, strict=True)):
        rows = timed if place > 1 else np.ones_like(timed)
        assert (arrived[rows] + int(data["start_ns"]) == expected[rows]).all()


def test_tree_arrives():
    """A stage names its parent by distance; a root has none, and one trace id."""
    data = timeline_data(recording(*repeat(REQUEST, 2, 1000)))
    assert data["columns"]["parent"] == [0, 1, 2, 0, 1, 2]
    assert len(data["traces"]) == 2


def test_a_bar_is_below_the_stage_around_it():
    """Stages inside another are a row below it, on the host and on the stream; neighbours share a row."""
    stages = recording(*repeat(REQUEST, 2, 1000))
    assert host_rows(stages).tolist() == gpu_rows(stages).tolist() == [0, 1, 1, 0, 1, 1]


def test_concurrent_requests_of_a_thread_do_not_overlap():
    """Requests that overlap on one thread, as those of coroutines do, get rows of their own."""
    stages = recording(Stage("a", 0, 10), Stage("b", 5, 15, inside=[Stage("c", 6, 14)]), Stage("d", 11, 12))
    assert host_rows(stages).tolist() == [0, 1, 2, 0]


def test_overlap_within_the_uncertainty_is_none():
    """GPU bars that overlap by less than their place is uncertain share a row; by more, they do not."""
    near = recording(Stage("a", 0, 9, gpu=(0, 10)), Stage("b", 9, 20, gpu=(8, 20), uncertainty=3))
    far = recording(Stage("a", 0, 9, gpu=(0, 10)), Stage("b", 9, 20, gpu=(5, 20), uncertainty=3))
    assert gpu_rows(near).tolist() == [0, 0]
    assert gpu_rows(far).tolist() == [0, 1]


def test_rows_of_a_lane_are_bounded():
    """However many stages run at once, a lane has a bounded number of rows."""
    assert host_rows(recording(*repeat(Stage("a", 0, 1e6), 200, 1))).max() == MAX_ROWS - 1


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=40))
def test_no_two_bars_overlap(intervals):
    """Whatever the stages, no two bars of one row overlap."""
    stages = recording(*(Stage("s", start, start + length) for start, length in intervals))
    rows = host_rows(stages)
    for row in set(rows.tolist()):
        assert (stages.host_start_ns[rows == row][1:] >= stages.host_end_ns[rows == row][:-1]).all()


def test_bubbles_of_a_gpu():
    """A GPU idles between its leaf stages; an outer stage, whose events are far apart, fills no gap."""
    (device,) = timeline_data(recording(*repeat(REQUEST, 2, 1000)))["devices"]
    assert device["idle"] == {"start": [888_000], "end": [1_015_000]}
    assert (device["start"], device["end"]) == (15_000, 1_888_000)


def test_streams_of_one_gpu_fill_each_others_gaps():
    """Overlapping stages on two streams of a GPU are counted once; those of another GPU are not."""
    stages = recording(
        Stage("a", 0, 10, gpu=(0, 10)),
        Stage("b", 5, 20, gpu=(5, 20), stream=7),
        Stage("c", 30, 40, gpu=(30, 40)),
        Stage("d", 20, 30, gpu=(20, 30), device=1),
    )
    first, second = timeline_data(stages)["devices"]
    assert first["idle"] == {"start": [20_000], "end": [30_000]}
    assert second["idle"] == {"start": [], "end": []}


def test_queued_work():
    """Work was queued from when the host left a stage until its GPU part ended, if that is more than uncertain."""
    (device,) = timeline_data(recording(REQUEST))["devices"]
    assert device["queued"] == {"start": [300_000], "end": [880_000]}
    near = recording(Stage("a", 0, 10, gpu=(1, 12), uncertainty=3))
    assert timeline_data(near)["devices"][0]["queued"]["start"] == []


def test_clamped_stages_prove_nothing():
    """A stage whose GPU start had to be moved is not taken as proof of queued work."""
    clamped = recording(Stage("a", 0, 10, gpu=(0, 100), flags=RowFlag.CLAMPED))
    assert timeline_data(clamped)["devices"][0]["queued"]["start"] == []


def test_bubbles_of_a_thread():
    """A thread idles between its requests, and between the stages that another thread's request has on it."""
    request = Stage("request", 0, 100, inside=[Stage("w", 10, 20, thread="T"), Stage("w", 30, 40, thread="T")])
    main, worker = timeline_data(recording(request, request.shifted(150)))["threads"]
    assert main["gaps"] == {"start": [100_000], "end": [150_000]}
    assert worker["gaps"] == {"start": [20_000, 40_000, 170_000], "end": [30_000, 160_000, 180_000]}


def test_distributions_hold_every_measured_call():
    """Each stage's distribution counts all its calls but the warm-up, also where all take the same time."""
    warm = Stage("request", 0, 50_000, flags=RowFlag.WARMUP)
    same, varied = repeat(Stage("same", 0, 5), 9, 10), [Stage("varied", 0, 2.0**power) for power in range(9)]
    lines = timeline_data(recording(warm, *same, *varied, Stage("request", 0, 7)))["stages"]
    assert {line["name"]: sum(line["host_shape"]["counts"]) for line in lines} == {"request": 1, "same": 9, "varied": 9}


def test_figures_that_are_given_are_not_computed_again():
    """A report hands in the figures that it has, and the page shows those."""
    stages = recording(REQUEST)
    known = replace(figures(stages), requests=())
    assert Page(render(stages, figures=known)).data["requests"] == []


def test_empty_recording():
    """A recording without stages becomes a page that has no lanes, rather than an error."""
    data = Page(render(recording())).data
    assert data["columns"]["stage"] == data["stages"] == data["devices"] == []


def test_findings_are_passed_on():
    """The page has the verdicts as plain data, null for what JSON cannot hold, and null where nobody judged."""

    class Findings:
        def as_dict(self):
            return {"notes": ["`a` < b"], "gain_ms": float("nan"), "deep": [{"x": (1, float("inf"))}]}

    expected = {"notes": ["`a` < b"], "gain_ms": None, "deep": [{"x": [1, None]}]}
    assert Page(render(recording(REQUEST), Findings())).data["findings"] == expected
    assert Page(render(recording(REQUEST))).data["findings"] is None


def test_verdicts_have_what_the_page_shows():
    """Every field of a verdict that the page's script reads is one that verdicts have."""
    script = (files("gpuscope.analysis") / "assets" / "verdicts.js").read_text(encoding="utf-8")
    read = set(re.findall(r"\b(?:verdict|request|stage)\.(\w+)", script))
    assert "because" in read
    assert read <= {field.name for field in fields(RequestVerdict)}


def test_attributes_are_text():
    """Attribute values of any kind arrive as text, long ones cut."""
    values = {"n": 2**60, "x": float("nan"), "list": [1, "b"], "long": "y" * 9999}
    stages = recording(Stage("a", 0, 9, attributes=values))
    attributes = timeline_data(stages)["attributes"]["0"]
    assert attributes["n"] == str(2**60)
    assert (attributes["x"], attributes["list"], len(attributes["long"])) == ("nan", "[1, 'b']", 2000)


def test_file_is_replaced(tmp_path):
    """The file holds this recording's page and nothing of what it held before."""
    path = tmp_path / "timeline.html"
    path.write_text("old" * 1_000_000)
    write_html(recording(REQUEST), path)
    assert path.read_text(encoding="utf-8") == render(recording(REQUEST))


def test_missing_folder_is_an_error(tmp_path):
    """A path in a folder that does not exist is the system's error, with the path in it."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_html(recording(REQUEST), tmp_path / "nowhere" / "timeline.html")
