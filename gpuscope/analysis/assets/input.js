/** Mouse, wheel and keys. */

const WHEEL = 0.0016;

class Input {
  constructor(model, view, picture, actions) {
    Object.assign(this, { model, view, picture, actions });
    const { lanes, ruler, overview } = picture.canvases;
    for (const canvas of [lanes, ruler, overview])
      canvas.addEventListener("wheel", (event) => this.#wheel(event, canvas), { passive: false });
    lanes.addEventListener("pointerdown", (event) => this.#grab(event));
    lanes.addEventListener("pointermove", (event) => this.#point(event));
    lanes.addEventListener("pointerleave", () => this.#leave());
    lanes.addEventListener("dblclick", (event) => this.#zoomTo(event));
    ruler.addEventListener("pointerdown", (event) => this.#measure(event, ruler));
    overview.addEventListener("pointerdown", (event) => this.#travel(event));
    document.addEventListener("keydown", (event) => this.#key(event));
  }

  #wheel(event, canvas) {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey;
    const { view, picture } = this;
    // At its widest the picture lets the page scroll.
    if (!sideways && event.deltaY > 0 && view.span >= (view.most - view.least) * 0.999) return;
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 20 : 1;
    if (sideways) view.pan(((event.deltaX || event.deltaY) * lines * view.span) / picture.width);
    else
      view.zoom(
        Math.exp(Math.max(-400, Math.min(400, event.deltaY * lines)) * WHEEL),
        canvas === picture.canvases.overview ? undefined : picture.time(event.offsetX),
      );
  }

  /** Follow the pointer until it is let go. */
  #follow(canvas, event, moved, done) {
    canvas.setPointerCapture(event.pointerId);
    const ended = new AbortController();
    canvas.addEventListener("pointermove", moved, ended);
    canvas.addEventListener("pointerup", (last) => done?.(last), ended);
    canvas.addEventListener(
      "lostpointercapture",
      () => {
        ended.abort();
        canvas.classList.remove("moving");
        this.picture.drag = null;
        this.picture.refresh();
      },
      ended,
    );
  }

  #grab(event) {
    if (event.button !== 0) return;
    const { view, picture } = this;
    const canvas = picture.canvases.lanes;
    if (event.shiftKey) return this.#measure(event, canvas);
    let moved = 0;
    let last = event.offsetX;
    const top = this.picture.scroller.scrollTop;
    const move = (now) => {
      moved = Math.max(moved, Math.abs(now.offsetX - event.offsetX), Math.abs(now.offsetY - event.offsetY));
      if (moved < 4) return;
      canvas.classList.add("moving");
      view.pan(((last - now.offsetX) * view.span) / picture.width);
      last = now.offsetX;
      picture.scroller.scrollTop = top + event.clientY - now.clientY;
    };
    this.#follow(canvas, event, move, (up) => {
      if (moved < 4) this.actions.select(picture.at(up.offsetX, up.offsetY));
    });
  }

  #measure(event, canvas) {
    const { view, picture } = this;
    const at = (moved) => picture.time(Math.min(Math.max(moved.offsetX, 0), picture.width));
    const from = at(event);
    this.#follow(
      canvas,
      event,
      (now) => {
        picture.drag = [from, at(now)];
        picture.refresh();
      },
      (up) => {
        const to = at(up);
        if (Math.abs(picture.x(to) - picture.x(from)) > 3) view.go(Math.min(from, to), Math.max(from, to));
      },
    );
  }

  #travel(event) {
    const { view, picture } = this;
    const canvas = picture.canvases.overview;
    const scale = (view.most - view.least) / picture.width;
    const pointed = view.least + event.offsetX * scale;
    const inside = pointed >= view.from && pointed <= view.to;
    const held = inside ? pointed - view.from : view.span / 2;
    const move = (now) => {
      const from = view.least + now.offsetX * scale - held;
      view.show(from, from + view.span);
    };
    canvas.classList.add("moving");
    if (!inside) move(event);
    this.#follow(canvas, event, move);
  }

  #point(event) {
    if (event.buttons) return this.#leave();
    const bar = this.picture.at(event.offsetX, event.offsetY);
    const { hover } = this.view;
    if (bar?.row !== hover?.row || bar?.side !== hover?.side) this.view.set({ hover: bar });
    showTip(this.model, bar, event.clientX, event.clientY);
  }

  #leave() {
    if (this.view.hover) this.view.set({ hover: null });
    showTip(this.model, null);
  }

  #zoomTo(event) {
    const bar = this.picture.at(event.offsetX, event.offsetY);
    if (bar) this.view.goTo(bar.row);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
    if (event.target.closest("input, select")) return;
    const { view, actions } = this;
    const keys = {
      w: () => view.zoom(0.7),
      s: () => view.zoom(1 / 0.7),
      "+": () => view.zoom(0.7),
      "-": () => view.zoom(1 / 0.7),
      a: () => view.pan(-view.span * 0.15),
      d: () => view.pan(view.span * 0.15),
      0: () => actions.all(),
      f: () => view.selected && view.goTo(view.selected.row),
      "[": () => actions.pick("previous"),
      "]": () => actions.pick("next"),
      "/": () => actions.ask(),
      t: () => actions.turn(),
      "?": () => actions.help(),
      Escape: () => actions.clear(),
      g: () => actions.cross(),
    };
    if (event.target === this.picture.canvases.lanes || event.target === document.body) {
      Object.assign(keys, {
        ArrowLeft: () => actions.walk("left"),
        ArrowRight: () => actions.walk("right"),
        ArrowUp: () => actions.walk("up"),
        ArrowDown: () => actions.walk("down"),
      });
    }
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }
}
