// ---- many runs: sorted by a column, filtered by words

function cellValue(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.bytes === undefined ? cell.textContent.trim() : cell.dataset.bytes;
  return text === "" ? null : text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
}

function compared(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === typeof b) return a.localeCompare(b, "en", { numeric: true });
  return typeof a === "number" ? -1 : 1;
}

function sortBy(head) {
  const table = head.closest("table"), column = head.cellIndex, body = table.tBodies[0];
  const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending", sign = order === "ascending" ? 1 : -1;
  for (const each of table.tHead.rows[0].cells) if (each.hasAttribute("aria-sort")) each.setAttribute("aria-sort", each === head ? order : "none");
  const rows = [...body.rows].map((row) => [cellValue(row, column), row]);
  const known = rows.filter(([value]) => value !== null).sort(([a], [b]) => sign * compared(a, b));
  body.append(...[...known, ...rows.filter(([value]) => value === null)].map(([, row]) => row)); // what was not measured is last
}

// `micro_batch=1` is not `micro_batch=16`, and is `train.micro_batch=1` as it was typed.
function hasWord(text, word) {
  const wanted = word.replace(/^(train|generation|model\.config)\.(?=.*=)/, "");
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
    if (!/=./.test(wanted) || !/[\w.]/.test(text.charAt(at + wanted.length))) return true;
  }
  return false;
}

function filterRuns() {
  const words = element("filter").value.toLowerCase().split(/\s+/), rows = [...element("runs-table").tBodies[0].rows];
  for (const row of rows) {
    const text = `${row.textContent} ${row.querySelector(".choose").title}`.toLowerCase();
    row.hidden = !words.every((word) => hasWord(text, word));
  }
  element("filtered").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}

function markRun() {
  for (const button of document.querySelectorAll(".choose")) button.closest("tr").toggleAttribute("aria-current", Number(button.dataset.choose) === chosen.run);
}

if (element("runs-table")) {
  for (const button of document.querySelectorAll(".sortable thead button")) button.addEventListener("click", () => sortBy(button.closest("th")));
  for (const button of document.querySelectorAll(".choose")) {
    button.addEventListener("click", () => { element("run").value = button.dataset.choose; chooseRun(Number(button.dataset.choose)); document.querySelector("section.about:not([hidden])").scrollIntoView(); });
  }
  element("filter").addEventListener("input", filterRuns);
}
