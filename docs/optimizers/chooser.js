// A filter above the table of optimizers. The choices are what stands in the table's cells; without JavaScript the
// table is whole.

const FILTERED = ["layers", "cost of a step", "state"];

const box = document.getElementById("chooser");
const rows = [...box.querySelectorAll("tbody tr")];
const columns = [...box.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
const said = Object.assign(document.createElement("p"), { id: "chooser-count" });
said.setAttribute("aria-live", "polite");

const choices = FILTERED.map((name) => {
  const column = columns.indexOf(name);
  const texts = [...new Set(rows.map((row) => row.cells[column].textContent.trim()))];
  const select = Object.assign(document.createElement("select"), { name });
  select.append(new Option(`${name}: all`, ""), ...texts.map((text) => new Option(text, text)));
  return { column, select };
});

const words = Object.assign(document.createElement("input"), { type: "search", placeholder: "search", name: "words" });
words.setAttribute("aria-label", "Search the table");

function filter() {
  for (const row of rows) {
    const kept = choices.every(({ column, select }) => !select.value || row.cells[column].textContent.trim() === select.value);
    row.hidden = !kept || !row.textContent.toLowerCase().includes(words.value.trim().toLowerCase());
  }
  said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} optimizers`;
}

const form = Object.assign(document.createElement("form"), { className: "chooser", autocomplete: "off" });
for (const { select } of choices) {
  select.setAttribute("aria-label", select.name);
  form.append(select);
}
form.append(words);
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
box.prepend(form, said);
filter();
