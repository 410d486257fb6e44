// Draws the `columns` trait: one list of tokens a template. All text goes in as textContent, so no token can inject markup.
const SHIFT_EXPLAINED =
  "Each token is used to predict the next one: the lower line shows what position i is scored on, the label of position i + 1; " +
  "“–” means that label is -100 and nothing is scored there.";
const HELP = "Point at a token, or use the arrow keys, to read its id and label.";

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function legend(columns) {
  const kinds = new Set(columns.flatMap((column) => column.cells.map((cell) => cell.kind)));
  const sample = (extra, text) => element("span", { class: `course-token ${extra}` }, element("span", { class: "course-now" }, text));
  const entries = [
    [sample("course-trained", "trained"), "bold, underlined, shaded"],
    [sample("", "context"), "plain: read, not trained"],
    [sample("course-special", "special"), "boxed: one marker token"],
  ];
  if (kinds.has("piece")) entries.push([sample("course-piece", "⟨é 1/2⟩"), "piece of a character"]);
  entries.push(["·", "space"], ["⏎", "line break"]);
  return element("ul", { class: "course-legend" }, ...entries.map(([mark, words]) => element("li", {}, mark, " ", words)));
}

function tokenCell(cell, position, last) {
  const kind = cell.kind === "text" ? "" : ` course-${cell.kind}`;
  const node = element(
    "span",
    { class: `course-token${kind}${cell.trained ? " course-trained" : ""}`, role: "option", tabindex: "-1", "aria-selected": "false", "aria-label": cell.description },
    element("span", { class: "course-now" }, cell.shown),
  );
  const scored = cell.predicts !== null;
  const next = element("span", { class: `course-next${scored ? " course-trained" : ""}` }, element("span", { class: "course-now" }, scored ? cell.predicts : last ? "end" : "–"));
  node.append(next);
  return node;
}

// One Tab stop a list: the arrow keys move inside it (left and right by token, up and down by line, Home and End).
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

function tokenList(column, show) {
  const list = element("div", { class: "course-tokens", role: "listbox", "aria-label": `tokens, template ${column.name}` });
  let line = element("div", { role: "presentation" });
  const cells = column.cells.map((cell, i) => {
    const node = tokenCell(cell, i, i === column.tokens - 1);
    line.append(node);
    if (cell.ends_line || i === column.cells.length - 1) {
      list.append(line);
      line = element("div", { role: "presentation" });
    }
    return node;
  });
  let current = 0;
  const choose = (index) => {
    cells[current].tabIndex = -1;
    cells[current].setAttribute("aria-selected", "false");
    current = index;
    cells[current].tabIndex = 0;
    cells[current].setAttribute("aria-selected", "true");
    show(column.cells[current]);
  };
  const indexOf = (event) => cells.indexOf(event.target.closest(".course-token"));
  if (cells.length) cells[0].tabIndex = 0;
  list.addEventListener("pointerover", (event) => indexOf(event) >= 0 && show(column.cells[indexOf(event)]));
  list.addEventListener("focusin", (event) => indexOf(event) >= 0 && choose(indexOf(event)));
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
    event.stopPropagation(); // JupyterLab moves between cells with the same keys
    cells[moves[event.key]()].focus();
  });
  return list;
}

function render({ model, el }) {
  const button = element("button", { type: "button", class: "course-button" }, "Show the shift by one");
  const explained = element("p", { class: "course-note" }, SHIFT_EXPLAINED);
  const details = element("p", { class: "course-details", role: "status", "aria-live": "polite" }, HELP);
  const columns = element("div", { class: "course-columns" });
  const box = element("section", { class: "course-mask-view", "aria-label": "Tokens and loss mask" });
  let shownCell = null;

  const show = (cell) => {
    shownCell = cell;
    const scored = cell.predicts === null ? "nothing it predicts is scored" : `is scored on predicting ${cell.predicts}`;
    details.textContent = cell.description + (model.get("shift") ? `; ${scored}` : "");
  };
  const drawShift = () => {
    const on = model.get("shift");
    button.setAttribute("aria-pressed", String(on));
    explained.hidden = !on;
    box.classList.toggle("course-shift", on);
    if (shownCell) show(shownCell);
  };
  const drawColumns = () => {
    const all = model.get("columns");
    shownCell = null;
    details.textContent = HELP;
    columns.replaceChildren(
      ...all.map((column) => element(
        "div", { class: "course-column" },
        element("p", { class: "course-title" }, element("strong", {}, column.name), element("span", {}, column.counts)),
        ...(column.cells.length ? [tokenList(column, show)] : []),
      )),
    );
    box.replaceChildren(element("div", { class: "course-toolbar" }, button, legend(all)), explained, details, columns);
  };
  const toggle = () => {
    model.set("shift", !model.get("shift"));
    model.save_changes();
  };

  button.addEventListener("click", toggle);
  model.on("change:shift", drawShift);
  model.on("change:columns", drawColumns);
  drawColumns();
  drawShift();
  el.append(box);
  return () => {
    model.off("change:shift", drawShift);
    model.off("change:columns", drawColumns);
  };
}
export default { render };
