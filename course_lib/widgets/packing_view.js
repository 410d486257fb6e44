// Draws the `views` trait: packs as bars, a choice of strategy, and the attention mask of the chosen pack.
const SIDE = 384, BAND = 20; // of the attention picture and of the sample numbers along its edges, in its own units
const LETTER = 8; // width of a digit there
const NAMED = 8; // samples of a pack that are read out one by one

function segmentWords(segment) {
  const cut = [segment.begins_earlier && "begins in an earlier pack", segment.goes_on && "goes on in a later pack"].filter(Boolean);
  const name = segment.samples === 1 ? `sample ${segment.label}` : segment.label;
  return [`${name}: ${count(segment.length, "token")}`, ...cut].join(", ");
}

function segmentNode(segment, maxLength) {
  const label = `${segment.begins_earlier ? "…" : ""}${segment.label}${segment.goes_on ? "…" : ""}`;
  const classes = ["course-segment", segment.begins_earlier && "course-cut-left", segment.goes_on && "course-cut-right"];
  return element(
    "span",
    { class: classes.filter(Boolean).join(" "), style: `width: ${(100 * segment.length) / maxLength}%`, title: segmentWords(segment) },
    label,
  );
}

function packButton(pack, maxLength) {
  const words = pack.segments.slice(0, NAMED).map(segmentWords);
  const left = pack.segments.length - NAMED;
  if (left > 0) words.push(`and ${left} more`);
  return element(
    "button",
    { type: "button", class: "course-pack", ...KEEP_KEYS, "aria-label": `Pack ${pack.number}, ${pack.tokens} of ${maxLength} tokens. ${words.join("; ")}` },
    element("span", { class: "course-pack-number" }, String(pack.number)),
    element("span", { class: "course-bar" }, ...pack.segments.map((segment) => segmentNode(segment, maxLength))),
    element("span", { class: "course-pack-tokens" }, pack.tokens.toLocaleString("en")),
  );
}

// What the cell (row looks, column is looked at) is; the same rule as `attention_cells` in packing_view.py.
function cellKind(row, column, sampleAt, isolated) {
  if (column > row) return "unseen";
  if (sampleAt[row] === sampleAt[column]) return "own";
  return isolated ? "unseen" : "foreign";
}

// Stretches of equal values: [value, start, end).
function runs(values) {
  const found = [];
  for (let start = 0, end; start < values.length; start = end) {
    for (end = start + 1; end < values.length && values[end] === values[start]; end++);
    found.push([values[start], start, end]);
  }
  return found;
}

// One rectangle for each run of equal cells in a line. Only numbers and fixed words go into the markup.
function attentionPicture(pack, isolated) {
  const sampleAt = pack.sample_at, cell = SIDE / sampleAt.length;
  const hatch = `course-hatch-${Math.random().toString(36).slice(2)}`;
  const shapes = [], bands = [];
  sampleAt.forEach((_, row) => {
    for (const [kind, start, end] of runs(sampleAt.map((_, column) => cellKind(row, column, sampleAt, isolated)))) {
      if (kind === "unseen") continue;
      const place = `x="${start * cell}" y="${row * cell}" width="${(end - start) * cell}" height="${cell}"`;
      shapes.push(kind === "own" ? `<rect class="own" ${place}/>` : `<rect class="foreign" ${place}/><rect ${place} fill="url(#${hatch})"/>`);
    }
  });
  runs(sampleAt).forEach(([sample, start, end], i) => {
    const at = start * cell, long = (end - start) * cell, middle = at + long / 2;
    if (i) shapes.push(`<path class="edge" d="M0 ${at}H${SIDE}M${at} 0V${SIDE}"/>`);
    const fits = String(Number(sample)).length * LETTER + 4 <= long;
    const shade = i % 2 ? "band band-other" : "band";
    bands.push(`<rect class="${shade}" x="${at}" y="${-BAND}" width="${long}" height="${BAND}"/><rect class="${shade}" x="${-BAND}" y="${at}" width="${BAND}" height="${long}"/>`);
    if (fits) bands.push(`<text x="${middle}" y="-6">${Number(sample)}</text><text transform="translate(-6 ${middle}) rotate(-90)">${Number(sample)}</text>`);
  });
  const holder = element("div", { class: "course-attention" });
  holder.innerHTML = `<svg viewBox="${-BAND - 1} ${-BAND - 1} ${SIDE + BAND + 2} ${SIDE + BAND + 2}" role="img">
    <defs><pattern id="${hatch}" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path class="hatch" d="M0 0V7"/></pattern></defs>
    <rect class="frame" width="${SIDE}" height="${SIDE}"/>${shapes.join("")}${bands.join("")}<rect class="outline" width="${SIDE}" height="${SIDE}"/></svg>`;
  holder.firstChild.setAttribute("aria-label", `Attention mask of pack ${pack.number}. ${pack.sentence}`);
  return holder;
}

const legend = (entries) => element("ul", { class: "course-legend" }, ...entries.map(([mark, words]) => element("li", {}, element("span", { class: `course-key ${mark}` }), words)));

function attentionPanel(pack, isolated) {
  const each = pack.tokens / pack.sample_at.length;
  const key = [["course-key-own", "its own sample"]];
  if (!isolated && pack.foreign_share > 0) key.push(["course-key-foreign", "another sample"]);
  key.push(["course-key-unseen", "not seen"]);
  const note = element("p", { class: "course-note" }, `A line is the token that looks, a column the token it looks at; the numbers are samples.${each > 1 ? ` A cell stands for ${each.toFixed(1)} tokens.` : ""}`);
  return [
    element("p", { class: "course-heading" }, `What the tokens of pack ${pack.number} see`),
    attentionPicture(pack, isolated),
    element("div", { class: "course-attention-words" }, legend(key), element("p", {}, pack.sentence), note),
  ];
}

function numberTile([name, value], fill) {
  const tile = element("div", {}, element("span", { class: "course-value" }, value), " ", element("span", { class: "course-name" }, name));
  if (name === "fill") tile.append(element("span", { class: "course-meter", "aria-hidden": "true" }, element("span", { style: `width: ${100 * fill}%` })));
  return tile;
}

function render({ model, el }) {
  const group = `course-strategy-${Math.random().toString(36).slice(2)}`;
  const choices = element("fieldset", { class: "course-choices" }, element("legend", {}, "Packing strategy"));
  const numbers = element("div", { class: "course-numbers" });
  const said = element("p", { class: "course-spoken", role: "status", "aria-live": "polite" });
  const heading = element("p", { class: "course-heading" });
  const bars = element("div", { class: "course-packs", role: "group" });
  const key = element("div");
  const more = element("p", { class: "course-note" });
  const attention = element("div", { class: "course-attention-panel" });
  const body = element("div", { class: "course-packing-body" }, element("div", { class: "course-packs-panel" }, heading, bars, key, more), attention);
  const box = element("section", { class: "course-widget course-packing-view", "aria-label": "Packing" }, choices, numbers, said, body);

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
    const rows = view(), index = Math.max(0, Math.min(model.get("pack"), rows.packs.length - 1));
    [...bars.children].forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === index));
      button.tabIndex = i === index ? 0 : -1; // one Tab stop; the arrow keys move on
    });
    const pack = rows.packs[index];
    attention.replaceChildren(...(pack ? attentionPanel(pack, rows.isolated) : []));
    if (speak === true && pack) said.textContent = `Pack ${pack.number}: ${pack.sentence}`;
  };
  const drawStrategy = () => {
    const rows = view();
    for (const radio of choices.querySelectorAll("input")) radio.checked = radio.value === rows.strategy;
    numbers.replaceChildren(...rows.shown.map((pair) => numberTile(pair, rows.numbers.fill_share)));
    heading.textContent = `Packs of at most ${count(rows.max_length, "token")}`;
    bars.setAttribute("aria-label", `${heading.textContent}, strategy ${rows.strategy}`);
    bars.replaceChildren(...rows.packs.map((pack) => packButton(pack, rows.max_length)));
    const cut = rows.numbers.samples_cut ? [["course-key-cut", "cut here"]] : [];
    key.replaceChildren(legend([["course-key-sample", "a sample, by its number"], ...cut, ["course-key-unused", "unused room"]]));
    const left = rows.packs_left_out;
    more.textContent = rows.packs.length ? `Choose a pack to see its attention mask.${left ? ` ${count(left, "more pack")} not drawn.` : ""}` : "No samples.";
    hideClippedLabels();
    drawAttention();
  };
  const drawChoices = () => {
    choices.querySelectorAll("label").forEach((label) => label.remove());
    for (const rows of model.get("views")) {
      const radio = element("input", { type: "radio", name: group, value: rows.strategy, ...KEEP_KEYS });
      choices.append(element("label", {}, radio, rows.strategy, element("span", { class: "course-note" }, count(rows.numbers.packs, "pack"))));
    }
    drawStrategy();
  };

  choices.addEventListener("change", (event) => {
    setAndSave({ pack: 0, strategy: event.target.value });
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
    event.stopPropagation();
    const target = all[Math.max(0, Math.min(moves[event.key], all.length - 1))];
    for (const button of all) button.tabIndex = button === target ? 0 : -1;
    target.focus();
  });

  const listeners = { "change:views": drawChoices, "change:strategy": drawStrategy, "change:pack": () => drawAttention() };
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
