// Formulas and diagrams, by KaTeX and Mermaid, each loaded on the pages that have some.

const vendor = new URL("../vendor/", import.meta.url);

function load(tag, attributes) {
  return new Promise((resolve, reject) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.onload = resolve;
    element.onerror = () => reject(new Error(`${attributes.src ?? attributes.href} could not be loaded`));
    document.head.append(element);
  });
}

async function formulas(places) {
  await Promise.all([
    load("link", { rel: "stylesheet", href: new URL("katex/katex.min.css", vendor).href }),
    load("script", { src: new URL("katex/katex.min.js", vendor).href }),
  ]);
  for (const place of places) {
    const text = place.textContent.trim();
    const display = text.startsWith("\\[");
    // A formula that KaTeX cannot read stands on the page in red, and fails the site's tests.
    window.katex.render(text.slice(2, -2), place, { displayMode: display, throwOnError: false, strict: "error" });
  }
}

async function diagrams(places) {
  const { default: mermaid } = await import(new URL("mermaid/mermaid.esm.min.mjs", vendor).href);
  const sources = places.map((place) => place.textContent);
  const draw = async () => {
    const dark = document.body.dataset.mdColorScheme === "slate";
    const font = getComputedStyle(document.body).fontFamily;
    mermaid.initialize({ startOnLoad: false, securityLevel: "strict", theme: dark ? "dark" : "neutral", fontFamily: font });
    for (const [i, place] of places.entries()) {
      const { svg } = await mermaid.render(`diagram-${i}`, sources[i]);
      place.innerHTML = svg;
      place.classList.add("diagram-drawn");
    }
  };
  await document.fonts.ready; // Mermaid measures the words
  await draw();
  new MutationObserver(() => draw()).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
}

const places = (selector) => [...document.querySelectorAll(selector)];
const work = [];
if (places(".arithmatex").length) work.push(formulas(places(".arithmatex")));
if (places(".diagram").length) work.push(diagrams(places(".diagram")));
await Promise.all(work);
document.documentElement.dataset.formulas = "done";
