/* The subgradients of one update with their running sum; the smallest change of the biases. */
function drawUpdate() {
  const run = theRun(), found = run.breakdown[state.when], known = found.subgradient.filter((v) => v !== null), top = Math.max(...known), whole = found.partial[0];
  const when = state.when ? "after" : "before";
  const length = theTask().lag + 1, steps = found.lastSteps === 1 ? `the last of ${length} steps alone` : found.lastSteps === length ? `all ${length} steps` : `the last ${found.lastSteps} of ${length} steps`;
  byId("update-live").textContent = `${run.title}: 99 % of this update comes from ${steps}.`;
  const f = frame("update-plot", 280, { l: 52, r: 60, t: 30, b: 44 }, `${run.title}, ${when} training: 99 % of the update comes from ${steps}`);
  const x = d3.scaleLinear([0, theTask().lag], [0, f.w]), y = d3.scaleLinear([0, 1], [f.h, 0]);
  yAxis(f, y, [0, 0.25, 0.5, 0.75, 1], (v) => `${100 * v} %`, "‖gₜ‖, of the largest");
  xAxis(f, x, "step t");
  const width = Math.max(1, (f.w / found.steps.length) * 0.7), from = theTask().lag + 1 - found.lastSteps;
  f.g.append("rect").attr("x", x(from) - width / 2).attr("width", Math.max(0, f.w - x(from) + width)).attr("height", f.h).attr("fill", "var(--panel)");
  found.subgradient.forEach((v, i) => {
    const part = v === null ? 0 : 10 ** (v - top);
    f.g.append("rect").attr("class", "bar").attr("style", colour(run)).attr("x", x(found.steps[i]) - width / 2).attr("width", width).attr("y", y(part)).attr("height", f.h - y(part));
  });
  const sums = found.partial.map((v) => (v === null || whole === null ? 0 : Math.min(1.5, 10 ** (v - whole))));
  curve(f, found.steps, sums, x, d3.scaleLinear([0, Math.max(1, ...sums)], [f.h, 0]), "--c:var(--ink)");
  f.g.append("text").attr("class", "halo").attr("x", 6).attr("y", 18 + f.h * (1 - sums[0] / Math.max(1, ...sums))).text("‖Σ gₛ, s ≥ t‖: running sum from the end ←");
}

function drawRescue() {
  const run = theRun(), found = run.rescue, task = theTask();
  byId("rescue-live").textContent = found ? `${run.title}. ${run.story.rescue}` : `${run.title}: no gate carries its state, so there is no bias to move; choose an LSTM or GRU.`;
  document.querySelector("#rescue .pair").hidden = !found;
  if (!found) return;
  const order = found.before.map((_, i) => i).sort((a, b) => found.after[a] - found.before[a] - (found.after[b] - found.before[b]));
  const all = [...found.before, ...found.after], f = frame("rescue-bias", 300, { l: 40, r: 14, t: 30, b: 44 }, run.story.rescue);
  const x = d3.scaleLinear([0, order.length - 1], [8, f.w - 8]), y = d3.scaleLinear([Math.min(-1, ...all), Math.max(8, ...all)], [f.h, 0]);
  yAxis(f, y, y.ticks(6), String, `bias of gate ${found.gate}, per unit`);
  f.g.append("text").attr("class", "soft").attr("x", f.w / 2).attr("y", f.h + 30).attr("text-anchor", "middle").text("units, in order of their change");
  order.forEach((unit, i) => {
    f.g.append("line").attr("x1", x(i)).attr("x2", x(i)).attr("y1", y(found.before[unit])).attr("y2", y(found.after[unit])).attr("stroke", "var(--s2)").attr("stroke-width", 1.6);
    f.g.append("circle").attr("cx", x(i)).attr("cy", y(found.before[unit])).attr("r", 3).attr("fill", "var(--paper)").attr("stroke", "var(--soft)").attr("stroke-width", 1.5);
    f.g.append("circle").attr("cx", x(i)).attr("cy", y(found.after[unit])).attr("r", 3).attr("fill", "var(--s2)");
  });
  f.g.append("text").attr("class", "soft halo").attr("x", 10).attr("y", 12).text("○ before   ● after");
  const g = overLag("rescue-plot", 300, `${run.title}: reach ${run.moments[0].reach} before the rescue, ${found.reach} after`);
  curve(g, run.moments[0].lag, run.moments[0].middle, g.x, g.y, "--c:var(--soft)");
  curve(g, found.lag, found.middle, g.x, g.y, "--c:var(--s2)");
  leftEnds(g, [{ y: clamp(g.y(run.moments[0].middle.at(-1) ?? LOWEST), 0, g.h), style: "--c:var(--soft)", text: `before ${factor(run.moments[0].middle.at(-1))}` }, { y: clamp(g.y(found.middle.at(-1) ?? LOWEST), 0, g.h), style: "--c:var(--s2)", text: `rescued ${factor(found.middle.at(-1))}` }]);
}
