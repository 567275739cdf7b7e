/* Switches, sliders, and what has to be drawn anew when. */
function drawRun() {
  drawProduct();
  drawCell();
  drawTraining();
  drawUpdate();
  drawRescue();
}

function drawAll() {
  hero.draw();
  drawLearning();
  drawBias();
  drawRun();
  for (const box of document.querySelectorAll(".scroll, .formula")) box.classList.toggle("wider", box.scrollWidth > box.clientWidth + 1);
}

function chooseTask(index) {
  state.task = index;
  for (const part of document.querySelectorAll("[data-task]")) part.hidden = Number(part.dataset.task) !== index;
  const select = byId("model"), runs = theTask().runs, title = runs[state.run]?.title;
  select.replaceChildren(...runs.map((run, i) => new Option(run.title, i)));
  const told = runs.findIndex((run) => run.fate === "vanishes" && /^LSTM$/.test(run.title));
  state.run = Math.max(0, title && select.dataset.chosen ? runs.findIndex((run) => run.title === title) : told);
  select.value = state.run;
  byId("hero-lag").max = theTask().lag;
}

document.documentElement.classList.add("scripted");
byId("switches").hidden = data.tasks.length < 2;
for (const input of document.querySelectorAll("input[name=task]")) input.addEventListener("change", () => { chooseTask(Number(input.value)); drawAll(); byId("hero-lag").value = byId("hero-lag").max; hero.show(); });
for (const input of document.querySelectorAll("input[name=when]")) input.addEventListener("change", () => { state.when = Number(input.value); drawUpdate(); });
byId("model").addEventListener("change", (event) => { state.run = Number(event.target.value); event.target.dataset.chosen = "yes"; byId("training-at").value = byId("training-at").max; drawRun(); });
for (const [id, part] of [["hero-lag", hero], ["product-lag", product], ["bias-b", bias], ["training-at", training]]) byId(id).addEventListener("input", () => part.show());
byId("training-at").step = "any";
byId("hero-lag").step = "any";
byId("training-at").addEventListener("keydown", (event) => {
  const way = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
  if (way) { event.preventDefault(); event.target.value = Math.round(Number(event.target.value)) + way; training.show(); }
});
byId("hero-lag").addEventListener("keydown", (event) => {
  const way = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
  if (way) { event.preventDefault(); event.target.value = Math.round(Number(event.target.value)) + way; hero.show(); }
});
const walk = player(byId("hero-play"), byId("hero-lag"), 5);
player(byId("training-play"), byId("training-at"), 6);

chooseTask(Number(document.querySelector("input[name=task]:checked").value));
let width = 0;
new ResizeObserver(() => { if (width && width !== document.body.clientWidth) { walk.stop(); drawAll(); } width = document.body.clientWidth; }).observe(document.body);
window.addEventListener("beforeprint", () => { walk.stop(); byId("hero-lag").value = byId("hero-lag").max; document.body.style.width = "42rem"; drawAll(); });
window.addEventListener("afterprint", () => { document.body.style.width = ""; drawAll(); });
byId("training-at").max = theRun().moments.length - 1;
byId("training-at").value = byId("training-at").max;
drawAll();
if (still.matches) {
  byId("hero-lag").value = byId("hero-lag").max;
  hero.show();
} else walk.play();
