/** The canvases: overview, ruler and lanes. Draws at most once per frame, and only if something changed. */

const PAD = 5;
const HEAD = 26;
const FONT = '12px system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif';

class Picture {
  constructor(model, view) {
    this.model = model;
    this.view = view;
    this.painter = new TrackPainter(model, view);
    this.canvases = { overview: byId("overview"), ruler: byId("ruler"), lanes: byId("lanes") };
    this.scroller = byId("scroller");
    this.drag = null;
    const rows = model.lanes.reduce((sum, lane) => sum + lane.tracks.length, 0);
    // If there are few rows, they are drawn higher.
    this.row = rows <= 4 ? 34 : rows <= 8 ? 28 : 22;
    this.bar = this.row - 4;
    this.#layOut();
    view.addEventListener("change", () => this.refresh());
    this.scroller.addEventListener("scroll", () => this.refresh(), { passive: true });
    new ResizeObserver(() => this.#resize()).observe(this.scroller);
    this.recolour();
  }

  recolour() {
    const theme = document.documentElement.dataset.theme;
    this.palette = new Palette(this.model, theme);
    this.#resize();
  }

  refresh() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.#draw();
    });
  }

  get window() {
    return { from: this.view.from, to: this.view.to, width: this.width };
  }

  x(time) {
    return ((time - this.view.from) / this.view.span) * this.width;
  }

  time(x) {
    return this.view.from + (x / this.width) * this.view.span;
  }

  /** The bar at a place of the lanes' canvas, or null. */
  at(x, y) {
    const under = y + this.scroller.scrollTop;
    const lane = this.model.lanes.find((each) => under >= each.y && under < each.y + each.height);
    const track = lane?.tracks[Math.floor((under - lane.y - PAD) / this.row)];
    if (!track) return null;
    // Two pixels of grace, for what is narrow.
    const grace = 2 * (this.view.span / this.width);
    const time = this.time(x);
    let index = firstAbove(track.start, time + grace) - 1;
    if (index > 0 && track.start[index] > time && track.end[index - 1] >= time) index--;
    if (index < 0 || track.end[index] < time - grace) return null;
    return { row: track.rows[index], side: lane.side };
  }

  /** The row of the recording whose bar is drawn `by` bars to the right. */
  neighbour({ row, side }, by) {
    const [lane, place] = this.#placeOf(row, side);
    const { rows } = lane.tracks[place];
    return rows[rows.indexOf(row) + by];
  }

  /** Where a bar lies on the lanes' canvas, in pixels; null where it has none. */
  box({ row, side }) {
    const { model } = this;
    const [lane, place] = this.#placeOf(row, side);
    if (!lane) return null;
    const [start, end] =
      side === "host" ? [model.start[row], model.end[row]] : [model.gpuStart[row], model.gpuEnd[row]];
    const top = lane.y + PAD + place * this.row - this.scroller.scrollTop;
    return { left: this.x(start), right: this.x(end), top, height: this.bar };
  }

  /** Scroll the lanes so that the bar can be seen. */
  scrollTo(bar) {
    const box = this.box(bar);
    if (box && (box.top < 0 || box.top + this.bar > this.scroller.clientHeight)) {
      this.scroller.scrollTop += box.top - this.scroller.clientHeight / 2;
    }
  }

  /** The lane of a bar, and its row there; no lane where it has no bar. */
  #placeOf(row, side) {
    const { lanes, thread, stream, data } = this.model;
    if (side === "host") {
      if (!this.model.isOnHost(row)) return [];
      return [lanes.find((lane) => lane.thread === thread[row]), data.columns.host_row[row]];
    }
    return [lanes.find((lane) => lane.stream === stream[row]), data.columns.gpu_row[row]];
  }

  #layOut() {
    let y = 0;
    for (const lane of this.model.lanes) {
      lane.y = y;
      lane.height = lane.head
        ? HEAD
        : Math.max(2 * PAD + this.row * Math.max(1, lane.tracks.length) - (this.row - this.bar), 46);
      y += lane.height;
      byId("labels").append(this.#labelOf(lane));
    }
    byId("tall").style.height = `${y}px`;
    this.scroller.style.setProperty("--lanes", `${y}px`);
    byId("labels").style.height = `${y}px`;
  }

  #labelOf(lane) {
    const label = element(
      "div",
      { title: lane.title, className: !lane.head ? "" : lane.gaps ? "head" : "head wide" },
      element("b", {}, lane.name),
    );
    label.style.top = `${lane.y}px`;
    label.style.height = `${lane.height}px`;
    const stages = lane.tracks.reduce((sum, track) => sum + track.rows.length, 0);
    if (!lane.head) label.append(element("span", {}, (lane.of ? `${lane.of} · ` : "") + counted(stages, "stage")));
    return label;
  }

  #resize() {
    this.width = Math.max(50, this.scroller.clientWidth - byId("labels").offsetWidth);
    this.heights = { overview: 40, ruler: 26, lanes: Math.max(this.scroller.clientHeight, 1) };
    const ratio = devicePixelRatio || 1;
    for (const [name, canvas] of Object.entries(this.canvases)) {
      canvas.width = Math.round(this.width * ratio);
      canvas.height = Math.round(this.heights[name] * ratio);
      canvas.style.width = `${this.width}px`;
      canvas.style.height = `${this.heights[name]}px`;
    }
    this.overviewImage = null;
    this.#draw();
  }

  #context(name) {
    const context = this.canvases[name].getContext("2d");
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.globalAlpha = 1;
    context.clearRect(0, 0, this.width, this.heights[name]);
    context.font = FONT;
    context.textBaseline = "middle";
    return context;
  }

  #draw() {
    this.#drawOverview();
    this.#drawRuler();
    this.#drawLanes();
  }

  #drawOverview() {
    const context = this.#context("overview");
    const { palette, view, width } = this;
    this.overviewImage ??= this.#miniature();
    context.drawImage(this.overviewImage, 0, 0, width, 40);
    const scale = width / (view.most - view.least);
    const [left, right] = [(view.from - view.least) * scale, (view.to - view.least) * scale];
    context.globalAlpha = 0.65;
    context.fillStyle = palette.card;
    context.fillRect(0, 0, left, 40);
    context.fillRect(right, 0, width - right, 40);
    context.globalAlpha = 1;
    context.strokeStyle = palette.accent;
    context.lineWidth = 2;
    context.strokeRect(Math.min(left + 1, width - 3), 1, Math.max(2, right - left - 2), 38);
  }

  /** Draw the whole recording small, once: only the frame over it moves. */
  #miniature() {
    const canvas = document.createElement("canvas");
    const ratio = devicePixelRatio || 1;
    [canvas.width, canvas.height] = [Math.round(this.width * ratio), 40 * ratio];
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const lanes = this.model.lanes.flatMap((lane) => lane.tracks.map((track) => ({ track, side: lane.side })));
    const each = 32 / Math.max(1, lanes.length);
    const whole = { from: this.view.least, to: this.view.most, width: this.width };
    const painter = new TrackPainter(this.model, { request: -1, matches: null });
    lanes.forEach(({ track, side }, index) => {
      painter.draw(context, this.palette, track, side, whole, 4 + index * each, Math.max(1, each - (each > 3 ? 1 : 0)));
    });
    return canvas;
  }

  #drawRuler() {
    const context = this.#context("ruler");
    const { view, palette } = this;
    const origin = view.request >= 0 ? this.model.start[view.request] : 0;
    const step = tickStep((view.span / this.width) * 110);
    byId("origin").textContent = view.request >= 0 ? "since the request began" : "since the start";
    context.fillStyle = palette.quiet;
    context.strokeStyle = palette.line;
    context.beginPath();
    for (let tick = Math.ceil((view.from - origin) / step) * step; tick <= view.to - origin; tick += step) {
      const x = Math.round(this.x(origin + tick)) + 0.5;
      context.moveTo(x, 18);
      context.lineTo(x, 26);
      const text = moment(tick, step);
      if (x + 4 + context.measureText(text).width < this.width) context.fillText(text, x + 4, 12);
    }
    context.stroke();
    if (this.drag) this.#drawDrag(context, 26, true);
  }

  #drawDrag(context, height, text) {
    const [left, right] = [Math.min(...this.drag), Math.max(...this.drag)].map((time) => this.x(time));
    context.globalAlpha = 0.2;
    context.fillStyle = this.palette.accent;
    context.fillRect(left, 0, right - left, height);
    context.globalAlpha = 1;
    if (!text) return;
    const label = duration(Math.abs(this.drag[1] - this.drag[0]));
    context.fillStyle = this.palette.card;
    context.fillRect(left + 2, 3, context.measureText(label).width + 8, 18);
    context.fillStyle = this.palette.accent;
    context.fillText(label, left + 6, 12);
  }

  #drawLanes() {
    const context = this.#context("lanes");
    const top = this.scroller.scrollTop;
    const bottom = top + this.heights.lanes;
    this.#drawGrid(context);
    for (const lane of this.model.lanes) {
      if (lane.y + lane.height < top || lane.y > bottom) continue;
      this.#drawLane(context, lane, lane.y - top);
    }
    drawMarks(context, this);
    if (this.drag) this.#drawDrag(context, this.heights.lanes, false);
  }

  #drawGrid(context) {
    const { view } = this;
    const origin = view.request >= 0 ? this.model.start[view.request] : 0;
    const step = tickStep((view.span / this.width) * 110);
    context.strokeStyle = this.palette.soft;
    context.lineWidth = 1;
    context.beginPath();
    for (let tick = Math.ceil((view.from - origin) / step) * step; tick <= view.to - origin; tick += step) {
      const x = Math.round(this.x(origin + tick)) + 0.5;
      context.moveTo(x, 0);
      context.lineTo(x, this.heights.lanes);
    }
    context.stroke();
  }

  #drawLane(context, lane, y) {
    const { palette } = this;
    context.globalAlpha = 1;
    if (lane.head) {
      context.fillStyle = palette.soft;
      context.fillRect(0, y, this.width, lane.height);
    }
    if (lane.gaps) drawGaps(context, this, lane, y);
    context.globalAlpha = 1;
    context.fillStyle = palette.line;
    if (lane.y) context.fillRect(0, y, this.width, 1);
    lane.tracks.forEach((track, index) => {
      this.painter.draw(context, palette, track, lane.side, this.window, y + PAD + index * this.row, this.bar);
    });
  }
}

/** The least of 1, 2 and 5 times a power of ten that is not below the given one. */
function tickStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least * 0.999);
}
