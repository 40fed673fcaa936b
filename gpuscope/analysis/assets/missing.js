/** What is missing, in sentences: stages that never came, stages without GPU times, and how certain the times are. */

function showMissing(model) {
  const lines = [...neverCame(model.data.losses), ...hostOnly(model), ...howSure(model.data.clock)];
  byId("missing").append(element("ul", {}, ...lines.map((line) => element("li", {}, line))));
}

function neverCame({ dropped, lost, skipped_lines: skipped, orphans }) {
  const lines = [
    ["Stages dropped", reasons(dropped)],
    ["Stages lost on the way", reasons(lost)],
    ["Lines skipped while reading", reasons(skipped)],
  ].flatMap(([term, text]) => (text ? `${term}: ${text}.` : []));
  if (!lines.length) lines.push("The files report no dropped and no lost stages, and every line could be read.");
  if (orphans) lines.push(`${counted(orphans, "stage")} whose outer stage is not in the files, shown as outermost.`);
  return lines;
}

function reasons(counts) {
  const some = Object.entries(counts).filter(([, number]) => number);
  return some.map(([reason, number]) => `${count(number)} ${reason}`).join(", ");
}

function hostOnly({ size, data: { losses } }) {
  const { host_only: all, captured, given_up: givenUp, untimed } = losses;
  if (!all) return [];
  const known = [
    [captured, "captured into a CUDA graph"],
    [givenUp, "whose GPU work did not end before the deadline"],
  ].flatMap(([number, why]) => (number ? `${count(number)} ${why}` : []));
  const why = [...known, reasons(untimed)].filter(Boolean).join(", ");
  const sentence = `${counted(all, "stage")} of ${count(size)} with host times only${why && ` (${why})`}`;
  return [`${sentence}. If they used the GPU, bubbles may hide their work.`];
}

function howSure(clock) {
  if (!clock) return ["No stage has GPU times: the program used no GPU, or none that could be timed."];
  const [median, worst] = [duration(clock.median), duration(clock.worst)];
  const lines = [
    `GPU bars are placed on the host’s clock to ± ${median} (median), ± ${worst} at worst. ` +
      "Durations on a stream are more certain than places.",
  ];
  if (clock.clamped)
    lines.push(`${counted(clock.clamped, "GPU start")} before the launch by more than that, moved to it.`);
  return lines;
}
