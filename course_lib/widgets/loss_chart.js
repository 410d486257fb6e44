// Draws the loss as SVG from the `points` trait; redraws when it changes, unless paused. Colours come from JupyterLab's variables.
const WIDTH = 640, HEIGHT = 260, LEFT = 48, RIGHT = 12, TOP = 12, BOTTOM = 40;

function niceStep(range, count) {
  const rough = range / count, power = Math.pow(10, Math.floor(Math.log10(rough)));
  return [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
}

function pictureOf(model) {
  const points = model.get("points"), total = model.get("total_steps"), heldOut = model.get("held_out");
  if (!points.length) return "";
  const top = Math.max(...points.map((p) => p[1]), ...heldOut.map((p) => p[1])) * 1.05;
  const last = Math.max(total, 1);
  const x = (step) => LEFT + (step / last) * (WIDTH - LEFT - RIGHT);
  const y = (loss) => HEIGHT - BOTTOM - (loss / top) * (HEIGHT - TOP - BOTTOM);
  const parts = [];
  const yStep = niceStep(top, 4);
  for (let v = 0; v <= top; v += yStep) {
    parts.push(`<line class="grid" x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${y(v)}" y2="${y(v)}"/>`);
    parts.push(`<text x="${LEFT - 6}" y="${y(v) + 4}" text-anchor="end">${+v.toFixed(2)}</text>`);
  }
  const xStep = Math.max(1, niceStep(last, 6));
  for (let s = 0; s <= last; s += xStep) parts.push(`<text x="${x(s)}" y="${HEIGHT - BOTTOM + 18}" text-anchor="middle">${s}</text>`);
  parts.push(`<text x="${(LEFT + WIDTH - RIGHT) / 2}" y="${HEIGHT - 4}" text-anchor="middle">step</text>`);
  parts.push(`<polyline class="training" points="${points.map((p) => `${x(p[0])},${y(p[1])}`).join(" ")}"/>`);
  for (const p of heldOut) parts.push(`<rect class="held-out" x="${x(p[0]) - 4}" y="${y(p[1]) - 4}" width="8" height="8"/>`);
  const label = `Training loss, ${points.length} of ${total} steps, now ${points[points.length - 1][1].toFixed(3)}`;
  return `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${label}">${parts.join("")}</svg>`;
}

function noteWords(model, paused) {
  const points = model.get("points");
  const pausedAt = points.length ? `paused at step ${points[points.length - 1][0]}` : "paused before the first step";
  const key = points.length && model.get("held_out").length ? " (line: training rows; squares: held-out rows)" : "";
  return (paused ? pausedAt : model.get("status")) + key;
}

function render({ model, el }) {
  const picture = element("div");
  const note = element("p", { class: "course-note" });
  const button = element("button", { type: "button", class: "course-button", title: "Training goes on while the drawing is paused", ...KEEP_KEYS }, "Pause");
  const spoken = element("p", { class: "course-spoken", role: "status" }); // not the note: it changes with every step
  const foot = element("div", { class: "course-loss-foot" }, note, button, spoken);
  const box = element("section", { class: "course-widget course-loss-chart", "aria-label": "Loss chart" }, picture, foot);
  let paused = false;

  const draw = () => {
    picture.innerHTML = pictureOf(model);
    note.textContent = noteWords(model, paused);
  };
  const update = () => {
    if (!paused) draw(); // the traits hold all that comes meanwhile
  };
  button.addEventListener("click", () => {
    paused = !paused; // here alone: Python, busy training, is told nothing
    button.textContent = paused ? "Resume" : "Pause";
    draw();
    spoken.textContent = note.textContent;
  });

  el.append(box);
  const names = ["points", "held_out", "status"];
  names.forEach((name) => model.on(`change:${name}`, update));
  draw();
  return () => names.forEach((name) => model.off(`change:${name}`, update));
}
export default { render };
