/** The first picture: the unit ball of ℓp, a gradient to drag, its dual map and the update. */

import { inMetric, norm } from "./maps.js";
import { add, pathData } from "./svg.js";

const UNIT = 100; // of the view box, for 1 in the plane
const REACH = 1.6; // how far each entry of the gradient goes
const EDGE = 1.72;

const px = ([x, y]) => [x * UNIT, -y * UNIT];
const held = (x) => Math.min(Math.max(Math.round(x * 100) / 100, -REACH), REACH);

/** Numbers as (1.00, −0.45), the large ones in powers of ten. */
export function vector(x) {
  return `(${x.map(number).join(", ")})`;
}

export function number(x) {
  if (!Number.isFinite(x)) return Number.isNaN(x) ? "NaN" : x < 0 ? "−∞" : "∞";
  const small = x !== 0 && Math.abs(x) < 0.01;
  const text = small || Math.abs(x) >= 1000 ? x.toExponential(1) : x.toFixed(Math.abs(x) >= 100 ? 1 : 2);
  return text.replaceAll("-", "−").replace("e+", "e");
}

/** The unit circle of ‖P^½ x‖_p: every direction divided by its ℓp norm, and then by √P. */
function circle(p, roots) {
  return Array.from({ length: 360 }, (_, degree) => {
    const angle = (degree * Math.PI) / 180;
    const x = [Math.cos(angle), Math.sin(angle)];
    const size = norm(x, p);
    return x.map((value, i) => value / size / roots[i]);
  });
}

/**
 * Draw into an <svg>; `onMove(g)` hears of a gradient that was dragged or moved by the arrow keys.
 * Returns draw(state), which draws a state {p, scale, g, metric} and returns what it found, for the table beside it.
 */
export function ballPicture(svg, onMove) {
  const half = EDGE * UNIT;
  svg.setAttribute("viewBox", `${-half} ${-half} ${2 * half} ${2 * half}`);
  const defs = add(svg, "defs");
  for (const name of ["g", "d", "u"]) {
    const attributes = { id: `pg-head-${name}`, viewBox: "0 0 10 10", refX: 8, refY: 5, orient: "auto" };
    const size = name === "u" ? 3 : 5;
    const marker = add(defs, "marker", { ...attributes, markerWidth: size, markerHeight: size });
    add(marker, "path", { d: "M0 0.5L10 5L0 9.5Z", class: `pg-head-${name}` });
  }
  add(svg, "path", { d: `M${-half} 0H${half}M0 ${-half}V${half}`, class: "pg-axis" });
  const ball = add(svg, "path", { class: "pg-ball" });
  const support = add(svg, "path", { class: "pg-support" });
  const arrows = {};
  for (const name of ["u", "g", "d"]) {
    arrows[name] = add(svg, "path", { class: `pg-arrow pg-${name}`, "marker-end": `url(#pg-head-${name})` });
  }
  const labels = {};
  for (const [name, text] of [["u", "u"], ["g", "g"], ["d", "D(g)"]]) {
    labels[name] = add(svg, "text", { class: `pg-label pg-label-${name}` });
    labels[name].textContent = text;
  }
  const handle = add(svg, "g", {
    class: "pg-handle",
    tabindex: 0,
    role: "slider",
    "aria-roledescription": "gradient, moved in two dimensions",
    "aria-label": "Gradient g: arrow keys move its tip, with Shift in larger steps",
    "aria-valuemin": -180,
    "aria-valuemax": 180,
  });
  add(handle, "circle", { r: 22, class: "pg-touch" });
  add(handle, "circle", { r: 6, class: "pg-dot" });

  let g = [0, 0];
  let box = null; // measured once a drag, not once a move
  handle.addEventListener("pointerdown", (event) => {
    box = svg.getBoundingClientRect();
    handle.setPointerCapture(event.pointerId);
    handle.classList.add("pg-dragged");
    handle.focus({ preventScroll: true });
    event.preventDefault();
  });
  handle.addEventListener("pointermove", (event) => {
    if (!box) return;
    const at = [event.clientX - box.left, box.top + box.height - event.clientY];
    onMove([at[0] / box.width, at[1] / box.height].map((part) => held((2 * part - 1) * EDGE)));
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
    handle.addEventListener(end, () => {
      box = null;
      handle.classList.remove("pg-dragged");
    });
  }
  handle.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    onMove(g.map((x, i) => held(x + move[i] * (event.shiftKey ? 0.25 : 0.05))));
  });

  let drawn = "";
  return (state) => {
    g = state.g;
    const { p, scale, metric } = state;
    const roots = [1, Math.sqrt(metric)];
    const found = inMetric(g, p, scale, roots);
    const { d } = found;
    if (`${p} ${metric}` !== drawn) {
      ball.setAttribute("d", pathData(circle(p, roots).map(px), true));
      drawn = `${p} ${metric}`;
    }
    const length = Math.hypot(...g);
    support.toggleAttribute("hidden", length === 0);
    if (length > 0) {
      const along = [-g[1] / length, g[0] / length];
      const ends = [-0.8, 0.8].map((t) => px(d.map((x, i) => x + t * along[i])));
      support.setAttribute("d", pathData(ends));
    }
    // The labels keep out of each other's way: g's on one side of the arrows, the other two on the other.
    const side = g[0] * d[1] - g[1] * d[0] < 0 ? -1 : 1;
    place(arrows.g, labels.g, g, 1, [0.08, -0.15 * side]);
    place(arrows.d, labels.d, d, 1, [0.12, 0.16 * side]);
    place(arrows.u, labels.u, found.u, 0.55, [0, 0.13 * side]);
    const [x, y] = px(g);
    handle.setAttribute("transform", `translate(${x} ${y})`);
    handle.setAttribute("aria-valuenow", Math.round((Math.atan2(g[1], g[0]) * 180) / Math.PI));
    handle.setAttribute("aria-valuetext", `g = ${vector(g)}, D(g) = ${vector(d)}`);
    return found;
  };
}

/**
 * An arrow from the origin to a tip, which may lie outside the picture, and its label: at a part of the shaft that
 * is seen, moved along and across it by an offset.
 */
function place(arrow, label, tip, part, offset) {
  const length = tip ? Math.hypot(...tip) : 0;
  const shown = length > 0.005;
  arrow.toggleAttribute("hidden", !shown);
  label.toggleAttribute("hidden", !shown);
  if (!shown) return;
  // An arrow that leaves the picture is drawn to just beyond its edge: its head is gone, its direction is right.
  const far = Math.min(1, 4 / length);
  const drawn = tip.map((x) => (Number.isFinite(x) ? x * far : Math.sign(x) * 4));
  arrow.setAttribute("d", pathData([[0, 0], px(drawn)]));
  const size = Math.hypot(...drawn);
  const seen = part * Math.min(1, EDGE / Math.max(...drawn.map(Math.abs)));
  const [along, across] = [drawn.map((x) => x / size), [-drawn[1] / size, drawn[0] / size]];
  const at = drawn.map((x, i) => x * seen + offset[0] * along[i] + offset[1] * across[i]);
  const [x, y] = px(at.map((value) => Math.min(Math.max(value, 0.16 - EDGE), EDGE - 0.16)));
  label.setAttribute("x", x.toFixed(1));
  label.setAttribute("y", y.toFixed(1));
}
