"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const scheme = window.matchMedia("(prefers-color-scheme: dark)");
/* What is drawn on: a dark screen, and paper, which is as wide as the style says while it is printed. */
const ground = { dark: scheme.matches, paper: false };
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

/* 1, 2 and 5 times powers of ten; with a wide range, the powers alone. */
function logTicks(low, high) {
  const few = high - low > 2.2, ticks = [];
  for (let v = Math.floor(low); v <= Math.ceil(high); v += 1) {
    for (const digit of few ? [1] : [1, 2, 5]) ticks.push(v + Math.log10(digit));
  }
  const steps = ticks.filter((v) => v >= low - 0.05 && v <= high + 0.05);
  return { tickvals: steps, ticktext: steps.map((v) => (v > -4 && v < 5 ? String(Number((10 ** v).toPrecision(1))) : superscript(Math.round(v)))) };
}

function softInk() {
  return ground.dark ? "#a3acb9" : "#5b6470";
}

/* On a dark ground the palette is lifted towards white. */
function shade(colour) {
  if (!ground.dark) return colour;
  const n = parseInt(colour.slice(1), 16), lift = (v) => Math.round(v + 0.28 * (255 - v));
  return "#" + [n >> 16, (n >> 8) & 255, n & 255].map((v) => lift(v).toString(16).padStart(2, "0")).join("");
}

function draw(id, traces, made) {
  const box = document.getElementById(id);
  const size = ground.paper ? { width: box.clientWidth, height: box.clientHeight } : { autosize: true };
  Plotly.react(box, traces, { ...made, ...size }, config);
}

function layout(xTitle, yTitle, more) {
  const ink = ground.dark ? "#e8eaee" : "#1c1f24", rule = ground.dark ? "#333a45" : "#e3e6eb";
  const axis = { gridcolor: rule, zeroline: false, linecolor: rule, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 13, family: getComputedStyle(document.body).fontFamily },
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
  drawDecay("reach-" + name, task.runs.map((run) => ({ ...run, colour: shade(run.colour), moment: run.moments[Math.min(at, run.moments.length - 1)] })));
}

function drawCures(name) {
  const run = data.tasks[name].runs[chosen("cure", name)];
  const plain = { title: run.title, moment: run.moments[0], colour: softInk(), dash: "solid" };
  const cures = run.cures.map((cure, i) => ({ ...cure, ...data.palette[i + 1], colour: shade(data.palette[i + 1].colour) }));
  drawDecay("cures-" + name, [plain, ...cures]);
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
  draw(id, traces, layout("lag ℓ: steps before the error", "left of the error", decadeTicks(all)));
}

function drawLearning(name) {
  const task = data.tasks[name];
  const traces = task.runs.map((run) => ({
    x: run.update, y: task.logError ? run.error.map(Math.log10) : run.error, mode: "lines+markers", name: escapeText(run.title),
    line: { color: shade(run.colour), dash: run.dash, width: 2.2 }, marker: { size: 5 }, customdata: run.error.map((v) => Number(v.toPrecision(4))),
    hovertemplate: `update %{x}<br>${escapeText(task.metric)} %{customdata}<extra>${escapeText(run.title)}</extra>`,
  }));
  const levels = [[task.chance, "chance", "solid"], [task.solvedBelow, "solved below", "dot"]], place = task.logError ? Math.log10 : Number;
  const all = [...task.runs.flatMap((run) => run.error), ...levels.map(([y]) => y)].map(place);
  const axis = task.logError ? logTicks(Math.min(...all), Math.max(...all)) : { rangemode: "tozero" };
  const made = layout("optimizer updates", "validation " + escapeText(task.metric), axis);
  made.shapes = levels.map(([y, , dash]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: place(y), y1: place(y), line: { color: softInk(), width: 1.2, dash } }));
  made.annotations = levels.map(([y, text]) => ({
    text: `${text} ${Number(y.toPrecision(3))}`, xref: "paper", x: 0, xanchor: "left", y: place(y), yanchor: "bottom", showarrow: false, font: { size: 12, color: softInk() },
  }));
  draw("learning-" + name, traces, made);
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

function drawBreakdown(name) {
  const task = data.tasks[name], run = task.runs[chosen("model", name)], a = run.breakdown[chosen("when", name)];
  const grey = softInk();
  const shares = Object.entries(a.share).map(([path, y], i) => ({
    x: a.steps, y, mode: "lines", name: escapeText(path), line: { color: shade(data.palette[i].colour), dash: data.palette[i].dash, width: 2.2 },
    hovertemplate: `step %{x}<br>%{y:.3f} of the error<extra>${escapeText(path)}</extra>`,
  }));
  draw("share-" + name, shares, layout("step t", "share of the error", { zeroline: true, zerolinecolor: grey }));

  const tau = (a.tau || []).filter((v) => v !== null).map(Math.log10);
  const empty = { text: "a plain RNN carries nothing: no gate, no time constant", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { color: grey } };
  const memory = layout("time constant τ (steps)", "units", { rangemode: "tozero" });
  Object.assign(memory.xaxis, logTicks(Math.min(...tau, 0), Math.max(...tau, 1)), { visible: tau.length > 0 });
  memory.yaxis.visible = tau.length > 0;
  const bins = histogram(tau, 20);
  draw("memory-" + name, [{
    ...bins, type: "bar", marker: { color: shade(run.colour) }, hovertemplate: "τ %{customdata} steps<br>%{y} units<extra></extra>",
  }], { ...memory, bargap: 0.06, annotations: tau.length ? [] : [empty] });

  const curves = [["‖g_t‖, one step", a.subgradient, "solid"], ["‖Σ g_s‖, s ≥ t", a.partialSums, "dash"]].map(([label, y, dash], i) => ({
    x: a.steps, y, mode: "lines", name: label, line: { color: shade(data.palette[i].colour), dash, width: 2.2 }, customdata: y.map(factor),
    hovertemplate: `step %{x}<br>%{customdata}<extra>${label}</extra>`,
  }));
  draw("subgradient-" + name, curves, layout("step t", "norm", decadeTicks([a.subgradient, a.partialSums])));

  const inside = a.map.flat().filter((v) => v !== null), ends = [Math.min(...inside), Math.max(...inside)];
  let bar = decadeTicks(a.map);
  if (bar.tickvals.filter((v) => v >= ends[0] && v <= ends[1]).length < 2) bar = { tickvals: ends, ticktext: ends.map(factor) };
  draw("map-" + name, [{
    x: a.steps, y: a.sources, z: a.map, type: "heatmap", colorscale: "Cividis", customdata: a.map.map((row) => row.map((v) => (v === null ? "" : factor(v)))),
    hovertemplate: "source k %{y}, step t %{x}<br>%{customdata}<extra></extra>", hoverongaps: false,
    colorbar: { tickvals: bar.tickvals, ticktext: bar.ticktext, thickness: 12, outlinewidth: 0 },
  }], layout("step t", "error source k", {}));
}

function drawAll() {
  for (const name of Object.keys(data.tasks)) {
    drawReach(name);
    drawLearning(name);
    drawBreakdown(name);
    if (document.getElementById("cures-" + name)) drawCures(name);
  }
}

for (const input of document.querySelectorAll("fieldset input")) {
  const { task, breakdown, cure } = input.dataset;
  input.addEventListener("change", () => (task ? drawReach(task) : breakdown ? drawBreakdown(breakdown) : drawCures(cure)));
}
function redraw(paper) {
  ground.paper = paper;
  ground.dark = !paper && scheme.matches; /* paper is white whatever the screen is */
  document.body.classList.toggle("paper", paper);
  drawAll();
}

scheme.addEventListener("change", () => redraw(false));
window.addEventListener("beforeprint", () => redraw(true));
window.addEventListener("afterprint", () => redraw(false));
drawAll();
