/**
 * The mathematics of the playground: the dual map of ℓp, the four scales, the schedule of p and momentum.
 *
 * The conventions are those of normopt, against which tests/site/test_playground.py checks every function here:
 * D(0) = 0; p = 1 keeps the first of the largest entries; p = ∞ is the sign, with sign(0) = 0; NaN stays NaN.
 * Vectors are arrays of numbers, and no function changes one that it was given.
 */

export const SCALES = ["unit", "dual", "power", "matched"];

// What float64's smallest normal number and largest number are: the limits between which a norm divides.
const TINY = 2.2250738585072014e-308;
const MAX = Number.MAX_VALUE;

/** 1/(p−1) = q − 1, the one exponent of the dual map, the dual norm and the power map; ∞ at p = 1. */
export function exponent(p) {
  if (!(p >= 1)) throw new RangeError(`p must be at least 1, but is ${p}: below 1 there is no norm`);
  return 1 / (p - 1);
}

/** The largest |entry|, finite, or 1 where that is 0: what entries are divided by. */
function size(x) {
  return Math.min(Math.max(0, ...x.map(Math.abs)), MAX) || 1;
}

/** ‖x‖_p, relative to the largest entry, so that no power over- or underflows. */
export function norm(x, p) {
  if (p === Infinity) return Math.max(0, ...x.map(Math.abs));
  const top = size(x);
  const sum = x.reduce((total, value) => total + (Math.abs(value) / top) ** p, 0);
  return top * sum ** (1 / p);
}

/** ‖c‖⋆ = ‖c‖_q with 1/p + 1/q = 1. */
export function dualNorm(c, p) {
  return norm(c, 1 + exponent(p));
}

/** D(c) = argmax ⟨c, d⟩ over ‖d‖_p ≤ 1 = sign(c)·(|c|/‖c‖_q)^(q−1). */
export function dualMap(c, p) {
  if (p === 1) return oneHot(c);
  if (p === Infinity) return signedPower(c, 0);
  const relative = c.map((x) => x / size(c)); // of which no norm over- or underflows
  return signedPower(divide(relative, dualNorm(relative, p)), exponent(p));
}

/**
 * The update direction u:
 *
 *     unit     D(c)
 *     dual     ‖c‖⋆ · D(c)
 *     power    sign(c)·|c|^(1/(p−1)), not defined at p = 1
 *     matched  D(c) · RMS(c)/RMS(D(c))
 */
export function update(c, p, scale) {
  if (!SCALES.includes(scale)) throw new RangeError(`scale must be one of ${SCALES.join(", ")}, but is ${scale}`);
  if (scale === "power" && p === 1) throw new RangeError('"power" is not defined at p = 1: its exponent is 1/(p−1)');
  if (p === 2 && scale !== "unit") return [...c];
  if (scale === "power") return signedPower(c, exponent(p));
  const d = dualMap(c, p);
  if (scale === "dual") return multiply(d, dualNorm(c, p));
  if (scale === "matched") return multiply(divide(d, norm(d, 2)), norm(c, 2));
  return d;
}

/**
 * Under the norm ‖P^½ x‖_p with P = diag(roots²): the dual map d = P^−½ D(P^−½ c), the dual norm and the update u.
 *
 * "matched" gives u the length of c/P; u is null where "power" is not defined.
 */
export function inMetric(c, p, scale, roots) {
  const white = c.map((x, i) => x / roots[i]);
  const back = (x) => x.map((value, i) => value / roots[i]);
  const d = back(dualMap(white, p));
  const found = { d, dual: dualNorm(white, p), u: null };
  if (scale === "matched") found.u = multiply(divide(d, norm(d, 2)), norm(back(white), 2));
  else if (p !== 1 || scale !== "power") found.u = back(update(white, p, scale));
  return found;
}

/**
 * p at step s = 1 … S of the cosine schedule, after which it stays at `end`; S = 1 keeps it at its start.
 *
 * In the space "p" it is end + (start − end)·(1 + cos(π(s−1)/(S−1)))/2; in the space "exponent" 1/(p−1) takes
 * that curve, which can start at p = ∞ but not at p = 1.
 */
export function cosineP(start, s, total, space = "p", end = 2) {
  if (space === "p" && start === Infinity) throw new RangeError('p = ∞ is annealed in the space "exponent"');
  if (space === "exponent" && start === 1) throw new RangeError('p = 1 is annealed in the space "p"');
  if (total === 1) return start;
  const t = Math.min(s - 1, total - 1) / (total - 1);
  const weight = t === 1 ? 0 : (1 + Math.cos(Math.PI * t)) / 2;
  if (weight === 1) return start;
  if (weight === 0) return end;
  if (space === "p") return end + (start - end) * weight;
  return 1 + 1 / (exponent(end) + (exponent(start) - exponent(end)) * weight);
}

/** m ← μm + (1−μ)g, as a new vector; the first m is 0. */
export function ema(m, g, mu) {
  return m.map((old, i) => mu * old + (1 - mu) * g[i]);
}

/** sign(c)·|c|^e for e ≥ 0, where e = 0 means the sign. */
function signedPower(c, e) {
  return c.map((x) => (e === 0 ? Math.sign(x) : Math.sign(x) * Math.abs(x) ** e));
}

/** sign(c_i) at i = the first index of the largest |c|, 0 elsewhere; a NaN counts as the largest. */
function oneHot(c) {
  const largest = Math.max(...c.map(Math.abs));
  const first = c.findIndex((x) => Object.is(Math.abs(x), largest));
  return c.map((x, i) => (i === first ? Math.sign(x) : 0));
}

/** c/n, and 0 where n is 0, as D(0) = 0 asks. */
function divide(c, n) {
  return c.map((x) => x / Math.max(n, TINY));
}

function multiply(c, factor) {
  return c.map((x) => x * factor);
}
