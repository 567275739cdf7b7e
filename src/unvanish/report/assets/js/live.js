/* Follows a training: asks for the state once a second, and draws what has changed. */
const token = new URLSearchParams(location.search).get("token");
let shown = "";

function drawStrips(record) {
  const names = Object.keys(record.layers), narrow = byId("strips").clientWidth < 620, height = 34;
  const said = names.map((name) => `${name}: ${record.layers[name].above} of ${record.layers[name].steps} steps above 1 % of the largest`).join("; ");
  const f = frame("strips", names.length * height + 30, { l: narrow ? 120 : 220, r: narrow ? 60 : 150, t: 12, b: 18 }, said);
  names.forEach((name, i) => {
    const layer = record.layers[name], row = f.g.append("g").attr("transform", `translate(0,${i * height})`), width = f.w / layer.strip.length;
    row.append("text").attr("class", "strong").attr("x", -10).attr("y", 18).attr("text-anchor", "end").text(name.length > (narrow ? 14 : 28) ? "…" + name.slice(narrow ? -13 : -27) : name);
    row.append("rect").attr("class", "cell-edge").attr("x", 0).attr("y", 3).attr("width", f.w).attr("height", 22).attr("rx", 2);
    layer.strip.forEach((v, j) => row.append("rect").attr("class", "cell").attr("x", j * width + 0.5).attr("y", 4).attr("width", Math.max(1, width - 1)).attr("height", 20).attr("rx", 2).attr("opacity", v === null ? 0 : 1 - clamp(v / -8, 0, 1)));
    row.append("text").attr("x", f.w + 8).attr("y", 18).text(narrow ? `${layer.above}/${layer.steps}` : `${layer.reverse ? "→" : "←"} ${layer.above} of ${layer.steps} above 1 %`);
  });
}

function drawSeries(id, label, series, fixed, last) {
  const all = series.flatMap((s) => s.points), f = frame(id, 240, { l: 52, r: byId(id).clientWidth < 620 ? 110 : 190, t: 30, b: 44 }, `${label}: ` + series.map((s) => `${s.name} ${Number(s.points.at(-1)[1].toPrecision(3))}`).join("; "));
  const room = byId(id).clientWidth < 620 ? 9 : 20, top = Math.max(fixed, ...all.map((p) => p[1])), low = Math.min(0, ...all.map((p) => p[1]));
  const x = d3.scaleLinear([0, last], [0, f.w]), y = d3.scaleLinear([low, 1.05 * top || 1], [f.h, 0]);
  yAxis(f, y, y.ticks(5), String, label);
  xAxis(f, x, "optimizer updates");
  series.forEach((s, i) => curve(f, s.points.map((p) => p[0]), s.points.map((p) => p[1]), x, y, `--c:var(--s${i % 8})`));
  series.forEach((s, i) => f.g.append("circle").attr("class", "bar").attr("style", `--c:var(--s${i % 8})`).attr("cx", x(s.points.at(-1)[0])).attr("cy", y(s.points.at(-1)[1])).attr("r", 3));
  labels(f, series.map((s, i) => ({ y: y(s.points.at(-1)[1]), style: `--c:var(--s${i % 8})`, text: `${s.name.length > room ? "…" + s.name.slice(1 - room) : s.name} ${Number(s.points.at(-1)[1].toPrecision(3))}` })), f.w + 6);
}

/* The layer whose gradient stays above 1 % of its largest over the fewest steps, in a sentence. */
function shortest(record) {
  const layers = Object.entries(record.layers).sort(([, a], [, b]) => a.above / a.steps - b.above / b.steps);
  return layers.length ? `Step ${record.step}: in ${layers[0][0]} ${layers[0][1].above} of ${layers[0][1].steps} steps are above 1 % of the largest gradient` : `Step ${record.step}`;
}

function drawState(now) {
  const latest = now.records.at(-1), series = (test) => Object.entries(now.figures).filter(([name]) => test(name));
  const reach = series((name) => name.endsWith("/reach")).map(([name, points]) => ({ name: name.replace(/^gradient_flow\//, "").replace(/\/reach$/, ""), points }));
  const memory = new Map();
  for (const record of now.records) for (const [name, layer] of Object.entries(record.layers)) if (layer.memory !== null) memory.set(name, [...(memory.get(name) ?? []), [record.step, layer.memory]]);
  const loss = series((name) => /loss|error/.test(name) && !name.startsWith("gradient_flow/")).map(([name, points]) => ({ name, points }));
  const said = reach.map((s) => `${s.name}: reach ${s.points.at(-1)[1]} steps`).concat(loss.map((s) => `${s.name} ${Number(s.points.at(-1)[1].toPrecision(4))}`));
  byId("headline").textContent = said.length ? said[0] : latest ? shortest(latest) : byId("headline").textContent;
  byId("layers").hidden = !latest;
  if (latest) drawStrips(latest);
  byId("history").hidden = !reach.length && !loss.length && !memory.size;
  const left = reach.length ? reach : [...memory].map(([name, points]) => ({ name, points }));
  const last = Math.max(1, ...[...left, ...loss].flatMap((s) => s.points.map((p) => p[0])));
  if (left.length) drawSeries("reach", reach.length ? "reach (steps)" : "half-life of the slowest tenth of units (steps)", left, 10, last);
  if (loss.length) drawSeries("loss", "loss and error", loss, 0, last);
  byId("warnings").replaceChildren(...now.warnings.map((text) => { const item = document.createElement("li"); item.textContent = text; return item; }));
  return said;
}

async function follow() {
  try {
    const answer = await fetch("/state?token=" + encodeURIComponent(token), { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const now = await answer.json(), idle = now.idle === null ? "" : now.idle < 60 ? "" : ` Nothing new for ${Math.round(now.idle / 60)} min: the training may have ended.`;
    const key = JSON.stringify([now.records.length, now.records.at(-1)?.step, now.figures, now.warnings, document.body.clientWidth]);
    const waiting = now.waiting ? ` ${now.waiting} file${now.waiting > 1 ? "s" : ""} not readable yet.` : "";
    const updates = Object.values(now.figures).map((points) => points.at(-1)[0]), count = now.records.length;
    const got = count || !updates.length ? `${count} record${count === 1 ? "" : "s"}${count ? `, latest of step ${now.records.at(-1).step}` : ""}` : `Latest figures of update ${Math.max(...updates)}`;
    byId("now").textContent = `${got}.${waiting}${idle}`;
    if (key !== shown) { shown = key; drawState(now); }
  } catch {
    byId("now").textContent = "unvanish live has ended; what it saw last stays here.";
  }
  setTimeout(follow, 1000);
}

document.documentElement.classList.add("scripted");
byId("layers").hidden = byId("history").hidden = true;
follow();
