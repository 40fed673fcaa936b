/** The verdicts, with the figures that they rest on. Words and figures are the report's; nothing is judged here. */

const MINOR = 0.01;

function showVerdicts(findings, find, visit) {
  const box = byId("verdicts");
  if (!findings) {
    box.append(element("p", { className: "quiet" }, "Nothing was judged for this page."));
    return;
  }
  // The same long advice under each stage hides what is different.
  const said = new Set();
  const onGpu = new Set(findings.answers.filter((answer) => answer.on_gpu).map((answer) => answer.name));
  // Without GPU times, all that there is to say is in the answer.
  for (const request of findings.requests.filter((each) => onGpu.has(each.name))) {
    const stages = findings.stages.filter((stage) => stage.root === request.name);
    const minor = stages.filter((stage) => (stage.request_share ?? 1) < MINOR && (stage.gain_share ?? 0) < MINOR);
    const major = stages.filter((stage) => !minor.includes(stage));
    box.append(requestVerdict(request, find, said), cards(major, find, said));
    if (!minor.length) continue;
    const summary = element(
      "summary",
      {},
      `${counted(minor.length, "stage")} with less than ${percent(MINOR)} of the request`,
    );
    box.append(element("details", { className: "minor" }, summary, cards(minor, find, said)));
  }
  const cold = findings.cold.map((call) => [
    named(call.name, () => visit(call.row)),
    `${call.outside ? " itself, outside its stages," : ""} took ${milliseconds(call.ms)} instead of ${milliseconds(call.usual_ms)}, `,
    ...coded(call.because),
    "; not judged",
  ]);
  const lines = [...cold.slice(0, 20), ...findings.notes.map(coded)];
  if (cold.length > 20)
    lines.push([`and ${counted(cold.length - 20, "more late cold call")}, not judged`]);
  box.hidden = !onGpu.size && !lines.length;
  if (lines.length)
    box.append(element("ul", { className: "notes" }, ...lines.map((line) => element("li", {}, ...line))));
}

function cards(stages, find, said) {
  return element("div", { className: "cards" }, ...stages.map((stage) => stageVerdict(stage, find, said)));
}

/** A stage's name as a button. */
function named(name, onclick) {
  return element("button", { className: "name", title: `Find ${name}`, onclick }, name);
}

function milliseconds(ms) {
  return duration(ms === null ? null : ms * 1e6);
}

/** Text in which what stands between backquotes is code. */
function coded(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function requestVerdict(request, find, said) {
  const words = element("div", {}, ...verdictWords(request, "request", find, said));
  const title = element("h4", {}, "GPU without work, as far as known, per request");
  const idle = element("div", {}, title, ...idleCauses(request));
  return element("article", { className: "verdict wide" }, words, idle);
}

function stageVerdict(stage, find, said) {
  return element("article", { className: "verdict" }, ...verdictWords(stage, "call", find, said));
}

function verdictWords(verdict, unit, find, said) {
  const name = named(verdict.name, () => find(verdict.name));
  const badge = element("span", { className: `badge ${verdict.verdict}` }, verdict.verdict);
  const condition = verdict.assumes
    ? element("p", { className: "quiet" }, "Assuming ", ...coded(verdict.assumes), ".")
    : "";
  const fresh = verdict.next_steps.filter((step) => !said.has(step));
  fresh.forEach((step) => said.add(step));
  const steps = element("ul", {}, ...fresh.map((step) => element("li", {}, ...coded(step))));
  return [
    element("h3", {}, name, badge),
    element("p", {}, ...coded(verdict.because)),
    condition,
    pairs(evidence(verdict, unit)),
    fresh.length ? steps : "",
  ];
}

function evidence(verdict, unit) {
  const left = [
    [verdict.warmup_calls, "warm-up"],
    [verdict.cold_calls, "cold"],
  ].filter(([calls]) => calls);
  const without = left.length
    ? `, without ${left.map(([calls, kind]) => `${count(calls)} ${kind}`).join(" and ")}`
    : "";
  const share = (value) => (value === null ? null : percent(value));
  return [
    ["judged by", counted(verdict.calls, unit) + without],
    ["end to end, median", verdict.duration_ms === null ? null : milliseconds(verdict.duration_ms)],
    ["host waits for the GPU", share(verdict.wait_share)],
    ["mostly for", verdict.waits_for],
    ["GPU had work", hadWork(verdict)],
    ["answers", verdict.answers ? `${count(verdict.answers)}, ${counted(verdict.answered_requests, "request")}` : null],
    ["GPU without work, as far as known", share(verdict.idle_share)],
    ["GPU ends after the host by", verdict.lag_ms > 0.1 ? milliseconds(verdict.lag_ms) : null],
    ["cost", verdict.cost && costOf(verdict.cost)],
    [
      "to gain per request, at most",
      verdict.gain_ms && `${milliseconds(verdict.gain_ms)} (${share(verdict.gain_share)})`,
    ],
  ];
}

/** What streams answered when they were asked, with the interval over requests. */
function hadWork(verdict) {
  if (verdict.busy_share === null) return null;
  return `${percent(verdict.busy_share)} (${rangeOf(...verdict.busy_range)})`;
}

function costOf({
  size,
  fixed_ms: fixed,
  per_item_ms: each,
  fixed_range_ms: fixedRange,
  per_item_range_ms: eachRange,
}) {
  const ranged = (ms, [low, high]) => `${milliseconds(ms)} (${milliseconds(low)} to ${milliseconds(high)})`;
  return `${ranged(fixed, fixedRange)} per call, plus ${ranged(each, eachRange)} per unit of ${size}`;
}

function idleCauses(request) {
  if (!request.idle.length) return [element("p", { className: "quiet" }, "none known")];
  const shown = request.idle.slice(0, 6);
  const most = Math.max(...shown.map((cause) => cause.ms));
  return shown.map((cause) => {
    const bar = element("div", { className: "bar" });
    bar.style.width = `${Math.max(0.5, (100 * cause.ms) / most)}%`;
    const where = cause.stage ? [" in ", element("b", {}, cause.stage)] : [];
    const line = element(
      "p",
      {},
      cause.cause,
      ...where,
      element("span", {}, `${milliseconds(cause.ms)} · ${percent(cause.share)}`),
    );
    return element("div", { className: "cause" }, line, bar);
  });
}
