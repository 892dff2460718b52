/** The page: what the reader has chosen, the controls that change it, and when it is drawn. */

import { ballPicture, number, vector } from "./ball.js";
import { OPTIMIZERS, directionOf, walk } from "./descent.js";
import { decrease, fit, fitPicture } from "./fit.js";
import { pathsPicture } from "./paths.js";
import { quadratic, rosenbrock } from "./surfaces.js";

const MU = 0.9;
const SECONDS = 6; // what a whole walk takes to play

// Learning rates that suit p = 4, with and without momentum. LPSGDM has one for each scale, because a learning
// rate belongs to a length of step.
const RATES = {
  quadratic: { sgd: 0.3, signsgd: 0.02, lpsgdm: { unit: 0.03, dual: 0.3, power: 0.1, matched: 0.3 } },
  rosenbrock: { sgd: 0.002, signsgd: 0.003, lpsgdm: { unit: 0.003, dual: 0.001, power: 0.002, matched: 0.002 } },
};

const state = {
  p: 4,
  scale: "power",
  g: [1, 0.45],
  metric: 1, // P = diag(1, metric), in the first picture
  surface: "quadratic",
  condition: 20,
  angle: 30,
  momentum: true,
  anneal: true,
  step: 0, // of the walks, that is shown
  from: "sgd", // whose point the third picture is about
  playing: false,
};

const find = (id) => document.getElementById(`pg-${id}`);
const STEPS = [find("step"), find("fit-step")]; // one beside either picture, for the same step
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
const drawBall = ballPicture(find("ball"), (g) => change({ g }));
const paths = pathsPicture(find("paths"), find("curves"));
const drawFit = fitPicture(find("fit"));

let surface;
let walks;

// ---- drawing: at most once a frame, whatever has changed ----

let pending = false;
let stale = true; // the walks have to be computed anew

function change(choices) {
  Object.assign(state, choices);
  // The gradient and metric of the first picture and the point that is shown change no walk.
  stale ||= Object.keys(choices).some((name) => !["g", "metric", "step", "from", "playing"].includes(name));
  if (pending) return;
  pending = true;
  requestAnimationFrame(draw);
}

function draw() {
  pending = false;
  if (stale) compute();
  stale = false;
  paths.seek(state.step);
  report(drawBall(state));
  compare();
}

function compute() {
  surface = state.surface === "quadratic" ? quadratic(state.condition, state.angle) : rosenbrock;
  walks = {};
  for (const name of OPTIMIZERS) {
    const direction = directionOf(name, state, surface.steps);
    walks[name] = walk(surface, direction, rate(name), state.momentum ? MU : 0);
  }
  paths.load(surface, walks);
  state.step = Math.min(state.step, surface.steps);
}

// ---- the numbers beside the pictures ----

function report({ d, dual, u }) {
  const { p, g, scale, step } = state;
  write("g-text", vector(g));
  write("dual-text", number(dual));
  write("d-text", vector(d));
  write("u-text", u ? vector(u) : "not defined at p = 1");
  write("inner-text", number(g[0] * d[0] + g[1] * d[1]));
  write("p-text", order(p));
  write("q-text", order(conjugate(p)));
  const ball = `Unit ball of ℓp at p = ${order(p)}. g = ${vector(g)}, D(g) = ${vector(d)}`;
  find("ball").setAttribute("aria-label", u ? `${ball}, u = ${vector(u)} under the scale ${scale}.` : `${ball}.`);
  for (const name of OPTIMIZERS) {
    const { losses, refused, diverged } = walks[name];
    const over = diverged !== undefined && step >= diverged;
    const text = over ? `diverged at step ${diverged}` : small(losses[Math.min(step, losses.length - 1)]);
    write(`${name}-loss`, refused ? "not defined at p = 1" : text);
  }
  const ps = walks.lpsgdm.ps;
  write("lpsgdm-p", ps.length ? `p = ${order(ps[Math.min(Math.max(step - 1, 0), ps.length - 1)])}` : "");
  for (const id of ["step-text", "fit-step-text"]) write(id, `${step} of ${surface.steps}`);
  for (const slider of STEPS) {
    slider.max = surface.steps;
    slider.value = step;
    slider.setAttribute("aria-valuetext", `step ${step} of ${surface.steps}`);
  }
  find("play").textContent = state.playing ? "Pause" : "Play";
  const ends = OPTIMIZERS.map((name) => `${name} ${find(`${name}-loss`).textContent}`).join(", ");
  find("paths").setAttribute("aria-label", `Three paths on ${state.surface}, step ${step}; the loss: ${ends}.`);
}

// ---- the decrease under each p, from one point of one path ----

let point = null;
let found;

function compare() {
  const { points } = walks[state.from];
  const now = points[Math.min(state.step, points.length - 1)];
  if (now !== point) found = fit(surface, now);
  point = now;
  const loss = surface.value(now);
  const part = (x) => `${small((100 * x) / loss)} % of f`;
  const chosen = decrease(surface, now, state.p);
  drawFit(found, state.p, found.most && chosen / found.most);
  const best = found.alike ? "every p alike" : `p = ${order(found.best)}`;
  write("fit-best-text", found.most ? `${best}: ${part(found.most)}` : "none, g = 0");
  write("fit-two-text", found.most ? part(decrease(surface, now, 2)) : "—");
  write("fit-p-text", `p = ${order(state.p)}`);
  write("fit-chosen-text", found.most ? part(chosen) : "—");
  const texts = ["best", "two", "chosen"].map((name) => find(`fit-${name}-text`).textContent);
  const label = `Decrease of the loss by the best step under each ℓp. Best: ${texts[0]}; p = 2: ${texts[1]}`;
  find("fit").setAttribute("aria-label", `${label}; p = ${order(state.p)}: ${texts[2]}.`);
}

function write(id, text) {
  const element = find(id);
  if (element.textContent !== text) element.textContent = text;
}

function twoDigits(x) {
  return Number(x.toPrecision(2));
}

/** A loss as text: two digits, whatever its size. */
function small(x) {
  return x >= 0.01 && x <= 100 ? String(twoDigits(x)) : number(x);
}

/** An order with as many digits as the slider can tell apart. */
function rounded(p) {
  return Number(p.toFixed(p < 10 ? 2 : p < 100 ? 1 : 0));
}

function order(p) {
  if (p === Infinity) return "∞";
  return String(rounded(p));
}

function conjugate(p) {
  return p === 1 ? Infinity : p === Infinity ? 1 : p / (p - 1);
}

// ---- p: the slider is 1 − 1/p = 1/q, which has 1 and ∞ at its ends, 2 in the middle, and turns p into q mirrored ----

function fromSlider(value) {
  if (value >= 1000) return Infinity;
  return rounded(1000 / (1000 - value));
}

function setP(p, slider) {
  find("p").value = slider ?? Math.round(1000 * (1 - 1 / p));
  find("p").setAttribute("aria-valuetext", `p = ${order(p)}, q = ${order(conjugate(p))}`);
  for (const button of document.querySelectorAll("[data-p]")) {
    button.setAttribute("aria-pressed", Number(button.dataset.p) === p);
  }
  change({ p });
}

find("p").addEventListener("input", (event) => setP(fromSlider(event.target.valueAsNumber), event.target.value));
for (const button of document.querySelectorAll("[data-p]")) {
  button.addEventListener("click", () => setP(Number(button.dataset.p)));
}

// ---- learning rates: sliders in powers of ten, one set of values for each surface ----

function rate(name) {
  const rates = RATES[state.surface];
  return name === "lpsgdm" ? rates.lpsgdm[state.scale] : rates[name];
}

function showRate(name) {
  const slider = find(`${name}-lr`);
  slider.value = Math.log10(rate(name));
  const text = String(rate(name));
  slider.setAttribute("aria-valuetext", text);
  write(`${name}-lr-text`, text);
}

for (const name of OPTIMIZERS) {
  find(`${name}-lr`).addEventListener("input", (event) => {
    const value = twoDigits(10 ** event.target.valueAsNumber);
    const rates = RATES[state.surface];
    if (name === "lpsgdm") rates.lpsgdm[state.scale] = value;
    else rates[name] = value;
    showRate(name);
    change({ rates });
  });
}

// ---- the other choices ----

for (const radio of document.querySelectorAll("[name=pg-scale]")) {
  radio.addEventListener("change", () => {
    change({ scale: radio.value });
    showRate("lpsgdm");
  });
}
for (const radio of document.querySelectorAll("[name=pg-surface]")) {
  radio.addEventListener("change", () => {
    change({ surface: radio.value, step: Infinity, playing: false });
    find("shape").disabled = radio.value !== "quadratic";
    OPTIMIZERS.forEach(showRate);
  });
}
function showShape() {
  const condition = twoDigits(10 ** find("condition").valueAsNumber);
  const angle = find("angle").valueAsNumber;
  write("condition-text", String(condition));
  write("angle-text", `${angle}°`);
  find("condition").setAttribute("aria-valuetext", `condition number ${condition}`);
  find("angle").setAttribute("aria-valuetext", `${angle} degrees`);
  change({ condition, angle });
}
function showMetric() {
  const metric = twoDigits(2 ** find("metric").valueAsNumber);
  write("metric-text", `P = diag(1, ${metric})`);
  find("metric").setAttribute("aria-valuetext", `P = diag(1, ${metric})`);
  change({ metric });
}
find("metric").addEventListener("input", showMetric);
find("condition").addEventListener("input", showShape);
find("angle").addEventListener("input", showShape);
find("momentum").addEventListener("change", (event) => change({ momentum: event.target.checked }));
find("anneal").addEventListener("change", (event) => change({ anneal: event.target.checked }));

// ---- playing ----

let last = null; // the time of the frame before, and the step it stood at, with its fraction
let at = 0;

function frame(time) {
  if (!state.playing) return;
  if (last !== null) at += ((time - last) / 1000) * (surface.steps / SECONDS);
  last = time;
  const step = Math.min(Math.floor(at), surface.steps);
  change({ step, playing: step < surface.steps });
  requestAnimationFrame(frame);
}

find("play").addEventListener("click", () => {
  if (state.playing) return change({ playing: false });
  // Who asked for less motion gets the walk whole, and the step's slider to go through it.
  if (still.matches) return change({ step: surface.steps });
  at = state.step < surface.steps ? state.step : 0;
  last = null;
  change({ step: at, playing: true });
  return requestAnimationFrame(frame);
});
find("reset").addEventListener("click", () => change({ step: 0, playing: false }));
for (const slider of STEPS) {
  slider.addEventListener("input", (event) => change({ step: event.target.valueAsNumber, playing: false }));
}
for (const radio of document.querySelectorAll("[name=pg-from]")) {
  radio.addEventListener("change", () => change({ from: radio.value }));
}

// ---- the first picture: the walks whole, nothing moving; what a browser kept in the form is forgotten ----

for (const form of document.querySelectorAll(".pg form")) form.reset();
setP(state.p);
find("metric").value = 0;
showMetric();
showShape();
OPTIMIZERS.forEach(showRate);
state.step = Infinity; // which means the last one
document.querySelector(".pg").classList.add("pg-ready");
