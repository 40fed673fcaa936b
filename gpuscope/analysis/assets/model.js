/** The recording: columns from the page's data, lanes of bars, requests, and what is found in them. Draws nothing. */

const FLAG = { warmup: 1, captured: 2, clamped: 4, givenUp: 8, inGraph: 32, notEnded: 256 };
/** GPU times are absent, or not where they seem to be. */
const UNPLACED = FLAG.captured | FLAG.clamped | FLAG.givenUp;

/** The first place of a sorted array whose value is above the given one. */
function firstAbove(sorted, value) {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** Disjoint intervals in order. Their sum within a window takes two binary searches. */
class Intervals {
  constructor({ start, end }) {
    this.start = Float64Array.from(start);
    this.end = Float64Array.from(end);
    this.before = new Float64Array(start.length + 1);
    for (let i = 0; i < start.length; i++) this.before[i + 1] = this.before[i] + end[i] - start[i];
  }

  within(from, to) {
    const first = firstAbove(this.end, from);
    const last = firstAbove(this.start, to);
    if (last <= first) return 0;
    const cut = Math.max(0, from - this.start[first]) + Math.max(0, this.end[last - 1] - to);
    return this.before[last] - this.before[first] - cut;
  }
}

/** The bars of one row of a lane, in order of time. */
class Track {
  constructor(rows, starts, ends) {
    this.rows = Int32Array.from(rows).sort((a, b) => starts[a] - starts[b]);
    this.start = Float64Array.from(this.rows, (row) => starts[row]);
    this.end = Float64Array.from(this.rows, (row) => ends[row]);
    // A search needs ends that only grow, but measured bars may overlap a little: here no end is before an earlier one.
    this.reach = this.end.slice();
    for (let i = 1; i < this.reach.length; i++) this.reach[i] = Math.max(this.reach[i], this.reach[i - 1]);
  }
}

class Model {
  constructor(data) {
    this.data = data;
    const columns = data.columns;
    this.size = columns.stage.length;
    for (const name of ["stage", "thread", "stream", "flags"]) this[name] = Int32Array.from(columns[name]);
    this.leaf = columns.leaf;
    this.error = columns.error;
    this.uncertainty = columns.uncertainty;
    this.cold = new Set((data.findings?.cold ?? []).map((call) => call.row));
    this.own = columns.own;
    this.usual = new Map(data.usual.map((each) => [`${each.root},${each.stage}`, each]));
    this.#times(columns);
    this.#tree(columns);
    this.#lanes(columns);
    this.#requests();
    this.#batches(data.batches);
  }

  #times({ step, host, delay, gpu }) {
    for (const name of ["start", "end", "gpuStart", "gpuEnd"]) this[name] = new Float64Array(this.size);
    this.from = 0;
    this.to = 1000;
    for (let row = 0, at = 0; row < this.size; row++) {
      at += step[row];
      this.start[row] = at;
      this.end[row] = at + host[row];
      this.gpuStart[row] = at + delay[row];
      this.gpuEnd[row] = at + delay[row] + gpu[row];
      this.from = Math.min(this.from, this.gpuStart[row]);
      this.to = Math.max(this.to, this.end[row], this.gpuEnd[row]);
    }
  }

  #tree({ parent }) {
    this.parent = Int32Array.from(parent, (distance, row) => (distance ? row - distance : -1));
    this.root = new Int32Array(this.size);
    this.children = new Map();
    for (let row = 0; row < this.size; row++) {
      let root = row;
      while (this.parent[root] >= 0) root = this.parent[root];
      this.root[row] = root;
      if (this.parent[row] >= 0) {
        const siblings = this.children.get(this.parent[row]);
        if (siblings) siblings.push(row);
        else this.children.set(this.parent[row], [row]);
      }
    }
  }

  #lanes(columns) {
    const host = this.#tracks(this.thread, columns.host_row, this.start, this.end);
    const gpu = this.#tracks(this.stream, columns.gpu_row, this.gpuStart, this.gpuEnd);
    const { processes, threads, streams, devices } = this.data;
    this.devices = devices.map((each) => ({
      ...each,
      idle: new Intervals(each.idle),
      queued: new Intervals(each.queued),
    }));
    this.lanes = [];
    processes.forEach((process, number) => {
      const title = Object.entries(process.resource)
        .map(([key, value]) => `${key}: ${value}`)
        .join("\n");
      this.lanes.push({ head: true, name: process.name, title, tracks: [] });
      threads.forEach((thread, index) => {
        if (thread.process !== number) return;
        this.lanes.push({
          side: "host",
          name: shortened(thread.name),
          tracks: host[index] ?? [],
          gaps: new Intervals(thread.gaps),
          thread: index,
          title: `${thread.name}, thread ${thread.ident} of ${process.name}`,
        });
      });
    });
    for (const device of this.devices) {
      const name = `GPU ${device.index} · ${device.name}`;
      this.lanes.push({ head: true, name, title: device.uuid, gaps: device.idle, tracks: [] });
      for (const index of device.streams) {
        const handle = streams[index].handle;
        this.lanes.push({
          side: "gpu",
          stream: index,
          name: handle === "0x0" ? "default stream" : `stream ${handle}`,
          tracks: gpu[index] ?? [],
          gaps: device.idle,
          of: processes.length > 1 ? processes[streams[index].process].name : "",
          title: `Stream ${handle} of ${processes[streams[index].process].name} on ${name}`,
        });
      }
    }
  }

  #tracks(laneOf, rowOf, starts, ends) {
    const lanes = {};
    for (let row = 0; row < this.size; row++) {
      if (rowOf[row] < 0) continue;
      const lane = (lanes[laneOf[row]] ??= []);
      (lane[rowOf[row]] ??= []).push(row);
    }
    for (const lane of Object.values(lanes))
      lane.forEach((rows, index) => {
        lane[index] = new Track(rows, starts, ends);
      });
    return lanes;
  }

  #requests() {
    this.requests = [];
    this.extent = new Map();
    for (let row = 0; row < this.size; row++) {
      const root = this.root[row];
      if (root === row) this.requests.push(row);
      const to = Math.max(this.start[row], this.end[row], this.has(row, UNPLACED) ? 0 : this.gpuEnd[row]);
      const known = this.extent.get(root);
      if (!known) this.extent.set(root, { from: this.start[root], to });
      else if (to > known.to) known.to = to;
    }
    // A request in which something is warm-up or cold is not judged.
    this.apart = new Set();
    for (let row = 0; row < this.size; row++) if (this.isCold(row)) this.apart.add(this.root[row]);
    this.trace = new Map(this.requests.map((row, index) => [row, this.data.traces[index]]));
  }

  #batches({ batch, member }) {
    /** By the row of a batch's stage: the rows that it worked for. */
    this.membersOf = new Map();
    /** By the row of a request: its batches, each with the rows of the request that it worked for. */
    this.batchesOf = new Map();
    batch.forEach((row, index) => {
      const request = this.root[member[index]];
      if (!this.membersOf.has(row)) this.membersOf.set(row, []);
      this.membersOf.get(row).push(member[index]);
      if (!this.batchesOf.has(request)) this.batchesOf.set(request, new Map());
      const batches = this.batchesOf.get(request);
      if (!batches.has(row)) batches.set(row, []);
      batches.get(row).push(member[index]);
    });
  }

  /** Whether a stage is of a request: inside it, or inside a batch that worked for it. */
  belongs(row, request) {
    if (this.root[row] === request) return true;
    const batches = this.batchesOf.get(request);
    for (let at = row; batches && at >= 0; at = this.parent[at]) if (batches.has(at)) return true;
    return false;
  }

  name(row) {
    return this.data.names[this.stage[row]];
  }

  has(row, flag) {
    return (this.flags[row] & flag) !== 0;
  }

  /** Whether statistics leave the stage out: warm-up, or a late cold call. */
  isCold(row) {
    return this.has(row, FLAG.warmup) || this.cold.has(row);
  }

  /** How much work its stream usually has while the host is in a stage, if it was asked often enough. */
  usualWork(row) {
    return this.usual.get(`${this.stage[this.root[row]]},${this.stage[row]}`);
  }

  /** For how much of a request a device usually has work, and waits, in bars of which the events do not tell. */
  usually(root, device) {
    const found = { work: 0, waiting: 0 };
    for (let row = root; row < this.size && this.start[row] <= this.extent.get(root).to; row++) {
      if (this.root[row] !== root || !this.leaf[row] || !device.streams.includes(this.stream[row])) continue;
      const usual = this.usualWork(row);
      if (!usual) continue;
      const open = solidFrom(this, row) - this.gpuStart[row];
      found.work += open * usual.work;
      found.waiting += open * (1 - usual.work);
    }
    return found;
  }

  /** The stage that launched a stage: for one inside a graph, the stage around the replay; for any other, itself. */
  launcher(row) {
    let at = row;
    while (this.has(at, FLAG.inGraph) && this.parent[at] >= 0) at = this.parent[at];
    return at;
  }

  /** Whether a stage has a bar on its thread; one inside a graph has none. */
  isOnHost(row) {
    return this.data.columns.host_row[row] >= 0;
  }

  /** The side on which a stage is shown when it is found. */
  sideOf(row) {
    return this.isOnHost(row) ? "host" : "gpu";
  }

  attributes(row) {
    return this.data.attributes[row] ?? {};
  }

  /** The number of a request among those of its kind, from 1 on. */
  numberOf(root) {
    return this.requests.filter((row) => row <= root && this.stage[row] === this.stage[root]).length;
  }

  /** The streams that the stages of a request ran on. */
  streamsOf(root) {
    const { to } = this.extent.get(root);
    const streams = new Set();
    for (let row = root; row < this.size && this.start[row] <= to; row++) {
      if (this.root[row] === root) streams.add(this.stream[row]);
    }
    return streams;
  }

  /** The number of stages that ran but are in no file, as far as the files say. */
  missing() {
    const { dropped, lost } = this.data.losses;
    return [...Object.values(dropped), ...Object.values(lost)].reduce((sum, number) => sum + number, 0);
  }

  /**
   * These requests, shortest first, up to the end of their last GPU work: those that are judged. If none is, those that
   * have ended; or else all. `gpuscope why` chooses from the same.
   */
  bySpeed(requests) {
    const ended = requests.filter((row) => !this.has(row, FLAG.notEnded));
    const judged = ended.filter((row) => !this.apart.has(row));
    return [judged, ended, requests].find((some, at) => some.length || at === 2).slice().sort((a, b) => this.length(a) - this.length(b));
  }

  /** How long a request took, until all its work was done. */
  length(root) {
    return this.extent.get(root).to - this.start[root];
  }

  /** The judged request whose duration is nearest to the median of its kind, as the figures have it. */
  median(requests) {
    const speed = this.bySpeed(requests);
    const figures = this.data.requests.find((each) => each.name === this.name(requests[0]));
    const away = (row) => Math.abs(this.length(row) - figures.end_to_end_ms.p50 * 1e6);
    return speed.reduce((best, row) => (away(row) < away(best) ? row : best));
  }

  /**
   * The stages of a request in the order of their first starts, with what each takes itself on the host. With the time
   * in no stage, and that after the host had left, these are the request. The own time of stages that wait for batches,
   * and of those around them, is divided into that in which its batches ran, and the rest, which it waited.
   */
  parts(root) {
    const stages = new Map();
    const waiting = this.#waiting(root);
    let rest = this.length(root);
    let waits = 0;
    for (let row = root; row < this.size && this.start[row] <= this.extent.get(root).to; row++) {
      if (this.root[row] !== root) continue;
      rest -= this.own[row];
      if (waiting.has(row)) waits += this.own[row];
      if (row === root || waiting.has(row) || this.has(row, FLAG.inGraph)) continue;
      const known = stages.get(this.stage[row]) ?? { stage: this.stage[row], calls: 0, own: 0 };
      known.calls++;
      known.own += this.own[row];
      stages.set(this.stage[row], known);
    }
    const inBatches = Math.min(waits, waiting.size ? this.#inBatches(root, waiting) : 0);
    const none = waiting.size ? 0 : this.own[root];
    return { stages: [...stages.values()], none, inBatches, waits: waits - inBatches, after: Math.max(0, rest) };
  }

  /** The rows of a request that batches worked for, and those around them. */
  #waiting(root) {
    const waiting = new Set();
    for (const members of (this.batchesOf.get(root) ?? new Map()).values())
      for (const member of members) for (let at = member; at >= 0; at = this.parent[at]) waiting.add(at);
    return waiting;
  }

  /** For how long the batches of a request ran while it was in no other stage of its own. */
  #inBatches(root, waiting) {
    const { from, to } = this.extent.get(root);
    const points = [];
    const add = (start, end, ran, busy) => {
      const [first, last] = [Math.max(start, from), Math.min(end, to)];
      if (first < last) points.push([first, ran, busy], [last, -ran, -busy]);
    };
    for (const row of this.batchesOf.get(root).keys())
      add(this.start[row], Math.max(this.end[row], this.stream[row] < 0 ? 0 : this.gpuEnd[row]), 1, 0);
    for (let row = root; row < this.size && this.start[row] <= to; row++) {
      if (this.root[row] === root && !waiting.has(row) && !this.has(row, FLAG.inGraph))
        add(this.start[row], this.end[row], 0, 1);
    }
    let [time, running, busy, before] = [0, 0, 0, from];
    for (const [at, ran, own] of points.sort((a, b) => a[0] - b[0])) {
      if (running && !busy) time += at - before;
      [running, busy, before] = [running + ran, busy + own, at];
    }
    return time;
  }

  /** The rows whose stage's name, or an attribute as `key=value`, contains the text, whatever its case. */
  find(text) {
    const wanted = text.toLowerCase();
    const names = this.data.names.map((name) => name.toLowerCase().includes(wanted));
    const found = [];
    for (let row = 0; row < this.size; row++) {
      if (names[this.stage[row]] || this.#attributeHas(row, wanted)) found.push(row);
    }
    return found;
  }

  #attributeHas(row, wanted) {
    const attributes = this.data.attributes[row];
    return (
      attributes && Object.entries(attributes).some(([key, value]) => `${key}=${value}`.toLowerCase().includes(wanted))
    );
  }
}
