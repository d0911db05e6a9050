// ---- paper: light, everything open, charts as wide as the sheet

const PAPER = 700;
const paper = { theme: "", closed: [] };
addEventListener("beforeprint", () => {
  paper.theme = document.documentElement.dataset.theme;
  paper.closed = [...document.querySelectorAll("details:not([open])")];
  for (const each of paper.closed) each.open = true;
  document.documentElement.dataset.theme = "light";
  drawAll();
  for (const chart of document.querySelectorAll(".chart.js-plotly-plot")) Plotly.relayout(chart, { width: PAPER, autosize: false });
});
addEventListener("afterprint", () => {
  for (const each of paper.closed) each.open = false;
  if (paper.theme) document.documentElement.dataset.theme = paper.theme; else delete document.documentElement.dataset.theme;
  for (const chart of document.querySelectorAll(".chart.js-plotly-plot")) Plotly.relayout(chart, { width: null, autosize: true });
  drawAll();
});
