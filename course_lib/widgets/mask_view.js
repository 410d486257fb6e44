// Draws the `columns` trait: one list of tokens a template. All text goes in as textContent, so no token can inject markup.
const SHIFT_EXPLAINED =
  "The model reads the upper token and is scored on the lower one: position t predicts token t + 1. " +
  "Where the lower line has a dash, the next label is -100 and nothing is scored.";
const HINT = "Point at a token, or press Tab and the arrow keys, to read its id and label.";
const MARKS = /([·⏎⇥␍]+)/; // how `visible` in mask_view.py writes white space

// A token as a chip; white space is drawn fainter than the letters.
function chip(text) {
  const parts = text.split(MARKS).map((part, i) => (i % 2 ? element("span", { class: "course-space" }, part) : part));
  return element("span", { class: "course-now" }, ...parts);
}

function legend(columns) {
  const kinds = new Set(columns.flatMap((column) => column.cells.map((cell) => cell.kind)));
  const sample = (extra, text) => element("span", { class: `course-token ${extra}` }, chip(text));
  const entries = [
    [sample("course-trained", "trained"), "in the loss"],
    [sample("", "context"), "not in the loss"],
    [sample("course-special", "special"), "marker token"],
  ];
  if (kinds.has("piece")) entries.push([sample("course-piece", "⟨é 1/2⟩"), "part of a character"]);
  entries.push(["·", "space, ⏎ line break"]);
  return element("ul", { class: "course-legend" }, ...entries.map(([mark, words]) => element("li", {}, mark, " ", words)));
}

// The whole mask at a glance: tall where trained, low where not. The numbers beside it say the same in words.
function strip(cells) {
  const node = element("div", { class: "course-strip", "aria-hidden": "true" });
  for (let start = 0, end; start < cells.length; start = end) {
    for (end = start + 1; end < cells.length && cells[end].trained === cells[start].trained; end++);
    node.append(element("span", { class: cells[start].trained ? "course-strip-trained" : "", style: `flex-grow: ${end - start}` }));
  }
  return node;
}

function spokenShift(cell) {
  return cell.predicts === null ? "; scored on nothing" : `; scored on predicting ${cell.predicts}`;
}

// What is known of one token, in fields that keep their places while the pointer moves.
function inspector(cell, shift) {
  const fields = [
    ["position", String(cell.position)],
    ["token", cell.named],
    ["id", String(cell.id)],
    ["label", String(cell.label)],
    ["in the loss", cell.trained ? "yes" : "no"],
  ];
  if (shift) fields.push(["scored on", cell.predicts ?? "nothing"]);
  return fields.map(([name, value]) => element("div", {}, element("span", { class: "course-name" }, name), " ", element("span", { class: "course-value", title: value }, value)));
}

function tokenCell(cell, last) {
  const kind = cell.kind === "text" ? "" : ` course-${cell.kind}`;
  const scored = cell.predicts !== null;
  return element(
    "span",
    { class: `course-token${kind}${cell.trained ? " course-trained" : ""}`, role: "option", tabindex: "-1", "aria-selected": "false", "aria-label": cell.description, ...KEEP_KEYS },
    chip(cell.shown),
    element("span", { class: `course-next${scored ? " course-trained" : ""}` }, scored ? chip(cell.predicts) : last ? "end" : "–"),
  );
}

function nearestInLine(cells, from, direction) {
  const here = cells[from].getBoundingClientRect();
  const centre = here.left + here.width / 2;
  let best = from, bestTop = null, bestGap = Infinity;
  for (let i = from + direction; i >= 0 && i < cells.length; i += direction) {
    const box = cells[i].getBoundingClientRect();
    if (Math.abs(box.top - here.top) < 4) continue;
    if (bestTop !== null && Math.abs(box.top - bestTop) > 4) break;
    bestTop = box.top;
    const gap = Math.abs(box.left + box.width / 2 - centre);
    if (gap < bestGap) [best, bestGap] = [i, gap];
  }
  return best;
}

// One Tab stop a list: the arrow keys move inside it (left and right by token, up and down by line, Home and End).
function tokenList(column, show) {
  const list = element("div", { class: "course-tokens", role: "listbox", "aria-label": `Tokens, template ${column.name}` });
  let line = element("div", { role: "presentation" });
  const cells = column.cells.map((cell, i) => {
    const node = tokenCell(cell, i === column.tokens - 1);
    line.append(node);
    if (cell.ends_line || i === column.cells.length - 1) {
      list.append(line);
      line = element("div", { role: "presentation" });
    }
    return node;
  });
  const indices = new Map(cells.map((node, i) => [node, i]));
  let current = 0;
  const select = (index) => {
    cells[current].tabIndex = -1;
    cells[current].setAttribute("aria-selected", "false");
    current = index;
    cells[current].tabIndex = 0;
    cells[current].setAttribute("aria-selected", "true");
    show(column.cells[current]);
  };
  const indexOf = (event) => indices.get(event.target.closest(".course-token")) ?? -1;
  if (cells.length) cells[0].tabIndex = 0;
  list.addEventListener("pointerover", (event) => indexOf(event) >= 0 && show(column.cells[indexOf(event)]));
  list.addEventListener("focusin", (event) => indexOf(event) >= 0 && select(indexOf(event)));
  list.addEventListener("keydown", (event) => {
    const moves = {
      ArrowRight: () => Math.min(current + 1, cells.length - 1),
      ArrowLeft: () => Math.max(current - 1, 0),
      ArrowDown: () => nearestInLine(cells, current, 1),
      ArrowUp: () => nearestInLine(cells, current, -1),
      Home: () => 0,
      End: () => cells.length - 1,
    };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    cells[moves[event.key]()].focus();
  });
  const speakShift = (on) => cells.forEach((node, i) => node.setAttribute("aria-label", column.cells[i].description + (on ? spokenShift(column.cells[i]) : "")));
  return { list, speakShift };
}

function columnNode(column, lists, show) {
  const title = element("p", { class: "course-title" }, element("strong", {}, column.name), element("span", {}, column.counts));
  const node = element("div", { class: `course-column${column.error ? " course-refused" : ""}` }, title);
  if (column.cells.length) {
    const made = tokenList(column, show);
    lists.push(made);
    node.append(strip(column.cells), made.list);
  }
  return node;
}

function render({ model, el }) {
  const button = element("button", { type: "button", class: "course-button" }, "Show the shift by one");
  const explained = element("p", { class: "course-note", role: "status" });
  const details = element("div", { class: "course-details" });
  const columns = element("div", { class: "course-columns" });
  const box = element("section", { class: "course-widget course-mask-view", "aria-label": "Tokens and loss mask" });
  let shownCell = null, lists = [];

  const show = (cell) => {
    shownCell = cell;
    details.replaceChildren(...inspector(cell, model.get("shift")));
  };
  const drawShift = () => {
    const on = model.get("shift");
    button.setAttribute("aria-pressed", String(on));
    explained.textContent = on ? SHIFT_EXPLAINED : "";
    box.classList.toggle("course-shift", on);
    lists.forEach((made) => made.speakShift(on));
    if (shownCell) show(shownCell);
  };
  const drawColumns = () => {
    const all = model.get("columns");
    [shownCell, lists] = [null, []];
    details.replaceChildren(element("p", { class: "course-hint" }, HINT));
    columns.replaceChildren(...all.map((column) => columnNode(column, lists, show)));
    box.replaceChildren(element("div", { class: "course-toolbar" }, legend(all), button), explained, details, columns);
    drawShift();
  };
  const toggle = () => {
    model.set("shift", !model.get("shift"));
    model.save_changes();
  };

  button.addEventListener("click", toggle);
  model.on("change:shift", drawShift);
  model.on("change:columns", drawColumns);
  drawColumns();
  el.append(box);
  return () => {
    model.off("change:shift", drawShift);
    model.off("change:columns", drawColumns);
  };
}
export default { render };
