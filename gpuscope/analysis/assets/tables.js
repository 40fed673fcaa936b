/** The table of stages, with a small picture of each distribution. */

const COLUMNS = [
  ["Stage", "order", "", (line) => line.order],
  ["calls", "calls", "", (line) => line.calls],
  ["p50", "host.p50", "host", (line) => line.host_ms?.p50],
  ["p90", "host.p90", "host", (line) => line.host_ms?.p90],
  ["p99", "host.p99", "host", (line) => line.host_ms?.p99],
  ["distribution", "", "host"],
  ["p50", "gpu.p50", "on the stream", (line) => line.gpu_ms?.p50],
  ["p90", "gpu.p90", "on the stream", (line) => line.gpu_ms?.p90],
  ["p99", "gpu.p99", "on the stream", (line) => line.gpu_ms?.p99],
  ["distribution", "", "on the stream"],
  ["starts", "delay", "", (line) => line.launch_to_start_ms?.p50],
  ["busy", "busy", "GPU", (line) => line.judged?.busy_share],
  ["idle", "idle", "GPU", (line) => line.judged?.idle_share],
  ["waits", "waits", "the host", (line) => line.judged?.wait_share],
  ["of request", "share", "", (line) => line.host_share],
  ["errors", "errors", "", (line) => line.errors],
];

class StageTable {
  constructor(model, find, colour) {
    this.model = model;
    this.find = find;
    this.colour = colour;
    this.lines = model.data.stages.flatMap((line, order) => [
      { ...line, order, judged: judgedOf(model.data.findings, line) },
      ...leftOver(line, order),
    ]);
    const hidden = new Set();
    if (!this.lines.some((line) => line.gpu_ms))
      ["gpu.p50", "gpu.p90", "gpu.p99", "delay"].forEach((key) => hidden.add(key));
    const noGpu = hidden.size > 0;
    if (!this.lines.some((line) => line.errors)) hidden.add("errors");
    this.asked = this.lines.some((line) => line.judged?.busy_share);
    // All of them would be wider than the page.
    (this.asked ? ["gpu.p90"] : ["busy", "waits", "idle"]).forEach((key) => hidden.add(key));
    this.columns = COLUMNS.filter(([, key, group]) => !hidden.has(key) && !(group === "on the stream" && noGpu));
    this.sorted = { key: "order", down: false };
    this.body = element("tbody");
    this.head = element("thead");
    const table = element("table", {}, this.head, this.body);
    byId("stages").append(element("div", { className: "scroll" }, table), this.#note());
    this.show();
  }

  show() {
    this.head.replaceChildren(this.#groups(), this.#titles());
    const { key, down } = this.sorted;
    const value = this.columns.find(([, each]) => each === key)[3];
    const sorted = this.lines.toSorted((a, b) => ((value(a) ?? -1) - (value(b) ?? -1)) * (down ? -1 : 1));
    this.body.replaceChildren(...sorted.map((line) => this.#row(line, key === "order")));
  }

  #groups() {
    const cells = [];
    for (const [, , group] of this.columns) {
      const last = cells.at(-1);
      if (last?.textContent === group) last.colSpan++;
      else cells.push(element("th", { colSpan: 1, scope: "colgroup" }, group));
    }
    return element("tr", {}, ...cells);
  }

  #titles() {
    return element(
      "tr",
      {},
      ...this.columns.map(([title, key]) => {
        if (!key) return element("th", { scope: "col", className: "left" }, title);
        const button = element("button", { onclick: () => this.#sort(key) }, title);
        const cell = element("th", { scope: "col" }, button);
        if (this.sorted.key === key) cell.ariaSort = this.sorted.down ? "descending" : "ascending";
        return cell;
      }),
    );
  }

  #sort(key) {
    this.sorted = { key, down: this.sorted.key === key ? !this.sorted.down : key !== "order" };
    this.show();
  }

  #row(line, nested) {
    const { name } = line;
    const button = line.isLeftOver ? element("span", { className: "quiet" }, name) : named(name, () => this.find(name));
    const swatch = element("i");
    swatch.style.background = line.isLeftOver ? "none" : this.colour(this.model.data.names.indexOf(name));
    if (nested) swatch.style.marginLeft = `${Math.min(line.depth, 12) * 18}px`;
    const cells = {
      order: [swatch, button],
      calls: [this.#calls(line)],
      share: [line.host_share === null ? "–" : percent(line.host_share)],
      errors: [line.errors ? count(line.errors) : ""],
      busy: [busyWords(line.judged)],
      waits: [shareWords(line.judged?.wait_share)],
      idle: [shareWords(line.judged?.idle_share)],
    };
    return element(
      "tr",
      {},
      ...this.columns.map(([, key, group, value]) => {
        if (!key)
          return element(
            "td",
            { className: "left" },
            group === "host" ? spark(line.host_shape, line.host_ms) : spark(line.gpu_shape, line.gpu_ms),
          );
        return element("td", {}, ...(cells[key] ?? [duration(value(line) * 1e6)]));
      }),
    );
  }

  #calls(line) {
    if (line.isLeftOver) return "";
    return line.only_warmup ? `${count(line.calls)} *` : count(line.calls);
  }

  #note() {
    const warm = this.lines.reduce((sum, line) => sum + line.warmup_calls, 0);
    const graph = this.lines.some((line) => line.replayed_calls)
      ? " Stages inside CUDA graphs have no time on the host; what replays do outside any stage has a line of its own."
      : "";
    const star = this.lines.some((line) => line.only_warmup)
      ? " * marks stages with warm-up calls only: their figures are of those calls."
      : "";
    const text =
      `Percentiles leave warm-up out (${counted(warm, "call")}).${star}${graph} ` +
      `${this.asked ? ASKED : ""}Distributions are on a logarithmic scale from the shortest to the longest; the line is the median.`;
    return element("p", { className: "note" }, text);
  }
}

const ASKED =
  "GPU, busy: the part of the time in which streams that were asked at random times had work, queued or running, with " +
  "its 95 % interval over requests; kernels ran for up to 18 points less where they are short. Idle: the rest. ";

/** The verdict on a line's stage, if there is one. */
function judgedOf(findings, line) {
  if (!findings) return undefined;
  const among = line.depth ? findings.stages : findings.requests;
  return among.find((each) => each.name === line.name && each.root === line.root);
}

function shareWords(share) {
  return share === null || share === undefined ? "–" : `${Math.round(100 * share)}\u00a0%`;
}

function busyWords(judged) {
  if (!judged?.busy_range) return "–";
  const [low, high] = judged.busy_range.map((share) => Math.round(100 * share));
  return `${shareWords(judged.busy_share)} (${low}–${high})`;
}

/** The line for what replays in a stage did outside any stage, if there were replays. */
function leftOver(line, order) {
  if (!line.outside_ms) return [];
  const nothing = { host_ms: null, host_shape: null, gpu_shape: null, launch_to_start_ms: null, host_share: null };
  return [
    {
      ...nothing,
      name: "in the graph, outside any stage",
      order: order + 0.5,
      depth: line.depth + 1,
      warmup_calls: 0,
      gpu_ms: line.outside_ms,
      isLeftOver: true,
    },
  ];
}

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A small picture of a distribution. */
function spark(shape, times) {
  if (!shape) return "–";
  const { counts, low_ms: low, high_ms: high } = shape;
  const most = Math.max(...counts);
  const bars = counts.map((value, index) => {
    const height = value ? Math.max(2, (value / most) * 20) : 0;
    return drawn("rect", { x: index * 4, y: 20 - height, width: 3, height });
  });
  const x = (Math.log(Math.max(times.p50, low) / low) / Math.log(high / low)) * counts.length * 4;
  const [from, to, median, p99] = [low, high, times.p50, times.p99].map((ms) => duration(ms * 1e6));
  const label = `from ${from} to ${to}, median ${median}, p99 ${p99}`;
  return drawn(
    "svg",
    { class: "spark", width: counts.length * 4, height: 21, role: "img", "aria-label": label },
    drawn("title", {}, label),
    ...bars,
    drawn("line", { x1: x, x2: x, y1: 0, y2: 21 }),
  );
}
