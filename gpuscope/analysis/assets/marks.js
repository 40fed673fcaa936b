/** What is drawn between and upon the bars: bubbles, clock uncertainty, frames, and the line from launch to GPU. */

/** Members of a batch that are tied to it. */
const MOST_TIES = 256;

/** Shade the idle times of a lane. Those narrower than a pixel share one: the less of it they fill, the paler it is. */
function drawGaps(context, picture, lane, y) {
  const { start, end } = lane.gaps;
  const { view, width } = picture;
  const perPixel = view.span / width;
  const last = firstAbove(start, view.to);
  for (let index = firstAbove(end, view.from); index < last;) {
    const left = picture.x(start[index]);
    const across = (end[index] - start[index]) / perPixel;
    if (across >= 1) {
      drawGap(context, picture, lane, y, left, across, 1);
      if (across > 40)
        drawGapLabel(context, picture, lane, y, left, left + across, duration(end[index] - start[index]));
      index++;
      continue;
    }
    const limit = view.from + (Math.floor(left) + 1) * perPixel;
    let idle = 0;
    // The first in any case: rounding may put it on the limit.
    do {
      idle += end[index] - start[index];
      index++;
    } while (index < last && start[index] < limit && end[index] - start[index] < perPixel);
    drawGap(context, picture, lane, y, Math.floor(left), 1, Math.min(1, idle / perPixel));
  }
  context.globalAlpha = 1;
}

/** Shade a gap, or the part of a pixel that gaps fill. */
function drawGap(context, { palette }, lane, y, left, across, part) {
  context.globalAlpha = part;
  context.fillStyle = palette.idleShade;
  context.fillRect(left, y, across, lane.height);
  if (!lane.head) return;
  context.globalAlpha = 1;
  context.fillStyle = palette.idle;
  const height = Math.max(1, 5 * part);
  context.fillRect(left, y + lane.height - height, across, height);
}

function drawGapLabel(context, { palette, width }, lane, y, left, right, text) {
  const [from, to] = [Math.max(left, 0), Math.min(right, width)];
  const needed = context.measureText(text).width;
  if (to - from < needed + 8 || (!lane.head && lane.side === "gpu")) return;
  context.fillStyle = palette.idleText;
  context.fillText(text, (from + to - needed) / 2, lane.head ? y + 11 : y + lane.height / 2);
}

/** Draw what belongs to the picked request, and to the selected and the hovered bar. */
function drawMarks(context, picture) {
  const { selected, hover, request } = picture.view;
  const { batchesOf, membersOf } = picture.model;
  context.globalAlpha = 1;
  for (const [batch, members] of batchesOf.get(request) ?? []) drawFan(context, picture, batch, members);
  for (const bar of [selected, hover]) if (bar) drawFan(context, picture, bar.row, membersOf.get(bar.row) ?? []);
  for (const bar of [selected, hover]) if (bar) drawTie(context, picture, bar.row);
  for (const bar of [selected, hover]) if (bar) drawFrame(context, picture, bar, bar === selected ? 2.5 : 1.5);
}

function drawFrame(context, picture, bar, thick) {
  const box = picture.box(bar);
  if (!box) return;
  const [left, right] = [Math.max(box.left, -5), Math.min(box.right, picture.width + 5)];
  context.strokeStyle = picture.palette.text;
  context.lineWidth = thick;
  context.strokeRect(left - 1, box.top - 1, Math.max(3, right - left + 1.5), box.height + 2);
}

/** Tie a batch to those that it worked for: from each of them to where the batch begins. */
function drawFan(context, picture, batch, members) {
  const { palette, model, width } = picture;
  const to = picture.box({ row: batch, side: "host" });
  if (!to || to.left > width + 50) return;
  context.strokeStyle = palette.accent;
  context.lineWidth = 1;
  context.beginPath();
  for (const member of members.slice(0, MOST_TIES)) {
    const from = picture.box({ row: model.launcher(member), side: "host" });
    if (!from) continue;
    const down = to.top > from.top;
    const [y, end] = down ? [from.top + from.height, to.top] : [from.top, to.top + to.height];
    // Where the request stands while the batch begins; one that had ended stands at its end.
    const x = Math.min(Math.max(from.left, to.left - 24), from.right);
    const bend = (end - y) / 2;
    context.moveTo(x, y);
    context.bezierCurveTo(x, y + bend, to.left, end - bend, to.left, end);
  }
  context.stroke();
}

/** Tie the start of a stage on the host, its launch, to its start on the stream, and show how certain that place is. */
function drawTie(context, picture, row) {
  const { palette, model } = picture;
  const [launch, bar] = [picture.box({ row: model.launcher(row), side: "host" }), picture.box({ row, side: "gpu" })];
  if (!bar) return;
  const from = picture.x(model.start[row]);
  const [top, bottom] = [launch.top + launch.height, bar.top];
  const bend = Math.max(20, (bottom - top) / 2);
  context.strokeStyle = palette.accent;
  context.fillStyle = palette.accent;
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(from, top);
  context.bezierCurveTo(from, top + bend, bar.left, bottom - bend, bar.left, bottom);
  context.stroke();
  for (const [x, y] of [
    [from, top],
    [bar.left, bottom],
  ]) {
    context.beginPath();
    context.arc(x, y, 3.5, 0, 7);
    context.fill();
  }
  drawUncertainty(context, picture, row, bar);
}

/** Draw whiskers as wide as the clock's uncertainty at both ends of a bar on a stream, if that can be seen. */
function drawUncertainty(context, picture, row, bar) {
  const reach = (picture.model.uncertainty[row] / picture.view.span) * picture.width;
  if (reach < 1.5) return;
  const y = bar.top + bar.height + 4;
  context.lineWidth = 1.5;
  context.beginPath();
  for (const x of [bar.left, bar.right]) {
    context.moveTo(x - reach, y);
    context.lineTo(x + reach, y);
    for (const end of [x - reach, x + reach]) {
      context.moveTo(end, y - 3);
      context.lineTo(end, y + 3);
    }
  }
  context.stroke();
}
