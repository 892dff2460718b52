/** The walks: gradient → momentum → direction → write, the engine's order, for three optimizers. */

import { cosineP, ema, update } from "./maps.js";

export const OPTIMIZERS = ["sgd", "signsgd", "lpsgdm"];

// Beyond this the walk has left for good: the picture shows about ±2.
const FAR = 1e6;

/** What the norm makes of c at step s, and the p it used. */
export function directionOf(name, { p, scale, anneal }, steps) {
  if (name === "sgd") return (c) => ({ u: update(c, 2, "power"), p: 2 });
  if (name === "signsgd") return (c) => ({ u: update(c, Infinity, "unit"), p: Infinity });
  // p = ∞ cannot be annealed in p itself.
  const space = p === Infinity ? "exponent" : "p";
  return (c, s) => {
    const now = anneal ? cosineP(p, s, steps, space) : p;
    return { u: update(c, now, scale), p: now };
  };
}

/**
 * Walk on a surface: the points w₀ … w_S, the loss at each, and the p of each step.
 *
 * A walk that diverges ends there, with `diverged` the number of its last step; one whose rule is not defined
 * does not start, and `refused` says why.
 */
export function walk(surface, direction, lr, mu) {
  const points = [surface.start];
  const losses = [surface.value(surface.start)];
  const ps = [];
  let w = surface.start;
  let m = [0, 0];
  for (let s = 1; s <= surface.steps; s += 1) {
    m = ema(m, surface.gradient(w), mu);
    let step;
    try {
      step = direction(m, s);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      return { points, losses, ps, refused: error.message };
    }
    w = w.map((x, i) => x - lr * step.u[i]);
    if (!w.every((x) => Math.abs(x) < FAR)) return { points, losses, ps, diverged: s };
    points.push(w);
    losses.push(surface.value(w));
    ps.push(step.p);
  }
  return { points, losses, ps };
}
