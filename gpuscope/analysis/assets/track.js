/** Draws one row of bars. Bars narrower than a pixel share a column, which has the colour of the longest. */

const NARROW = 1.5;
const PALE = 0.28;
const DIM = 0.22;
/** The shade of what is usual: between pale and solid. */
const USUAL = 3;

/** From when on a bar on a stream is certainly work: the host had gone on, or it is in a graph. */
function solidFrom(model, row) {
  const { end, gpuStart, gpuEnd, uncertainty } = model;
  if (model.has(row, FLAG.inGraph)) return gpuStart[row];
  const sure = !model.has(row, FLAG.clamped) && gpuEnd[row] - end[row] > uncertainty[row];
  return sure ? Math.max(gpuStart[row], end[row]) : gpuEnd[row];
}

class TrackPainter {
  constructor(model, view) {
    this.model = model;
    this.view = view;
    this.widths = new Map();
    this.run = null;
  }

  /** Draw a track at height `y` of the canvas, for a window of time across its width. */
  draw(context, palette, track, side, { from, to, width }, y, height) {
    Object.assign(this, { context, palette, side, y, height, from, perPixel: (to - from) / width, width });
    const { start, end, rows } = track;
    const last = firstAbove(start, to);
    let index = firstAbove(track.reach, from);
    while (index < last) {
      if ((end[index] - start[index]) / this.perPixel >= NARROW) {
        this.#flush();
        this.#bar(rows[index], start[index], end[index]);
        index++;
      } else index = this.#column(track, index, last);
    }
    this.#flush();
  }

  /** Draw the narrow bars that begin in the same pixel as this one; return the first that does not. */
  #column(track, index, last) {
    const { start, end, rows } = track;
    const pixel = Math.floor((start[index] - this.from) / this.perPixel);
    const limit = this.from + (pixel + 1) * this.perPixel;
    let [longest, length, covered] = [index, -1, 0];
    // The first in any case: rounding may put it on the limit.
    do {
      const taken = end[index] - start[index];
      covered += this.#weight(rows[index], taken);
      if (taken > length) [longest, length] = [index, taken];
      index++;
    } while (index < last && start[index] < limit && (end[index] - start[index]) / this.perPixel < NARROW);
    const row = rows[longest];
    const shade = Math.min(SHADES - 1, Math.floor((covered / this.perPixel) * SHADES));
    this.#add(pixel, this.palette.shades[this.model.stage[row]][shade], this.#dimmed(row) ? DIM : 1);
    return index;
  }

  /** Columns side by side that look the same are drawn at once. */
  #add(pixel, fill, alpha) {
    const { run } = this;
    if (run && run.pixel + run.width === pixel && run.fill === fill && run.alpha === alpha) {
      run.width++;
      return;
    }
    this.#flush();
    this.run = { pixel, fill, alpha, width: 1 };
  }

  #flush() {
    if (!this.run) return;
    const { pixel, fill, alpha, width } = this.run;
    this.context.globalAlpha = alpha;
    this.context.fillStyle = fill;
    this.context.fillRect(pixel, this.y, width, this.height);
    this.run = null;
  }

  /** How much of a bar's time counts as filled. On a stream, queued work counts fully, the rest as pale as drawn. */
  #weight(row, taken) {
    if (this.side === "host") return taken;
    if (!this.model.leaf[row]) return 0;
    const solid = Math.max(0, this.model.gpuEnd[row] - this.#solidFrom(row));
    const usual = this.model.usualWork(row)?.work ?? 0;
    return solid + (taken - solid) * (PALE + (1 - PALE) * usual);
  }

  #solidFrom(row) {
    return solidFrom(this.model, row);
  }

  #dimmed(row) {
    const { request, matches } = this.view;
    return (request >= 0 && !this.model.belongs(row, request)) || (matches && !matches.has(row));
  }

  #bar(row, start, end) {
    const { context, palette, model, y, height } = this;
    const left = Math.max(-4, (start - this.from) / this.perPixel);
    const right = Math.min(this.width + 4, (end - this.from) / this.perPixel);
    // A gap of half a pixel keeps neighbours apart.
    const across = Math.max(1, right - left - (right - left > 3 ? 0.5 : 0));
    const stage = model.stage[row];
    context.globalAlpha = this.#dimmed(row) ? DIM : 1;
    const free = this.side === "host" ? this.#full(left, across, stage) : this.#gpu(row, left, across, stage);
    if (across > 4 && model.isCold(row)) this.#hatch(left, across, stage);
    if (model.error[row] && this.side === "host") {
      context.fillStyle = palette.bad;
      context.fillRect(left, y + height - 4, across, 4);
    }
    if (free.across > 30) this.#label(row, free, end - start);
  }

  #full(left, across, stage) {
    this.context.fillStyle = this.palette.fill[stage];
    this.context.fillRect(left, this.y, across, this.height);
    return { left, across, solid: true };
  }

  /** Draw a bar on a stream: queued work solid, the rest pale, outer stages as frames. Return the longer part. */
  #gpu(row, left, across, stage) {
    const { context, palette, y, height } = this;
    let solid = left + across;
    if (this.model.leaf[row]) {
      context.fillStyle = palette.shades[stage][0];
      context.fillRect(left, y, across, height);
      solid = Math.min(solid, Math.max(left, (this.#solidFrom(row) - this.from) / this.perPixel));
      context.fillStyle = palette.fill[stage];
      context.fillRect(solid, y, left + across - solid, height);
      this.#usual(row, left, solid - left, stage);
    }
    if (across > 3 && height > 6) {
      context.strokeStyle = palette.edge[stage];
      context.lineWidth = 1;
      context.strokeRect(left + 0.5, y + 0.5, across - 1, height - 1);
    }
    const rest = left + across - solid;
    const shown = solid - Math.max(0, left);
    return rest > shown ? { left: solid, across: rest, solid: true } : { left, across: solid - left, solid: false };
  }

  /** In the pale part, fill from below as much as its stream usually has work there. */
  #usual(row, left, across, stage) {
    const usual = this.model.usualWork(row);
    if (!usual || across < 1) return;
    const { context, palette, y, height } = this;
    const level = Math.round(height * usual.work);
    context.fillStyle = palette.shades[stage][USUAL];
    context.fillRect(left, y + height - level, across, level);
  }

  #hatch(left, across, stage) {
    const { context, y, height } = this;
    context.save();
    context.beginPath();
    context.rect(left, y, across, height);
    context.clip();
    context.strokeStyle = this.palette.edge[stage];
    context.lineWidth = 1;
    context.beginPath();
    const from = Math.max(left, 0) - height;
    for (let x = from - (from % 7); x < Math.min(left + across, this.width); x += 7) {
      context.moveTo(x, y + height);
      context.lineTo(x + height, y);
    }
    context.stroke();
    context.restore();
  }

  #label(row, { left, across, solid }, time) {
    const { context, palette, y, height } = this;
    if (height < 14) return;
    const x = Math.max(left, 0) + 6;
    const room = Math.min(left + across, this.width) - x - 5;
    const name = this.#fitted(this.model.name(row), room);
    if (!name) return;
    const middle = y + height / 2 + 0.5;
    const used = this.#measure(name);
    const text = duration(time);
    const timed = name === this.model.name(row) && room > used + 10 + this.#measure(text);
    if (this.model.isCold(row)) {
      // No hatching behind a label.
      context.fillStyle = solid ? palette.fill[this.model.stage[row]] : palette.card;
      context.fillRect(x - 3, y + 2, used + 6 + (timed ? 10 + this.#measure(text) : 0), height - 4);
    }
    context.fillStyle = solid ? palette.ink : palette.text;
    context.fillText(name, x, middle);
    if (!timed) return;
    context.globalAlpha *= 0.75;
    context.fillText(text, x + used + 10, middle);
  }

  /** The text, or as much of it as there is room for; nothing if there is no room for two letters. */
  #fitted(text, room) {
    if (this.#measure(text) <= room) return text;
    const letters = Math.floor((room / this.#measure(text)) * text.length) - 1;
    return letters >= 2 ? `${text.slice(0, letters)}…` : "";
  }

  #measure(text) {
    let width = this.widths.get(text);
    if (width === undefined) {
      if (this.widths.size > 5000) this.widths.clear();
      this.widths.set(text, (width = this.context.measureText(text).width));
    }
    return width;
  }
}
