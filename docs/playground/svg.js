/** Two helpers for drawing: the pictures are SVG, so that the style sheet colours them in either scheme. */

/** A new SVG element with these attributes, appended to its parent. */
export function add(parent, tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

/** Points [x, y] as path data; what is far outside the picture is held at a distance that a renderer can draw. */
export function pathData(points, closed = false) {
  const near = (x) => Math.min(Math.max(x, -1e5), 1e5).toFixed(2);
  return points.map(([x, y], i) => `${i ? "L" : "M"}${near(x)} ${near(y)}`).join("") + (closed ? "Z" : "");
}
