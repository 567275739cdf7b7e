"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
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
  const task = data[name], at = Number(document.querySelector(`input[name="moment-${name}"]:checked`).value);
  const traces = [], all = [];
  for (const run of task.runs) {
    const m = run.moments[Math.min(at, run.moments.length - 1)];
    all.push(m.low, m.high, m.middle);
    traces.push({
      x: [...m.lag, ...[...m.lag].reverse()], y: [...m.high, ...[...m.low].reverse()], fill: "toself", mode: "none",
      fillcolor: translucent(run.colour, 0.16), hoverinfo: "skip", showlegend: false, legendgroup: run.title,
    });
    traces.push({
      x: m.lag, y: m.middle, mode: "lines", name: escapeText(run.title), legendgroup: run.title,
      line: { color: run.colour, dash: run.dash, width: 2.4 }, customdata: m.middle.map(factor),
      hovertemplate: "lag %{x} steps<br>%{customdata} of the error at lag 0<extra>" + escapeText(run.title) + "</extra>",
    });
  }
  Plotly.react("reach-" + name, traces, layout("lag ℓ: steps before the error", "left of the error", decadeTicks(all)), config);
}

function drawLearning(name) {
  const task = data[name];
  const traces = task.runs.map((run) => ({
    x: run.update, y: run.error, mode: "lines+markers", name: escapeText(run.title),
    line: { color: run.colour, dash: run.dash, width: 2.2 }, marker: { size: 5 },
    hovertemplate: `update %{x}<br>${task.metric} %{y:.4g}<extra>${escapeText(run.title)}</extra>`,
  }));
  const end = Math.max(...task.runs.flatMap((run) => run.update));
  for (const [y, text, dash] of [[task.chance, "chance", "solid"], [task.solvedBelow, "solved below", "dot"]]) {
    traces.push({
      x: [0, end], y: [y, y], mode: "lines", name: `${text} (${Number(y.toPrecision(3))})`, hoverinfo: "skip",
      line: { color: dark.matches ? "#a3acb9" : "#5b6470", width: 1.2, dash },
    });
  }
  Plotly.react("learning-" + name, traces, layout("optimizer updates", "validation " + task.metric, { type: "log" }), config);
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
  for (const name of Object.keys(data)) {
    drawReach(name);
    drawLearning(name);
  }
}

for (const input of document.querySelectorAll("fieldset input")) input.addEventListener("change", () => drawReach(input.dataset.task));
dark.addEventListener("change", drawAll);
drawAll();
