/** The texts around the picture: figures of the whole recording, of the window and of the selected stage. */

/** For how much of a window each GPU had queued work, was in stages, and was in none. The parts add up to its length. */
function shares(model, from, to) {
  const [first, last] = [Math.max(from, model.from), Math.min(to, model.to)];
  return model.devices.map((device) => {
    // Before its first stage and after its last nothing is known of a GPU.
    const length = Math.max(0, Math.min(last, device.end) - Math.max(first, device.start));
    const idle = device.idle.within(first, last);
    const queued = device.queued.within(first, last);
    return { device, length, idle, queued, open: Math.max(0, length - idle - queued) };
  });
}

/** The strip of figures at the top. */
function showFigures(model) {
  const { data } = model;
  const figures = [];
  const kinds = new Set(model.requests.map((row) => model.stage[row]));
  const warm = model.requests.filter((row) => model.has(row, FLAG.warmup)).length;
  figures.push(["requests", count(model.requests.length), warm ? `${count(warm)} warm-up` : ""]);
  if (kinds.size === 1) {
    const { end_to_end_ms: times } = data.requests[0];
    figures.push(["request, median", duration(times.p50 * 1e6), ""], ["request, p99", duration(times.p99 * 1e6), ""]);
  } else figures.push(["kinds of request", count(kinds.size), ""]);
  figures.push(["stages", count(model.size), `over ${duration(model.to - model.from)}`]);
  for (const { device, length, idle, queued } of shares(model, model.from, model.to)) {
    if (!length) continue;
    figures.push([
      `GPU ${device.index}, work was queued`,
      percent(queued / length),
      `${percent(idle / length)} in no stage`,
    ]);
  }
  if (data.clock)
    figures.push([
      "GPU times placed to",
      `± ${duration(data.clock.median)}`,
      `± ${duration(data.clock.worst)} at worst`,
    ]);
  const missing = model.missing();
  figures.push(["stages reported lost", count(missing), missing ? "see below" : ""]);
  for (const [term, value, small] of figures) {
    byId("figures").append(
      element("div", {}, element("dt", {}, term), element("dd", {}, value, element("small", {}, small))),
    );
  }
}

/** The value that a share of the sorted values does not exceed. */
function atShare(sorted, share) {
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)];
}

/** What the GPUs and the host's threads did in the window, or in the picked request. */
function showWindow(model, view, colour) {
  const picked = view.request >= 0;
  const { from, to } = picked ? model.extent.get(view.request) : view;
  const title = picked ? `Request ${count(model.numberOf(view.request))}` : "In view";
  const parts = [element("h2", {}, `${title} · ${duration(Math.min(to, model.to) - Math.max(from, model.from))}`)];
  if (picked) parts.push(requestParts(model, view.request, colour));
  const used = picked ? model.streamsOf(view.request) : null;
  for (const { device, length, idle, queued, open } of shares(model, from, to)) {
    if (used && !device.streams.some((stream) => used.has(stream))) continue;
    parts.push(element("h3", {}, `GPU ${device.index}${picked ? ", meanwhile" : ""}`));
    if (!length) {
      parts.push(element("p", { className: "quiet" }, "no stage with GPU times here"));
      continue;
    }
    const usual = picked ? model.usually(view.request, device) : { work: 0, waiting: 0 };
    // Of several streams, more may be open than there is time.
    const fits = Math.min(1, open / (usual.work + usual.waiting || 1));
    const rest = open - fits * (usual.work + usual.waiting);
    const rows = [
      ["work was queued", queued, "queued"],
      ["usually work", fits * usual.work, "usual"],
      ["usually waiting", fits * usual.waiting, "open"],
      ["work or waiting", rest, "open"],
      ["in no stage", idle, "idle"],
    ].filter(([term, time]) => time > 0 || !(term.startsWith("usually") || (fits < 1 && term === "work or waiting")));
    const bar = element("div", { className: "stacked" });
    for (const [, time, className] of rows) {
      const part = element("div", { className });
      part.style.width = `${(100 * time) / length}%`;
      bar.append(part);
    }
    parts.push(bar, pairs(rows.map(([term, time]) => [term, `${duration(time)} · ${percent(time / length)}`])));
  }
  const gaps = model.lanes.filter((lane) => lane.side === "host" && lane.gaps.start.length);
  if (gaps.length && !picked) {
    parts.push(element("h3", {}, "Host, between requests"));
    parts.push(pairs(gaps.slice(0, 8).map((lane) => [lane.name, duration(lane.gaps.within(from, to))])));
  }
  byId("window").replaceChildren(...parts);
}

/** The stages of a request with what each takes itself, which add up to the request. */
function requestParts(model, root, colour) {
  const whole = model.length(root) || 1;
  const { stages, none, inBatches, waits, after } = model.parts(root);
  const row = (name, time, calls = 1, stage = -1) => {
    const swatch = element("i");
    if (stage >= 0) swatch.style.background = colour(stage);
    const term = element("td", {}, swatch, calls > 1 ? `${name} ×${count(calls)}` : name);
    return element("tr", {}, term, element("td", {}, duration(time)), element("td", {}, percent(time / whole)));
  };
  const rows = stages.map(({ stage, calls, own }) => row(model.data.names[stage], own, calls, stage));
  if (inBatches) rows.push(row("in its batches", inBatches));
  if (waits) rows.push(row("waiting for its batches, or in no stage", waits));
  if (none) rows.push(row("in no stage", none));
  if (after >= 10000) rows.push(row("on the GPU, after the host", after));
  return element("table", { className: "parts" }, element("tbody", {}, ...rows));
}

/** All that is known of the selected stage. */
function showSelection(model, selected) {
  const box = byId("selection");
  if (!selected) {
    box.replaceChildren(
      element("p", { className: "quiet" }, "Select a stage to see its times, its launch and its attributes."),
    );
    return;
  }
  const { row } = selected;
  const root = model.root[row];
  const onHost = model.isOnHost(row);
  const parts = [element("h2", {}, model.name(row)), badges(model, row)];
  const sinceRequest = root === row ? null : duration(model.start[row] - model.start[root]);
  parts.push(
    element("h3", {}, "Host"),
    pairs([
      ["duration", onHost ? duration(model.end[row] - model.start[row]) : null],
      ["in the graph launched by", onHost ? null : model.name(model.launcher(row))],
      [onHost ? "start in the request" : "launch in the request", sinceRequest],
      ["thread", model.data.threads[model.thread[row]].name],
      ["a batch of", model.membersOf.has(row) ? counted(model.membersOf.get(row).length, "member") : null],
    ]),
  );
  parts.push(element("h3", {}, "GPU"), gpuFacts(model, row));
  const attributes = Object.entries(model.attributes(row));
  if (attributes.length) parts.push(element("h3", {}, "Attributes"), pairs(attributes, "pairs text mono"));
  parts.push(element("h3", {}, "Trace"), element("p", { className: "mono" }, model.trace.get(root)));
  box.replaceChildren(...parts);
}

function gpuFacts(model, row) {
  if (model.stream[row] < 0) {
    const why = model.has(row, FLAG.captured)
      ? "captured into a CUDA graph"
      : model.has(row, FLAG.givenUp)
        ? "its events did not complete in time"
        : "";
    return element("p", { className: "quiet" }, `no GPU times${why && `: ${why}`}`);
  }
  const lag = model.gpuEnd[row] - model.end[row];
  const placed = ["placed to", `± ${duration(model.uncertainty[row])}`];
  if (!model.isOnHost(row)) return pairs([["in the graph", duration(model.gpuEnd[row] - model.gpuStart[row])], placed]);
  const outside = model.data.outside[row];
  return pairs([
    ["on the stream", duration(model.gpuEnd[row] - model.gpuStart[row])],
    ["in the graph, outside any stage", outside === undefined ? null : duration(outside)],
    ["usual work, the host inside", usualWords(model.usualWork(row))],
    ["launch to start", duration(model.gpuStart[row] - model.start[row])],
    [lag >= 0 ? "ended after the host by" : "ended before the host by", duration(Math.abs(lag))],
    placed,
  ]);
}

/** How much work a stream usually has, with its interval. */
function usualWords(usual) {
  return usual && `${percent(usual.work)} (${rangeOf(usual.low, usual.high)})`;
}

function badges(model, row) {
  const known = [
    [model.has(row, FLAG.warmup), "warm-up"],
    [model.cold.has(row), "late cold call"],
    [model.error[row], "error", "bad"],
    [model.has(row, FLAG.notEnded), "not ended", "bad"],
    [model.has(row, FLAG.inGraph), "in a CUDA graph"],
    [model.has(row, FLAG.captured), "captured"],
    [model.has(row, FLAG.givenUp), "given up"],
    [model.has(row, FLAG.clamped), "GPU start clamped"],
  ];
  const shown = known.filter(([holds]) => holds);
  return element(
    "div",
    { className: "badges" },
    ...shown.map(([, text, more = ""]) => element("span", { className: `badge ${more}` }, text)),
  );
}

/** The few words beside the pointer. */
function showTip(model, bar, x, y) {
  const tip = byId("tip");
  tip.hidden = !bar;
  if (!bar) return;
  const { row } = bar;
  const timed = model.stream[row] >= 0;
  const onHost = model.isOnHost(row);
  tip.replaceChildren(
    element("b", {}, model.name(row)),
    pairs([
      ["host", onHost ? duration(model.end[row] - model.start[row]) : null],
      [
        onHost ? "on the stream" : "in the graph",
        timed ? duration(model.gpuEnd[row] - model.gpuStart[row]) : "no GPU times",
      ],
      ["usual work", timed && onHost && model.leaf[row] ? usualWords(model.usualWork(row)) : null],
      ["launch to start", timed && onHost ? duration(model.gpuStart[row] - model.start[row]) : null],
      ["", model.has(row, FLAG.warmup) ? "warm-up" : null],
      ["", model.has(row, FLAG.notEnded) ? "not ended" : null],
    ]),
  );
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = `${Math.max(4, x + 16 + width > innerWidth ? x - width - 12 : x + 16)}px`;
  tip.style.top = `${Math.max(4, y + 18 + height > innerHeight ? y - height - 12 : y + 18)}px`;
}
