"""The HTML timeline in a real browser, headless: what a person does with it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from gpuscope._data.batch import RowFlag
from gpuscope.analysis.durations import duration
from gpuscope.analysis.recording import Losses
from gpuscope.analysis.timeline import write_html
from gpuscope.analysis.verdict import judge

from ..recordings import Stage, batched, recording, repeat
from ..verdicts.simulate import serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

FRAME_MS = 100
"""Loose: a frame takes 20 ms on two busy cores without a GPU, and took 200 before narrow bars were merged."""


def request(infer_us=300, flags=0, thread="MainThread"):
    """Return a request whose GPU lags behind: it launches `infer`, and waits for it in `copy`."""
    end = infer_us + 620
    return Stage(
        "request",
        0,
        end,
        gpu=(3, end + 2),
        thread=thread,
        flags=flags,
        attributes={"batch_size": 8, "<b>": "<script>alert(1)</script>"},
        inside=[
            Stage("infer", 10, infer_us, gpu=(15, infer_us + 580), flags=flags, attributes={"tokens": infer_us}),
            Stage("copy", infer_us, infer_us + 590, gpu=(infer_us + 580, infer_us + 588), flags=flags),
        ],
    )


def ten_requests():
    """Return requests 1 to 10; the first is warm-up, the fourth the slowest, and one has failed on another thread."""
    lengths = [300, 310, 320, 700, 330, 340, 350, 360, 370, 380]
    roots = [request(us, RowFlag.WARMUP if not n else 0).shifted(n * 1500) for n, us in enumerate(lengths)]
    failed = Stage("</script><img src=x>", 500, 900, thread="loader", error=True)
    return recording(*roots, failed, losses=Losses(dropped={"queue_full": 7}))


def many(times):
    """Return a recording of so many times ten requests, one after the other."""
    ten = ten_requests()
    count, shift_ns = len(ten.stage), np.repeat(np.arange(times) * 16_000_000, len(ten.stage))
    columns = {name: np.tile(getattr(ten, name), times) for name in ("stage", "thread", "stream", "flags", "error")}
    columns |= {name: np.tile(getattr(ten, name), times) for name in ("samples", "had_work")}
    columns["uncertainty_ns"] = np.tile(ten.uncertainty_ns, times)
    for name in ("parent", "root"):
        rows = np.tile(getattr(ten, name), times)
        columns[name] = np.where(rows >= 0, rows + np.repeat(np.arange(times) * count, count), -1)
    for name in ("host_start_ns", "host_end_ns", "gpu_start_ns", "gpu_end_ns"):
        column = np.tile(getattr(ten, name), times)
        columns[name] = np.where(column, column + shift_ns, 0)
    return replace(ten, trace_id=ten.trace_id * times, span_id=ten.span_id * times, **columns)


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests."""
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def tab(browser):
    """One tab for all tests: a new one for each takes as long as a test."""
    return browser.new_context(viewport={"width": 1280, "height": 800}).new_page()


@pytest.fixture
def show(tab, tmp_path):
    """Open a recording's page from disk; at the end no error was logged or raised, and nothing else was loaded."""
    complaints, loaded = [], []
    listeners = {
        "console": lambda message: message.type == "error" and complaints.append(message.text),
        "pageerror": lambda error: complaints.append(str(error)),
        "request": lambda request: loaded.append(request.url),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)

    def opened(stages, findings=None):
        path = tmp_path / "timeline.html"
        write_html(stages, path, findings)
        tab.goto(path.as_uri())
        return tab

    yield opened
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert complaints == []
    assert {url.rsplit("/", 1)[1] for url in loaded} == {"timeline.html"}


def all_of(page):
    """Show all of the recording, with nothing selected."""
    page.evaluate("document.getElementById('all').onclick()")
    page.evaluate("gpuscope.view.set({ selected: null })")
    span_ns(page)
    return page


def span_ns(page):
    """Return the length of the window of time that is shown, once it no longer moves and has been drawn."""
    return page.evaluate("""async () => {
        do await new Promise(requestAnimationFrame); while (gpuscope.view.turn);
        await new Promise(requestAnimationFrame);
        return gpuscope.view.span;
    }""")


def place(page, row, side):
    """Return the middle of a bar on the page, once nothing moves."""
    span_ns(page)
    box = page.evaluate("bar => gpuscope.picture.box(bar)", {"row": row, "side": side})
    canvas = page.locator("#lanes").bounding_box()
    return canvas["x"] + (box["left"] + box["right"]) / 2, canvas["y"] + box["top"] + box["height"] / 2


def row_of(page, name, nth=0):
    """Return the row of the nth run of a stage."""
    return page.evaluate("([name, nth]) => gpuscope.model.find(name)[nth]", [name, nth])


def pixel(page, x, y):
    """Return the colour at a place of the page, from the canvas of the lanes."""
    script = """([x, y]) => {
        const canvas = document.getElementById('lanes'), box = canvas.getBoundingClientRect();
        return [...canvas.getContext('2d').getImageData(x - box.left, y - box.top, 1, 1).data];
    }"""
    return page.evaluate(script, [x, y])


def spoken(text):
    """Text as one reads it, without breaks."""
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())


def test_answer_and_median_request_come_first(show):
    """The page begins with the answer, and shows the median request; the slowest that is judged is one click away."""
    stages = recording(*(request(us).shifted(us * 9) for us in range(300, 420, 10)), *ten_requests_later())
    page = show(stages, judge(stages))
    answer = spoken(page.locator("#answers").inner_text())
    assert answer.startswith("request ")
    assert "Try first: " in answer
    lengths = page.evaluate("gpuscope.model.bySpeed(gpuscope.model.requests).map(row => gpuscope.model.length(row))")
    shown = page.evaluate("gpuscope.model.length(gpuscope.view.request)")
    assert shown == pytest.approx(sorted(lengths)[len(lengths) // 2], rel=0.05)
    assert span_ns(page) == pytest.approx(shown * 1.04, rel=0.01)
    page.locator("#answers").get_by_role("button", name="slowest").click()
    assert page.evaluate("gpuscope.model.length(gpuscope.view.request)") == max(lengths)


def ten_requests_later():
    """Return two requests that are warm-up, slower than all others."""
    return [request(3000, RowFlag.WARMUP).shifted(1e5 + 1e4 * n) for n in range(2)]


def test_cold_requests_are_apart(show):
    """Warm-up is neither median nor slowest; a button of its own leads from one to the next, if there are any."""
    page = show(recording(*repeat(request(), 5, 1500), *ten_requests_later()))
    cold = page.locator("#picker").get_by_role("button", name="Cold")
    cold.click()
    assert page.locator("#number").input_value() == "6"
    cold.click()
    assert page.locator("#number").input_value() == "7"
    assert show(recording(*repeat(request(), 5, 1500))).locator("[data-pick=cold]").is_hidden()


def test_what_has_not_ended_is_not_the_slowest(show):
    """Nor at a percentile: it is as long as it is by chance."""
    running = Stage("request", 7500, 19_500, flags=RowFlag.NOT_ENDED)
    page = show(recording(*repeat(request(), 5, 1500), running))
    page.locator("#picker").get_by_role("button", name="Slowest").click()
    assert page.evaluate("gpuscope.model.length(gpuscope.view.request)") == 922_000
    alone = show(recording(running))
    assert len(alone.evaluate("gpuscope.model.bySpeed(gpuscope.model.requests)")) == 1


def test_legend_has_what_occurs(show):
    """Of a recording without a GPU nothing of streams, and of one without errors nothing of those."""
    page = show(ten_requests())
    shown = [spoken(line.inner_text()) for line in page.locator(".legend li").all() if line.is_visible()]
    assert len(shown) == 7
    page = show(recording(Stage("request", 0, 100), Stage("request", 100, 200)))
    shown = [spoken(line.inner_text()) for line in page.locator(".legend li").all() if line.is_visible()]
    assert shown == ["on the host"]
    assert page.locator("#on-streams").is_hidden()


def test_a_request_lists_what_its_batches_take(show):
    """A batch is told apart from time in no stage; a stage of the request beside the batch counts first."""
    inside = [Stage("read", 0, 100), Stage("beside", 500, 600), Stage("answer", 900, 1000)]
    stages = []
    for number in range(3):
        stages.append(Stage("request", 0, 1000, inside=inside).shifted(5000 * number))
        stages.append(Stage("predict", 400, 900, thread="batcher").shifted(5000 * number))
    whole = recording(*stages)
    rows = {name: [row for row, at in enumerate(whole.stage) if whole.names[at] == name] for name in whole.names}
    pairs = zip(rows["predict"], rows["request"], strict=True)
    page = show(batched(whole, *[(batch, {request: (300.0, -1.0)}) for batch, request in pairs]))
    page.locator("table.parts tr").first.wait_for()
    shown = [spoken(row.inner_text()) for row in page.locator("table.parts tr").all()]
    assert shown == [
        *("read 100 µs 10.0 %", "beside 100 µs 10.0 %", "answer 100 µs 10.0 %"),
        *("in its batches 400 µs 40.0 %", "waiting for its batches, or in no stage 300 µs 30.0 %"),
    ]


def test_a_request_lists_its_parts(show):
    """Each stage with its time and share, then the time in no stage: they are the request."""
    tree = Stage("request", 0, 1000, inside=[Stage("a", 100, 300), Stage("b", 300, 800), Stage("a", 800, 900)])
    page = show(recording(*repeat(tree, 3, 5000)))
    page.locator("table.parts tr").first.wait_for()
    rows = [spoken(row.inner_text()) for row in page.locator("table.parts tr").all()]
    assert rows == ["a \N{MULTIPLICATION SIGN}2 300 µs 30.0 %", "b 500 µs 50.0 %", "in no stage 200 µs 20.0 %"]


def test_threads_of_a_pool_can_be_told_apart(show):
    """Their names differ at their ends, which are shown."""
    threads = [f"ThreadPoolExecutor-0_{number}" for number in range(3)]
    page = show(recording(*(Stage("request", 100 * n, 100 * n + 50, thread=name) for n, name in enumerate(threads))))
    labels = page.locator("#labels > div:not(.head) b")
    assert [label.inner_text()[-3:] for label in labels.all()] == ["0_0", "0_1", "0_2"]
    assert all(label.evaluate("node => node.scrollWidth <= node.clientWidth") for label in labels.all())


def test_how_to_read_the_page_is_one_click_away(show):
    """A button explains the words."""
    page = show(ten_requests())
    page.get_by_role("button", name="How to read this").click()
    assert "without work" in page.locator("#guide").inner_text().lower()
    page.locator("#guide").get_by_role("button", name="Close").click()
    assert page.locator("#guide").is_hidden()


def test_without_a_gpu_no_verdict_is_unknown(show):
    """The page says once that there is no GPU, and nothing is said to be unknown."""
    stages = recording(*repeat(Stage("request", 0, 1000, inside=[Stage("a", 100, 900)]), 20, 5000))
    page = show(stages, judge(stages))
    text = page.locator("main").inner_text()
    assert text.startswith("No GPU in this recording")
    assert "unknown" not in text
    assert page.locator("#verdicts").is_hidden()


def test_figures_of_the_whole_are_shown(show):
    """They are of everything, which is one click away; the lanes are those of all threads and streams."""
    page = show(ten_requests())
    page.get_by_role("button", name="All", exact=True).click()
    span_ns(page)
    assert page.evaluate("[gpuscope.view.from < 0, gpuscope.view.to > gpuscope.model.to]") == [True, True]
    figures = page.locator("#figures").inner_text()
    assert "1 warm-up" in figures
    assert "± 3.00 µs" in figures.replace("\N{NO-BREAK SPACE}", " ")
    assert [label.inner_text().split("\n")[0] for label in page.locator("#labels > div").all()] == [
        "server",
        "MainThread",
        "loader",
        "GPU 0 · NVIDIA H200",
        "default stream",
    ]


def test_click_selects(show):
    """A click on a bar shows the stage's times and attributes as text; one beside the bars shows none."""
    page = all_of(show(ten_requests()))
    page.mouse.click(*place(page, row_of(page, "request", 1), "host"))
    text = page.locator("#selection").inner_text()
    assert text.startswith("request")
    assert "batch_size" in text
    assert "<script>alert(1)</script>" in text
    x, y = place(page, row_of(page, "img"), "host")
    page.mouse.click(x + 300, y)
    page.locator("#selection").get_by_text("Select a stage").wait_for()


def test_a_gpu_bar_is_tied_to_its_launch(show):
    """A click on a launch or on its GPU bar selects the stage, and a line is drawn from one to the other."""
    page = show(ten_requests())
    page.get_by_role("button", name="Slowest").click()
    row = row_of(page, "infer", 3)
    for side in ("host", "gpu"):
        page.mouse.click(*place(page, row, side))
        assert page.evaluate("gpuscope.view.selected") == {"row": row, "side": side}
        assert page.locator("#selection h2").inner_text() == "infer"
    accent = page.evaluate("gpuscope.picture.palette.accent")
    box = page.evaluate("row => gpuscope.picture.box({ row, side: 'host' })", row)
    canvas = page.locator("#lanes").bounding_box()
    page.mouse.move(5, 5)
    span_ns(page)
    dot = pixel(page, canvas["x"] + box["left"], canvas["y"] + box["top"] + box["height"] + 1)
    assert f"#{bytes(dot[:3]).hex()}" == accent


def test_hover_tells(show):
    """The pointer over a bar shows its name and times beside it; away from it, nothing."""
    page = all_of(show(ten_requests()))
    page.mouse.move(*place(page, row_of(page, "request", 3), "host"))
    page.locator("#tip").get_by_text("request").wait_for()
    page.mouse.move(5, 5)
    page.locator("#tip").wait_for(state="hidden")


def test_wheel_zooms_at_the_pointer(show):
    """The wheel makes the window of time shorter, and what is under the pointer stays there."""
    page = all_of(show(ten_requests()))
    whole, at = span_ns(page), place(page, row_of(page, "infer", 5), "host")
    page.mouse.move(*at)
    page.mouse.wheel(0, -400)
    assert span_ns(page) < whole / 1.5
    assert place(page, row_of(page, "infer", 5), "host") == pytest.approx(at, abs=2)


def test_drag_pans(show):
    """Dragging the lanes moves the window of time with the pointer, without zooming or selecting."""
    page = all_of(show(ten_requests()))
    page.get_by_role("button", name="Zoom in").click()
    span, from_ns = span_ns(page), page.evaluate("gpuscope.view.from")
    x, y = place(page, row_of(page, "request", 4), "host")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 100, y, steps=4)
    page.mouse.up()
    assert span_ns(page) == pytest.approx(span)
    moved = (from_ns - page.evaluate("gpuscope.view.from")) / span * page.evaluate("gpuscope.picture.width")
    assert moved == pytest.approx(100, abs=6)
    assert page.evaluate("gpuscope.view.selected") is None


def test_drag_on_the_ruler_zooms(show):
    """Dragging over the ruler shows just that time."""
    page = show(ten_requests())
    whole, width, ruler = span_ns(page), page.evaluate("gpuscope.picture.width"), page.locator("#ruler").bounding_box()
    page.mouse.move(ruler["x"] + 100, ruler["y"] + 10)
    page.mouse.down()
    page.mouse.move(ruler["x"] + 200, ruler["y"] + 10, steps=4)
    page.mouse.up()
    assert span_ns(page) == pytest.approx(whole * 100 / width, rel=0.01)


def test_overview_travels(show):
    """A press on the overview brings the window of time there."""
    page = show(ten_requests())
    for _ in range(4):
        page.get_by_role("button", name="Zoom in").click()
    overview = page.locator("#overview").bounding_box()
    page.mouse.click(overview["x"] + overview["width"] * 0.9, overview["y"] + 20)
    middle = page.evaluate("(gpuscope.view.from + gpuscope.view.to) / 2 / gpuscope.model.to")
    assert middle == pytest.approx(0.9, abs=0.02)


def test_keys(show):
    """Letters zoom, move and fit; arrows walk among stages; g crosses to the GPU; escape lets go."""
    page = all_of(show(ten_requests()))
    whole = span_ns(page)
    page.keyboard.press("w")
    zoomed = span_ns(page)
    page.keyboard.press("d")
    assert page.evaluate("gpuscope.view.from") > 0
    page.keyboard.press("s")
    assert zoomed < span_ns(page) <= whole
    walked = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowRight", "g", "ArrowUp"):
        page.keyboard.press(key)
        walked.append(page.evaluate("[gpuscope.model.name(gpuscope.view.selected.row), gpuscope.view.selected.side]"))
    assert [name for name, _ in walked] == ["request", "request", "infer", "copy", "copy", "request"]
    assert [side for _, side in walked] == ["host"] * 4 + ["gpu"] * 2
    page.keyboard.press("f")
    assert span_ns(page) < whole / 2
    page.keyboard.press("0")
    assert span_ns(page) == whole
    page.keyboard.press("Escape")
    assert page.evaluate("gpuscope.view.selected") is None


def test_help_lists_the_keys(show):
    """The question mark opens the list of keys, escape closes it."""
    page = show(ten_requests())
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys and mouse").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Keys and mouse").wait_for(state="hidden")


def test_search_counts_and_steps(show):
    """Search counts matches in names and attributes, and enter goes to the next, shift and enter back."""
    page = all_of(show(ten_requests()))
    page.keyboard.press("/")
    page.keyboard.type("INFER")
    assert page.locator("#found").inner_text() == "10 matches"
    found = []
    for key in ("Enter", "Enter", "Shift+Enter"):
        page.keyboard.press(key)
        found.append((page.locator("#found").inner_text(), page.evaluate("gpuscope.view.selected.row")))
    assert [text for text, _ in found] == ["1 of 10", "2 of 10", "1 of 10"]
    assert found[0] == found[2] != found[1]
    page.locator("#query").fill("tokens=7")
    assert page.locator("#found").inner_text() == "1 match"
    page.locator("#query").fill("nothing of the kind")
    assert page.locator("#found").inner_text() == "0 matches"
    assert page.get_by_role("button", name="Next match").is_disabled()


def test_request_picker(show):
    """The slowest, the median and any request by number are shown, each filling the window; warm-up is no median."""
    lengths_us = {300: 0, 400: 0, 500: 0, 600: 0, 900: RowFlag.WARMUP}
    page = show(recording(*(request(us, flags).shifted(us * 9) for us, flags in lengths_us.items())))
    numbers = []
    for name in ("Slowest", "Median", "p99"):
        page.locator("#picker").get_by_role("button", name=name).click()
        numbers.append(page.locator("#number").input_value())
    assert numbers == ["4", "2", "4"]
    page.locator("#number").fill("3")
    page.keyboard.press("Enter")
    page.locator("#window").get_by_text("Request 3").wait_for()
    assert span_ns(page) == pytest.approx((500 + 622) * 1e3 * 1.04, rel=0.01)
    page.get_by_role("button", name="Next request").click()
    assert page.locator("#number").input_value() == "4"
    page.get_by_role("button", name="All", exact=True).click()
    page.locator("#window").get_by_text("In view").wait_for()


def test_shares_add_up(show):
    """What the GPU did in a request, queued, undecided and in no stage, adds up to its time within the request."""
    page = show(recording(*repeat(request(), 3, 1500)))
    page.locator("#number").fill("2")
    page.keyboard.press("Enter")
    page.locator("#window").get_by_text("Request 2").wait_for()
    shares = page.evaluate("""(() => {
        const { from, to } = gpuscope.model.extent.get(gpuscope.view.request);
        const [{ device, ...found }] = shares(gpuscope.model, from, to);
        return found
    })()""")
    assert shares == {"length": 922e3, "idle": 15e3 + 34e3, "queued": 580e3, "open": 293e3}


def test_kinds_of_requests_are_picked_apart(show):
    """Where there are several kinds of request, the picker works within the chosen one."""
    page = show(ten_requests())
    page.locator("#kind").select_option(label="</script><img src=x>")
    page.get_by_role("button", name="Slowest").click()
    assert page.locator("#picked").inner_text() == "of 1 request"
    page.locator("#window").get_by_text("Request 1 ·").wait_for()
    assert page.locator("#selection h2").inner_text() == "</script><img src=x>"
    assert page.locator("img").count() == 0


def test_table_sorts(show):
    """A press on a column's title sorts by it, greatest first; a second one turns the order."""
    page = show(ten_requests())
    calls = page.get_by_role("columnheader", name="calls").get_by_role("button")
    names = page.locator("#stages tbody button.name")
    assert names.all_inner_texts()[:3] == ["request", "infer", "copy"]
    calls.click()
    calls.click()
    assert names.first.inner_text() == "</script><img src=x>"
    names.nth(1).click()
    assert page.locator("#found").inner_text() == "10 matches"


def asked(had_work):
    """Return requests whose stage `infer` launches all along, with so many of five answers that found work."""
    infer = Stage("infer", 10, 800, gpu=(15, 840), samples=5, had_work=had_work)
    whole = Stage("request", 0, 900, gpu=(3, 903), inside=[infer, Stage("copy", 805, 880, gpu=(842, 884))])
    return recording(*repeat(whole, 40, 1500))


def test_where_events_cannot_tell_what_is_usual_is_drawn(show):
    """The pale part is filled from below, as high as the stream usually has work; legend, table and texts say so."""
    counted = []
    for had_work in (0, 2, 5):
        whole = asked(had_work)
        page = show(whole, judge(whole))
        page.locator("#picker").get_by_role("button", name="Median").click()
        assert page.locator(".legend li[data-if=usual]").is_visible()
        counted.append(page.evaluate(FILLED))
    assert counted[0] == 0
    assert counted[1] == pytest.approx(0.4, abs=0.08)
    assert counted[2] == 1
    playwright.expect(page.locator("#window")).to_contain_text("usually work")  # A little after the picture.
    row = page.locator("#stages tr").filter(has_text="infer").inner_text()
    assert "100 % (" in row.replace("\u00a0", " ")


def test_advice_is_shown_once(show):
    """The same sentences under each stage hide what is different."""
    whole = asked(5)
    steps = show(whole, judge(whole)).locator("#verdicts .verdict li").all_inner_texts()
    assert steps
    assert len(steps) == len(set(steps))


def test_without_answers_pale_stays_pale(show):
    """Nothing is claimed, and nothing is explained that is not there."""
    page = show(ten_requests())
    assert page.locator(".legend li[data-if=usual]").is_hidden()
    assert "usually" not in page.locator("#window").inner_text()
    assert "busy" not in page.locator("#stages thead").inner_text()


FILLED = """() => {
    const { model, view } = gpuscope, row = model.find("infer").find(row => model.root[row] === view.request);
    const painted = [], context = { fillRect: (x, y, w, h) => painted.push(h), strokeRect: () => {}, measureText: () =>
        ({ width: 1e9 }), fillText: () => {}, beginPath: () => {} };
    const painter = new TrackPainter(model, view), { fill, shades, edge } = new Palette(model, "light");
    const track = new Track([row], model.gpuStart, model.gpuEnd);
    painter.draw(context, { fill, shades, edge }, track, "gpu", { from: model.gpuStart[row], to: model.gpuEnd[row],
        width: 1000 }, 0, 100);
    return painted[2] / 100;
}"""
"""How high the part in which the host is still inside is filled: the third rectangle of the bar."""


def test_verdicts_and_losses_are_stated(show):
    """The verdicts are shown with what they rest on, and what was lost with its reason; unjudged, the page says so."""
    stages = ten_requests()
    page = show(stages, judge(stages))
    assert page.locator("#verdicts .verdict h3").first.inner_text().startswith("request")
    assert "judged by" in page.locator("#verdicts").inner_text()
    assert "7 queue_full" in page.locator("#missing").inner_text()
    assert "Nothing was judged" in show(stages).locator("#verdicts").inner_text()


def contrast(one, other):
    """Return the contrast ratio of two colours, as the Web Content Accessibility Guidelines 2 define it."""

    def luminance(text):
        parts = (int(text[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(show, tab, scheme):
    """The page follows the system's choice, the button turns it, and texts can be read in both (4.5 to 1)."""
    tab.emulate_media(color_scheme=scheme)
    page = show(ten_requests())
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    colours = page.evaluate("gpuscope.picture.palette")
    for text in ("text", "quiet", "idleText", "accent", "bad"):
        assert contrast(colours[text], colours["card"]) >= 4.5, text
    assert contrast(colours["quiet"], colours["soft"]) >= 4.5
    assert min(contrast(colours["ink"], fill) for fill in colours["fill"]) >= 4.5
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == other
    assert page.evaluate("gpuscope.picture.palette.card") != colours["card"]


def test_stage_that_also_runs_by_itself_has_its_colour(show):
    """Grey is for what is never inside: a model that was warmed up outside requests is told apart in them."""
    stages = recording(Stage("infer", 0, 50), Stage("copy", 60, 90), request().shifted(100))
    fills = dict(zip(stages.names, show(stages).evaluate("gpuscope.picture.palette.fill"), strict=True))
    assert len(set(fills.values())) == 3
    alone = recording(Stage("infer", 0, 50), request().shifted(100))
    assert show(alone).evaluate("gpuscope.picture.palette.fill")[alone.names.index("request")] == fills["request"]


def test_warmup_is_hatched(show):
    """A warm-up bar is not of one colour, unlike the same bar later."""
    page = show(ten_requests())

    def colours(nth):
        page.locator("#kind").select_option(label="request")
        page.locator("#number").fill(str(nth + 1))
        page.keyboard.press("Enter")
        x, y = place(page, row_of(page, "copy", nth), "host")
        return {tuple(pixel(page, x + across, y + 6)) for across in range(40, 60)}

    assert len(colours(0)) > 1
    assert len(colours(1)) == 1


def test_empty_recording_says_so(show):
    """A recording without stages is a page that says so, whatever is pressed."""
    page = show(recording())
    for key in "wsad0f[]g":
        page.keyboard.press(key)
    page.keyboard.press("ArrowRight")
    page.get_by_text("This recording has no stages.").wait_for()


def test_small_window(show):
    """On a narrow window nothing sticks out sideways."""
    page = show(ten_requests())
    page.set_viewport_size({"width": 420, "height": 800})
    width = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 1280, "height": 800})
    assert width <= 420


def test_hundred_thousand_stages(show):
    """A recording of 100,000 stages opens, and pans smoothly at every zoom."""
    page = show(many(3_300))
    assert page.evaluate("gpuscope.model.size") > 100_000
    script = """async part => {
        const { view } = gpuscope, times = [];
        view.show(view.least, view.least + (view.most - view.least) * part);
        for (let frame = 0, last = 0; frame < 25; frame++) {
            const now = await new Promise(requestAnimationFrame);
            if (frame > 4) times.push(now - last);
            last = now;
            view.pan(view.span / 200);
        }
        return times.sort((a, b) => a - b)[times.length >> 1];
    }"""
    for part in (1, 0.3, 0.01, 0.0001):
        assert page.evaluate(script, part) < FRAME_MS, part


class TestGraphs:
    """Replays of CUDA graphs with stages inside."""

    @pytest.fixture
    def page(self, show):
        """Ten requests, each with a replay whose stages have a gap between them and are nested."""

        def replay(machine):
            with machine.stage("decode"):
                machine.replay(("attention", 300), (None, 200), ("mlp", (("up", 150), ("down", 150))))
            with machine.stage("fetch"):
                machine.blocking_copy(3)

        stages = serve(replay, count=10).recording()
        return show(stages, judge(stages))

    def test_inner_stages_lie_on_the_stream_alone(self, page):
        """They have bars in the stage that launched them, and none on the thread; one is told by its graph."""
        row = row_of(page, "up", 5)
        assert page.evaluate("row => gpuscope.picture.box({row, side: 'host'})", row) is None
        page.evaluate("row => gpuscope.view.goTo(gpuscope.model.root[row])", row)
        page.mouse.click(*place(page, row, "gpu"))
        told = page.locator("#selection").inner_text()
        assert "in a CUDA graph" in told
        assert "decode" in told
        assert "launch to start" not in told

    def test_gap_inside_a_replay_is_no_bubble(self, page):
        """Between two stages of one replay nothing is shaded, and the window counts queued work."""
        row = row_of(page, "mlp", 5)
        to, within = "gpuscope.model.gpuStart[row]", "row => gpuscope.model.devices[0].%s.within(%s - 150e3, %s)"
        assert page.evaluate(within % ("idle", to, to), row) == 0
        assert page.evaluate(within % ("queued", to, to), row) == 150e3

    def test_rest_of_the_graph_has_a_line_and_a_figure(self, page):
        """The table and the panel of the stage around the replay say what was in none of the stages inside."""
        line = page.locator("#stages tr", has_text="in the graph, outside any stage")
        assert line.count() == 1
        assert "CUDA graphs have no time on the host" in page.locator("#stages .note").inner_text()
        page.evaluate("row => gpuscope.view.set({selected: {row, side: 'gpu'}})", row_of(page, "decode", 5))
        assert "in the graph, outside any stage" in page.locator("#selection").inner_text()

    def test_keys_reach_inner_stages_and_come_back(self, page):
        """Down goes into the graph, to the bar on the stream, and up comes back out."""
        row = row_of(page, "decode", 5)
        page.evaluate("row => gpuscope.view.set({selected: {row, side: 'host'}})", row)
        page.locator("#lanes").focus()
        page.keyboard.press("ArrowDown")
        selected = "[gpuscope.model.name(gpuscope.view.selected.row), gpuscope.view.selected.side]"
        assert page.evaluate(selected) == ["attention", "gpu"]
        page.keyboard.press("ArrowUp")
        assert page.evaluate(selected)[0] == "decode"


def test_durations_are_written_as_in_the_report(show):
    """By the same rule, digit by digit."""
    times_ms = [233.282, 23.226, 9.996, 99.96, 0.99951, 999.6, 0.0364, 0.000_012, 0, -1.2345, 1_234_567, 1.5, 12.25]
    page = show(ten_requests())
    written = page.evaluate("times => times.map(ms => duration(ms * 1e6))", times_ms)
    assert [spoken(text) for text in written] == [duration(ms) for ms in times_ms]
