/** Puts the parts together, and says what each button and key does. */

function main() {
  const model = new Model(JSON.parse(byId("data").textContent));
  const view = new View(model);
  byId("about").textContent = about(model);
  document.title = `gpuscope · ${model.data.processes.map((process) => process.name).join(", ") || "empty recording"}`;
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  showFigures(model);
  const picture = new Picture(model, view);
  const finder = new Finder(model, view, picture);
  const picker = new Picker(model, view);
  const above = () => byId("timeline").scrollIntoView({ block: "nearest" });
  const find = (name) => {
    finder.find(name);
    above();
  };
  const visit = (row) => {
    view.set({ request: -1, selected: { row, side: model.sideOf(row) } });
    view.goTo(row);
    above();
  };
  const table = new StageTable(model, find, (stage) => picture.palette.fill[stage]);
  showVerdicts(model.data.findings, find, visit);
  showMissing(model);
  const actions = {
    select: (bar) =>
      view.set({ selected: bar, request: bar && view.request === model.root[bar.row] ? view.request : -1 }),
    all: () => {
      view.set({ request: -1 });
      view.go(view.least, view.most);
    },
    pick: (how) => picker.pick(how),
    ask: () => byId("query").select(),
    turn: () => {
      setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
      picture.recolour();
      table.show();
    },
    help: () => byId("keys").showModal(),
    clear: () => {
      finder.clear();
      view.set({ selected: null, request: -1 });
    },
    cross: () => cross(model, view, picture),
    walk: (way) => walk(model, view, picture, way),
  };
  byId("theme").onclick = actions.turn;
  byId("read").onclick = () => byId("guide").showModal();
  byId("help").onclick = actions.help;
  byId("in").onclick = () => view.zoom(0.6);
  byId("out").onclick = () => view.zoom(1 / 0.6);
  byId("all").onclick = actions.all;
  new Input(model, view, picture, actions);
  followWithTexts(model, view, (stage) => picture.palette.fill[stage]);
  showAnswers(model, (name, how) => picker.open(name, how));
  showLegend(model);
  if (model.size) {
    const calm = view.calm;
    view.calm = true;
    picker.open(model.data.findings?.answers[0]?.name ?? model.name(model.requests[0]), "median");
    view.calm = calm;
  }
  return { model, view, picture };
}

/** Keep the texts beside the picture up to date: the selection at once, sums ten times a second. */
function followWithTexts(model, view, colour) {
  let shown;
  let waiting;
  const sums = () => {
    waiting = undefined;
    showWindow(model, view, colour);
  };
  view.addEventListener("change", () => {
    waiting ??= setTimeout(sums, 100);
    if (shown !== view.selected) showSelection(model, (shown = view.selected));
  });
  sums();
  showSelection(model, null);
}

function about({ data, size }) {
  if (!size) return "This recording has no stages.";
  const start = new Date(Number(BigInt(data.start_ns) / 1000000n));
  const names = data.processes.map((process) => process.name).join(", ");
  return `${names} · ${start.toISOString().slice(0, 19).replace("T", " ")} UTC · gpuscope ${data.version}`;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

/** Select a bar and bring it into view. */
function choose(view, picture, bar) {
  view.set({ selected: bar });
  view.reveal(bar);
  picture.scrollTo(bar);
}

/** From the launch of the selected stage to its bar on the stream, and back. */
function cross(model, view, picture) {
  if (!view.selected) return;
  const { row, side } = view.selected;
  if (side === "gpu" ? model.isOnHost(row) : model.stream[row] >= 0)
    choose(view, picture, { row, side: side === "gpu" ? "host" : "gpu" });
}

/** To the neighbour in the row, or the stage around or inside; from none to the first request in view. */
function walk(model, view, picture, way) {
  if (!model.size) return;
  if (!view.selected) {
    const first = model.requests.find((row) => model.end[row] >= view.from) ?? model.requests[0];
    return choose(view, picture, { row: first, side: "host" });
  }
  const { row, side } = view.selected;
  const ways = {
    left: () => picture.neighbour(view.selected, -1),
    right: () => picture.neighbour(view.selected, 1),
    up: () => model.parent[row],
    down: () => model.children.get(row)?.[0],
  };
  const next = ways[way]();
  if (next === undefined || next < 0) return;
  choose(view, picture, { row: next, side: side === "gpu" && model.stream[next] >= 0 ? side : model.sideOf(next) });
}

window.gpuscope = main();
