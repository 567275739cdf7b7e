/* The unrolled networks, one row a model; the gradient walks from the last step to the first. */
const DARK = -8; /* a gradient of 10⁻⁸ is dark: added to one of 1 in float32 it changes nothing */
const hero = { draw: () => {}, show: () => {} };

hero.draw = () => {
  const task = theTask(), runs = task.runs, narrow = byId("hero").clientWidth < 620;
  const rowHeight = narrow ? 30 : 32, top = 34 + rowHeight * runs.length, chart = narrow ? 210 : 250;
  const f = frame("hero", top + chart + 46, { l: narrow ? 132 : 176, r: 46, t: 0, b: 0 }, task.alt.hero);
  const x = d3.scaleLinear([0, task.lag], [f.w, 0]), y = d3.scaleLinear([LOWEST, HIGHEST], [top + chart, top + 26]);
  const count = Math.min(task.lag + 1, Math.max(10, Math.floor(f.w / 17))), radius = Math.min(6, f.w / count / 2.7);
  const cells = Array.from({ length: count }, (_, i) => (i * task.lag) / (count - 1));
  f.g.append("text").attr("class", "soft").attr("x", f.w).attr("y", 18).attr("text-anchor", "end").text(narrow ? "error ↓" : "error at the last step ↓");
  f.g.append("text").attr("class", "soft").attr("x", 0).attr("y", 18).text("← first step");
  const rows = runs.map((run, r) => {
    const row = f.g.append("g").attr("transform", `translate(0,${34 + rowHeight * (r + 0.5)})`);
    row.append("line").attr("class", "thread").attr("x2", f.w);
    row.append("text").attr("class", "strong named").attr("style", colour(run) + (narrow ? ";font-size:11px" : "")).attr("x", narrow ? -128 : -164).attr("y", 4).text(run.title);
    const number = row.append("text").attr("class", "strong").attr("x", -10).attr("y", 4).attr("text-anchor", "end");
    const lights = cells.map((lag) => {
      row.append("circle").attr("class", "cell-edge").attr("cx", x(lag)).attr("r", radius);
      const value = run.before[Math.round(lag)], bright = value === null ? 0 : 1 - clamp(value / DARK, 0, 1);
      return { lag, bright, node: row.append("circle").attr("class", "cell").attr("cx", x(lag)).attr("r", radius).attr("opacity", 0) };
    });
    return { run, number, lights };
  });
  for (const v of [0, -10, -20, -30, -40, -50]) {
    f.g.append("g").attr("class", "tick").attr("transform", `translate(0,${y(v)})`).call((g) => { g.append("line").attr("x2", f.w); g.append("text").attr("x", f.w + 8).attr("y", 4).text(tens(v)); });
  }
  for (const [v, text] of [[REACHED, "1 %: reach"], [FLOAT32, "float32’s smallest number"]]) {
    f.g.append("line").attr("class", "bound").attr("x2", f.w).attr("y1", y(v)).attr("y2", y(v));
    const room = (part) => Math.min(...runs.map((run) => Math.abs(y(run.before[Math.round(task.lag * (1 - part))] ?? LOWEST) - y(v) - 11)));
    const free = (v === FLOAT32 ? [0.5] : [0.36, 0.2, 0.52, 0.68, 0.84]).reduce((best, part) => (room(part) > room(best) ? part : best));
    f.g.append("text").attr("class", "soft halo").attr("x", f.w * free).attr("y", y(v) + 15).attr("text-anchor", "middle").text(text);
  }
  const axis = d3.axisBottom(x).ticks(narrow ? 4 : 8).tickSizeOuter(0).tickFormat((v) => (v ? "−" + v : "0"));
  f.g.append("g").attr("transform", `translate(0,${top + chart})`).call(axis);
  f.g.append("text").attr("class", "soft").attr("x", f.w / 2).attr("y", top + chart + 38).attr("text-anchor", "middle").text("steps before the error");
  const clip = f.svg.append("clipPath").attr("id", "hero-clip").append("rect").attr("y", top + 10).attr("height", chart - 8);
  const lines = f.g.append("g").attr("clip-path", "url(#hero-clip)");
  for (const run of runs) curve({ g: lines, h: top + chart }, run.before.map((_, i) => i), run.before, x, y, colour(run), "", run.dash);
  const head = f.g.append("line").attr("class", "head").attr("y1", 26).attr("y2", top + chart);
  const names = f.g.append("g"), place = { g: names, h: top + chart };
  const slider = byId("hero-lag");
  slider.max = task.lag;
  hero.show = () => {
    const lag = Math.round(Number(slider.value));
    byId("hero-out").textContent = `${lag} of ${task.lag}`;
    head.attr("x1", x(lag)).attr("x2", x(lag));
    clip.attr("x", x(lag)).attr("width", f.w - x(lag));
    for (const { run, number, lights } of rows) {
      number.text(factor(run.before[lag]));
      for (const light of lights) light.node.attr("opacity", light.lag <= lag ? light.bright : 0);
    }
    names.selectAll("*").remove();
    const ends = runs.map((run) => ({ y: clamp(y(run.before[lag] ?? LOWEST), top + 26, top + chart), style: colour(run), text: lag === task.lag || !narrow ? run.title : "" }));
    labels(place, ends, x(lag) - 6, "end");
  };
  scrub({ g: f.g, w: f.w, h: top + chart }, slider, (px) => x.invert(px));
  hero.show();
};
