"use strict";

/** Numbers for people, and elements whose text is only ever text. */

const UNITS = [
  [1e9, "s"],
  [1e6, "ms"],
  [1e3, "µs"],
  [1, "ns"],
];
// Made once, because making one per number costs more than all the drawing.
const DIGITS = Array.from(
  { length: 7 },
  (_, digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }),
);

/** A duration in nanoseconds with three significant digits, as `_data/plain/durations.py` writes it. */
function duration(ns) {
  if (ns === null || ns === undefined || Number.isNaN(ns)) return "–";
  const size = Math.abs(ns);
  if (size < 0.5) return "0\u00a0ns";
  const [unit, name] = UNITS.find(([unit]) => size >= unit * 0.9995) ?? UNITS.at(-1);
  const value = ns / unit;
  const digits = unit === 1 ? 0 : Math.abs(value) < 9.995 ? 2 : Math.abs(value) < 99.95 ? 1 : 0;
  return `${DIGITS[digits].format(value)}\u00a0${name}`;
}

/** A moment, with as many digits as the distance between two ticks needs. */
function moment(ns, step) {
  const [unit, name] = UNITS.find(([unit]) => Math.max(step * 10, Math.abs(ns) / 1e3) >= unit) ?? UNITS.at(-1);
  const digits = Math.min(6, Math.max(0, Math.ceil(Math.log10(unit / step) - 1e-9)));
  return `${DIGITS[digits].format(ns / unit || 0)}\u00a0${name}`;
}

function count(number) {
  return DIGITS[0].format(number);
}

function counted(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

function percent(share) {
  if (share > 0 && share < 0.001) return "<\u00a00.1\u00a0%";
  return `${(100 * share).toFixed(share < 0.9995 ? 1 : 0)}\u00a0%`;
}

/** The ends of an interval of shares, in whole percent. */
function rangeOf(low, high) {
  return `${Math.round(100 * low)} to ${Math.round(100 * high)}\u00a0%`;
}

/** A name cut in its middle, so that those of a pool's threads, which differ at their ends, can be told apart. */
function shortened(name, most = 18) {
  if (name.length <= most) return name;
  const tail = Math.ceil(most * 0.6);
  return `${name.slice(0, most - 1 - tail)}…${name.slice(-tail)}`;
}

/** An element; strings among the children become text, never markup. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A list of pairs (term, value); pairs without a value are left out. */
function pairs(rows, className = "pairs") {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element(
    "dl",
    { className },
    ...shown.flatMap(([term, value]) => [
      element("dt", {}, term),
      value instanceof Node && value.tagName === "DD" ? value : element("dd", {}, value),
    ]),
  );
}

function byId(id) {
  return document.getElementById(id);
}
