"""Batches in the HTML timeline: a picked request lights those that worked for it, and lines tie them."""

from __future__ import annotations

import shutil

import pytest

from gpuscope.analysis._viewers.timeline_data import timeline_data
from gpuscope.analysis.timeline import write_html

from ..recordings import Stage, batched, recording

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def service():
    """Return two batches of two requests each; the requests are rows 0, 1, 4 and 5."""
    whole = recording(
        Stage("request", 0, 900, thread="loop"),
        Stage("request", 100, 910, thread="loop"),
        Stage(
            "predict", 300, 850, gpu=(310, 845), thread="batcher", inside=[Stage("forward", 310, 840, gpu=(312, 844))]
        ),
        Stage("request", 1000, 1900, thread="loop"),
        Stage("request", 1100, 1910, thread="loop"),
        Stage("predict", 1300, 1850, gpu=(1310, 1845), thread="batcher"),
    )
    names = [whole.names[stage] for stage in whole.stage]
    assert names == ["request", "request", "predict", "forward", "request", "request", "predict"]
    return batched(whole, (2, {0: (300, 200), 1: (200, 335)}), (6, {4: (300, 200), 5: (200, 335)}))


def test_links_arrive():
    """The page gets each pair of a batch and a member, by rows; those that are not in the files are left out."""
    assert timeline_data(service())["batches"] == {"batch": [2, 2, 6, 6], "member": [0, 1, 4, 5]}
    assert timeline_data(recording())["batches"] == {"batch": [], "member": []}
    whole = service()
    whole.batches.links.member[0] = -1
    assert timeline_data(whole)["batches"]["member"] == [1, 4, 5]


@pytest.fixture
def page(tmp_path):
    """The page in a browser, headless; no error is raised in it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    path, errors = tmp_path / "timeline.html", []
    write_html(service(), path)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(path.as_uri())
        yield opened
        browser.close()
    assert errors == []


PICK = """async row => {
    gpuscope.view.pick(row);
    do await new Promise(requestAnimationFrame); while (gpuscope.view.turn);
    await new Promise(requestAnimationFrame);
    const canvas = document.getElementById('lanes');
    return canvas.toDataURL();
}"""


def test_a_picked_request_lights_its_batch(page):
    """Its batch belongs to it with all that is inside; the other batch does not."""
    page.evaluate(PICK, 1)
    lit = page.evaluate("[...Array(gpuscope.model.size).keys()].filter(row => gpuscope.model.belongs(row, 1))")
    assert lit == [1, 2, 3]


def test_lines_tie_batch_and_members(page):
    """A line is drawn from the picked request to its batch, and from each member to a selected batch."""
    picked = page.evaluate(PICK, 0)
    page.evaluate("gpuscope.model.batchesOf.clear()")
    assert page.evaluate(PICK, 0) != picked
    selected = page.evaluate("gpuscope.view.set({ request: -1, selected: { row: 2, side: 'host' } })")
    assert selected is None
    assert "a batch of" in page.locator("#selection").inner_text()
    assert "2 members" in page.locator("#selection").inner_text()
