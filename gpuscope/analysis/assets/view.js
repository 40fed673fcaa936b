/** What is shown: the window of time, and what is hovered, selected, picked and found. Says when it changes. */

const SHORTEST_NS = 100;
const TURN_MS = 160;

class View extends EventTarget {
  constructor(model) {
    super();
    this.model = model;
    const margin = (model.to - model.from) * 0.01;
    this.least = model.from - margin;
    this.most = model.to + margin;
    this.from = this.least;
    this.to = this.most;
    this.hover = null;
    this.selected = null;
    this.request = -1;
    this.matches = null;
    this.turn = 0;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  }

  get span() {
    return this.to - this.from;
  }

  /** Change what is hovered, selected, picked or found. A bar is `{row, side}`, side being `host` or `gpu`. */
  set(changes) {
    Object.assign(this, changes);
    this.dispatchEvent(new Event("change"));
  }

  /** Show a window of time at once, within the recording. */
  show(from, to) {
    const span = Math.min(Math.max(to - from, SHORTEST_NS), this.most - this.least);
    const middle = (from + to) / 2;
    this.from = Math.min(Math.max(middle - span / 2, this.least), this.most - span);
    this.to = this.from + span;
    this.dispatchEvent(new Event("change"));
  }

  pan(by) {
    this.show(this.from + by, this.to + by);
  }

  zoom(factor, at = (this.from + this.to) / 2) {
    this.show(at - (at - this.from) * factor, at + (this.to - at) * factor);
  }

  /** Go to a window of time in a few frames, so that the eye can follow. */
  go(from, to) {
    cancelAnimationFrame(this.turn);
    if (this.calm) return this.show(from, to);
    const start = performance.now();
    const [from0, to0] = [this.from, this.to];
    const step = (now) => {
      const part = Math.min(1, Math.max(0, (now - start) / TURN_MS));
      const eased = 1 - (1 - part) ** 3;
      this.show(from0 + (from - from0) * eased, to0 + (to - to0) * eased);
      this.turn = part < 1 ? requestAnimationFrame(step) : 0;
    };
    this.turn = requestAnimationFrame(step);
  }

  /** Go to a stage, with both its sides and some room around. */
  goTo(row) {
    const { start, end, gpuStart, gpuEnd } = this.model;
    const [from, to] = [Math.min(start[row], gpuStart[row]), Math.max(end[row], gpuEnd[row])];
    const margin = (to - from) * 0.25 + 1;
    this.go(from - margin, to + margin);
  }

  /** Move, without zooming, so that the bar is inside the window. */
  reveal({ row, side }) {
    const { start, end, gpuStart, gpuEnd } = this.model;
    const [from, to] = side === "gpu" ? [gpuStart[row], gpuEnd[row]] : [start[row], end[row]];
    if (from >= this.from && to <= this.to) return;
    if (to - from > this.span) this.goTo(row);
    else this.go((from + to - this.span) / 2, (from + to + this.span) / 2);
  }

  pick(root) {
    const { from, to } = this.model.extent.get(root);
    this.set({ request: root, selected: { row: root, side: "host" } });
    this.go(from - (to - from) * 0.02, to + (to - from) * 0.02);
  }
}
