// Draws the `view` trait: memory by part as one bar against a card's, the controls, and settings that fit. Python does all arithmetic.

function key(part) {
  return element("span", { class: `course-key course-part-${part}`, "aria-hidden": "true" });
}

// The bar, the card's edge across it, and an axis in GiB. What it shows stands in the table beside it too.
function barNodes(view) {
  const stretches = view.segments.map((segment) =>
    element("span", { class: `course-part course-part-${segment.part}`, style: `width: ${segment.percent}%`, title: segment.words }),
  );
  const edge = element("span", { class: "course-card-edge", style: `left: ${view.card.percent}%` });
  const place = view.card.percent < 25 ? `left: ${view.card.percent}%` : `right: ${100 - view.card.percent}%`;
  const label = element("span", { class: "course-card-label", style: place }, view.card.label);
  const ticks = view.ticks.map((tick) => element("span", { style: `left: ${tick.percent}%` }, tick.label));
  return [
    element("div", { class: "course-card-line" }, label),
    element("div", { class: "course-memory-bar", role: "img", "aria-label": view.headline }, ...stretches, edge),
    element("div", { class: "course-axis", "aria-hidden": "true" }, ...ticks, element("span", { class: "course-unit" }, "GiB")),
  ];
}

function partsTable(view) {
  const rows = view.segments.map((segment) =>
    element("tr", { title: segment.words }, element("th", { scope: "row" }, key(segment.part), segment.part), element("td", {}, segment.size)),
  );
  return element("table", { class: "course-parts" }, element("caption", { class: "course-spoken" }, "Memory by part"), element("tbody", {}, ...rows));
}

function suggestionNode(suggestion, use) {
  const button = element("button", { type: "button", class: "course-button" }, "Use");
  button.setAttribute("aria-label", `Use: ${suggestion.words}`);
  button.addEventListener("click", () => use(suggestion.values));
  const changes = suggestion.changes.map((change) => element("code", {}, change));
  return element("li", {}, button, element("div", {}, element("p", {}, suggestion.words), element("p", { class: "course-changes" }, ...changes)));
}

function render({ model, el }) {
  const id = Math.random().toString(36).slice(2);
  const title = element("p", { class: "course-heading" });
  const headline = element("p", { class: "course-verdict", role: "status", "aria-live": "polite" });
  const picture = element("div", { class: "course-memory-picture" });
  const parts = element("div");
  const details = element("p", { class: "course-note" });
  const problem = element("p", { class: "course-problem", role: "alert" });
  const choices = element("div", { class: "course-controls" });
  const boxes = element("fieldset", { class: "course-boxes" }, element("legend", {}, "In host memory"));
  const why = element("p", { class: "course-note", id: `course-why-${id}` });
  boxes.setAttribute("aria-describedby", why.id);
  const fitting = element("div", { class: "course-fitting" });
  const command = element("p", { class: "course-command" });
  const box = element(
    "section",
    { class: "course-widget course-memory-planner", "aria-label": "Memory of a training" },
    title, headline, picture, element("div", { class: "course-memory-body" }, element("div", {}, parts, details), element("div", { class: "course-form" }, choices, boxes, why, problem)),
    fitting, command,
  );
  const inputs = new Map(); // controls keep their nodes, and so the focus

  const choose = (values) => {
    model.set("values", { ...model.get("values"), ...values });
    model.save_changes();
  };

  const drawControls = (view) => {
    const shown = new Set(view.controls.map((control) => control.name));
    for (const [name, select] of inputs) select.closest("label").hidden = !shown.has(name);
    for (const control of view.controls) {
      if (!inputs.has(control.name)) {
        const select = element("select", KEEP_KEYS);
        select.addEventListener("change", () => choose({ [control.name]: select.value }));
        inputs.set(control.name, select);
        choices.append(element("label", {}, element("span", { class: "course-name" }, control.label), select));
      }
      const select = inputs.get(control.name);
      const wanted = JSON.stringify(control.options);
      if (select.dataset.options !== wanted) {
        select.dataset.options = wanted;
        select.replaceChildren(...control.options.map(([value, text]) => element("option", { value }, text)));
      }
      select.value = control.value;
    }
  };

  const drawBoxes = (view) => {
    if (boxes.querySelectorAll("input").length === 0) {
      for (const [value, text] of view.offload.boxes) {
        const input = element("input", { type: "checkbox", value, ...KEEP_KEYS });
        input.addEventListener("change", () => choose({ offload: [...boxes.querySelectorAll("input:checked")].map((one) => one.value).join(",") }));
        boxes.append(element("label", {}, input, text));
      }
    }
    boxes.querySelectorAll("input").forEach((input, i) => {
      const [, , checked, allowed] = view.offload.boxes[i];
      input.checked = checked;
      input.disabled = !allowed;
    });
    why.textContent = view.offload.why;
  };

  const draw = () => {
    const view = model.get("view");
    if (!view.segments) return;
    title.textContent = view.title;
    if (headline.textContent !== view.headline) headline.textContent = view.headline; // said once
    headline.classList.toggle("course-fits", view.fits);
    picture.replaceChildren(...barNodes(view));
    parts.replaceChildren(partsTable(view));
    details.textContent = view.details;
    problem.textContent = view.problem;
    drawControls(view);
    drawBoxes(view);
    const list = view.suggestions.map((suggestion) => suggestionNode(suggestion, choose));
    const heading = !view.searched ? "Looking for settings that fit …" : list.length ? "Settings that fit this card, the fastest first" : view.fits ? "Nothing else is faster or needs less." : "No setting fits this card; take a smaller model.";
    fitting.replaceChildren(element("p", { class: "course-heading" }, heading), ...(list.length ? [element("ol", {}, ...list)] : []));
    command.replaceChildren(...(view.command ? ["Changed: ", element("code", {}, view.command)] : []));
  };

  model.on("change:view", draw);
  draw();
  el.append(box);
  return () => model.off("change:view", draw);
}
export default { render };
