"use strict";
// Every text of a record reaches the page as text: by textContent, or escaped where Plotly reads tags.
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const traces = new Map();

function traceOf(run, rank) {
  const id = `trace-${run}-${rank}`;
  if (!traces.has(id)) {
    const held = element(id);
    traces.set(id, held ? JSON.parse(held.textContent) : null);
  }
  return traces.get(id);
}

// ---- words and figures

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
function size(bytes) {
  if (bytes === null || bytes === undefined) return "-";
  let value = bytes, unit = 0;
  while (Math.abs(value) >= 1024 && unit < UNITS.length - 1) { value /= 1024; unit += 1; }
  return unit ? `${value.toFixed(1)} ${UNITS[unit]}` : `${value} B`;
}
const exact = (bytes) => `${bytes.toLocaleString("en")} B`;
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function ticks(most) {
  let step = 1;
  while (most / step > 6) step *= 2;
  const values = Array.from({ length: Math.floor(most / step) + 1 }, (_, index) => index * step);
  return { tickvals: values, ticktext: values.map(size) };
}

// ---- looks: colours that differ in lightness too, each with a pattern of its own

const LOOKS = data.looks;
const NAMES = Object.keys(LOOKS).filter((name) => name);
const namesIn = (all) => [...new Set([...NAMES, ...all.flatMap(Object.keys)])].filter((name) => all.some((held) => held[name]));
const look = (name) => LOOKS[name] || LOOKS[""];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const narrow = () => innerWidth <= 640;

function layout(more) {
  const line = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
  const { xaxis, yaxis, top, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--text"), size: 12 }, margin: { l: narrow() ? 62 : 80, r: narrow() ? 5 : 20, t: top || 20, b: 45 },
    legend: { orientation: "h", y: -0.2 },
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--text") }, align: "left" },
    xaxis: { ...line, ...xaxis }, yaxis: { ...line, ...yaxis }, ...rest,
  };
}
const draw = (id, drawn, more) => Plotly.react(id, drawn, layout(more), { responsive: true, displaylogo: false, displayModeBar: id === "timeline", modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] });

function stacked(name, x, across) {
  const [fill, shape] = look(name);
  return {
    type: "bar", name, x, y: across, marker: { color: fill, line: { color: colour("--back"), width: 0.5 }, pattern: { shape, fgcolor: colour("--back"), bgcolor: fill, size: 7, solidity: 0.25 } },
    text: across.map(size), textposition: "none", hovertemplate: `%{x}<br>${escaped(name)}: %{text}<extra></extra>`,
  };
}

// ---- what is chosen

const chosen = { run: 0, rank: 0, point: 0 };
const run = () => data.runs[chosen.run];

function fillRanks() {
  element("rank").replaceChildren(...run().ranks.map((rank) => {
    const option = document.createElement("option");
    option.value = rank.rank;
    option.textContent = `${rank.called} · ${size(rank.peak)}`;
    return option;
  }));
}

function chooseRun(number) {
  chosen.run = number;
  for (const section of document.querySelectorAll("section[data-run]")) section.hidden = Number(section.dataset.run) !== number;
  fillRanks();
  markRun();
  chooseRank(run().worst);
  drawRanks();
  fillModules();
  drawRoofline();
}

function chooseRank(rank) {
  chosen.rank = rank;
  element("rank").value = rank;
  const trace = traceOf(chosen.run, rank);
  chosen.point = trace ? trace.peak : 0;
  drawTimeline();
}

// ---- the timeline

const along = () => document.querySelector("input[name=axis]:checked").value;

function pointTold(trace, point) {
  const total = Object.values(trace.categories).reduce((sum, held) => sum + held[point], 0);
  const lines = [`${size(total)} alive: ${trace.names[trace.places[point]]}`];
  const parts = Object.entries(trace.categories).filter(([, held]) => held[point]).sort((a, b) => b[1][point] - a[1][point]);
  lines.push(parts.map(([name, held]) => `${name} ${size(held[point])}`).join(", "));
  if (trace.saved && trace.saved[point]) lines.push(`${size(trace.saved[point])} of activations are saved for backward`);
  const holders = trace.holders[point];
  for (let index = 0; index < holders.length; index += 2) lines.push(`  ${trace.names[holders[index]]}  ${size(holders[index + 1])}`);
  return lines;
}

function phaseBars(trace, x) {
  const position = new Map(trace.at.map((at, index) => [at, index]));
  const starts = trace.phases.map(([at]) => x[position.get(at)]);
  const widths = starts.map((start, index) => (index + 1 < starts.length ? starts[index + 1] : x[x.length - 1]) - start);
  const shown = trace.phases.map((phase, index) => [phase, starts[index], widths[index]]).filter(([phase, , width]) => phase[2] !== "idle" && width > 0);
  return {
    type: "bar", orientation: "h", xaxis: "x2", yaxis: "y2", base: shown.map((each) => each[1]), x: shown.map((each) => each[2]), y: shown.map(() => 0), width: 1,
    text: shown.map(([phase]) => `${escaped(phase[2])} ${phase[1]}.${phase[3]}`), textposition: "inside", insidetextanchor: "middle", textangle: 0, constraintext: "inside",
    customdata: shown.map(([phase]) => `step ${phase[1]}, ${escaped(phase[2])}, micro-batch ${phase[3]}`), hovertemplate: "%{customdata}<extra></extra>",
    marker: { color: colour("--panel"), line: { color: colour("--dim"), width: 1 } }, showlegend: false,
  };
}

function marks(trace, x) {
  const vertical = (at, dash) => ({ type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1, line: { color: colour("--text"), width: 1.5, dash } });
  return [vertical(x[trace.peak], "dot"), vertical(x[chosen.point], "solid")];
}

function drawTimeline() {
  const trace = traceOf(chosen.run, chosen.rank);
  const told = element("timeline-told");
  for (const id of ["axis", "drawn-timeline"]) element(id).hidden = !trace;
  if (!trace) {
    told.textContent = `Rank ${chosen.rank} left no trace: a run with ledger=exact and ledger.trace=true does.`;
    Plotly.purge("timeline");
    element("cursor").textContent = "";
    return;
  }
  const time = document.querySelector("input[value=milliseconds]");
  time.disabled = !trace.milliseconds;
  const x = trace[along()] || trace.at;
  const areas = namesIn([trace.categories]).map((name) => ({
    type: "scatter", mode: "lines", name, x, y: trace.categories[name], stackgroup: "alive", line: { shape: "hv", width: 0.5, color: look(name)[0] },
    fillcolor: look(name)[0], fillpattern: { shape: look(name)[1], fgcolor: colour("--back"), bgcolor: look(name)[0], size: 8, solidity: 0.2 }, hoverinfo: "skip",
  }));
  const totals = x.map((_, point) => Object.values(trace.categories).reduce((sum, held) => sum + held[point], 0));
  const whole = {
    type: "scatter", mode: "lines", name: "alive", x, y: totals, line: { shape: "hv", width: 1, color: colour("--text") }, showlegend: false,
    text: x.map((_, point) => pointTold(trace, point).map(escaped).join("<br>")), hovertemplate: "%{text}<extra></extra>",
  };
  const kept = trace.saved && { type: "scatter", mode: "lines", name: "saved for backward", x, y: trace.saved, line: { shape: "hv", width: 2, dash: "dash", color: colour("--text") }, hoverinfo: "skip" };
  const thinned = trace.at.length < trace.events ? `; ${trace.at.length.toLocaleString("en")} of them are drawn, the highest and the lowest of every stretch` : "";
  told.textContent = `Rank ${chosen.rank}: ${trace.events.toLocaleString("en")} events${thinned}. The dotted line is the peak, ${exact(totals[trace.peak])}.`;
  draw("timeline", [...areas, ...(kept ? [kept] : []), whole, phaseBars(trace, x)], {
    hovermode: "x", hoverdistance: 100, shapes: marks(trace, x), barmode: "overlay", top: 40,
    xaxis: { title: { text: narrow() ? "" : x === trace.at ? "event" : "milliseconds" } },
    yaxis: { domain: [0, 0.91], rangemode: "tozero", ...ticks(totals[trace.peak]) },
    xaxis2: { matches: "x", visible: false, anchor: "y2" },
    yaxis2: { domain: [0.93, 1], range: [-0.5, 0.5], visible: false, fixedrange: true },
    annotations: [{ x: x[trace.peak], y: totals[trace.peak], text: `peak ${size(totals[trace.peak])}`, showarrow: true, ax: 40, ay: -18, bgcolor: colour("--panel"), font: { color: colour("--text") } }],
  });
  element("timeline").removeAllListeners("plotly_hover");
  element("timeline").on("plotly_hover", (event) => {
    const point = event.points.find((each) => each.data.name === "alive");
    if (point) { chosen.point = point.pointIndex; element("cursor").textContent = pointTold(trace, chosen.point).join("\n"); }
  });
  element("cursor").textContent = pointTold(trace, chosen.point).join("\n");
}

function step(key) {
  const trace = traceOf(chosen.run, chosen.rank);
  if (!trace) return false;
  const last = trace.at.length - 1;
  const starts = trace.phases.filter((phase) => phase[2] !== "idle").map((phase) => trace.at.indexOf(phase[0]));
  const moved = {
    ArrowLeft: () => chosen.point - 1, ArrowRight: () => chosen.point + 1, Home: () => 0, End: () => last, p: () => trace.peak, P: () => trace.peak,
    PageUp: () => starts.filter((start) => start < chosen.point).pop() ?? 0, PageDown: () => starts.find((start) => start > chosen.point) ?? last,
  }[key];
  if (!moved) return false;
  chosen.point = Math.min(last, Math.max(0, moved()));
  Plotly.relayout("timeline", { shapes: marks(trace, trace[along()] || trace.at) });
  element("cursor").textContent = pointTold(trace, chosen.point).join("\n");
  return true;
}

// ---- bars

function drawRanks() {
  const ranks = run().ranks, labels = ranks.map((rank) => `${rank.rank}`);
  const held = namesIn(ranks.map((rank) => rank.categories));
  draw("ranks", held.map((name) => stacked(name, labels, ranks.map((rank) => rank.categories[name] || 0))), {
    barmode: "stack", bargap: 0.15, xaxis: { type: "category", title: { text: narrow() ? "" : "rank", standoff: 5 } }, yaxis: ticks(Math.max(1, ...ranks.map((rank) => rank.peak || 0))),
  });
  element("ranks").removeAllListeners("plotly_click");
  element("ranks").on("plotly_click", (event) => chooseRank(Number(event.points[0].x)));
  const reserved = ["reserved", "slack", "on host"].filter((name) => ranks.some((rank) => rank[name] !== null));
  const rows = ranks.map((rank) => [rank.called, rank.stage, size(rank.peak), ...held.map((name) => size(rank.categories[name])), size(rank.unattributed), ...reserved.map((name) => size(rank[name])), rank.where || "-", rank.module || "-"]);
  fillTable("ranks-table", ["rank", "stage", "peak", ...held, "unattributed", ...reserved, "where", "module"], rows);
}

// ---- tables

function fillTable(id, heads, rows) {
  const head = document.createElement("thead"), body = document.createElement("tbody");
  const line = (cells, kind) => {
    const row = document.createElement("tr");
    cells.forEach((text, column) => {
      const cell = document.createElement(kind === "head" || column === 0 ? "th" : "td");
      cell.textContent = text;
      row.append(cell);
    });
    return row;
  };
  head.append(line(heads, "head"));
  body.append(...rows.map((row) => line(row, "row")));
  element(id).replaceChildren(head, body);
}

function fillModules() {
  const together = new Map();
  for (const { module, ...held } of run().modules) {
    const name = element("fold").checked ? module.replace(/(^|[.[])\d+(?=[.\]]|$)/g, "$1*") : module;
    const sum = together.get(name) || {};
    for (const [category, bytes] of Object.entries(held)) sum[category] = (sum[category] || 0) + bytes;
    together.set(name, sum);
  }
  const total = (held) => Object.values(held).reduce((sum, bytes) => sum + bytes, 0);
  const wanted = element("find").value.toLowerCase();
  const rows = [...together].filter(([name]) => name.toLowerCase().includes(wanted)).sort((a, b) => total(b[1]) - total(a[1]));
  const held = namesIn(rows.map(([, each]) => each));
  const shown = rows.map(([name, each]) => [name, size(total(each)), ...held.map((category) => (each[category] ? size(each[category]) : ""))]);
  fillTable("modules", ["module", "total", ...held], shown.length ? shown : [[run().modules.length ? "none is called so" : "this rank left no trace"]]);
}

// ---- the roofline

function drawRoofline() {
  const roof = run().roofline;
  element("roofline").parentElement.hidden = !roof || !roof.flops || !roof.bandwidth;
  if (element("roofline").parentElement.hidden) return;
  const phases = roof.phases.filter((phase) => phase.intensity), balance = roof.flops / roof.bandwidth;
  const most = Math.max(balance, ...phases.map((phase) => phase.intensity)) * 8, least = Math.min(balance, ...phases.map((phase) => phase.intensity)) / 8;
  const points = (name, symbol, rate) => {
    const shown = phases.filter((phase) => rate(phase));
    return { type: "scatter", mode: "markers+text", name, x: shown.map((phase) => phase.intensity), y: shown.map(rate), text: shown.map((phase) => escaped(phase.phase)), textposition: "top center", marker: { symbol, size: 11, color: colour("--accent"), line: { color: colour("--text"), width: 1 } }, hovertemplate: "%{text}<br>%{x:.2f} FLOP/B, %{y:.3s}FLOP/s<extra></extra>" };
  };
  draw("roofline", [
    { type: "scatter", mode: "lines", name: "the machine's ceilings", x: [least, balance, most], y: [least * roof.bandwidth, roof.flops, roof.flops], line: { color: colour("--text"), width: 2 }, hoverinfo: "skip" },
    points("at best", "circle-open", (phase) => Math.min(roof.flops, phase.intensity * roof.bandwidth)),
    points("as it ran", "diamond", (phase) => (phase.seconds ? phase.flops / phase.seconds : 0)),
  ], { xaxis: { type: "log", title: { text: "FLOP for each byte moved" } }, yaxis: { type: "log", title: { text: "FLOP/s" }, exponentformat: "SI" } });
}

// ---- begin

function drawAll() { chooseRun(chosen.run); }
element("run").addEventListener("change", (event) => chooseRun(Number(event.target.value)));
element("rank").addEventListener("change", (event) => chooseRank(Number(event.target.value)));
element("axis").addEventListener("change", drawTimeline);
element("fold").addEventListener("change", fillModules);
element("find").addEventListener("input", fillModules);
element("timeline").addEventListener("keydown", (event) => { if (!event.ctrlKey && !event.metaKey && step(event.key)) event.preventDefault(); });
element("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  drawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
document.documentElement.dataset.ready = "true";
