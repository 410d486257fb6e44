// Draws the `views` trait: packs as bars, a choice of strategy, and the attention mask of the chosen pack.
const CELL = 8; // side of one cell of the attention picture, in its own units

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;

function segmentNode(segment, maxLength) {
  const label = `${segment.begins_earlier ? "…" : ""}${segment.label}${segment.goes_on ? "…" : ""}`;
  const cut = [segment.begins_earlier && "begins in an earlier pack", segment.goes_on && "goes on in another pack"].filter(Boolean);
  const name = segment.samples === 1 ? `sample ${segment.label}` : segment.label;
  const classes = ["course-segment", segment.begins_earlier && "course-cut-left", segment.goes_on && "course-cut-right"];
  return element(
    "span",
    { class: classes.filter(Boolean).join(" "), style: `width: ${(100 * segment.length) / maxLength}%`, title: [`${name}: ${count(segment.length, "token")}`, ...cut].join(", ") },
    label,
  );
}

function packButton(pack, maxLength) {
  const samples = pack.segments.reduce((sum, segment) => sum + segment.samples, 0);
  const names = samples === 1 ? `sample ${pack.segments[0].label}` : count(samples, "sample");
  const button = element(
    "button",
    { type: "button", class: "course-pack", "aria-label": `Pack ${pack.number}: ${names}, ${pack.tokens} of ${maxLength} tokens` },
    element("span", { class: "course-pack-number" }, String(pack.number)),
    element("span", { class: "course-bar" }, ...pack.segments.map((segment) => segmentNode(segment, maxLength))),
    element("span", { class: "course-pack-tokens" }, pack.tokens.toLocaleString("en")),
  );
  return button;
}

// What the cell (row looks, column is looked at) is; the same rule as `attention_cells` in packing_view.py.
function cellKind(row, column, sampleAt, isolated) {
  if (column > row) return "unseen";
  if (sampleAt[row] === sampleAt[column]) return "own";
  return isolated ? "unseen" : "foreign";
}

// One rectangle for each run of equal cells in a line. Only numbers and fixed words go into the markup.
function attentionPicture(pack, isolated) {
  const sampleAt = pack.sample_at, side = sampleAt.length * CELL;
  const hatch = `course-hatch-${Math.random().toString(36).slice(2)}`;
  const shapes = [];
  for (let row = 0; row < sampleAt.length; row++) {
    for (let start = 0, end; start <= row; start = end) {
      const kind = cellKind(row, start, sampleAt, isolated);
      for (end = start + 1; end <= row && cellKind(row, end, sampleAt, isolated) === kind; end++);
      if (kind === "unseen") continue;
      const place = `x="${start * CELL}" y="${row * CELL}" width="${(end - start) * CELL}" height="${CELL}"`;
      if (kind === "own") shapes.push(`<rect class="own" ${place}/>`);
      else shapes.push(`<rect class="foreign" ${place} fill="url(#${hatch})"/>`);
    }
  }
  for (let i = 1; i < sampleAt.length; i++) {
    if (sampleAt[i] === sampleAt[i - 1]) continue;
    const at = i * CELL;
    shapes.push(`<path class="edge" d="M0 ${at}H${side}M${at} 0V${side}"/>`);
  }
  const holder = element("div", { class: "course-attention" });
  holder.innerHTML = `<svg viewBox="-1 -1 ${side + 2} ${side + 2}" role="img">
    <defs><pattern id="${hatch}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path class="hatch" d="M0 0V6"/></pattern></defs>
    <rect class="frame" width="${side}" height="${side}"/>${shapes.join("")}<rect class="outline" width="${side}" height="${side}"/></svg>`;
  holder.firstChild.setAttribute("aria-label", `Attention mask of pack ${pack.number}. ${pack.sentence}`);
  return holder;
}

function attentionPanel(pack, isolated) {
  const each = pack.tokens / pack.sample_at.length;
  const key = [["course-key-own", "sees, own sample"]];
  if (!isolated && pack.foreign_share > 0) key.push(["course-key-foreign", "sees, another sample: contamination"]);
  key.push(["course-key-unseen", "does not see"]);
  return [
    attentionPicture(pack, isolated),
    element(
      "div",
      { class: "course-attention-words" },
      element("p", { class: "course-title" }, element("strong", {}, `What the tokens of pack ${pack.number} see`)),
      element("p", {}, pack.sentence),
      element("ul", { class: "course-legend" }, ...key.map(([mark, words]) => element("li", {}, element("span", { class: `course-key ${mark}` }), " ", words))),
      element("p", { class: "course-note" }, `A line is the token that looks, a column the token it looks at${each > 1 ? `; a cell stands for ${each.toFixed(1)} tokens` : ""}.`),
    ),
  ];
}

function render({ model, el }) {
  const group = `course-strategy-${Math.random().toString(36).slice(2)}`;
  const choices = element("fieldset", { class: "course-choices" }, element("legend", {}, "Packing strategy"));
  const numbers = element("dl", { class: "course-numbers" });
  const said = element("p", { class: "course-spoken", role: "status", "aria-live": "polite" });
  const bars = element("div", { class: "course-packs", role: "group" });
  const more = element("p", { class: "course-note" });
  const attention = element("div", { class: "course-attention-panel" });
  const body = element("div", { class: "course-packing-body" }, element("div", {}, bars, more), attention);
  const box = element("section", { class: "course-packing-view", "aria-label": "Packing" }, choices, numbers, said, body);

  const view = () => model.get("views").find((rows) => rows.strategy === model.get("strategy")) ?? model.get("views")[0];
  const setAndSave = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };

  const hideClippedLabels = () => {
    const segments = [...bars.querySelectorAll(".course-segment")];
    const clipped = segments.map((segment) => segment.scrollWidth > segment.clientWidth); // read all, then write all: one layout
    segments.forEach((segment, i) => segment.classList.toggle("course-unlabelled", clipped[i]));
  };
  const drawAttention = (speak) => {
    const rows = view(), index = Math.min(model.get("pack"), rows.packs.length - 1);
    [...bars.children].forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === index));
      button.tabIndex = i === index ? 0 : -1; // one Tab stop; the arrow keys move on
    });
    attention.replaceChildren(...(index >= 0 ? attentionPanel(rows.packs[index], rows.isolated) : []));
    if (speak === true && index >= 0) said.textContent = `Pack ${rows.packs[index].number}: ${rows.packs[index].sentence}`;
  };
  const drawStrategy = () => {
    const rows = view();
    for (const radio of choices.querySelectorAll("input")) radio.checked = radio.value === rows.strategy;
    numbers.replaceChildren(...rows.shown.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    bars.setAttribute("aria-label", `Packs of at most ${rows.max_length} tokens, strategy ${rows.strategy}`);
    bars.replaceChildren(...rows.packs.map((pack) => packButton(pack, rows.max_length)));
    const left = rows.packs_left_out;
    more.textContent =
      `Bars: ${count(rows.max_length, "token")} wide; boxes: samples, by their number from 0; hatched: unused room; … where a sample is cut. ` +
      `Choose a pack to see its attention mask.${left ? ` ${count(left, "more pack")} not drawn.` : ""}`;
    hideClippedLabels();
    drawAttention();
  };
  const drawChoices = () => {
    choices.querySelectorAll("label").forEach((label) => label.remove());
    for (const rows of model.get("views")) {
      const radio = element("input", { type: "radio", name: group, value: rows.strategy });
      choices.append(element("label", {}, radio, rows.strategy));
    }
    drawStrategy();
  };

  choices.addEventListener("change", (event) => {
    setAndSave({ strategy: event.target.value, pack: 0 });
    said.textContent = `${event.target.value}: ${view().shown.map(([name, value]) => `${name} ${value}`).join(", ")}`;
  });
  bars.addEventListener("click", (event) => {
    const index = [...bars.children].indexOf(event.target.closest(".course-pack"));
    if (index < 0) return;
    setAndSave({ pack: index });
    drawAttention(true);
  });
  bars.addEventListener("keydown", (event) => {
    const all = [...bars.children], here = all.indexOf(event.target);
    const moves = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: all.length - 1 };
    if (here < 0 || !(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation(); // JupyterLab moves between cells with the same keys
    const target = all[Math.max(0, Math.min(moves[event.key], all.length - 1))];
    for (const button of all) button.tabIndex = button === target ? 0 : -1;
    target.focus();
  });

  const listeners = { "change:views": drawChoices, "change:strategy": drawStrategy, "change:pack": drawAttention };
  for (const [name, listener] of Object.entries(listeners)) model.on(name, listener);
  el.append(box);
  drawChoices();
  const resized = new ResizeObserver(hideClippedLabels);
  resized.observe(bars);
  return () => {
    resized.disconnect();
    for (const [name, listener] of Object.entries(listeners)) model.off(name, listener);
  };
}
export default { render };
