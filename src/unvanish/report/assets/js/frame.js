/* What the pictures share: numbers in words, an SVG with axes, labels at the ends of lines. */
const data = JSON.parse(document.getElementById("data").textContent);
const LOWEST = -60, HIGHEST = 2, REACHED = -2, FLOAT32 = Math.log10(1.17549435e-38);
const byId = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const state = { task: 0, run: 0, term: "B", when: 0 };
const theTask = () => data.tasks[state.task], theRun = () => theTask().runs[state.run];
const colour = (run) => `--c:var(--s${run.series})`;

function raised(n) {
  const digits = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return String(n).split("").map((c) => digits[c]).join("");
}

/* A power of ten as a number: the values reach far below what a double can hold, so they stay exponents. */
function factor(exponent) {
  if (exponent === null || exponent === undefined) return "exactly 0";
  if (exponent > -2 && exponent < 3) return String(Number((10 ** exponent).toPrecision(2)));
  return "10" + raised(Math.round(exponent));
}

const tens = (v) => (v === 0 ? "1" : v === -2 ? "1 %" : "10" + raised(v));
const clamp = (v, low, high) => Math.max(low, Math.min(high, v));

/* The value of a curve of powers of ten at x: a straight line between its points. */
function at(xs, ys, x) {
  const right = clamp(xs.findIndex((v) => v >= x), 0, xs.length - 1), left = Math.max(0, right - 1);
  if (ys[left] === null || ys[right] === null || xs[left] === xs[right]) return ys[right];
  const share = clamp((x - xs[left]) / (xs[right] - xs[left]), 0, 1);
  return ys[left] + share * (ys[right] - ys[left]);
}

/* An empty SVG in a box, as wide as the box, with the origin inside the margins. */
function frame(id, height, margin, alt) {
  const box = d3.select("#" + id), width = Math.max(240, Math.floor(byId(id).clientWidth));
  box.selectAll("svg").remove();
  const svg = box.append("svg").attr("width", width).attr("height", height).attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img").attr("aria-label", alt);
  const g = svg.append("g").attr("transform", `translate(${margin.l},${margin.t})`);
  return { svg, g, w: width - margin.l - margin.r, h: height - margin.t - margin.b };
}

function xAxis(f, x, label, format) {
  const axis = d3.axisBottom(x).ticks(Math.max(3, Math.floor(f.w / 90))).tickSizeOuter(0);
  f.g.append("g").attr("transform", `translate(0,${f.h})`).call(format ? axis.tickFormat(format) : axis);
  f.g.append("text").attr("class", "soft").attr("x", f.w / 2).attr("y", f.h + 36).attr("text-anchor", "middle").text(label);
}

function yAxis(f, y, values, format, label) {
  f.g.append("g").call(d3.axisLeft(y).tickValues(values).tickFormat(format).tickSize(-f.w)).call((g) => g.select(".domain").remove());
  f.g.append("text").attr("class", "soft").attr("x", -f.g.node().transform.baseVal[0].matrix.e + 4).attr("y", -13).text(label);
}

/* A horizontal line with its meaning. */
function bound(f, y, value, text, side = "start", below = false) {
  f.g.append("line").attr("class", "bound").attr("x2", f.w).attr("y1", y(value)).attr("y2", y(value));
  f.g.append("text").attr("class", "soft halo").attr("x", side === "start" ? 4 : f.w - 4).attr("y", y(value) + (below ? 14 : -5)).attr("text-anchor", side).text(text);
}

/* The names of two lines that end at the left: above the upper line and below the lower one. */
function leftEnds(f, found) {
  const [upper, lower] = [...found].sort((a, b) => a.y - b.y);
  labels(f, [{ ...upper, y: Math.max(8, upper.y - 11) }, { ...lower, y: lower.y + 11 }], 8, "start", 18);
}

/* Labels at the ends of lines, moved apart where they would overlap. */
function labels(f, found, x, anchor = "start", gap = 15) {
  const placed = found.map((v) => ({ ...v })).sort((a, b) => a.y - b.y);
  const high = f.h - 2;
  placed.forEach((v, i) => { v.place = i ? Math.max(v.y, placed[i - 1].place + gap) : Math.max(6, v.y); });
  for (let i = placed.length - 1, limit = high; i >= 0; i -= 1) { placed[i].place = Math.min(placed[i].place, limit); limit = placed[i].place - gap; }
  for (const v of placed) f.g.append("text").attr("class", "label halo " + (v.kind || "")).attr("style", v.style).attr("data-term", v.term || null).attr("x", x).attr("y", v.place + 4).attr("text-anchor", anchor).text(v.text);
}

function curve(f, xs, ys, x, y, style, kind = "", dash = "none") {
  const points = xs.map((v, i) => [v, ys[i]]);
  return f.g.append("path").attr("class", "curve " + kind).attr("style", style).attr("stroke-dasharray", dash)
    .attr("d", d3.line().defined((p) => p[1] !== null).x((p) => x(p[0])).y((p) => clamp(y(p[1]), -2, f.h + 2))(points));
}

/* The common picture of a gradient over the lag: 0 at the right, where the error is made. One fixed axis everywhere. */
function overLag(id, height, alt, right = 14) {
  const narrow = byId(id).clientWidth < 520;
  const f = frame(id, height, { l: 46, r: right, t: 30, b: 44 }, alt);
  const x = d3.scaleLinear([0, theTask().lag], [f.w, 0]), y = d3.scaleLinear([LOWEST, HIGHEST], [f.h, 0]);
  yAxis(f, y, narrow ? [-60, -40, -20, 0] : [-60, -50, -40, -30, -20, -10, 0], tens, "gradient remaining");
  xAxis(f, x, "lag ℓ: steps before the error", (v) => (v === 0 ? "0" : "−" + v));
  bound(f, y, REACHED, "1 %: reach", "start", true);
  bound(f, y, FLOAT32, "float32’s smallest number");
  return { ...f, x, y };
}

/* One player per slider: goes from where it stands to the end once; a second press stops it. */
function player(button, slider, seconds) {
  let timer = null;
  const stop = () => { if (timer) timer.stop(); timer = null; button.textContent = "Play"; };
  const play = () => {
    if (timer) return stop();
    const last = Number(slider.max), from = Number(slider.value) >= last ? Number(slider.min) : Number(slider.value);
    button.textContent = "Pause";
    timer = d3.timer((elapsed) => {
      slider.value = Math.min(last, from + ((last - Number(slider.min)) * elapsed) / (1000 * seconds));
      slider.dispatchEvent(new Event("input"));
      if (Number(slider.value) >= last) stop();
    });
  };
  button.addEventListener("click", play);
  for (const kind of ["pointerdown", "keydown"]) slider.addEventListener(kind, () => timer && stop());
  return { play, stop };
}

/* Dragging over a picture moves a slider. */
function scrub(f, slider, value) {
  const move = (event) => { slider.value = Math.round(value(clamp(event.x, 0, f.w))); slider.dispatchEvent(new Event("input")); };
  f.g.append("rect").attr("class", "grab").attr("width", f.w).attr("height", f.h).call(d3.drag().container(f.g.node()).on("start drag", move));
}
