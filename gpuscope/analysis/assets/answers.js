/** The answer on top, what the legend explains, and where to read more. Words are the report's; nothing is judged here. */

const MOST_ANSWERS = 3;

function showAnswers(model, open) {
  const box = byId("answers");
  const { findings, guide } = model.data;
  const more = byId("guide-more");
  more.append(guide ? element("a", { href: guide }, "The whole reasoning") : "The whole reasoning: reading-the-report.md.");
  if (!findings?.answers.length) {
    box.hidden = true;
    return;
  }
  for (const sentence of findings.top ?? []) box.append(element("p", {}, ...coded(sentence)));
  if (findings.no_gpu) box.append(element("p", { className: "quiet" }, findings.no_gpu));
  const articles = findings.answers.map((answer) => answerOf(answer, open));
  box.append(...articles.slice(0, MOST_ANSWERS));
  const others = articles.slice(MOST_ANSWERS);
  if (!others.length) return;
  const summary = element("summary", {}, `${counted(others.length, "more kind")} of request`);
  box.append(element("details", {}, summary, ...others));
}

function answerOf(answer, open) {
  const button = (text, how) => element("button", { onclick: () => open(answer.name, how) }, text);
  const first = answer.try_first ? [element("b", {}, "Try first: "), ...coded(answer.try_first)] : [];
  return element(
    "article",
    {},
    element("h2", {}, ...coded(answer.headline)),
    ...(first.length ? [element("p", {}, ...first)] : []),
    element(
      "p",
      { className: "quiet" },
      ...answer.more.flatMap((sentence) => [...coded(sentence), " "]),
      button("median request", "median"),
      " ",
      button("slowest", "slowest"),
    ),
  );
}

/** Show of the legend what occurs in this recording. */
function showLegend(model) {
  const occurs = { host: false, solid: false, pale: false, usual: false, outer: false, failed: false, warm: false };
  for (let row = 0; row < model.size; row++) {
    occurs.host ||= model.isOnHost(row);
    occurs.failed ||= Boolean(model.error[row]);
    occurs.warm ||= model.isCold(row);
    if (model.stream[row] < 0) continue;
    if (!model.leaf[row]) occurs.outer = true;
    else {
      const from = solidFrom(model, row);
      occurs.solid ||= from < model.gpuEnd[row];
      occurs.pale ||= from > model.gpuStart[row];
      occurs.usual ||= from > model.gpuStart[row] && Boolean(model.usualWork(row));
    }
  }
  occurs.gap = model.lanes.some((lane) => lane.gaps?.start.length);
  for (const line of document.querySelectorAll(".legend li")) line.hidden = !occurs[line.dataset.if];
  byId("on-streams").hidden = !model.devices.length;
}
