"""
Draws a picture of a recording's timeline with one request in view, as in the README.

    GPUSCOPE=1 GPUSCOPE_EXPORTER=file GPUSCOPE_FILE=spans.jsonl gpuscope demo
    python examples/draw_timeline.py spans.jsonl timeline.png

Needs Chromium and `pip install playwright "gpuscope[report]"`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from gpuscope.analysis.read import read
from gpuscope.analysis.timeline import write_html
from gpuscope.analysis.verdict import judge

SHOW = """async ([first, selected]) => {
    const { model, view } = gpuscope, { from, to } = model.extent.get(view.request);
    const row = name => model.find(name).find(row => model.root[row] === view.request);
    const start = first ? model.start[row(first)] : from, margin = (to - start) / 40;
    view.show(start - margin, to + margin);
    view.set({ selected: selected ? { row: row(selected), side: "host" } : null });
    await new Promise(done => setTimeout(done, 300));
}"""
"""Shows the request, and waits until the texts have followed the picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", nargs="+", help="files of the `file` exporter")
    parser.add_argument("picture", help="the PNG to write")
    parser.add_argument("--from", default="", metavar="STAGE", dest="first", help="begin at this stage of the request")
    parser.add_argument("--select", default="", metavar="STAGE", help="select this stage")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    recording = read(options.recording)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "timeline.html"
        write_html(recording, page_file, judge(recording))
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": 1240, "height": 900},
            device_scale_factor=2,
            color_scheme="dark" if options.dark else "light",
            reduced_motion="reduce",
        )
        page.goto(page_file.as_uri())
        page.locator("#picker").get_by_role("button", name="Median").click()
        page.evaluate(SHOW, [options.first, options.select])
        page.locator("#timeline").screenshot(path=options.picture)
        browser.close()


if __name__ == "__main__":
    main()
