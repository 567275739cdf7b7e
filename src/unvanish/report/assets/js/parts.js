/* Who learns; the product of factors; the forget bias. */
function drawLearning() {
  const task = theTask(), all = task.runs.flatMap((run) => run.curves.flatMap((c) => c.error)).concat(task.chance, task.solvedBelow);
  const narrow = byId("learning").clientWidth < 620, log = Math.min(...all) > 0 && Math.max(...all) > 10 * Math.min(...all);
  const f = frame("learning", 300, { l: 52, r: narrow ? 96 : 130, t: 30, b: 44 }, task.alt.learning);
  const x = d3.scaleLinear([0, task.steps], [0, f.w]), y = (log ? d3.scaleLog : d3.scaleLinear)([log ? Math.min(...all) : 0, 1.15 * Math.max(...all)], [f.h, 0]);
  yAxis(f, y, y.ticks(log ? 4 : 5).filter((v) => !log || Number.isInteger(Math.log10(v) + 1e-9) || Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-6), (v) => String(Number(v.toPrecision(2))), "validation " + task.metric);
  xAxis(f, x, "optimizer updates");
  bound(f, y, task.chance, "chance");
  bound(f, y, task.solvedBelow, "solved below");
  for (const run of task.runs) run.curves.forEach((c, i) => curve(f, c.update, c.error, x, y, colour(run), i ? "faint" : "", run.dash));
  f.g.selectAll("text.halo").raise();
  labels(f, task.runs.map((run) => ({ y: y(run.first.error.at(-1)), style: colour(run), text: run.title })), f.w + 6);
}

const product = { show: () => {} };
function drawProduct() {
  const task = theTask(), run = theRun(), slider = byId("product-lag");
  slider.max = task.lag;
  const f = frame("product-plot", 240, { l: 46, r: 14, t: 30, b: 44 }, `${run.title}. ${run.story.product}`);
  const x = d3.scaleLinear([0, task.lag], [f.w, 0]), y = d3.scaleLinear([-1, 0.3], [f.h, 0]);
  yAxis(f, y, [-1, Math.log10(0.2), Math.log10(0.5), 0, Math.log10(2)], (v) => String(Number((10 ** v).toPrecision(1))), "factor of one step");
  xAxis(f, x, "lag ℓ: steps before the error", (v) => (v ? "−" + v : "0"));
  const width = Math.max(1, (f.w / task.lag) * 0.8), zero = y(0);
  const bars = [];
  for (let lag = 1; lag <= task.lag; lag += 1) {
    const value = run.before[lag] === null || run.before[lag - 1] === null ? -1 : run.before[lag] - run.before[lag - 1], end = clamp(y(value), 0, f.h);
    bars.push(f.g.append("rect").attr("style", colour(run)).attr("x", x(lag) - width / 2 + f.w / task.lag / 2).attr("width", width).attr("y", Math.min(zero, end)).attr("height", Math.max(1, Math.abs(end - zero))));
  }
  f.g.append("line").attr("class", "bound").attr("x2", f.w).attr("y1", zero).attr("y2", zero);
  const head = f.g.append("line").attr("class", "playhead").attr("y2", f.h);
  product.show = () => {
    const lag = Number(slider.value), shown = [];
    bars.forEach((bar, i) => bar.attr("class", i < lag ? "bar" : "bar off"));
    head.attr("x1", x(lag)).attr("x2", x(lag));
    for (let i = 1; i <= lag; i += 1) if (i <= 3 || i === lag) shown.push(run.before[i] === null ? "0" : factor(run.before[i] - run.before[i - 1]));
    const chain = lag > 4 ? `${shown.slice(0, 3).join(" × ")} × … × ${shown[3]}` : shown.join(" × ");
    byId("product-out").textContent = `ℓ = ${lag}`;
    byId("product-live").textContent = `${run.title}, ${lag} ${lag === 1 ? "step" : "steps"} back: ${chain} = ${factor(run.before[lag])}`;
  };
  scrub(f, slider, (px) => Math.max(1, x.invert(px)));
  product.show();
}

const bias = { show: () => {} };
function drawBias() {
  const task = theTask(), slider = byId("bias-b");
  if (slider.max !== String(task.bias.length - 1)) {
    slider.max = task.bias.length - 1;
    slider.value = Math.max(0, task.bias.findIndex((v) => v.bias === 0));
  }
  const f = overLag("bias-plot", 300, "A fresh LSTM's gradient over the lag: " + task.bias.filter((_, i) => i % 4 === 0).map((v) => `forget bias ${v.bias}: reach ${v.reach}`).join("; "), 14);
  task.bias.forEach((v) => curve(f, v.lag, v.middle, f.x, f.y, "--c:var(--edge)", "faint"));
  f.g.selectAll("text.halo").raise();
  const mine = f.g.append("g");
  bias.show = () => {
    const found = task.bias[Number(slider.value)], open = 1 / (1 + Math.exp(-found.bias)), log = Math.log10(open);
    const closed = found.lag.map((lag) => lag * log), end = closed.at(-1), g = { g: mine, h: f.h };
    mine.selectAll("*").remove();
    curve(g, found.lag, closed, f.x, f.y, "--c:var(--s0)", "", "7 4");
    curve(g, found.lag, found.middle, f.x, f.y, "--c:var(--s2)");
    leftEnds(g, [{ y: clamp(f.y(end), 0, f.h), style: "--c:var(--s0)", text: `closed form  ${factor(end)}` }, { y: clamp(f.y(found.middle.at(-1) ?? LOWEST), 0, f.h), style: "--c:var(--s2)", text: `measured  ${factor(found.middle.at(-1))}` }]);
    byId("bias-out").textContent = `b = ${found.bias}`;
    byId("bias-live").textContent = `σ(${found.bias}) = ${open.toPrecision(2)};  σ(${found.bias})${raised(task.lag)} = ${factor(end)};  measured ${factor(found.middle.at(-1))};  reach ${found.reach} of ${task.lag} steps`;
  };
  bias.show();
}
