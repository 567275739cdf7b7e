/* Reach and error on one axis of updates, and the gradient at the chosen moment over its ghost. */
const training = { show: () => {} };

function drawTraining() {
  const task = theTask(), run = theRun(), slider = byId("training-at"), moments = run.moments;
  slider.max = moments.length - 1;
  slider.value = Math.min(slider.value, slider.max);
  const half = 128, gap = 46, f = frame("training-plot", 2 * half + gap + 94, { l: 52, r: 14, t: 30, b: 0 }, `${run.title}. ${run.story.training}`);
  const x = d3.scaleLinear([0, task.steps], [0, f.w]);
  const upper = { g: f.g, w: f.w, h: half }, lower = { g: f.g.append("g").attr("transform", `translate(0,${half + gap})`), w: f.w, h: half };
  const y = d3.scaleLog([1, Math.max(10, task.lag)], [half, 0]).clamp(true);
  const ticks = [1, 3, 10, 30, 100, 300, 1000].filter((v) => v <= task.lag);
  yAxis(upper, y, ticks, String, "reach (steps)");
  curve(upper, moments.map((m) => m.update), moments.map((m) => m.reach), x, y, colour(run));
  for (const m of moments) f.g.append("circle").attr("cx", x(m.update)).attr("cy", y(m.reach)).attr("r", 2.6).attr("class", "bar").attr("style", colour(run));
  bound(upper, y, task.lag, "the task’s length", "end");
  const all = task.runs.flatMap((r) => r.curves.flatMap((c) => c.error)).concat(task.chance), e = d3.scaleLinear([0, 1.1 * Math.max(...all)], [half, 0]);
  lower.g.append("g").call(d3.axisLeft(e).ticks(4).tickSize(-f.w)).call((g) => g.select(".domain").remove());
  lower.g.append("text").attr("class", "soft").attr("x", -48).attr("y", -13).text("validation " + task.metric);
  bound(lower, e, task.chance, "chance");
  run.curves.forEach((c, i) => curve(lower, c.update, c.error, x, e, colour(run), i ? "faint" : ""));
  lower.g.selectAll("text.halo").raise();
  xAxis(lower, x, "optimizer updates");
  const head = f.g.append("line").attr("class", "playhead").attr("y2", 2 * half + gap);
  const g = overLag("moment-plot", 2 * half + gap + 94, `${run.title}: gradient over the lag, before training and at the chosen moment`);
  curve(g, moments[0].lag, moments[0].middle, g.x, g.y, "--c:var(--edge)", "ghost");
  g.g.append("text").attr("class", "soft halo").attr("x", g.x(task.lag * 0.5)).attr("y", clamp(g.y(at(moments[0].lag, moments[0].middle, task.lag * 0.5) ?? LOWEST) + 16, 20, g.h - 6)).text("before training");
  const mine = g.g.append("g");
  training.show = () => {
    const place = Number(slider.value), from = Math.floor(place), to = Math.min(moments.length - 1, from + 1), share = place - from;
    const mix = (a, b) => (a === null || b === null ? a : a + share * (b - a)), nearest = moments[Math.round(place)];
    const update = mix(moments[from].update, moments[to].update);
    head.attr("x1", x(update)).attr("x2", x(update));
    mine.selectAll("*").remove();
    curve({ g: mine, h: g.h }, moments[from].lag, moments[from].middle.map((v, i) => mix(v, moments[to].middle[i])), g.x, g.y, colour(run));
    byId("training-out").textContent = `update ${Math.round(update)}`;
    byId("training-live").textContent = `${run.title}, update ${nearest.update}: reach ${nearest.reach} steps, ${task.metric} ${errorAt(run, nearest.update, task)}. ${run.story.training}`;
  };
  scrub({ g: f.g, w: f.w, h: 2 * half + gap }, slider, (px) => { const u = x.invert(px); return d3.bisectCenter(moments.map((m) => m.update), u); });
  training.show();
}

function errorAt(run, update) {
  const place = run.first.update.indexOf(update);
  return place < 0 ? "not measured yet" : String(Number(run.first.error[place].toPrecision(3)));
}
