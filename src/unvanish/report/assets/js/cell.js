/* The paths through a cell: drawing, formula and curve of one light up together. */
const TERMS = { A: 4, B: 2, C: 1, D: 3, O: 6 };
const EQUATION = ["B", "A", "C", "D", "O"]; /* in the order of its terms */
const letterOf = (name) => (/^[A-DO] · /.test(name) ? name[0] : name);

function light() {
  for (const node of document.querySelectorAll("[data-term]")) {
    const on = node.dataset.term === state.term;
    node.classList.toggle("lit", on);
    if (node.classList.contains("curve")) node.classList.toggle("faint", !on);
  }
}

function drawCell() {
  const run = theRun(), found = run.breakdown[0], place = (name) => Math.max(0, EQUATION.indexOf(letterOf(name))), names = Object.keys(found.kept).sort((a, b) => place(a) - place(b)), lettered = names.every((name) => letterOf(name).length === 1);
  byId("cell-drawing").hidden = !lettered;
  document.querySelector("#cell .formula").hidden = !lettered;
  byId("cell-note").textContent = lettered ? `${run.title} before training, median over samples.` : `${run.title} before training, median over samples. Drawing and letters are the LSTM's: choose one of its kind to see them; this cell's own paths are named beside its curves.`;
  if (!names.some((name) => letterOf(name) === state.term)) state.term = letterOf(names.find((name) => name.includes("carry")) ?? names[0]);
  const hue = (name, i) => `--c:var(--s${TERMS[letterOf(name)] ?? i % 8})`;
  const choice = d3.select("#terms");
  choice.selectAll("*").remove();
  names.forEach((name, i) => {
    const label = choice.append("label").attr("style", hue(name, i)).on("pointerenter", () => { state.term = letterOf(name); input.property("checked", true); light(); });
    const input = label.append("input").attr("type", "radio").attr("name", "term").property("checked", letterOf(name) === state.term).on("change", () => { state.term = letterOf(name); light(); });
    label.append("span").text(name);
  });
  const narrow = byId("cell-plot").clientWidth < 420;
  const said = names.map((name) => { const known = found.kept[name].filter((v) => v !== null); return `${name} ${known.length ? factor(known[known.length >> 1]) : "0"}`; }).join("; ");
  const f = frame("cell-plot", 300, { l: 46, r: narrow || lettered ? 34 : 110, t: 30, b: 44 }, `${run.title}: what each path keeps per step, in the middle of the sequence: ${said}`);
  const x = d3.scaleLinear([0, theTask().lag], [0, f.w]), y = d3.scaleLinear([-8, 0.5], [f.h, 0]);
  yAxis(f, y, [-8, -6, -4, -2, 0], tens, "kept of the gradient in one step");
  xAxis(f, x, "step t");
  names.forEach((name, i) => curve(f, found.steps, found.kept[name], x, y, hue(name, i)).attr("data-term", letterOf(name)));
  labels(f, names.map((name, i) => ({ y: clamp(y(last(found.kept[name]) ?? -8), 0, f.h), style: hue(name, i), term: letterOf(name), text: lettered ? letterOf(name) : name.replace(/^through the /, "").slice(0, narrow ? 4 : 16) })), f.w + 6);
  light();
}

const last = (values) => values.filter((v) => v !== null).at(-1);
for (const node of document.querySelectorAll("#cell-drawing [data-term], #cell math [data-term]")) {
  node.addEventListener("pointerenter", () => {
    state.term = node.dataset.term;
    light();
    for (const input of document.querySelectorAll("#terms input")) input.checked = letterOf(input.nextSibling.textContent) === state.term;
  });
}
