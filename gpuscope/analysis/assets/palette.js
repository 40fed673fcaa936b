/** The colours: a hue for each stage, and those of the style sheet. */

const HUES = {
  light: ["#8fb8f0", "#f3a66b", "#8bd0a0", "#ea9fcf", "#ecc95a", "#7fd0d6", "#bfa3ee", "#ef9090", "#c3c77a", "#a9c4d9"],
  dark: ["#6d9fe0", "#d98a4d", "#69b582", "#cf82b5", "#d0ab3f", "#57b4bb", "#a386d8", "#d87575", "#a5a95c", "#86a5bd"],
};
const NEUTRAL = { light: "#cdd2da", dark: "#8b94a1" };
const SHADES = 6;

/** The colours of a theme: the fill, edge and shades of each stage, and the colours of the style sheet. */
class Palette {
  constructor(model, theme) {
    const css = getComputedStyle(document.documentElement);
    for (const name of ["card", "line", "soft", "text", "quiet", "accent", "idle", "ink", "bad"])
      this[name] = css.getPropertyValue(`--${name}`).trim();
    this.idleText = css.getPropertyValue("--idle-text").trim();
    this.idleShade = css.getPropertyValue("--idle-shade").trim();
    this.fill = [];
    this.edge = [];
    this.shades = [];
    // Stages that are never inside another are grey, unless all are: the colours are for what is inside.
    const inside = new Set(model.stage.filter((_, row) => model.parent[row] >= 0));
    let next = 0;
    model.data.names.forEach((_, stage) => {
      const grey = inside.size > 0 && !inside.has(stage);
      this.#add(grey ? NEUTRAL[theme] : HUES[theme][next++ % HUES[theme].length], theme);
    });
  }

  #add(fill, theme) {
    this.fill.push(fill);
    this.edge.push(mixed(fill, theme === "dark" ? 255 : 0, theme === "dark" ? 0.3 : 0.38));
    const alpha = (shade) =>
      Math.round(255 * (0.25 + (0.75 * shade) / (SHADES - 1)))
        .toString(16)
        .padStart(2, "0");
    this.shades.push(Array.from({ length: SHADES }, (_, shade) => fill + alpha(shade)));
  }
}

function mixed(hex, other, part) {
  const channels = [1, 3, 5].map((at) => Math.round(parseInt(hex.slice(at, at + 2), 16) * (1 - part) + other * part));
  return `#${channels.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}
