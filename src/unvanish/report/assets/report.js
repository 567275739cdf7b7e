"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const scheme = window.matchMedia("(prefers-color-scheme: dark)");
const dark = { matches: scheme.matches };
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

function superscript(n) {
  const digits = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return "10" + String(n).split("").map((c) => digits[c]).join("");
}

function factor(exponent) {
  if (exponent === null) return "exactly 0";
  if (Math.abs(exponent) < 3) return Number((10 ** exponent).toPrecision(3)).toString();
  const whole = Math.floor(exponent);
  return (10 ** (exponent - whole)).toFixed(1) + "·" + superscript(whole);
}

/* A log axis of our own: the values reach far below what a double can hold, so they stay exponents. */
function decadeTicks(values) {
  const finite = values.flat().filter((v) => v !== null);
  const low = Math.floor(Math.min(0, ...finite)), high = Math.ceil(Math.max(0, ...finite));
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((s) => (high - low) / s <= 8) || 1000;
  const ticks = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) ticks.push(v);
  return { tickvals: ticks, ticktext: ticks.map((v) => (v === 0 ? "1" : superscript(v))), range: [low - 0.04 * (high - low) - 0.1, high + 0.04 * (high - low) + 0.1] };
}

function layout(xTitle, yTitle, more) {
  const ink = dark.matches ? "#e8eaee" : "#1c1f24", rule = dark.matches ? "#333a45" : "#e3e6eb";
  const axis = { gridcolor: rule, zeroline: false, linecolor: rule, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 13 },
    margin: { l: 60, r: 10, t: 10, b: 45 }, hovermode: "closest",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...axis, title: { text: xTitle } },
    yaxis: { ...axis, title: { text: yTitle }, ...more },
  };
}

function translucent(colour, alpha) {
  const n = parseInt(colour.slice(1), 16);
  return `rgba(${n >> 16},${(n >> 8) & 255},${n & 255},${alpha})`;
}

function escapeText(text) {
  return text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
}

function drawReach(name) {
  const task = data.tasks[name], at = Number(document.querySelector(`input[name="moment-${name}"]:checked`).value);
  drawDecay("reach-" + name, task.runs.map((run) => ({ ...run, moment: run.moments[Math.min(at, run.moments.length - 1)] })));
}

function drawCures(name) {
  const run = data.tasks[name].runs[chosen("cure", name)];
  const plain = { title: run.title, moment: run.moments[0], colour: dark.matches ? "#a3acb9" : "#5b6470", dash: "solid" };
  drawDecay("cures-" + name, [plain, ...run.cures.map((cure, i) => ({ ...cure, ...data.palette[i + 1] }))]);
}

function drawDecay(id, curves) {
  const traces = [], all = [];
  for (const { title, colour, dash, moment: m } of curves) {
    all.push(m.low, m.high, m.middle);
    traces.push({
      x: [...m.lag, ...[...m.lag].reverse()], y: [...m.high, ...[...m.low].reverse()], fill: "toself", mode: "none",
      fillcolor: translucent(colour, 0.16), hoverinfo: "skip", showlegend: false, legendgroup: title,
    });
    traces.push({
      x: m.lag, y: m.middle, mode: "lines", name: escapeText(title), legendgroup: title,
      line: { color: colour, dash, width: 2.4 }, customdata: m.middle.map(factor),
      hovertemplate: "lag %{x} steps<br>%{customdata} of the error at lag 0<extra>" + escapeText(title) + "</extra>",
    });
  }
  Plotly.react(id, traces, layout("lag ℓ: steps before the error", "left of the error", decadeTicks(all)), config);
}

function drawLearning(name) {
  const task = data.tasks[name];
  const traces = task.runs.map((run) => ({
    x: run.update, y: run.error, mode: "lines+markers", name: escapeText(run.title),
    line: { color: run.colour, dash: run.dash, width: 2.2 }, marker: { size: 5 },
    hovertemplate: `update %{x}<br>${escapeText(task.metric)} %{y:.4g}<extra>${escapeText(run.title)}</extra>`,
  }));
  const end = Math.max(...task.runs.flatMap((run) => run.update));
  for (const [y, text, dash] of [[task.chance, "chance", "solid"], [task.solvedBelow, "solved below", "dot"]]) {
    traces.push({
      x: [0, end], y: [y, y], mode: "lines", name: `${text} (${Number(y.toPrecision(3))})`, hoverinfo: "skip",
      line: { color: dark.matches ? "#a3acb9" : "#5b6470", width: 1.2, dash },
    });
  }
  Plotly.react("learning-" + name, traces, layout("optimizer updates", "validation " + escapeText(task.metric), { type: "log" }), config);
}

function chosen(group, name) {
  return Number(document.querySelector(`input[name="${group}-${name}"]:checked`).value);
}

/* Bins of equal width in the logarithm of τ; each says its ends in steps. */
function histogram(powers, bins) {
  if (!powers.length) return { x: [], y: [] };
  const low = Math.min(...powers), width = (Math.max(...powers) - low) / bins || 0.1;
  const y = Array(bins).fill(0);
  for (const v of powers) y[Math.min(bins - 1, Math.floor((v - low) / width))] += 1;
  const steps = (i) => Number((10 ** (low + i * width)).toPrecision(3));
  return { x: y.map((_, i) => low + (i + 0.5) * width), y, width, customdata: y.map((_, i) => `${steps(i)} to ${steps(i + 1)}`) };
}

function drawAnatomy(name) {
  const task = data.tasks[name], run = task.runs[chosen("model", name)], a = run.anatomy[chosen("when", name)];
  const grey = dark.matches ? "#a3acb9" : "#5b6470";
  const shares = Object.entries(a.share).map(([path, y], i) => ({
    x: a.steps, y, mode: "lines", name: path, line: { color: data.palette[i].colour, dash: data.palette[i].dash, width: 2.2 },
    hovertemplate: `step %{x}<br>%{y:.3f} of the error<extra>${path}</extra>`,
  }));
  Plotly.react("share-" + name, shares, layout("step t", "share of the error", { zeroline: true, zerolinecolor: grey }), config);

  const tau = (a.tau || []).filter((v) => v !== null).map(Math.log10);
  const empty = { text: "a plain RNN carries nothing: no gate, no time constant", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { color: grey } };
  const memory = layout("time constant τ (steps)", "units", { rangemode: "tozero" });
  Object.assign(memory.xaxis, decadeTicks([tau.length ? tau : [0, 1]]), { range: undefined, visible: tau.length > 0 });
  memory.yaxis.visible = tau.length > 0;
  const bins = histogram(tau, 20);
  Plotly.react("memory-" + name, [{
    ...bins, type: "bar", marker: { color: run.colour }, hovertemplate: "τ %{customdata} steps<br>%{y} units<extra></extra>",
  }], { ...memory, bargap: 0.06, annotations: tau.length ? [] : [empty] }, config);

  const curves = [["‖g_t‖, one step", a.subgradient, "solid"], ["‖Σ g_s‖, s ≥ t", a.partial, "dash"]].map(([label, y, dash], i) => ({
    x: a.steps, y, mode: "lines", name: label, line: { color: data.palette[i].colour, dash, width: 2.2 }, customdata: y.map(factor),
    hovertemplate: `step %{x}<br>%{customdata}<extra>${label}</extra>`,
  }));
  Plotly.react("subgradient-" + name, curves, layout("step t", "norm", decadeTicks([a.subgradient, a.partial])), config);

  const inside = a.map.flat().filter((v) => v !== null), ends = [Math.min(...inside), Math.max(...inside)];
  let bar = decadeTicks(a.map);
  if (bar.tickvals.filter((v) => v >= ends[0] && v <= ends[1]).length < 2) bar = { tickvals: ends, ticktext: ends.map(factor) };
  Plotly.react("map-" + name, [{
    x: a.steps, y: a.sources, z: a.map, type: "heatmap", colorscale: "Cividis", customdata: a.map.map((row) => row.map((v) => (v === null ? "" : factor(v)))),
    hovertemplate: "source k %{y}, step t %{x}<br>%{customdata}<extra></extra>", hoverongaps: false,
    colorbar: { tickvals: bar.tickvals, ticktext: bar.ticktext, thickness: 12, outlinewidth: 0 },
  }], layout("step t", "error source k", {}), config);
}

function drawFlow() {
  const traces = data.traces.map((t) => ({
    x: t.x, y: t.y, mode: "lines", name: escapeText(t.name), line: { color: t.colour, dash: t.dash, width: 2.2 },
    customdata: t.y.map(factor), hovertemplate: "step %{x}<br>norm %{customdata}<extra>" + escapeText(t.name) + "</extra>",
  }));
  Plotly.react("flow", traces, layout("step t", "error gradient norm, median over samples", decadeTicks(data.traces.map((t) => t.y))), config);
}

function drawAll() {
  if (document.getElementById("flow")) return drawFlow();
  for (const name of Object.keys(data.tasks)) {
    drawReach(name);
    drawLearning(name);
    drawAnatomy(name);
    if (document.getElementById("cures-" + name)) drawCures(name);
  }
}

for (const input of document.querySelectorAll("fieldset input")) {
  const { task, anatomy, cure } = input.dataset;
  input.addEventListener("change", () => (task ? drawReach(task) : anatomy ? drawAnatomy(anatomy) : drawCures(cure)));
}
function redraw(matches) {
  dark.matches = matches;
  drawAll();
}

scheme.addEventListener("change", () => redraw(scheme.matches));
/* Paper is white whatever the screen is. */
window.addEventListener("beforeprint", () => redraw(false));
window.addEventListener("afterprint", () => redraw(scheme.matches));
drawAll();
