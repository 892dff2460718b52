/** The second picture: the walks over a surface's contours, and below it the loss at each step. */

import { OPTIMIZERS } from "./descent.js";
import { add, pathData } from "./svg.js";

const WIDTH = 400;
const HEIGHT = 300;
const CURVES = { width: 400, height: 90, left: 38, right: 6, top: 6, bottom: 6 };
const DECADES = { low: -9, high: 3 };

/** Draw into two <svg>s. Returns load(surface, walks), to change what is shown, and seek(step), to show it so far. */
export function pathsPicture(svg, curves) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const contours = add(svg, "g", { class: "pg-contours" });
  const minimum = add(svg, "path", { d: "M-5 0H5M0 -5V5", class: "pg-minimum" });
  const start = add(svg, "circle", { r: 4, class: "pg-start" });
  const lines = {};
  const heads = {};
  for (const name of OPTIMIZERS) lines[name] = add(svg, "path", { class: `pg-walk pg-${name}` });
  for (const name of OPTIMIZERS) heads[name] = add(svg, "circle", { r: 5, class: `pg-head pg-${name}` });

  curves.setAttribute("viewBox", `0 0 ${CURVES.width} ${CURVES.height}`);
  const inner = CURVES.height - CURVES.top - CURVES.bottom;
  const lossY = (loss) => {
    const decade = Math.min(Math.max(Math.log10(loss), DECADES.low), DECADES.high);
    return CURVES.top + (inner * (DECADES.high - decade)) / (DECADES.high - DECADES.low);
  };
  for (let decade = DECADES.low; decade <= DECADES.high; decade += 3) {
    const y = lossY(10 ** decade);
    add(curves, "path", { d: `M${CURVES.left} ${y}H${CURVES.width - CURVES.right}`, class: "pg-axis" });
    const label = add(curves, "text", { x: CURVES.left - 5, y: y + 4, class: "pg-tick" });
    label.textContent = decade === 0 ? "1" : `1e${decade}`.replace("-", "−");
  }
  const title = add(curves, "text", { x: CURVES.width - CURVES.right - 6, y: CURVES.top + 14, class: "pg-title" });
  title.textContent = "loss f at each step";
  const losses = {};
  for (const name of OPTIMIZERS) losses[name] = add(curves, "path", { class: `pg-walk pg-${name}` });
  const now = add(curves, "path", { d: `M0 ${CURVES.top}V${CURVES.height - CURVES.bottom}`, class: "pg-now" });

  let shown = {};
  let stepX = () => 0;
  const load = (surface, walks) => {
    const { left, right, bottom, top } = surface.view;
    const px = ([x, y]) => [(WIDTH * (x - left)) / (right - left), (HEIGHT * (top - y)) / (top - bottom)];
    contours.replaceChildren();
    for (const level of surface.levels) add(contours, "path", { d: pathData(surface.contour(level).map(px), true) });
    minimum.setAttribute("transform", `translate(${px(surface.minimum)})`);
    start.setAttribute("transform", `translate(${px(surface.start)})`);
    stepX = (s) => CURVES.left + ((CURVES.width - CURVES.left - CURVES.right) * s) / surface.steps;
    shown = {};
    for (const name of OPTIMIZERS) {
      const walk = walks[name];
      shown[name] = {
        points: walk.points.map(px),
        losses: walk.losses.map((loss, s) => [stepX(s), lossY(loss)]),
      };
    }
  };
  const seek = (step) => {
    for (const name of OPTIMIZERS) {
      const points = shown[name].points.slice(0, step + 1);
      lines[name].setAttribute("d", pathData(points));
      const [x, y] = points.at(-1);
      heads[name].setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`);
      losses[name].setAttribute("d", pathData(shown[name].losses.slice(0, step + 1)));
    }
    now.setAttribute("transform", `translate(${stepX(step)} 0)`);
  };
  return { load, seek };
}
