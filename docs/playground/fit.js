/** The third picture: from one point of a path, by how much the best step under each ℓp decreases the loss. */

import { dualMap } from "./maps.js";
import { add, pathData } from "./svg.js";

const FRAME = { width: 400, height: 220, left: 44, right: 10, top: 30, bottom: 36 };
const STEPS = 200;
// 1 − 1/p is even along the axis, as on the slider of p.
export const ORDERS = Array.from({ length: STEPS + 1 }, (_, i) => (i === STEPS ? Infinity : STEPS / (STEPS - i)));
// No point of a path is as far away; near p = 1, where an entry of D(g) is almost 0, a root can be.
const LONGEST = 1e7;
const MARKS = [1, 1.5, 2, 3, 8, Infinity];

/**
 * The largest decrease f(w) − f(w − t·D(g)) over all lengths t ≥ 0, with g the gradient at w: an exact line search.
 *
 * Along a line each surface is a polynomial in t, which is least at a root of its derivative.
 */
export function decrease(surface, w, p) {
  const d = dualMap(surface.gradient(w), p);
  const lengths = roots(derivative([0, ...surface.along(w, d)]));
  const losses = lengths.map((t) => surface.value(w.map((x, i) => x - t * d[i])));
  return surface.value(w) - Math.min(surface.value(w), ...losses);
}

/** What is drawn: for each p the decrease as a part of the largest; the best p; whether all p are alike. */
export function fit(surface, w) {
  const decreases = ORDERS.map((p) => decrease(surface, w, p));
  const most = Math.max(...decreases);
  const relative = decreases.map((x) => (most > 0 ? x / most : 0));
  return { most, relative, best: ORDERS[decreases.indexOf(most)], alike: Math.min(...relative) > 1 - 1e-9 };
}

function value(coefficients, t) {
  return coefficients.reduceRight((sum, c) => sum * t + c, 0);
}

function derivative(coefficients) {
  return coefficients.slice(1).map((c, i) => c * (i + 1));
}

/** The roots from 0 to LONGEST at which a polynomial changes its sign: at most one between two turning points. */
function roots(coefficients) {
  const degree = coefficients.findLastIndex((c) => c !== 0);
  if (degree < 1) return [];
  const trimmed = coefficients.slice(0, degree + 1);
  const ends = [0, ...roots(derivative(trimmed)), LONGEST];
  const found = [];
  for (let i = 1; i < ends.length; i += 1) {
    let [low, high] = [ends[i - 1], ends[i]];
    const rises = value(trimmed, high) > 0;
    if (value(trimmed, low) > 0 === rises) continue;
    for (let middle = (low + high) / 2; middle > low && middle < high; middle = (low + high) / 2) {
      if (value(trimmed, middle) > 0 === rises) high = middle;
      else low = middle;
    }
    found.push(high);
  }
  return found;
}

/** Draw into an <svg>. Returns draw(found, p), with found from `fit` and p the order to mark beside the best. */
export function fitPicture(svg) {
  const { width, height, left, right, top, bottom } = FRAME;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const x = (p) => left + (width - left - right) * (1 - 1 / p);
  const y = (part) => top + (height - top - bottom) * (1 - part);
  for (const part of [0, 0.5, 1]) {
    add(svg, "path", { d: `M${left} ${y(part)}H${width - right}`, class: "pg-axis" });
    add(svg, "text", { x: left - 5, y: y(part) + 4, class: "pg-tick" }).textContent = `${100 * part} %`;
  }
  for (const p of MARKS) {
    const label = add(svg, "text", { x: x(p), y: height - bottom + 14, class: "pg-tick pg-middle" });
    label.textContent = p === Infinity ? "∞" : String(p);
  }
  const title = { x: (left + width - right) / 2, y: height - 4, class: "pg-tick pg-middle" };
  add(svg, "text", title).textContent = "p";
  add(svg, "text", { x: width - right, y: 14, class: "pg-title" }).textContent = "decrease of f, relative to the best p";
  const line = add(svg, "path", { class: "pg-fit-line" });
  const chosen = add(svg, "circle", { r: 5, class: "pg-fit-chosen" });
  const best = add(svg, "circle", { r: 5, class: "pg-fit-best" });
  return (found, p, part) => {
    line.setAttribute("d", pathData(ORDERS.map((order, i) => [x(order), y(found.relative[i])])));
    best.toggleAttribute("hidden", found.alike || !found.most);
    best.setAttribute("transform", `translate(${x(found.best).toFixed(2)} ${y(1).toFixed(2)})`);
    chosen.setAttribute("transform", `translate(${x(p).toFixed(2)} ${y(part).toFixed(2)})`);
  };
}
