/**
 * What the optimizers walk on. A surface has a value and a gradient at w = [x, y], its minimum, where the walk
 * starts, how many steps it takes, the part of the plane to show, and its contours: each the exact curve f = c.
 * along(w, d) has the coefficients of t, t², … in f(w − td) − f(w).
 */

const CIRCLE = Array.from({ length: 181 }, (_, i) => (i * Math.PI) / 90);

/** f = ½(a² + b²/κ), a and b the coordinates along axes turned by an angle in degrees: its curvatures are 1 and 1/κ. */
export function quadratic(condition, degrees) {
  const angle = (degrees * Math.PI) / 180;
  const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
  // b, the flat axis, lies along (cos, sin), so that at 0° the valley runs from left to right.
  const join = ([a, b]) => [cos * b - sin * a, sin * b + cos * a];
  const split = ([x, y]) => [cos * y - sin * x, cos * x + sin * y];
  return {
    value(w) {
      const [a, b] = split(w);
      return (a * a + (b * b) / condition) / 2;
    },
    gradient(w) {
      const [a, b] = split(w);
      return join([a, b / condition]);
    },
    along(w, d) {
      const [[a, b], [da, db]] = [split(w), split(d)];
      return [-(a * da + (b * db) / condition), (da * da + (db * db) / condition) / 2];
    },
    contour(level) {
      const r = Math.sqrt(2 * level);
      return CIRCLE.map((t) => join([r * Math.sin(t), r * Math.sqrt(condition) * Math.cos(t)]));
    },
    levels: Array.from({ length: 14 }, (_, i) => 2.5 * 2 ** -i),
    minimum: [0, 0],
    start: join([0.85, -1.15]), // turns with the valley, so that only the axes' angle changes
    steps: 200,
    view: { left: -2, right: 2, bottom: -1.5, top: 1.5 },
  };
}

/** Rosenbrock's valley f = (1 − x)² + 100(y − x²)², from his own starting point. */
export const rosenbrock = {
  value: ([x, y]) => (1 - x) ** 2 + 100 * (y - x * x) ** 2,
  gradient: ([x, y]) => [-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)],
  along([x, y], [dx, dy]) {
    const u = [y - x * x, 2 * x * dx - dy, -dx * dx]; // y − x², of w − td
    const first = 2 * (1 - x) * dx + 200 * u[0] * u[1];
    const second = dx * dx + 100 * (u[1] ** 2 + 2 * u[0] * u[2]);
    return [first, second, 200 * u[1] * u[2], 100 * u[2] ** 2];
  },
  contour(level) {
    const r = Math.sqrt(level);
    const at = (t) => {
      const x = 1 - r * Math.cos(t);
      return [x, x * x + (r * Math.sin(t)) / 10];
    };
    // Only as far as the picture goes, and there finely: along the upper side, and back along the lower one.
    const first = Math.acos(Math.min(1, (1 + 2) / r));
    const last = Math.acos(Math.max(-1, (1 - 2) / r));
    const upper = Array.from({ length: 121 }, (_, i) => first + ((last - first) * i) / 120);
    return [...upper.map(at), ...upper.reverse().map((t) => at(-t))];
  },
  levels: Array.from({ length: 13 }, (_, i) => 400 * 2.5 ** -i),
  minimum: [1, 1],
  start: [-1.2, 1],
  steps: 1000,
  view: { left: -1.8, right: 1.8, bottom: -0.6, top: 2.1 },
};
