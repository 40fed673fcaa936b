/** The request picker and the search. */

class Picker {
  constructor(model, view) {
    this.model = model;
    this.view = view;
    const kinds = [...new Set(model.requests.map((row) => model.stage[row]))];
    byId("kind").append(...kinds.map((stage) => element("option", { value: stage }, model.data.names[stage])));
    byId("kind").hidden = kinds.length < 2;
    byId("kind").onchange = () => this.#show();
    byId("picker").addEventListener("click", ({ target }) => target.dataset?.pick && this.pick(target.dataset.pick));
    byId("number").addEventListener("change", () => this.pick("number"));
    for (const button of byId("picker").querySelectorAll("button")) button.disabled = !kinds.length;
    view.addEventListener("change", () => this.#show());
    this.#show();
  }

  get requests() {
    const kind = Number(byId("kind").value);
    if (this.kind !== kind) {
      this.kind = kind;
      this.ofKind = this.model.requests.filter((row) => this.model.stage[row] === kind);
    }
    return this.ofKind;
  }

  /** Choose a kind of request, and one of its requests. */
  open(name, how) {
    byId("kind").value = this.model.data.names.indexOf(name);
    this.pick(how);
  }

  pick(how) {
    const { requests } = this;
    if (!requests.length) return;
    const speed = this.model.bySpeed(requests);
    const apart = requests.filter((row) => this.model.apart.has(row));
    const place = requests.indexOf(this.view.request);
    const last = requests.length - 1;
    const choices = {
      slowest: () => speed.at(-1),
      median: () => this.model.median(requests),
      cold: () => apart.find((row) => row > this.view.request) ?? apart[0] ?? speed.at(-1),
      p99: () => atShare(speed, 0.99),
      number: () => requests[Math.min(last, Math.max(0, Number(byId("number").value) - 1))],
      previous: () => requests[place < 0 ? last : Math.max(0, place - 1)],
      next: () => requests[Math.min(last, place + 1)],
    };
    this.how = how;
    this.view.pick(choices[how]());
  }

  #show() {
    const { requests } = this;
    byId("picker").querySelector("[data-pick=cold]").hidden = !requests.some((row) => this.model.apart.has(row));
    const place = requests.indexOf(this.view.request);
    byId("number").max = requests.length;
    // Not while somebody types.
    if (document.activeElement !== byId("number")) byId("number").value = place < 0 ? "" : place + 1;
    byId("picked").textContent = `of ${counted(requests.length, "request")}`;
    for (const button of byId("picker").querySelectorAll("[data-pick]")) {
      if (!button.ariaLabel) button.ariaPressed = String(place >= 0 && button.dataset.pick === this.how);
    }
  }
}

class Finder {
  constructor(model, view, picture) {
    Object.assign(this, { model, view, picture, found: [], at: -1 });
    const query = byId("query");
    query.addEventListener("input", () => this.find(query.value));
    query.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.step(event.shiftKey ? -1 : 1);
      if (event.key === "Escape") {
        this.clear();
        query.blur();
      }
    });
    byId("next").onclick = () => this.step(1);
    byId("previous").onclick = () => this.step(-1);
    this.#show();
  }

  /** Mark stages that have the text in their name or attributes; all others are dimmed. */
  find(text) {
    byId("query").value = text;
    this.found = text.trim() ? this.model.find(text.trim()) : [];
    this.at = -1;
    this.view.set({ matches: text.trim() ? new Set(this.found) : null });
    this.#show();
  }

  clear() {
    this.find("");
  }

  /** Go to the next match, or to the previous one; at first to the first match in view or after it. */
  step(by) {
    const { found, view, model } = this;
    if (!found.length) return;
    if (this.at < 0 && by > 0)
      this.at = Math.max(
        0,
        found.findIndex((row) => model.end[row] >= view.from),
      );
    else this.at = (this.at < 0 ? found.length - 1 : this.at + by + found.length) % found.length;
    view.set({ request: -1 });
    choose(view, this.picture, { row: found[this.at], side: this.model.sideOf(found[this.at]) });
    this.#show();
  }

  #show() {
    const asked = byId("query").value.trim() !== "";
    byId("found").textContent = !asked
      ? ""
      : this.at < 0
        ? counted(this.found.length, "match", "matches")
        : `${count(this.at + 1)} of ${count(this.found.length)}`;
    for (const id of ["next", "previous"]) byId(id).disabled = !this.found.length;
  }
}
