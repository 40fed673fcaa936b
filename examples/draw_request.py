"""
Draws one request out of the file that the `file` exporter writes, as an SVG: host stages above, GPU streams below.

Reads OTLP JSON lines and needs nothing but the standard library, so that it is also a start for reports of your own.

    gpuscope demo
    python examples/draw_request.py gpuscope-demo.jsonl request.svg --from h2d
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, LEFT, RIGHT = 900, 112, 878  # of the picture; and where its time axis begins and ends
BAR, STEP, LINE, GUTTER = 22, 25, 16, 36  # heights: a bar, a row of bars, a line of text, the space above a GPU stream
HEADER, NAMES = 58, 40  # heights: what is above the first lane, and what the names of a lane need
LETTER = 6.7  # width; generous, because whoever looks chooses the font
GPU_KEYS = "gpuscope.device.index", "gpuscope.cuda.stream"
TORN = 6  # how far a bar that began before the axis does stands out to the left

STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --rule: #e4e8ec; --link: #6e7781;
  --host: #9cc3f0; --host-waits: #deebfa; --gpu: #f7b267; --outer: #fcebd6; --edge: #c9772a; --host-edge: #4a86c5; }
@media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --rule: #21262d;
  --link: #8b949e; --host: #2d5f99; --host-waits: #16283d; --gpu: #a85f14; --outer: #33220f; --edge: #d98a3d;
  --host-edge: #4f8fd6; } }
text { font: 12px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--ink); }
.faint { fill: var(--faint); font-size: 11px; }
.title { font-size: 14px; font-weight: 600; }
.paper { fill: var(--paper); }
.host { fill: var(--host); stroke: var(--host-edge); }
.waits { fill: var(--host-waits); stroke: var(--host-edge); }
.gpu { fill: var(--gpu); stroke: var(--edge); }
.outer { fill: var(--outer); stroke: var(--edge); }
.host, .waits, .gpu, .outer { stroke-width: 1; stroke-linejoin: round; }
.link { stroke: var(--link); fill: none; }
.leader { stroke: var(--link); stroke-dasharray: 2 2; fill: none; }
.rule { stroke: var(--rule); }
"""


@dataclass(eq=False)
class Span:
    """A span of the file: a stage on the host, or what one launched on a GPU."""

    name: str
    id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict
    children: list["Span"] = field(default_factory=list)
    outer: "Span | None" = None
    gpu: "Span | None" = None
    row: int = 0
    left: float = 0.0
    right: float = 0.0

    @property
    def is_gpu(self):
        """Return whether it ran on a GPU."""
        return self.attributes.get("hw.type") == "gpu"

    @property
    def middle(self):
        """Return where its leader begins."""
        return (self.left + self.right) / 2

    @property
    def label(self):
        """Return what is written at its bar."""
        return f"{self.name} {length(self.end_ns - self.start_ns)}"

    def stages(self):
        """Return this stage and all inside it, outer before inner."""
        found = [self]
        for span in found:  # grows
            found.extend(span.children)
        return found


@dataclass
class Lane:
    """Rows of bars, and the boxes that labels and lines have taken."""

    title: str
    subtitle: str
    spans: list[Span]
    top: float = 0.0
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)  # left, top, right, bottom
    drawn: list[str] = field(default_factory=list)

    def row(self, span):
        """Return where the bar of a span begins."""
        return self.top + STEP * span.row

    @property
    def rows_end(self):
        """Return where the bars end."""
        return self.top + STEP * (1 + max(span.row for span in self.spans))

    def take(self, left, top, right, bottom):
        """Return whether nothing else is in the box, which is then taken."""
        if left < LEFT or right > RIGHT + TORN:
            return False
        if any(left < box[2] and box[0] < right and top < box[3] and box[1] < bottom for box in self.taken):
            return False
        self.taken.append((left, top, right, bottom))
        return True


def length(ns):
    return f"{ns / 1e6:.2f} ms" if ns >= 100_000 else f"{ns / 1e3:.0f} µs"


# Reading. A request is a root and all below it, on whichever lines of the file.


def read(path):
    """Return the requests of the file: the stages whose parents are not in it."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line's end is being written
    spans = {span.id: span for line in lines for span in spans_of(json.loads(line))}
    roots = []
    for span in spans.values():
        span.outer = spans.get(span.parent_id)
        if not span.outer:
            roots.append(span)
        elif span.is_gpu:
            span.outer.gpu = span
        else:
            span.outer.children.append(span)
    return [root for root in roots if not root.is_gpu]


def spans_of(message):
    for resource in message.get("resourceSpans", ()):
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                attributes = {
                    item["key"]: next(iter(item["value"].values()), None) for item in span.get("attributes", ())
                }
                times = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
                yield Span(span["name"], span["spanId"], span.get("parentSpanId", ""), *times, attributes)


def pick(roots, how):
    """Return the median or slowest request and a caption; requests of the warm-up count if there are no others."""
    warm = [root for root in roots if not root.attributes.get("gpuscope.warmup")]
    requests = sorted(warm or roots, key=lambda root: root.end_ns - root.start_ns)
    chosen = requests[(len(requests) - 1) // 2 if how == "median" else -1]
    return chosen, f"The {how} of {len(requests)} requests{' after warm-up' if warm else ''}."


def beginning(root, name):
    """Return when the stage began that the axis is to begin with, and a caption for what came before."""
    if name is None:
        return root.start_ns, ""
    named = [stage for stage in root.stages() if stage.name == name]
    if not named:
        names = ", ".join(repr(stage.name) for stage in root.stages())
        raise SystemExit(f"The request has no stage {name!r}; it has {names}.")
    start_ns = min(stage.start_ns for stage in named)
    before = [stage for stage in root.children if stage.end_ns <= start_ns]
    missing = " + ".join(stage.label for stage in before)
    return start_ns, f" Drawn from {name} on; before it: {missing or 'nothing'}."


# Laying out: where on the axis, in which row, and for each label a place where nothing else is.


def place(stages, start_ns, end_ns):
    """Give what is to be seen its place on the axis, and return it."""
    scale = (RIGHT - LEFT) / max(1, end_ns - start_ns)
    spans = [span for stage in stages for span in (stage, stage.gpu) if span and span.end_ns > start_ns]
    for span in spans:
        span.left = LEFT - TORN if span.start_ns < start_ns else LEFT + (span.start_ns - start_ns) * scale
        span.right = max(span.left + 1.5, LEFT + (span.end_ns - start_ns) * scale)
    return spans


def lanes_of(spans):
    """Return the lane of the host and one for each GPU stream."""
    threads = {str(span.attributes.get("thread.name", "")) for span in spans if not span.is_gpu}
    lanes = {"": Lane("host", threads.pop() if len(threads) == 1 else f"{len(threads)} threads", [])}
    for span in spans:
        key = ""
        if span.is_gpu:
            key = device, stream = tuple(int(span.attributes[name]) for name in GPU_KEYS)
            lanes.setdefault(key, Lane(f"GPU {device}", f"stream {stream if stream < 1000 else hex(stream)}", []))
        lanes[key].spans.append(span)
    for lane in lanes.values():
        stack(lane.spans)
    return list(lanes.values())


def stack(spans):
    """Put each span below the one that it is part of, and below all that it would cover."""
    placed = []
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        outer = span.outer.outer and span.outer.outer.gpu if span.is_gpu else span.outer
        span.row = outer.row + 1 if outer in placed else 0
        while any(span.row == other.row and span.start_ns < other.end_ns for other in placed):
            span.row += 1
        placed.append(span)


def lay_out(lanes, links):
    """Put the lanes below one another, write all labels, and return where the drawing ends."""
    host, *streams = lanes
    host.top = HEADER
    label(host)
    lines_above = host.top - min([host.top, *(box[1] for box in host.taken)])
    host.top, host.taken, host.drawn = host.top + lines_above, [], []
    label(host)
    end = host.rows_end
    for lane in streams:
        lane.top = end + GUTTER
        for link in links:
            x, bottom = (link.gpu.left, lane.row(link.gpu)) if link.gpu in lane.spans else (link.left, math.inf)
            lane.taken.append((x, lane.top, x + 1, bottom))
        label(lane)
        links = [link for link in links if link.gpu not in lane.spans]
        end = max([lane.rows_end, lane.top + NAMES, *(box[3] for box in lane.taken if box[3] < math.inf)])
    return end


def label(lane):
    """Write each label in its bar, to the right of it, or on a line outside the lane."""
    narrow = [span for span in lane.spans if span.right - span.left < width(span.label) + 12]
    outside = [span for span in narrow if not label_beside(lane, span)]
    rightwards, leftwards = sides(outside)
    # From the ends inwards, so that the leader of each passes beside the texts that are there.
    for span in rightwards:
        label_outside(lane, span, "start")
    for span in leftwards:
        label_outside(lane, span, "end")
    for span in lane.spans:  # last, for what leaders pass through
        if span not in narrow and not label_inside(lane, span):
            label_outside(lane, span, "start" if span in sides([span])[0] else "end")


def sides(spans):
    """Return whose texts go to the right of their leaders, and whose would meet the edge or a leader there."""
    rightwards, leftwards, limit = [], [], RIGHT
    for span in sorted(spans, key=lambda span: -span.middle):
        if span.middle + 5 + width(span.label) < limit:
            rightwards.append(span)
        else:
            leftwards.insert(0, span)
            limit = span.middle
    return rightwards, leftwards


def width(words):
    return LETTER * len(words)


def label_inside(lane, span):
    """In the bar, as far left as no line passes through."""
    y = lane.row(span)
    for x in sorted([max(span.left, LEFT), *(box[2] for box in lane.taken if box[0] > span.left)]):
        right = x + 6 + width(span.label)
        if right < span.right and lane.take(x + 2, y + 1, right, y + BAR - 1):
            lane.drawn.append(text(x + 6, y + 15, span.label))
            return True
    return False


def label_beside(lane, span):
    """To the right of the bar, if the row is empty there."""
    y, x = lane.row(span), span.right + 5
    right = x + width(span.label)
    if any(other.row == span.row and span.left <= other.left < right for other in lane.spans if other is not span):
        return False
    if not lane.take(x, y + 1, right, y + BAR - 1):
        return False
    lane.drawn.append(text(x, y + 15, span.label))
    return True


def label_outside(lane, span, anchor):
    """On the nearest free line above the host's bars or below the GPU's; not at all if none of six is."""
    x = span.middle
    near = x + 5 if anchor == "start" else x - 5
    left = near if anchor == "start" else near - width(span.label)
    for line in range(6):
        y = lane.rows_end + LINE * line if span.is_gpu else lane.top - LINE * (line + 1)
        if lane.take(left, y, left + width(span.label), y + LINE):
            bar_edge, text_edge = (lane.row(span) + BAR, y + 12) if span.is_gpu else (lane.row(span), y + 4)
            lane.taken.append((x, min(bar_edge, text_edge), x + 1, max(bar_edge, text_edge)))
            lane.drawn.append(f'<path class="leader" d="M{x:.1f},{bar_edge}V{text_edge}"/>')
            lane.drawn.append(text(near, y + 12, span.label, anchor=anchor))
            return


# Drawing.


def text(x, y, words, kind="", *, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def bar(span, top):
    """Return a span's bar: pale while the GPU has not begun with it, or if the bars below it show more."""
    outer = span.is_gpu and span.outer.children
    shapes = [shape("outer" if outer else "gpu" if span.is_gpu else "host", span.left, span.right, top)]
    if span.gpu and span.gpu.left - span.left > 2:
        shapes.append(shape("waits", span.left, min(span.right, span.gpu.left), top))
    return f"<g><title>{escape(span.label)}</title>{''.join(shapes)}</g>"


def shape(kind, left, right, top):
    """Return a rectangle; torn on the left if it began before the axis."""
    if left >= LEFT:
        return f'<rect class="{kind}" x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{BAR}"/>'
    teeth = "".join(f"L{left + TORN * (each % 2):.1f},{top + BAR - BAR * each / 6:.1f}" for each in range(1, 6))
    return f'<path class="{kind}" d="M{right:.1f},{top}V{top + BAR}H{left:.1f}{teeth}L{left:.1f},{top}Z"/>'


def link_lines(link, links, host, lane):
    """Return the line from a stage's start to that of its GPU span, and how long that took where there is room."""
    before, after = link.left + 0.5, link.gpu.left + 0.5
    gutter = lane.top - GUTTER
    path = f"M{before:.1f},{host.row(link) + BAR}V{gutter + 3}L{after:.1f},{lane.top - 5}V{lane.row(link.gpu)}"
    drawn = [f'<path class="link" d="{path}"/>']
    words = f"{link.name}: {length(link.gpu.start_ns - link.start_ns)} from launch to start"
    left = after - 8 - width(words)
    crossed = any(left < other.gpu.left and other.left < after - 8 for other in links if other is not link)
    if after - before > 1.8 * width(words) and not crossed:
        drawn.append(text(after - 8, gutter + 14, words, "faint", anchor="end"))
    return drawn


def axis(start_ns, end_ns, origin_ns, bottom):
    """Return the lines and numbers of the time axis."""
    first_ms, span_ms = (start_ns - origin_ns) / 1e6, max(1, end_ns - start_ns) / 1e6
    steps = (digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5))
    step = next(step for step in steps if span_ms / step <= 12)
    drawn = [text(16, bottom + 14, "ms from start", "faint")]
    for number in range(math.ceil(first_ms / step), math.floor((first_ms + span_ms) / step) + 1):
        x = LEFT + (number * step - first_ms) / span_ms * (RIGHT - LEFT)
        drawn.append(f'<path class="rule" d="M{x:.1f},{HEADER - 6}V{bottom}"/>')
        drawn.append(text(x, bottom + 14, f"{number * step:g}", "faint", anchor="middle"))
    return drawn


def legend(gpus, y):
    """Return a sample of each kind of bar, and where and how well the GPU times were taken."""
    samples = [("host", "host")]
    if gpus:
        samples += [("waits", "host, GPU part not begun"), ("gpu", "GPU, from CUDA event to CUDA event")]
    drawn, x = [], 16
    for kind, words in samples:
        drawn.append(f'<rect class="{kind}" x="{x}" y="{y - 9}" width="16" height="10"/>')
        drawn.append(text(x + 22, y, words, "faint"))
        x += 42 + 0.9 * width(words)
    names = ", ".join(sorted({str(span.attributes["hw.name"]) for span in gpus}))
    within = max((float(span.attributes["gpuscope.clock.uncertainty"]) for span in gpus), default=0)
    where = f"{names}, GPU times ± {within * 1e6:.1f} µs" if gpus else "no GPU times"
    return [*drawn, text(RIGHT, y, where, "faint", anchor="end")]


def draw(root, start_ns, caption):
    """Return the picture of a request."""
    stages = root.stages()
    end_ns = max(span.end_ns for stage in stages for span in (stage, stage.gpu) if span)
    spans = place(stages, start_ns, end_ns)
    lanes = lanes_of(spans)
    links = [span for span in spans if span.gpu and span.left >= LEFT]
    bottom = lay_out(lanes, links) + 6
    drawn = [text(16, 26, root.label, "title"), text(16, 44, caption, "faint")]
    drawn += axis(start_ns, end_ns, root.start_ns, bottom)
    for lane in lanes:
        drawn += [text(16, lane.top + 15, lane.title), text(16, lane.top + 31, lane.subtitle, "faint")]
        drawn += [bar(span, lane.row(span)) for span in lane.spans]
    for link in links:
        (lane,) = (lane for lane in lanes if link.gpu in lane.spans)
        drawn += link_lines(link, links, lanes[0], lane)
    drawn += [each for lane in lanes for each in lane.drawn]
    drawn += legend([span for span in spans if span.is_gpu], bottom + 40)
    size = f'width="{WIDTH}" height="{bottom + 54:.0f}"'
    name = f"<title>{escape(root.label)}</title>"
    paper = f'<rect class="paper" {size} rx="6"/>'
    view = f'viewBox="0 0 {WIDTH} {bottom + 54:.0f}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img">'
    return "\n".join([opening, name, f"<style>{STYLE}</style>", paper, *drawn, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser(description="Draw one request of a file of spans.")
    parser.add_argument("spans", type=Path, help="what the `file` exporter wrote")
    parser.add_argument("out", type=Path, help="the SVG to write")
    parser.add_argument("--pick", choices=("median", "slowest"), default="median", help="which request (%(default)s)")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="begin the axis where this stage does")
    options = parser.parse_args()
    roots = read(options.spans)
    if not roots:
        raise SystemExit(f"There is no request in {str(options.spans)!r}.")
    root, caption = pick(roots, options.pick)
    start_ns, before = beginning(root, options.first)
    options.out.write_text(draw(root, start_ns, caption + before), encoding="utf-8")


if __name__ == "__main__":
    main()
